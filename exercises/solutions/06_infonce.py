"""InfoNCE, its chance level and its floor."""

import math

import torch
from torch import Tensor


def infonce(z: Tensor, anchor: int, positive: int, tau: float = 0.05) -> Tensor:
    """(G, E) -> ()."""
    s = z @ z[anchor] / tau  # (G,)
    others = torch.arange(len(z)) != anchor
    return s[others].logsumexp(0) - s[positive]


def chance_level(G: int) -> float:
    """All G - 1 others look the same."""
    return math.log(G - 1)


def floor(n: int) -> float:
    """The n - 1 other right answers look the same."""
    return math.log(n - 1)
