"""What each trick of the engine brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

import engine.forward
import engine.rollouts
import engine.update
from engine.rollouts import CapturedSteps, generate, prompts_of
from lab.bench.load import Load, ending_ids, make_prompts, make_trainer, some_rollouts
from lab.bench.machine import Machine, compare, times_faster
from lab.bench.rollouts import rollout_loads


@contextmanager
def attending_by(attention: Callable):
    """Every pass with a cache attends by this function."""
    AttentionInterface.register("clipo", attention)
    try:
        yield
    finally:
        AttentionInterface.register("clipo", engine.forward.cached_attention)


def by_torch(module, query, key, value, attention_mask, scaling=None, **_):
    """Decode steps by PyTorch's kernel, as for more than one query; keys and values are not repeated."""
    heads = query.shape[1] if query.shape[2] > 1 else key.shape[1]
    asked = query.reshape(len(query), heads, -1, query.shape[3])  # (B, Hq, Q, width) or (B, H, Hq / H, width)
    key, value = (kv.repeat_interleave(heads // kv.shape[1], 1) for kv in (key, value))
    mixed = F.scaled_dot_product_attention(asked, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(query.shape).transpose(1, 2).contiguous(), None


def repeating(module, query, key, value, attention_mask, **named):
    """Keys and values are copied for every query head."""
    key, value = (kv.repeat_interleave(query.shape[1] // kv.shape[1], 1) for kv in (key, value))
    return engine.forward.cached_attention(module, query, key, value, attention_mask, **named)


def own_prompts(group: Tensor, prompts: Sequence[Sequence[int]]):
    """In place of `prompts_of`: every rollout has its prompt computed for itself."""
    return prompts_of(torch.arange(len(group), device=group.device), [prompts[g] for g in group.tolist()])


def drop_at(machine: Machine, share: float):
    """Ended rows are dropped once at most this share of all still works."""
    kind = machine.device.type
    return mock.patch.dict(
        engine.rollouts.PACE, {kind: engine.rollouts.PACE[kind]._replace(while_waiting=share, in_the_tail=share)}
    )


def replaced(module, name: str, by: Callable):
    return lambda _: mock.patch.object(module, name, by, create=True)  # (`sorted` is no name of the module's own)


IN_ROLLOUTS = {  # a trick of engine/rollouts.py, and how to leave it out
    "ended rows are dropped": lambda machine: drop_at(machine, 0.0),
    "two plain products for one query (CPU)": lambda _: attending_by(by_torch),
    "no keys are repeated for grouped heads": lambda _: attending_by(repeating),
    "a large weight is multiplied in blocks (CPU)": replaced(engine.forward, "in_blocks", nn.Linear.forward),
    "a prompt is computed once for its rollouts": replaced(engine.rollouts, "prompts_of", own_prompts),
    "an RMSNorm is one kernel (GPU)": replaced(engine.forward, "is_plain_rmsnorm", lambda _: False),
    "steps are replayed as graphs (GPU)": replaced(CapturedSteps, "__call__", lambda _, step, *kind: step(*kind)),
}
IN_UPDATE = {  # the same of engine/update.py
    "a prompt is computed once for its rollouts": replaced(engine.update, "prompts_of", own_prompts),
    "rollouts of like length go together": replaced(engine.update, "sorted", lambda rows, key: rows),
}


def used(tricks: dict[str, Callable], machine: Machine) -> dict[str, Callable]:
    """Those that are not the other kind of machine's."""
    return {name: off for name, off in tricks.items() if ("(CPU)" if machine.on_gpu else "(GPU)") not in name}


def tricks_table(machine: Machine) -> list[dict]:
    """How many times as long rollouts, or the update, take without each trick of the engine, at every size."""
    rows: dict[tuple[str, str], dict] = {}
    for load in rollout_loads(machine)[:: 1 if machine.on_gpu else 2]:  # on a CPU those of 40 tokens
        for (phase, trick), ratio in tricks_of(machine, load).items():
            rows.setdefault((phase, trick), {"phase": phase, "without": trick})[str(load)] = ratio
    return list(rows.values())


def tricks_of(machine: Machine, load: Load) -> dict[tuple[str, str], str]:
    """One load's column of it, by phase and trick."""
    trainer, prompts, given = make_trainer(machine, load, [1]), make_prompts(load), some_rollouts(machine, load)
    advantage, found = torch.randn(given.mask.shape[:2], device=machine.device), {}

    def roll_out(run: int) -> None:
        generate(
            trainer.policy, prompts, samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=ending_ids(load),
            generator=torch.Generator().manual_seed(run + 1),
        )  # fmt: skip

    def learn(_: int) -> None:
        trainer.update(prompts, given, advantage)

    def leaving_out(off: Callable, work: Callable[[int], None]) -> Callable[[int], None]:
        def run(number: int) -> None:
            with off(machine):
                work(number)

        return run

    for phase, work, tricks in (("rollouts", roll_out, IN_ROLLOUTS), ("update", learn, IN_UPDATE)):
        tricks = used(tricks, machine)
        times = compare(machine, {"all": work, **{trick: leaving_out(off, work) for trick, off in tricks.items()}})
        found |= {(phase, trick): times_faster(times[trick], times["all"]) for trick in tricks}
    return found
