"""Centring, and a reward measured from chance."""

import torch
from torch import Tensor

PREDICTION: dict[str, float | None] = {"centring alone": 0.5, "chance alone": 0.5, "both": 1.0}
SHARED: float = 2.0
EXPLANATION: str | None = "d"


def centred(hidden: Tensor) -> Tensor:
    """(P, G, D) -> (P, G, D)."""
    return hidden - hidden.mean(1, keepdim=True)


def chance_level(positives: Tensor, negatives: Tensor) -> Tensor:
    """log(1 + |Neg|)."""
    return (1 + negatives).log()


def reward(
    loss: Tensor, chance: Tensor, anchor: Tensor, *, weight: float = 1.0, floor: float = -0.9, ceiling: float = 1.0
) -> Tensor:
    """(P, G), (P, G), (P, G) -> (P, G)."""
    return torch.where(anchor, (weight * (chance - loss)).clamp(floor, ceiling), 0.0)
