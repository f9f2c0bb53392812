"""Exercise 8, an experiment: what does dividing by the std do when all rewards are nearly equal?

A group of 16 right answers, with contrastive rewards that differ by next to nothing:

    R = 1 + size * noise,   noise = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))

How large are the advantages, as the mean of |A| over the group, with the division by the std and without (Dr. GRPO)?

Check it with: python -m pytest exercises/08_equal_rewards      See it with: python -m exercises.plots 8
"""


def mean_size(size: float, scale_by_std: bool) -> float:
    """Mean |A| of that group, by clipo.group_advantages (its argument scale_by_std)."""
    raise NotImplementedError("write mean_size in exercises/08_equal_rewards/answer.py; hints.md helps")


# What follows for a group in which every answer is right?
# "a": its advantages vanish with the differences, whatever one divides by.
# "b": differences of a thousandth are blown up to advantages of the usual size, until they are as small as eps.
# "c": its advantages grow without bound.
EXPLANATION: str | None = None
