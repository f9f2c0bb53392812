"""A mean with a mask."""

from torch import Tensor


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """(P, G, T, D), (P, G, T) -> (P, G, D)."""
    kept = states.masked_fill(~mask[..., None], 0)
    return kept.sum(-2) / mask.sum(-1, keepdim=True)
