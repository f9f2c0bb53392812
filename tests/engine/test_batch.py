"""What the rollout loop does for speed changes nothing in what it returns."""

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, PROMPTS, SIZE, make_model
from torch import nn

import engine.forward as forward
import engine.rollouts as fast
import engine.update

EOS = [1, 3, 17, 31]


def roll_out(model, **chosen):
    given = dict(samples_per_prompt=5, max_new_tokens=24, eos_token_id=EOS, generator=torch.Generator().manual_seed(3))
    return fast.generate(model, PROMPTS, **{**given, **chosen})


def assert_same(got, expected):
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.hidden, expected.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_batch", [1, 3, 7, 100])
def test_waves_give_the_same_rollouts(model, max_batch):
    expected = roll_out(model)
    lengths = expected.mask.sum(-1)
    assert lengths.min() < lengths.max()
    assert_same(roll_out(model, max_batch=max_batch), expected)


@pytest.mark.parametrize("max_batch", [3, None])
@pytest.mark.parametrize(
    "pace",
    [
        fast.PACE["cuda"],
        fast.Pace(steps=16, bucket=8, while_waiting=0.5, in_the_tail=0.5),  # rows go on long after their rollout ended
        fast.Pace(steps=3, bucket=256, while_waiting=0.0, in_the_tail=0.0),  # until nobody works
        fast.Pace(steps=1, bucket=1, while_waiting=0.999, in_the_tail=0.999),  # never
    ],
)
def test_any_pace_gives_the_same_rollouts(model, pace, max_batch, monkeypatch):
    expected = roll_out(model)
    monkeypatch.setitem(fast.PACE, "cpu", pace)
    assert_same(roll_out(model, max_batch=max_batch), expected)


@pytest.mark.parametrize("max_batch", [6, None])
def test_rows_stay_within_max_batch_and_none_works_for_nobody(qwen2, max_batch, monkeypatch):
    rows = []
    roll_out(qwen2)  # the model is checked, once

    def counted(model, tokens, *others, **named):
        rows.extend([len(tokens)] * (tokens.shape[1] == 1 and not named))  # decode steps, not prefill
        return last_states(model, tokens, *others, **named)

    last_states = forward.last_states
    monkeypatch.setattr(forward, "last_states", counted)
    rollouts = roll_out(qwen2, max_batch=max_batch)
    assert max(rows) == (max_batch or 20)
    assert rollouts.mask.sum() <= sum(rows) <= rollouts.mask.sum() / fast.PACE["cpu"].in_the_tail


def test_a_rollout_that_ends_at_once_makes_room(qwen2):
    first = roll_out(qwen2, samples_per_prompt=1, max_new_tokens=1, temperature=0).tokens[:, 0, 0].tolist()
    got = roll_out(qwen2, eos_token_id=first, temperature=0, max_batch=2)
    assert got.tokens.flatten().tolist() == [token for token in first for _ in range(5)]


def test_the_cache_copies_rows_within_itself():
    source, target = forward.KVCache(4, 3), forward.KVCache(4, 5)
    for cache in (source, target):
        cache.begin(torch.arange(3)[None], used=3)
        cache.update(torch.randn(4, 2, 3, 6), torch.randn(4, 2, 3, 6), 0)
    keys = source.layers[0][0].clone()
    target.copy(source, torch.tensor([3, 3, 1]), slice(1, 4), slots=3)
    assert torch.equal(target.layers[0][0][1:, :, :3], keys[[3, 3, 1]])
    source.copy(source, torch.tensor([1, 2]), torch.tensor([0, 1]), slots=2)  # read and written places overlap
    assert torch.equal(source.layers[0][0][:2, :, :2], keys[[1, 2], :, :2])
    assert torch.equal(source.layers[0][0][:, :, 2], keys[:, :, 2])


@pytest.mark.parametrize(
    "working, now", [([0, 2, 5, 6], [0, 5, 2, 6]), ([4, 5], [4, 5]), ([0, 1], [0, 1]), ([], []), ([1, 6], [6, 1])]
)
def test_rows_that_go_on_close_ranks(working, now):
    """Only those from further back are moved, to places of ended ones."""
    batch = fast.Batch(7, 7, slots=3, max_new_tokens=2, pace=fast.PACE["cpu"], device=torch.device("cpu"))
    batch.cache.begin(torch.arange(2)[None], used=2)
    batch.cache.update(*torch.randn(2, 7, 2, 2, 6), 0)
    batch.table, batch.rows, batch.used = torch.arange(28).view(4, 7), 7, 2
    table, keys = batch.table.clone(), batch.cache.layers[0][0].clone()
    batch.keep(working)
    assert batch.rows == len(now) and batch.next(batch.rows).equal(table[:, now])
    assert batch.cache.layers[0][0][: len(now)].equal(keys[now])


def test_the_cache_is_gone_when_the_rollouts_are_there(qwen2, monkeypatch):
    """Without waiting for Python to look for cycles: the update wants its memory."""
    caches, allocate = [], fast.KVCache.__init__
    monkeypatch.setattr(
        fast.KVCache, "__init__", lambda self, *size: caches.append(weakref.ref(self)) or allocate(self, *size)
    )
    gc.disable()
    try:
        roll_out(qwen2)
        assert len(caches) >= 2 and not any(cache() for cache in caches)
    finally:
        gc.enable()


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_without_repeated_keys_equals_attention_with(heads, softcap):
    key, value = torch.randn(2, 3, heads, 7, 8).unbind(0)
    mask = forward.attention_mask(torch.tensor([[6], [3], [0]]), torch.arange(7)[None], None, torch.float32)
    query = torch.randn(3, 4, 1, 8)
    repeated = [kv.repeat_interleave(4 // heads, dim=1) for kv in (key, value)]
    scores = query @ repeated[0].transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = ((scores + mask).softmax(-1) @ repeated[1]).transpose(1, 2)
    got, _ = forward.cached_attention(None, query, key, value, mask, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(got, expected)


def test_the_update_computes_each_prompt_once(qwen2, monkeypatch):
    rollouts, fed, last_states = roll_out(qwen2), [], forward.last_states
    for module in (forward, engine.update):  # prompts, responses
        monkeypatch.setattr(module, "last_states", lambda *a, **n: fed.append(a[1].shape) or last_states(*a, **n))
    engine.update.response_logprobs(qwen2, PROMPTS, rollouts)
    longest = max(map(len, PROMPTS))
    assert fed == [(len(PROMPTS), longest - 1), rollouts.tokens.flatten(0, 1).shape]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, out, blocks", [(3, 64, 0), (4, 64, 2), (48, 64, 2), (49, 64, 0), (12, 65, 0)])
def test_in_blocks_is_a_linear_layer(monkeypatch, bias, rows, out, blocks):
    layer, inputs, used, bmm = nn.Linear(30, out, bias=bias), torch.randn(rows, 1, 30), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: used.append(len(a)) or bmm(a, b))
    got = forward.in_blocks(layer, inputs)
    assert got.is_contiguous() and used == [blocks] * bool(blocks)
    torch.testing.assert_close(got, F.linear(inputs, layer.weight, layer.bias))


def large_model():
    """Its output layer has 2**21 weights, enough for `in_blocks`."""
    return make_model(type(CONFIGS["qwen2"])(**{**SIZE, "vocab_size": 2**16}, num_key_value_heads=2))


def test_large_layers_are_served_in_blocks_and_give_the_same_tokens():
    model = large_model()
    with forward.serving(model):
        assert [name for name, layer in model.named_modules() if "forward" in vars(layer)] == ["lm_head"]
    got = fast.generate(model, [[5, 9]], samples_per_prompt=4, max_new_tokens=9, eos_token_id=0, temperature=0)
    expected = model.generate(torch.tensor([[5, 9]]), do_sample=False, max_new_tokens=9, eos_token_id=0)
    assert got.tokens[0].tolist() == [expected[0, 2:].tolist()] * 4


def test_an_rmsnorm_in_one_kernel_gives_what_the_models_own_gives(model):
    norms = [layer for layer in model.modules() if forward.is_plain_rmsnorm(layer)]
    assert bool(norms) == (model.config.model_type not in ("gemma2", "gpt2", "gpt_neox"))
    for layer in norms:
        weight = torch.rand_like(layer.weight)
        with torch.no_grad(), mock.patch.object(layer, "weight", nn.Parameter(weight)):
            states = torch.randn(2, 3, len(weight))
            torch.testing.assert_close(forward.one_kernel(layer, states), layer(states), atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_all_its_norms_are_one_kernel_and_then_its_own_again(qwen2):
    model = copy.deepcopy(qwen2).cuda()
    with forward.serving(model):
        served = [name for name, layer in model.named_modules() if "forward" in vars(layer)]
    assert len(served) == 2 * model.config.num_hidden_layers + 1 and all("norm" in name for name in served)
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_bfloat16_products_are_left_to_the_library():
    with torch.autocast("cpu", torch.bfloat16), forward.serving(model := large_model()):
        assert "forward" not in vars(model.lm_head)
    with forward.serving(model.bfloat16()):
        assert "forward" not in vars(model.lm_head)


def test_the_model_is_left_as_it_was_even_after_an_error(monkeypatch):
    model = large_model().train()
    attention = model.config._attn_implementation
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(fast, "sample", lambda *_: 1 / 0)
        try:
            fast.generate(model, PROMPTS, samples_per_prompt=1, max_new_tokens=2, eos_token_id=1)
        except ZeroDivisionError:
            assert broken
        assert model.training and model.config._attn_implementation == attention
        assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_attends_in_float32_on_a_cpu(autocast):
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    given = [part.bfloat16() for part in (query, key, value, torch.zeros(2, 1, 5, 7))]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, _ = forward.cached_attention(None, *given)
    expected, _ = forward.cached_attention(None, *(part.float() for part in given))
    assert torch.equal(got, expected.bfloat16())


def test_bfloat16_weights(qwen2):
    model = copy.deepcopy(qwen2).bfloat16()
    got = roll_out(model)
    assert got.logprobs.dtype == got.hidden.dtype == torch.float32
    with torch.no_grad():
        exact = engine.update.response_logprobs(qwen2, PROMPTS, got)
    assert (got.logprobs - exact).abs().mean() < 0.2


def decode_steps(model, monkeypatch, max_batch, **chosen):
    """(rows, how many of them work for no rollout) of each decode step of `roll_out` at a GPU's pace."""
    steps, following = [], fast.Batch.next

    def noted(batch, rows):
        table = following(batch, rows)
        steps.append((rows, int((table[0] == batch.spare).sum())))
        return table

    with monkeypatch.context() as patch:
        patch.setitem(fast.PACE, "cpu", fast.PACE["cuda"]._replace(steps=1))
        patch.setattr(fast.Batch, "next", noted)
        roll_out(model, max_batch=max_batch, **chosen)
    return steps[::2]  # `advance` asks again


def test_in_the_tail_of_a_gpu_rows_are_halved(qwen2, monkeypatch):
    rows = [rows for rows, _ in decode_steps(qwen2, monkeypatch, None)]
    assert set(rows) <= {20, 16, 8, 4, 2, 1} and len(set(rows)) > 2 and rows == sorted(rows, reverse=True)


def test_while_others_wait_few_rows_idle(qwen2, monkeypatch):
    steps = decode_steps(qwen2, monkeypatch, 10, samples_per_prompt=25)  # 100 rollouts in 10 rows
    full = [idle for rows, idle in steps[: len(steps) // 2] if rows == 10]
    assert len(full) > 10 and sum(full) / len(full) < 2
