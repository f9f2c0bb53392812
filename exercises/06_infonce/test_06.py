import math

import torch
import torch.nn.functional as F

import clipo
from exercises.checking import agree, call, gradient, number, picking

G = 8
CORRECT = torch.arange(G) < torch.tensor([5, 2, 1, G, 0])[:, None]  # of five questions; the last three have no anchor
P = len(CORRECT)


def parts(z, pairs, tau):
    """(log sum over all others, s_ij), both (P, G); their difference is the loss of anchors."""
    s = z @ z.mT / tau
    return s.masked_fill(torch.eye(G, dtype=torch.bool), -torch.inf).logsumexp(-1), (s * pairs.target).sum(-1)


def test_infonce(answer):
    for tau in (0.05, 1.0, 0.3):
        z, pairs = F.normalize(torch.randn(P, G, 6), dim=-1), clipo.draw_pairs(CORRECT)
        s = z @ z.mT / tau

        def with_denominator(of, similarity=s, pairs=pairs, pull=None):
            total = similarity.masked_fill(~of, -torch.inf).logsumexp(-1)
            return torch.where(
                pairs.anchor, total - ((similarity * pairs.target).sum(-1) if pull is None else pull), 0.0
            )

        others, everybody = ~torch.eye(G, dtype=torch.bool), torch.ones_like(pairs.target)
        sums = (s * pairs.positive).sum(-1)
        batch = (z.flatten(0, 1) @ z.flatten(0, 1).mT / tau).view(P, G, P * G)
        of_all = batch.masked_fill(torch.eye(P * G, dtype=torch.bool).view(P, G, -1), -torch.inf).logsumexp(-1)
        mistakes = {
            "the anchor itself is in the denominator": with_denominator(everybody),
            "tau is missing": with_denominator(others, s * tau),
            "tau is taken for 0.05, whatever is given": with_denominator(others, s * tau / 0.05),
            "the other right answers are not in the denominator; InfoNCE has them there": with_denominator(
                pairs.target | pairs.negative
            ),
            "the wrong answers are not in the denominator": with_denominator(pairs.positive),
            "the positive is not in the denominator; InfoNCE has it there": with_denominator(others & ~pairs.target),
            "the mean over all positives is taken; InfoNCE has the one that was drawn": with_denominator(
                others, pull=sums / pairs.positive.sum(-1)
            ),
            "all positives are added up; InfoNCE has the one that was drawn": with_denominator(others, pull=sums),
            "the sign is wrong: this is log of the positive's share": -with_denominator(others),
            "the denominator reaches over all questions; it is a sum over the group": torch.where(
                pairs.anchor, of_all - (s * pairs.target).sum(-1), 0.0
            ),
            "an anchor has a positive *and* a negative: where all are right there is none": torch.where(
                pairs.positive.any(-1),
                s.masked_fill(~others, -torch.inf).logsumexp(-1) - (s * pairs.target).sum(-1),
                0.0,
            ),
            "rollouts that are no anchors get 0": s.masked_fill(~others, -torch.inf).logsumexp(-1)
            - (s * pairs.target).sum(-1),
        }
        agree(call(answer.infonce, z, pairs, tau), picking(z.double(), pairs, tau), f"tau {tau}", mistakes)


def test_low_temperatures_do_not_overflow(answer):
    z, pairs = F.normalize(1 + 0.1 * torch.randn(P, G, 6), dim=-1), clipo.draw_pairs(CORRECT)  # all similarities large
    expected = picking(z.double(), pairs, 0.005)
    wrong = {
        "exp overflows: exp(200) is more than float32 holds; use logsumexp": expected.masked_fill(
            pairs.anchor, torch.inf
        ),
        "exp overflows: exp(200) / exp(200) is no number in float32; use logsumexp": expected.masked_fill(
            pairs.anchor, torch.nan
        ),
    }
    agree(answer.infonce(z, pairs, 0.005), expected, "tau 0.005", wrong, atol=1e-3)


def test_the_anchor_itself_weighs_nothing(answer):
    """The first rollout is far from all others: similarities of -200. What stands for itself must be lower still."""
    alone, pairs = torch.tensor([[1.0, 0.0]] + [[-1.0, 0.0]] * (G - 1)).expand(P, G, 2), clipo.draw_pairs(CORRECT)
    expected, got = picking(alone.double(), pairs, 0.005), answer.infonce(alone, pairs, 0.005)
    wrong = {}
    if isinstance(got, torch.Tensor) and got.shape == expected.shape:
        only_there = torch.where(torch.arange(G) == 0, got.detach(), expected)
        wrong = {"the anchor itself is in the denominator; a finite score, like -20, is not low enough": only_there}
    agree(got, expected, "tau 0.005, one far from all others", wrong, atol=1e-3)


def test_the_head_learns_from_it(answer):
    z, pairs = F.normalize(torch.randn(P, G, 6), dim=-1), clipo.draw_pairs(CORRECT)
    mine = z.clone().requires_grad_()
    got = gradient(answer.infonce(mine, pairs, 0.5), mine, "z")

    def slope(loss):
        w = z.double().requires_grad_()
        return torch.autograd.grad(loss(w).sum(), w)[0]

    def only(which):
        return slope(lambda w: parts(w, pairs, 0.5)[which].masked_fill(~pairs.anchor, 0))

    one_side = slope(lambda w: torch.where(pairs.anchor, one_sided(w, pairs), 0.0))
    mistakes = {
        "s_ij has none: something detaches it (detach, item)": only(0),
        "the denominator has none: something detaches it (detach, item)": -only(1),
        "one of the two z of a similarity is detached; the gradient goes through both": one_side,
        "it is not finite: a row without others has log 0, even behind torch.where": torch.where(
            got.isnan(), torch.nan, slope(lambda w: picking(w, pairs, 0.5)).float()
        ),
    }
    agree(got, slope(lambda w: picking(w, pairs, 0.5)), "the gradient of L with respect to z", mistakes)


def one_sided(z, pairs):
    s = z @ z.detach().mT / 0.5
    return s.masked_fill(torch.eye(G, dtype=torch.bool), -torch.inf).logsumexp(-1) - (s * pairs.target).sum(-1)


def test_chance_level_and_floor(answer):
    for size in (8, 3, 16):
        wrong = {
            "the anchor is not one of those to tell apart: there are G - 1 others": torch.tensor(math.log(size)),
            "a loss, not a probability": torch.tensor(1 / (size - 1)),
            "the logarithm to base e is meant, as in the loss": torch.tensor(math.log2(size - 1)),
        }
        pairs = clipo.draw_pairs(torch.arange(size)[None] < size - 1)
        lineup = picking(torch.eye(size, dtype=torch.float64)[None], pairs, 1.0)[0, 0]  # all at right angles
        got = number(answer.chance_level(size), f"chance_level({size})")
        agree(torch.tensor(got), lineup, f"chance level, G = {size}", wrong)
    for n in (5, 2, 7):
        right = torch.arange(G)[None] < n
        perfect = torch.eye(2, dtype=torch.float64)[(~right).long()]  # right ones in one point, wrong ones far away
        wrong = {
            "not 0: the other right answers are in the denominator too": torch.tensor(0.0),
            "the anchor itself is not among them": torch.tensor(math.log(n)),
        }
        lowest = picking(perfect, clipo.draw_pairs(right), 0.01)[0, 0]
        got = number(answer.floor(n), f"floor({n})")
        agree(torch.tensor(got), lowest, f"floor, n = {n}", wrong, atol=1e-4)
