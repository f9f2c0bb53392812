"""How fast is it, and how far from what the machine could do? Both sides in one process, medians of several runs.

    python -m lab.bench                          # all that this machine can measure; about 20 minutes on two CPU cores
    python -m lab.bench rollouts step            # only these tables
    python -m lab.bench --quick                  # does every table still work? Seconds; its numbers mean nothing
    python -m lab.bench --json bench.json --chart step.png
    pip install -r lab/requirements.txt          # first, for the table `trl`

The models have random weights: speed does not depend on their values. Responses end at random, because that is what
rollouts do and what padding wastes: *early*, after a third of the longest on average, or *late*, after two thirds.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedTokenizerFast

import clipo
import engine.rollouts
import engine.update
import problems
from config import INFORMATIVE, CLIPOConfig, computes_in_bfloat16
from engine.guard import Trainer
from engine.memory import MODELS, fitting, memory_plan, peak_bytes, qwen_config
from engine.rollouts import Batch, CapturedSteps, generate, prompts_of

# name: vocabulary, width, feed-forward, layers, heads, key/value heads. The last three are Qwen2.5's.
SIZES = {
    "1M": (512, 128, 512, 4, 4, 2),
    "34M": (4096, 512, 1536, 10, 8, 2),
    **{name.removeprefix("Qwen2.5-"): shape for name, (shape, _) in MODELS.items()},
}


@dataclass(frozen=True)
class Load:
    """What one run of a table does: P prompts of 16 to 64 tokens, G rollouts each, of T tokens at most."""

    size: str
    P: int
    G: int
    T: int
    late: bool = False  # one token in T ends its response, not three

    def __str__(self):
        return f"{self.size}, {self.P} x {self.G} rollouts, up to {self.T} tokens{', late ends' * self.late}"


@dataclass
class Machine:
    device: torch.device
    dtype: torch.dtype
    runs: int  # measured runs of each side; the table has their median
    quick: bool
    until: float = math.inf  # no round of runs begins that would end after this, by time.perf_counter

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with suppress(OSError):  # a sandbox may forbid it; then it is the peak since the start
                Path("/proc/self/clear_refs").write_text("5")  # the kernel's own way to reset VmHWM

    def peak(self) -> float | None:
        """GB at most since `forget_peak`: allocated on the GPU, or resident in the whole process."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        if sys.platform != "linux":
            return None
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9

    def rates(self) -> tuple[float, float]:
        """What it reaches at its best: flops per second of a large matrix product, bytes per second of a large copy."""
        n, megabytes = (512, 64) if self.quick else (8192, 1024) if self.on_gpu else (2048, 256)
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=self.device)
        target = source.clone()
        product = min(self.seconds(lambda: a @ a) for _ in range(6))
        copied = min(self.seconds(lambda: target.copy_(source)) for _ in range(6))
        return 2 * n**3 / product, 2 * len(source) / copied  # a copy reads and writes

    def describe(self) -> dict:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else processor()
        return {
            "processor": name,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
        }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    features = torch.backends.cpu.get_cpu_capability() + ", bfloat16" * computes_in_bfloat16("cpu")
    return f"{os.cpu_count()} x {name} ({features})"


def commit() -> str:
    """The commit at work, with "-dirty" if the code was changed since; what a measurement wrote is no code."""
    if not shutil.which("git"):
        return "unknown"
    git = [
        subprocess.run(["git", *what], capture_output=True, text=True, check=False).stdout.strip()
        for what in (["describe", "--always"], ["status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"])
    ]
    return git[0] + ("-dirty" if git[1] else "") or "unknown"


def compare(machine: Machine, sides: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of every run of each side. They take turns, so that a slow minute of the machine hits all of them."""
    times = {name: [] for name in sides}
    for run in range(-1, machine.runs):
        if run > 0 and time.perf_counter() + sum(took[-1] for took in times.values()) > machine.until:
            break
        for name, side in sides.items():
            seconds = machine.seconds(lambda side=side, run=run: side(run))
            if run >= 0:  # the first of each only warms up
                times[name].append(seconds)
    return times


def make_model(size: str, machine: Machine, dtype: torch.dtype | None = None):
    config = qwen_config(*SIZES[size], eos_token_id=1, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or machine.dtype)
    return model.to(machine.device).eval()


def make_prompts(load: Load) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (load.P,), generator=g).tolist()
    return [torch.randint(2, SIZES[load.size][0], (n,), generator=g).tolist() for n in lengths]


def ending_ids(load: Load) -> list[int]:
    """So many ids end a response that its mean length is about T / 3, or 2 T / 3, under a nearly uniform policy."""
    return list(range(1, 1 + max(1, round((1 if load.late else 3) * SIZES[load.size][0] / load.T))))


# ----------------------------------------------------------------------------------------------------
# Rollouts against transformers
# ----------------------------------------------------------------------------------------------------


def by_transformers(model, prompts: Sequence[Sequence[int]], load: Load, eos: list[int], **chosen) -> Callable:
    """The same rollouts by `model.generate`: prompts padded on the left, one row per rollout. Returns its tokens."""
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(load.G)]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in rows], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in rows], device=model.device)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out = model.generate(
            ids, attention_mask=seen, do_sample=True, top_k=0, max_new_tokens=load.T, eos_token_id=eos, pad_token_id=0,
            **chosen,
        )  # fmt: skip
        return out[:, longest:]

    return run


def by_continuous_batching(model, prompts: Sequence[Sequence[int]], load: Load, eos: list[int]) -> Callable:
    rows = [prompt for prompt in prompts for _ in range(load.G)]
    settings = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=load.T, eos_token_id=eos, pad_token_id=0
    )
    return lambda seed: model.generate_batch(rows, generation_config=settings, progress_bar=False)


def floor_seconds(model, prompts, rollouts: clipo.Rollouts, rates: tuple[float, float]) -> float:
    """The least time these rollouts can take; no step serves the finished."""
    start = torch.tensor([len(ids) for ids in prompts], device=rollouts.mask.device)  # (P,)
    T = rollouts.mask.shape[2]
    position = (start[:, None, None] + torch.arange(T, device=start.device)).expand_as(rollouts.mask)[rollouts.mask]
    return least_seconds(model, T, position, sum(map(len, prompts)), rates)


def least_seconds(model, steps: int, position: Tensor, prompt_tokens: int, rates: tuple[float, float]) -> float:
    """All flops at the matmul rate, or all bytes at the copy rate, to decode tokens at `position` (N,) in some steps.

    A decode step reads all weights once and the keys and values of each row.
    """
    config, size = model.config, model.dtype.itemsize
    head_width = config.hidden_size // config.num_attention_heads
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    tokens, looked_at = len(position), int(position.sum())
    output = model.get_output_embeddings().weight.numel()  # a prompt's tokens need no logits
    flops = 2 * weights * tokens + 2 * (weights - output) * prompt_tokens
    flops += 4 * looked_at * config.hidden_size * config.num_hidden_layers
    keys_and_values = 2 * looked_at * config.num_key_value_heads * head_width * config.num_hidden_layers
    traffic = size * (weights * steps + keys_and_values)
    return max(flops / rates[0], traffic / rates[1])


def rollout_loads(machine: Machine) -> list[Load]:
    if machine.quick:
        return [Load("1M", 2, 4, 16)]
    if machine.on_gpu:
        return [Load(size, 16, 16, 512) for size in SIZES]
    shapes = ("1M", 16, 16), ("34M", 16, 16), ("0.5B", 4, 4)
    return [Load(*shape, T, late) for shape in shapes for T, late in ((40, True), (128, False))]


def rollouts_table(machine: Machine) -> list[dict]:
    return [row for load in rollout_loads(machine) for row in rollouts_rows(machine, load)]


PEERS = {  # transformers' ways: what `generate` is told; the last is none of `generate`'s
    "generate": {},
    "generate, static cache, compiled": {"cache_implementation": "static"},
    "continuous batching": None,
}


def rollouts_rows(machine: Machine, load: Load, peers: Sequence[str] | None = None) -> list[dict]:
    """Ours first, then those of PEERS that are named (by default all that pay on this kind of machine)."""
    model, prompts, eos = make_model(load.size, machine), make_prompts(load), ending_ids(load)
    ours, produced, peaks = "ours", {}, {}

    def our_rollouts(seed: int) -> clipo.Rollouts:
        return generate(
            model, prompts, samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=eos,
            generator=torch.Generator().manual_seed(seed + 1),
        )  # fmt: skip

    def count(name: str, side: Callable) -> Callable:
        """The side, with its useful tokens (up to and with the end of each response) and peak memory noted."""

        def run(seed: int) -> None:
            machine.forget_peak()
            produced.setdefault(name, []).append(useful_tokens(side(seed), eos))
            peaks[name] = machine.peak()

        return run

    sides = {ours: our_rollouts}
    for peer in peers or list(PEERS)[: None if machine.on_gpu else 1]:
        told = PEERS[peer]
        sides[peer] = (
            by_continuous_batching(model, prompts, load, eos)
            if told is None
            else by_transformers(model, prompts, load, eos, **told)
        )
    floor = floor_seconds(model, prompts, our_rollouts(0), machine.rates())
    times = compare(machine, {name: count(name, side) for name, side in sides.items()})
    speed = {name: [n / s for n, s in zip(produced[name][1:], times[name], strict=True)] for name in sides}
    return [
        {
            "load": str(load),
            "side": name,
            "tokens/s": round(statistics.median(speed[name])),
            "spread": f"{min(speed[name]):.0f} to {max(speed[name]):.0f}",
            "ours is faster": times_faster(speed[ours], speed[name]),
            "peak GB": peaks[name] and round(peaks[name], 2),
            "floor reached": f"{floor / statistics.median(times[ours]):.0%}" if name == ours else "",
        }
        for name in sides
    ]


def useful_tokens(made, eos: list[int]) -> int:
    """Tokens up to and with the end of each response, in what one of the sides made.

    >>> useful_tokens(torch.tensor([[5, 1, 1], [1, 0, 0], [4, 4, 4]]), eos=[1])
    6
    """
    if isinstance(made, clipo.Rollouts):
        return int(made.mask.sum())
    if isinstance(made, dict):  # continuous batching: one result per request
        return sum(len(result.generated_tokens) for result in made.values())
    ended = torch.isin(made, torch.tensor(eos, device=made.device)).int()
    return int((ended.cumsum(-1) - ended == 0).sum())


def times_faster(ours: list[float], theirs: list[float]) -> str:
    """Median and range over runs of the ratio of two speeds, run by run."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


# ----------------------------------------------------------------------------------------------------
# What each trick of the engine brings
# ----------------------------------------------------------------------------------------------------


@contextmanager
def attending_by(attention: Callable):
    """Every pass with a cache attends by this function."""
    AttentionInterface.register("clipo", attention)
    try:
        yield
    finally:
        AttentionInterface.register("clipo", engine.rollouts.cached_attention)


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
    return engine.rollouts.cached_attention(module, query, key, value, attention_mask, **named)


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
    "a large weight is multiplied in blocks (CPU)": replaced(engine.rollouts, "in_blocks", nn.Linear.forward),
    "a prompt is computed once for its rollouts": replaced(engine.rollouts, "prompts_of", own_prompts),
    "an RMSNorm is one kernel (GPU)": replaced(engine.rollouts, "is_plain_rmsnorm", lambda _: False),
    "steps are replayed as graphs (GPU)": replaced(CapturedSteps, "__call__", lambda steps, *kind: steps.step(*kind)),
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
    for load in rollout_loads(machine)[:: 1 if machine.on_gpu else 2]:  # (on a CPU those of 40 tokens)
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


# ----------------------------------------------------------------------------------------------------
# The training step
# ----------------------------------------------------------------------------------------------------


def make_tokenizer(size: str) -> PreTrainedTokenizerFast:
    """Token i is the word "i"."""
    words = {"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, SIZES[size][0])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def even(texts: Sequence[str], _answers: object = None) -> list[bool]:
    """Verdicts that are mixed within groups: is the sum of a response's numbers even?"""
    return [sum(int(word) for word in text.split() if word.isdigit()) % 2 == 0 for text in texts]


def make_trainer(machine: Machine, load: Load, eos: list[int], **settings) -> Trainer:
    """GRPO + CLIPO at the paper's constants, beyond the warm-up, with float32 weights and activations kept."""
    config = CLIPOConfig(
        **{
            "prompts_per_step": load.P, "mini_batch_prompts": load.P, "samples_per_prompt": load.G,
            "max_new_tokens": load.T, "head_warmup_steps": 0, "beta": 0.0, "micro_batch_tokens": 4096,
            "recompute_activations": False,
            "compute_dtype": str(machine.dtype).removeprefix("torch."), **settings,
        }
    )  # fmt: skip
    model = make_model(load.size, machine, torch.float32)
    model.generation_config.eos_token_id = eos
    return Trainer(model, make_tokenizer(load.size), even, config)


def trl_table(machine: Machine, load: Load | None = None) -> list[dict]:
    """A whole GRPO step, ours with the contrastive reward and TRL's without: the same model, prompts and lengths."""
    if not all(map(importlib.util.find_spec, ("trl", "accelerate"))):
        print("trl: not measured, TRL is not installed (pip install -r lab/requirements.txt)\n")
        return []
    load = load or (Load("1M", 2, 4, 8) if machine.quick else Load("1M", 16, 16, 40))
    rows = []
    for dtype in [torch.float32] + [torch.bfloat16] * computes_in_bfloat16(machine.device.type):
        at = replace(machine, dtype=dtype)
        trainer, prompts = make_trainer(at, load, [1]), make_prompts(load)
        trl_steps = trl_step_seconds(at, load, prompts)  # TRL owns its loop; ours runs right after
        default_steps = trl_step_seconds(at, load, prompts, activation_checkpointing=True)
        our_steps = compare(at, {"ours": lambda _: trainer.step(prompts, [""] * load.P)})["ours"]  # noqa: B023
        for name, steps in (
            ("ours, with CLIPO", our_steps),
            ("TRL GRPOTrainer", trl_steps),
            ("TRL GRPOTrainer, with its default of activation checkpointing", default_steps),
        ):
            rows.append(
                {
                    "load": str(load),
                    "dtype": at.describe()["dtype"],
                    "side": name,
                    "s per step": f"{statistics.median(steps):.2f}",
                    "spread": f"{min(steps):.2f} to {max(steps):.2f}",
                    "ours is faster": f"{statistics.median(steps) / statistics.median(our_steps):.1f}x",
                }
            )
    return rows


def trl_step_seconds(
    machine: Machine, load: Load, prompts: list[list[int]], activation_checkpointing: bool = False
) -> list[float]:
    """Seconds of TRL's steps, without the first."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    clock: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            machine.wait()
            clock.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            machine.wait()
            clock.append(time.perf_counter())

    def reward(completions, **_):
        return list(map(float, even(completions)))

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=make_model(load.size, machine, torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=load.P * load.G, num_generations=load.G,
                max_completion_length=load.T, max_steps=1 + machine.runs, beta=0.0, temperature=1.0, top_k=0,
                learning_rate=1e-6, lr_scheduler_type="constant", bf16=machine.dtype == torch.bfloat16,
                use_cpu=not machine.on_gpu, activation_checkpointing=activation_checkpointing, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in prompts]),
            processing_class=make_tokenizer(load.size),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [end - begin for begin, end in zip(clock[2::2], clock[3::2], strict=True)]


def step_loads(machine: Machine) -> list[Load]:
    return [Load("1M", 2, 4, 16)] if machine.quick else [Load("1M", 16, 16, 128), Load("34M", 16, 16, 128)]


def step_phases(machine: Machine, load: Load, **settings) -> dict[str, float]:
    """Median seconds of each phase of a CLIPO step."""
    trainer, prompts = make_trainer(machine, load, ending_ids(load), **settings), make_prompts(load)
    steps = [trainer.step(prompts, [""] * load.P)["seconds"] for _ in range(1 + machine.runs)][1:]
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


# ----------------------------------------------------------------------------------------------------
# The update alone: how far from the machine's best, and how near the memory plan
# ----------------------------------------------------------------------------------------------------


def update_loads(machine: Machine) -> list[Load]:
    if machine.quick:
        return [Load("1M", 2, 4, 16)]
    if machine.on_gpu:
        return [Load("0.5B", 16, 16, 1024), Load("1.5B", 16, 16, 1024), Load("3B", 16, 16, 1024)]
    return [Load("1M", 16, 16, 128), Load("34M", 4, 16, 128), Load("0.5B", 2, 4, 64)]


def some_rollouts(machine: Machine, load: Load) -> clipo.Rollouts:
    """Random tokens; lengths spread evenly from T / 4 to T, in no order."""
    shape, on = (load.P, load.G, load.T), machine.device
    order = torch.randperm(load.P * load.G, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(load.T / 4, load.T, load.P * load.G).long()[order].view(load.P, load.G, 1).to(on)
    mask = torch.arange(load.T, device=on) < lengths
    tokens = torch.randint(2, SIZES[load.size][0], shape, device=on)
    logprobs = torch.zeros(shape, device=on).masked_fill(mask, -math.log(SIZES[load.size][0]))
    return clipo.Rollouts(tokens, mask, logprobs, torch.zeros(*shape[:2], SIZES[load.size][1], device=on))


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
        for recompute in ((True,) if load.size in ("1.5B", "3B") else (False, True))  # (kept, theirs would not fit)
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


# ----------------------------------------------------------------------------------------------------
# Where the host waits for a GPU
# ----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
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
        mock.patch.object(CapturedSteps, "__call__", watching(lambda steps, *kind: steps.step(*kind), {1: step})),
        mock.patch.object(Batch, "refill", watching(Batch.refill, {0: fill, 1: look})),
        mock.patch.object(Batch, "reach", watching(Batch.reach, {0: fill, 1: look})),
    ):
        generate(
            model, make_prompts(load), samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=ending_ids(load)
        )
    trainer, rollouts = make_trainer(machine, load, [1]), some_rollouts(machine, load)
    advantage = torch.randn(rollouts.mask.shape[:2], device=machine.device)
    with trainer.mixed_precision(), micro_batch:
        trainer.unguarded.policy_gradient(  # (so many tokens at a time: all)
            trainer.policy, None, make_prompts(load), rollouts, advantage, trainer.config, micro_batch_tokens=10**6
        )
    return [
        {"what": what, "line": line, "operator": operator, "waits": waits, "copies to it": copies}
        for what, watch in watched.items()
        for (line, operator), (waits, copies) in (watch.found or {("nowhere", ""): (0, 0)}).items()
    ]


# ----------------------------------------------------------------------------------------------------
# Where the time of a GPU's decode step goes
# ----------------------------------------------------------------------------------------------------


def decode_table(machine: Machine, load: Load | None = None) -> list[dict]:
    """A decode step run plainly and as a replayed graph, its kernels alone, and the least that it can take."""
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        raise RuntimeError("the profiler sees no GPU here; expected a CUDA device that it can watch")
    load, rows = load or Load("0.5B", 16, 16, 512), []
    model, prompts = make_model(load.size, machine), make_prompts(load)

    seen: list[tuple[int, ...]] = []

    def run(steps: CapturedSteps, *kind: int) -> None:
        plainly = partial(steps.step, *kind)
        plainly()
        seen.append(kind)
        if seen.count(kind) == 4 and not rows:  # the first ones load kernels
            steps.demanded = True
            steps.capture(kind)
            for what, one in (("run plainly", plainly), ("replayed as a graph", steps.graphs[kind].replay)):
                one()
                seconds = machine.seconds(lambda one=one: [one() for _ in range(8)]) / 8
                rows.append({"what": f"a step, {what}", "microseconds": f"{1e6 * seconds:,.0f}"})
            rows.extend(kernels(machine, plainly, model.config.num_hidden_layers))

    with mock.patch.object(CapturedSteps, "__call__", run):
        generate(model, prompts, samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=1)
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


# ----------------------------------------------------------------------------------------------------
# How cost grows
# ----------------------------------------------------------------------------------------------------


def growth_table(machine: Machine) -> list[dict]:
    """Seconds per step as the group or the response grows, and of the contrast alone as the batch does."""
    groups = (4, 8) if machine.quick else (4, 8, 16, 32, 64)
    lengths = (16, 32) if machine.quick else (128, 256, 512, 1024, 2048)
    batches = (256, 512) if machine.quick else (256, 1024, 4096, 16_384)
    rows = []
    for load in [Load("1M", 4, G, lengths[0]) for G in groups] + [Load("1M", 4, 8, T) for T in lengths[1:]]:
        phases = step_phases(machine, load)
        rows.append(
            {
                "what": str(load),
                "rollout, s": f"{phases['rollout']:.2f}",
                "update, s": f"{phases['update']:.2f}",
                "contrast, ms": f"{1000 * phases['contrast']:.1f}",
            }
        )
    for B in batches:
        seconds, elements = contrast_cost(machine, B)
        rows.append(
            {
                "what": f"contrast of {B:,} rollouts in groups of 16",
                "contrast, ms": f"{1000 * seconds:.1f}",
                "largest tensor": f"{elements:,}",  # embeddings are B x 512; the whole batch's cosines would be B x B
            }
        )
    return rows


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that anything under it makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, given=(), named=None):
        made = function(*given, **(named or {}))
        tensors = [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return made


def contrast_cost(machine: Machine, B: int) -> tuple[float, int]:
    """Median seconds of head, loss and backward, and the elements of the largest tensor on the way."""
    hidden = torch.randn(B // 16, 16, 896, device=machine.device)
    head = clipo.ContrastiveHead(896).to(machine.device)
    correct = (torch.arange(B, device=machine.device) % 2 == 0).view(-1, 16)

    def contrast() -> None:
        z = head(hidden)
        with largest:
            pairs = clipo.draw_pairs(correct)
            clipo.infonce(z, pairs)[pairs.anchor].mean().backward()

    largest = LargestTensor()
    contrast()
    found, largest = largest.elements, nullcontext()  # it is no part of what is timed
    return statistics.median(machine.seconds(contrast) for _ in range(max(3, machine.runs))), found


def grading_table(machine: Machine) -> list[dict]:
    """Seconds to grade the rollouts of a large step: 16 to a question, of five different answers."""
    count = 160 if machine.quick else 8192
    draw = random.Random(0)
    problems.referee.start()
    kinds = {
        "numbers": lambda: str(draw.randrange(5)),
        "expressions": lambda: f"\\frac{{x+{draw.randrange(5)}}}{{2}}",
        "expressions, one rollout in 100 hostile": lambda: (
            "9^{9^{9^9}}" if draw.random() < 0.01 else f"\\frac{{x+{draw.randrange(5)}}}{{2}}"
        ),
    }
    rows = []
    for kind, answer in kinds.items():
        golds = [
            f"\\frac{{{i}+x}}{{2}}" if kind != "numbers" else str(i) for i in range(count // 16) for _ in range(16)
        ]
        texts = [f"\\boxed{{{answer()}}}" for _ in golds]
        seconds = statistics.median(
            machine.seconds(lambda texts=texts, golds=golds: problems.are_correct(texts, golds))
            for _ in range(machine.runs)
        )
        rows.append({"rollouts": f"{count:,}", "answers": kind, "s": f"{seconds:.2f}"})
    return rows


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Machine], list[dict]]] = {
    "rollouts": rollouts_table,
    "tricks": tricks_table,
    "trl": trl_table,
    "step": step_table,
    "update": update_table,
    "waits": waits_table,
    "growth": growth_table,
    "grading": grading_table,
}


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table; a column for every key but those that hold more than a cell."""
    names = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], dict)))
    cells = [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of: {', '.join(TABLES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one run")
    parser.add_argument("--runs", type=int, help="measured runs of each side (default: 5)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and tables there too")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the table `step` as bars there (.png)")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"unknown table {unknown[0]!r}; expected some of: {', '.join(TABLES)}")
    if given.runs is not None and given.runs < 1:
        parser.error(f"--runs is {given.runs}; expected 1 or more")
    chosen = given.tables or list(TABLES)
    if given.chart and "step" not in chosen:
        parser.error("--chart draws the table `step`; name it too")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    machine = Machine(device, getattr(torch, dtype), given.runs or (1 if given.quick else 5), given.quick)
    flops, traffic = machine.rates()
    about = {**machine.describe(), "matmul": f"{flops / 1e9:.0f} Gflop/s", "copy": f"{traffic / 1e9:.0f} GB/s"}
    about["command"] = " ".join(["python -m lab.bench", *(sys.argv[1:] if arguments is None else arguments)])
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    results = {}
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        if rows := TABLES[name](machine):
            results[name] = rows
            print(markdown(rows), flush=True)
        if given.json:  # after every table: a long run that is stopped keeps what it has measured
            given.json.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n")
    if given.chart:
        draw_step(results["step"], given.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
