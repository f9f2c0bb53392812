"""GRPO + CLIPO by TRL's GRPOTrainer, on as many processes as accelerate starts. `train.py` is the one to read.

    pip install -r requirements.txt -r lab/requirements.txt
    accelerate launch -m lab.trl_train --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k --out runs/trl
    accelerate launch --multi_gpu --num_processes 2 -m lab.trl_train ... --trl use_cpu=true      (two CPU processes)
    accelerate launch --config_file deepspeed.yaml -m lab.trl_train --vllm --model ...     (pip install vllm)

Without --vllm the rollouts are made by `engine.rollouts.generate`, in which each has random numbers of its own: the
same rollouts on one process or on many. It needs a whole model on each process; where it is sharded (DeepSpeed's stage
3, FSDP), take --vllm. --no-contrast is plain GRPO. Any further constant of TRL: --trl learning_rate=1e-6 beta=0.001 ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from border import OptionParser, UserError, from_json, status_of
from clipo import end_of_sequence_ids
from config import TRACKS, CLIPOConfig
from engine.rollouts import generate
from lab.trl_reward import ContrastiveReward, prompt_tokens
from run import folder as run_folder
from run import models as run_models
from tasks.data import SUFFIX, load_problems
from tasks.grading import are_correct


def accuracy(completions: list, answer: list[str], **_) -> list[float]:
    """TRL's view of `are_correct`: 1 or 0 for each completion."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(right) for right in are_correct(texts, answer)]


def roll_out(prompts: list, trainer: GRPOTrainer) -> dict:
    """TRL's `rollout_func`: one rollout for each of this process's prompts (a prompt stands there once per rollout)."""
    accelerator, args = trainer.accelerator, trainer.args
    model = accelerator.unwrap_model(trainer.model_wrapped)
    random = torch.Generator().manual_seed(args.seed * 1_000_003 + trainer.state.global_step)
    before = accelerator.process_index * len(prompts)  # rollouts of the processes before this one have drawn theirs
    torch.rand(before, args.max_completion_length, generator=random)
    ids = prompt_tokens(trainer, prompts)
    with accelerator.autocast():
        rollouts = generate(
            model,
            ids,
            samples_per_prompt=1,
            max_new_tokens=args.max_completion_length,
            eos_token_id=end_of_sequence_ids(model, trainer.processing_class),
            temperature=args.temperature,
            generator=random,
        )
    tokens, keep, logprobs = (part[:, 0].cpu() for part in (rollouts.tokens, rollouts.mask, rollouts.logprobs))
    return {
        "prompt_ids": ids,
        "completion_ids": [row[m].tolist() for row, m in zip(tokens, keep, strict=True)],
        "logprobs": [row[m].tolist() for row, m in zip(logprobs, keep, strict=True)],
    }


def parser() -> argparse.ArgumentParser:
    p = OptionParser(
        prog="python -m lab.trl_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="causal LM on the hub or in a folder")
    p.add_argument("--data", default="gsm8k", help="gsm8k, math, or a .parquet or .jsonl file (default: gsm8k)")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the run is written")
    p.add_argument("--vllm", action="store_true", help="rollouts by TRL's vLLM instead of ours")
    p.add_argument("--no-contrast", action="store_true", help="plain GRPO")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    p.add_argument("--trl", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of TRL's GRPOConfig")
    p.add_argument("--clipo", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of CLIPOConfig")
    return p


def chosen(pairs: Sequence[str]) -> dict:
    """NAME=VALUE pairs; a value is JSON, else a text. Raises UserError.

    >>> chosen(["beta=0.1", "loss_type=grpo", "bf16=true"])
    {'beta': 0.1, 'loss_type': 'grpo', 'bf16': True}
    """
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair} is no setting; expected NAME=VALUE")
        try:
            values[name] = from_json(value)
        except ValueError:
            values[name] = value
    return values


def train(given: argparse.Namespace) -> None:
    """The whole run. Raises UserError."""
    model, tokenizer = run_models.load_model(given.model, "cpu")
    problems = load_problems(given.data, "train")
    if given.resume and not (given.out.is_dir() and get_last_checkpoint(str(given.out))):
        raise UserError(f"{given.out} holds no checkpoint to resume from; expected --out with the folder of a run")
    track = given.data if given.data in TRACKS else "gsm8k"
    try:
        config = CLIPOConfig.for_track(track, **chosen(given.clipo))
        args = GRPOConfig(
            **{
                # the paper's constants, by TRL's names for them
                "output_dir": str(given.out), "num_generations": config.samples_per_prompt,
                "max_completion_length": config.max_new_tokens, "temperature": config.temperature,
                "learning_rate": config.lr, "lr_scheduler_type": "constant", "beta": config.beta,
                "loss_type": "dapo",  # the mean over all tokens, of all processes
                "use_bias_correction_kl": False, "top_k": 0, "seed": config.seed, "use_vllm": given.vllm,
                "log_completions": True, "num_completions_to_print": 1, "logging_steps": 1, "report_to": [],
                "bf16": torch.cuda.is_available(),
                **chosen(given.trl),
            }
        )  # fmt: skip
    except (TypeError, ValueError) as reason:
        raise UserError(f"--clipo or --trl: {reason}") from reason
    chat = tokenizer.chat_template is not None
    rows = [{"prompt": f"{problem.question}\n{SUFFIX}", "answer": problem.answer} for problem in problems]
    if chat:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    reward = ContrastiveReward(accuracy, config)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[accuracy] if given.no_contrast else [accuracy, reward],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=None if given.vllm else roll_out,
    )
    if not given.no_contrast:
        reward.attach(trainer)
    trainer.train(resume_from_checkpoint=given.resume or None)
    trainer.save_model(str(given.out))
    if trainer.accelerator.is_main_process and not given.no_contrast:  # so that eval.py and tsne.py know the run
        reward.save(given.out)
        settings = {"model": given.model, "data": given.data, "config": dataclasses.asdict(config)}
        settings["command"] = shlex.join(["python", "-m", "lab.trl_train", *sys.argv[1:]])
        run_folder.write_text(given.out / "settings.json", json.dumps(settings, indent=1))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that ends while its group's threads run may die of it (SIGABRT)


def main(arguments: Sequence[str] | None = None) -> int:
    return status_of(lambda: train(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
