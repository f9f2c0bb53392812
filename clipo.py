"""CLIPO: Contrastive Learning in Policy Optimization (arXiv:2603.10101), in one file.

GRPO asks of a rollout only whether its final answer is right. CLIPO also asks whether it *agrees with the
other right answers to the same question*: sound solutions share structure, errors scatter. One step is

    rollouts -> verifiable reward -> contrastive head -> contrastive reward -> advantages -> policy update

and the sections below stand in that order. Everything in sections 1 to 5 is a function of tensors (and of a
model, where one is named); all state lives in section 7.

One letter means one thing throughout:
    P prompts   G rollouts per prompt   B = P*G rollouts   T response tokens   S prompt + response tokens
    V vocabulary   D model width   E embedding width   H key/value heads   A anchors
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

# =====================================================================================================
# 1. Rollouts: prefill once per prompt, then decode G samples of each, one token at a time, with a KV cache
#
#    y_t ~ pi( . | x, y_<t)            log pi(y_t | x, y_<t) and the hidden states are kept on the way:
#    h = mean of the last layer's states over the response       (paper, trajectory embedding)
# =====================================================================================================


@dataclass
class Rollouts:
    """G sampled responses to each of P prompts, one response per row, B = P*G rows.

    Rows of one prompt stand together: row b answers prompt b // G when `generate` made them.
    """

    tokens: Tensor  # (B, T) long, right-padded with an end-of-sequence id
    mask: Tensor  # (B, T) bool, True up to and with the end-of-sequence token
    logprobs: Tensor  # (B, T) float32, log-prob under the temperature-scaled policy, 0 where mask is False
    hidden: Tensor  # (B, D) float32, mean last-layer state over the response tokens that were fed back
    group: Tensor  # (B,) long, which prompt

    @classmethod
    def blank(cls, group: Tensor, max_new_tokens: int, width: int, pad: int) -> Rollouts:
        """Empty responses, to be filled in."""
        shape = len(group), max_new_tokens  # (B, T)
        return cls(
            tokens=group.new_full(shape, pad),
            mask=group.new_zeros(shape, dtype=torch.bool),
            logprobs=group.new_zeros(shape, dtype=torch.float32),
            hidden=group.new_zeros(len(group), width, dtype=torch.float32),
            group=group,
        )

    def write(self, rollout: Tensor, t: Tensor, token: Tensor, logprob: Tensor, state: Tensor) -> None:
        """Token t of some rollouts, drawn from `state` (rows, D); all else (rows,). `hidden` becomes a sum here."""
        self.tokens[rollout, t], self.logprobs[rollout, t] = token, logprob
        self.mask[rollout, t] = torch.ones_like(t, dtype=torch.bool)  # (True would be copied to a GPU, which waits)
        # The state at t = 0 belongs to the prompt's last token: it only serves a response of one token.
        self.hidden[rollout] = state.float() + self.hidden[rollout] * (t > 1)[:, None]

    def select(self, rows: Tensor) -> Rollouts:
        """The given rows, (N,) long, cut to the longest response among them."""
        longest = int(self.mask[rows].sum(-1).max())
        return Rollouts(
            self.tokens[rows, :longest],
            self.mask[rows, :longest],
            self.logprobs[rows, :longest],
            self.hidden[rows],
            self.group[rows],
        )

    def put(self, rows: Tensor, other: Rollouts) -> Rollouts:
        """These rollouts with all of `other` in place of the given rows, (N,) long; the rows keep their group."""
        shorter, longer = sorted((self, other), key=lambda rollouts: rollouts.tokens.shape[1])
        longest, stop = longer.tokens.shape[1], int(shorter.tokens[0, -1])  # all of the shorter have ended

        def merged(mine: Tensor, theirs: Tensor, pad: int = 0) -> Tensor:  # (B, T), (N, T') -> (B, longest)
            mine, theirs = (F.pad(part, (0, longest - part.shape[1]), value=pad) for part in (mine, theirs))
            return mine.index_copy(0, rows, theirs)

        return Rollouts(
            merged(self.tokens, other.tokens, pad=stop),
            merged(self.mask, other.mask),
            merged(self.logprobs, other.logprobs),
            self.hidden.index_copy(0, rows, other.hidden),
            self.group,
        )


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

    def copy(self, source: KVCache, origin: Tensor, first: int, slots: int) -> None:
        """Put rows `origin`, (N,) long, of a cache (maybe this one) at rows first, first + 1, ... of this one."""
        for layer_idx, layer in enumerate(source.layers):
            self.allocate(layer_idx, *layer)
            for store, given in zip(self.layers[layer_idx], layer, strict=True):
                store[first : first + len(origin), :, :slots] = given[origin, :, :slots]


def cached_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_) -> tuple[Tensor, None]:
    """softmax(scaling q k + mask) v, as transformers calls it; with a softcap c (Gemma) scores s become c tanh(s / c).

    query (B, Hq, Q, head width), key and value (B, H, slots, head width), result (B, Q, Hq, head width). Hq / H
    query heads share one key/value head. For one new token they are simply Hq / H queries to it: a reshape, where
    repeating keys and values for each would copy the whole cache (5 to 15 times slower on a CPU).
    """
    batch, heads, queries, width = query.shape
    shared = heads // key.shape[1]
    if queries == 1:
        query = query.reshape(batch, -1, shared, width)  # (B, Hq, 1, width) -> (B, H, Hq / H, width)
    elif shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    if softcap is None:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) + attention_mask
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed.reshape(batch, heads, queries, width).transpose(1, 2).contiguous(), None


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


def weight_first(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """x W^T + b, computed as (W x^T)^T: (..., in) -> (..., out). For few rows and a large W on a CPU.

    The BLAS library cuts a product along the rows of its first matrix. A decode step has few rows of x; W has
    thousands. A 0.5B model in float32 decodes 8 rows in 0.6 of the time (two AMD Zen 4 cores); bfloat16 gains nothing.
    """
    rows = inputs.flatten(0, -2)  # (..., in) -> (rows, in)
    outputs = (layer.weight @ rows.t()).t().contiguous().unflatten(0, inputs.shape[:-1])
    return outputs if layer.bias is None else outputs + layer.bias


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
    """For rollouts: `our_attention`, no dropout, `weight_first` where it pays (float32 on a CPU, over 8 MB)."""
    was_training = model.training
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear and on_cpu]
    large = [layer for layer in linear if layer.weight.numel() >= 2**21 and "forward" not in vars(layer)]
    model.eval()
    for layer in large:
        layer.forward = partial(weight_first, layer)
    try:
        with our_attention(model):
            yield
    finally:
        for layer in large:
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
    logits = logits if temperature in (0, 1) else logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)  # (B, V)
    if temperature == 0:
        chosen = probs.argmax(-1)
    else:
        cdf = truncate(probs, top_k, top_p).cumsum(-1)  # (B, V)
        threshold = uniform * cdf[:, -1]  # below the total, as uniform < 1
        chosen = torch.searchsorted(cdf, threshold[:, None], right=True)[:, 0]
        chosen = chosen.clamp(max=logits.shape[-1] - 1)  # where the logits are NaN, so is the log-prob: no crash here
    return chosen, probs.gather(-1, chosen[:, None])[:, 0].log()


class CaptureFailed(RuntimeError):
    """CUDA graphs were asked for by name, and a decode step cannot be captured."""


PLAIN_FIRST = 3  # (a choice, not a measurement: a capture takes about as long as two plain steps)
captures_failed: WeakKeyDictionary = WeakKeyDictionary()  # model -> why its decode steps cannot be captured


class CapturedSteps:
    """Runs `step(rows, used)` on a GPU as one CUDA graph per (rows, used): no Python and no launches per kernel.

    A decode step is about 25 kernels a layer, each shorter than its launch; a graph launches all of them at once. The
    first steps of a kind run plainly (they load kernels and fill autocast's cache, and a kind that is rare is not worth
    a capture), the next is captured, and from then on it is replayed. All that a step reads and writes must stay where
    it is. A capture that fails is said once, and this model's steps run plainly from then on; if graphs are `demanded`,
    it raises CaptureFailed.
    """

    def __init__(self, model, step: Callable[[int, int], None], demanded: bool):
        self.model, self.step, self.demanded = model, step, demanded
        self.seen: Counter[tuple[int, int]] = Counter()
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one memory for the intermediates of all graphs

    def __call__(self, rows: int, used: int) -> None:
        kind = rows, used
        self.seen[kind] += 1
        if kind not in self.graphs and self.seen[kind] > PLAIN_FIRST and self.model not in captures_failed:
            self.capture(kind)
        if kind in self.graphs:
            self.graphs[kind].replay()
        else:
            self.step(rows, used)

    def capture(self, kind: tuple[int, int]) -> None:
        """Record a step without running it. Raises what `CLIPO.in_memory` answers to where memory runs out."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(*kind)
        except RuntimeError as reason:
            if ran_out_of_memory(reason):
                raise
            why = f"a decode step cannot be captured as a CUDA graph ({reason})"
            if self.demanded:
                raise CaptureFailed(f"{why}; expected cuda_graphs=False, or None: where it works") from reason
            captures_failed[self.model] = why
            warnings.warn(f"{why}; rollouts go on without, slower", stacklevel=2)
            return
        self.graphs[kind] = graph


def check_generate_arguments(
    model, prompts, samples_per_prompt, max_new_tokens, stop, temperature, top_k, top_p, max_batch
) -> None:
    """Raise ValueError with one line on the first argument of `generate` that is out of range."""
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
        (not len(stop), "eos_token_id is empty; expected the id (or ids) that ends a response"),
        (not 0 <= temperature < math.inf, f"temperature is {temperature}; expected 0 (greedy) or a positive number"),
        (top_k < 0, f"top_k is {top_k}; expected 0 (off) or more"),
        (not 0 < top_p <= 1, f"top_p is {top_p}; expected a number in (0, 1]"),
        (max_batch is not None and max_batch < 1, f"max_batch is {max_batch}; expected 1 or more, or None"),
    ):
        if wrong:
            raise ValueError(message)


class Pace(NamedTuple):
    """When the decode loop stops to look, which costs time, and to drop what has ended, which saves some."""

    steps: int  # tokens per rollout between two looks at which of them ended
    bucket: int  # attention runs over the used slots, rounded up to a multiple of this
    while_waiting: float  # ended rows give way to waiting rollouts once at most this share of all rows still works
    in_the_tail: float  # when none waits, they are dropped once at most this share of all rows still works
    by_halves: bool = False  # keep a power of two of rows, so that few numbers of them come up


# On a CPU looking is free. Dropping at every look takes 1.0 to 1.3 times as long as at 0.9, never dropping 1.6 to 2.9
# times (1M, 34M and 0.5B models, ragged lengths). On a GPU the host waits for every look, and every number of rows or
# of used slots is one more graph to capture; its numbers are a choice, not a measurement.
PACE = {
    "cpu": Pace(steps=1, bucket=1, while_waiting=0.9, in_the_tail=0.9),
    "cuda": Pace(steps=16, bucket=256, while_waiting=0.9, in_the_tail=0.5, by_halves=True),
}


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

        The host waits for the device here, and nowhere else.
        """
        working = (self.table[0, : self.rows] != self.spare).nonzero()[:, 0]
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

    def keep(self, working: Tensor) -> None:
        """Move the given rows, (N,) long, to the front; the others are free."""
        self.cache.copy(self.cache, working, first=0, slots=self.used)
        self.rows = len(working)
        self.table[:, : self.rows] = self.table[:, working]

    def admit(self, new: Tensor, model) -> None:
        """Rows for the waiting rollouts `new`, (N,) long: each of their prompts goes through the model once."""
        prompts, origin, token, length = prompts_of(self.group[new], self.prompts)
        filled = KVCache(len(prompts), max(map(len, prompts)))
        prefill(model, prompts, filled)
        self.cache.copy(filled, origin, first=self.rows, slots=filled.used)
        self.table[:, self.rows : self.rows + len(new)] = torch.stack([new, 0 * new, token, length - 1])
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
    """Sample `samples_per_prompt` responses to each of P prompts (lists of token ids, any lengths).

    temperature 0 is greedy. `generator` is a CPU generator: each rollout gets its own row of random numbers,
    drawn before the first token, so that what others in the batch do cannot change it. At most `max_batch` rollouts
    are under way at a time (None: all); when some end, waiting ones take their rows. cuda_graphs: see `CapturedSteps`
    (GPUs only; None: where they work, True: or CaptureFailed). Returns `Rollouts` with T the length of the longest
    response.

    Raises ValueError for arguments out of range, ValueError or NotImplementedError for a model that cannot be served.
    """
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    check_generate_arguments(
        model, prompts, samples_per_prompt, max_new_tokens, stop, temperature, top_k, top_p, max_batch
    )
    check_model(model)
    device, width = model.device, model.get_output_embeddings().in_features
    group = torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt)  # (B,)
    count = len(group)
    pace = PACE.get(device.type, PACE["cuda"])
    batch = Batch(prompts, group, min(count, max_batch or count), max_new_tokens, pace)
    rollouts = Rollouts.blank(F.pad(group, (0, 1)), max_new_tokens, width, pad=stop[0])  # B + 1: one is the spare
    uniform = torch.rand(count + 1, max_new_tokens, generator=generator).to(device)  # (B + 1, T)
    stop = torch.tensor(stop, device=device)

    def step(rows: int, used: int) -> None:
        """One token for each of the first rows of the batch."""
        rollout, t, token, position = batch.next(rows)
        state = last_states(model, token[:, None], position[:, None], batch.cache, used)[:, 0]  # (rows, D)
        token, logprob = sample(output_logits(model, state), uniform[rollout, t], temperature, top_k, top_p)
        rollouts.write(rollout, t, token, logprob, state)
        batch.advance(token, ended=(token[:, None] == stop).any(-1))

    with serving(model):
        captured = device.type == "cuda" and cuda_graphs is not False
        run = CapturedSteps(model, step, demanded=bool(cuda_graphs)) if captured else step
        while batch.refill(model):  # prefill
            used = batch.reach()
            for _ in range(min(pace.steps, max_new_tokens)):  # decode, sample, stop
                run(batch.rows, used)

    rollouts.hidden /= (rollouts.mask.sum(-1, keepdim=True) - 1).clamp(min=1)  # sum -> mean
    return rollouts.select(torch.arange(count, device=device))  # without the spare; T becomes the longest response


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
        return torch.cat([prompt_keys[self.origin], keys], 2), torch.cat([prompt_values[self.origin], values], 2)


# Keeps its arguments only, and calls the function again in the backward pass. (No dropout: no random numbers to keep.)
run_twice = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputing(model, wanted: bool):
    """Activation checkpointing: of each layer only its input is kept, the rest is computed again for the backward pass.

    For a third more time: 86 KB a token for Qwen2.5-0.5B in place of 1.7 MB. (`python -m lab.memory` has the sums.)
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
    """Log-probs (B, T) of the response tokens, all at once; differentiable; 0 where the mask is False.

    prompts: P lists of token ids; row b continues prompts[rollouts.group[b]]. recompute: see `recomputing`.
    """
    prompts, origin, last, length = prompts_of(rollouts.group, prompts)
    tokens = torch.cat([last[:, None], rollouts.tokens[:, :-1]], dim=1)  # (B, T): the state at t - 1 predicts token t
    positions = length[:, None] - 1 + torch.arange(tokens.shape[1], device=tokens.device)  # (B, T)
    with our_attention(model), recomputing(model, recompute):
        prefill(model, prompts, prompt_keys := PromptKeys())
        states = last_states(model, tokens, positions, SharedPrompts(prompt_keys, origin), used=tokens.shape[1])
    mask = rollouts.mask
    logprobs = token_logprobs(model, states[mask], rollouts.tokens[mask], temperature)  # (N real response tokens,)
    return torch.zeros_like(rollouts.logprobs).masked_scatter(mask, logprobs)  # (N,) -> (B, T)


LOGITS_AT_ONCE = 2**27  # 0.5 GB of float32; a micro-batch of 16,384 tokens of Qwen2.5 would have 10 GB, and twice over


def token_logprobs(model, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the given tokens: (N, D), (N,) -> (N,), without all (N, V) logits at once.

    They are computed in chunks of tokens, and each chunk again in the backward pass rather than kept for it.
    """

    def chunk(states: Tensor, tokens: Tensor) -> Tensor:
        logits = output_logits(model, states).float() / (temperature or 1.0)  # (n, V)
        return -F.cross_entropy(logits, tokens, reduction="none")

    size = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().out_features)
    if len(tokens) <= size:
        return chunk(states, tokens)
    parts = zip(states.split(size), tokens.split(size), strict=True)
    return torch.cat([run_twice(chunk, *part) for part in parts])


# =====================================================================================================
# 2. The contrastive head:   z = normalise(W h)
# =====================================================================================================


class ContrastiveHead(nn.Module):
    """Trajectory embeddings on the unit sphere: a bias-free linear map, or Linear-ReLU-Linear with `mlp=True`.

    forward: (B, D) -> (B, E) unit vectors. (Paper, contrastive head; hidden width D as in the authors' code.)
    """

    def __init__(self, d_model: int, d_embed: int = 512, mlp: bool = False):
        super().__init__()
        first = [nn.Linear(d_model, d_model, bias=False), nn.ReLU()] if mlp else []
        self.layers = nn.Sequential(*first, nn.Linear(d_model, d_embed, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.normalize(self.layers(hidden), dim=-1)


# =====================================================================================================
# 3. Contrast. Anchor i is correct, P other correct rollouts, N wrong ones, both not empty; s_ia = z_i . z_a / tau:
#
#    infonce      L_i = -s_ij + log sum_{a in P u N} exp(s_ia)          one j drawn from P     (paper)
#    supcon_out   the same, mean over all j in P                                               (arXiv:2004.11362)
#    supcon_in    L_i = -log 1/|P| sum_{j in P} exp(s_ij) + log sum_{a in P u N} exp(s_ia)     (arXiv:2004.11362)
#    soft_nn      L_i = -log sum_{j in P} exp(s_ij) + log sum_{a in P u N} exp(s_ia)           (arXiv:1902.01889)
#    decoupled    L_i = 1/|P| sum_{j in P} log(1 + sum_{k in N} exp(s_ik - s_ij))              (ours)
#
#    scope        group: P and N from the anchor's group (paper);  cross: N from the whole batch;  batch: P too
#
#    reward       rc_i = max(-lambda L_i, floor)                                               (paper)
# =====================================================================================================


def group_rows(group: Tensor) -> tuple[Tensor, Tensor]:
    """Where the members of each group stand: index (P, G) long into the batch and valid (P, G) bool.

    group: (B,) long, any labels in any order; G is the size of the largest group, smaller ones are padded.
    With it all similarities within groups are one (P, G, G) product instead of a (B, B) one.

    >>> group_rows(torch.tensor([7, 7, 2, 7]))
    (tensor([[2, 0, 0],
            [0, 1, 3]]), tensor([[ True, False, False],
            [ True,  True,  True]]))
    """
    _, member, size = group.unique(return_inverse=True, return_counts=True)
    order = member.argsort(stable=True)
    place = torch.arange(len(group), device=group.device) - (size.cumsum(0) - size)[member[order]]
    index = group.new_zeros(len(size), int(size.max()))
    valid = torch.zeros_like(index, dtype=torch.bool)
    index[member[order], place], valid[member[order], place] = order, True
    return index, valid


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """The sum over each row's group, for every row: (B, ...) -> (B, ...).

    >>> group_sum(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([4., 4., 5.])
    """
    labels, member = group.unique(return_inverse=True)
    return values.new_zeros(len(labels), *values.shape[1:]).index_add(0, member, values)[member]


def group_size(group: Tensor) -> Tensor:
    """How many rows stand in each row's group: (B,) -> (B,) float."""
    return group_sum(torch.ones_like(group, dtype=torch.float32), group)


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """The mean over each row's group, for every row: (B, ...) -> (B, ...).

    >>> group_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([2., 2., 5.])
    """
    return group_sum(values, group) / group_size(group).view(-1, *[1] * (values.ndim - 1))


def log_sum(similarity: Tensor, allowed: Tensor) -> Tensor:
    """log sum of exp(s) over the allowed entries of each row: (A, G) -> (A, 1).

    This is exact; an epsilon inside the log is not (0.24 off for 16 random vectors).
    """
    return similarity.masked_fill(~allowed, -math.inf).logsumexp(-1, keepdim=True)


def infonce(similarity: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-s_ij + log sum over all others of exp(s_ia), mean over targets. All arguments (A, G), result (A,).

    An anchor, two positives at similarity 1 and a wrong one at 0: -1 + log(2e + 1).
    >>> positive, negative = torch.tensor([[False, True, True, False]]), torch.tensor([[False, False, False, True]])
    >>> infonce(torch.tensor([[20.0, 1.0, 1.0, 0.0]]), positive, positive, negative)
    tensor([0.8620])
    """
    loss = log_sum(similarity, positive | negative) - similarity
    return (loss * target).sum(-1) / target.sum(-1)


def soft_nn(similarity: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-log of the softmax's share that falls on targets. All arguments (A, G), result (A,).

    The example of `infonce` again: -log(2e) + log(2e + 1).
    >>> positive, negative = torch.tensor([[False, True, True, False]]), torch.tensor([[False, False, False, True]])
    >>> soft_nn(torch.tensor([[20.0, 1.0, 1.0, 0.0]]), positive, positive, negative)
    tensor([0.1688])
    """
    return (log_sum(similarity, positive | negative) - log_sum(similarity, target))[:, 0]


def supcon_in(similarity: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-log of a target's mean share of the softmax: `soft_nn` + log |targets|. All arguments (A, G), result (A,).

    >>> positive, negative = torch.tensor([[False, True, True, False]]), torch.tensor([[False, False, False, True]])
    >>> supcon_in(torch.tensor([[20.0, 1.0, 1.0, 0.0]]), positive, positive, negative)  # 0.1688 + log 2
    tensor([0.8620])
    """
    return soft_nn(similarity, target, positive, negative) + target.sum(-1).log()


def decoupled(similarity: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """log(1 + sum over wrong ones of exp(s_ik - s_ij)), mean over targets. All arguments (A, G), result (A,).

    No positive stands in another positive's denominator, so that perfect agreement gives 0, not log |P|.

    The example of `infonce` again: log(1 + exp(0 - 1)).
    >>> positive, negative = torch.tensor([[False, True, True, False]]), torch.tensor([[False, False, False, True]])
    >>> decoupled(torch.tensor([[20.0, 1.0, 1.0, 0.0]]), positive, positive, negative)
    tensor([0.3133])
    """
    loss = F.softplus(log_sum(similarity, negative) - similarity)
    return (loss * target).sum(-1) / target.sum(-1)


CONTRASTIVE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "infonce": infonce,  # its target is one positive, drawn; the targets of all others are all positives
    "supcon_out": infonce,
    "supcon_in": supcon_in,
    "soft_nn": soft_nn,
    "decoupled": decoupled,
}
SCOPES = ("group", "cross", "batch")


def known(name: str, given: str, names: Sequence[str]) -> None:
    """Raise ValueError, listing the known names, if `given` is none of them."""
    if given not in names:
        raise ValueError(f"{name} is {given!r}; expected one of: {', '.join(names)}")


def pairs_in_scope(correct: Tensor, group: Tensor, scope: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who is an anchor, and what every other rollout in its scope is to it.

    index (P, G) long: the rows of each group (of the scopes "cross" and "batch": of the one batch); anchor (P, G) bool;
    positive, negative (A, G) bool, a row for each of the A anchors.

    >>> pairs_in_scope(torch.tensor([True, True, False]), torch.zeros(3).long(), "group")[2:]
    (tensor([[False,  True, False],
            [ True, False, False]]), tensor([[False, False,  True],
            [False, False,  True]]))
    """
    known("contrastive scope", scope, SCOPES)
    index, valid = group_rows(group if scope == "group" else torch.zeros_like(group))  # P is 1 for the whole batch
    right = correct[index].bool() & valid  # (P, G)
    another = ~torch.eye(index.shape[1], dtype=torch.bool, device=group.device)
    positive = right[:, :, None] & right[:, None, :] & another  # (P, G, G): anchor, other
    if scope == "cross":
        positive &= group[index][:, :, None] == group[index][:, None, :]
    negative = right[:, :, None] & (~right & valid)[:, None, :]
    anchor = positive.any(-1) & negative.any(-1)  # (P, G)
    return index, anchor, positive[anchor], negative[anchor]


def draw_positives(
    correct: Tensor, group: Tensor, *, scope: str = "group", generator: torch.Generator | None = None
) -> Tensor:
    """One positive for every anchor, uniformly, by its row: (B,), (B,) -> (B,) long; -1 where there is no anchor.

    `generator` is a CPU generator, or the global one. Raises ValueError for an unknown scope.

    >>> draw_positives(torch.tensor([True, True, False]), torch.zeros(3).long())
    tensor([ 1,  0, -1])
    """
    index, anchor, positive, _ = pairs_in_scope(correct, group, scope)
    noise = torch.rand(positive.shape, generator=generator).to(positive.device)
    chosen = noise.masked_fill(~positive, -1).argmax(-1)  # (A, G) -> (A,)
    return torch.full_like(group, -1).index_put((index[anchor],), index[anchor.nonzero()[:, 0], chosen])


def contrastive_loss(
    z: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    kind: str = "infonce",
    temperature: float = 0.05,
    scope: str = "group",
    positives: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of every anchor: the formulas at the head of this section.

    z (B, E) unit vectors, correct (B,) bool, group (B,) long. Returns loss (B,), 0 where there is no anchor, and
    anchors (B,) bool: the correct rollouts that have another correct one and a wrong one in scope. `positives`
    (B,) long names each anchor's j by its row (`draw_positives`); "infonce" needs it, the others then take all of P.
    Raises ValueError for an unknown kind or scope, a temperature <= 0, and positives that are missing or wrong.

    Memory grows with B * G in the scope "group", with B * B in the other two.

    Three rollouts at right angles, two of them correct; the chance level is log 2:
    >>> correct, group = torch.tensor([True, True, False]), torch.zeros(3).long()
    >>> contrastive_loss(torch.eye(3), correct, group, positives=draw_positives(correct, group))
    (tensor([0.6931, 0.6931, 0.0000]), tensor([ True,  True, False]))
    """
    known("contrastive kind", kind, list(CONTRASTIVE_LOSSES))
    if not temperature > 0:
        raise ValueError(f"contrastive temperature is {temperature}; expected a positive number")
    index, anchor, positive, negative = pairs_in_scope(correct, group, scope)
    rows, target = index[anchor], positive  # (A,), (A, G)
    if positives is not None:
        target = positive & (index[anchor.nonzero()[:, 0]] == positives[rows][:, None])
        if not target.any(-1).all():
            raise ValueError("positives names a row that is not another correct rollout in the anchor's scope")
    elif kind == "infonce":
        raise ValueError("infonce takes one positive for each anchor; expected positives=draw_positives(...)")

    similarity = torch.einsum("pie,pae->pia", z[index], z[index])[anchor] / temperature  # (P, G, G) -> (A, G)
    loss = CONTRASTIVE_LOSSES[kind](similarity, target, positive, negative)
    anchors = torch.zeros_like(correct, dtype=torch.bool).index_fill(0, rows, True)
    return z.new_zeros(len(z)).index_put((rows,), loss), anchors


def chance_level(correct: Tensor, group: Tensor, *, kind: str = "infonce", scope: str = "group") -> Tensor:
    """The loss (B,) of embeddings that tell nothing apart, for rows that are anchors: every similarity is the same.

    infonce, supcon_out, supcon_in: log(|P| + |N|). soft_nn: log((|P| + |N|) / |P|). decoupled: log(1 + |N|).

    >>> chance_level(torch.tensor([True, True, False]), torch.zeros(3).long(), kind="decoupled").exp()
    tensor([2., 2., 2.])
    """
    known("contrastive kind", kind, list(CONTRASTIVE_LOSSES))
    known("contrastive scope", scope, SCOPES)
    whole = torch.zeros_like(group)
    positives = (group_sum(correct.float(), whole if scope == "batch" else group) - 1).clamp(min=1)
    negatives = group_sum((~correct).float(), group if scope == "group" else whole)
    if kind == "decoupled":
        return (1 + negatives).log()
    return ((positives + negatives) / (positives if kind == "soft_nn" else 1)).log()


def contrastive_reward(
    loss: Tensor,
    anchors: Tensor,
    *,
    weight: float = 0.2,
    floor: float = -0.5,
    ceiling: float = math.inf,
    chance: Tensor | float = 0.0,
) -> Tensor:
    """rc_i = clip(weight * (chance - L_i), floor, ceiling) for anchors, 0 for all others: (B,) -> (B,).

    With chance = 0 and no ceiling this is the paper's max(-lambda L_i, floor). The loss is detached.

    >>> contrastive_reward(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([True, True, False]))
    tensor([-0.2000, -0.5000,  0.0000])
    """
    reward = (weight * (chance - loss.detach())).clamp(floor, ceiling)
    return torch.where(anchors, reward, torch.zeros_like(reward))


def shuffle_within_groups(values: Tensor, chosen: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """Deal the values of the chosen rows out anew among the chosen rows of their group; all arguments (B,).

    The control of every claim about the contrastive reward: the same numbers in every group, saying nothing.

    >>> values, chosen = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, True, False, True])
    >>> shuffle_within_groups(values, chosen, torch.tensor([0, 0, 0, 1]), torch.Generator().manual_seed(1))
    tensor([2., 1., 3., 4.])
    """
    rows = chosen.nonzero()[:, 0]
    shuffled = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    to, origin = (order[group[order].argsort(stable=True)] for order in (rows, shuffled))  # both group by group
    return values.index_put((to,), values[origin])


# =====================================================================================================
# 4. Group-relative advantage (GRPO, arXiv:2402.03300):   A_i = (R_i - mean R) / (std R + eps),  R = r + rc
#
#    DAPO takes up to 1 off the R of a response that gets close to the longest length, or reaches it (arXiv:2503.14476)
# =====================================================================================================


def overlong_penalty(length: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """0 up to max_new_tokens - buffer tokens, then falling evenly to -1 at max_new_tokens: (B,) -> (B,) float.

    buffer 0: no penalty. (DAPO's soft overlong punishment.)

    >>> overlong_penalty(torch.tensor([5, 8, 9, 10]), max_new_tokens=10, buffer=4)
    tensor([ 0.0000, -0.5000, -0.7500, -1.0000])
    """
    if buffer == 0:
        return torch.zeros_like(length, dtype=torch.float32)
    return ((max_new_tokens - buffer - length) / buffer).clamp(-1, 0)


def group_std(values: Tensor, group: Tensor) -> Tensor:
    """The standard deviation of each row's group, with Bessel's correction: (B,) -> (B,); 0 for a group of one.

    >>> group_std(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([1.4142, 1.4142, 0.0000])
    """
    size = group_size(group)
    mean_square = group_mean((values - group_mean(values, group)).square(), group)
    return (mean_square * size / (size - 1).clamp(min=1)).sqrt()


def group_advantages(rewards: Tensor, group: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards (B,) -> advantages (B,), each against its own group; the std with Bessel's correction.

    `scale_by_std=False` gives Dr. GRPO's advantage (arXiv:2503.20783). A group of one has advantage 0.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0]), torch.tensor([0, 0, 0, 1, 1]))
    tensor([ 1.1547, -0.5773, -0.5773, -0.7071,  0.7071])
    """
    centred = rewards - group_mean(rewards, group)
    return centred / (group_std(rewards, group) + eps) if scale_by_std else centred


# =====================================================================================================
# 5. Policy loss:   J = E[ min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) ] - beta E[k3],   rho = pi / pi_old
#
#    what is clipped                                              E is the mean over
#    grpo      every token's rho                                  all tokens
#    dr_grpo   the same                                           B times T_max places: long answers weigh more
#    dapo      the same, more room above: 1 + 0.28                all tokens
#    gspo      a response's geometric mean, to 1 - 3e-4, 1 + 4e-4  responses
#    gmpo      log rho in [-0.4, 0.4], before the geometric mean  responses
# =====================================================================================================


def response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over each response's tokens: (B, T) -> (B, 1).

    >>> response_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def clip_tokens(log_ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float):
    """min(rho A, clip(rho) A) for every token, and where the clip removed the gradient. (B, T), advantage (B, 1)."""
    ratio = log_ratio.exp()
    free, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(free, clipped), clipped < free


def clip_responses(
    log_ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """GSPO: every token has its response's ratio, (pi(y) / pi_old(y)) ^ (1 / |y|). (arXiv:2507.18071)"""
    return clip_tokens(response_mean(log_ratio, mask).expand_as(log_ratio), advantage, mask, low, high)


def clip_geometric(
    log_ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """GMPO: the geometric mean of token ratios, each bounded on the side that A would push it to. (arXiv:2507.20673)"""
    bounded = torch.where(advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    surrogate = response_mean(bounded, mask).exp() * advantage
    return surrogate.expand_as(log_ratio), bounded != log_ratio


class PolicyLoss(NamedTuple):
    """One way to clip and to average, with the clip range of its paper."""

    clip: Callable[..., tuple[Tensor, Tensor]]
    mean_over: str  # "tokens", "places" or "responses"
    low: float
    high: float
    scale_by_std: bool = True  # may the advantage be divided by the group's std?


POLICY_LOSSES = {
    "grpo": PolicyLoss(clip_tokens, "tokens", 0.2, 0.2),
    "dr_grpo": PolicyLoss(clip_tokens, "places", 0.2, 0.2, scale_by_std=False),  # arXiv:2503.20783
    "dapo": PolicyLoss(clip_tokens, "tokens", 0.2, 0.28),  # arXiv:2503.14476
    "gspo": PolicyLoss(clip_responses, "responses", 3e-4, 4e-4),
    "gmpo": PolicyLoss(clip_geometric, "responses", 0.4, 0.4),
}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    max_new_tokens: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate (PPO, arXiv:1707.06347) in one of the forms above, to be minimised.

    logprobs, old_logprobs (B, T), advantages (B,), mask (B, T) bool; the clip range is the kind's own by default;
    max_new_tokens is T_max of dr_grpo (default T). Returns the loss and {"clip_fraction": share of tokens whose
    gradient the clip removed}. Raises ValueError for an unknown kind.

    One token became 1.5 times as likely; a good one counts as 1.2 at most, a bad one in full:
    >>> now, then, mask = torch.tensor([[1.5]]).log(), torch.zeros(1, 1), torch.tensor([[True]])
    >>> [policy_loss(now, then, torch.tensor([A]), mask)[0].item() for A in (1.0, -1.0)]
    [-1.2000000476837158, 1.5]
    """
    known("policy loss kind", kind, list(POLICY_LOSSES))
    form = POLICY_LOSSES[kind]
    low, high = form.low if clip_low is None else clip_low, form.high if clip_high is None else clip_high
    surrogate, cut = form.clip(logprobs - old_logprobs, advantages[:, None], mask, low, high)  # (B, T)
    if form.mean_over == "tokens":
        mean = surrogate[mask].mean()
    elif form.mean_over == "responses":
        mean = response_mean(surrogate, mask).mean()
    else:
        mean = surrogate[mask].sum() / (len(mask) * (max_new_tokens or mask.shape[1]))
    return -mean, {"clip_fraction": cut[mask].float().mean().item()}


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's samples: exp(q - p) - (q - p) - 1 >= 0.

    logprobs p and ref_logprobs q, both (B, T), result (B, T). (Schulman's k3, as in GRPO.)

    >>> kl_k3(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log())  # 0.5 + log 2 - 1
    tensor([[0.1931]])
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


# =====================================================================================================
# 6. Every hyperparameter
# =====================================================================================================


def setting(default, meaning: str, source: str, *, low=None, high=None, above=None, choices=None):
    """A field of `CLIPOConfig`: its meaning, its source, its range (>= low, <= high, > above, or one of choices)."""
    about = {"meaning": meaning, "source": source, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata=about)


def computes_in_bfloat16(device: str) -> bool:
    """Does this kind of device have bfloat16 instructions? (Some CPUs: a 34M model's step takes half the time.)"""
    return device == "cuda" or (device == "cpu" and torch.cpu._is_avx512_bf16_supported())


# What each track sets differently from the defaults of CLIPOConfig. "math" is the paper's second track.
TRACKS: dict[str, dict] = {
    "gsm8k": {},
    "math": dict(
        steps=580, prompts_per_step=128, mini_batch_prompts=128, max_new_tokens=4096, d_embed=2048, head_warmup_steps=58
    ),
    "toy": dict(
        steps=40, prompts_per_step=16, mini_batch_prompts=16, max_prompt_tokens=128, max_new_tokens=24,
        lr=2e-4, lr_warmup_steps=5, beta=0.0, head_warmup_steps=4, micro_batch_tokens=2560,
        compute_dtype="float32",  # bfloat16 gains a fifth at this size, and not every CPU has it
    ),
}  # fmt: skip

# The paper's constants leave the reward of most anchors on its floor where groups are mostly correct. This
# form says something there: embeddings without what the group shares, a reward measured from chance, and the wrong
# rollouts of all questions as negatives, so that a right answer which looks like those is paid less.
INFORMATIVE = dict(
    center_hidden=True, contrastive_kind="decoupled", contrastive_scope="cross", contrastive_temperature=0.5,
    reward_from_chance=True, weight=1.0, reward_floor=-0.9, reward_ceiling=1.0, head_steps=4,
)  # fmt: skip


@dataclass
class CLIPOConfig:
    """Every hyperparameter; the defaults are the paper's for GSM8K. Raises ValueError for a value out of range."""

    steps: int = setting(84, "training steps, head warm-up included", "paper: 6 epochs of 14", low=1)
    prompts_per_step: int = setting(512, "prompts in a step", "paper", low=1)
    mini_batch_prompts: int = setting(256, "prompts in one policy update at most", "paper", low=1)
    samples_per_prompt: int = setting(16, "rollouts of one prompt, the group size G", "paper", low=2)
    max_prompt_tokens: int = setting(512, "longer prompts are dropped", "paper", low=1)
    max_new_tokens: int = setting(2048, "tokens of a rollout at most", "paper", low=1)
    temperature: float = setting(1.0, "sampling temperature of rollouts", "paper", above=0)

    lr: float = setting(1e-6, "policy learning rate (AdamW)", "paper", low=0)
    lr_warmup_steps: int = setting(0, "policy steps over which lr rises linearly", "authors' code", low=0)
    weight_decay: float = setting(0.01, "policy weight decay", "verl's default", low=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", "authors' code", above=0)
    policy_loss: str = setting("grpo", "what is clipped and averaged", "paper", choices=list(POLICY_LOSSES))
    clip_low: float | None = setting(
        None, "the ratio is clipped below 1 - this (the loss's own)", "paper", low=0, high=1
    )
    clip_high: float | None = setting(None, "the ratio is clipped above 1 + this (the loss's own)", "paper", low=0)
    beta: float = setting(0.001, "weight of the k3 KL to the frozen start; 0: no reference is kept", "paper", low=0)
    scale_by_std: bool = setting(True, "divide advantages by the group's std (dr_grpo never does)", "paper")
    resample_tries: int = setting(
        0, "times that groups all right or all wrong are replaced by fresh prompts at most", "DAPO; 0: never", low=0
    )
    overlong_buffer: int = setting(0, "last tokens, over which a penalty of up to 1 grows", "DAPO; 0: none", low=0)

    weight: float = setting(0.2, "lambda, weight of the contrastive reward; 0 is plain GRPO", "paper", low=0)
    contrastive_kind: str = setting("infonce", "contrastive loss", "paper", choices=list(CONTRASTIVE_LOSSES))
    contrastive_scope: str = setting("group", "where positives and negatives come from", "paper", choices=list(SCOPES))
    contrastive_temperature: float = setting(0.05, "tau, temperature of the similarities", "paper", above=0)
    reward_floor: float = setting(-0.5, "least contrastive reward", "paper", high=0)
    reward_ceiling: float = setting(1.0, "largest contrastive reward", "ours; the paper's is never above 0", low=0)
    reward_from_chance: bool = setting(False, "reward weight * (chance - L), not weight * -L", "paper: off; ours: on")
    shuffle_contrast: bool = setting(
        False, "control: deal the contrastive rewards out anew among the anchors of each group", "ours"
    )
    center_hidden: bool = setting(False, "subtract the group's mean from the hidden states", "paper: off; ours: on")
    d_embed: int = setting(512, "embedding width E of the head", "paper", low=1)
    head_mlp: bool = setting(False, "MLP head in place of a linear one", "authors' code")
    head_lr: float = setting(1e-3, "head learning rate (AdamW)", "paper", low=0)
    head_weight_decay: float = setting(0.01, "head weight decay", "paper", low=0)
    head_steps: int = setting(
        1, "head updates per step; the reward is from before them; 0: a fixed head", "paper: 1; ours: 4", low=0
    )
    head_warmup_steps: int = setting(14, "first steps, in which only the head learns (weight > 0)", "paper", low=0)

    max_batch: int = setting(256, "rollouts under way at once; the others wait for a free row", "memory only", low=1)
    cuda_graphs: bool | None = setting(
        None, "replay decode steps as CUDA graphs on a GPU (if neither is given: where it works)", "speed only"
    )
    micro_batch_tokens: int = setting(16384, "tokens in a forward and backward pass", "memory only", low=1)
    recompute_activations: bool | None = setting(
        None,
        "keep only each layer's input for the backward pass; a third slower (if neither is given: where all "
        "activations would not fit, by train.py's memory plan)",
        "authors' code: on; memory only",
    )
    compute_dtype: str = setting(
        "auto",
        "dtype of matrix products (weights and optimiser stay float32); auto: bfloat16 where the device computes in it",
        "authors' code: bfloat16",
        choices=["auto", "float32", "bfloat16"],
    )
    seed: int = setting(0, "seed of every random draw", "", low=0)

    def __post_init__(self):
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            if value is None and f.default is None:
                continue
            expected = []
            if isinstance(value, float) and not math.isfinite(value):
                expected.append("a finite number")
            if about["low"] is not None and not value >= about["low"]:
                expected.append(f"at least {about['low']}")
            if about["high"] is not None and not value <= about["high"]:
                expected.append(f"at most {about['high']}")
            if about["above"] is not None and not value > about["above"]:
                expected.append(f"more than {about['above']}")
            if about["choices"] and value not in about["choices"]:
                expected.append(f"one of: {', '.join(about['choices'])}")
            if expected:
                raise ValueError(f"{f.name} is {value!r}; expected {' and '.join(expected)}")
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}; expected at most max_new_tokens, {self.max_new_tokens}"
            )

    def in_bfloat16(self, device: str) -> bool:
        """Are matrix products computed in bfloat16 on this kind of device?"""
        return {"auto": computes_in_bfloat16(device), "float32": False, "bfloat16": True}[self.compute_dtype]

    @classmethod
    def for_track(cls, track: str, *, paper: bool = False, **chosen) -> CLIPOConfig:
        """The settings of a track, with `chosen` on top. On the toy world, `paper` selects the paper's constants of
        the contrastive reward in place of INFORMATIVE; elsewhere they are the defaults anyway."""
        known("track", track, list(TRACKS))
        informative = INFORMATIVE if track == "toy" and not paper else {}
        return cls(**{**TRACKS[track], **informative, **chosen})


# =====================================================================================================
# 7. The step
# =====================================================================================================


@dataclass
class Scored:
    """What one step found out about its B rollouts; `CLIPO.last` keeps it for logs and pictures."""

    rollouts: Rollouts
    texts: list[str]  # B responses
    correct: Tensor  # (B,) bool
    embedding: Tensor  # (B, E) z before the head's update
    loss: Tensor  # (B,) L, 0 where there is no anchor
    anchors: Tensor  # (B,) bool
    positive: Tensor | None  # (B,) long: the row of the positive drawn for an anchor; None: it has all of them
    contrastive: Tensor  # (B,) rc
    reward: Tensor  # (B,) R = r + rc
    advantage: Tensor  # (B,) A
    origin: list[int]  # (P,) which prompt each group answers, counting the given ones and then the fresh ones drawn


class BrokenNumbers(ArithmeticError):
    """A number of this `phase` of a step is NaN or infinite. No weight has seen it."""

    def __init__(self, phase: str):
        super().__init__(f"a number of the phase {phase!r} is NaN or infinite")
        self.phase = phase


def require_finite(phase: str, *values: Tensor) -> None:
    """Raise BrokenNumbers if one is NaN or infinite."""
    if not all(value.isfinite().all() for value in values):
        raise BrokenNumbers(phase)


class OutOfMemory(RuntimeError):
    """Even the least at a time does not fit in memory."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Is it this that went wrong, here or in what led here? torch has a class for it on a GPU only, and not for
    cuBLAS, cuDNN and graphs; a capture that memory ends reports that it was ended."""
    if error is None:
        return False
    words = "can't allocate memory", "out of memory", "ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words):
        return True
    return ran_out_of_memory(error.__cause__ or error.__context__)


def spread_within_groups(reward: Tensor, anchors: Tensor, group: Tensor) -> float | None:
    """Mean over groups of the std of the anchors' contrastive rewards: what the reward can still tell apart.

    >>> spread_within_groups(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False]), torch.zeros(3).long())
    1.4142135381698608
    """
    if not anchors.any():
        return None
    group = group[anchors]
    spread, size = group_std(reward[anchors], group), group_size(group)
    return ((spread / size).sum() / (1 / size).sum()).item()  # each group counts once


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


def end_of_sequence_ids(model, tokenizer) -> list[int]:
    """The token ids that end a response: the model's generation config, else the tokenizer's. ValueError if neither."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ValueError("neither model nor tokenizer has an end-of-sequence token; set tokenizer.eos_token")
    return [ids] if isinstance(ids, int) else list(ids)


class Contrast:
    """The contrastive half of a trainer: the head, its optimiser, and what agreement is paid.

    d_model: width D of the hidden states. Every random draw of a step follows from (config.seed, step number).
    """

    def __init__(self, d_model: int, device: torch.device, config: CLIPOConfig):
        self.config, self.steps_done = config, 0
        with torch.random.fork_rng(devices=[]):  # the head's first weights disturb nobody's random numbers
            torch.manual_seed(config.seed)
            self.head = ContrastiveHead(d_model, config.d_embed, config.head_mlp).to(device)
        self.head_optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.head_lr, weight_decay=config.head_weight_decay
        )

    def random(self, purpose: int) -> torch.Generator:
        """This step's random numbers for one purpose, so that no purpose can disturb another's."""
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.steps_done) * 3 + purpose)

    def contrast(
        self, hidden: Tensor, correct: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict]:
        """Embed rollouts by their hidden states (B, D), which carry no gradient, then train the head on them.

        z (B, E), L (B,), anchors (B,) and drawn positives (B,) are from *before* its update, as the reward is.
        """
        config, random, scope = self.config, self.random(1), self.config.contrastive_scope
        if config.center_hidden:
            hidden = hidden - group_mean(hidden, group)
        before, grad_norm = None, None
        for _ in range(max(1, config.head_steps)):
            z, drawn = self.head(hidden), None
            if config.contrastive_kind == "infonce":
                drawn = draw_positives(correct, group, scope=scope, generator=random)
            loss, anchors = contrastive_loss(
                z,
                correct,
                group,
                kind=config.contrastive_kind,
                temperature=config.contrastive_temperature,
                scope=scope,
                positives=drawn,
            )
            require_finite("contrast", loss)
            before = before or (z.detach(), loss.detach(), anchors, drawn)
            if not anchors.any() or config.head_steps == 0:
                break  # nothing to learn from, or a fixed head
            loss[anchors].mean().backward()
            grad_norm = self.descend(self.head_optimizer, "contrast")
        return *before, {"head_grad_norm": grad_norm}

    def reward_agreement(self, loss: Tensor, anchors: Tensor, correct: Tensor, group: Tensor) -> Tensor:
        """rc (B,) with this run's weight, caps and zero point."""
        config = self.config
        chance = 0.0
        if config.reward_from_chance:
            chance = chance_level(correct, group, kind=config.contrastive_kind, scope=config.contrastive_scope)
        reward = contrastive_reward(
            loss,
            anchors,
            weight=config.weight,
            floor=config.reward_floor,
            ceiling=config.reward_ceiling,
            chance=chance,
        )
        return shuffle_within_groups(reward, anchors, group, self.random(2)) if config.shuffle_contrast else reward

    def descend(self, optimizer: torch.optim.Optimizer, phase: str) -> float:
        """Clip the gradient, one optimiser step; the gradient's norm before the clip. Raises BrokenNumbers."""
        parameters = [p for parameters in optimizer.param_groups for p in parameters["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        require_finite(phase, norm)  # that of a gradient with NaN in it is NaN
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()


class CLIPO(Contrast):
    """The trainer: policy, frozen reference, and the contrastive half; `step` is one training step.

    policy: a transformers causal LM; tokenizer: its tokenizer; are_correct(response texts, answers) -> list of bool.
    A run is resumed by its weights, its optimisers and its step number alone.

    Raises ValueError for a policy that `generate` cannot serve.
    """

    def __init__(self, policy, tokenizer, are_correct: Callable[..., Sequence[bool]], config: CLIPOConfig):
        self.policy = policy.eval()  # no dropout, so that old and new log-probs are of one policy
        check_model(policy)
        super().__init__(policy.get_output_embeddings().in_features, policy.device, config)
        self.tokenizer, self.are_correct = tokenizer, are_correct
        self.stop_ids = end_of_sequence_ids(policy, tokenizer)
        self.reference = None
        if config.beta > 0:
            self.reference = copy.deepcopy(policy).requires_grad_(False)
            if config.in_bfloat16(policy.device.type):  # nobody updates it
                for parameter in self.reference.parameters():  # (a rotary embedding's frequencies stay float32)
                    parameter.data = parameter.data.bfloat16()
        self.policy_optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=policy.device.type == "cuda",  # the GPU's default makes another copy of all weights on the way
        )
        self.last: Scored | None = None
        self.sizes = {"max_batch": config.max_batch, "micro_batch_tokens": config.micro_batch_tokens}  # see `in_memory`

    def step(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[str],
        fresh: Iterator[tuple[Sequence[int], str]] | None = None,
    ) -> dict:
        """One training step on P prompts (lists of token ids) and their answers; returns its metrics.

        `fresh` gives further prompts with their answers where config.resample_tries asks for them. A step in which a
        number breaks is skipped from there on: of its metrics there are only "step", "seconds" and, as "skipped", the
        phase; `last` is None. Raises ValueError if there is no `fresh` where one is needed, or not one answer to each
        prompt; OutOfMemory if even a single rollout does not fit.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; expected one answer to each prompt")
        if self.config.resample_tries and fresh is None:
            raise ValueError("resample_tries is set but `fresh` is None; expected an iterator of (prompt, answer)")
        seconds: dict[str, float] = {}
        try:
            metrics = {"skipped": None, **self.try_step(list(prompts), list(answers), fresh, seconds)}
        except BrokenNumbers as broken:
            metrics, self.last = {"skipped": broken.phase}, None
            for optimizer in (self.policy_optimizer, self.head_optimizer):
                optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return {"step": self.steps_done, **metrics, "seconds": seconds}

    def try_step(self, prompts: list, answers: list, fresh: Iterator | None, seconds: dict[str, float]) -> dict:
        """The step itself, from rollouts to update; its metrics. Raises BrokenNumbers."""
        rollouts, texts, correct, origin = self.sample(prompts, answers, fresh, seconds)
        with self.phase("contrast", seconds):
            embedding, loss, anchors, drawn, head_metrics = self.contrast(rollouts.hidden, correct, rollouts.group)
            contrastive = self.reward_agreement(loss, anchors, correct, rollouts.group)
        reward = correct.float() + contrastive
        reward += overlong_penalty(rollouts.mask.sum(-1), self.config.max_new_tokens, self.config.overlong_buffer)
        scale_by_std = self.config.scale_by_std and POLICY_LOSSES[self.config.policy_loss].scale_by_std
        advantage = group_advantages(reward, rollouts.group, scale_by_std=scale_by_std)
        with self.phase("update", seconds):
            policy_metrics = {} if self.warming_up else self.update(prompts, rollouts, advantage)

        self.last = Scored(
            rollouts, texts, correct, embedding, loss, anchors, drawn, contrastive, reward, advantage, origin
        )
        return {
            **self.describe(self.last),
            **head_metrics,
            **dict.fromkeys(("policy_loss", "kl", "clip_fraction", "policy_grad_norm")),  # None in a warm-up step
            **policy_metrics,
            "tokens_per_second": int(rollouts.mask.sum()) / sum(seconds.values()),
        }

    @property
    def warming_up(self) -> bool:
        """True while only the head learns. Plain GRPO has nothing to wait for."""
        return self.config.weight > 0 and self.steps_done < self.config.head_warmup_steps

    def sample(
        self, prompts: list, answers: list, fresh: Iterator | None, seconds: dict[str, float]
    ) -> tuple[Rollouts, list[str], Tensor, list[int]]:
        """G rollouts per prompt, their texts and verdicts (B,), and which prompt each group answers (see `Scored`).

        DAPO's dynamic sampling: a group all right or all wrong has no advantage. Its prompt makes room for a fresh one
        (in `prompts` and `answers` themselves), at most `resample_tries` times; what is then still without is kept.
        """
        random, origin, drawn = self.random(0), list(range(len(prompts))), len(prompts)
        rollouts, texts, correct = self.roll_out_and_verify(prompts, answers, random, seconds)
        for _ in range(self.config.resample_tries):
            accuracy = correct.view(len(prompts), -1).float().mean(-1)  # (B,) -> (P,)
            dull = ((accuracy == 0) | (accuracy == 1)).nonzero()[:, 0].tolist()
            if not dull:
                break
            for g in dull:
                (prompts[g], answers[g]), origin[g], drawn = next(fresh), drawn, drawn + 1
            new, new_texts, verdicts = self.roll_out_and_verify(
                [prompts[g] for g in dull], [answers[g] for g in dull], random, seconds
            )
            rows = torch.isin(rollouts.group, rollouts.group.new_tensor(dull)).nonzero()[:, 0]
            rollouts, correct = rollouts.put(rows, new), correct.index_copy(0, rows, verdicts)
            for row, text in zip(rows.tolist(), new_texts, strict=True):
                texts[row] = text
        return rollouts, texts, correct, origin

    def roll_out_and_verify(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[str], random: torch.Generator, seconds: dict
    ) -> tuple[Rollouts, list[str], Tensor]:
        """G rollouts per prompt, their texts, and their verdicts (B,) bool."""
        with self.phase("rollout", seconds), self.mixed_precision():
            rollouts = self.roll_out(prompts, random)
            require_finite("rollout", rollouts.logprobs, rollouts.hidden)
        with self.phase("verify", seconds):
            return rollouts, *self.verify(rollouts, answers)

    def roll_out(self, prompts: Sequence[Sequence[int]], random: torch.Generator) -> Rollouts:
        """G rollouts per prompt from the current policy."""
        state = random.get_state()

        def attempt(max_batch: int, max_new_tokens: int = self.config.max_new_tokens) -> Rollouts:
            return generate(
                self.policy,
                prompts,
                samples_per_prompt=self.config.samples_per_prompt,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.stop_ids,
                temperature=self.config.temperature,
                generator=random.set_state(state),
                max_batch=max_batch,
                cuda_graphs=self.config.cuda_graphs,
            )

        return self.in_memory("max_batch", attempt, 1, lambda tokens: attempt(1, tokens))

    def verify(self, rollouts: Rollouts, answers: Sequence[str]) -> tuple[list[str], Tensor]:
        """The responses as text, and r: is the final answer right? (B,) bool."""
        ids = [row[keep] for row, keep in zip(rollouts.tokens.cpu(), rollouts.mask.cpu(), strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        correct = self.are_correct(texts, [answers[g] for g in rollouts.group.tolist()])
        return texts, torch.tensor(correct, dtype=torch.bool, device=rollouts.group.device)

    def update(self, prompts: Sequence[Sequence[int]], rollouts: Rollouts, advantage: Tensor) -> dict:
        """Clipped policy updates, one per mini-batch of prompts; means of their metrics."""
        config = self.config
        policy_step = self.steps_done - (config.head_warmup_steps if config.weight > 0 else 0)
        for parameters in self.policy_optimizer.param_groups:
            parameters["lr"] = config.lr * min(1.0, (policy_step + 1) / max(1, config.lr_warmup_steps))
        count = math.ceil(len(prompts) / config.mini_batch_prompts)
        updates = []
        for rows in torch.arange(len(advantage), device=advantage.device).view(len(prompts), -1).tensor_split(count):
            rows = rows.flatten()  # (prompts of this mini-batch, G) -> all their rollouts
            updates.append(self.update_mini_batch(prompts, rollouts.select(rows), advantage[rows]))
        return {
            name: None if updates[0][name] is None else sum(u[name] for u in updates) / len(updates)
            for name in updates[0]
        }

    def update_mini_batch(self, prompts: Sequence[Sequence[int]], rollouts: Rollouts, advantage: Tensor) -> dict:
        """One optimiser step."""

        def attempt(micro_batch_tokens: int) -> dict:
            self.policy_optimizer.zero_grad(set_to_none=True)
            with self.mixed_precision():
                return self.gather_gradient(prompts, rollouts, advantage, micro_batch_tokens)

        def one_of(tokens: int) -> None:
            row = rollouts.mask.sum(-1).argmax()[None]
            cut = replace(
                one := rollouts.select(row),
                tokens=one.tokens[:, :tokens],
                mask=one.mask[:, :tokens],
                logprobs=one.logprobs[:, :tokens],
            )
            with self.mixed_precision():
                self.gather_gradient(prompts, cut, advantage[row], tokens)

        longest = int(rollouts.mask.sum(-1).max())
        metrics = self.in_memory("micro_batch_tokens", attempt, longest, one_of)
        return {**metrics, "policy_grad_norm": self.descend(self.policy_optimizer, "update")}

    def gather_gradient(
        self, prompts: Sequence[Sequence[int]], rollouts: Rollouts, advantage: Tensor, micro_batch_tokens: int
    ) -> dict:
        """Forward and backward through micro-batches; the gradient does not depend on how they are cut."""
        config, temperature = self.config, self.config.temperature
        lengths = rollouts.mask.sum(-1).tolist()
        tokens = sum(lengths)
        totals = {"policy_loss": 0.0, "clip_fraction": 0.0, "kl": None if self.reference is None else 0.0}
        block = 16 * config.samples_per_prompt  # rollouts of 16 prompts: the fewer, the more they share one
        before = [(g, len(prompts[g]) - 1) for g in rollouts.group.tolist()]  # (its last token is the response's)
        for rows in micro_batches(lengths, micro_batch_tokens, block, before):
            rows = torch.tensor(rows, device=advantage.device)
            part = rollouts.select(rows)
            # A mean over tokens (or responses) is a mean of the parts' means, weighted by their tokens (or responses).
            token_share, response_share = part.mask.sum().item() / tokens, len(rows) / len(lengths)
            share = token_share if POLICY_LOSSES[config.policy_loss].mean_over == "tokens" else response_share
            logprobs = response_logprobs(
                self.policy, prompts, part, temperature=temperature, recompute=bool(config.recompute_activations)
            )
            loss, stats = policy_loss(
                logprobs,
                part.logprobs,
                advantage[rows],
                part.mask,
                kind=config.policy_loss,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                max_new_tokens=config.max_new_tokens,
            )
            loss = share * loss
            if self.reference is not None:
                with torch.no_grad():
                    reference = response_logprobs(self.reference, prompts, part, temperature=temperature)
                kl = kl_k3(logprobs, reference)[part.mask].mean()
                loss = loss + token_share * config.beta * kl
                totals["kl"] += token_share * kl.item()
            require_finite("update", loss)
            loss.backward()
            totals["policy_loss"] += loss.item()
            totals["clip_fraction"] += token_share * stats["clip_fraction"]
        return totals

    def in_memory(self, size: str, attempt: Callable[[int], Any], least: int, one_of: Callable[[int], Any]):
        """attempt(n) with n = self.sizes[size], which is halved for good, down to `least`, while memory runs out.

        Less at a time takes longer and computes the same. Raises OutOfMemory if `least` does not fit either; it says
        for how many tokens a single rollout would, which `one_of(tokens)` tries.
        """
        while (result := self.unless_memory_runs_out(lambda: attempt(self.sizes[size]))) is None:
            if self.sizes[size] <= least:
                tokens = self.config.max_new_tokens // 2
                while tokens and self.unless_memory_runs_out(lambda: (one_of(tokens),)) is None:  # noqa: B023
                    tokens //= 2
                fits = f"one of up to {tokens} would" if tokens else "nor does one of a single token"
                raise OutOfMemory(f"a rollout of up to {self.config.max_new_tokens} tokens does not fit, {fits}")
            self.sizes[size] = max(self.sizes[size] // 2, least)
        return result

    def unless_memory_runs_out(self, attempt: Callable[[], Any]):
        """Its result, or None: what it had allocated is free again."""
        try:
            return attempt()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def describe(self, scored: Scored) -> dict:
        """The metrics of a step that follow from its rollouts. Rewards are per rollout, entropy in nats per token."""
        rollouts, rc, anchors, config = scored.rollouts, scored.contrastive, scored.anchors, self.config
        length = rollouts.mask.sum(-1)
        ended = torch.isin(rollouts.tokens, torch.tensor(self.stop_ids, device=length.device)) & rollouts.mask

        def over_anchors(values: Tensor) -> float | None:
            return values[anchors].float().mean().item() if anchors.any() else None

        def share(flags: Tensor) -> float:
            return flags.float().mean().item()

        return {
            "reward": scored.reward.mean().item(),
            "accuracy": share(scored.correct),
            "contrastive_loss": over_anchors(scored.loss),
            "contrastive_reward": over_anchors(rc),
            "contrastive_reward_std": spread_within_groups(rc, anchors, rollouts.group),
            "on_floor": over_anchors(rc <= config.reward_floor),
            "anchors": int(anchors.sum()),
            "groups_without_contrast": 1 - share(group_mean(anchors.float(), rollouts.group) > 0),
            "groups_without_advantage": share(group_std(scored.reward, rollouts.group) < 1e-6),
            # The mean surprise at one's own samples is an unbiased estimate of the entropy, and costs nothing.
            "entropy": -rollouts.logprobs.sum().item() / int(length.sum()),
            "groups_resampled": sum(i >= len(scored.origin) for i in scored.origin) / len(scored.origin),
            "response_length": length.float().mean().item(),
            "cut_off": 1 - share(ended.any(-1)),
        }

    def mixed_precision(self):
        """bfloat16 matrix products over float32 weights: in bfloat16 weights, an update of 1e-6 would round away.

        The context copies each matrix to bfloat16 once and holds the copy as long as it lasts, so each rollout phase
        and each mini-batch opens its own: an optimiser step inside would go unseen. A policy that is all bfloat16
        decodes 1.0 to 1.2 times as fast (34M and 0.5B models on a CPU), but its log-probs are off from those of the
        update by 0.010 a token, these by 0.002.
        """
        device = self.policy.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.in_bfloat16(device))

    @contextmanager
    def phase(self, name: str, seconds: dict[str, float]):
        """Time a phase of the step; a GPU is waited for, or the time would fall into the next phase."""
        start = time.perf_counter()
        yield
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
