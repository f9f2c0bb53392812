"""Exercise 3: the clipped ratio, and where its gradient is zero (PPO; clipo.py, section 5).

    J = min( rho A, clip(rho, 1 - low, 1 + high) A ),   rho = pi(y_t) / pi_old(y_t)

Where the clip holds a token it has no gradient: write *where* as a condition on rho and A. Exactly on the border
nothing is cut off yet, and where A is 0 there is nothing to cut off: False.

Check it with: python -m pytest exercises/03_clipped_ratio
"""

from torch import Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """J of every token (P, G, T), and where it has no gradient with respect to rho, (P, G, T) bool.

    log_ratio = log rho (P, G, T), advantages (P, G, 1): all tokens of a rollout share its A. mask (P, G, T) says which
    tokens are a response's own; J of a token does not need it (GSPO's, in variants.py, does). The policy learns through
    log_ratio, so J keeps its gradient.
    """
    raise NotImplementedError("write clipped_surrogate in exercises/03_clipped_ratio/answer.py; hints.md helps")
