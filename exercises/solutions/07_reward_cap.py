"""The reward's cap."""

import math

import torch
from torch import Tensor

EXPLANATION: str | None = "b"


def contrastive_reward(loss: Tensor, anchors: Tensor, weight: float = 0.2, floor: float = -0.5) -> Tensor:
    """(B,), (B,) -> (B,)."""
    return torch.where(anchors, (-weight * loss).clamp(min=floor), 0.0)


def largest_group(weight: float = 0.2, floor: float = -0.5) -> int:
    """log(G - 1) < -floor / weight."""
    return math.ceil(math.exp(-floor / weight))
