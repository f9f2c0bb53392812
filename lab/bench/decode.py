"""Where the time of a GPU's decode step goes: a table of `lab.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from engine.rollouts import CapturedSteps, generate
from lab.bench.load import Load, make_model, make_prompts
from lab.bench.machine import Machine
from lab.bench.rollouts import least_seconds


def decode_table(machine: Machine, load: Load | None = None) -> list[dict]:
    """A decode step run plainly and as a replayed graph, its kernels alone, and the least that it can take."""
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        raise RuntimeError("the profiler sees no GPU here; expected a CUDA device that it can watch")
    load, rows = load or Load("0.5B", 16, 16, 512), []
    model, prompts = make_model(load.size, machine), make_prompts(load)

    seen: list[tuple[int, ...]] = []

    def run(steps: CapturedSteps, step: Callable[[int, int], None], *kind: int) -> None:
        plainly = partial(step, *kind)
        plainly()
        seen.append(kind)
        if seen.count(kind) == 4 and not rows:  # the first ones load kernels
            steps.demanded = True
            steps.capture(step, kind)
            for what, one in (("run plainly", plainly), ("replayed as a graph", steps.graphs[kind].replay)):
                one()
                seconds = machine.seconds(lambda one=one: [one() for _ in range(8)]) / 8
                rows.append({"what": f"a step, {what}", "microseconds": f"{1e6 * seconds:,.0f}"})
            rows.extend(kernels(machine, plainly, model.config.num_hidden_layers))

    with mock.patch.object(CapturedSteps, "__call__", run):
        generate(model, prompts, samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=1, compiled=True)
    position = torch.tensor([len(prompt) + 4 for prompt in prompts for _ in range(load.G)])
    least = least_seconds(model, 1, position, 0, machine.rates())
    floor = {"what": "the least: its bytes at the copy rate, or its flops", "microseconds": f"{1e6 * least:,.0f}"}
    return [{"load": str(load), **row} for row in (*rows, floor)]


def kernels(machine: Machine, work: Callable[[], None], layers: int) -> list[dict]:
    """How many kernels a GPU runs for it, their time, and the eight kinds that take longest."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as watched:
        work()
        machine.wait()
    found: dict[str, list[float]] = {}
    for event in watched.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows = {"its kernels alone": [t for times in found.values() for t in times]}
    rows |= {name.replace("|", " ")[:80]: found[name] for name in sorted(found, key=lambda name: -sum(found[name]))[:8]}
    return [
        {"what": name, "microseconds": f"{sum(t):,.0f}", "kernels": len(t), "a layer": f"{len(t) / layers:.1f}"}
        for name, t in rows.items()
    ]
