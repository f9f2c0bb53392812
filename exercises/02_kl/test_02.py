import math

import torch

from exercises.checking import agree, call, gradient, number, wrong

FAR = torch.tensor([[[-30.0, -12.0, -6.0, 6.0, 12.0, 25.0]]])  # d of tokens on which the two disagree


def expected(p, q):
    values = [math.exp(b - a) - (b - a) - 1 for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)]
    return torch.tensor(values, dtype=torch.float64).view(p.shape)


def mistakes(d):
    bounded = {
        f"d is held between -{most} and {most}; k3 has no bounds": (c := d.clamp(-most, most)).exp() - c - 1
        for most in (5, 10, 20)
    }
    return {
        "the ratio is upside down: d is log q - log p": (-d).exp() + d - 1,
        "this is k1, log p - log q: right on average, but negative for many a sample": -d,
        "this is k2, d^2 / 2: never negative, but its mean is not the KL": d.square() / 2,
        "the last term, -1, is missing: then it is not 0 where p and q agree": d.exp() - d,
        "the term -d is missing": d.exp() - 1,
        **bounded,
    }


def test_kl_k3(answer):
    p, q = torch.randn(2, 2, 3, 5).unbind()
    agree(call(answer.kl_k3, p, q), expected(p, q), "random log-probs", mistakes(q - p))


def test_tokens_on_which_the_two_disagree(answer):
    p = torch.full_like(FAR, -31.0)
    agree(call(answer.kl_k3, p, p + FAR), expected(p, p + FAR), f"d = {FAR.flatten().tolist()}", mistakes(FAR))


def test_its_mean_over_samples_is_the_kl(answer):
    p, q = torch.randn(2, 7).log_softmax(-1).unbind()
    right = (p.exp() * (p - q)).sum()
    got = (p.exp() * answer.kl_k3(p[None, None], q[None, None])[0, 0]).sum()  # every token as often as p draws it
    agree(got, right, "the mean of k3 over all tokens of a vocabulary of 7, weighted by p")


def test_the_policy_learns_from_it(answer):
    p, q = torch.randn(2, 2, 3, 5).unbind()
    p.requires_grad_()
    got = gradient(answer.kl_k3(p, q), p, "logprobs")
    d = (q - p).detach()
    wrong_ones = {
        "a part of it is detached from logprobs: only exp(d) has a gradient": -d.exp(),
        "a part of it is detached from logprobs: only -d has a gradient": torch.ones_like(d),
    }
    agree(got, 1 - d.double().exp(), "its gradient with respect to logprobs", wrong_ones)


def test_it_is_never_negative(answer):
    p, q = (3 * torch.randn(2, 10, 10, 100)).unbind()
    least = answer.kl_k3(p, q).min().item()
    if least < -1e-6:
        wrong(f"k3 of some sample is {least:.3f}; expected none below 0")
    for name, value in (("SMALLEST_AT", answer.SMALLEST_AT), ("SMALLEST", answer.SMALLEST)):
        hint = "set the derivative of exp(d) - d - 1 to zero"
        if abs(number(value, name, why=f": {hint}")) > 1e-6:
            wrong(f"{name} is {value}; {hint}")
