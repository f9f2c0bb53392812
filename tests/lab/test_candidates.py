"""lab.bench.candidates: each way computes the same as what it would replace."""

from functools import partial

import pytest
import torch

from engine.update import response_logprobs
from lab.bench import candidates
from lab.bench.load import Load, make_prompts, make_trainer, some_rollouts
from lab.bench.machine import Machine

MACHINE = Machine(torch.device("cpu"), torch.float32, runs=1, quick=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_ways_to_attend_with_one_query_agree():
    keys, values = torch.randn(2, 3, 2, 20, 8).unbind(0)
    q, position = torch.randn(3, 2, 3, 8), torch.tensor([19, 7, 0])
    expected = torch.stack([
        torch.nn.functional.scaled_dot_product_attention(q[i], keys[i, :, : n + 1], values[i, :, : n + 1])
        for i, n in enumerate(position)
    ])  # fmt: skip
    ways = candidates.one_query_ways(MACHINE, position, slots=20)
    del ways["varlen_attn, a row is a page"]  # a GPU's
    assert len(ways) == 3
    for make in ways.values():
        torch.testing.assert_close(make()(q, keys, values), expected)


def test_packed_rows_give_the_updates_logprobs_and_gradient():
    load = Load("1M", 3, 4, 24)
    model, prompts = make_trainer(MACHINE, load, [1]).policy, make_prompts(load)
    rollouts, before = some_rollouts(MACHINE, load), model.config._attn_implementation
    weights, found = torch.randn(rollouts.mask.shape), []
    for compute in (response_logprobs, candidates.packed_logprobs):
        model.zero_grad()
        logprobs = compute(model, prompts, rollouts)
        (logprobs * weights).sum().backward()
        found.append((logprobs.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == before


def test_compiled_parts_are_compiled_once_for_all_layers(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, and no C++ written
    torch.compiler.reset()
    counters.clear()
    load = Load("1M", 2, 2, 16)
    model, given = make_trainer(MACHINE, load, [1]).policy, (make_prompts(load), some_rollouts(MACHINE, load))
    expected = response_logprobs(model, *given)
    with candidates.parts_compiled(model):
        torch.testing.assert_close(response_logprobs(model, *given), expected, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 4  # norms and MLPs, of prompts and of responses


def test_what_is_not_possible_says_so_in_its_row():
    rows = candidates.attention_table(MACHINE)
    assert [row["way"] for row in rows if "not possible here" in row] == ["varlen_attn, a row is a page"]
    ways = candidates.passes_table(MACHINE, Load("1M", 2, 2, 16))
    assert [row["way"] for row in ways if "s" in row] == ["as it is", "norms and MLPs compiled", "packed rows"]
