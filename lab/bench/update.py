"""The update alone: how far from the machine's best, and how near the memory plan."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

import clipo
from engine.guard import Trainer
from engine.memory import MODELS, fitting, memory_plan, peak_bytes
from lab.bench.load import SIZES, Load, make_prompts, make_trainer, some_rollouts
from lab.bench.machine import Machine, compare


def update_loads(machine: Machine) -> list[Load]:
    if machine.quick:
        return [Load("1M", 2, 4, 16)]
    if machine.on_gpu:
        return [Load("0.5B", 16, 16, 1024), Load("1.5B", 16, 16, 1024), Load("3B", 16, 16, 1024)]
    return [Load("1M", 16, 16, 128), Load("34M", 4, 16, 128), Load("0.5B", 2, 4, 64)]


def update_flops(model, prompts: Sequence[Sequence[int]], rollouts: clipo.Rollouts) -> float:
    """Of forward and backward pass: three forward passes' worth. What is computed twice to save memory counts once."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    output = model.get_output_embeddings().weight.numel()  # a prompt's tokens need no logits
    lengths = rollouts.mask.sum(-1).flatten().tolist()
    before = [len(ids) for ids in prompts for _ in range(rollouts.mask.shape[1])]
    looked_at = sum(n * start + n * n // 2 for n, start in zip(lengths, before, strict=True))
    forward = 2 * weights * sum(lengths) + 2 * (weights - output) * sum(map(len, prompts))
    forward += 4 * looked_at * model.config.hidden_size * model.config.num_hidden_layers
    return 3 * forward


def lasting_bytes(trainer: Trainer) -> int:
    """Weights, reference and the policy optimiser's moments."""
    moments = [value for state in trainer.policy_optimizer.state.values() for value in state.values()]
    models = [model for model in (trainer.policy, trainer.reference) if model is not None]
    return sum(t.nbytes for t in (*moments, *(p for model in models for p in model.parameters())))


def update_table(machine: Machine, loads: Sequence[Load] | None = None) -> list[dict]:
    """The policy update on given rollouts, with activations kept and computed again.

    The memory plan is for rollouts that are all as long as they may be; these are not.
    """
    rate, _ = machine.rates()
    return [
        update_row(machine, load, recompute, rate)
        for load in loads or update_loads(machine)
        for recompute in ((True,) if load.size in ("1.5B", "3B") else (False, True))  # kept, theirs would not fit
    ]


def update_row(machine: Machine, load: Load, recompute: bool, rate: float) -> dict:
    """One line of it; `rate` is the machine's, in flops per second."""
    at_once = min(8192, load.P * load.G * load.T // 2)  # so that there are several micro-batches
    trainer = make_trainer(machine, load, [1], recompute_activations=recompute, micro_batch_tokens=at_once)
    prompts, rollouts = make_prompts(load), some_rollouts(machine, load)
    advantage = torch.randn(rollouts.mask.shape[:2], device=machine.device)

    def update(_=None) -> None:
        trainer.update(prompts, rollouts, advantage)

    update()  # the optimiser's moments exist from here on
    peak = peak_bytes(update, machine.device)
    seconds = statistics.median(compare(machine, {"update": update})["update"])
    plan = memory_plan(trainer.policy, trainer.config, max(map(len, prompts)), machine.dtype == torch.bfloat16)
    return {
        "load": str(load),
        "activations": "computed again" if recompute else "kept",
        "s": f"{seconds:.2f}",
        "tokens/s": f"{int(rollouts.mask.sum()) / seconds:,.0f}",
        "of the matmul rate": f"{update_flops(trainer.policy, prompts, rollouts) / seconds / rate:.0%}",
        "GB in all, planned": f"{(sum(plan.lasting.values()) + sum(plan.update.values())) / 1e9:.2f}",
        "measured": f"{(lasting_bytes(trainer) + peak) / 1e9:.2f}",
    }


def memory_row(machine: Machine, load: Load, prompt: int) -> dict:
    """The plan of train.py against the peak, where all prompts and rollouts are as long as they may be."""
    settings = dict(recompute_activations=None, micro_batch_tokens=16384, beta=0.001)  # as by default
    trainer = make_trainer(machine, load, [1], **settings)
    bfloat16, cards = machine.dtype == torch.bfloat16, dict(MODELS.values())
    card = 1e9 * cards.get(SIZES[load.size], math.inf)
    trainer.config = fitting(trainer.policy, trainer.config, prompt, bfloat16, card)
    prompts, rollouts = [[5] * prompt] * load.P, some_rollouts(machine, load)
    rollouts.mask[:] = True
    advantage = torch.randn(rollouts.mask.shape[:2], device=machine.device)

    def roll_out() -> None:
        trainer.roll_out(prompts, [""] * len(prompts), trainer.random(0))

    def update() -> None:
        trainer.update(prompts, rollouts, advantage)

    update()  # the optimiser's moments exist from here on
    lasting = lasting_bytes(trainer)
    peaks = [(lasting + peak_bytes(work, machine.device)) / 1e9 for work in (roll_out, update)]
    plan = memory_plan(trainer.policy, trainer.config, prompt, bfloat16)
    return {
        "load": f"{load}, prompts of {prompt}",
        "activations": "computed again" if trainer.config.recompute_activations else "kept",
        "planned peak, GB": f"{plan.peak / 1e9:.1f}",
        "measured": f"{max(peaks):.1f}",
        "rollouts": f"{peaks[0]:.1f}",
        "update": f"{peaks[1]:.1f}",
    }
