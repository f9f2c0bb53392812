"""The fast twin of `clipo.generate`: the same tokens, log-probs and h, from rollouts that run in waves.

What it saves, each in a function or class of its own:
    Batch             rows of ended rollouts are dropped, waiting rollouts take free rows; the plain loop feeds every
                      row until the last has ended, and holds all rollouts at once
    cached_attention  no keys are repeated for grouped heads, and only slots in use are read
    in_blocks         few rows times a large matrix on a CPU, which the library need not copy first
    one_kernel        on a GPU an RMSNorm is one kernel, not six to eight
    CapturedSteps     on a GPU a decode step is one CUDA graph, not hundreds of launches (engine/graphs.py)
It also serves what the plain loop does not: sliding windows, softcaps (`attention_mask`, `cached_attention`).
tests/test_plain_equals_engine.py holds the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from clipo import Rollouts, exact
from config import check_generate_arguments
from engine.graphs import CapturedSteps

# ----------------------------------------------------------------------------------------------------
# A forward pass: cache, attention, mask
# ----------------------------------------------------------------------------------------------------


class Cache:
    """What a model takes as `past_key_values`. Each attention layer calls `update` with its new keys and values.

    `begin(positions, used)` announces a forward pass over tokens at `positions` and returns where the keys that
    `update` will give stand: (1 or rows, their number).
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of transformers' cache interface. (We always pass positions, so nothing depends on it.)"""
        return 0


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a matrix product of this tensor has: its own, or autocast's."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class KVCache(Cache):
    """For rollouts: keys and values of all layers, preallocated.

    Slot s of a row holds the token at *position* s of that row. Rows of different length therefore sit in one
    cache without padding between prompt and response, and the attention mask is one comparison: slot <= position.
    The memory never moves: rows are copied within it. (DynamicCache copies all of itself for every token.)
    """

    def __init__(self, rows: int, slots: int):
        self.rows, self.slots = rows, slots  # slots: longest prompt + longest response
        self.layers: list[tuple[Tensor, Tensor]] = []  # per layer keys and values, each (rows, H, slots, head width)
        self.used = 0  # no token is at this slot or beyond
        self.positions: Tensor | None = None  # (first rows or 1, Q): where the next forward pass writes

    def begin(self, positions: Tensor, used: int) -> Tensor:
        """Announce a forward pass over tokens of the first rows at `positions`, all below `used`.

        Returns the positions (1, used) of the keys that `update` will give.
        """
        self.positions, self.used = positions, used
        return torch.arange(used, device=positions.device)[None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store (rows, H, Q, head width), return all that is in use of these rows."""
        self.allocate(layer_idx, keys, values)
        row = torch.arange(len(keys), device=keys.device)[:, None]
        for store, new in zip(self.layers[layer_idx], (keys, values), strict=True):
            store[row, :, self.positions] = new.transpose(1, 2).to(store.dtype)  # (rows, Q, H, head width)
        keys, values = (store[: len(row), :, : self.used] for store in self.layers[layer_idx])
        return keys, values

    def allocate(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """On a layer's first use, as the model itself tells heads, width, dtype and device."""
        if layer_idx == len(self.layers):
            dtype = product_dtype(keys)  # or each step would cast all of it
            shape = self.rows, keys.shape[1], self.slots
            self.layers.append(tuple(new.new_zeros(*shape, new.shape[3], dtype=dtype) for new in (keys, values)))

    def copy(self, source: KVCache, origin: Tensor, target: Tensor | slice, slots: int) -> None:
        """Put rows `origin`, (N,) long, of a cache (maybe this one) at rows `target` of this one."""
        for layer_idx, layer in enumerate(source.layers):
            self.allocate(layer_idx, *layer)
            for store, given in zip(self.layers[layer_idx], layer, strict=True):
                store[target, :, :slots] = given[origin, :, :slots]


def cached_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_) -> tuple[Tensor, None]:
    """softmax(scaling q k + mask) v, as transformers calls it; with a softcap c (Gemma) scores s become c tanh(s / c).

    query (B, Hq, Q, head width), key and value (B, H, slots, head width), result (B, Q, Hq, head width). Hq / H
    query heads share one key/value head. For one new token they are simply Hq / H queries to it: a reshape, where
    repeating keys and values for each would copy the whole cache (5 to 15 times slower on a CPU). Two plain products
    then beat PyTorch's kernel on a CPU. For blocks of queries that kernel serves, on a CPU in float32: in bfloat16 it
    takes two to four times as long there, forward and backward.
    """
    batch, heads, queries, width = query.shape
    shared, on_cpu, dtype = heads // key.shape[1], query.device.type == "cpu", value.dtype
    if queries == 1:
        query = query.reshape(batch, -1, shared, width)  # (B, Hq, 1, width) -> (B, H, Hq / H, width)
    elif shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    if softcap is None and (queries > 1 or not on_cpu):
        if on_cpu:
            query, key, value, attention_mask = (exact(given) for given in (query, key, value, attention_mask))
        with torch.autocast("cpu", enabled=False):  # which would cast them back
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        scores = query * (scaling or width**-0.5) @ key.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mixed = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(dtype) @ value
    return mixed.to(dtype).reshape(batch, heads, queries, width).transpose(1, 2).contiguous(), None


AttentionInterface.register("clipo", cached_attention)


def attention_windows(config) -> dict[str, int | None]:
    """How far back each kind of layer looks: {"full_attention": None} and / or {"sliding_attention": window}.

    Raises NotImplementedError for layers that are no attention over a cache of keys and values.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    known = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(kinds) - set(known)):
        raise NotImplementedError(
            f"{config.model_type}: layers of kind {', '.join(unknown)} cannot be served by KVCache; "
            f"use a model whose layers are all of: {', '.join(known)}"
        )
    return {kind: known[kind] for kind in known if kind in kinds}


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below the number."""
    return -(-number // multiple) * multiple


def attention_mask(positions: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask for queries at `positions` over keys at positions `keys`: 0 to look, -inf not to.

    positions: (B or 1, Q) long, keys: (B or 1, slots) long. Returns (B or 1, 1, Q, slots).

    >>> attention_mask(torch.tensor([[0], [2]]), torch.arange(4)[None], window=2, dtype=torch.float32)[:, 0, 0]
    tensor([[0., -inf, -inf, -inf],
            [-inf, 0., 0., -inf]])
    """
    query, key = positions[:, :, None], keys[:, None, :]
    look = key <= query  # (B, Q, slots)
    if window is not None:
        look &= key > query - window
    # A GPU's attention wants the rows of a mask to begin 16 numbers apart, or each layer makes a copy that has them so.
    mask = torch.zeros(*look.shape[:2], round_up(look.shape[2], 16), dtype=dtype, device=positions.device)
    mask = mask[:, :, : look.shape[2]].masked_fill_(~look, -math.inf)
    return mask[:, None]  # (B, Q, slots) -> (B, 1, Q, slots)


def last_states(model, tokens: Tensor, positions: Tensor, cache: Cache, used: int) -> Tensor:
    """Run tokens (B, Q) at positions (B or 1, Q) through the model; last layer's states after the norm, (B, Q, D)."""
    keys, dtype = cache.begin(positions, used), product_dtype(model.get_input_embeddings().weight)
    masks = {
        kind: attention_mask(positions, keys, window, dtype) for kind, window in attention_windows(model.config).items()
    }
    output = model.base_model(
        input_ids=tokens,
        position_ids=positions.expand_as(tokens),
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def output_logits(model, states: Tensor) -> Tensor:
    """States (..., D) -> logits (..., V), through the model's own output layer."""
    logits = model.get_output_embeddings()(states)
    softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def pad_right(sequences: Sequence[Sequence[int]], device) -> Tensor:
    """Lists of token ids -> (rows, longest) long. The padding is never looked at: attention is causal."""
    longest = max(map(len, sequences))
    return torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in sequences], device=device)


def prompts_of(group: Tensor, prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], Tensor, Tensor, Tensor]:
    """The prompts that rows of `group` (rows,) continue, each once; and for each row which, its last token, its length.

    >>> prompts_of(torch.tensor([2, 0, 2]), [[7, 8], [5], [9]])
    ([[7, 8], [9]], tensor([1, 0, 1]), tensor([9, 8, 9]), tensor([1, 2, 1]))
    """
    used, origin = group.unique(return_inverse=True)
    prompts = [prompts[g] for g in used.tolist()]
    last, length = group.new_tensor([p[-1] for p in prompts]), group.new_tensor([len(p) for p in prompts])
    return prompts, origin, last[origin], length[origin]


def prefill(model, prompts: Sequence[Sequence[int]], cache: Cache) -> None:
    """One row of the cache for each prompt: all of it but its last token, which is fed with the response."""
    tokens = pad_right(prompts, model.device)  # (P, longest)
    if tokens.shape[1] > 1:  # (of one-token prompts only, the mask hides this slot until it is overwritten)
        tokens = tokens[:, :-1]
    positions = torch.arange(tokens.shape[1], device=model.device)[None]  # (1, Q): the same for all rows
    last_states(model, tokens, positions, cache, used=tokens.shape[1])


# ----------------------------------------------------------------------------------------------------
# The model, made ready for it
# ----------------------------------------------------------------------------------------------------


BLOCK = 32  # rows of a weight, which stay in a core's cache


def in_blocks(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """x W^T + b, computed as (W x^T)^T, some rows of W at a time: (..., in) -> (..., out). For few rows on a CPU.

    A decode step has few rows of x, and reading W is what takes its time. The BLAS library copies all of a large matrix
    into an order of its own first, a small one not at all. For one to three rows of x it copies nothing either, and
    beyond 48 the copy is repaid (measured on an Intel Xeon).
    """
    rows = inputs.flatten(0, -2)  # (..., in) -> (rows, in)
    if not 4 <= len(rows) <= 48 or len(layer.weight) % BLOCK:
        return F.linear(inputs, layer.weight, layer.bias)
    blocks = layer.weight.unflatten(0, (-1, BLOCK))  # (out, in) -> (blocks, BLOCK, in)
    outputs = torch.bmm(blocks, rows.t().contiguous().expand(len(blocks), -1, -1)).flatten(0, 1)  # (out, rows)
    outputs = outputs.t().contiguous().unflatten(0, inputs.shape[:-1])
    return outputs if layer.bias is None else outputs + layer.bias


def is_plain_rmsnorm(layer: nn.Module) -> bool:
    """Llama's and Qwen's kind: x / sqrt(mean x^2 + epsilon) times the weight.

    Told by the name of its epsilon: where the weight is one less (Gemma), or where there is none, it is `eps`.
    """
    return type(layer).__name__.endswith("RMSNorm") and hasattr(layer, "variance_epsilon")


def one_kernel(norm: nn.Module, states: Tensor) -> Tensor:
    """`is_plain_rmsnorm` by PyTorch's own kernel. On a GPU the model's code runs six to eight, shorter than a launch.

    Rollouts of a 0.5B model on an H100 take 0.8 of the time; in bfloat16 it rounds once, where the model rounds twice.
    """
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


@contextmanager
def our_attention(model):
    """The model attends by `cached_attention`, which is told all it needs by mask and cache."""
    before, cudnn = model.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()
    model.config._attn_implementation = "clipo"
    # cuDNN's backward pass can give NaN with a mask (pytorch #196678), and it plans anew for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        model.config._attn_implementation = before
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@contextmanager
def serving(model):
    """For rollouts: `our_attention`, no dropout, and layers that compute the same sooner.

    Those are `one_kernel` on a GPU, and on a CPU `in_blocks` where it pays: in float32, from 8 MB on.
    """
    was_training, kind = model.training, model.device.type
    in_float32 = model.dtype == torch.float32 and not torch.is_autocast_enabled(kind)
    layers = [layer for layer in model.modules() if "forward" not in vars(layer)]  # (someone else's forward stays)
    if kind == "cpu":
        large = [layer for layer in layers if type(layer) is nn.Linear and layer.weight.numel() >= 2**21]
        forward, served = in_blocks, large if in_float32 else []
    else:
        forward, served = one_kernel, [layer for layer in layers if is_plain_rmsnorm(layer)]
    model.eval()
    for layer in served:
        layer.forward = partial(forward, layer)
    try:
        with our_attention(model):
            yield
    finally:
        for layer in served:
            del layer.forward  # back to the class's own
        model.train(was_training)


checked_models: WeakSet = WeakSet()


def check_model(model) -> None:
    """Once per model: do prefill and decode with our cache give the logits of a plain forward pass? Else an error.

    Some architectures keep other state than keys and values, count positions in their own way or scale their
    logits. Two prompts of different length and two decode steps tell, whatever the reason, before any rollout.
    """
    if model in checked_models:
        return
    rope = getattr(model.config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if depends_on_length := types & {"dynamic", "longrope"}:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be served by KVCache: its rotary embedding ({depends_on_length.pop()}) "
            "changes with the longest row of a batch; use a model with another rope_type"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    sequences = [[i % vocabulary for i in ids] for ids in ([3, 1, 4, 1, 5], [9, 2, 6])]
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        expected = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in sequences]
        try:
            with serving(model):
                cache = KVCache(rows=2, slots=5)
                prefill(model, [ids[:-1] for ids in sequences], cache)
                for back in (2, 1):  # feed the last token but one, then the last
                    token = torch.tensor([[ids[-back]] for ids in sequences], device=model.device)
                    position = torch.tensor([[len(ids) - back] for ids in sequences], device=model.device)
                    got = output_logits(model, last_states(model, token, position, cache, used=6 - back))[:, 0]
                    error = max((g - e[-back]).abs().max().item() for g, e in zip(got, expected, strict=True))
                    scale = max(e.abs().max().item() for e in expected)
                    if not error <= (1e-3 if model.dtype == torch.float32 else 0.1) * scale:
                        raise ValueError(f"its logits are off by {error:.2g} (largest logit {scale:.2g})")
        except (ValueError, AttributeError, TypeError, RuntimeError, IndexError) as reason:
            raise ValueError(
                f"{type(model).__name__} cannot be served by KVCache: {reason}. Expected a decoder-only model "
                "that takes position_ids, a 4-D attention_mask and past_key_values, as Qwen2 and Llama do"
            ) from reason
    checked_models.add(model)


# ----------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the k likeliest (0: all), then all beyond the likeliest whose sum reaches p: (B, V) -> (B, V).

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]), top_k=0, top_p=0.6)
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if 0 < top_k < probs.shape[-1]:
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        likeliest, order = probs.sort(descending=True)
        before = likeliest.cumsum(-1) - likeliest  # the sum of all that is likelier
        likeliest = likeliest.masked_fill(before >= top_p * likeliest.sum(-1, keepdim=True), 0)
        probs = torch.zeros_like(probs).scatter(-1, order, likeliest)
    return probs


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF: the first token whose cumulated probability exceeds the uniform number.

    logits (B, V), uniform (B,) in [0, 1). Returns tokens (B,) and their log-probs (B,) under the
    temperature-scaled policy, before top-k and top-p cut it. temperature 0 takes the arg max (log-probs at 1).

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [sample(logits, torch.tensor([u]), 1.0, 0, 1.0)[0].item() for u in (0.0, 0.49, 0.51, 0.79, 0.81)]
    [0, 0, 1, 1, 2]
    """
    logits = logits if temperature in (0, 1) else exact(logits) / temperature
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    if temperature == 0:
        chosen = probs.argmax(-1)
    else:
        cdf = truncate(probs, top_k, top_p).cumsum(-1)  # (B, V)
        threshold = uniform * cdf[:, -1]  # below the total, as uniform < 1
        chosen = torch.searchsorted(cdf, threshold[:, None], right=True)[:, 0]
        chosen = chosen.clamp(max=logits.shape[-1] - 1)  # where the logits are NaN, so is the log-prob: no crash here
    return chosen, probs.gather(-1, chosen[:, None])[:, 0].log()


# ----------------------------------------------------------------------------------------------------
# Waves
# ----------------------------------------------------------------------------------------------------


class Pace(NamedTuple):
    """When the decode loop stops to look, which costs time, and to drop what has ended, which saves some."""

    steps: int  # tokens per rollout between two looks at which of them ended
    bucket: int  # attention runs over the used slots, rounded up to a multiple of this
    while_waiting: float  # ended rows give way to waiting rollouts once at most this share of all rows still works
    in_the_tail: float  # when none waits, they are dropped once at most this share of all rows still works
    by_halves: bool = False  # keep a power of two of rows, so that few numbers of them come up


# On a CPU looking is free, and so is dropping, for few rows are moved; but rollouts that come in together share a
# prefill. On a GPU the host waits for every look, and every number of rows or of used slots is one more graph to
# capture; half or double its steps or bucket, or dropping at a quarter, change the time of 256 rollouts of a 0.5B model
# on an H100 by less than it varies from run to run.
PACE = {
    "cpu": Pace(steps=1, bucket=1, while_waiting=0.9, in_the_tail=1.0),
    "cuda": Pace(steps=16, bucket=256, while_waiting=0.9, in_the_tail=0.5, by_halves=True),
}


@dataclass
class Written:
    """`clipo.Rollouts` in the making, one a row; the row after the last is the spare one, which nobody reads."""

    tokens: Tensor  # (B + 1, T)
    mask: Tensor  # (B + 1, T)
    logprobs: Tensor  # (B + 1, T)
    hidden: Tensor  # (B + 1, D), a sum

    @classmethod
    def blank(cls, count: int, max_new_tokens: int, width: int, pad: int, device: torch.device) -> Written:
        """`count` empty responses and the spare one."""
        shape = count + 1, max_new_tokens
        return cls(
            tokens=torch.full(shape, pad, device=device),
            mask=torch.zeros(shape, dtype=torch.bool, device=device),
            logprobs=torch.zeros(shape, device=device),
            hidden=torch.zeros(count + 1, width, device=device),
        )

    def write(self, rollout: Tensor, t: Tensor, token: Tensor, logprob: Tensor, state: Tensor) -> None:
        """Token t of some rollouts, drawn from `state` (rows, D); all else (rows,)."""
        self.tokens[rollout, t], self.logprobs[rollout, t] = token, logprob.float()
        self.mask[rollout, t] = torch.ones_like(t, dtype=torch.bool)  # (True would be copied to a GPU, which waits)
        # The state at t = 0 belongs to the prompt's last token: it only serves a response of one token.
        self.hidden[rollout] = state.float() + self.hidden[rollout] * (t > 1)[:, None]

    def rollouts(self, P: int) -> Rollouts:
        """Without the spare one, in P groups, T the longest response."""
        longest = int(self.mask[:-1].sum(-1).max())
        hidden = self.hidden / (self.mask.sum(-1, keepdim=True) - 1).clamp(min=1)  # sum -> mean
        cut = self.tokens[:, :longest], self.mask[:, :longest], self.logprobs[:, :longest], hidden
        return Rollouts(*(values[:-1].unflatten(0, (P, -1)) for values in cut))  # (B + 1, ...) -> (P, G, ...)


class Batch:
    """The rollouts under way, one per row of the KV cache.

    The row of an ended rollout goes on with a spare rollout that nobody reads, until so many have ended that dropping
    them pays for moving the others together. Then waiting rollouts, if there are any, take the free rows.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], group: Tensor, max_rows: int, max_new_tokens: int, pace: Pace):
        self.prompts, self.group, self.max_new_tokens, self.pace = prompts, group, max_new_tokens, pace
        self.slots = round_up(max(map(len, prompts)) + max_new_tokens, min(pace.bucket, 16))  # (see attention_mask)
        self.cache = KVCache(max_rows, self.slots)
        self.rows = 0  # how many rows, from the first on, are in use
        self.used = 0  # no row in use has a token at this slot or beyond
        self.spare = len(group)
        self.waiting = torch.arange(self.spare, device=group.device)
        self.table = group.new_zeros(4, max_rows)  # what each row does next, see `next`
        self.idle = group.new_tensor([[self.spare], [0], [0], [0]])

    def next(self, rows: int) -> Tensor:
        """Rollout, t, token, position of the first rows, (4, rows): feeding `token` at `position` gives token t."""
        return self.table[:, :rows]

    def advance(self, token: Tensor, ended: Tensor) -> None:
        """Each of the first rows has got its token, (rows,), and goes on, or turns to the spare rollout if `ended`."""
        rollout, t, _, position = self.next(len(token))
        ended = ended | (t + 1 == self.max_new_tokens)
        self.table[:, : len(token)] = torch.where(ended, self.idle, torch.stack([rollout, t + 1, token, position + 1]))

    def refill(self, model) -> bool:
        """Drop ended rows where it pays and prefill for waiting rollouts. Is there anything left to decode?

        While it decodes, the host waits for the device here, in `reach`, and before a capture.
        """
        working = [row for row, rollout in enumerate(self.table[0, : self.rows].tolist()) if rollout != self.spare]
        share = self.pace.while_waiting if len(self.waiting) else self.pace.in_the_tail
        if len(working) > share * self.rows:
            return True
        self.keep(working)
        new, self.waiting = self.waiting.tensor_split([self.cache.rows - self.rows])
        if len(new):
            self.admit(new, model)
        if self.rows and self.pace.by_halves:
            self.add_idle(min(2 ** math.ceil(math.log2(self.rows)), self.cache.rows))
        return self.rows > 0

    def keep(self, working: Sequence[int]) -> None:
        """Bring these N rows among the first N; the others are free.

        Only those that stand further back are moved, to places in front that have become free.
        """
        self.rows = len(working)
        if late := [row for row in working if row >= self.rows]:
            free = sorted({*range(self.rows)} - {*working})
            origin, target = (torch.tensor(rows, device=self.table.device) for rows in (late, free))
            self.cache.copy(self.cache, origin, target, slots=self.used)
            self.table[:, target] = self.table[:, origin]

    def admit(self, new: Tensor, model) -> None:
        """Rows for the waiting rollouts `new`, (N,) long: each of their prompts goes through the model once."""
        prompts, origin, token, length = prompts_of(self.group[new], self.prompts)
        filled = KVCache(len(prompts), max(map(len, prompts)))
        prefill(model, prompts, filled)
        free = slice(self.rows, self.rows + len(new))
        self.cache.copy(filled, origin, free, slots=filled.used)
        self.table[:, free] = torch.stack([new, 0 * new, token, length - 1])
        self.rows += len(new)

    def add_idle(self, rows: int) -> None:
        """Up to so many rows in all, which work for the spare rollout."""
        self.table[:, self.rows : rows] = self.idle
        self.rows = rows

    def reach(self) -> int:
        """How many slots are used until the next look, rounded up to full buckets: attention runs over no more."""
        furthest = int(self.next(self.rows)[3].max()) + self.pace.steps
        self.used = min(round_up(furthest, self.pace.bucket), self.slots)
        return self.used


def check_own_arguments(top_k: int, top_p: float, max_batch: int | None) -> None:
    """Raise ValueError with one line on the first argument out of range that `clipo.generate` does not have."""
    for wrong, message in (
        (top_k < 0, f"top_k is {top_k}; expected 0 (off) or more"),
        (not 0 < top_p <= 1, f"top_p is {top_p}; expected a number in (0, 1]"),
        (max_batch is not None and max_batch < 1, f"max_batch is {max_batch}; expected 1 or more, or None"),
    ):
        if wrong:
            raise ValueError(message)


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    max_batch: int | None = None,
    cuda_graphs: bool | None = None,
) -> Rollouts:
    """What `clipo.generate` returns, sooner. What is not said there:

    At most `max_batch` rollouts are under way at a time (None: all); when some end, waiting ones take their rows. A
    rollout has its own row of random numbers, so others cannot change it. top_k, top_p: see `truncate`.
    cuda_graphs: see `CapturedSteps` (GPUs only; None: where they work, True: or CaptureFailed).

    Raises ValueError for arguments out of range, ValueError or NotImplementedError for a model that cannot be served.
    """
    stop = check_generate_arguments(model, prompts, samples_per_prompt, max_new_tokens, eos_token_id, temperature)
    check_own_arguments(top_k, top_p, max_batch)
    check_model(model)
    device, width = model.device, model.get_output_embeddings().in_features
    group = torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt)  # (B,)
    count = len(group)
    pace = PACE.get(device.type, PACE["cuda"])
    batch = Batch(prompts, group, min(count, max_batch or count), max_new_tokens, pace)
    written = Written.blank(count, max_new_tokens, width, pad=stop[0], device=device)
    uniform = F.pad(torch.rand(count, max_new_tokens, generator=generator), (0, 0, 0, 1)).to(device)  # (B + 1, T)
    stop = torch.tensor(stop, device=device)

    def step(rows: int, used: int) -> None:
        """One token for each of the first rows of the batch."""
        rollout, t, token, position = batch.next(rows)
        state = last_states(model, token[:, None], position[:, None], batch.cache, used)[:, 0]  # (rows, D)
        token, logprob = sample(output_logits(model, state), uniform[rollout, t], temperature, top_k, top_p)
        written.write(rollout, t, token, logprob, state)
        batch.advance(token, ended=(token[:, None] == stop).any(-1))

    with serving(model):
        captured = device.type == "cuda" and cuda_graphs is not False
        run = CapturedSteps(model, step, demanded=bool(cuda_graphs)) if captured else step
        while batch.refill(model):  # prefill
            used = batch.reach()
            for _ in range(min(pace.steps, max_new_tokens)):  # decode, sample, stop
                run(batch.rows, used)

    return written.rollouts(len(prompts))
