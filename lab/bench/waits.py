"""Where the host waits for a GPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.rollouts import Batch, CapturedSteps, generate
from lab.bench.load import Load, ending_ids, make_model, make_prompts, make_trainer, some_rollouts
from lab.bench.machine import Machine
from lab.provenance import ROOT

# Operators whose result, or its shape, the host must know before it goes on.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave.Tensor",
}  # fmt: skip


WATCHED = ("decode step", "look that fills all rows", "look", "micro-batch")


class Waits(TorchDispatchMode):
    """Counts what under it makes the host wait for the GPU, or copies to it, by line of the project and operator.

    A copy of ordinary memory to the GPU waits too: the host goes on when all of it has been read.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[tuple[str, str], list[int]] = {}  # (line, operator): how often it waited, how often it copied

    def __torch_dispatch__(self, function, types, given=(), named=None):
        named = named or {}
        name = str(function).removeprefix("aten.").removesuffix(".default")
        waits, copies = kind_of_wait(name, given, named)
        if waits or copies:
            times = self.found.setdefault((project_line(), name), [0, 0])
            times[0 if waits else 1] += 1
        return function(*given, **named)


def kind_of_wait(name: str, given: Sequence, named: dict) -> tuple[bool, bool]:
    """Does the operator make the host wait for a GPU? Does it copy to one?"""
    on_gpu = [isinstance(x, Tensor) and x.device.type == "cuda" for x in given]
    if name == "_to_copy":
        to_gpu = on_gpu[0] if named.get("device") is None else torch.device(named["device"]).type == "cuda"
        return on_gpu[0] and not to_gpu, to_gpu and not on_gpu[0]
    if name == "copy_":
        return on_gpu[1] and not on_gpu[0], on_gpu[0] and not on_gpu[1]
    if name == "lift_fresh":  # torch.tensor([...], device="cuda")
        return False, on_gpu[0]
    if name.startswith(("index.", "index_put", "_index_put")) and on_gpu[0]:
        indices, value = [i for i in given[1] if i is not None], given[2] if len(given) > 2 else None
        if value is not None and value.numel() == 1 and len(indices) == 1 and indices[0].dtype == torch.bool:
            return False, False  # x[mask] = number is a masked_fill
        tensors = [x for x in (*indices, value) if x is not None]
        return any(i.dtype in (torch.bool, torch.uint8) for i in indices), any(x.device.type == "cpu" for x in tensors)
    return name in WAITING and any(on_gpu), False


def project_line() -> str:
    """file:line of the project that is at work, or that of its `backward()`, whose operators run in a thread alone."""
    frame = sys._getframe(1).f_back  # who called the operator
    while frame and (ROOT not in (file := Path(frame.f_code.co_filename)).parents or "site-packages" in file.parts):
        frame = frame.f_back
    return f"{file.relative_to(ROOT)}:{frame.f_lineno}" if frame else "in backward()"


def watching(work: Callable, calls: dict[int, Waits]) -> Callable:
    """The function, with some of its calls (their number: a watch) watched."""
    number = itertools.count()

    def call(*given):
        with calls.get(next(number), nullcontext()):
            return work(*given)

    return call


def waits_table(machine: Machine) -> list[dict]:
    """Waits for the device, by line, for one decode step, one look at what has ended, and one micro-batch."""
    if not machine.on_gpu:
        print("waits: not measured, it needs a GPU\n")
        return []
    load, watched = Load("1M", 4, 4, 32), {name: Waits() for name in WATCHED}
    step, fill, look, micro_batch = watched.values()
    model = make_model(load.size, machine)
    with (
        mock.patch.object(CapturedSteps, "__call__", watching(lambda _, do, *kind: do(*kind), {1: step})),
        mock.patch.object(Batch, "refill", watching(Batch.refill, {0: fill, 1: look})),
        mock.patch.object(Batch, "reach", watching(Batch.reach, {0: fill, 1: look})),
    ):
        generate(
            model, make_prompts(load), samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=ending_ids(load)
        )
    trainer, rollouts = make_trainer(machine, load, [1]), some_rollouts(machine, load)
    advantage = torch.randn(rollouts.mask.shape[:2], device=machine.device)
    with trainer.mixed_precision(), micro_batch:
        trainer.unguarded.policy_gradient(  # so many tokens at a time: all
            trainer.policy, None, make_prompts(load), rollouts, advantage, trainer.config, micro_batch_tokens=10**6
        )
    return [
        {"what": what, "line": line, "operator": operator, "waits": waits, "copies to it": copies}
        for what, watch in watched.items()
        for (line, operator), (waits, copies) in (watch.found or {("nowhere", ""): (0, 0)}).items()
    ]
