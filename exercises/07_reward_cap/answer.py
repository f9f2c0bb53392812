"""Exercise 7: the reward's cap, and why the head needs warm-up (paper: contrastive reward; clipo.py, section 3).

    rc_i = max(-lambda L_i, -0.5) for anchors, 0 for all others,   lambda = 0.2

An untrained head tells nothing apart: its loss is the chance level log(G - 1) (exercise 6).

Check it with: python -m pytest exercises/07_reward_cap      See it with: python -m exercises.plots 7
"""

from torch import Tensor

from clipo import Pairs


def contrastive_reward(loss: Tensor, pairs: Pairs, *, weight: float = 0.2, floor: float = -0.5) -> Tensor:
    """L (P, G) -> rc (P, G). Who is an anchor: pairs.anchor (P, G) bool."""
    raise NotImplementedError("write contrastive_reward in exercises/07_reward_cap/answer.py; hints.md helps")


def largest_group(weight: float = 0.2, floor: float = -0.5) -> int:
    """The largest G for which an untrained head's reward is still above the floor."""
    raise NotImplementedError("write largest_group in exercises/07_reward_cap/answer.py; hints.md helps")


# With G = 16 and no warm-up, what does the contrastive reward do to the advantages of the first steps?
# "a": it pays the best right answers.  "b": hardly anything: most anchors of a group get the same -0.5.
# "c": it turns right answers into wrong ones.
EXPLANATION: str | None = None
