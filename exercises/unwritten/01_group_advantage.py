"""Exercise 1: the group-relative advantage (GRPO; clipo.py, section 4).

    A_i = (R_i - mean R) / (std R + eps)     mean and std over the G rollouts of one prompt

The std has Bessel's correction: the squared distances are divided by G - 1. Dr. GRPO (arXiv:2503.20783) does not
divide by the std: scale_by_std=False.

Check it with: python -m pytest exercises/01_group_advantage
"""

from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """rewards (P, G), one row of G rollouts per prompt -> advantages (P, G)."""
    raise NotImplementedError("write group_advantages in exercises/01_group_advantage/answer.py; hints.md helps")
