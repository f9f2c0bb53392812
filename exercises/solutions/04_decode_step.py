"""One decode step with a KV cache."""

import torch
from torch import Tensor

import clipo
from clipo import KVCache


def attend(query: Tensor, key: Tensor, value: Tensor, cache: KVCache) -> Tensor:
    """(B, H, 1, W) three times -> (B, H, 1, W)."""
    keys, values = cache.update(key, value, layer=0)  # (B, H, slots, W)
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5  # (B, H, 1, slots)
    unseen = torch.arange(cache.slots) > cache.positions  # (B, slots)
    return scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values


def decode_step(model, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """(B,), (B,) -> (B, V)."""
    states = clipo.last_states(model, token[:, None], position[:, None], cache)  # (B, 1, D)
    return clipo.output_logits(model, states[:, 0])
