import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

import clipo
from exercises.checking import agree, call, gradient, same, wrong
from exercises.plots import paid_for_soundness, the_five

CORRECT = torch.tensor([[True, True, True, False, False], [False, True, False, True, False]])
WITHOUT = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])  # no group has an anchor


def embeddings(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def loss_and_gradient(answer, z, pairs, tau=1.0):
    call(answer.my_loss, z, pairs, tau)
    z = z.clone().requires_grad_()
    loss = answer.my_loss(z, pairs, tau)
    if not isinstance(loss, torch.Tensor) or loss.shape != z.shape[:2]:
        wrong(f"got {loss!r}; expected a tensor of shape {tuple(z.shape[:2])}, a loss for each")
    return loss.detach(), gradient(loss, z, "z")


def test_it_pulls_and_pushes(answer):
    pairs = clipo.draw_pairs(CORRECT[:1])
    pulls, pushes = [], []
    for _ in range(20):
        z = embeddings(1, 5, 6)
        loss_and_gradient(answer, z, pairs)  # is it a loss at all?
        change = jacobian(lambda z: answer.my_loss(z, pairs, 1.0), z)[:, :, 0]  # of L_i with z_a: (1, 5, 5, 6)
        slope = (change * z[:, :, None]).sum(-1)  # of L_i where a moves towards i: (1, 5, 5)
        pulls.append((slope * pairs.positive).sum(-1)[pairs.anchor])  # all positives move towards i
        pushes.append(slope[pairs.negative & pairs.anchor[..., None]])
    pulls, pushes = torch.cat(pulls), torch.cat(pushes)
    if (pulls > 1e-6).any() or not (pulls < -1e-6).any():
        wrong("the loss does not fall when the positives come closer: its gradient there is not < 0")
    if (pushes < -1e-6).any() or not (pushes > 1e-6).any():
        wrong("the loss does not rise when a wrong answer comes closer: its gradient there is not > 0")


def test_it_does_not_look_at_the_anchor_itself(answer):
    z, pairs = embeddings(2, 5, 6), clipo.draw_pairs(CORRECT)
    # A further direction for each rollout: the same similarities to all others, another one to itself.
    longer = torch.cat([z, 4 * torch.eye(5).expand(2, 5, 5)], -1)
    before, after = (loss_and_gradient(answer, which, pairs)[0] for which in (z, longer))
    if not same(before, after, 1e-5):
        wrong("the anchor's similarity to itself changes the loss; mask it out")


def test_it_does_not_look_at_other_groups(answer):
    z, pairs = embeddings(2, 5, 6), clipo.draw_pairs(CORRECT)
    both = loss_and_gradient(answer, z, pairs)[0]
    for g in range(2):
        alone = loss_and_gradient(answer, z[g : g + 1], clipo.Pairs(*(which[g : g + 1] for which in pairs)))[0]
        if not same(both[g : g + 1], alone, 1e-5):
            wrong("a group's loss changes with the other groups of the batch; sums and means are over the last axis")


def test_it_depends_on_tau(answer):
    z, pairs = embeddings(2, 5, 6), clipo.draw_pairs(CORRECT)
    if same(*(loss_and_gradient(answer, z, pairs, tau)[0] for tau in (1.0, 0.5)), 1e-5):
        wrong("tau changes nothing: similarities are divided by it")


def test_it_is_finite(answer):
    east = torch.tensor([1.0, 0.0])
    pairs = clipo.draw_pairs(CORRECT[:1])
    apart = torch.stack([east, east, east, -east, -east])[None]  # right ones here, wrong ones on the other side
    mixed = torch.stack([east, -east, -east, east, east])[None]  # the first is where the wrong ones are
    for size in (20.0, 200.0):
        for z in (apart, mixed):
            loss, slope = loss_and_gradient(answer, z, pairs, 1 / size)
            if not (loss.isfinite().all() and slope.isfinite().all()):
                why = "exp(200) is infinite in float32; use logsumexp or softplus"
                wrong(f"at similarities of +-{size:.0f} loss or gradient is not finite: {why}")


def test_groups_without_an_anchor_get_0(answer):
    z, pairs = embeddings(3, 3, 6), clipo.draw_pairs(WITHOUT)
    loss, slope = loss_and_gradient(answer, z, pairs)
    if not (loss.isfinite().all() and slope.isfinite().all()):
        why = "one 0 / 0 or log 0 makes every gradient NaN, even behind torch.where; clamp(min=1), clipo.log_sum"
        wrong(f"in groups without an anchor loss or gradient is not finite: {why}")
    agree(loss, torch.zeros(3, 3), "groups without an anchor")


def test_it_has_a_chance_level(answer):
    pairs = clipo.draw_pairs(CORRECT)
    points = F.normalize(torch.ones(2, 5, 6), dim=-1), torch.eye(5).expand(2, 5, -1)
    one, right_angles = (loss_and_gradient(answer, z, pairs, 0.5)[0] for z in points)
    if not same(one, right_angles, 1e-4):
        wrong(
            "my_loss of embeddings all in one point is not that of embeddings all at right angles: it has no chance "
            "level. Are similarities compared with each other only? Is a sum over positives divided by their number?"
        )
    counts = (which.sum(-1).float() for which in (pairs.positive, pairs.negative))
    chance = call(answer.my_chance, *counts)
    if not isinstance(chance, torch.Tensor) or chance.shape != pairs.anchor.shape:
        wrong(f"my_chance: got {chance!r}; expected a tensor of shape {tuple(pairs.anchor.shape)}")
    chance = torch.where(pairs.anchor, chance, 0.0)
    agree(chance, one, "my_chance, against my_loss of embeddings all in one point", atol=1e-4)


def test_it_pays_soundness(answer):
    paid = paid_for_soundness(answer.my_loss)
    if not paid > 0.05:
        five = {name: round(paid_for_soundness(loss), 2) for name, loss in the_five().items()}
        wrong(
            f"it pays sound answers {paid:.2f} standard deviations more than unsound ones; expected more than 0.05. "
            f"The five pay: {five}"
        )
