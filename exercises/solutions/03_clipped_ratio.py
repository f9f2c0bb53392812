"""The clipped ratio, and where its gradient is zero."""

import torch
from torch import Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """(P, G, T), (P, G, 1), (P, G, T) -> twice (P, G, T)."""
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return surrogate, ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
