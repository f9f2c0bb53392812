"""The policy update against plain computations in float64 and against TRL, in bfloat16, in little memory."""

import copy
import gc
import importlib.util

import pytest
import torch
import transformers
from conftest import CONFIGS, PROMPTS, flat, make_model
from test_step import ANSWERS, TOKENIZER, same, step, trainer, weights

import clipo
import engine.forward as forward
import engine.rollouts as fast
import engine.update as update
import variants
from config import POLICY_LOSSES, CLIPOConfig
from engine.guard import Trainer

FORMS = {  # ours: TRL's names for the same. (It averages the KL as it does the surrogate, we always over tokens.)
    "grpo": dict(loss_type="bnpo", beta=0.1),
    "dr_grpo": dict(loss_type="dr_grpo", beta=0.0),
    "dapo": dict(loss_type="bnpo", epsilon_high=0.28, beta=0.1),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0.0),
}


def off_policy(kind="grpo", **settings):
    """A trainer whose policy has moved since it made these rollouts, and advantages of both signs."""
    t = trainer(**{"policy_loss": kind, "beta": 0.1, **settings})
    step(t, PROMPTS, ANSWERS)
    rollouts = t.last.rollouts
    return t, rollouts, t.last.advantage


AVERAGED = {"grpo": "tokens", "dr_grpo": "places", "dapo": "tokens", "gspo": "responses", "gmpo": "responses"}


def micro_batched_gradient(t, rollouts, advantage, budget):
    """The trainer's own gradient, without its guard."""
    models = t.policy, t.reference
    return t.unguarded.policy_gradient(*models, PROMPTS, rollouts, advantage, t.config, micro_batch_tokens=budget)


def gradient(t):
    return {name: p.grad.double().clone() for name, p in t.policy.named_parameters()}


def plain_float64(t, kind, rollouts, advantage):
    """Loss and gradient as the formulas say, a response at a time, without prompts shared, padding or a mask."""
    policy, reference = copy.deepcopy(t.policy).double(), copy.deepcopy(t.reference).double()
    form, tokens, count = variants.POLICY_LOSSES[kind], int(rollouts.mask.sum()), advantage.numel()
    rows, averaged_over = flat(rollouts), AVERAGED[kind]
    loss = 0.0
    for b in range(count):
        prompt, response = PROMPTS[rows.group[b]], rows.tokens[b][rows.mask[b]]
        ids = torch.tensor([[*prompt, *response.tolist()]])

        def of(model, ids=ids, prompt=prompt, response=response):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
            return logits.log_softmax(-1)[torch.arange(len(response)), response]

        now, old, A = of(policy), rows.logprobs[b, : len(response)].double(), advantage.flatten()[b].double()
        ratio = (now - old).exp()
        if kind == "gspo":
            ratio = (now - old).mean().exp().expand(len(response))
        if kind == "gmpo":
            bound = (now - old).clamp(max=0.4) if A > 0 else (now - old).clamp(min=-0.4)
            surrogate = (bound.mean().exp() * A).expand(len(response))
        else:
            surrogate = torch.minimum(ratio * A, ratio.clamp(1 - form.low, 1 + form.high) * A)
        share = {"tokens": 1 / tokens, "responses": 1 / (count * len(response)), "places": 1 / (count * 8)}
        with torch.no_grad():
            frozen = of(reference)
        kl = (frozen - now).exp() - (frozen - now) - 1
        loss = loss - share[averaged_over] * surrogate.sum() + 0.1 * kl.sum() / tokens
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("budget", [1000, 25])  # one micro-batch, and many
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_loss_and_gradient_equal_a_plain_float64_computation(kind, recompute, budget):
    t, rollouts, advantage = off_policy(kind, recompute_activations=recompute)
    expected_loss, expected = plain_float64(t, kind, rollouts, advantage)
    t.policy.double(), t.reference.double()
    totals = micro_batched_gradient(t, rollouts, advantage, budget)
    assert totals["clip_fraction"] > 0, "the test needs tokens that are clipped"
    assert totals["policy_loss"] == pytest.approx(expected_loss, abs=1e-6)
    for name, got in gradient(t).items():
        torch.testing.assert_close(got, expected[name], atol=1e-6 * expected[name].abs().max().item(), rtol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed (lab/requirements.txt)")
@pytest.mark.parametrize("kind", list(FORMS))
def test_the_loss_and_its_gradient_equal_trls(kind, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    t, rollouts, advantage = off_policy(kind, beta=FORMS[kind]["beta"])
    totals = micro_batched_gradient(t, rollouts, advantage, 25)
    rows = flat(rollouts)
    (start := make_model(CONFIGS["qwen2"])).save_pretrained(tmp_path / "start")  # TRL opens its reference by name
    policy = copy.deepcopy(t.policy)
    policy.config._name_or_path = str(tmp_path / "start")
    theirs = GRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
            use_cpu=True, bf16=False, report_to=[], activation_checkpointing=False,
            use_bias_correction_kl=False, **FORMS[kind],  # the paper has the plain k3
        ),
        train_dataset=Dataset.from_list([{"prompt": "Tom"}]),
        processing_class=copy.deepcopy(TOKENIZER),
    )  # fmt: skip
    theirs.current_gradient_accumulation_steps = 1  # which its training loop would have set
    longest = max(map(len, PROMPTS))
    asked = [PROMPTS[g] for g in rows.group.tolist()]
    with torch.no_grad():
        reference = update.response_logprobs(start, PROMPTS, rollouts)
    loss = theirs.compute_loss(
        policy.train(),
        {
            "prompt_ids": torch.tensor([[0] * (longest - len(p)) + p for p in asked]),
            "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked]),
            "completion_ids": rows.tokens,
            "completion_mask": rows.mask.long(),
            "advantages": advantage.flatten(),
            "old_per_token_logps": rows.logprobs,
            "ref_per_token_logps": reference.flatten(0, 1),
        },
    )
    policy.zero_grad()
    loss.backward()
    assert totals["policy_loss"] == pytest.approx(loss.item(), abs=1e-4)
    for (name, p), got in zip(policy.named_parameters(), gradient(t).values(), strict=True):
        torch.testing.assert_close(got.float(), p.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_recomputed_activations_change_no_bit(name):
    gradients = []
    for recompute in (False, True):
        model = make_model(CONFIGS[name])
        rollouts = fast.generate(
            model, PROMPTS, samples_per_prompt=3, max_new_tokens=9, eos_token_id=[1, 2, 3],
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        update.response_logprobs(model, PROMPTS, rollouts, recompute=recompute).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert not any("forward" in vars(module) for module in model.modules())  # nothing of it stays
    assert len(gradients[0]) > 10 and same(*gradients)


def test_recomputed_layers_attend_as_they_did(qwen2, monkeypatch):
    """The backward pass runs after `our_attention` has ended; the layers that run again in it must not notice."""
    calls, real = [], forward.cached_attention

    def watched(*given, **named):
        calls.append(given[1].shape)
        return real(*given, **named)

    rollouts = fast.generate(qwen2, PROMPTS, samples_per_prompt=3, max_new_tokens=9, eos_token_id=[1, 2, 3])
    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "clipo", watched)
    logprobs = update.response_logprobs(qwen2, PROMPTS, rollouts, recompute=True)
    first_pass = list(calls)
    logprobs.sum().backward()
    qwen2.zero_grad()
    assert len(first_pass) == 6  # two passes of three layers, each once more
    assert sorted(calls[6:]) == sorted(first_pass)


def test_in_bfloat16_every_mini_batch_sees_the_weights_that_the_one_before_left(monkeypatch):
    """Autocast keeps its bfloat16 copies as long as its context lasts; a step of the optimiser inside is not seen."""
    t = trainer(compute_dtype="bfloat16", mini_batch_prompts=2, lr=0.01)
    seen, real = [], update.row_logprobs

    def watched(model, *given, **chosen):
        got = real(model, *given, **chosen)
        with torch.no_grad():
            seen.append((got.detach(), real(copy.deepcopy(model), *given, **chosen)))
        return got

    monkeypatch.setattr(update, "row_logprobs", watched)
    step(t, PROMPTS, ANSWERS)
    assert len(seen) == 2
    for got, expected in seen:
        torch.testing.assert_close(got, expected)


def test_in_bfloat16_weights_moments_and_small_updates_are_float32():
    t = trainer(compute_dtype="bfloat16", beta=0.1, lr=1e-6, weight_decay=0.0)
    before = weights(t.policy)
    step(t, PROMPTS, ANSWERS)
    moments = [m for state in t.policy_optimizer.state.values() for m in state.values()]
    assert {p.dtype for p in t.policy.parameters()} == {m.dtype for m in moments} == {torch.float32}
    assert {p.dtype for p in t.reference.parameters()} == {torch.bfloat16}
    buffers = list(zip(t.reference.buffers(), t.policy.buffers(), strict=True))  # the rotary embedding's frequencies
    assert buffers and all(torch.equal(a, b) for a, b in buffers)
    moved = torch.cat([(p - before[name]).flatten() for name, p in t.policy.named_parameters()])
    lost = torch.cat([(p.bfloat16() == before[name].bfloat16()).flatten() for name, p in t.policy.named_parameters()])
    assert (moved != 0).float().mean() > 0.9 and lost.float().mean() > 0.9  # what bfloat16 weights would not have seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_in_both(dtype):
    """What is rewarded, an even number of words, becomes frequent."""
    t = trainer(compute_dtype=dtype, weight=0.0, lr=3e-3, samples_per_prompt=16)
    accuracy = [step(t, PROMPTS, ANSWERS)["accuracy"] for _ in range(20)]
    assert accuracy[0] < 0.8 and sum(accuracy[-5:]) / 5 > 0.9


def test_the_cache_is_freed_before_the_update(monkeypatch):
    def caches():
        return sum(type(thing) is forward.KVCache for thing in gc.get_objects())

    t, alive, real = trainer(), [], clipo.CLIPO.update
    gc.collect()
    before = caches()

    def watched(*given):
        alive.append(caches())
        return real(t, *given)

    monkeypatch.setattr(t, "update", watched)
    gc.disable()  # what only the collector would free is not freed
    try:
        step(t, PROMPTS, ANSWERS)
    finally:
        gc.enable()
    assert alive == [before]


def test_no_micro_batch_exceeds_its_budget_prompts_included(monkeypatch):
    """Short answers to long prompts: each prompt is computed once in every micro-batch that has one of its answers."""
    model, sizes = make_model(CONFIGS["qwen2"]), []
    prompts, shape = [[5] * 60 + [g] for g in range(8)], (8, 2, 4)
    tokens, mask = torch.ones(shape).long(), torch.ones(shape).bool()
    rollouts = clipo.Rollouts(tokens, mask, torch.zeros(shape), torch.zeros(8, 2, 32))
    row_logprobs = update.row_logprobs

    def counted(model, prompts, origin, tokens, *more):
        sizes.append(tokens.numel() + 60 * len(origin.unique()))
        return row_logprobs(model, prompts, origin, tokens, *more)

    monkeypatch.setattr(update, "row_logprobs", counted)
    config = CLIPOConfig(micro_batch_tokens=150, beta=0, samples_per_prompt=2, max_new_tokens=4)
    Trainer(model, TOKENIZER, None, config).update(prompts, rollouts, torch.ones(8, 2))
    assert max(sizes) <= 150 and sum(sizes) >= 16 * 4 + 8 * 60
