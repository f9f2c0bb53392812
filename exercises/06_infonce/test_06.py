import math

import torch
import torch.nn.functional as F

import clipo
from exercises.checking import agree

G = 8
CORRECT = torch.arange(G) < torch.tensor([5, 2, 1])[:, None]  # of three questions; the last has no anchor


def test_infonce(answer):
    for tau in (0.05, 1.0):
        z, pairs = F.normalize(torch.randn(3, G, 6), dim=-1), clipo.draw_pairs(CORRECT)
        s, itself = z @ z.mT / tau, torch.eye(G, dtype=torch.bool)

        def with_denominator(of, similarity=s, pairs=pairs):
            total = similarity.masked_fill(~of, -torch.inf).logsumexp(-1)
            return torch.where(pairs.anchor, total - (similarity * pairs.target).sum(-1), 0.0)

        everybody = torch.ones_like(pairs.target)
        expected = clipo.infonce(z, pairs, tau)
        mean = (s * pairs.positive).sum(-1) / pairs.positive.sum(-1)
        mistakes = {
            "the anchor itself is in the denominator": with_denominator(everybody),
            "tau is missing": with_denominator(~itself, s * tau),
            "the other right answers are not in the denominator; InfoNCE has them there": with_denominator(
                pairs.target | pairs.negative
            ),
            "the mean over all positives is taken; InfoNCE has the one that was drawn": torch.where(
                pairs.anchor, s.masked_fill(itself, -torch.inf).logsumexp(-1) - mean, 0.0
            ),
            "rollouts that are no anchors get 0": s.masked_fill(itself, -torch.inf).logsumexp(-1)
            - (s * pairs.target).sum(-1),
        }
        agree(answer.infonce(z, pairs, tau), expected, f"tau {tau}", mistakes)


def test_low_temperatures_do_not_overflow(answer):
    z, pairs = F.normalize(1 + 0.1 * torch.randn(3, G, 6), dim=-1), clipo.draw_pairs(CORRECT)  # all similarities large
    expected = clipo.infonce(z, pairs, 0.005)
    wrong = {
        "exp overflows: exp(200) is more than float32 holds; use logsumexp": expected.masked_fill(
            pairs.anchor, torch.inf
        ),
        "exp overflows: exp(200) / exp(200) is no number in float32; use logsumexp": expected.masked_fill(
            pairs.anchor, torch.nan
        ),
    }
    agree(answer.infonce(z, pairs, 0.005), expected, "tau 0.005", wrong, atol=1e-3)


def test_chance_level_and_floor(answer):
    correct = CORRECT[:1]  # 5 of 8
    n, pairs = int(correct.sum()), clipo.draw_pairs(correct)
    wrong = {
        "the anchor is not one of those to tell apart: there are G - 1 others": torch.tensor(math.log(G)),
        "a loss, not a probability": torch.tensor(1 / (G - 1)),
    }
    same = F.normalize(torch.ones(1, G, 6), dim=-1)  # all in one point
    agree(torch.tensor(answer.chance_level(G)), clipo.infonce(same, pairs)[0, 0], f"chance level, G = {G}", wrong)
    perfect = torch.eye(2)[(~correct).long()]  # right ones in one point, wrong ones at a right angle
    wrong = {
        "not 0: the other right answers are in the denominator too": torch.tensor(0.0),
        "the anchor itself is not among them: n - 1": torch.tensor(math.log(n)),
    }
    lowest = clipo.infonce(perfect, pairs, 0.01)[0, 0]
    agree(torch.tensor(answer.floor(n)), lowest, f"floor, n = {n}", wrong, atol=1e-4)
