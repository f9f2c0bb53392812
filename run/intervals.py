"""How sure is it? Intervals and estimators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share. trials > 0.

    >>> [round(end, 2) for end in wilson(8, 10)]
    [0.49, 0.94]
    """
    z, p = 1.96, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95% percentile interval of the mean of per-problem values, over problems drawn anew. The same every time.

    >>> bootstrap([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    values, draw = np.asarray(values, dtype=float), np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, from n samples of which some are: unbiased (arXiv:2107.03374).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def share_of(successes: int, trials: int) -> dict:
    """A share and its Wilson interval."""
    return {"value": successes / trials, "interval": list(wilson(successes, trials))}


def mean_over_problems(values: Sequence[float]) -> dict:
    """A mean over problems and its bootstrap interval."""
    return {"value": sum(values) / len(values), "interval": list(bootstrap(values))}
