import math

import torch

from exercises.checking import agree, call, gradient, wrong

RATIO = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5]).view(1, 5, 1)  # five rollouts of one token
ADVANTAGE = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]).view(1, 5, 1)
RANDOM = torch.rand(5, 10, 4, generator=torch.Generator().manual_seed(0)) * 2 + 0.01, torch.linspace(-2, 2, 50)
CASES = {
    "ratios 0.5, 0.5, 1, 1.5, 1.5, advantages 1, -1, 1, 1, -1": (RATIO, ADVANTAGE),
    "random": (RANDOM[0], RANDOM[1].view(5, 10, 1)),
}
RANGES = ((0.1, 0.6), (0.2, 0.3))


def cases():
    for low, high in RANGES:
        for name, (ratio, advantage) in CASES.items():
            yield f"{name}, low {low}, high {high}", ratio.log(), advantage, low, high


def token_by_token(log_ratio, advantage, low, high):
    """J, where the clip removed its gradient, and that gradient with respect to log rho."""
    J, cut, slope = [], [], []
    for log_rho, A in zip(log_ratio.flatten(), advantage.expand_as(log_ratio).flatten(), strict=True):
        rho, A = math.exp(log_rho), A.item()
        held = min(max(rho, 1 - low), 1 + high) * A
        J.append(min(rho * A, held))
        cut.append(held < rho * A)
        slope.append(0.0 if cut[-1] else rho * A)
    numbers = (torch.tensor(each).view(log_ratio.shape) for each in (J, slope))
    J, slope = (each.double() for each in numbers)
    return J, torch.tensor(cut).view(log_ratio.shape), slope


def answered(answer, log_ratio, advantage, low, high):
    got = call(answer.clipped_surrogate, log_ratio, advantage, torch.ones_like(log_ratio, dtype=torch.bool), low, high)
    if not isinstance(got, tuple) or len(got) != 2:
        wrong(f"got {type(got).__name__}; expected two tensors: J, and where it has no gradient")
    return got


def test_surrogate(answer):
    for name, log, advantage, low, high in cases():
        ratio = log.exp()

        def surrogate(low, high, of=ratio, A=advantage):
            return torch.minimum(of * A, of.clamp(1 - low, 1 + high) * A)

        clipped = ratio.clamp(1 - low, 1 + high) * advantage
        mistakes = {
            "only the clipped term; min keeps the other one where it is smaller": clipped,
            "max instead of min: it would pay for going too far": torch.maximum(ratio * advantage, clipped),
            "nothing is clipped": ratio * advantage,
            "log rho is taken for rho; exp is missing": surrogate(low, high, of=log),
            "low and high are exchanged": surrogate(high, low),
            "the range is that of another call, 0.8 to 1.3; take low and high as given": surrogate(0.2, 0.3),
            "the range is 0.8 to 1.2 whatever is given; take low and high as given": surrogate(0.2, 0.2),
            "the range is 1 - low to 1 + low": surrogate(low, low),
        }
        agree(
            answered(answer, log, advantage, low, high)[0], token_by_token(log, advantage, low, high)[0], name, mistakes
        )


def test_where_the_gradient_is_zero(answer):
    for name, log, advantage, low, high in cases():
        ratio, right = log.exp(), token_by_token(log, advantage, low, high)[1]
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        mistakes = {
            "not everywhere outside the range: a bad answer that became likelier must still be pushed back": outside,
            "the other way round: these are the tokens outside the range that do get a gradient": outside & ~right,
            "these are the tokens that do have a gradient": ~right,
            "a good answer that became less likely (rho below 1 - low) must still be pulled up": right
            | ((ratio < 1 - low) & (advantage > 0)),
            "the range is that of another call, 0.8 to 1.3; take low and high as given": token_by_token(
                log, advantage, 0.2, 0.3
            )[1],
        }
        agree(answered(answer, log, advantage, low, high)[1], right, f"where: {name}", mistakes)


def test_on_the_border_and_with_A_0_nothing_is_removed(answer):
    """rho = 1 exactly, and a range of no width; then ratios outside the range, of a rollout with A = 0."""
    border, advantage = torch.zeros(1, 2, 3), torch.tensor([1.0, -1.0]).view(1, 2, 1)
    _, where = answered(answer, border, advantage, 0.0, 0.0)
    mistakes = {"exactly on the border nothing is cut off: > and <, not >= and <=": torch.ones(1, 2, 3).bool()}
    agree(where, torch.zeros(1, 2, 3).bool(), "where: rho 1, low 0, high 0", mistakes)
    _, where = answered(answer, RATIO[:, [0, 4]].log(), torch.zeros(1, 2, 1), 0.2, 0.2)
    agree(where, torch.zeros(1, 2, 1).bool(), "where: rho 0.5 and 1.5, A 0: there is no gradient to remove")


def test_the_policy_learns_from_it(answer):
    for name, log, advantage, low, high in cases():
        log_ratio = log.clone().requires_grad_()
        J, _ = answer.clipped_surrogate(log_ratio, advantage, torch.ones_like(log, dtype=torch.bool), low, high)
        got = gradient(J, log_ratio, "log_ratio")
        _, _, right = token_by_token(log, advantage, low, high)
        mistakes = {
            "the clip removes no gradient": log.exp() * advantage,
            "clipped tokens that must be pushed back get none": right
            * ((log.exp() >= 1 - low) & (log.exp() <= 1 + high)),
        }
        agree(got, right, f"the gradient of J with respect to log_ratio: {name}", mistakes)
