"""The rollout loop against model.generate and against one plain forward pass."""

import copy

import pytest
import torch
from conftest import PROMPTS, SIZE, flat
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, MambaConfig, Qwen3NextConfig

import engine.rollouts as fast
import engine.update
from engine.update import LOGITS_AT_ONCE, response_logprobs, token_logprobs
from lab.bench.growth import LargestTensor


def greedy_by_transformers(model, prompt, eos, length):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def responses(rollouts):
    rows = flat(rollouts)
    return [row[keep].tolist() for row, keep in zip(rows.tokens, rows.mask, strict=True)]


def often_chosen(model, count):
    """Token ids that greedy decoding produces, so that some rollouts end early and others do not."""
    seen = [t for p in PROMPTS for t in greedy_by_transformers(model, p, [SIZE["vocab_size"] - 1], 12)]
    return sorted(set(seen), key=seen.count)[-count:]


@pytest.mark.parametrize("number_of_eos", [1, 3])
def test_greedy_equals_transformers(model, number_of_eos):
    eos = often_chosen(model, number_of_eos)
    expected = [greedy_by_transformers(model, p, eos, 30) for p in PROMPTS]
    assert len({len(e) for e in expected}) > 1, "the test needs rollouts of different length"
    got = fast.generate(
        model, PROMPTS, samples_per_prompt=2, max_new_tokens=30, temperature=0,
        eos_token_id=eos[0] if number_of_eos == 1 else eos,
    )  # fmt: skip
    assert responses(got) == [e for e in expected for _ in range(2)]
    # Right-padded: the mask is a run of True, then False.
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in flat(got).mask)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_hidden_equal_a_full_forward_pass(model, temperature):
    got = fast.generate(
        model, PROMPTS, samples_per_prompt=5, max_new_tokens=20, temperature=temperature,
        eos_token_id=often_chosen(model, 3), generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    lengths = got.mask.sum(-1)
    assert lengths.min() < lengths.max()
    all_responses, got = responses(got), flat(got)
    for b, response in enumerate(all_responses):
        prompt = PROMPTS[got.group[b]]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        n, start = len(response), len(prompt)
        logprobs = (out.logits[0] / temperature).log_softmax(-1)
        expected = [logprobs[start - 1 + t, response[t]] for t in range(n)]
        torch.testing.assert_close(got.logprobs[b, :n], torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert not got.logprobs[b, n:].any()
        # All response tokens that were fed back; the only one's own state was never computed.
        states = out.hidden_states[-1][0]
        fed_back = states[start : start + n - 1] if n > 1 else states[start - 1 : start]
        torch.testing.assert_close(got.hidden[b], fed_back.mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [LOGITS_AT_ONCE, 7 * 50])  # all tokens, or chunks of seven
def test_response_logprobs_and_their_gradient_equal_a_plain_computation(model, at_once, monkeypatch):
    monkeypatch.setattr(engine.update, "LOGITS_AT_ONCE", at_once)
    model = copy.deepcopy(model)
    rollouts = fast.generate(
        model, PROMPTS, samples_per_prompt=2, max_new_tokens=12, eos_token_id=often_chosen(model, 3),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    got = response_logprobs(model, PROMPTS, rollouts, temperature=0.9)
    torch.testing.assert_close(got.sum(), got[rollouts.mask].sum())
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)) * rollouts.mask
    (got * weights).sum().backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    got = got.flatten(0, 1).detach()
    weights = weights.flatten(0, 1)
    for b, response in enumerate(responses(rollouts)):  # one by one, no padding, no cache
        prompt = PROMPTS[b // 2]
        logprobs = (model(input_ids=torch.tensor([prompt + response])).logits[0] / 0.9).log_softmax(-1)
        expected = torch.stack([logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(response)])
        torch.testing.assert_close(got[b, : len(response)], expected, atol=1e-4, rtol=1e-4)
        (expected * weights[b, : len(response)]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, atol=1e-3, rtol=1e-3)


def test_all_logits_never_exist_at_once(qwen2, monkeypatch):
    monkeypatch.setattr(engine.update, "LOGITS_AT_ONCE", 7 * 50)
    states = torch.randn(400, 32, requires_grad=True)
    with LargestTensor() as largest:
        token_logprobs(qwen2, states, torch.arange(400) % 50, 1.0).sum().backward()
    assert states.grad.abs().sum() > 0 and largest.elements == 400 * 32  # the states, not 400 * 50 logits


def test_same_seed_same_rollouts_and_others_do_not_matter(model):
    def sample(prompts, seed):
        rollouts = fast.generate(
            model, prompts, samples_per_prompt=4, max_new_tokens=16, eos_token_id=often_chosen(model, 2),
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return responses(rollouts)

    together = sample(PROMPTS, 0)
    assert together == sample(PROMPTS, 0)
    assert together != sample(PROMPTS, 1)
    assert together[:8] == sample(PROMPTS[:2], 0)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (20, 1.0), (0, 0.6), (30, 0.8)])
def test_sampled_frequencies_follow_the_softmax(qwen2, top_k, top_p):
    count, prompt, temperature = 20_000, PROMPTS[0], 3.0
    with torch.no_grad():
        probs = (qwen2(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    likeliest = probs.argsort(descending=True)[: top_k or None].tolist()
    total, kept = sum(probs[token].item() for token in likeliest), []
    for token in likeliest:  # one by one until they hold the share top_p of what top-k left
        if sum(probs[k].item() for k in kept) < top_p * total:
            kept.append(token)
    expected = torch.zeros_like(probs)
    expected[kept] = count * probs[kept] / probs[kept].sum()
    assert len(kept) > 5 and expected[kept].min() > 5  # the test's approximation needs that many
    got = fast.generate(
        qwen2, [prompt], samples_per_prompt=count, max_new_tokens=1, eos_token_id=1, temperature=temperature,
        top_k=top_k, top_p=top_p, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    observed = got.tokens.flatten().bincount(minlength=len(probs))
    assert observed.sum() == observed[kept].sum()
    assert chisquare(observed[kept].numpy(), expected[kept].numpy()).pvalue > 0.001


def test_top_k_and_top_p_cut_as_defined():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    uniform = torch.linspace(0, 0.999, 200)

    def reached(top_k, top_p):
        tokens, logprobs = fast.sample(logits.expand(200, -1), uniform, 1.0, top_k, top_p)
        torch.testing.assert_close(logprobs, logits[0][tokens])  # of the policy, not of what was left of it
        return sorted(set(tokens.tolist()))

    assert reached(0, 1.0) == [0, 1, 2, 3]
    assert reached(2, 1.0) == [0, 1]
    assert reached(0, 0.5) == [0, 1]  # 0.4 alone does not reach 0.5
    assert reached(0, 0.4) == [0]
    assert reached(3, 0.75) == [0, 1]  # of 0.9 that top-k left, 0.7 is 78%
    assert reached(1, 0.01) == [0]


@pytest.mark.parametrize("temperature, tables", [(1.0, 2), (0.7, 3), (0, 1)])
def test_sampling_reads_the_vocabulary_no_more_often_than_it_must(temperature, tables):
    made, logits = [], torch.randn(3, 999)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), named=None):
            result = function(*given, **(named or {}))
            made.extend([function] * (isinstance(result, torch.Tensor) and result.shape == (3, 999)))
            return result

    with Counter():
        fast.sample(logits, torch.rand(3), temperature, 0, 1.0)
    assert len(made) == tables, made  # probabilities; their sums; the logits divided


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    nearly_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    tokens, _ = fast.sample(logits, torch.tensor([0.0, 0.5, nearly_one]), 1.0, 0, 1.0)
    assert tokens.tolist() == [0, 2, 2]


def test_one_token_responses(qwen2):
    first = [greedy_by_transformers(qwen2, p, [49], 1)[0] for p in PROMPTS]
    cut = fast.generate(qwen2, PROMPTS, samples_per_prompt=1, max_new_tokens=1, eos_token_id=49, temperature=0)
    ended = fast.generate(qwen2, PROMPTS, samples_per_prompt=1, max_new_tokens=9, eos_token_id=first, temperature=0)
    for rollouts in (cut, ended):
        assert responses(rollouts) == [[t] for t in first]
        for b, prompt in enumerate(PROMPTS):  # the state that the token was sampled from
            with torch.no_grad():
                states = qwen2.model(input_ids=torch.tensor([prompt])).last_hidden_state
            torch.testing.assert_close(rollouts.hidden[b, 0], states[0, -1], atol=1e-4, rtol=1e-4)


REFUSED = {
    "state space": MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4),
    "linear attention": Qwen3NextConfig(
        **{**SIZE, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=16, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "rope that depends on the batch": LlamaConfig(
        **SIZE, num_key_value_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "logit scale": CohereConfig(**SIZE, num_key_value_heads=2, logit_scale=0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_the_cache_cannot_serve_is_refused(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(REFUSED[name])
    with pytest.raises((ValueError, NotImplementedError), match="cannot be served by KVCache"):
        fast.generate(model, PROMPTS, samples_per_prompt=1, max_new_tokens=2, eos_token_id=1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[3], []]}, "prompt 1 has no tokens"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"eos_token_id": []}, "eos_token_id is empty"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_new_tokens": 119}, "the longest prompt has 10 tokens and max_new_tokens is 119, but .* 128 positions"),
    ],
)
def test_arguments_out_of_range(qwen2, wrong, message):
    right = dict(prompts=PROMPTS, samples_per_prompt=1, max_new_tokens=2, eos_token_id=1)
    with pytest.raises(ValueError, match=message):
        fast.generate(qwen2, **{**right, **wrong})


def test_rollouts_under_bfloat16_autocast_are_close(qwen2):
    with torch.autocast("cpu", torch.bfloat16):
        got = fast.generate(
            qwen2, PROMPTS, samples_per_prompt=3, max_new_tokens=8, eos_token_id=1,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert got.logprobs.dtype == got.hidden.dtype == torch.float32
    with torch.no_grad():
        exact = response_logprobs(qwen2, PROMPTS, got)
    assert (got.logprobs - exact).abs().mean() < 0.2
