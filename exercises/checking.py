"""What the checks share: whose answer is checked, and how a wrong one is told what is wrong with it.

What is expected is computed in the checks by another way than an answer's (plain loops in float64, transformers,
autograd), never by the function of clipo.py that the task asks for: a student's copy does not have it.

A check says nothing of its own lines, only what an answer returned, and which lines of the answer failed.

python -m exercises.checking EXERCISE ANSWER.py RESULTS      one answer, for exercises/grade.py
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
EXERCISES = sorted(folder.name for folder in HERE.iterdir() if folder.name[:2].isdigit())


# ----------------------------------------------------------------------------------------------------
# Answers
# ----------------------------------------------------------------------------------------------------


def file_of(exercise: str) -> Path:
    """The answer to check: the exercise's answer.py, or the file of its name in the folder CLIPO_ANSWERS."""
    elsewhere = os.environ.get("CLIPO_ANSWERS")
    return Path(elsewhere).resolve() / f"{exercise}.py" if elsewhere else HERE / exercise / "answer.py"


def answer_of(exercise: str) -> ModuleType:
    return load(file_of(exercise))


def load(file: Path) -> ModuleType:
    """A Python file as a module; its folder's name starts with a digit, so that `import` cannot."""
    spec = importlib.util.spec_from_file_location(f"answer_{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(reason: BaseException, file: Path) -> str:
    """What a student is told of an exception: the lines of the answer that it came through, and none of the check's."""
    if isinstance(reason, NotImplementedError | pytest.fail.Exception):
        return str(reason)
    if isinstance(reason, FileNotFoundError) and not file.exists():
        return f"{file} is missing"
    what = f"{type(reason).__name__}: {str(reason).strip() or 'without a message'}"
    if isinstance(reason, SyntaxError) and reason.filename == str(file):
        return (
            f"{file.name}, line {reason.lineno}: {(reason.text or '').strip()}\n{type(reason).__name__}: {reason.msg}"
        )
    if isinstance(reason, AttributeError) and isinstance(reason.obj, ModuleType) and reason.obj.__file__ == str(file):
        return f"{file.name} has no {reason.name}; write it there again, with the name that the task gives it"
    if isinstance(reason, SystemExit):
        what = "the answer ends the program (sys.exit, quit); a check cannot go on after that"
    lines = [frame for frame in traceback.extract_tb(reason.__traceback__) if frame.filename == str(file)]
    shown = [f"{file.name}, line {frame.lineno}, in {frame.name}: {frame.line}" for frame in lines[-4:]]
    return "\n".join([*shown, what] if shown else [f"the check could not use what the answer returned. {what}"])


def checks_of(exercise: str) -> list[tuple[str, Callable]]:
    """The checks of an exercise, in the order in which they stand in its test file."""
    (file,) = (HERE / exercise).glob("test_*.py")
    tests = inspect.getmembers(load(file), inspect.isfunction)
    mine = [(name, test) for name, test in tests if name.startswith("test_")]
    return sorted(mine, key=lambda each: each[1].__code__.co_firstlineno)


def verdicts(exercise: str, file: Path) -> Iterator[tuple[str, str | None]]:
    """Each check's name and what it says to the answer in a file; None if it passes."""
    for name, check in checks_of(exercise):
        torch.manual_seed(0)
        try:
            check(load(file))
        except BaseException as reason:  # an answer may do anything
            yield name, told(reason, file)
        else:
            yield name, None


# ----------------------------------------------------------------------------------------------------
# What checks compare with
# ----------------------------------------------------------------------------------------------------


def small_model():
    """A Qwen2 with random weights, of 30 tokens. They are large: its logits are far from uniform."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # here, so that the other checks need not wait for it

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=None, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def picking(z: Tensor, pairs, tau: float) -> Tensor:
    """InfoNCE as torch's cross entropy of picking j from a line-up: (P, G, E) -> (P, G), 0 for no anchor."""
    P, G = z.shape[:2]
    lineup = (z @ z.mT / tau).masked_fill(torch.eye(G, dtype=torch.bool), -math.inf)
    suspect = pairs.target.int().argmax(-1).masked_fill(~pairs.anchor, -100)  # (P, G); -100: left out
    return F.cross_entropy(lineup.view(P * G, G), suspect.view(-1), reduction="none").view(P, G)


# ----------------------------------------------------------------------------------------------------
# What an answer is told
# ----------------------------------------------------------------------------------------------------


def wrong(message: str) -> None:
    pytest.fail(message, pytrace=False)


def call(function: Callable, *arguments, **named):
    """The function's result; fails if it does not take these arguments, or changes one of them."""
    name = getattr(function, "__name__", "the function")
    try:
        given = inspect.signature(function).bind(*arguments, **named).arguments
    except TypeError as reason:
        wrong(f"{name}: {reason}; keep the arguments that its first line had")
    before = {key: [each.clone() for each in tensors_in(value)] for key, value in given.items()}
    result = function(*arguments, **named)
    for key, values in before.items():
        if not all(same(now, then, 0.0, 0.0) for now, then in zip(tensors_in(given[key]), values, strict=True)):
            wrong(f"{name} changes its argument {key}, which its caller still needs; make a new tensor")
    return result


def tensors_in(value) -> list[Tensor]:
    """A tensor, or those of a tuple (of `Pairs`, say)."""
    return [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Tensor)]


def agree(
    got, expected: Tensor, given: str, mistakes: dict[str, Tensor] | None = None, atol: float = 1e-5, rtol: float = 1e-4
) -> None:
    """Fail, with a line that helps, unless `got` equals `expected`. mistakes: {what is wrong: what one then gets}."""
    if not isinstance(got, Tensor):
        missing = " (is a return missing?)" if got is None else ""
        wrong(f"{given}: got {got!r}{missing}; expected a tensor of shape {tuple(expected.shape)}")
    if got.shape != expected.shape:
        wrong(f"{given}: got a tensor of shape {tuple(got.shape)}; expected {tuple(expected.shape)}")
    if (expected.dtype == torch.bool) != (got.dtype == torch.bool) or got.is_complex():
        wanted = "True and False (bool)" if expected.dtype == torch.bool else "numbers (float)"
        wrong(f"{given}: got a tensor of {str(got.dtype).removeprefix('torch.')}; expected {wanted}")
    got = got.detach()
    if same(got, expected, atol, rtol):
        return
    for why, value in (mistakes or {}).items():
        if value.shape == got.shape and same(got, value, atol, rtol):
            wrong(f"{given}: {why}\n{differences(got, expected, atol, rtol)}")
    nan = got.is_floating_point() and (got.isnan() & ~expected.isnan()).any()
    why = "\n  nan is what 0 / 0, inf - inf and log 0 times False give; torch.where leaves a place out" if nan else ""
    wrong(f"{given}:\n{differences(got, expected, atol, rtol)}{why}")


def same(a: Tensor, b: Tensor, atol: float, rtol: float = 1e-4) -> bool:
    return torch.allclose(a.double(), b.double(), atol=atol, rtol=rtol, equal_nan=True)


def differences(got: Tensor, expected: Tensor, atol: float, rtol: float, most: int = 3) -> str:
    """The first entries that differ, with as many digits as it takes to see it.

    >>> print(differences(torch.tensor([1.0, 0.25]), torch.tensor([1.0, 0.250004]), 0, 0))
      at [1]: got 0.25, expected 0.250004
    """
    apart = ~torch.isclose(got.double(), expected.double(), atol=atol, rtol=rtol, equal_nan=True)
    places = apart.nonzero().tolist()
    lines = []
    for at in places[:most]:
        a, b = got[tuple(at)].item(), expected[tuple(at)].item()
        if not isinstance(b, bool):
            a, b = next((f"{a:.{d}g}", f"{b:.{d}g}") for d in (4, 6, 9, 17) if f"{a:.{d}g}" != f"{b:.{d}g}" or d == 17)
        lines.append(f"  {f'at {at}: ' if at else ''}got {a}, expected {b}")
    left = len(places) - len(lines)
    return "\n".join(lines + [f"  and {left} more of {got.numel()}"] * (left > 0))


def gradient(value: Tensor, of: Tensor, name: str) -> Tensor:
    """The gradient of the sum of `value`; fails if none reaches the argument `name`."""
    found = torch.autograd.grad(value.sum(), of, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        wrong(f"no gradient reaches {name}: something in the answer detaches it (detach, no_grad, item, numpy, tolist)")
    return found


def number(value, name: str, low: float = -math.inf, high: float = math.inf, why: str = "") -> float:
    """A number that an answer returned or has written down, from `low` to `high`; why: what else to say."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bounds = "" if low == -math.inf else f" from {low:g} to {high:g}" if high < math.inf else f", at least {low:g}"
        wrong(f"{name} is {value!r}; expected a number{bounds}{why}")
    return value


def predicted(value, low: float, high: float) -> float:
    """A prediction that a student has written down. Nobody checks whether it is right."""
    why = ". Write it down before you run the experiment; whether it is right is not checked"
    return number(value, "PREDICTION", low, high, why)


def explains(given: str, right: str, choices: dict[str, str]) -> None:
    """Fail unless EXPLANATION is the right letter; a wrong one is told why not. choices: {wrong letter: why not}."""
    if given != right:
        letters = ", ".join(sorted([right, *choices]))
        why = choices.get(given) if isinstance(given, str) else None
        wrong(f"EXPLANATION: {why or f'it is {given!r}; expected one of: {letters}'}")


# ----------------------------------------------------------------------------------------------------
# One answer in a process of its own
# ----------------------------------------------------------------------------------------------------


def main(exercise: str, answer: str, results: str) -> None:
    """Write a line of JSON for each check, as soon as it is over: [its name, what it says or null]."""
    with open(results, "a", encoding="utf-8") as file:
        for name, message in verdicts(exercise, Path(answer)):
            file.write(json.dumps([name, message]) + "\n")
            file.flush()
    os._exit(0)  # threads that the answer started are not waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
