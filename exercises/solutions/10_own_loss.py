"""A logistic loss of the mean positive against the hardest wrong answer."""

import math

import torch.nn.functional as F
from torch import Tensor


def my_loss(similarity: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(A, G) four times -> (A,)."""
    pulled = (similarity * target).sum(-1) / target.sum(-1)
    hardest = similarity.masked_fill(~negative, -math.inf).max(-1).values
    return F.softplus(hardest - pulled)
