"""A training step against TRL's."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from dataclasses import replace

import torch
import transformers

from config import computes_in_bfloat16
from lab.bench.load import Load, even, make_model, make_prompts, make_tokenizer, make_trainer
from lab.bench.machine import Machine, compare


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
