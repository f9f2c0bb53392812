"""One decode step with a KV cache."""

import torch
from torch import Tensor


def decode_step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """(B, H, W) three times, (B, H, slots, W) twice, (B,) -> (B, H, W)."""
    row = torch.arange(len(length))
    keys[row, :, length], values[row, :, length] = key, value
    scores = torch.einsum("bhw,bhsw->bhs", query, keys) / query.shape[-1] ** 0.5
    hidden = torch.arange(keys.shape[2]) > length[:, None]  # (B, slots)
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhs,bhsw->bhw", weights, values)
