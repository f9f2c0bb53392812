import pytest
import torch

import clipo
from exercises.checking import agree


def test_kl_k3(answer):
    p, q = torch.randn(2, 2, 3, 5).unbind()
    d = q - p
    mistakes = {
        "the ratio is upside down: d is log q - log p": (-d).exp() + d - 1,
        "this is k1, log p - log q: right on average, but negative for many a sample": -d,
        "this is k2, d^2 / 2: never negative, but its mean is not the KL": d.square() / 2,
    }
    agree(answer.kl_k3(p, q), clipo.kl_k3(p, q), "random log-probs", mistakes)


def test_its_mean_over_samples_is_the_kl(answer):
    p, q = torch.randn(2, 7).log_softmax(-1).unbind()
    expected = (p.exp() * (p - q)).sum()
    got = (p.exp() * answer.kl_k3(p[None, None], q[None, None])[0, 0]).sum()  # every token as often as p draws it
    agree(got, expected, "the mean of k3 over all tokens of a vocabulary of 7, weighted by p")


def test_it_is_never_negative(answer):
    p, q = (3 * torch.randn(2, 10, 10, 100)).unbind()
    least = answer.kl_k3(p, q).min().item()
    if least < -1e-6:
        pytest.fail(f"k3 of some sample is {least:.3f}; expected none below 0", pytrace=False)
    for name, value in (("SMALLEST_AT", answer.SMALLEST_AT), ("SMALLEST", answer.SMALLEST)):
        if value is None or abs(value) > 1e-6:
            hint = "set the derivative of exp(d) - d - 1 to zero: exp(d) = 1"
            pytest.fail(f"{name} is {value}; {hint}", pytrace=False)
