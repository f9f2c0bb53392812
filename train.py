"""Train a language model with CLIPO: GRPO and the contrastive reward.

    python train.py                                                    the toy world, GRPO and then CLIPO: minutes
    python train.py --both --seed 33                                   the same from another warm start
    python train.py --weight 0                                         one run, without the contrastive reward: GRPO
    python train.py --paper                                            one run, with the paper's constants
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k    a real model (one GPU)
    python train.py --resume --out runs/toy                            go on where a run stopped

Everything that a run writes is described at the head of run/folder.py.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from border import one_line_for_ctrl_c

    one_line_for_ctrl_c()

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from border import UserError, one_line_at_most
from engine.guard import Trainer
from engine.memory import device_bytes, fitting
from run import both, folder
from run.log import Log, announce
from run.models import check_room, device_from
from run.page import write_page
from run.settings import Settings, parser, save_settings, settings_and_folder
from run.stopping import StopAsked, as_user_errors
from run.table import open_models, write_table
from run.warm_start import open_start
from tasks.data import DataTask
from tasks.toy import ToyTask, World

MOST_SKIPPED = 3  # steps in a row


def train(trainer: Trainer, task: ToyTask | DataTask, out: Path, given: dict, stop: StopAsked) -> str | None:
    """The training loop of every run; what ended it early, if anything did."""
    steps, save_every, early = trainer.config.steps, given.get("save_every", 20), None
    with Log(trainer, task, out, given.get("log_groups", 2)) as log, stop.finishing("step"):
        while trainer.steps_done < steps and not early:
            problems, more = task.problems(trainer.steps_done), task.more(trainer.steps_done)
            prompts = [task.prompt(problem) for problem in problems]
            # The step's `answers` are whole problems here: task.are_correct takes the answer out of each.
            scored = trainer.step(prompts, problems, fresh=((task.prompt(problem), problem) for problem in more))
            log.step(scored)
            if log.skipped_in_a_row == MOST_SKIPPED:
                early = f"{MOST_SKIPPED} steps in a row were skipped, the last for its {trainer.skipped}"
            elif stop.asked:
                early = "stopped"
            if trainer.steps_done % save_every == 0 or trainer.steps_done == steps or early:
                folder.save(trainer, out)
    return early or ("stopped" if stop.asked else None)


def open_run(
    settings: Settings,
    out: Path,
    device: torch.device,
    resume: bool,
    stop: StopAsked,
    new_task: Callable,
    new_trainer: Callable,
) -> tuple[Trainer, ToyTask | DataTask]:
    """The trainer and its task, as they begin or as the last checkpoint left them. Raises UserError, OSError."""
    policy, tokenizer = open_start(settings, out.parent, device, resume, stop)
    task = new_task(settings, tokenizer)
    check_room(policy, task.longest_prompt, settings.config.max_new_tokens)
    config = settings.config
    config = fitting(policy, config, task.longest_prompt, config.in_bfloat16(device.type), device_bytes(device))
    try:
        trainer = new_trainer(policy, tokenizer, task.are_correct, config, settings.engine)
    except (ValueError, NotImplementedError) as reason:
        raise UserError(f"model {settings.model}: {reason}") from reason
    folder.go_on(trainer, out, resume)
    save_settings(settings, out)
    return trainer, task


def usual_task(settings: Settings, tokenizer) -> ToyTask | DataTask:
    """What the settings train on."""
    if settings.on_toy:
        return ToyTask(settings.config, tokenizer, World.changed(settings.world))
    return DataTask(settings.config, tokenizer, settings.data)


def one_run(given: dict, new_task: Callable, new_trainer: Callable) -> int:
    """One run; returns its exit status. Raises UserError, and KeyboardInterrupt that says what is kept."""
    settings, out = settings_and_folder(given)
    folder.refuse_odd(out)
    device, resume = device_from(given.get("device")), given.get("resume", False)
    grpo_folder = given.get("grpo")  # only in the second of two runs: that of the first
    go_on = given["command"] if "both" in given else f"python train.py --resume --out {shlex.quote(str(out))}"
    with as_user_errors(out), StopAsked() as stop:
        out.mkdir(parents=True, exist_ok=True)
        with folder.only_one(out / "lock"):
            trainer, task = open_run(settings, out, device, resume, stop, new_task, new_trainer)
            announce(trainer, task, second=bool(grpo_folder))
            early = train(trainer, task, out, given, stop)
            if early and (early != "stopped" or trainer.steps_done < trainer.config.steps):  # broken, or not yet done
                write_page([out])
                print(f"{early}; saved after step {trainer.steps_done}; to go on: {go_on}")
                return 130 if early == "stopped" else 1
            try:
                if stop.asked:  # in the last step, or while it was saved
                    raise KeyboardInterrupt
                if grpo_folder or "both" not in given:  # the second of two makes the first's
                    finish(settings, trainer, out, given.get("test_stories", 300), grpo_folder)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped; all steps are done and saved; to go on: {go_on}") from None
    return 0


def finish(settings: Settings, trainer: Trainer, out: Path, test_stories: int, grpo_folder: Path | None) -> None:
    """When all steps are done: the table of a toy run, and the page, beside GRPO's run where there is one."""
    trainer.kept = None  # the table's rollouts want the memory
    if settings.on_toy and test_stories:
        models = open_models(settings.model, trainer, grpo_folder)
        write_table(models, trainer, out, test_stories, World.changed(settings.world))
    page = write_page([out, grpo_folder] if grpo_folder else [out])
    print(f"\n{out} holds the model, metrics.jsonl, rollouts.jsonl; open {page} in a browser")


def main(
    arguments: Sequence[str] | None = None, *, new_task: Callable = usual_task, new_trainer: Callable = Trainer
) -> int:
    """The command; returns its exit status. lab/ hands over tasks and trainers of its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with one_line_at_most(stopped="stopped; what was saved before stays") as end:
        arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
        given = vars(parser(__doc__).parse_args(arguments or ["--both"]))
        given["command"] = shlex.join(["python", "train.py", *arguments])
        for options in both.two_runs(given) if "both" in given else [given]:
            if status := one_run(options, new_task, new_trainer):
                return status
    return end.status


if __name__ == "__main__":
    sys.exit(main())
