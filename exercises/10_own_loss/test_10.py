import pytest
import torch

import clipo
from exercises.checking import same
from exercises.plots import paid_for_soundness

# Row 0: itself, two positives, one wrong; row 1: itself in the middle.
SELF = torch.tensor([[True, False, False, False, False], [False, True, False, False, False]])
POSITIVE = torch.tensor([[False, True, True, False, False], [True, False, False, True, False]])
NEGATIVE = ~SELF & ~POSITIVE


def loss_and_slope(answer, similarity):
    similarity = similarity.clone().requires_grad_()
    loss = answer.my_loss(similarity, POSITIVE, POSITIVE, NEGATIVE)
    if not isinstance(loss, torch.Tensor) or loss.shape != (2,):
        pytest.fail(f"got {loss!r}; expected a tensor of shape (2,), one loss for each anchor", pytrace=False)
    loss.sum().backward()
    return loss.detach(), similarity.grad


def test_it_pulls_and_pushes(answer):
    for _ in range(20):
        _, slope = loss_and_slope(answer, torch.randn(2, 5))
        if (slope[POSITIVE] > 1e-6).any() or not (slope[POSITIVE] < 0).any():
            pytest.fail(
                "the loss does not fall when a positive comes closer: its gradient there is not < 0", pytrace=False
            )
        if (slope[NEGATIVE] < -1e-6).any() or not (slope[NEGATIVE] > 0).any():
            pytest.fail(
                "the loss does not rise when a wrong answer comes closer: its gradient there is not > 0", pytrace=False
            )


def test_it_does_not_look_at_the_anchor_itself(answer):
    similarity = torch.randn(2, 5)
    before, _ = loss_and_slope(answer, similarity)
    after, _ = loss_and_slope(answer, similarity.masked_fill(SELF, 20.0))
    if not same(before, after, 1e-6):
        pytest.fail("the anchor's similarity to itself changes the loss; mask it out", pytrace=False)


def test_it_is_finite(answer):
    for size in (20.0, 200.0):
        for sign in (1, -1):
            loss, slope = loss_and_slope(answer, sign * size * (POSITIVE.float() - NEGATIVE.float()))
            if not (loss.isfinite().all() and slope.isfinite().all()):
                why = "exp(200) is infinite in float32; use logsumexp or softplus"
                pytest.fail(f"at similarities of +-{size:.0f} loss or gradient is not finite: {why}", pytrace=False)


def test_it_is_your_own(answer):
    similarity = torch.randn(2, 5)
    mine, _ = loss_and_slope(answer, similarity)
    for name, theirs in clipo.CONTRASTIVE_LOSSES.items():
        loss = theirs(similarity, POSITIVE, POSITIVE, NEGATIVE)
        if same(mine - mine[0], loss - loss[0], 1e-5):
            pytest.fail(f"this is {name} (or it and a constant); invent another", pytrace=False)


def test_it_pays_soundness(answer):
    paid = paid_for_soundness(answer.my_loss)
    if paid < 0.2:
        five = {name: round(paid_for_soundness(loss), 2) for name, loss in clipo.CONTRASTIVE_LOSSES.items()}
        pytest.fail(
            f"it pays sound answers {paid:.2f} standard deviations more than unsound ones; expected 0.2 or more, "
            f"as the five do: {five}", pytrace=False,
        )  # fmt: skip
