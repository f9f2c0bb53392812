"""Candidates for a GPU: what could take the place of a part of the engine, beside what has it. Tables of `lab.gpu`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

from border import in_short
from engine.compiled import attend
from engine.forward import attention_mask, cached_attention
from engine.update import response_logprobs, token_logprobs
from lab.bench.load import SIZES, Load, make_prompts, make_trainer, some_rollouts
from lab.bench.machine import Machine, compare
from lab.bench.update import update_flops

# ----------------------------------------------------------------------------------------------------
# Attention of one token a row
# ----------------------------------------------------------------------------------------------------


def one_query_ways(machine: Machine, keys: Tensor, values: Tensor, position: Tensor) -> dict[str, Callable]:
    """By name: q (rows, H, Hq / H, width) -> the same; keys, values (rows, H, slots, width), seen up to `position`."""
    rows, _, slots, _ = keys.shape
    compiled = torch.compile if machine.on_gpu and not machine.quick else lambda function: function
    mask = attention_mask(position[:, None], torch.arange(slots, device=machine.device)[None], None, keys.dtype)
    row = torch.arange(rows, device=machine.device)

    def with_mask(q: Tensor) -> Tensor:
        mixed, _ = cached_attention(None, q.flatten(1, 2)[:, :, None], keys, values, mask)
        return mixed[:, 0].view_as(q)

    def flex() -> Callable:
        seen = create_block_mask(lambda b, h, q, k: k <= position[b], rows, None, 1, slots, device=machine.device)
        run = compiled(flex_attention)
        return lambda q: run(q.flatten(1, 2)[:, :, None], keys, values, block_mask=seen, enable_gqa=True).view_as(q)

    def paged() -> Callable:
        from torch.nn.attention.varlen import varlen_attn

        pages = keys.transpose(1, 2), values.transpose(1, 2)  # a row is a page: (rows, slots, H, width)
        begin, used = torch.arange(rows + 1, device=machine.device).int(), (position + 1).int()
        chosen = dict(enable_gqa=True, seqused_k=used, block_table=row[:, None].int())
        return lambda q: varlen_attn(q.flatten(1, 2), *pages, begin, None, 1, slots, **chosen).view_as(q)

    return {
        "two products, compiled": lambda: partial(compiled(attend), keys=keys, values=values, position=position),
        "PyTorch's masked kernel": lambda: with_mask,
        "FlexAttention, its mask made before": flex,
        "varlen_attn, a row is a page": paged,
    }


def attention_table(machine: Machine) -> list[dict]:
    """One layer's attention of a decode step of Qwen2.5-0.5B, by (rows, slots in use), each way as a replayed graph."""
    *_, width, _, _, query_heads, heads = SIZES["0.5B"]
    table, (_, traffic) = [], machine.rates()
    for rows, slots in [(4, 32)] if machine.quick else [(n, used) for n in (256, 16, 1) for used in (256, 768)]:
        shape = rows, heads, slots, width // query_heads
        keys, values = torch.randn(2, *shape, device=machine.device, dtype=machine.dtype).unbind(0)
        q = torch.randn(rows, heads, query_heads // heads, shape[3], device=machine.device, dtype=machine.dtype)
        position = torch.full((rows,), slots - 1, device=machine.device)
        exact = attend(*(part.float() for part in (q, keys, values)), position)
        for name, make in one_query_ways(machine, keys, values, position).items():
            row = {"rows": rows, "slots": slots, "way": name}
            try:
                way = make()
                off = (way(q).float() - exact).abs().max().item()
                seconds = replayed_seconds(machine, partial(way, q))
                least = 2 * keys.nbytes / traffic
                row |= {"microseconds": f"{1e6 * seconds:.1f}", "of the copy rate": f"{least / seconds:.0%}",
                        "off by": f"{off:.0e}"}  # fmt: skip
            except (RuntimeError, ImportError, NotImplementedError, ValueError) as reason:
                row["not possible here"] = in_short(reason)[:100]
            table.append(row)
    return table


def replayed_seconds(machine: Machine, work: Callable[[], object], times: int = 20) -> float:
    """Of one call among many that are launched at once, as a captured decode step launches them; median of five."""
    run = lambda: [work() for _ in range(times)]  # noqa: E731
    run()
    if machine.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return statistics.median(machine.seconds(run) for _ in range(5)) / times


# ----------------------------------------------------------------------------------------------------
# The update's forward and backward pass
# ----------------------------------------------------------------------------------------------------


def packed_logprobs(model, prompts: list[list[int]], rollouts) -> Tensor:
    """What `response_logprobs` returns, from one row of all prompts and responses behind each other: no padding."""
    P, G, T = rollouts.mask.shape
    lengths = [len(prompts[p]) + int(n) for p, group in enumerate(rollouts.mask.sum(-1).tolist()) for n in group]
    pieces = [
        torch.cat([rollouts.tokens.new_tensor(prompts[p]), rollouts.tokens[p, g][rollouts.mask[p, g]]])
        for p in range(P)
        for g in range(G)
    ]
    tokens = torch.cat(pieces)[None]  # (1, N)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(tokens.device)
    with attending_by_packs(model, lengths, tokens.device):
        states = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[0]
    first = [len(prompts[p]) for p in range(P) for _ in range(G)]
    begin = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    said = torch.cat([torch.arange(b + f, b + n) for b, f, n in zip(begin.tolist(), first, lengths, strict=True)])
    said = said.to(tokens.device)
    logprobs = token_logprobs(model, states[said - 1], tokens[0, said], 1.0)
    return logprobs.new_zeros(P, G, T).masked_scatter(rollouts.mask, logprobs)


@contextmanager
def attending_by_packs(model, lengths: list[int], device: torch.device) -> Iterator[None]:
    """Each of so many tokens looks at those before it in its own sequence."""
    begin = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

    def attention(module, query, key, value, mask, scaling=None, **_) -> tuple[Tensor, None]:
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (1, H, N, width) -> (N, H, width)
        if device.type == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            longest = max(lengths)
            chosen = dict(scale=scaling, window_size=(-1, 0), enable_gqa=True)
            return varlen_attn(q, k, v, begin, begin, longest, longest, **chosen)[None], None
        parts = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (q, k, v)), strict=True)
        mixed = [F.scaled_dot_product_attention(*own, is_causal=True, scale=scaling, enable_gqa=True) for own in parts]
        return torch.cat(mixed, 1).transpose(0, 1)[None], None

    before = model.config._attn_implementation
    AttentionInterface.register("clipo-packed", attention)
    model.config._attn_implementation = "clipo-packed"
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def layers_compiled(model) -> Iterator[None]:
    """Each decoder layer by the compiler, as it stands."""
    layers = list(model.base_model.layers)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def passes_table(machine: Machine, load: Load) -> list[dict]:
    """Forward and backward pass of the update, a micro-batch: as it is, by compiled layers, in packed rows."""
    trainer, prompts, rollouts = make_trainer(machine, load, [1]), make_prompts(load), some_rollouts(machine, load)
    model, (rate, _) = trainer.policy, machine.rates()
    given = trainer.policy, prompts, rollouts
    ways = {
        "as it is": (response_logprobs, nullcontext()),
        "layers compiled": (response_logprobs, nullcontext() if machine.quick else layers_compiled(model)),
        "packed rows": (packed_logprobs, nullcontext()),
    }
    with torch.no_grad():
        exact = response_logprobs(*given)
    rows = []
    for name, (compute, inside) in ways.items():
        row = {"load": str(load), "way": name}

        def passes(_=None, compute=compute) -> Tensor:
            with trainer.mixed_precision():
                logprobs = compute(*given)
            logprobs.sum().backward()
            return logprobs.detach()

        try:
            with inside:
                off = (passes() - exact).abs().mean().item()
                seconds = statistics.median(compare(machine, {name: passes})[name])
            row |= {"s": f"{seconds:.2f}", "tokens/s": f"{int(rollouts.mask.sum()) / seconds:,.0f}",
                    "of the matmul rate": f"{update_flops(model, prompts, rollouts) / seconds / rate:.0%}",
                    "off by, mean": f"{off:.0e}"}  # fmt: skip
        except (RuntimeError, ImportError, NotImplementedError, ValueError) as reason:
            row["not possible here"] = in_short(reason)[:100]
        model.zero_grad(set_to_none=True)
        rows.append(row)
    return rows
