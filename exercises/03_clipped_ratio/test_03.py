import torch

import clipo
from exercises.checking import agree

RATIO, ADVANTAGE = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5]), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
RANDOM = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 2 + 0.01, torch.linspace(-2, 2, 50)
CASES = {"ratios 0.5, 0.5, 1, 1.5, 1.5, advantages 1, -1, 1, 1, -1": (RATIO, ADVANTAGE), "random": RANDOM}


def test_surrogate(answer):
    for name, (ratio, advantage) in CASES.items():
        expected, _ = clipo.clip_tokens(ratio.log()[None], advantage[:, None].T, torch.ones(1, len(ratio)), 0.2, 0.3)
        clipped = ratio.clamp(0.8, 1.3) * advantage
        mistakes = {
            "only the clipped term; min keeps the other one where it is smaller": clipped,
            "max instead of min: it would pay for going too far": torch.maximum(ratio * advantage, clipped),
            "nothing is clipped": ratio * advantage,
        }
        agree(answer.surrogate(ratio, advantage, 0.2, 0.3), expected[0], name, mistakes)


def test_gradient_is_zero(answer):
    for name, (ratio, advantage) in CASES.items():
        ratio = ratio.clone().requires_grad_()
        torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage).sum().backward()
        expected, ratio = ratio.grad == 0, ratio.detach()
        outside = (ratio < 0.8) | (ratio > 1.3)
        mistakes = {
            "not everywhere outside the range: a bad answer that became likelier must still be pushed back": outside,
            "the other way round: these are the tokens outside the range that do get a gradient": outside & ~expected,
            "a good answer that became less likely (rho below 1 - low) must still be pulled up": expected
            | ((ratio < 0.8) & (advantage > 0)),
        }
        agree(answer.gradient_is_zero(ratio, advantage, 0.2, 0.3), expected, name, mistakes)
