import torch

import clipo
from exercises.checking import agree, explains

SIZES = (1.0, 0.1, 1e-2, 1e-3, 1e-5)


def expected(size, scale_by_std):
    rewards = 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    return clipo.group_advantages(rewards, scale_by_std=scale_by_std)


def test_mean_size(answer):
    for scale_by_std in (True, False):
        right = torch.stack([expected(size, scale_by_std).abs().mean() for size in SIZES])
        other = torch.stack([expected(size, not scale_by_std).abs().mean() for size in SIZES])
        mean = torch.stack([expected(size, scale_by_std).mean() for size in SIZES])  # 0 but for rounding
        got = torch.tensor([answer.mean_size(size, scale_by_std) for size in SIZES])
        mistakes = {
            "this is the mean of A, which is always 0; take the mean of |A|": mean,
            "scale_by_std does not reach group_advantages, or is upside down": other,
            "these are sizes of the whole group's sum; take the mean": 16 * right,
        }
        agree(got, right, f"sizes {SIZES}, scale_by_std={scale_by_std}", mistakes)


def test_explanation(answer):
    explains(
        answer.EXPLANATION,
        "b",
        {
            "a": "without the std they do; with it look at the plot: python -m exercises.plots 8",
            "c": "the std grows as they do: the ratio stays",
        },
    )
