"""The memory plan against what is measured."""

from itertools import product

import pytest
import torch
from conftest import CONFIGS, ROOT, make_model

import clipo
from config import CLIPOConfig
from engine import memory
from engine.update import response_logprobs
from lab.bench.load import Load, make_trainer, some_rollouts
from lab.bench.machine import Machine
from lab.bench.update import lasting_bytes

CPU = torch.device("cpu")


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


SMALL, LARGE, FULL, HALF = Load("1M", 4, 8, 48), Load("34M", 4, 8, 32), torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "load, dtype, recompute",
    [*((SMALL, *kind) for kind in product((FULL, HALF), (False, True))), (LARGE, FULL, False), (LARGE, HALF, True)],
    ids=str,
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(load, dtype, recompute):
    machine = Machine(CPU, dtype, runs=1, quick=True)
    t = make_trainer(machine, load, [1], recompute_activations=recompute, beta=0.001, micro_batch_tokens=512)
    prompts, rollouts = [[5] * 64] * load.P, some_rollouts(machine, load)
    rollouts.mask[:] = True  # as long as they may be
    advantage = torch.randn(rollouts.mask.shape[:2])
    t.update(prompts, rollouts, advantage)  # the optimiser has its moments from here on

    def roll_out():
        t.roll_out(prompts, [""] * len(prompts), t.random(0))

    measured = lasting_bytes(t) + max(
        memory.peak_bytes(roll_out, CPU), memory.peak_bytes(lambda: t.update(prompts, rollouts, advantage), CPU)
    )
    plan = memory.memory_plan(t.policy, t.config, 64, dtype == torch.bfloat16)
    assert plan.peak == pytest.approx(measured, rel=0.15)
    assert plan.lasting["weights"] == bytes_of(*t.policy.parameters())
    assert plan.lasting["reference"] == bytes_of(*t.reference.parameters())


def test_peak_bytes_counts_what_lives_at_one_time():
    def work():
        for _ in range(3):
            a = torch.empty(1000)
            b = torch.empty(500)
            del a, b

    assert memory.peak_bytes(work, CPU) == 6000


def test_recomputing_saves_memory():
    model = make_model(CONFIGS["qwen2"])
    tokens = torch.ones(1, 8, 100).long()
    rollouts = clipo.Rollouts(tokens, tokens.bool(), torch.zeros(1, 8, 100), torch.zeros(1, 8, 32))

    def forward_and_backward(recompute):
        return lambda: response_logprobs(model, [[3]], rollouts, recompute=recompute).sum().backward()

    kept, again = (memory.peak_bytes(forward_and_backward(recompute), CPU) for recompute in (False, True))
    assert again < 0.7 * kept


@pytest.mark.parametrize("name", list(memory.MODELS))
def test_the_named_models_fit_their_cards(name):
    shape, card = memory.MODELS[name]
    model = memory.without_weights(memory.qwen_config(*shape))
    config = CLIPOConfig(max_new_tokens=1024)
    assert config.samples_per_prompt == 16
    config = memory.fitting(model, config, config.max_prompt_tokens, True, room=1e9 * card)
    plan = memory.memory_plan(model, config, config.max_prompt_tokens, bfloat16=True)
    assert plan.peak < 0.95e9 * card
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    parts = [sum(part.values()) for part in (plan.lasting, plan.rollouts, plan.update)]
    cells = " | ".join(f"{size / 1e9:.1f}" for size in parts)
    assert (
        f"| {name} | {card} GB | {plan.peak / 1e9:.1f} GB | {cells} |" in (ROOT / "docs" / "real-models.md").read_text()
    )
    assert billions == pytest.approx({24: 0.494, 48: 1.544, 80: 3.086}[card], abs=1e-3)  # as their model cards say


@pytest.mark.parametrize("name, gigabytes, again", [("Qwen2.5-0.5B", 80, False), ("Qwen2.5-3B", 80, True)])
def test_activations_are_computed_again_only_where_they_would_not_fit(name, gigabytes, again):
    model = memory.without_weights(memory.qwen_config(*memory.MODELS[name][0]))
    config = CLIPOConfig(max_new_tokens=1024)
    assert memory.fitting(model, config, 512, True, 1e9 * gigabytes).recompute_activations is again
    for chosen in (True, False):  # who asks is obeyed
        asked = CLIPOConfig(recompute_activations=chosen, keep_captures=False)
        assert memory.fitting(model, asked, 512, True, 1e9 * gigabytes) == asked


def test_the_command(tmp_path, capsys):
    make_model(CONFIGS["llama"]).save_pretrained(tmp_path / "model")
    assert memory.main(["--model", tmp_path / "model", "--max-new-tokens", "7"]) == 0
    assert "responses of 7, activations kept\nmemory, planned: " in capsys.readouterr().out
    assert memory.main([]) == 0
    assert "Qwen2.5-3B, for a card of 80 GB; prompts of 512 tokens, responses of 1024, " in capsys.readouterr().out
    assert memory.main(["--model", tmp_path]) == 2
    assert capsys.readouterr().err.startswith(f"error: model {tmp_path} could not be opened: ")
