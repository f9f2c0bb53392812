"""A mean with a mask."""

from torch import Tensor


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D), (B, T) -> (B, D)."""
    kept = states.masked_fill(~mask[..., None], 0)
    return kept.sum(1) / mask.sum(-1, keepdim=True)
