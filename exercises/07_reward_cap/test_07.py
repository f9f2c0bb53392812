import math

import pytest
import torch

import clipo
from exercises.checking import agree, explains


def test_contrastive_reward(answer):
    loss = torch.tensor([[0.0, 1.0, 2.4, 2.6, 9.0, 3.0]]).expand(2, 6)
    pairs = clipo.draw_pairs(torch.arange(6) < torch.tensor([[5], [1]]))
    anchors = pairs.anchor  # the five right ones of the first group; the second has only one
    mistakes = {
        "the cap is the wrong way round: no reward is below the floor, so take the larger of the two": torch.where(
            anchors, (-0.2 * loss).clamp(max=-0.5), 0.0
        ),
        "rollouts that are no anchors get 0": (-0.2 * loss).clamp(min=-0.5),
        "there is no cap": torch.where(anchors, -0.2 * loss, 0.0),
        "agreement (a small loss) is punished; the sign is wrong": torch.where(anchors, 0.2 * loss, 0.0),
    }
    agree(answer.contrastive_reward(loss, pairs), clipo.contrastive_reward(loss, pairs), "losses", mistakes)


def test_largest_group(answer):
    for weight, floor in ((0.2, -0.5), (0.1, -0.5), (0.2, -0.3)):
        G = 2
        while -weight * math.log(G) > floor:  # of G + 1
            G += 1
        got = answer.largest_group(weight, floor)
        if got != G:
            why = f"-{weight} log(G - 1) > {floor} is to hold for it, and for G + 1 not"
            pytest.fail(f"largest_group({weight}, {floor}) is {got}; expected {G}: {why}", pytrace=False)


def test_explanation(answer):
    too_good = "it cannot tell them apart yet: log 15 = 2.7, and -0.2 * 2.7 = -0.54 is below the floor"
    explains(
        answer.EXPLANATION,
        "b",
        {
            "a": too_good,
            "c": "it never changes the verdict r, only adds rc to it",
        },
    )
