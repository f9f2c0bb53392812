"""The border: what comes from outside is checked here, and a mistake becomes one line.

Outside are the command line, files, and whoever calls `generate`. A line says what was given, what was expected and
what to do. Every room may import this file; it imports none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import get_args, get_type_hints


class UserError(ValueError):
    """A mistake of the user's: the message says what was given, what was expected and what to do, on one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # what it quotes may have any number


class OptionParser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line, not the whole usage."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for text in args:  # a file's name may be any bytes, but settings.json and the pages are UTF-8
            try:
                text.encode()
            except UnicodeEncodeError:
                self.error(f"{text!a} is no UTF-8 text")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


class Ending:
    """How a command ended."""

    status = 0


@contextmanager
def one_line_at_most(stopped: str = "") -> Iterator[Ending]:
    """In here, a user's mistake or a file that cannot be written ends what goes on with one line, and status 2.

    Where `stopped` is given, Ctrl-C is 130 and that line, or the line that it brings along.
    """
    end = Ending()
    with heard_or_not():
        try:
            yield end
            return
        except UserError as mistake:
            said = f"error: {mistake}"
        except OSError as reason:
            where = f"{reason.filename}: " if reason.filename else ""
            said = f"error: {where}{reason.strerror or reason}; expected a folder that can be written"
        except KeyboardInterrupt as reason:
            if not stopped:
                raise
            said = str(reason) or stopped
        except BaseException as reason:
            if not is_panic(reason):
                raise
            said = f"error: a library gave up: {in_short(reason)}; what was saved stays"
        end.status = 2 if said.startswith("error: ") else 130
        print(said, file=sys.stderr)


def status_of(command: Callable[[], int | None], stopped: str = "") -> int:
    """Run a command with `one_line_at_most`; its status."""
    with one_line_at_most(stopped) as end:
        status = command()
        end.status = status if isinstance(status, int) else 0
    return end.status


class Unheard:
    """A stream whose reader may leave: what is said then goes nowhere, and the work goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # without any, Python has None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.silence()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.silence()

    def silence(self) -> None:
        """Python writes out at its end what is left, so that the stream itself has to lead nowhere."""
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def heard_or_not() -> Iterator[None]:
    """In here nothing ends because what is said has nowhere to go: `| head`, a closed terminal, a full disk."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = mine = tuple(map(Unheard, before))
    try:
        yield
    finally:
        for stream in mine:
            stream.flush()
        sys.stdout, sys.stderr = before


def is_panic(reason: BaseException) -> bool:
    """Did a library written in Rust give up? Python's bridge to it has no common class for this."""
    return type(reason).__name__ == "PanicException"


def one_line_for_ctrl_c() -> None:
    """Where nobody catches it, Ctrl-C gets a line and no page of traceback: while modules are imported, say."""

    def hook(kind, reason, traceback):
        if issubclass(kind, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
        else:
            sys.__excepthook__(kind, reason, traceback)

    sys.excepthook = hook


def in_short(reason: BaseException) -> str:
    """What a library's error says, in one line.

    >>> in_short(ValueError("No file.\\nTry another.")), in_short(KeyError())
    ('No file.', 'KeyError')
    >>> in_short(ValueError("Broken:\\n  it has no heads"))
    'Broken: it has no heads'
    """
    first, *more = [line.strip() for line in str(reason).splitlines()] or [type(reason).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first


# ----------------------------------------------------------------------------------------------------
# What a file says
# ----------------------------------------------------------------------------------------------------


MOST = 10**6  # No number is larger: further than anybody wants to go, and far from where float32 ends (3.4e38).
MOST_SEED = 2**32 - 1


def check_numbers(given: dict, lowest: dict[str, float], most: float = MOST) -> None:
    """Raise UserError for the first of these options that is given and out of its range."""
    for name, low in lowest.items():
        value = given.get(name)
        if value is not None and not low <= value <= most:
            expected = f"at most {most}" if value > most else f"{low} or more"
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected {expected}")


DEEPEST = 100  # lists and objects within each other


def from_json(text: str):
    """The value of a JSON text from outside. Raises ValueError also for what Python reads and then cannot write.

    >>> from_json('[1, null]')
    [1, None]
    >>> from_json(DEEPEST * "[[" + DEEPEST * "]]")
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        value = json.loads(text)
    except RecursionError as reason:
        raise ValueError("it is nested too deeply") from reason
    if text.count("[") + text.count("{") > DEEPEST:
        level = [value]
        for _ in range(DEEPEST):
            inside = [part.values() if isinstance(part, dict) else part for part in level]
            level = [part for parts in inside for part in parts if isinstance(part, dict | list)]
        if level:
            raise ValueError("it is nested too deeply")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError: half of a letter's two codes
    return value


def has_type(value, wanted) -> bool:
    """Is it a `wanted`, told apart as in JSON? An int is a float too, True is no int, and an int is below 2**53.

    >>> has_type(1, float | None), has_type(True, int), has_type(None, str), has_type(10**99, int)
    (True, False, False, False)
    """
    kinds = get_args(wanted) or (wanted,)
    if type(value) is int:
        return (int in kinds or float in kinds) and abs(value) < 2**53
    return type(value) in kinds


def check_types(settings) -> None:
    """Raise ValueError for the first field of a dataclass that has another type than it says."""
    wanted = get_type_hints(type(settings))
    for f in fields(settings):
        if not has_type(value := getattr(settings, f.name), wanted[f.name]):
            shown = repr(value) if isinstance(value, str | int | float) else f"of type {type(value).__name__}"
            raise ValueError(f"{f.name} is {shown:.60}; expected {f.type}")


def misfit(value, shape, name: str = "it") -> str | None:
    """What is wrong with a JSON value that should have a certain shape; None if it fits.

    shape: a type, `float | None` say; [shape], a list of such; or {"name": shape}, an object with at least these.

    >>> misfit({"step": 1, "texts": ["a", 2]}, {"step": int, "texts": [str]})
    'texts[1] is int, not str'
    """
    if isinstance(shape, list) and isinstance(value, list):
        parts = [(part, shape[0], f"{name}[{i}]") for i, part in enumerate(value)]
    elif isinstance(shape, dict) and isinstance(value, dict):
        if missing := [key for key in shape if key not in value]:
            return f"{name} has no {missing[0]}"
        parts = [(value[key], part, key) for key, part in shape.items()]
    elif not isinstance(shape, list | dict) and has_type(value, shape):
        return None
    else:
        wanted = type(shape) if isinstance(shape, list | dict) else shape
        return f"{name} is {type(value).__name__}, not {getattr(wanted, '__name__', wanted)}"
    return next(filter(None, (misfit(*part) for part in parts)), None)


# ----------------------------------------------------------------------------------------------------
# What `generate` is asked for
# ----------------------------------------------------------------------------------------------------


def check_generate_arguments(
    model, prompts, samples_per_prompt: int, max_new_tokens: int, eos_token_id: int | Sequence[int], temperature: float
) -> list[int]:
    """The ids that end a response, as a list. Raises ValueError with one line on the first argument out of range."""
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    empty = [p for p, ids in enumerate(prompts) if not len(ids)]
    longest = max(map(len, prompts), default=0)
    room = getattr(model.config, "max_position_embeddings", math.inf)
    for wrong, message in (
        (not len(prompts), "prompts is empty; expected at least one list of token ids"),
        (bool(empty), f"prompt {empty[0] if empty else ''} has no tokens; expected at least one"),
        (samples_per_prompt < 1, f"samples_per_prompt is {samples_per_prompt}; expected 1 or more"),
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; expected 1 or more"),
        (
            longest + max_new_tokens > room,
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but the model has "
            f"{room} positions; expected fewer tokens",
        ),
        (not stop, "eos_token_id is empty; expected the id (or ids) that ends a response"),
        (not 0 <= temperature < math.inf, f"temperature is {temperature}; expected 0 (greedy) or a positive number"),
    ):
        if wrong:
            raise ValueError(message)
    return stop


def check_attends_to_all(model) -> None:
    """Raise NotImplementedError if a layer looks at anything but all tokens before: a window, a softcap, no cache."""
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds != {"full_attention"} or getattr(config, "attn_logit_softcapping", None):
        raise NotImplementedError(
            f"{config.model_type}: clipo.py serves layers that attend to all tokens before, without window or softcap; "
            "use the engine (--engine fast)"
        )
    if (attention := getattr(config, "_attn_implementation", "sdpa")) not in ("sdpa", "clipo"):
        raise NotImplementedError(
            f"{config.model_type}: its attention is {attention!r}, which adds the True and False of clipo.py's mask as "
            'numbers; open the model with attn_implementation="sdpa", or use the engine (--engine fast)'
        )
