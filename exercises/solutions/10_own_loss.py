"""A logistic loss of the mean positive against the hardest wrong answer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipo import Pairs, similarities
from variants import ContrastiveLoss


def my_loss(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """(P, G, E) -> (P, G)."""
    s = similarities(z, tau)  # (P, G, G)
    pulled = (s * pairs.positive).sum(-1) / pairs.positive.sum(-1).clamp(min=1)
    hardest = s.masked_fill(~pairs.negative, -math.inf).max(-1).values
    return torch.where(pairs.anchor, F.softplus(hardest - pulled), 0.0)


def my_chance(positives: Tensor, negatives: Tensor) -> Tensor:
    """softplus(0)."""
    return torch.full_like(positives, math.log(2))


MINE = ContrastiveLoss(my_loss, my_chance)
