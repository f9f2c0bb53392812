"""Exercise 10, an experiment: a contrastive loss of your own, beside the five of variants.py.

A loss must: fall when the other right answers come closer to the anchor, rise when a wrong one does, be finite at
similarities of +-200 and in groups without an anchor, not look at the anchor itself nor at other groups. It comes with
its chance level, from which the reward can be measured. Each of the five passes: begin with one, then change it.

Then: how much more does yours pay sound right answers than unsound ones? And does that matter? In training on the toy
world three of the five ended alike, on one seed, and two lower (docs/worlds.md, contrastive losses; hint 7).

Check it with: python -m pytest exercises/10_own_loss      See it with: python -m exercises.plots 10
"""

from torch import Tensor

from clipo import Pairs
from variants import ContrastiveLoss


def my_loss(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """z (P, G, E) unit vectors -> L (P, G), 0 for all others than anchors; pairs as in exercise 6."""
    raise NotImplementedError("write my_loss in exercises/10_own_loss/answer.py; hints.md helps")


def my_chance(positives: Tensor, negatives: Tensor) -> Tensor:
    """my_loss where all similarities are the same; how many positives and negatives each has, (P, G) -> (P, G)."""
    raise NotImplementedError("write my_chance in exercises/10_own_loss/answer.py; hints.md helps")


MINE = ContrastiveLoss(my_loss, my_chance)  # what a line of variants.LOSSES has
