"""Exercise 6: InfoNCE, its chance level and its floor (paper: contrastive loss; clipo.py, section 3).

    L_i = -s_ij + log sum_{a != i} exp(s_ia),   s_ia = z_i . z_a / tau

for an anchor i (a right answer whose group has another right one and a wrong one), one other right answer j of its
group, which was drawn, and all others a of the group, right or wrong. All others than anchors get 0.

Check it with: python -m pytest exercises/06_infonce
"""

from torch import Tensor

from clipo import Pairs


def infonce(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """z (P, G, E) unit vectors -> L (P, G).

    pairs: three masks (P, G, G), [question, i, a]: pairs.target, where a is the j of i (nowhere, if i has none);
    pairs.positive, where both are right and a is not i; pairs.negative, where i is right and a is wrong. And
    pairs.anchor (P, G).
    """
    raise NotImplementedError("write infonce in exercises/06_infonce/answer.py; hints.md helps")


def chance_level(G: int) -> float:
    """L if the embeddings tell nothing apart: all similarities are the same."""
    raise NotImplementedError("write chance_level in exercises/06_infonce/answer.py; hints.md helps")


def floor(n: int) -> float:
    """L of a perfect head in the limit of a small tau: its n right answers (2 or more, the anchor is one) in one point,
    the wrong ones far away."""
    raise NotImplementedError("write floor in exercises/06_infonce/answer.py; hints.md helps")
