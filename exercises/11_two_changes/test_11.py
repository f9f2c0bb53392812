import math

import torch

from exercises.checking import agree, call, explains, number, predicted, wrong
from exercises.plots import FORMS, two_changes


def test_prediction(answer):
    names = [name for name, *_ in FORMS[1:]]
    if not isinstance(answer.PREDICTION, dict) or set(answer.PREDICTION) != set(names):
        wrong(f"PREDICTION is {answer.PREDICTION!r}; expected a number for each of: {', '.join(names)}")
    for name in names:
        predicted(answer.PREDICTION[name], -2, 2)


def test_centred(answer):
    h = 3 + torch.randn(2, 3, 4)
    expected = torch.stack([torch.stack([row - sum(group) / len(group) for row in group]) for group in h.double()])
    mistakes = {
        "the mean is over each rollout's own numbers; a group is the second axis": h - h.mean(-1, keepdim=True),
        "the mean is over the prompts; a group is the second axis": h - h.mean(0, keepdim=True),
        "the mean is over the whole batch; each group has its own": h - h.mean((0, 1), keepdim=True),
        "the mean is one number; each of the D numbers has its own": h - h.mean((1, 2), keepdim=True),
        "this is the mean itself; take it away": h.mean(1, keepdim=True).expand_as(h),
        "it is divided by the std too; only the mean is taken away": (h - h.mean(1, keepdim=True))
        / h.std(1, keepdim=True),
    }
    agree(call(answer.centred, h), expected, "random h of two questions, three rollouts each", mistakes)


def test_chance_level(answer):
    positives, negatives = (
        torch.tensor([[1.0, 4.0, 2.0, 2.0], [6.0, 6.0, 3.0, 0.0]]),
        torch.tensor([[7.0, 3.0], [2.0, 9.0]]),
    )
    negatives = negatives.repeat_interleave(2, 1)
    # By the formula: every similarity is 0.3.
    rows = [[math.log(1 + sum(math.exp(0.3 - 0.3) for _ in range(int(k)))) for k in row] for row in negatives.tolist()]
    mistakes = {
        "the 1 inside the log is missing": negatives.log(),
        "this is the chance level of InfoNCE; no other positive stands in this loss's sum": (
            positives + negatives
        ).log(),
        "this is the chance level of InfoNCE; no other positive stands in this loss's sum.": (
            1 + positives + negatives
        ).log(),
        "the logarithm to base e is meant, as in the loss": (1 + negatives).log2(),
        "the mean over positives does not divide the negatives": (1 + negatives / positives).log(),
    }
    agree(call(answer.chance_level, positives, negatives), torch.tensor(rows), "chance level", mistakes)


def test_reward(answer):
    loss = torch.tensor([[0.2, 1.5, 2.0, 3.5, 1.0], [2.0, 0.1, 9.0, 1.0, 0.5]])
    chance = torch.tensor([[2.0], [1.5]]).repeat(1, 5)
    anchor = torch.tensor([[True, True, True, True, False], [True, True, True, False, False]])
    for weight, floor, ceiling in ((1.0, -0.9, 1.0), (0.5, -0.3, 0.2), (2.0, -2.5, 3.0)):

        def paid(weight, floor, ceiling):
            cells = zip(loss.flatten().tolist(), chance.flatten().tolist(), anchor.flatten().tolist(), strict=True)
            values = [min(max(weight * (c - L), floor), ceiling) if a else 0.0 for L, c, a in cells]
            return torch.tensor(values, dtype=torch.float64).view(2, 5)

        free = weight * (chance - loss)
        mistakes = {
            "chance is not used: this is measured from 0": torch.where(
                anchor, (-weight * loss).clamp(floor, ceiling), 0.0
            ),
            "the sign is wrong: a loss above chance is paid": torch.where(anchor, (-free).clamp(floor, ceiling), 0.0),
            "rollouts that are no anchors get 0": free.clamp(floor, ceiling),
            "there is no ceiling": torch.where(anchor, free.clamp(min=floor), 0.0),
            "there is no floor": torch.where(anchor, free.clamp(max=ceiling), 0.0),
            "there is neither floor nor ceiling": torch.where(anchor, free, 0.0),
            "the bounds are put on before the weight": torch.where(
                anchor, weight * (chance - loss).clamp(floor, ceiling), 0.0
            ),
            "the weight is left out": paid(1.0, floor, ceiling),
            "floor and ceiling are -0.9 and 1 whatever is given": paid(weight, -0.9, 1.0),
            "weight, floor and ceiling are 1, -0.9 and 1 whatever is given": paid(1.0, -0.9, 1.0),
            "the weight is on L alone": torch.where(anchor, (chance - weight * loss).clamp(floor, ceiling), 0.0),
        }
        got = call(answer.reward, loss, chance, anchor, weight=weight, floor=floor, ceiling=ceiling)
        agree(got, paid(weight, floor, ceiling), f"weight {weight}, floor {floor}, ceiling {ceiling}", mistakes)
    agree(call(answer.reward, loss, chance, anchor), paid(1.0, -0.9, 1.0), "weight, floor and ceiling not given")


def test_what_all_share(answer):
    shared = number(answer.SHARED, "SHARED", 0, 100)
    paid = two_changes(answer, centring=False, from_chance=True, shared=shared)
    if paid <= 0.3:
        wrong(f'SHARED is {shared:g}, and "chance alone" pays {paid:.2f} there; change it until that is more than 0.3')


def test_explanation(answer):
    explains(
        answer.EXPLANATION,
        "d",
        {
            "a": "the other way round: before it they are, for all share so much",
            "b": "it takes away what *all* of a group share, right and wrong; what right ones share beyond that stays",
            "c": 'look at "both": the head is as untrained there',
        },
    )
