"""Exercise 10, an experiment: a contrastive loss of your own, against the five of clipo.py (section 3).

For each of A anchors there are similarities to the G rollouts of its group, already divided by tau: which of them are
its targets (the positives that count), which are positive at all, which are negative (wrong answers). The anchor's own
similarity is in the row too, and is none of these.

A loss of yours must: fall when a target comes closer, rise when a wrong one does, be finite at similarities of +-200,
not look at the anchor itself, and be none of the five. Then: how much more does it pay sound right answers than unsound
ones?

Check it with: python -m pytest exercises/10_own_loss      See it with: python -m exercises.plots 10
"""

from torch import Tensor


def my_loss(similarity: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """similarity (A, G), the others (A, G) bool -> losses (A,)."""
    raise NotImplementedError("write my_loss in exercises/10_own_loss/answer.py; hints.md helps")
