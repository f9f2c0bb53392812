"""Which models are served, and that those are served exactly: tokens and log-probs, in rollouts and in the update."""

import copy

import pytest
import torch
import transformers
from conftest import CONFIGS, PROMPTS, make_model
from transformers import CodeGenConfig, GPTJConfig, GPTNeoConfig, MptConfig

import clipo
import engine.rollouts as fast
from engine import update
from engine.check import check_model

SIZE = dict(vocab_size=50, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.2)
OLDER = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128)
OTHERS = {
    "gptj": GPTJConfig(**SIZE, **OLDER),
    "codegen": CodeGenConfig(**SIZE, **OLDER, n_ctx=128),
    "mpt": MptConfig(**SIZE, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "gpt-neo": GPTNeoConfig(
        **SIZE, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=128, intermediate_size=48,
    ),
}  # fmt: skip


def greedy(model, prompt, count):
    """Token by token, each by a whole forward pass: tokens and log-probs."""
    ids, logprobs = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            of_next = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(of_next.argmax()))
        logprobs.append(of_next[ids[-1]].item())
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("engine, by", [("plain", clipo), ("fast", fast)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen2", *OTHERS])
def test_a_model_is_served_exactly_or_refused(name, attention, engine, by):
    config = copy.deepcopy(CONFIGS.get(name) or OTHERS[name])  # which a model opened from it would change
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    except ValueError:
        pytest.skip(f"transformers has no {attention} for it")
    prompts, chosen = [*PROMPTS, [5 + 7 * i % 40 for i in range(20)]], dict(max_new_tokens=6, eos_token_id=49)
    try:
        check_model(model, engine)
        rollouts = by.generate(model, prompts, samples_per_prompt=1, temperature=0, **chosen)
    except (ValueError, NotImplementedError) as reason:
        refused = {("mpt", "fast"): "its log-probs in the update are off", ("gpt-neo", "fast"): "its logits are off"}
        eager = "its attention is 'eager', which adds the True and False of clipo.py's mask as numbers; open the model"
        assert refused.get((name, engine), eager if engine == "plain" else None) in str(reason)
        return
    assert (name, engine) not in (("mpt", "fast"), ("gpt-neo", "fast")) and (engine, attention) != ("plain", "eager")
    compute = clipo.response_logprobs if engine == "plain" else update.response_logprobs
    with torch.no_grad():
        again = compute(model, prompts, rollouts)
    for p, prompt in enumerate(prompts):
        kept = rollouts.mask[p, 0]
        tokens, logprobs = greedy(model, prompt, int(kept.sum()))
        assert rollouts.tokens[p, 0][kept].tolist() == tokens
        for found in (rollouts.logprobs, again):
            assert found[p, 0][kept].tolist() == pytest.approx(logprobs, abs=1e-4)


def test_a_process_that_allows_tf32_or_trains_is_checked_in_float32_and_left_as_it_was():
    model, seen = make_model(copy.deepcopy(CONFIGS["qwen2"])).train(), []
    model.register_forward_pre_hook(lambda *_: seen.append((torch.get_float32_matmul_precision(), model.training)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # what torch.backends.cuda.matmul.allow_tf32 = True does too
    try:
        check_model(model)
        assert torch.get_float32_matmul_precision() == "high" and model.training
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("highest", False)}


def test_the_plain_loop_refuses_an_eager_model_whoever_calls_it():
    model = make_model(copy.deepcopy(CONFIGS["qwen2"]))
    model.set_attn_implementation("eager")
    with pytest.raises(NotImplementedError, match="open the model with attn_implementation="):
        clipo.generate(model, PROMPTS, samples_per_prompt=1, max_new_tokens=2, eos_token_id=1)
