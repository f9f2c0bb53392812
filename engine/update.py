"""The fast twins of `clipo.response_logprobs` and `clipo.policy_gradient`: the same numbers, in less time and memory.

What they save, each in a function or class of its own:
    SharedPrompts   a prompt is computed once for all its rollouts; the plain pass computes it G times
    micro_batches   rollouts of like length go together, so that little padding is computed
    token_logprobs  logits exist for some thousand tokens at a time; the plain pass has (G, T, V) of them
    recomputing     of each layer only its input is kept, where memory is short
tests/engine/test_plain_equals_engine.py holds them equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from clipo import GRPO, PolicyLoss, Rollouts, in_float32, kl_k3, token_mean
from config import CLIPOConfig
from engine.forward import Cache, last_states, our_attention, output_logits, prefill, prompts_of


class PromptKeys(Cache):
    """The update's first pass: keeps every layer's keys and values of the prompts; gradients flow through them."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, each (P, H, slots, head width)

    def begin(self, positions: Tensor, used: int) -> Tensor:
        """The prompts look at themselves."""
        return positions

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with (P, H, slots, head width). Where `recomputing` again, to no effect."""
        self.layers.setdefault(layer_idx, (keys, values))
        return keys, values


class SharedPrompts(Cache):
    """The update's second pass: every layer puts the prompt's keys and values before the response's own.

    Each of a prompt's G rollouts would compute the prompt again; so it goes through the model once. Where prompts are
    as long as responses, an update takes 0.6 of the time (1M model on two AMD Zen 4 cores).
    """

    def __init__(self, prompts: PromptKeys, origin: Tensor):
        self.layers, self.origin = prompts.layers, origin  # (rows,) long: the prompt of each response

    def begin(self, positions: Tensor, used: int) -> Tensor:
        """Positions of the keys, of prompt and response, for each row."""
        slot = torch.arange(self.layers[0][0].shape[2], device=positions.device)
        beyond = torch.iinfo(torch.long).max  # a shorter prompt's padding, and its last token, which the response feeds
        before = slot.where(slot < positions[:, :1], beyond)  # (rows, slots)
        return torch.cat([before, positions], dim=1)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with (rows, H, T, head width)."""
        prompt_keys, prompt_values = self.layers[layer_idx]
        # index_select, not [origin]: the gradient of that adds rows in the order in which threads come.
        of_rows = (part.index_select(0, self.origin) for part in (prompt_keys, prompt_values))
        return tuple(torch.cat([before, own], 2) for before, own in zip(of_rows, (keys, values), strict=True))


# Keeps its arguments only, and calls the function again in the backward pass. (No dropout: no random numbers to keep.)
run_twice = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputing(model, wanted: bool):
    """Activation checkpointing: of each layer only its input is kept, the rest is computed again for the backward pass.

    For a third more time: 86 KB a token for Qwen2.5-0.5B in place of 1.7 MB. (`python -m engine.memory` has the sums.)
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and wanted]

    def both_times() -> tuple:
        """Contexts of the forward pass, in which our attention is on already, and of the later one."""
        return nullcontext(), our_attention(model)

    for layer in layers:
        layer.forward = partial(run_twice, layer.forward, context_fn=both_times)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # back to the class's own


def response_logprobs(
    model, prompts: Sequence[Sequence[int]], rollouts: Rollouts, *, temperature: float = 1.0, recompute: bool = False
) -> Tensor:
    """What `clipo.response_logprobs` returns, (P, G, T), from one pass over all. recompute: see `recomputing`."""
    P, G, _ = rollouts.tokens.shape
    origin = torch.arange(P, device=rollouts.tokens.device).repeat_interleave(G)  # (B,)
    tokens, mask = rollouts.tokens.flatten(0, 1), rollouts.mask.flatten(0, 1)  # (P, G, T) -> (B, T)
    return row_logprobs(model, prompts, origin, tokens, mask, temperature, recompute).unflatten(0, (P, G))


def row_logprobs(
    model,
    prompts: Sequence[Sequence[int]],
    origin: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: float,
    recompute: bool,
) -> Tensor:
    """The same for any rows: tokens (rows, T) and mask (rows, T) go on from prompts[origin], origin (rows,) long."""
    prompts, origin, last, length = prompts_of(origin, prompts)
    fed = torch.cat([last[:, None], tokens[:, :-1]], dim=1)  # (rows, T): the state at t - 1 predicts token t
    positions = length[:, None] - 1 + torch.arange(fed.shape[1], device=fed.device)  # (rows, T)
    with our_attention(model), recomputing(model, recompute):
        prefill(model, prompts, prompt_keys := PromptKeys())
        states = last_states(model, fed, positions, SharedPrompts(prompt_keys, origin), used=fed.shape[1])
    logprobs = token_logprobs(model, states[mask], tokens[mask], temperature)  # of the response tokens that are there
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)  # -> (rows, T)


LOGITS_AT_ONCE = 2**27  # 0.5 GB of float32; a micro-batch of 16,384 tokens of Qwen2.5 would have 10 GB, and twice over


def token_logprobs(model, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the given tokens: (N, D), (N,) -> (N,), without all (N, V) logits at once.

    They are computed in chunks of tokens, and each chunk again in the backward pass rather than kept for it.
    """

    def chunk(states: Tensor, tokens: Tensor) -> Tensor:
        logits = in_float32(output_logits(model, states)) / (temperature or 1.0)  # (n, V)
        return -F.cross_entropy(logits, tokens, reduction="none")

    size = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().out_features)
    if len(tokens) <= size:
        return chunk(states, tokens)
    parts = zip(states.split(size), tokens.split(size), strict=True)
    return torch.cat([run_twice(chunk, *part) for part in parts])


def micro_batches(
    lengths: Sequence[int],
    budget: int,
    block: int | None = None,
    prompts: Sequence[tuple[int, int]] | None = None,
) -> Iterator[list[int]]:
    """Rows cut into batches of at most `budget` tokens, padding counted (a longer row is alone).

    Rows of like length stand together, but only rows of one block of `block` rows (None: all are one block).
    `prompts` names the prompt of each row and its length; a batch computes, and counts, each of its prompts once.

    >>> list(micro_batches([3, 9, 4, 2], budget=8))
    [[3, 0], [2], [1]]
    >>> list(micro_batches([3, 9, 4, 2], budget=8, block=2))
    [[0], [1], [3, 2]]
    >>> list(micro_batches([2, 2, 2, 2], budget=13, prompts=[(0, 4), (0, 4), (1, 5), (1, 5)]))
    [[0, 1], [2, 3]]
    """
    block = block or len(lengths)
    for start in range(0, len(lengths), block):
        batch: list[int] = []
        before: dict[int, int] = {}  # the prompts of the batch and their lengths
        for row in sorted(range(start, min(start + block, len(lengths))), key=lengths.__getitem__):
            of_row = dict([prompts[row]]) if prompts else {}
            together = before | of_row
            tokens = (len(batch) + 1) * lengths[row] + len(together) * max(together.values(), default=0)
            if batch and tokens > budget:
                yield batch
                batch, together = [], of_row
            batch.append(row)
            before = together
        yield batch


def policy_gradient(
    policy,
    reference,
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    advantages: Tensor,
    config: CLIPOConfig,
    form: PolicyLoss = GRPO,
    *,
    micro_batch_tokens: int | None = None,
) -> dict[str, float | None]:
    """What `clipo.policy_gradient` does, in micro-batches; the gradient does not depend on how they are cut.

    micro_batch_tokens: prompt and response tokens in one (default: the settings').
    """
    low = form.low if config.clip_low is None else config.clip_low
    high = form.high if config.clip_high is None else config.clip_high
    P, G, _ = rollouts.tokens.shape
    weights = form.mean(rollouts.mask).flatten(0, 1)  # (P, G, T) -> (B, T)
    per_token = token_mean(rollouts.mask).flatten(0, 1)
    tokens, mask, old = (part.flatten(0, 1) for part in (rollouts.tokens, rollouts.mask, rollouts.logprobs))
    origin = torch.arange(P, device=tokens.device).repeat_interleave(G)
    lengths = mask.sum(-1).tolist()
    before = [(b // G, len(prompts[b // G]) - 1) for b in range(P * G)]  # its last token is the response's
    total = {"policy_loss": 0.0, "kl": None if reference is None else 0.0, "clip_fraction": 0.0}
    # Blocks of 16 prompts: the fewer there are in a micro-batch, the more rollouts share one.
    for rows in micro_batches(lengths, micro_batch_tokens or config.micro_batch_tokens, 16 * G, before):
        longest = max(lengths[row] for row in rows)
        rows = torch.tensor(rows, device=tokens.device)
        some = origin[rows], tokens[rows, :longest], mask[rows, :longest], config.temperature
        logprobs = row_logprobs(policy, prompts, *some, bool(config.recompute_activations))  # (rows, longest)
        log_ratio = logprobs - old[rows, :longest]
        surrogate, cut = form.surrogate(log_ratio, advantages.flatten()[rows, None], some[2], low, high)
        loss = -(surrogate * weights[rows, :longest]).sum()
        total["clip_fraction"] += (cut * per_token[rows, :longest]).sum().item()
        if reference is not None:
            with torch.no_grad():
                ref_logprobs = row_logprobs(reference, prompts, *some, recompute=False)
            kl = (kl_k3(logprobs, ref_logprobs) * per_token[rows, :longest]).sum()
            total["kl"] += kl.item()
            loss = loss + config.beta * kl
        total["policy_loss"] += loss.item()
        loss.backward()
    return total
