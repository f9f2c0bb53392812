"""On a GPU the same comes out as on a CPU. What needs one skips where there is none."""

import copy

import pytest
import torch
from test_batch import assert_same, roll_out

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
