from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

import clipo
import variants
from exercises.checking import agree, same
from exercises.plots import paid_for_soundness

CORRECT = torch.tensor([[True, True, True, False, False], [False, True, False, True, False]])
WITHOUT = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])  # no group has an anchor


def embeddings(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def loss_and_gradient(answer, z, pairs, tau=1.0):
    z = z.clone().requires_grad_()
    loss = answer.my_loss(z, pairs, tau)
    if not isinstance(loss, torch.Tensor) or loss.shape != z.shape[:2]:
        pytest.fail(f"got {loss!r}; expected a tensor of shape {tuple(z.shape[:2])}, a loss for each", pytrace=False)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


def test_it_pulls_and_pushes(answer):
    pairs = clipo.draw_pairs(CORRECT[:1])
    positive, negative = (which & pairs.anchor[..., None] for which in (pairs.positive, pairs.negative))
    for _ in range(20):
        z = embeddings(1, 5, 6)
        loss_and_gradient(answer, z, pairs)  # is it a loss at all?
        change = jacobian(lambda z: answer.my_loss(z, pairs, 1.0), z)[:, :, 0]  # of L_i with z_a: (1, 5, 5, 6)
        slope = (change * z[:, :, None]).sum(-1)  # of L_i where a moves towards i: (1, 5, 5)
        if (slope[positive] > 1e-6).any() or not (slope[positive] < 0).any():
            pytest.fail(
                "the loss does not fall when a positive comes closer: its gradient there is not < 0", pytrace=False
            )
        if (slope[negative] < -1e-6).any() or not (slope[negative] > 0).any():
            pytest.fail(
                "the loss does not rise when a wrong answer comes closer: its gradient there is not > 0", pytrace=False
            )


def test_it_does_not_look_at_the_anchor_itself(answer):
    z, pairs = embeddings(2, 5, 6), clipo.draw_pairs(CORRECT)
    # A further direction for each rollout: the same similarities to all others, another one to itself.
    longer = torch.cat([z, 4 * torch.eye(5).expand(2, 5, 5)], -1)
    before, after = (loss_and_gradient(answer, which, pairs)[0] for which in (z, longer))
    if not same(before, after, 1e-5):
        pytest.fail("the anchor's similarity to itself changes the loss; mask it out", pytrace=False)


def test_it_is_finite(answer):
    east = torch.tensor([1.0, 0.0])
    pairs = clipo.draw_pairs(CORRECT[:1])
    apart = torch.stack([east, east, east, -east, -east])[None]  # right ones here, wrong ones on the other side
    mixed = torch.stack([east, -east, -east, east, east])[None]  # the first is where the wrong ones are
    for size in (20.0, 200.0):
        for z in (apart, mixed):
            loss, gradient = loss_and_gradient(answer, z, pairs, 1 / size)
            if not (loss.isfinite().all() and gradient.isfinite().all()):
                why = "exp(200) is infinite in float32; use logsumexp or softplus"
                pytest.fail(f"at similarities of +-{size:.0f} loss or gradient is not finite: {why}", pytrace=False)


def test_groups_without_an_anchor_get_0(answer):
    z, pairs = embeddings(3, 3, 6), clipo.draw_pairs(WITHOUT)
    loss, gradient = loss_and_gradient(answer, z, pairs)
    if not (loss.isfinite().all() and gradient.isfinite().all()):
        why = "one 0 / 0 or log 0 makes every gradient NaN, even behind torch.where; clamp(min=1), clipo.log_sum"
        pytest.fail(f"in groups without an anchor loss or gradient is not finite: {why}", pytrace=False)
    agree(loss, torch.zeros(3, 3), "groups without an anchor")


def test_it_is_your_own(answer):
    z, pairs = embeddings(1, 5, 6), clipo.draw_pairs(CORRECT[:1])
    mine = loss_and_gradient(answer, z, pairs)[0][pairs.anchor]
    for name, theirs in variants.LOSSES.items():
        loss = theirs.loss(z, pairs, 1.0)[pairs.anchor]
        if same(mine - mine[0], loss - loss[0], 1e-5):
            pytest.fail(f"this is {name} (or it and a constant); invent another", pytrace=False)


def test_the_reward_can_be_measured_from_its_chance_level(answer):
    pairs = clipo.draw_pairs(CORRECT)
    with mock.patch.dict(variants.LOSSES, mine=answer.MINE):
        chance = torch.where(pairs.anchor, variants.chance_level("mine", pairs), 0.0)
    for name, z in (("in one point", F.normalize(torch.ones(2, 5, 6), dim=-1)), ("at right angles", torch.eye(5))):
        loss, _ = loss_and_gradient(answer, z.expand(2, 5, -1), pairs)
        agree(chance, loss, f"my_chance, against my_loss of embeddings all {name}")


def test_it_pays_soundness(answer):
    paid = paid_for_soundness(answer.my_loss)
    if paid < 0.25:
        five = {name: round(paid_for_soundness(theirs.loss), 2) for name, theirs in variants.LOSSES.items()}
        pytest.fail(
            f"it pays sound answers {paid:.2f} standard deviations more than unsound ones; expected 0.25 or more, "
            f"as the five do: {five}", pytrace=False,
        )  # fmt: skip
