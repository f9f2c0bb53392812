"""A decode step in few kernels: what `engine.forward.last_states` does for one new token a row, compiled.

A norm, a rotation or a softmax is no kernel of its own any more: a step of 24 layers was 721 kernels in place of 1,431
(a trial on an H100). One function is a layer and gets its weights as arguments, so that one compilation serves all
layers. It is written out here once, for the families that share it; other models decode as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.forward import KVCache, attention_windows, is_plain_rmsnorm, product_dtype

FAMILIES = "qwen2", "qwen3", "llama", "mistral"


def why_not(model) -> str | None:
    """Why this model's layers are not those of `layer`, in a few words; None if they are."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is none of {', '.join(FAMILIES)}"
    if attention_windows(config) != {"full_attention": None}:
        return "its attention has a window"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    attention, mlp = ([getattr(of, part) for of in model.base_model.layers] for part in ("self_attn", "mlp"))
    first = [getattr(of, name) for of in attention for name in ("q_proj", "k_proj", "v_proj")]
    rest = [of.o_proj for of in attention] + [model.get_output_embeddings()]
    rest += [getattr(of, f"{name}_proj") for of in mlp for name in ("gate", "up", "down")]
    norms = [of for of in model.base_model.modules() if type(of).__name__.endswith("RMSNorm")]
    if not all(type(of) is nn.Linear for of in first + rest):
        return "its products are no plain nn.Linear"
    if any(of.bias is not None for of in rest):
        return "a product has a bias where its family has none"
    if not all(map(is_plain_rmsnorm, norms)):
        return "its norms are not Llama's"
    if any("forward" in vars(of) or of._forward_hooks or of._forward_pre_hooks for of in first + rest + norms):
        return "a forward pass of its parts was changed"
    return None


class Weights(NamedTuple):
    """Of a layer; matrices in the dtype of products, those with the same input in one."""

    before_attention: Tensor  # (D,)
    qkv: Tensor  # ((Hq + 2 H) * head width, D)
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (head width,)
    k_norm: Tensor | None
    out: Tensor  # (D, Hq * head width)
    before_mlp: Tensor  # (D,)
    gate_up: Tensor  # (2 * feed-forward, D)
    down: Tensor  # (D, feed-forward)


def weights_of(one: nn.Module, dtype: torch.dtype) -> Weights:
    """Copies of one layer's."""
    heads, mlp = one.self_attn, one.mlp
    projections = heads.q_proj, heads.k_proj, heads.v_proj
    biases = [of.bias for of in projections]
    norms = [norm.weight if (norm := getattr(heads, name, None)) else None for name in ("q_norm", "k_norm")]
    return Weights(
        one.input_layernorm.weight,
        torch.cat([of.weight for of in projections]).to(dtype),
        None if biases[0] is None else torch.cat(biases).to(dtype),
        *norms,
        heads.o_proj.weight.to(dtype),
        one.post_attention_layernorm.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype),
        mlp.down_proj.weight.to(dtype),
    )


def renew(copy: Tensor | None, now: Tensor | None) -> None:
    """A copy has the values of now, where it is one."""
    if copy is not None and not isinstance(copy, nn.Parameter):
        copy.copy_(now)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads (rows, H, head width) by angles (rows, 1, head width)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one token a row, as two products: q (rows, H, Hq / H, head width) -> the same.

    keys, values (rows, H, used, head width), seen up to `position` (rows,). The Hq / H query heads of a key head are so
    many queries to it, so that each key is read once.
    """
    scores = (q @ keys.transpose(2, 3)).float() * q.shape[3] ** -0.5  # (rows, H, Hq / H, used)
    look = torch.arange(keys.shape[2], device=q.device) <= position[:, None]
    return scores.masked_fill(~look[:, None, None], -torch.inf).softmax(-1).to(q.dtype) @ values


def layer(
    states: Tensor, position: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, used: int, epsilon: float,
    before_attention: Tensor, qkv: Tensor, qkv_bias: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    out: Tensor, before_mlp: Tensor, gate_up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    """One layer, one token a row: states (rows, D) at `position` (rows,) -> (rows, D); keys and values are written.

    cos, sin (rows, 1, head width); keys, values (rows or more, H, slots, head width), of which `used` slots are read;
    the rest are `Weights`.
    """
    rows, dtype, (heads, width) = len(states), qkv.dtype, (keys.shape[1], keys.shape[3])

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, epsilon)

    inputs = norm(states, before_attention).to(dtype)
    q, k, v = F.linear(inputs, qkv, qkv_bias).unflatten(-1, (-1, width)).tensor_split((-2 * heads, -heads), dim=1)
    q, k = rotated(norm(q, q_norm), cos, sin).to(dtype), rotated(norm(k, k_norm), cos, sin)
    row = torch.arange(rows, device=states.device)
    keys[row, :, position], values[row, :, position] = k.to(keys.dtype), v.to(values.dtype)
    mixed = attend(q.unflatten(1, (heads, -1)), keys[:rows, :, :used], values[:rows, :, :used], position)
    states = states + F.linear(mixed.flatten(1), out)
    gate, up = F.linear(norm(states, before_mlp).to(dtype), gate_up).chunk(2, -1)
    return states + F.linear(F.silu(gate) * up, down)


@functools.cache
def compiled_layer() -> Callable:
    """`layer`, compiled when it is first called, once for all numbers of rows from 2 on and of slots in use."""
    return torch.compile(layer, dynamic=True, fullgraph=True)


def whatever_equals() -> ExitStack:
    """In here, sizes that happen to be equal may differ next time, and several models may be compiled in a process."""
    stack = ExitStack()
    stack.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
    return stack


class CompiledSteps:
    """`engine.forward.decoded_states` and `output_logits`, for a cache of so many `slots`.

    It copies weights, and must be told to `refresh` them after an update. All that it reads stays where it is, and
    nothing is autocast's: a captured step may be replayed as long as this object lives.
    """

    def __init__(self, model, slots: int):
        self.embedding, self.norm, self.run = model.get_input_embeddings(), model.base_model.norm, compiled_layer()
        self.epsilon, self.dtype = model.config.rms_norm_eps, product_dtype(self.embedding.weight)
        self.layers = [weights_of(one, self.dtype) for one in model.base_model.layers]
        self.output = model.get_output_embeddings().weight.to(self.dtype)  # (V, D)
        for copy in (of for weights in self.layers for of in weights if of is not None):
            if not isinstance(copy, nn.Parameter):  # whose sizes are taken to be fixed anyway
                torch._dynamo.mark_static(copy)
        positions = torch.arange(slots, device=model.device)[None]
        angles = model.base_model.rotary_emb(self.embedding.weight[:1, None], positions)
        self.cos, self.sin = (of[0, :, None] for of in angles)  # (slots, 1, head width)

    @torch.no_grad()
    def refresh(self, model) -> None:
        """The copies are of the weights as they are now. What is the model's own is no copy, and is not touched."""
        renew(self.output, model.get_output_embeddings().weight)
        for weights, one in zip(self.layers, model.base_model.layers, strict=True):
            for copy, now in zip(weights, weights_of(one, self.dtype), strict=True):
                renew(copy, now)

    def __call__(self, token: Tensor, position: Tensor, cache: KVCache, used: int) -> Tensor:
        """Tokens (rows,) at `position` (rows,), all below `used`: the last layer's states after the norm, (rows, D)."""
        states, angles = self.embedding(token), (self.cos[position], self.sin[position])
        with torch.autocast(states.device.type, enabled=False), whatever_equals():
            for weights, keys_and_values in zip(self.layers, cache.layers, strict=True):
                states = self.run(states, position, *angles, *keys_and_values, used, self.epsilon, *weights)
        return self.norm(states)

    def logits(self, states: Tensor) -> Tensor:
        """States (rows, D) -> logits (rows, V)."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(self.dtype), self.output)
