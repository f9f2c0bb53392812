"""Can this model be served? Found out once, before any rollout, by comparison with plain forward passes.

Some architectures keep other state than keys and values, count positions in their own way, look back no further than a
window, or scale their logits. Two sequences of different length, longer than any window, tell, whatever the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import clipo
from border import check_attends_to_all, in_short
from clipo import Rollouts, in_float32
from engine.compiled import CompiledSteps, why_not
from engine.forward import KVCache, decoded_states, output_logits, prefill, product_dtype, serving
from engine.update import response_logprobs

checked_models: WeakKeyDictionary = WeakKeyDictionary()  # model -> the engines that serve it
not_compiled: WeakKeyDictionary = WeakKeyDictionary()  # model -> why its decode steps are not compiled; "" if they are
LONGEST_WINDOW = 2048  # that is tried out; the engine knows the usual windows, and serves them whatever their length


def check_model(model, engine: str = "fast") -> None:
    """Do prefill, decode and the update of an engine give the numbers of a plain forward pass? Else an error.

    Raises NotImplementedError or ValueError, each with the reason in one line.
    """
    if engine in checked_models.get(model, ()):
        return
    if engine == "plain":
        check_attends_to_all(model)
    name, config = type(model).__name__, model.config
    rope = getattr(config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if depends_on_length := types & {"dynamic", "longrope"}:
        raise NotImplementedError(
            f"{name} cannot be served by KVCache: its rotary embedding ({depends_on_length.pop()}) "
            "changes with the longest row of a batch; use a model with another rope_type"
        )
    try:
        compare(model, engine, decoded, updated)
    except (ValueError, AttributeError, TypeError, RuntimeError, LookupError) as reason:
        raise ValueError(
            f"{name} cannot be served by KVCache: {reason}. Expected a decoder-only model "
            "that takes position_ids, a 4-D attention_mask and past_key_values, as Qwen2 and Llama do"
        ) from reason
    checked_models.setdefault(model, set()).add(engine)


def may_compile(model) -> bool:
    """Do compiled decode steps, in today's precision, agree with a plain forward pass? If not, that is said once."""
    if model not in not_compiled:
        why = why_not(model) or ""
        try:
            if not why:
                compare(model, "compiled", decoded)
        except (ValueError, RuntimeError) as reason:  # no compiler, say
            why = in_short(reason)
        if why:
            said = f"decode steps are not compiled: {why}; rollouts go on without, slower"
            warnings.warn_explicit(said, UserWarning, "engine/check.py", 0)  # (a line of its own, no line of the code)
        not_compiled[model] = why
    return not not_compiled[model]


def compare(model, engine: str, *parts: Callable) -> None:
    """Raise ValueError if numbers of an engine are not those of a plain forward pass."""
    sequences, compiled = trial_sequences(model), engine == "compiled"
    with exact_products(model):
        expected = [in_float32(model(input_ids=ids[None]).logits[0, -3:]) for ids in sequences]  # (3, V) each
    scale = max(logits.abs().max().item() for logits in expected)
    with nullcontext() if compiled else exact_products(model):  # compiled once more it would be for other products
        in_full = product_dtype(model.get_input_embeddings().weight) == torch.float32
        most = (0.1 if not in_full else 0.01 if compiled else 1e-3) * scale
        for part in parts:
            for what, got, wanted in part(model, sequences, expected, engine):
                off = (in_float32(got) - wanted).abs().max().item()
                if not off <= most:
                    raise ValueError(f"its {what} are off by {off:.2g} (largest logit {scale:.2g})")


@contextmanager
def exact_products(model):
    """No dropout, no autocast, no TF32, whatever the process has set; afterwards all is as it was."""
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)


def trial_sequences(model) -> list[Tensor]:
    """Two sequences of token ids, longer than every window that the model's settings name and the engine does not."""
    config, vocabulary = model.config, model.get_input_embeddings().num_embeddings
    windows = [v for n, v in vars(config).items() if "window" in n and n != "sliding_window" and type(v) is int]
    room = getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW
    length = min(max([w for w in windows if w <= LONGEST_WINDOW], default=0) + 16, room)
    sequences = (torch.arange(length) * 7 + 3, torch.arange(length - 9) * 5 + 9)
    return [(ids % vocabulary).to(model.device) for ids in sequences]


def decoded(model, sequences, expected, engine: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Prefill, then the last token but one and the last: the logits of both steps beside those expected."""
    prompts = [ids[:-1].tolist() for ids in sequences]  # each prompt's last token is fed by the first step
    slots, positions = len(sequences[0]), torch.tensor([[len(ids)] for ids in sequences], device=model.device)
    if engine == "plain":
        clipo.prefill(model, prompts, cache := clipo.KVCache(slots))
    else:
        step = CompiledSteps(model, slots) if engine == "compiled" else partial(decoded_states, model)
        with serving(model):
            prefill(model, prompts, cache := KVCache(len(sequences) + 1, slots + 1))  # with room to spare, as usual
    for back in (2, 1):
        token = torch.stack([ids[-back] for ids in sequences])[:, None]  # (2, 1)
        if engine == "plain":
            states = clipo.last_states(model, token, positions - back, cache)
            logits = clipo.output_logits(model, states)[:, 0]
        else:
            with serving(model):
                states = step(token[:, 0], positions[:, 0] - back, cache, used=slots + 1 - back)
                logits = step.logits(states) if engine == "compiled" else output_logits(model, states)
        yield "logits", logits, torch.stack([of[-back] for of in expected])


def updated(model, sequences, expected, engine: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The update's log-probs of the last two tokens beside those expected."""
    prompts, tokens = [ids[:-2].tolist() for ids in sequences], torch.stack([ids[-2:] for ids in sequences])[:, None]
    mask = torch.ones_like(tokens, dtype=torch.bool)  # (2, 1, 2)
    rollouts = Rollouts(tokens, mask, torch.zeros(mask.shape, device=mask.device), tokens.float())
    compute = clipo.response_logprobs if engine == "plain" else response_logprobs
    wanted = torch.stack([of[:2].log_softmax(-1) for of in expected])[:, None]  # (2, 1, 2, V)
    yield "log-probs in the update", compute(model, prompts, rollouts), wanted.gather(-1, tokens[..., None])[..., 0]
