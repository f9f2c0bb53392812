import pytest
import torch

import clipo
from exercises.checking import agree

RATIO = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5]).view(1, 5, 1)  # five rollouts of one token
ADVANTAGE = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]).view(1, 5, 1)
RANDOM = torch.rand(5, 10, 4, generator=torch.Generator().manual_seed(0)) * 2 + 0.01, torch.linspace(-2, 2, 50)
CASES = {
    "ratios 0.5, 0.5, 1, 1.5, 1.5, advantages 1, -1, 1, 1, -1": (RATIO, ADVANTAGE),
    "random": (RANDOM[0], RANDOM[1].view(5, 10, 1)),
}


def answered(answer, ratio, advantage):
    got = answer.clipped_surrogate(ratio.log(), advantage, torch.ones_like(ratio, dtype=torch.bool), 0.2, 0.3)
    if not isinstance(got, tuple) or len(got) != 2:
        pytest.fail(f"got {type(got).__name__}; expected two tensors: J, and where it has no gradient", pytrace=False)
    return got


def test_surrogate(answer):
    for name, (ratio, advantage) in CASES.items():
        expected, _ = clipo.clipped_surrogate(ratio.log(), advantage, torch.ones_like(ratio), 0.2, 0.3)
        clipped = ratio.clamp(0.8, 1.3) * advantage
        log = ratio.log()
        mistakes = {
            "only the clipped term; min keeps the other one where it is smaller": clipped,
            "max instead of min: it would pay for going too far": torch.maximum(ratio * advantage, clipped),
            "nothing is clipped": ratio * advantage,
            "log rho is taken for rho; exp is missing": torch.minimum(log * advantage, log.clamp(0.8, 1.3) * advantage),
        }
        agree(answered(answer, ratio, advantage)[0], expected, name, mistakes)


def test_where_the_gradient_is_zero(answer):
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
        agree(answered(answer, ratio, advantage)[1], expected, name, mistakes)
