"""Rollouts against transformers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import transformers
from torch import Tensor

import clipo
from engine.rollouts import generate
from lab.bench.load import SIZES, Load, ending_ids, make_model, make_prompts
from lab.bench.machine import Machine, compare, times_faster


def by_transformers(model, prompts: Sequence[Sequence[int]], load: Load, eos: list[int], **chosen) -> Callable:
    """The same rollouts by `model.generate`: prompts padded on the left, one row per rollout. Returns its tokens."""
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(load.G)]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in rows], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in rows], device=model.device)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out = model.generate(
            ids, attention_mask=seen, do_sample=True, top_k=0, max_new_tokens=load.T, eos_token_id=eos, pad_token_id=0,
            **chosen,
        )  # fmt: skip
        return out[:, longest:]

    return run


def by_continuous_batching(model, prompts: Sequence[Sequence[int]], load: Load, eos: list[int]) -> Callable:
    rows = [prompt for prompt in prompts for _ in range(load.G)]
    settings = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=load.T, eos_token_id=eos, pad_token_id=0
    )
    return lambda seed: model.generate_batch(rows, generation_config=settings, progress_bar=False)


def floor_seconds(model, prompts, rollouts: clipo.Rollouts, rates: tuple[float, float]) -> float:
    """The least time these rollouts can take; no step serves the finished."""
    start = torch.tensor([len(ids) for ids in prompts], device=rollouts.mask.device)  # (P,)
    T = rollouts.mask.shape[2]
    position = (start[:, None, None] + torch.arange(T, device=start.device)).expand_as(rollouts.mask)[rollouts.mask]
    return least_seconds(model, T, position, sum(map(len, prompts)), rates)


def least_seconds(model, steps: int, position: Tensor, prompt_tokens: int, rates: tuple[float, float]) -> float:
    """All flops at the matmul rate, or all bytes at the copy rate, to decode tokens at `position` (N,) in some steps.

    A decode step reads all weights once and the keys and values of each row.
    """
    config, size = model.config, model.dtype.itemsize
    head_width = config.hidden_size // config.num_attention_heads
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    tokens, looked_at = len(position), int(position.sum())
    output = model.get_output_embeddings().weight.numel()  # a prompt's tokens need no logits
    flops = 2 * weights * tokens + 2 * (weights - output) * prompt_tokens
    flops += 4 * looked_at * config.hidden_size * config.num_hidden_layers
    keys_and_values = 2 * looked_at * config.num_key_value_heads * head_width * config.num_hidden_layers
    traffic = size * (weights * steps + keys_and_values)
    return max(flops / rates[0], traffic / rates[1])


def rollout_loads(machine: Machine) -> list[Load]:
    if machine.quick:
        return [Load("1M", 2, 4, 16)]
    if machine.on_gpu:
        return [Load(size, 16, 16, 512) for size in SIZES]
    shapes = ("1M", 16, 16), ("34M", 16, 16), ("0.5B", 4, 4)
    return [Load(*shape, T, late) for shape in shapes for T, late in ((40, True), (128, False))]


def rollouts_table(machine: Machine) -> list[dict]:
    return [row for load in rollout_loads(machine) for row in rollouts_rows(machine, load)]


PEERS = {  # transformers' ways: what `generate` is told; the last is none of `generate`'s
    "generate": {},
    "generate, static cache, compiled": {"cache_implementation": "static"},
    "continuous batching": None,
}


def rollouts_rows(machine: Machine, load: Load, peers: Sequence[str] | None = None) -> list[dict]:
    """Ours first, then those of PEERS that are named (by default all that pay on this kind of machine)."""
    model, prompts, eos = make_model(load.size, machine), make_prompts(load), ending_ids(load)
    ours, produced, peaks = "ours", {}, {}

    def our_rollouts(seed: int, compiled: bool = machine.on_gpu, kept: list | None = None) -> clipo.Rollouts:
        return generate(
            model, prompts, samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=eos,
            generator=torch.Generator().manual_seed(seed + 1), compiled=compiled, kept=kept,
        )  # fmt: skip

    def count(name: str, side: Callable) -> Callable:
        """The side, with its useful tokens (up to and with the end of each response) and peak memory noted."""

        def run(seed: int) -> None:
            machine.forget_peak()
            produced.setdefault(name, []).append(useful_tokens(side(seed), eos))
            peaks[name] = machine.peak()

        return run

    sides = {ours: our_rollouts}
    if machine.on_gpu:
        sides = {
            ours: partial(our_rollouts, kept=[]),  # graphs of the run before, as in training
            "ours, captured anew": our_rollouts,
            "ours, not compiled": partial(our_rollouts, compiled=False),
        }
    elif machine.compile:
        sides["ours, compiled"] = partial(our_rollouts, compiled=True)
    for peer in peers or list(PEERS)[: None if machine.on_gpu else 1]:
        told = PEERS[peer]
        sides[peer] = (
            by_continuous_batching(model, prompts, load, eos)
            if told is None
            else by_transformers(model, prompts, load, eos, **told)
        )
    floor = floor_seconds(model, prompts, our_rollouts(0), machine.rates())
    times = compare(machine, {name: count(name, side) for name, side in sides.items()})
    speed = {name: [n / s for n, s in zip(produced[name][1:], times[name], strict=True)] for name in sides}
    return [
        {
            "load": str(load),
            "side": name,
            "tokens/s": round(statistics.median(speed[name])),
            "spread": f"{min(speed[name]):.0f} to {max(speed[name]):.0f}",
            "ours is faster": times_faster(speed[ours], speed[name]),
            "peak GB": peaks[name] and round(peaks[name], 2),
            "floor reached": f"{floor / statistics.median(times[ours]):.0%}" if name == ours else "",
        }
        for name in sides
    ]


def useful_tokens(made, eos: list[int]) -> int:
    """Tokens up to and with the end of each response, in what one of the sides made.

    >>> useful_tokens(torch.tensor([[5, 1, 1], [1, 0, 0], [4, 4, 4]]), eos=[1])
    6
    """
    if isinstance(made, clipo.Rollouts):
        return int(made.mask.sum())
    if isinstance(made, dict):  # continuous batching: one result per request
        return sum(len(result.generated_tokens) for result in made.values())
    ended = torch.isin(made, torch.tensor(eos, device=made.device)).int()
    return int((ended.cumsum(-1) - ended == 0).sum())
