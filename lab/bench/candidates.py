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


def one_query_ways(machine: Machine, position: Tensor, slots: int) -> dict[str, Callable]:
    """By name, what makes a function of q (rows, H, Hq / H, width), keys and values (rows, H, slots, width), that are
    seen up to `position` (rows,)."""
    rows, on = len(position), machine.device
    compiles = machine.on_gpu and not machine.quick

    def compiled(function: Callable, dynamic: bool) -> Callable:
        return torch.compile(function, dynamic=dynamic) if compiles else function

    def products() -> Callable:
        return partial(compiled(attend, dynamic=True), position=position)

    def with_mask() -> Callable:
        mask = attention_mask(position[:, None], torch.arange(slots, device=on)[None], None, machine.dtype)

        def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            mixed, _ = cached_attention(None, q.flatten(1, 2)[:, :, None], keys, values, mask)
            return mixed[:, 0].view_as(q)

        return run

    def flex() -> Callable:
        """Its kernel for decoding wants the queries of a key head to be a power of two: 8, where Qwen2.5 has 7."""
        seen = create_block_mask(lambda b, h, q, k: k <= position[b], rows, None, 1, slots, device=on)
        attention = compiled(flex_attention, dynamic=False)

        def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            group = q.shape[2]
            padded = F.pad(q, (0, 0, 0, (1 << (group - 1).bit_length()) - group))
            mixed = attention(padded.flatten(1, 2)[:, :, None], keys, values, block_mask=seen, enable_gqa=True)
            return mixed.view_as(padded)[:, :, :group]

        return run

    def paged() -> Callable:
        from torch.nn.attention.varlen import varlen_attn

        begin, used = torch.arange(rows + 1, device=on).int(), (position + 1).int()
        chosen = dict(enable_gqa=True, seqused_k=used, block_table=torch.arange(rows, device=on)[:, None].int())

        def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            pages = keys.transpose(1, 2), values.transpose(1, 2)  # a row is a page: (rows, slots, H, width)
            return varlen_attn(q.flatten(1, 2), *pages, begin, begin * slots, 1, slots, **chosen).view_as(q)

        return run

    return {
        "two products, compiled": products,
        "PyTorch's masked kernel": with_mask,
        "FlexAttention, its mask made before": flex,
        "varlen_attn, a row is a page": paged,
    }


def attention_table(machine: Machine) -> list[dict]:
    """Attention of a decode step of Qwen2.5-0.5B, by (rows, slots in use), each way as a replayed graph.

    All layers, each with keys of its own, as in a step: those of one would lie in a GPU's cache from call to call.
    """
    _, width, _, layers, query_heads, heads = SIZES["0.5B"]
    layers = 2 if machine.quick else layers
    table, (_, traffic) = [], machine.rates()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as while rollouts run
    for rows, slots in [(4, 32)] if machine.quick else [(n, used) for n in (256, 16, 1) for used in (256, 768)]:
        shape = rows, heads, slots, width // query_heads
        stored = [torch.randn(2, *shape, device=machine.device, dtype=machine.dtype).unbind(0) for _ in range(layers)]
        q = torch.randn(rows, heads, query_heads // heads, shape[3], device=machine.device, dtype=machine.dtype)
        position = torch.full((rows,), slots - 1, device=machine.device)
        exact = attend(q.float(), *(part.float() for part in stored[0]), position)
        least = 2 * layers * stored[0][0].nbytes / traffic
        for name, make in one_query_ways(machine, position, slots).items():
            torch.compiler.reset()
            row = {"rows": rows, "slots": slots, "way": name}
            with whatever_fails(row):
                way = make()
                off = (way(q, *stored[0]).float() - exact).abs().max().item()
                seconds = replayed_seconds(machine, lambda way=way: [way(q, *own) for own in stored])  # noqa: B023
                row |= {"microseconds a layer": f"{1e6 * seconds / layers:.1f}",
                        "of the copy rate": f"{least / seconds:.0%}", "off by": f"{off:.0e}"}  # fmt: skip
            table.append(row)
    return table


@contextmanager
def whatever_fails(row: dict) -> Iterator[None]:
    """A way that this device, or this torch, does not have says so in its row."""
    try:
        yield
    except (RuntimeError, ImportError, NotImplementedError, ValueError, TypeError) as reason:
        row["not possible here"] = in_short(reason)[:100]


def replayed_seconds(machine: Machine, work: Callable[[], object]) -> float:
    """Of work that is launched at once, as a captured decode step launches it; median of five."""
    work()
    if machine.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    return statistics.median(machine.seconds(work) for _ in range(5))


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
        # (1, H, N, width) -> (N, H, width), all as the values: a rotation may have left the others in float32.
        q, k, v = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
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
def parts_compiled(model) -> Iterator[None]:
    """What is no product with a cache, by the compiler: norms and feed-forwards, one compilation for all layers each.

    (A whole layer is compiled anew for each number of keys that the cache holds: the compiler sees a dict that grows.)
    """
    parts = [of for layer in model.base_model.layers for of in (layer.input_layernorm, layer.post_attention_layernorm)]
    parts += [layer.mlp for layer in model.base_model.layers]
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=True)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def passes_table(machine: Machine, load: Load) -> list[dict]:
    """Forward and backward pass of the update, a micro-batch: as it is, with compiled parts, in packed rows."""
    trainer, prompts, rollouts = make_trainer(machine, load, [1]), make_prompts(load), some_rollouts(machine, load)
    model, (rate, _) = trainer.policy, machine.rates()
    given = trainer.policy, prompts, rollouts
    ways = {
        "as it is": (response_logprobs, nullcontext()),
        "norms and MLPs compiled": (response_logprobs, nullcontext() if machine.quick else parts_compiled(model)),
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

        with whatever_fails(row), inside:
            off = (passes() - exact).abs().mean().item()
            seconds = statistics.median(compare(machine, {name: passes})[name])
            row |= {"s": f"{seconds:.2f}", "tokens/s": f"{int(rollouts.mask.sum()) / seconds:,.0f}",
                    "of the matmul rate": f"{update_flops(model, prompts, rollouts) / seconds / rate:.0%}",
                    "off by, mean": f"{off:.0e}"}  # fmt: skip
        model.zero_grad(set_to_none=True)
        rows.append(row)
    return rows
