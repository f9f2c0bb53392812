"""Exercise 5: the trajectory embedding h, a mean with a mask (paper: trajectory embedding; clipo.py, `generate`).

    h = mean of the last layer's states over the tokens of the response

Responses of one batch have different lengths; what stands behind a response's end is padding.

Check it with: python -m pytest exercises/05_mean_pooling
"""

from torch import Tensor


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """states (P, G, T, D), mask (P, G, T) bool, True for tokens of the response, at least one -> h (P, G, D)."""
    raise NotImplementedError("write pool in exercises/05_mean_pooling/answer.py; hints.md helps")
