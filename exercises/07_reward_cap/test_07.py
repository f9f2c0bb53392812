import math

import torch

import clipo
from exercises.checking import agree, call, explains, number, predicted, wrong
from exercises.plots import on_the_floor


def test_prediction(answer):
    predicted(answer.PREDICTION, 0, 1)


def test_contrastive_reward(answer):
    loss = torch.tensor([[0.0, 1.0, 2.4, 2.6, 9.0, 3.0]]).repeat(3, 1)
    pairs = clipo.draw_pairs(torch.arange(6) < torch.tensor([[5], [1], [6]]))
    anchors = pairs.anchor  # the five right ones of the first group; the second has one right, the third no wrong one
    for weight, floor in ((0.2, -0.5), (1.0, -0.9), (0.1, -2.0)):

        def paid(weight, floor):
            rows = [[max(-weight * L, floor) for L in row] for row in loss.tolist()]
            return torch.tensor(rows, dtype=torch.float64).masked_fill(~anchors, 0)

        free = -weight * loss
        mistakes = {
            "the cap is the wrong way round: no reward is below the floor, so take the larger of the two": torch.where(
                anchors, free.clamp(max=floor), 0.0
            ),
            "an anchor has a positive *and* a negative: where all are right there is none": torch.where(
                pairs.positive.any(-1), free.clamp(min=floor), 0.0
            ),
            "rollouts that are no anchors get 0": free.clamp(min=floor),
            "there is no floor": torch.where(anchors, free, 0.0),
            "agreement (a small loss) is punished; the sign is wrong": torch.where(anchors, -free, 0.0),
            "the weight is 0.2 whatever is given": paid(0.2, floor),
            "the floor is -0.5 whatever is given": paid(weight, -0.5),
            "weight and floor are 0.2 and -0.5 whatever is given": paid(0.2, -0.5),
            "the floor is put on L, before the weight": torch.where(anchors, weight * (-loss).clamp(min=floor), 0.0),
        }
        got = call(answer.contrastive_reward, loss, pairs, weight=weight, floor=floor)
        agree(got, paid(weight, floor), f"weight {weight}, floor {floor}", mistakes)
    agree(call(answer.contrastive_reward, loss, pairs), paid(0.2, -0.5), "weight and floor not given")


def test_largest_group(answer):
    for weight, floor in ((0.2, -0.5), (0.1, -0.5), (0.2, -0.3), (0.5, -0.5), (1.0, -0.9)):
        G = 2
        while -weight * math.log(G) > floor:  # of G + 1
            G += 1
        name = f"largest_group({weight}, {floor})"
        got = number(answer.largest_group(weight, floor), name)
        if got != G:
            wrong(f"{name} is {got}; expected {G}: -{weight} log(G - 1) > {floor} is to hold for it, and for G + 1 not")


def test_a_weight_that_leaves_the_floor(answer):
    weight = number(answer.WEIGHT, "WEIGHT", 0.001, 10)
    if answer.PREDICTION is None:
        wrong("WEIGHT waits for PREDICTION: write that down first, then look at the plot (python -m exercises.plots 7)")
    share = on_the_floor(16, weight)
    if share >= 0.25:
        wrong(
            f"WEIGHT is {weight}, and {share:.0%} of the anchors of G = 16 are on the floor at first; "
            "change it until fewer than 25% are (python -m exercises.plots 7)"
        )


def test_explanation(answer):
    too_good = "it cannot tell them apart yet: log 15 = 2.7, and -0.2 * 2.7 = -0.54 is below the floor"
    explains(answer.EXPLANATION, "c", {"a": too_good, "b": "it never changes the verdict r, only adds rc to it"})
