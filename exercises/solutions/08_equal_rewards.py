"""Nearly equal rewards."""

import torch
from torch import Tensor

PREDICTION: float | None = 0.001
SIZE: float = 1e-6
EXPLANATION: str | None = "a"


def rewards(size: float) -> Tensor:
    """(1, 16)."""
    return 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))


def mean_size(size: float, scale_by_std: bool) -> float:
    """Mean |A| of 16 rewards 1 + size * noise."""
    R = rewards(size)
    A = R - R.mean(-1, keepdim=True)
    return (A / (R.std(-1, keepdim=True) + 1e-6) if scale_by_std else A).abs().mean().item()
