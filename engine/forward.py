"""A forward pass over our cache: what `clipo.last_states` and `clipo.prefill` do, sooner, and for more models.

What it saves:
    cached_attention  no keys are repeated for grouped heads, and only slots in use are read
    in_blocks         few rows times a large matrix on a CPU, which the library need not copy first
    one_kernel        on a GPU an RMSNorm is one kernel, not six to eight
What it serves beside: sliding windows and softcaps (`attention_mask`, `cached_attention`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from clipo import in_float32

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

    def clear(self) -> None:
        """Nothing in it: a NaN would go on, though masked, for zero times NaN is NaN."""
        for store in itertools.chain(*self.layers):
            store.zero_()

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
            query, key, value, attention_mask = (in_float32(given) for given in (query, key, value, attention_mask))
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


def decoded_states(model, token: Tensor, position: Tensor, cache: Cache, used: int) -> Tensor:
    """`last_states` of one token a row: (rows,) at `position` (rows,) -> (rows, D)."""
    return last_states(model, token[:, None], position[:, None], cache, used)[:, 0]


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
    if tokens.shape[1] > 1:  # of one-token prompts only, the mask hides this slot until it is overwritten
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
    whole = model.dtype == torch.float32 and not torch.is_autocast_enabled(kind)
    layers = [layer for layer in model.modules() if "forward" not in vars(layer)]  # someone else's forward stays
    if kind == "cpu":
        large = [layer for layer in layers if type(layer) is nn.Linear and layer.weight.numel() >= 2**21]
        forward, served = in_blocks, large if whole else []
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
