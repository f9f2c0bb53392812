"""The reward's floor."""

import math

import torch
from torch import Tensor

from clipo import Pairs

PREDICTION: float | None = 0.9
WEIGHT: float = 0.1
EXPLANATION: str | None = "c"


def contrastive_reward(loss: Tensor, pairs: Pairs, *, weight: float = 0.2, floor: float = -0.5) -> Tensor:
    """(P, G) -> (P, G)."""
    return torch.where(pairs.anchor, (-weight * loss).clamp(min=floor), 0.0)


def largest_group(weight: float = 0.2, floor: float = -0.5) -> int:
    """log(G - 1) < -floor / weight."""
    return math.ceil(math.exp(-floor / weight))
