"""Exercise 8, an experiment: what does dividing by the std do when all rewards are nearly equal?

A group of 16 right answers, with contrastive rewards that differ by next to nothing: R = 1 + size * noise. How large
are the advantages, as the mean of |A| over the group, divided by std + eps (eps = 1e-6), and not divided (Dr. GRPO)?

Check it with: python -m pytest exercises/08_equal_rewards      See it with: python -m exercises.plots 8
"""

import torch
from torch import Tensor

# First guess. The rewards differ by about a thousandth (size = 0.001). How large is the mean |A|, divided by the std?
PREDICTION: float | None = None


def rewards(size: float) -> Tensor:
    """R of the group, (1, 16): one prompt."""
    return 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))


def mean_size(size: float, scale_by_std: bool) -> float:
    """Mean |A| of that group, A as in exercise 1."""
    raise NotImplementedError("write mean_size in exercises/08_equal_rewards/answer.py; hints.md helps")


# Now look at the plot; a dot marks this size. Make it smaller and draw again, until the mean |A| that is divided by the
# std has fallen below 0.4. (Not 0: some difference must be left.) Which number of the formula do you meet there?
SIZE: float = 0.1

# What follows for a group in which every answer is right?
# "a": differences of a thousandth are blown up to advantages of the usual size, until they are as small as eps.
# "b": its advantages vanish with the differences, whatever one divides by.
# "c": its advantages grow without bound.
EXPLANATION: str | None = None
