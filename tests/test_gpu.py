"""On a GPU the same comes out as on a CPU. What needs one skips where there is none."""

import copy

import pytest
import torch
from test_batch import assert_same, roll_out

import clipo

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_cpu(rollouts):
    return type(rollouts)(**{name: value.cpu() for name, value in vars(rollouts).items()})


@needs_gpu
def test_rollouts_by_replayed_graphs_equal_the_cpus(model):
    expected = roll_out(model, max_new_tokens=40)
    assert_same(on_cpu(roll_out(copy.deepcopy(model).cuda(), max_new_tokens=40, max_batch=7)), expected)


@needs_gpu
@pytest.mark.parametrize("max_batch", [3, None])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_waves_and_greedy_rollouts_equal_the_cpus(qwen2, max_batch, temperature):
    chosen = dict(max_new_tokens=64, max_batch=max_batch, temperature=temperature)
    expected = roll_out(qwen2, **chosen)
    for cuda_graphs in (True, False):
        got = roll_out(copy.deepcopy(qwen2).cuda(), **chosen, cuda_graphs=cuda_graphs)
        assert_same(on_cpu(got), expected)


@pytest.mark.parametrize("keys", [1, 15, 16, 40])
def test_rows_of_a_mask_begin_where_a_gpus_attention_wants_them(keys):
    mask = clipo.attention_mask(torch.arange(5)[None], torch.arange(keys)[None], None, torch.float32)
    assert mask.shape == (1, 1, 5, keys) and all(step % 16 == 0 for step in mask.stride()[:-1]) and mask.stride(-1) == 1


def test_a_gpus_cache_and_its_used_part_are_multiples_of_16():
    batch = clipo.Batch([[1, 2, 3]], torch.zeros(4).long(), 4, max_new_tokens=30, pace=clipo.PACE["cuda"])
    batch.rows = 4
    assert batch.slots == 48 and batch.reach() == 48


def test_cudnn_does_not_attend(qwen2):
    """Its backward pass can give NaN with a mask (pytorch #196678)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with clipo.our_attention(qwen2):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
