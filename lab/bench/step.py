"""The training step: where its time goes, and what the contrastive reward adds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from config import INFORMATIVE
from lab.bench.load import SIZES, Load, ending_ids, make_prompts, make_trainer
from lab.bench.machine import Machine


def step_loads(machine: Machine) -> list[Load]:
    return [Load("1M", 2, 4, 16)] if machine.quick else [Load("1M", 16, 16, 128), Load("34M", 16, 16, 128)]


def step_phases(machine: Machine, load: Load, **settings) -> dict[str, float]:
    """Median seconds of each phase of a CLIPO step."""
    trainer, prompts = make_trainer(machine, load, ending_ids(load), **settings), make_prompts(load)
    steps = []
    for _ in range(1 + machine.runs):
        trainer.step(prompts, [""] * load.P)
        steps.append(trainer.seconds)
    del steps[0]
    return {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}


def step_table(machine: Machine, loads: Sequence[Load] | None = None) -> list[dict]:
    """Where the time of a step goes, and what the contrastive reward adds: pooling, head, loss, the head's update."""
    rows = []
    for load in loads or step_loads(machine):
        for constants, settings in (("paper: 1 head update", {}), ("informative: 4", INFORMATIVE)):
            phases, pooling = step_phases(machine, load, **settings), pooling_seconds(machine, load)
            total, added = sum(phases.values()), phases["contrast"] + pooling
            rows.append(
                {
                    "load": str(load),
                    "constants": constants,
                    **{phase: f"{seconds:.3f} s ({seconds / total:.1%})" for phase, seconds in phases.items()},
                    "pooling (in rollout)": f"{pooling:.3f} s",
                    "CLIPO adds to GRPO": f"{added / (total - added):.1%}",
                    "seconds": phases,
                }
            )
    return rows


def pooling_seconds(machine: Machine, load: Load) -> float:
    """The line of `engine.rollouts.Written.write` that sums up the states, for T steps of all rows: an upper bound."""
    rows, width = load.P * load.G, SIZES[load.size][1]
    hidden, state = torch.zeros(2, rows, width, device=machine.device)
    index = torch.arange(rows, device=machine.device)

    def pool() -> None:
        for _ in range(load.T):
            hidden[index] = state.float() + hidden[index] * (index > 1)[:, None]

    pool()
    return statistics.median(machine.seconds(pool) for _ in range(max(3, machine.runs)))


def draw_step(rows: list[dict], file: Path) -> None:
    """The phases of a step as bars, readable in grey print."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
    names = [f"{row['load']}\n{row['constants']}" for row in rows]
    left = [0.0] * len(rows)
    styles = [("0.4", ""), ("1.0", ".."), ("0.0", ""), ("0.8", "//")]
    for phase, (shade, hatch) in zip(rows[0]["seconds"], styles, strict=True):
        shares = [100 * row["seconds"][phase] / sum(row["seconds"].values()) for row in rows]
        axes.barh(names, shares, left=left, color=shade, hatch=hatch, edgecolor="0.1", label=phase)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of the step's time, percent")
    axes.set_title("Rollouts and the policy update are a step's time; the contrast is a sliver")
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    figure.savefig(file, dpi=120)
