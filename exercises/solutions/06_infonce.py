"""InfoNCE, its chance level and its floor."""

import math

import torch
from torch import Tensor

from clipo import Pairs


def infonce(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """(P, G, E) -> (P, G)."""
    s = z @ z.transpose(-1, -2) / tau  # (P, G, G)
    itself = torch.eye(z.shape[1], dtype=torch.bool)
    loss = s.masked_fill(itself, -torch.inf).logsumexp(-1) - (s * pairs.target).sum(-1)
    return torch.where(pairs.anchor, loss, 0.0)


def chance_level(G: int) -> float:
    """All G - 1 others look the same."""
    return math.log(G - 1)


def floor(n: int) -> float:
    """The n - 1 other right answers look the same."""
    return math.log(n - 1)
