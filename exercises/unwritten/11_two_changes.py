"""Exercise 11, an experiment: two of the nine changes (ours, not the paper's; variants.py, `reward`).

With the paper's constants the reward says little on the toy world. Of nine changes these are two; floor -0.9, weight 1,
tau 0.5 and the decoupled loss are there already. In training these two alone change nothing (results/ladder.md).

    centring       h_i less the mean of its group's h: what all of them share, because they answer the same question
    from chance    rc_i = clip(weight (chance - L_i), floor, ceiling)      instead of clip(-weight L_i, floor, ceiling)

chance is the loss of embeddings that tell nothing apart. The loss here is a toy run's default, `variants.decoupled`:

    L_i = mean over positives j of  log(1 + sum over negatives k of exp(s_ik - s_ij))

Take made-up groups of 16, as in exercise 10: six sound right answers gather, three unsound right ones and seven wrong
ones scatter; and all 16 share a large part. How much more is a sound right answer paid than an unsound one? An oracle,
which sees the steps and pays 1 to sound answers and 0 to all others, pays 2 standard deviations of R more.

Check it with: python -m pytest exercises/11_two_changes      See it with: python -m exercises.plots 11
"""

from torch import Tensor

# First guess, in standard deviations of R; from -2 to 2, and the oracle's is 2.
PREDICTION: dict[str, float | None] = {"centring alone": None, "chance alone": None, "both": None}


def centred(hidden: Tensor) -> Tensor:
    """h (P, G, D) less the mean of its group -> (P, G, D)."""
    raise NotImplementedError("write centred in exercises/11_two_changes/answer.py; hints.md helps")


def chance_level(positives: Tensor, negatives: Tensor) -> Tensor:
    """L of the loss above if all similarities are the same; each one's numbers of positives and negatives, (P, G) both,
    -> (P, G)."""
    raise NotImplementedError("write chance_level in exercises/11_two_changes/answer.py; hints.md helps")


def reward(
    loss: Tensor, chance: Tensor, anchor: Tensor, *, weight: float = 1.0, floor: float = -0.9, ceiling: float = 1.0
) -> Tensor:
    """L, its chance level, and who is an anchor (bool), all (P, G) -> rc (P, G), 0 for all others than anchors."""
    raise NotImplementedError("write reward in exercises/11_two_changes/answer.py; hints.md helps")


# Now look at the plot. Then change this number, the size of what all 16 share, and draw it again, until "chance alone"
# pays more than 0.3. What does that say about centring?
SHARED: float = 8.0

# Why does centring alone pay nothing here?
# "a": it makes all cosines nearly 1.  "b": it takes away what the right answers share.
# "c": without a trained head it cannot.  "d": every -L is below the floor, whoever agrees.
EXPLANATION: str | None = None
