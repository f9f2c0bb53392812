"""Nearly equal rewards."""

import torch

import clipo

EXPLANATION: str | None = "b"


def mean_size(size: float, scale_by_std: bool) -> float:
    """Mean |A| of 16 rewards 1 + size * noise."""
    rewards = 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    return clipo.group_advantages(rewards, scale_by_std=scale_by_std).abs().mean().item()
