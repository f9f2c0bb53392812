"""clipo.py says what is computed, engine/ computes it faster: two paths, one method."""

import copy
import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, PROMPTS, make_model
from test_batch import EOS
from test_step import ANSWERS, SMALL, TOKENIZER, even, same, step, weights

import clipo
import engine.rollouts as fast
import engine.update as update
import variants
from config import POLICY_LOSSES, CLIPOConfig
from engine.guard import Trainer

FULL = [name for name in CONFIGS if name not in ("qwen2-some-sliding", "mistral-sliding", "gemma2", "phi3")]
TWINS = {
    clipo.generate: fast.generate,
    clipo.sample: fast.sample,
    clipo.response_logprobs: update.response_logprobs,
    clipo.policy_gradient: update.policy_gradient,
}


@pytest.fixture(params=FULL)
def full(request):
    """A model that both can serve."""
    return make_model(CONFIGS[request.param])


def both(model, **chosen):
    """Rollouts by the plain loop and by the engine, from the same random numbers."""
    given = dict(samples_per_prompt=5, max_new_tokens=24, eos_token_id=EOS)
    for generate, own in ((clipo.generate, {}), (fast.generate, chosen.pop("own", {}))):
        yield generate(model, PROMPTS, **given, **chosen, **own, generator=torch.Generator().manual_seed(3))


def assert_same_rollouts(plain, engine, tolerance):
    assert torch.equal(plain.tokens, engine.tokens) and torch.equal(plain.mask, engine.mask)
    for name in ("logprobs", "hidden"):
        close = getattr(plain, name), getattr(engine, name)
        torch.testing.assert_close(*close, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [0, 0.8, 1.0])
def test_the_same_tokens_logprobs_and_h(full, temperature):
    plain, engine = both(full, temperature=temperature)
    if temperature:
        assert plain.mask.sum(-1).min() < plain.mask.sum(-1).max()
    assert_same_rollouts(plain, engine, 1e-4)


@pytest.mark.parametrize("max_batch", [1, 3, 7, None])
@pytest.mark.parametrize("pace", ["cpu", "cuda"])
def test_whatever_the_waves_and_the_pace(qwen2, max_batch, pace, monkeypatch):
    monkeypatch.setitem(fast.PACE, "cpu", fast.PACE[pace])
    for temperature in (0, 1.0):
        plain, engine = both(qwen2, temperature=temperature, own={"max_batch": max_batch})
        assert_same_rollouts(plain, engine, 1e-4)


def test_rounding_is_all_that_differs(qwen2):
    """In float64 they agree as far as float32 can hold what they return; each keeps log-probs and h in it."""
    plain, engine = both(copy.deepcopy(qwen2).double())
    assert_same_rollouts(plain, engine, 1e-6)
    logits, uniform = torch.randn(4, 50, dtype=torch.float64), torch.rand(4)
    for got, expected in zip(
        fast.sample(logits, uniform, 0.7, 0, 1.0), clipo.sample(logits, uniform, 0.7), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_what_the_plain_loop_cannot_serve_it_refuses(monkeypatch):
    given = dict(samples_per_prompt=1, max_new_tokens=2, eos_token_id=1)
    for name in set(CONFIGS) - set(FULL):
        with pytest.raises(NotImplementedError, match="without window or softcap; use the engine"):
            clipo.generate(make_model(CONFIGS[name]), PROMPTS, **given)
    for name in FULL:
        clipo.generate(make_model(CONFIGS[name]), PROMPTS, **given)


@pytest.mark.parametrize("at_once", [update.LOGITS_AT_ONCE, 7 * 50])  # all tokens, or chunks of seven
def test_the_same_logprobs_of_given_responses(full, at_once, monkeypatch):
    monkeypatch.setattr(update, "LOGITS_AT_ONCE", at_once)
    rollouts, _ = both(full)
    for model, tolerance in ((full, 1e-4), (full.double(), 1e-9)):
        plain, engine = (f(model, PROMPTS, rollouts, temperature=0.9) for f in TWINS_OF_LOGPROBS)
        torch.testing.assert_close(engine.to(plain.dtype), plain, atol=tolerance, rtol=tolerance)


TWINS_OF_LOGPROBS = (clipo.response_logprobs, update.response_logprobs)


def in_float64(model):
    """A copy that computes in float64 throughout. (transformers' RMSNorm computes in float32 whatever it is given.)"""
    model = copy.deepcopy(model).double()
    for norm in model.modules():
        if type(norm).__name__ == "Qwen2RMSNorm":
            norm.forward = partial(lambda n, x: n.weight * F.rms_norm(x, x.shape[-1:], eps=n.variance_epsilon), norm)
    return model


def gradient_by(policy_gradient, policy, reference, rollouts, advantages, config, **chosen):
    policy.zero_grad()
    stats = policy_gradient(policy, reference, PROMPTS, rollouts, advantages, config, **chosen)
    return stats, {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batch_tokens", [30, 80, 10_000])
@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_the_same_gradient_however_it_is_cut(qwen2, kind, micro_batch_tokens, recompute):
    rollouts, _ = both(qwen2)
    advantages = torch.randn(4, 5, dtype=torch.float64)
    policy = in_float64(qwen2)
    reference = copy.deepcopy(policy).requires_grad_(False)
    for parameter in policy.parameters():  # off policy: ratios are not all 1
        parameter.data += 0.02 * torch.randn_like(parameter)
    config = CLIPOConfig(policy_loss=kind, beta=0.1, max_new_tokens=24, recompute_activations=recompute)
    given, form = (policy, reference, rollouts, advantages, config), variants.policy_loss(config)
    plain_stats, plain = gradient_by(clipo.policy_gradient, *given, form=form)
    cut = dict(form=form, micro_batch_tokens=micro_batch_tokens)
    stats, engine = gradient_by(update.policy_gradient, *given, **cut)
    assert stats.pop("clip_fraction") == pytest.approx(plain_stats.pop("clip_fraction"), abs=1e-6) != 0
    assert stats == pytest.approx(plain_stats, abs=1e-9)
    for name, expected in plain.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(engine[name], expected, atol=1e-9 * scale, rtol=1e-9, msg=name)


def trainer(engine, **settings):
    model = make_model(CONFIGS["qwen2"])
    model.generation_config.eos_token_id = [1, 3, 17, 31]
    chosen = {**SMALL, "weight_decay": 0.0, "lr": 1e-4, **settings}
    return Trainer(in_float64(model), TOKENIZER, even, CLIPOConfig(**chosen), engine)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "mini_batch_prompts": 2}, {"policy_loss": "gspo"}], ids=str)
def test_three_steps_end_in_the_same_weights(settings):
    plain, engine = trainer("plain", **settings), trainer("fast", **settings, micro_batch_tokens=50)
    start = weights(plain.policy)
    for _ in range(3):
        a, b = (step(t, PROMPTS, ANSWERS) for t in (plain, engine))
        assert torch.equal(plain.last.rollouts.tokens, engine.last.rollouts.tokens)
        # (AdamW's first steps have the size of lr whatever the gradient's is: rounding shows where that is next to 0.)
        assert a["policy_grad_norm"] == pytest.approx(b["policy_grad_norm"], rel=1e-4)
    moved = torch.cat([(p - start[name]).abs().flatten() for name, p in plain.policy.named_parameters()])
    apart = [
        (p - q).abs().flatten() for p, q in zip(plain.policy.parameters(), engine.policy.parameters(), strict=True)
    ]
    assert moved.mean() > 1e-4 and torch.cat(apart).mean() < 1e-3 * moved.mean()
    for p, q in zip(plain.head.parameters(), engine.head.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "mini_batch_prompts": 2}], ids=str)
def test_the_guard_around_the_plain_parts_changes_no_bit(settings):
    guarded = trainer("plain", **settings)
    bare = clipo.CLIPO(in_float64(make_model(CONFIGS["qwen2"])), TOKENIZER, even, guarded.config)
    bare.stop_ids = guarded.stop_ids
    for _ in range(3):
        step(guarded, PROMPTS, ANSWERS)
        scored = bare.step(PROMPTS, ANSWERS)
        assert torch.equal(scored.advantage, guarded.last.advantage) and scored.texts == guarded.last.texts
    assert same(weights(bare.policy), weights(guarded.policy)) and same(weights(bare.head), weights(guarded.head))
    assert not same(weights(bare.policy), weights(make_model(CONFIGS["qwen2"]).double()))


@pytest.mark.parametrize("plain", TWINS, ids=lambda f: f.__name__)
def test_whoever_calls_the_plain_function_can_call_its_twin(plain):
    own, twins = (inspect.signature(f).parameters for f in (plain, TWINS[plain]))
    assert list(twins)[: len(own)] == list(own) or set(own) <= set(twins)
    for name, parameter in own.items():
        assert (twins[name].default, twins[name].kind) == (parameter.default, parameter.kind)
