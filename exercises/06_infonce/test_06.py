import math

import torch
import torch.nn.functional as F

import clipo
from exercises.checking import agree

G = 8
CORRECT = torch.tensor([True] * 5 + [False] * 3)


def ours(z, anchor, positive, tau):
    """The loss of clipo.py, for one anchor."""
    correct, group = CORRECT[: len(z)], torch.zeros(len(z)).long()
    positives = clipo.draw_positives(correct, group)
    positives[anchor] = positive
    loss, _ = clipo.contrastive_loss(z, correct, group, temperature=tau, positives=positives)
    return loss[anchor]


def test_infonce(answer):
    for tau in (0.05, 1.0):
        z = F.normalize(torch.randn(G, 6), dim=-1)
        s, anchor, positive = z @ z.T / tau, 1, 3
        others = torch.arange(G) != anchor
        mistakes = {
            "the anchor itself is in the denominator": s[anchor].logsumexp(0) - s[anchor, positive],
            "tau is missing": (s[anchor, others] * tau).logsumexp(0) - s[anchor, positive] * tau,
            "the other right answers are not in the denominator; InfoNCE has them there": torch.cat(
                [s[anchor, positive, None], s[anchor, ~CORRECT]]
            ).logsumexp(0)
            - s[anchor, positive],
        }
        agree(answer.infonce(z, anchor, positive, tau), ours(z, anchor, positive, tau), f"tau {tau}", mistakes)


def test_low_temperatures_do_not_overflow(answer):
    z = F.normalize(torch.randn(G, 6), dim=-1)
    wrong = {"exp overflows: exp(100) is more than float32 holds; use logsumexp": torch.tensor(torch.inf)}
    agree(answer.infonce(z, 0, 1, 0.005), ours(z, 0, 1, 0.005), "tau 0.005", wrong, atol=1e-3)


def test_chance_level_and_floor(answer):
    wrong = {
        "the anchor is not one of those to tell apart: there are G - 1 others": torch.tensor(math.log(G)),
        "a loss, not a probability": torch.tensor(1 / (G - 1)),
    }
    same = F.normalize(torch.ones(G, 6), dim=-1)  # all in one point
    agree(torch.tensor(answer.chance_level(G)), ours(same, 0, 1, 0.05), f"chance level, G = {G}", wrong)
    perfect = torch.eye(2)[(~CORRECT).long()]  # right ones in one point, wrong ones at a right angle
    n = int(CORRECT.sum())
    wrong = {
        "not 0: the other right answers are in the denominator too": torch.tensor(0.0),
        "the anchor itself is not among them: n - 1": torch.tensor(math.log(n)),
    }
    agree(torch.tensor(answer.floor(n)), ours(perfect, 0, 1, 0.01), f"floor, n = {n}", wrong, atol=1e-4)
