"""The contrastive head, loss and reward against plain loops over the formulas in float64."""

import math
from functools import partial

import pytest
import torch

import clipo
import variants
from config import CONTRASTIVE_LOSSES, POLICY_LOSSES, SCOPES, CLIPOConfig
from lab.bench.growth import LargestTensor

FLAGS = ["1101000", "1100000", "0000000", "1000000", "1111111", "1011110"]  # mixed groups, and every degenerate kind


def batch(seed=0, d=24):
    """z (P, G, E) and correct (P, G) of six groups of seven."""
    g = torch.Generator().manual_seed(seed)
    correct = torch.tensor([[c == "1" for c in flags] for flags in FLAGS])
    z = torch.randn(*correct.shape, d, generator=g, dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=-1), correct


def by_the_formula(z, correct, kind, tau, target=None, scope="group"):
    """L (P, G), term by term; with all positives unless `target` (B,) names one for each rollout."""
    (P, G), z, correct = correct.shape, z.flatten(0, 1), correct.flatten()
    group, losses, anchors = [b // G for b in range(P * G)], [], []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        same = [a for a in others if group[a] == group[i]]
        right = [a for a in (others if scope == "batch" else same) if correct[a]]
        if scope == "cross":  # the authors': everything else in the batch
            wrong = [a for a in others if a not in right]
        else:
            wrong = [a for a in (same if scope == "group" else others) if not correct[a]]
        anchors.append(bool(correct[i] and right and wrong))
        if not anchors[-1]:
            losses.append(z.new_zeros(()))
            continue
        s = {a: (z[i] * z[a]).sum() / tau for a in others}
        chosen = right if target is None else [int(target[i])]
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
    return torch.stack(losses).view(P, G), torch.tensor(anchors).view(P, G)


def drawn(pairs, scope):
    """The rollout, counted over the batch, that was drawn for each: (B,) long."""
    P, G, _ = pairs.target.shape
    place = pairs.target.int().argmax(-1)
    return (place + G * torch.arange(P)[:, None] * (scope == "group")).flatten()


def pairs_of(correct, scope="group", seed=0):
    draw = clipo.draw_pairs if scope == "group" else partial(variants.pairs_in_scope, scope=scope)
    return draw(correct, torch.Generator().manual_seed(seed))


def loss_of(kind, scope):
    loss = variants.LOSSES[kind].loss
    return loss if scope == "group" else variants.over_the_batch(loss)


@pytest.mark.parametrize("tau", [0.05, 0.5])
@pytest.mark.parametrize("scope, count", [("group", 10), ("wrong_of_all", 17), ("cross", 17), ("batch", 18)])
@pytest.mark.parametrize("kind", CONTRASTIVE_LOSSES)
def test_loss_and_gradient_equal_the_formula(kind, scope, count, tau):
    z, correct = batch()
    z.requires_grad_()
    pairs = pairs_of(correct, scope)
    target = drawn(pairs, scope) if kind == "infonce" else None
    expected, anchors = by_the_formula(z, correct, kind, tau, target, scope)
    (expected_gradient,) = torch.autograd.grad(expected[anchors].mean(), z)
    loss = loss_of(kind, scope)(z, pairs, tau)
    (gradient,) = torch.autograd.grad(loss[pairs.anchor].mean(), z)
    assert pairs.anchor.tolist() == anchors.tolist() and anchors.sum() == count
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_plain_loss_is_infonce_with_the_papers_constants():
    z, correct = batch()
    pairs = clipo.draw_pairs(correct, torch.Generator().manual_seed(0))
    expected, _ = by_the_formula(z, correct, "infonce", 0.05, drawn(pairs, "group"))
    torch.testing.assert_close(clipo.infonce(z, pairs), expected)
    assert all(torch.equal(a, b) for a, b in zip(pairs, pairs_of(correct), strict=True))
    assert (CLIPOConfig().contrastive_kind, CLIPOConfig().tau) == ("infonce", 0.05)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_drawn_positive_is_uniform_over_the_others_and_follows_the_seed(scope):
    _, correct = batch()
    positive = pairs_of(correct, scope).positive.flatten(0, 1)
    draws = [pairs_of(correct, scope, seed).target.flatten(0, 1) for seed in range(400)]
    assert torch.equal(draws[3], pairs_of(correct, scope, 3).target.flatten(0, 1))
    seen = torch.stack(draws).sum(0)  # (B, others)
    assert torch.equal(seen.sum(-1) > 0, positive.any(-1)) and not seen[~positive].any()
    for counts, allowed in zip(seen, positive, strict=True):
        if allowed.any():  # each expects `mean`, with a standard deviation of at most its root
            mean = 400 / int(allowed.sum())
            assert ((counts[allowed] - mean).abs() < 4 * mean**0.5).all()


@pytest.mark.parametrize("kind", CONTRASTIVE_LOSSES)
@pytest.mark.parametrize("flags", ["0000", "1000", "1111", "1", "0"])
def test_groups_without_contrast_give_zeros_and_no_nan(kind, flags):
    correct = torch.tensor([[c == "1" for c in flags]])
    hidden = torch.randn(1, len(flags), 6, requires_grad=True)
    pairs = pairs_of(correct)
    loss = variants.LOSSES[kind].loss(torch.nn.functional.normalize(hidden, dim=-1), pairs, 0.05)
    assert not pairs.anchor.any() and loss.tolist() == [[0.0] * len(flags)]
    assert clipo.contrastive_reward(loss, pairs).tolist() == [[0.0] * len(flags)]
    loss.sum().backward()
    assert not hidden.grad.any()  # which also says: no NaN


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", CONTRASTIVE_LOSSES)
def test_identical_embeddings_sit_at_the_chance_level(kind, scope):
    """Where nothing can be told apart, L is the log of how many stand in the softmax."""
    _, correct = batch()
    pairs = pairs_of(correct, scope)
    z = torch.zeros(*correct.shape, 4).index_fill(2, torch.tensor(2), 1.0)
    loss, chance = loss_of(kind, scope)(z, pairs, 0.05), variants.chance_level(kind, pairs)
    torch.testing.assert_close(loss[pairs.anchor], chance[pairs.anchor])


def test_a_loss_without_a_chance_level_is_refused_where_the_reward_is_measured_from_it(monkeypatch):
    monkeypatch.setitem(variants.LOSSES, "mine", variants.ContrastiveLoss(variants.decoupled))
    CONTRASTIVE_LOSSES.append("mine")
    try:
        for_run = CLIPOConfig(contrastive_kind="mine", reward_from_chance=True)
        with pytest.raises(
            ValueError, match="'mine' has no chance level, and the reward is measured from it; expected"
        ):
            variants.parts(for_run, None)
        variants.parts(CLIPOConfig(contrastive_kind="mine"), None)  # the paper's reward needs none
    finally:
        CONTRASTIVE_LOSSES.remove("mine")


def test_the_floor_of_a_perfect_head():
    """Correct ones on one point, wrong ones opposite: log(n - 1) for InfoNCE, 0 decoupled."""
    z = torch.tensor([[[1.0, 0.0]] * 5 + [[-1.0, 0.0]] * 3])
    pairs = pairs_of(torch.tensor([[True] * 5 + [False] * 3]))
    torch.testing.assert_close(clipo.infonce(z, pairs)[pairs.anchor], torch.full((5,), math.log(4)))
    torch.testing.assert_close(variants.decoupled(z, pairs)[pairs.anchor], torch.zeros(5))


def test_no_epsilon_bends_the_result():
    """At low similarities exp(s - 1/tau) is far below 1e-8; log-sum-exp must be exact there."""
    loss = clipo.infonce(torch.eye(3)[None], pairs_of(torch.tensor([[True, True, False]])), tau=0.01)
    torch.testing.assert_close(loss[0, 0], torch.tensor(2.0).log(), atol=1e-6, rtol=0)


def test_reward_clips_at_both_ends_and_is_measured_from_chance():
    pairs = pairs_of(torch.tensor([[True, True, True, True, False]]))  # 3 positives, 1 negative
    loss = torch.tensor([[0.0, 1.0, 2.0, 9.0, 0.0]], requires_grad=True)
    paid = variants.reward(loss, pairs, weight=0.5, floor=-0.9, ceiling=0.6, chance_of="infonce")
    chance = math.log(4)
    expected = [0.6, 0.5 * (chance - 1), 0.5 * (chance - 2), -0.9, 0.0]
    torch.testing.assert_close(paid, torch.tensor([expected]))
    assert not paid.requires_grad and not clipo.contrastive_reward(loss, pairs).requires_grad
    papers = variants.parts(CLIPOConfig(), None)  # clipo.py's own functions, not twins of them
    assert (papers.pairs, papers.loss) == (clipo.draw_pairs, clipo.infonce)
    assert (papers.reward, papers.policy_gradient) == (clipo.contrastive_reward, clipo.policy_gradient)


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


def test_advantages_equal_a_plain_computation():
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (True, False):
        expected = [[(r - row.mean()) / (row.std() + 1e-6 if scale else 1) for r in row] for row in rewards]
        torch.testing.assert_close(clipo.group_advantages(rewards, scale_by_std=scale), torch.tensor(expected))
    assert not clipo.group_advantages(torch.ones(2, 2)).any()
    for reward in (0.99, -0.3, 1.7):  # whose mean over twelve is rounded
        for scale in (True, False):
            assert not clipo.group_advantages(torch.full((1, 12), reward), scale_by_std=scale).any()


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
@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_policy_loss_and_gradient_equal_the_formula(kind, given):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    old = torch.randn(4, 5, generator=g, dtype=torch.float64) * mask
    new = (old + 0.5 * torch.randn(4, 5, generator=g, dtype=torch.float64) * mask).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    form = variants.policy_loss(CLIPOConfig(policy_loss=kind, max_new_tokens=7))
    assert (form.low, form.high) == RANGES[kind]
    low, high = given or RANGES[kind]
    responses, cut = policy_terms(kind, new, old, advantages, mask, low, high)
    if kind in ("gspo", "gmpo"):
        expected = -sum(sum(terms) / len(terms) for terms in responses) / 4
    else:
        expected = -sum(map(sum, responses)) / (4 * 7 if kind == "dr_grpo" else 13)
    surrogate, removed = form.surrogate(new - old, advantages[:, None], mask, low, high)
    loss = -(surrogate * form.mean(mask.view(2, 2, 5)).view(4, 5)).sum()
    torch.testing.assert_close(loss, expected)
    assert cut > 0 and removed[mask].sum() == cut
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (loss, expected)))


def test_every_name_that_a_setting_may_have_is_in_its_table():
    assert list(variants.LOSSES) == CONTRASTIVE_LOSSES and list(variants.POLICY_LOSSES) == POLICY_LOSSES


def test_kl_k3_is_an_unbiased_estimate_of_the_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    k3 = clipo.kl_k3(p.log()[None], q.log()[None])[0]
    assert (k3 >= 0).all()
    torch.testing.assert_close((p * k3).sum(), (p * (p / q).log()).sum())


def test_contrast_within_groups_never_builds_the_whole_batchs_matrix():
    P, G, E = 256, 8, 16
    z = torch.nn.functional.normalize(torch.randn(P, G, E), dim=-1).requires_grad_()
    correct = (torch.arange(P * G) % 2 == 0).view(P, G)
    with LargestTensor() as largest:
        pairs = clipo.draw_pairs(correct)
        clipo.infonce(z, pairs)[pairs.anchor].mean().backward()
    assert pairs.anchor.sum() == P * G // 2 and z.grad.abs().sum() > 0
    assert largest.elements <= P * G * max(E, G)


def test_similarities_are_scaled_cosines_within_each_group():
    z, _ = batch()
    torch.testing.assert_close(clipo.similarities(z, 0.5), torch.einsum("pie,pae->pia", z, z) / 0.5)
