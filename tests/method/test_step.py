"""The training step: what reaches the policy, what reaches the head, and when."""

import copy
import math
import re

import pytest
import torch
from conftest import CONFIGS, PROMPTS, make_model
from test_contrast import loss_of, pairs_of

import clipo
import variants
from config import INFORMATIVE, POLICY_LOSSES, SCOPES, CLIPOConfig
from engine.guard import Trainer
from engine.update import response_logprobs
from run.log import step_metrics
from tasks import toy

TOKENIZER = toy.make_tokenizer()
ANSWERS = ["unused"] * len(PROMPTS)
SMALL = {
    "prompts_per_step": 4, "mini_batch_prompts": 4, "samples_per_prompt": 6, "max_new_tokens": 8, "lr": 1e-3,
    "head_warmup_steps": 0, "d_embed": 16, "beta": 0.0, "compute_dtype": "float32",
}  # fmt: skip


def even(texts, answers=None):
    """Verdicts that are mixed within groups: is the number of words even?"""
    return [len(text.split()) % 2 == 0 for text in texts]


def trainer(are_correct=even, engine="fast", **settings):
    model = make_model(CONFIGS["qwen2"])
    model.generation_config.eos_token_id = [1, 3, 17, 31]  # so that lengths differ
    return Trainer(model, TOKENIZER, are_correct, CLIPOConfig(**{**SMALL, **settings}), engine)


def step(trainer, *given):
    """A step; its metrics. What it found out is `trainer.last`, for the tests."""
    trainer.last = trainer.step(*given)
    return step_metrics(trainer, trainer.last)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def plain_grpo(config, steps):
    """GRPO in a few lines: no head, no contrast. Returns the policy's weights."""
    policy = make_model(CONFIGS["qwen2"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for step in range(steps):
        rollouts = clipo.generate(
            policy, PROMPTS, samples_per_prompt=config.samples_per_prompt, max_new_tokens=config.max_new_tokens,
            eos_token_id=[1, 3, 17, 31], generator=torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 3),
        )  # fmt: skip
        both = zip(rollouts.tokens.flatten(0, 1), rollouts.mask.flatten(0, 1), strict=True)
        texts = TOKENIZER.batch_decode([row[keep] for row, keep in both], skip_special_tokens=True)
        reward = torch.tensor(even(texts)).float().view(len(PROMPTS), -1)
        advantage = clipo.group_advantages(reward)
        for p, prompt in enumerate(PROMPTS):
            logprobs = clipo.response_logprobs(policy, [prompt], rollouts.of(slice(p, p + 1)))[0]
            ratio = (logprobs - rollouts.logprobs[p]).exp()
            surrogate = torch.minimum(ratio * advantage[p, :, None], ratio.clamp(0.8, 1.2) * advantage[p, :, None])
            (-(surrogate * (rollouts.mask[p] / rollouts.mask.sum())).sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(policy)


def test_weight_0_is_plain_grpo_bit_for_bit():
    ours = trainer(weight=0.0, head_warmup_steps=5, engine="plain")  # there is nothing to wait for
    for _ in range(3):
        step(ours, PROMPTS, ANSWERS)
    assert not same(weights(ours.policy), weights(make_model(CONFIGS["qwen2"])))
    assert same(weights(ours.policy), plain_grpo(ours.config, steps=3))


def test_the_reward_comes_from_the_forward_before_the_heads_update():
    t = trainer(contrastive_kind="decoupled", weight=0.3, tau=0.5, head_steps=3)
    before = copy.deepcopy(t.head)
    metrics = step(t, PROMPTS, ANSWERS)
    scored = t.last
    pairs = clipo.draw_pairs(scored.correct)
    loss, anchors = variants.decoupled(before(scored.rollouts.hidden), pairs, tau=0.5), pairs.anchor
    assert anchors.any() and not same(weights(before), weights(t.head))
    expected = clipo.contrastive_reward(loss, pairs, weight=0.3)
    torch.testing.assert_close(scored.agreement.reward, expected)
    torch.testing.assert_close(scored.reward, scored.correct.float() + expected)
    torch.testing.assert_close(scored.advantage, clipo.group_advantages(scored.reward))
    assert metrics["contrastive_loss"] == pytest.approx(loss[anchors].mean().item(), rel=1e-5)
    assert metrics["on_floor"] == pytest.approx((expected <= -0.5)[anchors].float().mean().item())


def test_the_head_learns_by_adamw_on_the_mean_loss_over_anchors():
    t = trainer(head_lr=0.01)
    expected = copy.deepcopy(t.head)
    random = t.random(1)
    step(t, PROMPTS, ANSWERS)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.01)
    rollouts = t.last.rollouts
    pairs = clipo.draw_pairs(t.last.correct, random)
    assert torch.equal(t.last.agreement.pairs.target, pairs.target)
    clipo.infonce(expected(rollouts.hidden), pairs)[pairs.anchor].mean().backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    optimizer.step()
    for a, b in zip(expected.parameters(), t.head.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_settings_of_the_informative_reward():
    """Group mean off, measured from chance, both ends of the cap."""
    t = trainer(**{**INFORMATIVE, "reward_floor": -0.05, "reward_ceiling": 0.04})
    head = copy.deepcopy(t.head)
    step(t, PROMPTS, ANSWERS)
    hidden, correct = t.last.rollouts.hidden, t.last.correct
    centred = torch.stack([group - group.mean(0) for group in hidden])
    pairs = variants.pairs_in_scope(correct, scope="wrong_of_all")
    loss = variants.over_the_batch(variants.decoupled)(head(centred), pairs, tau=0.5)
    chance = math.log(1 + int((~correct).sum()))  # the wrong rollouts of all questions are negatives
    expected = torch.where(pairs.anchor, (chance - loss).clamp(-0.05, 0.04), 0.0)
    torch.testing.assert_close(t.last.agreement.reward, expected)
    assert expected.min() < -0.049 and expected.max() > 0.039


def test_warm_up_leaves_the_policy_alone_and_trains_the_head():
    t = trainer(head_warmup_steps=2)
    policy, head = weights(t.policy), weights(t.head)
    for number in range(3):
        metrics = step(t, PROMPTS, ANSWERS)
        assert not same(head, weights(t.head))
        assert same(policy, weights(t.policy)) == (number < 2)
        assert (metrics["policy_loss"] is None) == (number < 2)


@pytest.mark.parametrize("verdict", [True, False])
def test_a_batch_without_any_anchor(verdict):
    """All right or all wrong: no NaN, no reward, no head step, no policy gradient."""
    t = trainer(are_correct=lambda texts, answers: [verdict] * len(texts), weight_decay=0.0)
    policy, head = weights(t.policy), weights(t.head)
    metrics = step(t, PROMPTS, ANSWERS)
    assert metrics["anchors"] == 0 and metrics["contrastive_loss"] is None and metrics["head_grad_norm"] is None
    assert metrics["groups_without_contrast"] == metrics["groups_without_advantage"] == 1
    assert metrics["reward"] == float(verdict) and metrics["policy_grad_norm"] == 0
    assert same(head, weights(t.head)) and same(policy, weights(t.policy))


@pytest.mark.parametrize("policy_loss", POLICY_LOSSES)
def test_the_gradient_does_not_depend_on_the_micro_batches(policy_loss):
    chosen = dict(beta=0.1, policy_loss=policy_loss)
    whole, parts = trainer(**chosen), trainer(**chosen, micro_batch_tokens=25)
    for _ in range(2):  # in the second step the reference differs from the policy
        a, b = step(whole, PROMPTS, ANSWERS), step(parts, PROMPTS, ANSWERS)
    for name in ("policy_loss", "kl", "policy_grad_norm", "clip_fraction"):
        assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6)
    for p, q in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3)


def test_a_fixed_head_is_never_trained():
    t = trainer(head_steps=0)
    before = weights(t.head)
    metrics = step(t, PROMPTS, ANSWERS)
    assert same(weights(t.head), before) and metrics["head_grad_norm"] is None
    assert t.last.agreement.reward.abs().sum() > 0  # and still rewards


def test_dr_grpo_does_not_divide_by_the_groups_std():
    t = trainer(policy_loss="dr_grpo")
    step(t, PROMPTS, ANSWERS)
    torch.testing.assert_close(t.last.advantage, t.last.reward - t.last.reward.mean(-1, keepdim=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_scope_reaches_loss_and_chance_level(scope):
    chosen = dict(contrastive_scope=scope, contrastive_kind="supcon_out", tau=0.5)
    t = trainer(**chosen, reward_from_chance=True, weight=1.0, reward_floor=-9.0, reward_ceiling=9.0)
    step(t, PROMPTS, ANSWERS)
    pairs, loss = pairs_of(t.last.correct, scope), loss_of("supcon_out", scope)
    loss = loss(t.last.agreement.embedding, pairs, tau=0.5)
    chance = variants.chance_level("supcon_out", pairs)
    torch.testing.assert_close(t.last.agreement.reward, torch.where(pairs.anchor, chance - loss, 0 * loss))


@pytest.mark.parametrize("size, updates", [(4, 1), (3, 2), (2, 2), (1, 4), (100, 1)])
def test_mini_batches(size, updates, monkeypatch):
    t = trainer(mini_batch_prompts=size, lr=0.01)
    seen, real = [], t.parts.policy_gradient

    def watched(policy, reference, prompts, rollouts, *more):
        assert len(prompts) == len(rollouts.tokens)
        seen.append(prompts)
        return real(policy, reference, prompts, rollouts, *more)

    monkeypatch.setattr(t.parts, "policy_gradient", watched)
    metrics = step(t, PROMPTS, ANSWERS)
    assert len(seen) == updates and [p for prompts in seen for p in prompts] == PROMPTS
    assert (metrics["clip_fraction"] > 0) == (updates > 1)  # the first update is on policy: nothing to clip


def test_kl_to_the_frozen_start():
    t = trainer(beta=0.5)
    start = copy.deepcopy(t.policy)
    assert step(t, PROMPTS, ANSWERS)["kl"] == pytest.approx(0, abs=1e-6)
    policy = copy.deepcopy(t.policy)
    metrics = step(t, PROMPTS, ANSWERS)
    rollouts = t.last.rollouts
    with torch.no_grad():
        p, q = (response_logprobs(m, PROMPTS, rollouts) for m in (policy, start))
    assert metrics["kl"] == pytest.approx(clipo.kl_k3(p, q)[rollouts.mask].mean().item(), rel=1e-3)
    assert same(weights(start), weights(t.reference))
    ratio, A = p - rollouts.logprobs, t.last.advantage[..., None]
    surrogate, _ = clipo.clipped_surrogate(ratio, A, rollouts.mask, 0.2, 0.2)
    expected = -surrogate[rollouts.mask].mean().item() + 0.5 * metrics["kl"]
    assert metrics["policy_loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer(beta=0.0).reference is None


def test_gradients_are_clipped():
    t = trainer(max_grad_norm=0.01)
    t.policy_optimizer = torch.optim.SGD(t.policy.parameters(), lr=1.0)  # the step is the gradient
    before = weights(t.policy)
    t.config.lr = 1.0
    metrics = step(t, PROMPTS, ANSWERS)
    moved = math.sqrt(sum((p - before[name]).square().sum().item() for name, p in t.policy.named_parameters()))
    assert metrics["policy_grad_norm"] > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_warms_up_over_policy_steps():
    t = trainer(head_warmup_steps=1, lr_warmup_steps=4)
    rates = []
    for _ in range(6):
        step(t, PROMPTS, ANSWERS)
        rates.append(t.policy_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_metrics_are_complete_and_true():
    t = trainer()
    metrics = step(t, PROMPTS, ANSWERS)
    scored, r = t.last, t.last.rollouts
    length = r.mask.sum(-1).float()
    assert metrics["accuracy"] == scored.correct.float().mean()
    assert metrics["response_length"] == length.mean()
    assert metrics["entropy"] == pytest.approx((-r.logprobs.sum() / r.mask.sum()).item())
    both = zip(r.tokens.flatten(0, 1), r.mask.flatten(0, 1), strict=True)
    ended = torch.tensor([row[keep][-1].item() in (1, 3, 17, 31) for row, keep in both])
    assert metrics["cut_off"] == pytest.approx(1 - ended.float().mean().item()) and 0 < metrics["cut_off"] < 1
    paid, anchor = scored.agreement.reward, scored.agreement.pairs.anchor
    assert metrics["groups_without_contrast"] == pytest.approx(sum(not row.any() for row in anchor) / 4)
    stds = [values[row].std() for values, row in zip(paid, anchor, strict=True) if row.any()]
    assert metrics["contrastive_reward_std"] == pytest.approx(torch.stack(stds).mean().item(), rel=1e-4)
    assert set(metrics["seconds"]) == {"rollout", "verify", "contrast", "update"}
    assert all(v is None or isinstance(v, dict) or math.isfinite(v) for v in metrics.values())


def test_the_end_tokens_of_the_generation_config_and_of_the_tokenizer_both_stop_a_rollout():
    t = trainer()
    assert t.stop_ids == [1, 3, 17, 31]
    t.policy.generation_config.eos_token_id = None
    assert clipo.end_of_sequence_ids(t.policy, TOKENIZER) == [TOKENIZER.eos_token_id]
    t.policy.generation_config.eos_token_id = [7, 9]  # a base model's, say, whose tokenizer ends turns by another
    assert clipo.end_of_sequence_ids(t.policy, TOKENIZER) == [7, 9, TOKENIZER.eos_token_id]


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("samples_per_prompt", 1, "at least 2"),
        ("temperature", 0.0, "more than 0"),
        ("lr", float("nan"), "a finite number"),
        ("lr", -1.0, "at least 0"),
        ("clip_low", 1.5, "at most 1"),
        ("reward_floor", 0.5, "at most 0"),
        ("contrastive_kind", "simclr", "one of: infonce, supcon_out"),
        ("compute_dtype", "float16", "one of: auto, float32, bfloat16"),
    ],
)
def test_settings_out_of_range(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}; expected .*{re.escape(expected)}"):
        CLIPOConfig(**{name: value})


def test_the_defaults_are_the_papers_constants():
    c, m = CLIPOConfig(), CLIPOConfig.for_track("math")
    assert (c.prompts_per_step, c.mini_batch_prompts, c.samples_per_prompt) == (512, 256, 16)
    assert (c.lr, c.beta, c.policy_loss, c.d_embed) == (1e-6, 0.001, "grpo", 512)
    assert (c.tau, c.weight, c.reward_floor, c.head_warmup_steps) == (0.05, 0.2, -0.5, 14)
    assert (m.prompts_per_step, m.mini_batch_prompts, m.max_new_tokens, m.d_embed) == (128, 128, 4096, 2048)
    assert (m.head_warmup_steps, m.lr, m.weight) == (58, 1e-6, 0.2)
    paper = CLIPOConfig.for_track("toy", paper=True)
    assert (paper.contrastive_kind, paper.weight, paper.center_hidden) == ("infonce", 0.2, False)
    assert CLIPOConfig.for_track("toy").contrastive_kind == "decoupled"


def test_prompts_and_answers_must_pair_up():
    with pytest.raises(ValueError, match="4 prompts but 3 answers"):
        step(trainer(), PROMPTS, ANSWERS[:3])


def test_every_step_and_purpose_has_random_numbers_of_its_own():
    t = trainer()
    drawn = [torch.rand(3, generator=t.random(purpose)).tolist() for purpose in (0, 1)]
    step(t, PROMPTS, ANSWERS)
    drawn += [torch.rand(3, generator=t.random(purpose)).tolist() for purpose in (0, 1)]
    assert len({tuple(d) for d in drawn}) == 4


def by_answer(texts, answers):
    """Verdicts that are mixed within a group whose answer is "mixed", and all wrong where it is "dull"."""
    return [verdict and answer == "mixed" for verdict, answer in zip(even(texts), answers, strict=True)]


def matches(t, rollouts, prompts):
    """Were the rollouts of each group drawn from the policy `t` given this prompt?"""
    with torch.no_grad():
        expected = response_logprobs(t, prompts, rollouts)
    return torch.allclose(expected, rollouts.logprobs, atol=1e-4)


def test_dynamic_sampling_replaces_groups_without_reward_spread():
    t = trainer(are_correct=by_answer, resample_tries=3, lr=0.0, weight_decay=0.0)
    fresh = iter([([30, 31], "dull"), ([40], "mixed"), ([8, 9, 10], "mixed"), ([44], "mixed")])
    metrics = step(t, PROMPTS, ["dull", "mixed", "dull", "mixed"], fresh)
    # group 0: 4 (dull), then 6; group 2: 5
    assert t.resampled == {0, 2} and metrics["groups_resampled"] == 0.5
    assert next(fresh) == ([44], "mixed")
    rollouts = t.last.rollouts
    assert matches(t.policy, rollouts, [[8, 9, 10], PROMPTS[1], [40], PROMPTS[3]])
    assert not matches(t.policy, rollouts, PROMPTS)
    both = list(zip(rollouts.tokens.flatten(0, 1), rollouts.mask.flatten(0, 1), strict=True))
    texts = TOKENIZER.batch_decode([row[keep] for row, keep in both], skip_special_tokens=True)
    assert [text for group in t.last.texts for text in group] == texts
    assert t.last.correct.flatten().tolist() == even(texts)
    assert t.last.prompts == [[8, 9, 10], PROMPTS[1], [40], PROMPTS[3]]
    ends = torch.tensor(t.stop_ids)
    for row, keep in both:
        assert torch.isin(row[~keep], ends).all()  # padded as `generate` pads
        assert torch.isin(row[keep][:-1], ends).sum() == 0 and (torch.isin(row[keep][-1], ends) or keep.sum() == 8)


def test_dynamic_sampling_gives_up_after_its_tries_and_keeps_the_rest():
    t = trainer(are_correct=by_answer, resample_tries=2)
    fresh = iter([([30 + i], "dull") for i in range(9)])
    step(t, PROMPTS, ["dull", "mixed", "mixed", "dull"], fresh)
    assert t.last.prompts == [[32], *PROMPTS[1:3], [33]] and len(list(fresh)) == 5
    assert t.last.advantage[[0, 3]].abs().max() == 0


def test_without_tries_nothing_is_replaced_and_with_them_fresh_prompts_are_needed():
    t = trainer(are_correct=by_answer)
    step(t, PROMPTS, ["dull"] * 4)
    assert t.resampled == set()
    with pytest.raises(ValueError, match="resample_tries is set but `fresh` is None; expected an iterator"):
        step(trainer(resample_tries=1), PROMPTS, ANSWERS)


def test_the_overlong_penalty_reaches_the_reward():
    t = trainer(overlong_buffer=6)
    step(t, PROMPTS, ANSWERS)
    length = t.last.rollouts.mask.sum(-1)
    penalty = torch.tensor([[-max(0, n - 2) / 6 for n in row] for row in length.tolist()])
    torch.testing.assert_close(t.last.reward, t.last.correct + t.last.agreement.reward + penalty)
    assert penalty.min() == -1 and penalty.max() == 0
    with pytest.raises(ValueError, match=r"^overlong_buffer is 9; expected at most max_new_tokens, 8$"):
        trainer(overlong_buffer=9)


def test_the_shuffled_control_pays_the_same_rewards_to_other_anchors():
    real, control = trainer(), trainer(shuffle_contrast=True)
    for t in (real, control):
        step(t, PROMPTS, ANSWERS)
    a, b, anchors = real.last.agreement.reward, control.last.agreement.reward, real.last.agreement.pairs.anchor
    assert torch.equal(real.last.rollouts.tokens, control.last.rollouts.tokens) and not torch.equal(a, b)
    assert torch.equal(a.sort(-1).values, b.sort(-1).values)
    assert b[~anchors].abs().sum() == 0
    assert same(weights(real.head), weights(control.head))  # the head learns as ever
    torch.testing.assert_close(control.last.advantage, clipo.group_advantages(control.last.correct + b))


def test_shuffling_reaches_every_order_within_a_group_and_none_across():
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    chosen = torch.tensor([[True, True, False, True], [False, True, False, True]])
    random = torch.Generator().manual_seed(0)
    seen = {tuple(variants.shuffle_within_groups(values, chosen, random).flatten().tolist()) for _ in range(300)}
    orders = [(0, 1, 3), (0, 3, 1), (1, 0, 3), (1, 3, 0), (3, 0, 1), (3, 1, 0)]
    assert seen == {(a, b, 2, c, 4, p, 6, q) for a, b, c in orders for p, q in ((5, 7), (7, 5))}
