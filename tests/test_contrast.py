"""The contrastive head, loss and reward against plain loops over the formulas in float64."""

import math

import pytest
import torch

import clipo
from lab.bench import LargestTensor


def batch(seed=0, d=24):
    """Rollouts of six groups, ragged and interleaved: mixed ones, and every degenerate kind."""
    g = torch.Generator().manual_seed(seed)
    members = {0: "1101000", 1: "11", 2: "00000", 3: "10000", 4: "1", 5: "110"}
    rows = [(label, c == "1") for label, flags in members.items() for c in flags]
    order = torch.randperm(len(rows), generator=g).tolist()
    group = torch.tensor([rows[i][0] * 10 for i in order])  # labels need not be 0, 1, 2, ...
    correct = torch.tensor([rows[i][1] for i in order])
    z = torch.nn.functional.normalize(torch.randn(len(rows), d, generator=g, dtype=torch.float64), dim=-1)
    return z, correct, group


def by_the_formula(z, correct, group, kind, tau, positives=None, scope="group"):
    """L_i for every row, term by term; with all positives unless `positives` names one for each row."""
    losses, anchors = [], []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        same = [a for a in others if group[a] == group[i]]
        right = [a for a in (others if scope == "batch" else same) if correct[a]]
        wrong = [a for a in (same if scope == "group" else others) if not correct[a]]
        anchors.append(bool(correct[i] and right and wrong))
        if not anchors[-1]:
            losses.append(z.new_zeros(()))
            continue
        s = {a: (z[i] * z[a]).sum() / tau for a in others}
        chosen = right if positives is None else [int(positives[i])]
        everyone = sum(torch.exp(s[a]) for a in right + wrong)
        shares = [torch.exp(s[j]) / everyone for j in chosen]
        if kind in ("infonce", "supcon_out"):
            losses.append(sum(-torch.log(share) for share in shares) / len(shares))
        elif kind == "supcon_in":
            losses.append(-torch.log(sum(shares) / len(shares)))
        elif kind == "soft_nn":
            losses.append(-torch.log(sum(shares)))
        else:
            terms = [torch.log(1 + sum(torch.exp(s[k] - s[j]) for k in wrong)) for j in chosen]
            losses.append(sum(terms) / len(terms))
    return torch.stack(losses), torch.tensor(anchors)


def some_positives(correct, group):
    """For every row, the last other correct row of its group (itself where there is none)."""
    n = range(len(correct))
    return torch.tensor([([a for a in n if a != i and correct[a] and group[a] == group[i]] or [i])[-1] for i in n])


@pytest.mark.parametrize("tau", [0.05, 0.5])
@pytest.mark.parametrize("scope, count", [("group", 5), ("cross", 7), ("batch", 9)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", list(clipo.CONTRASTIVE_LOSSES))
def test_loss_and_gradient_equal_the_formula(kind, given, scope, count, tau):
    z, correct, group = batch()
    if kind == "infonce" and not given:
        return  # it draws: see below
    positives = some_positives(correct, group if scope != "batch" else 0 * group) if given else None
    z.requires_grad_()
    expected, expected_anchors = by_the_formula(z, correct, group, kind, tau, positives, scope)
    (expected_gradient,) = torch.autograd.grad(expected[expected_anchors].mean(), z)
    loss, anchors = clipo.contrastive_loss(
        z, correct, group, kind=kind, temperature=tau, scope=scope, positives=positives
    )
    (gradient,) = torch.autograd.grad(loss[anchors].mean(), z)
    assert anchors.tolist() == expected_anchors.tolist() and anchors.sum() == count
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_defaults_are_the_papers():
    z, correct, group = batch()
    positives = some_positives(correct, group)
    expected, _ = by_the_formula(z, correct, group, "infonce", 0.05, positives)
    torch.testing.assert_close(clipo.contrastive_loss(z, correct, group, positives=positives)[0], expected)


@pytest.mark.parametrize("scope", clipo.SCOPES)
def test_the_drawn_positive_is_uniform_over_the_others_and_follows_the_seed(scope):
    _, correct, group = batch()
    n, pool = range(len(group)), group if scope != "batch" else 0 * group
    others = {i: [j for j in n if j != i and correct[i] and correct[j] and pool[i] == pool[j]] for i in n}
    anchors = by_the_formula(batch()[0], correct, group, "supcon_out", 0.5, scope=scope)[1]

    def draw(seed):
        return clipo.draw_positives(correct, group, scope=scope, generator=torch.Generator().manual_seed(seed)).tolist()

    assert draw(3) == draw(3)
    draws = [draw(seed) for seed in range(400)]
    for i in n:
        seen = [positives[i] for positives in draws]
        assert set(seen) == (set(others[i]) if anchors[i] else {-1})
        if anchors[i]:  # each expects `mean`, with a standard deviation of at most its root
            mean = 400 / len(others[i])
            assert all(abs(seen.count(j) - mean) < 4 * mean**0.5 for j in others[i])


def loss_of_draws(z, correct, group, *, kind="infonce", scope="group", **more):
    """`contrastive_loss`, with positives drawn where the kind needs them."""
    positives = clipo.draw_positives(correct, group, scope=scope) if kind == "infonce" else None
    return clipo.contrastive_loss(z, correct, group, kind=kind, scope=scope, positives=positives, **more)


@pytest.mark.parametrize("kind", list(clipo.CONTRASTIVE_LOSSES))
@pytest.mark.parametrize("flags", ["0000", "1000", "1111", "1", "0"])
def test_groups_without_contrast_give_zeros_and_no_nan(kind, flags):
    correct = torch.tensor([c == "1" for c in flags])
    hidden = torch.randn(len(flags), 6, requires_grad=True)
    z, group = torch.nn.functional.normalize(hidden, dim=-1), torch.zeros(len(flags)).long()
    loss, anchors = loss_of_draws(z, correct, group, kind=kind)
    assert not anchors.any() and loss.tolist() == [0.0] * len(flags)
    assert clipo.contrastive_reward(loss, anchors).tolist() == [0.0] * len(flags)
    loss.sum().backward()
    assert not hidden.grad.any()  # which also says: no NaN


@pytest.mark.parametrize("scope", clipo.SCOPES)
@pytest.mark.parametrize("kind", list(clipo.CONTRASTIVE_LOSSES))
def test_identical_embeddings_sit_at_the_chance_level(kind, scope):
    """Where nothing can be told apart, L is the log of how many stand in the softmax."""
    _, correct, group = batch()
    z = torch.zeros(len(group), 4).index_fill(1, torch.tensor(2), 1.0)
    loss, anchors = loss_of_draws(z, correct, group, kind=kind, scope=scope)
    torch.testing.assert_close(loss[anchors], clipo.chance_level(correct, group, kind=kind, scope=scope)[anchors])


def test_the_floor_of_a_perfect_head():
    """Correct ones on one point, wrong ones opposite: log(n - 1) for InfoNCE, 0 decoupled."""
    z = torch.tensor([[1.0, 0.0]] * 5 + [[-1.0, 0.0]] * 3)
    correct, group = torch.tensor([True] * 5 + [False] * 3), torch.zeros(8).long()
    infonce, anchors = loss_of_draws(z, correct, group)
    decoupled, _ = clipo.contrastive_loss(z, correct, group, kind="decoupled")
    torch.testing.assert_close(infonce[anchors], torch.full((5,), math.log(4)))
    torch.testing.assert_close(decoupled[anchors], torch.zeros(5))


def test_no_epsilon_bends_the_result():
    """At low similarities exp(s - 1/tau) is far below 1e-8; log-sum-exp must be exact there."""
    z = torch.eye(3)
    loss, _ = loss_of_draws(z, torch.tensor([True, True, False]), torch.zeros(3).long(), temperature=0.01)
    torch.testing.assert_close(loss[0], torch.tensor(2.0).log(), atol=1e-6, rtol=0)


def test_reward_clips_at_both_ends_and_is_measured_from_chance():
    loss, anchors = torch.tensor([0.0, 1.0, 2.0, 9.0, 0.0]), torch.tensor([True, True, True, True, False])
    reward = clipo.contrastive_reward(loss, anchors, weight=0.5, floor=-0.9, ceiling=0.6, chance=torch.full((5,), 1.5))
    torch.testing.assert_close(reward, torch.tensor([0.6, 0.25, -0.25, -0.9, 0.0]))
    assert not clipo.contrastive_reward(loss.clone().requires_grad_(), anchors).requires_grad


@pytest.mark.parametrize("mlp, layers", [(False, 1), (True, 2)])
def test_head_gives_unit_vectors_of_bias_free_layers(mlp, layers):
    head = clipo.ContrastiveHead(64, d_embed=9, mlp=mlp)  # wide: a row of which every ReLU is dead has no direction
    hidden = torch.randn(4, 64)
    z = head(hidden)
    assert z.shape == (4, 9)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4))
    weights = list(head.parameters())
    assert len(weights) == layers
    raw = hidden @ weights[0].T if not mlp else (hidden @ weights[0].T).relu() @ weights[1].T
    torch.testing.assert_close(z, raw / raw.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "simclr"}, "contrastive kind is 'simclr'; expected one of: infonce, supcon_out"),
        ({"scope": "world"}, "contrastive scope is 'world'; expected one of: group, cross"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"positives": torch.tensor([0, 1, 2])}, "not another correct rollout"),  # oneself is no positive
        ({}, "infonce takes one positive for each anchor"),
    ],
)
def test_unknown_names_and_bad_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        clipo.contrastive_loss(torch.eye(3), torch.tensor([True, True, False]), torch.zeros(3).long(), **wrong)


def test_advantages_equal_a_plain_computation():
    g = torch.Generator().manual_seed(0)
    group = torch.tensor([3, 3, 5, 3, 5, 9])
    rewards = torch.rand(6, generator=g)
    for scale in (True, False):
        got = clipo.group_advantages(rewards, group, scale_by_std=scale)
        for label in (3, 5):
            r = rewards[group == label]
            expected = (r - r.mean()) / (r.std() + 1e-6 if scale else 1)
            torch.testing.assert_close(got[group == label], expected)
        assert got[5] == 0  # a group of one
    assert not clipo.group_advantages(torch.ones(4), torch.tensor([0, 0, 1, 1])).any()


def policy_terms(kind, new, old, advantages, mask, low, high):
    """J of every response, term by term: a list of its tokens' contributions, and how many the clip cut off."""
    responses, cut = [], 0
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        A, logs = advantages[b], [new[b, t] - old[b, t] for t in tokens]
        if kind == "gmpo":
            bounded = [torch.clamp(x, max=high) if A > 0 else torch.clamp(x, min=-low) for x in logs]
            cut += sum(bool(x != y) for x, y in zip(logs, bounded, strict=True))
            responses.append([torch.exp(sum(bounded) / len(bounded)) * A] * len(tokens))
            continue
        if kind == "gspo":
            logs = [sum(logs) / len(logs)] * len(logs)
        ratios = [torch.exp(x) for x in logs]
        responses.append([torch.min(r * A, torch.clamp(r, 1 - low, 1 + high) * A) for r in ratios])
        cut += sum(bool((A > 0 and r > 1 + high) or (A < 0 and r < 1 - low)) for r in ratios)
    return responses, cut


RANGES = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "gmpo": (0.4, 0.4)}


@pytest.mark.parametrize("given", [None, (0.1, 0.3)])
@pytest.mark.parametrize("kind", list(clipo.POLICY_LOSSES))
def test_policy_loss_and_gradient_equal_the_formula(kind, given):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    old = torch.randn(4, 5, generator=g, dtype=torch.float64) * mask
    new = (old + 0.5 * torch.randn(4, 5, generator=g, dtype=torch.float64) * mask).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    low, high = given or RANGES[kind]
    responses, cut = policy_terms(kind, new, old, advantages, mask, low, high)
    if kind in ("gspo", "gmpo"):
        expected = -sum(sum(terms) / len(terms) for terms in responses) / 4
    else:
        expected = -sum(map(sum, responses)) / (4 * 7 if kind == "dr_grpo" else 13)
    chosen = dict(clip_low=low, clip_high=high) if given else {}
    loss, stats = clipo.policy_loss(new, old, advantages, mask, kind=kind, max_new_tokens=7, **chosen)
    torch.testing.assert_close(loss, expected)
    assert cut > 0 and stats["clip_fraction"] == pytest.approx(cut / 13)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (loss, expected)))


def test_an_unknown_policy_loss_is_named():
    with pytest.raises(ValueError, match="policy loss kind is 'ppo'; expected one of: grpo, dr_grpo, dapo, gspo, gmpo"):
        clipo.policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1).bool(), kind="ppo")


def test_kl_k3_is_an_unbiased_estimate_of_the_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    k3 = clipo.kl_k3(p.log()[None], q.log()[None])[0]
    assert (k3 >= 0).all()
    torch.testing.assert_close((p * k3).sum(), (p * (p / q).log()).sum())


def test_contrast_within_groups_never_builds_the_whole_batchs_matrix():
    B, G, E = 2048, 8, 16
    z = torch.nn.functional.normalize(torch.randn(B, E), dim=-1).requires_grad_()
    with LargestTensor() as largest:
        loss, anchors = loss_of_draws(z, torch.arange(B) % 2 == 0, torch.arange(B) // G)
        loss[anchors].mean().backward()
    assert anchors.sum() == B // 2 and z.grad.abs().sum() > 0
    assert largest.elements <= B * max(E, G)
