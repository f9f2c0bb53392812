"""Exercise 7: the reward's floor and ceiling, and why the head needs warm-up (clipo.py, section 3).

    the paper's     rc_i = max(-lambda L_i, -0.5)             for anchors, 0 for all others;   lambda = 0.2

(Here you write this one. The plot shows a toy run's beside it, clip(chance - L_i, -0.9, 1): config.INFORMATIVE.) The
floor is what an anchor is paid at least, the ceiling what it is paid at most. An untrained head tells nothing apart:
its loss scatters about the chance level log(G - 1) (exercise 6).

Check it with: python -m pytest exercises/07_reward_cap      See it with: python -m exercises.plots 7
"""

from torch import Tensor

from clipo import Pairs

# First guess. G = 16, half of them right, an untrained head: which share of the anchors is on the floor? From 0 to 1.
PREDICTION: float | None = None


def contrastive_reward(loss: Tensor, pairs: Pairs, *, weight: float = 0.2, floor: float = -0.5) -> Tensor:
    """L (P, G) -> rc (P, G). Who is an anchor: pairs.anchor (P, G) bool."""
    raise NotImplementedError("write contrastive_reward in exercises/07_reward_cap/answer.py; hints.md helps")


def largest_group(weight: float = 0.2, floor: float = -0.5) -> int:
    """The largest G for which an untrained head's reward, at the chance level, is still above the floor."""
    raise NotImplementedError("write largest_group in exercises/07_reward_cap/answer.py; hints.md helps")


# Look at the plot first. Then change this number and draw it again, until of the anchors of G = 16 fewer than one in
# four are on the floor before the head has learnt anything. By as little as it takes.
WEIGHT: float = 0.2

# With G = 16, weight 0.2 and no warm-up, what does the contrastive reward do to the advantages of the first steps?
# "a": it pays the best right answers.  "b": it turns right answers into wrong ones.
# "c": little: most anchors of a group get the same -0.5.
EXPLANATION: str | None = None
