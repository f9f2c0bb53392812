import statistics

import torch

from exercises.checking import agree, explains, number, predicted, wrong

SIZES = (1.0, 0.1, 1e-2, 1e-3, 1e-5)


def advantages(size, scale_by_std, eps=1e-6):
    row = (1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))[0].tolist()
    mean, spread = statistics.fmean(row), statistics.stdev(row) + eps
    return [(reward - mean) / (spread if scale_by_std else 1) for reward in row]


def sizes(scale_by_std, eps=1e-6):
    return torch.tensor([statistics.fmean(map(abs, advantages(size, scale_by_std, eps))) for size in SIZES])


def test_prediction(answer):
    predicted(answer.PREDICTION, 0, 1000)


def test_mean_size(answer):
    for scale_by_std in (True, False):
        right = sizes(scale_by_std)
        got = [number(answer.mean_size(size, scale_by_std), f"mean_size({size}, {scale_by_std})") for size in SIZES]
        if abs(got[0]) < 1e-3:
            wrong("this is the mean of A, which is always 0; take the mean of |A|")
        mistakes = {
            "scale_by_std changes nothing, or is upside down": sizes(not scale_by_std),
            "this is the sum over the group; take the mean": 16 * right,
            "this is the largest |A|; take the mean": torch.tensor(
                [max(map(abs, advantages(size, scale_by_std))) for size in SIZES]
            ),
            "this is the mean of A squared; take the mean of |A|": torch.tensor(
                [statistics.fmean(a * a for a in advantages(size, scale_by_std)) for size in SIZES]
            ),
            "eps is missing; it is added to the std": sizes(scale_by_std, eps=0.0),
            "the std is divided by G; Bessel's correction divides by G - 1": right * (16 / 15) ** 0.5,
        }
        agree(torch.tensor(got), right, f"sizes {SIZES}, scale_by_std={scale_by_std}", mistakes, atol=1e-7, rtol=0.015)


def test_a_size_at_which_eps_counts(answer):
    size = number(answer.SIZE, "SIZE", 1e-12, 10)
    mean = statistics.fmean(map(abs, advantages(size, True)))
    if mean >= 0.4:
        wrong(f"SIZE is {size:g}, and the mean |A| is {mean:.2f} there; make it smaller until it is below 0.4")
    if mean == 0:
        wrong(f"SIZE is {size:g}; float32 cannot tell 1 + {size:g} from 1, so no difference is left: make it larger")


def test_explanation(answer):
    explains(
        answer.EXPLANATION,
        "a",
        {
            "b": "without the std they do; with it look at the plot: python -m exercises.plots 8",
            "c": "the std grows as they do: the ratio stays",
        },
    )
