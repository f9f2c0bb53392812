"""Exercise 3: the clipped ratio, and where its gradient is zero (PPO; clipo.py, section 5).

    J = min( rho A, clip(rho, 1 - low, 1 + high) A ),   rho = pi(y) / pi_old(y)

Check it with: python -m pytest exercises/03_clipped_ratio
"""

from torch import Tensor


def surrogate(ratio: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """rho and A, both (N,) -> J (N,)."""
    raise NotImplementedError("write surrogate in exercises/03_clipped_ratio/answer.py; hints.md helps")


def gradient_is_zero(ratio: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """For which tokens has J no gradient with respect to rho, though A is not 0? (N,), (N,) -> (N,) bool.

    Write it as a condition on rho and A, without autograd.
    """
    raise NotImplementedError("write gradient_is_zero in exercises/03_clipped_ratio/answer.py; hints.md helps")
