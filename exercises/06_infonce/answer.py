"""Exercise 6: InfoNCE, its chance level and its floor (paper: contrastive loss; clipo.py, section 3).

    L_i = -s_ij + log sum_{a != i} exp(s_ia),   s_ia = z_i . z_a / tau

for an anchor i (a right answer), one other right answer j of its group, and all others a of the group, right or wrong.

Check it with: python -m pytest exercises/06_infonce
"""

from torch import Tensor


def infonce(z: Tensor, anchor: int, positive: int, tau: float = 0.05) -> Tensor:
    """z (G, E) unit vectors of one group -> L of the anchor, a number ()."""
    raise NotImplementedError("write infonce in exercises/06_infonce/answer.py; hints.md helps")


def chance_level(G: int) -> float:
    """L if the embeddings tell nothing apart: all similarities are the same."""
    raise NotImplementedError("write chance_level in exercises/06_infonce/answer.py; hints.md helps")


def floor(n: int) -> float:
    """L, in the limit of a small tau, of a perfect head: the n right answers in one point, the wrong ones far away."""
    raise NotImplementedError("write floor in exercises/06_infonce/answer.py; hints.md helps")
