"""Train a language model with CLIPO: GRPO and the contrastive reward.

    python train.py                                                    the toy world, GRPO and then CLIPO: minutes
    python train.py --both --seed 17                                   the same from another warm start
    python train.py --weight 0                                         one run, without the contrastive reward: GRPO
    python train.py --paper                                            one run, with the paper's constants
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k    a real model (one GPU)
    python train.py --resume --out runs/toy                            go on where a run stopped

Everything that a run writes is described at the head of checkpoint.py.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from problems import one_line_for_ctrl_c

    one_line_for_ctrl_c()

import argparse
import dataclasses
import itertools
import json
import os
import random
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import checkpoint
import toy
import variants
from clipo import Scored
from config import ENGINES, TRACKS, CLIPOConfig, add_options, check_types, config_from
from engine.graphs import CaptureFailed, captures_failed, ran_out_of_memory
from engine.guard import OutOfMemory, Trainer
from engine.memory import device_bytes, fitting, memory_plan
from engine.report import write_report
from engine.table import table, what_to_see
from problems import (
    SUFFIX,
    TRAINING_SETS,
    OptionParser,
    Problem,
    UserError,
    are_correct,
    in_short,
    load_problems,
    prompt_ids,
)

# ----------------------------------------------------------------------------------------------------
# What is trained on: a task gives each step its problems
# ----------------------------------------------------------------------------------------------------


class ToyTask:
    """New stories for every step; knows whether a response is sound."""

    suffix = ""

    def __init__(self, config: CLIPOConfig, world: toy.World = toy.WORLD):
        self.config, self.world = config, world
        self.longest_prompt = config.max_prompt_tokens  # stories are far shorter

    def problems(self, step: int) -> list[toy.Story]:
        return self.stories(f"train {self.config.seed} {step}")

    def more(self, step: int) -> Iterator[toy.Story]:
        """Further ones for a step, without end."""
        for batch in itertools.count():
            yield from self.stories(f"train {self.config.seed} {step} more {batch}")

    def stories(self, seed: str) -> list[toy.Story]:
        return toy.stories(seed, toy.TRAINING_LEVEL, self.config.prompts_per_step, self.world)

    def soundness(self, problems: Sequence[toy.Story], texts: list[list[str]]) -> list[list[bool]] | None:
        """Of P stories and G responses to each."""
        both = zip(problems, texts, strict=True)
        return [[toy.is_sound(story, text) for text in responses] for story, responses in both]


class DataTask:
    """A data set, shuffled anew in each epoch; prompts over the limit are left out."""

    suffix = SUFFIX

    def __init__(self, config: CLIPOConfig, data: str, tokenizer):
        self.config = config
        everything = load_problems(data, "train")
        lengths = [len(prompt_ids(tokenizer, problem.question)) for problem in everything]
        self.longest_prompt = max((n for n in lengths if n <= config.max_prompt_tokens), default=0)
        self.all = [p for p, n in zip(everything, lengths, strict=True) if n <= config.max_prompt_tokens]
        if dropped := len(everything) - len(self.all):
            print(f"{dropped} of {len(everything)} prompts are over {config.max_prompt_tokens} tokens and left out")
        if len(self.all) < config.prompts_per_step:
            raise UserError(
                f"{data} has {len(self.all)} prompts of at most {config.max_prompt_tokens} tokens; expected at least "
                f"--prompts-per-step {config.prompts_per_step}"
            )

    def problems(self, step: int) -> list[Problem]:
        """Step s takes the s-th slice of all epochs laid end to end; an epoch's order follows from seed and epoch."""
        size, count = self.config.prompts_per_step, len(self.all)
        chosen: list[Problem] = []
        for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
            order = list(range(count))
            random.Random(f"epoch {self.config.seed} {epoch}").shuffle(order)
            first, last = max(step * size - epoch * count, 0), min((step + 1) * size - epoch * count, count)
            chosen += [self.all[i] for i in order[first:last]]
        return chosen

    def more(self, step: int) -> Iterator[Problem]:
        """Further ones for a step, drawn at random, without end."""
        draw = random.Random(f"more {self.config.seed} {step}")
        while True:
            yield draw.choice(self.all)

    def soundness(self, problems: Sequence[Problem], texts: list[list[str]]) -> list[list[bool]] | None:
        return None  # nobody knows


# ----------------------------------------------------------------------------------------------------
# Options and settings
# ----------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """All that decides what a run computes; kept in its folder as settings.json."""

    model: str | None  # folder or hub name; None: the toy world's own
    data: str  # "toy", a name in problems.TRAINING_SETS, or a file
    track: str  # whose defaults
    paper: bool
    size: str  # of the toy world's own model
    warm_start_batches: int
    config: CLIPOConfig
    command: str = ""  # that began the run
    engine: str = "fast"  # whose functions computed it; (all runs from before there was a choice)

    def __post_init__(self):
        check_types(self)
        for name, known in (("track", TRACKS), ("size", toy.SIZES), ("engine", ENGINES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; expected one of: {', '.join(known)}")
        if self.warm_start_batches < 1:
            raise ValueError(f"warm_start_batches is {self.warm_start_batches}; expected 1 or more")


def parser() -> argparse.ArgumentParser:
    """The command line. An option that is not given is absent from the result, so that --resume can tell."""
    p = OptionParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    p.add_argument("--model", metavar="NAME_OR_FOLDER", help="causal LM on the hub or in a folder (default: the toy's)")
    p.add_argument(
        "--data", metavar="NAME_OR_FILE",
        help=f"toy, {', '.join(TRAINING_SETS)}, or a .parquet or .jsonl file (default: toy; gsm8k with --model)",
    )  # fmt: skip
    p.add_argument("--track", choices=list(TRACKS), help="whose defaults (default: --data if it is one, else gsm8k)")
    p.add_argument("--paper", action="store_true", help="on the toy world: the paper's constants, not the informative")
    p.add_argument("--size", choices=list(toy.SIZES), help="the toy world's model (default: tiny)")
    p.add_argument(
        "--warm-start-batches",
        type=int,
        metavar="N",
        help="supervised batches before, on the toy world: 600 of 32 demonstrations, 100 of 8 for a --model",
    )
    p.add_argument(
        "--out",
        metavar="FOLDER",
        help="where the run is written (default: runs/NAME, by the options; with --both: the folder of both, runs)",
    )
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    p.add_argument(
        "--engine", choices=ENGINES,
        help="plain: the functions of clipo.py; fast: their twins in engine/ (default: fast; plain for the toy's)",
    )  # fmt: skip
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 20)")
    p.add_argument("--log-groups", type=int, metavar="N", help="groups of each step in rollouts.jsonl (default: 2)")
    p.add_argument("--test-stories", type=int, metavar="N", help="of each level in the toy's table (default: 300)")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, with its settings")
    p.add_argument(
        "--both", action="store_true",
        help="GRPO and then CLIPO from the same start on the toy world, and a table of both (default without options)",
    )  # fmt: skip
    group = p.add_argument_group("hyperparameters (a value per track where tracks differ; in brackets the source)")
    add_options(group)
    return p


def settings_from(given: dict) -> Settings:
    """Settings from the options given and the defaults of their track. Raises UserError."""
    data = given.get("data", "gsm8k" if "model" in given else "toy")
    if data != "toy" and "model" not in given:
        raise UserError(f"--data is {data} but no --model is given; expected --model with a folder or a hub name")
    track = given.get("track", data if data in TRACKS else "gsm8k")
    try:
        config = config_from(given, track, given.get("paper", False))
        variants.parts(config, torch.Generator)  # refuses a loss here, not after minutes of a warm start
    except ValueError as reason:
        raise UserError(str(reason)) from reason
    return Settings(
        given.get("model"),
        data,
        track,
        given.get("paper", False),
        given.get("size", "tiny"),
        given.get("warm_start_batches", 100 if "model" in given else 600),
        config,
        given["command"],
        given.get("engine", "fast" if "model" in given else "plain"),
    )


def settings_of_run(given: dict, out: Path) -> Settings:
    """What a run was begun with; another --steps may be asked for, other changes are refused. Raises UserError."""
    if (saved := checkpoint.read_settings(out)) is None:
        raise UserError(f"{out} holds no run to resume (no settings.json); expected --out with the folder of a run")
    try:
        settings = Settings(**{**saved, "config": CLIPOConfig(**saved["config"])})
    except (ValueError, TypeError) as reason:
        raise UserError(
            f"{out / 'settings.json'} cannot be used ({reason}); expected what this version of train.py wrote"
        ) from reason
    before, free = {**saved, **saved["config"]}, ("steps", "command")
    changed = [name for name, value in given.items() if name in before and name not in free and before[name] != value]
    if changed:
        differences = ", ".join(f"--{n.replace('_', '-')} was {before[n]}, given {given[n]}" for n in changed)
        raise UserError(f"{out} was begun with other settings: {differences}; leave them out, or choose another --out")
    if given.get("steps", settings.config.steps) != settings.config.steps:
        try:
            settings.config = dataclasses.replace(settings.config, steps=given["steps"])
        except ValueError as reason:
            raise UserError(f"--{reason}") from reason
        settings.command += f" --steps {given['steps']}"
    return settings


def default_out(settings: Settings) -> Path:
    """runs/NAME, a different one for each kind of run."""
    config = settings.config
    kind = "-grpo" if config.weight == 0 else "-paper" if settings.paper else ""
    subject = "toy" if settings.model is None else f"{Path(settings.data).stem}-{Path(settings.model).name}"
    seed = "" if config.seed == CLIPOConfig.for_track(settings.track).seed else f"-seed{config.seed}"
    return Path("runs") / f"{subject}{kind}{seed}"


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


class StopAsked:
    """Ctrl-C and a polite kill. While something is being finished (`finishing`) the first one only raises a flag; else,
    and the second time, it stops at once by KeyboardInterrupt. Afterwards all is as it was."""

    def __init__(self):
        self.asked, self.at_work = False, ""

    def __enter__(self) -> StopAsked:
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if self.asked or not self.at_work:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write(f"stopping after this {self.at_work} (once more: at once, without saving)")


@contextmanager
def finishing(stop: StopAsked | None, at_work: str):
    """What is at work in here is finished before a stop is obeyed; who does it looks at `stop.asked`."""
    if stop is not None:
        stop.at_work = at_work
    try:
        yield
    finally:
        if stop is not None:
            stop.at_work = ""


def warm_started(
    runs: Path,
    size: str,
    seed: int,
    batches: int,
    device: torch.device,
    world: toy.World = toy.WORLD,
    stop: StopAsked | None = None,
    model: str | None = None,
) -> Path:
    """The folder of a warm-started model, made on first use and kept for the next run: the toy world's own of a size,
    or a pretrained `model` that has now seen demonstrations.
    """
    changed = [  # (how often the friend is right on a test does not show in demonstrations)
        f"{f.name}={getattr(world, f.name)}"
        for f in dataclasses.fields(world)
        if f.name != "friend_right" and getattr(world, f.name) != getattr(toy.WORLD, f.name)
    ]
    whose = Path(model).name if model else size
    folder = runs / "-".join([f"warm-start-{whose}-seed{seed}-{batches}", *changed])
    runs.mkdir(parents=True, exist_ok=True)
    with checkpoint.only_one(Path(f"{folder}.lock"), wait=f"{folder} is being made by another process: waiting for it"):
        if not folder.is_dir():
            demonstrator = toy.Demonstrator(seed, world)
            if model:
                opened = checkpoint.load_model(model, device)
                training = toy.WarmStart(*opened, demonstrator, batches=batches, batch_size=8, pretrained=True)
            else:
                tokenizer = toy.make_tokenizer()
                fresh = toy.make_model(size, tokenizer, seed).to(device)
                training = toy.WarmStart(fresh, tokenizer, demonstrator, batches=batches)
            make_warm_start(folder, training, stop)
    return folder.resolve()


SECONDS_AT_RISK = 20  # of a warm start, when a plug is pulled ...
SHARE_OF_SAVING = 1 / 20  # ... or more, where saving would take more of the time than this


def make_warm_start(folder: Path, training: toy.WarmStart, stop: StopAsked | None) -> None:
    """Train it, or go on where that was stopped. Raises KeyboardInterrupt, saved, if `stop` was asked."""
    model, batches, device = training.model, training.batches, training.model.device
    part = Path(f"{folder}.part.safetensors")
    try:
        if part.exists():
            training.go_on_from(load_file(part, device=str(device)))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as reason:
        raise UserError(f"{part} cannot be used ({reason}); delete it, and the warm start begins anew") from reason
    parameters, saved, took = sum(p.numel() for p in model.parameters()), time.monotonic(), 0.0
    title = f"warm start ({parameters / 1e6:.2f}M parameters)"
    with tqdm(total=batches, initial=training.done, desc=title) as bar, finishing(stop, "batch"):
        while training.done < batches:
            bar.set_postfix(loss=f"{training.batch():.2f}", refresh=False)
            bar.update()
            asked = stop is not None and stop.asked
            if asked or time.monotonic() - saved > max(SECONDS_AT_RISK, took / SHARE_OF_SAVING):
                begin = time.monotonic()
                checkpoint.write_tensors(part, training.state())
                saved = time.monotonic()
                took = saved - begin
            if asked:
                raise KeyboardInterrupt(
                    f"stopped in the warm start, after batch {training.done} of {batches}; it is kept, and the same "
                    "command goes on"
                )
    aside = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    model.eval().save_pretrained(aside)
    training.tokenizer.save_pretrained(aside)
    aside.rename(folder)
    part.unlink(missing_ok=True)


def logged_groups(
    step: int,
    problems: Sequence[Problem],
    scored: Scored,
    sound: list[list[bool]] | None,
    count: int,
    one_drawn: bool,
) -> Iterator[dict]:
    """The first `count` groups of a step, a row for rollouts.jsonl each; `engine.report` shows them.

    `cosine` is the matrix of the embeddings' cosines; rollouts and `positives` are numbered within the group.
    one_drawn: was an anchor pulled to one positive (InfoNCE), or to all?
    """
    contrast, G = scored.contrast, scored.correct.shape[1]
    pulled_to = contrast.pairs.target if one_drawn else contrast.pairs.positive  # (P, G, G), or (P, G, B)
    for g in range(min(count, len(problems))):
        own = pulled_to[g] if pulled_to.shape[-1] == G else pulled_to[g, :, g * G : g * G + G]  # (G, G)
        numbers = {
            "correct": scored.correct[g],
            "anchor": contrast.pairs.anchor[g],
            "contrastive_loss": contrast.loss[g],
            "contrastive_reward": contrast.reward[g],
            "reward": scored.reward[g],
            "advantage": scored.advantage[g],
        }
        numbers = {name: values.tolist() for name, values in numbers.items()}  # a GPU is waited for once for each
        rollouts = []
        for i, (text, to) in enumerate(zip(scored.texts[g], own.tolist(), strict=True)):
            row = {"text": text, **{name: values[i] for name, values in numbers.items()}}
            row["positives"] = [a for a, pulled in enumerate(to) if pulled and row["anchor"]]
            if sound:
                row |= {"sound": sound[g][i], "bad_step": toy.first_bad_step(problems[g], text)}
            rollouts.append(row)
        z = contrast.embedding[g]  # (G, E)
        yield {
            "step": step,
            "question": problems[g].question,
            "answer": problems[g].answer,
            "all_positives": not one_drawn,
            "rollouts": rollouts,
            "cosine": [[round(cosine, 2) for cosine in row] for row in (z @ z.t()).tolist()],
        }


def take_step(trainer: Trainer, task: ToyTask | DataTask) -> tuple[dict, list[Problem], list[list[bool]] | None]:
    """The next step; its metrics, the problem of each group, and on the toy world which rollouts of it are sound."""
    drawn: list[Problem] = []

    def pairs(problems: Iterable[Problem]) -> Iterator[tuple[list[int], str]]:
        for problem in problems:
            drawn.append(problem)
            yield prompt_ids(trainer.tokenizer, problem.question, task.suffix), problem.answer

    prompts, answers = zip(*pairs(task.problems(trainer.steps_done)), strict=True)
    metrics = trainer.step(prompts, answers, fresh=pairs(task.more(trainer.steps_done)))
    if metrics["skipped"]:
        return metrics, [], None
    problems = [drawn[i] for i in trainer.origin]
    sound = task.soundness(problems, trainer.last.texts)
    process = {"process": sum(map(sum, sound)) / sum(map(len, sound))} if sound else {}
    return metrics | process, problems, sound


MOST_SKIPPED = 3  # steps in a row


def train(
    trainer: Trainer, task: ToyTask | DataTask, out: Path, save_every: int, log_groups: int, stop: StopAsked
) -> str | None:
    """Run the remaining steps; what ended them early, if anything did. The state is saved in any case."""
    config, early, skipped = trainer.config, None, 0
    with tqdm(total=config.steps, initial=trainer.steps_done, desc=out.name) as bar, finishing(stop, "step"):
        while trainer.steps_done < config.steps and not early:
            sizes = dict(trainer.sizes)
            metrics, problems, sound = take_step(trainer, task)
            if trainer.last:  # (a skipped step has nothing to show)
                logged = metrics["step"], problems, trainer.last, sound, log_groups
                for row in logged_groups(*logged, one_drawn=config.contrastive_kind == "infonce"):
                    checkpoint.append_line(out / "rollouts.jsonl", row)
            if trainer.policy in captures_failed:
                metrics["without_cuda_graphs"] = captures_failed[trainer.policy]
            checkpoint.append_line(out / "metrics.jsonl", metrics)
            show_step(bar, metrics, sizes, trainer.sizes)
            skipped = skipped + 1 if metrics["skipped"] else 0
            if skipped == MOST_SKIPPED:
                early = f"{skipped} steps in a row were skipped, the last for its {metrics['skipped']}"
            elif stop.asked:  # read once: a signal after this line is the next step's
                early = "stopped"
            if trainer.steps_done % save_every == 0 or trainer.steps_done == config.steps or early:
                checkpoint.save(trainer, out)
    return early or ("stopped" if stop.asked else None)


def too_long(steps_left: int, seconds: float) -> str | None:
    """Says how long the steps that are left will take, where that is over a month."""
    days = steps_left * seconds / 86400
    return f"{steps_left:,} steps are left: {days:,.0f} days at this pace" if days > 30 else None


def show_step(bar: tqdm, metrics: dict, sizes_before: dict[str, int], sizes: dict[str, int]) -> None:
    """A step's numbers on the bar; above it what is out of the ordinary."""
    for name, size in sizes.items():
        if size < sizes_before[name]:
            tqdm.write(f"out of memory: --{name.replace('_', '-')} goes on with {size}, slower, the results the same")
    if metrics["skipped"]:
        tqdm.write(f"step {metrics['step']} is skipped: a number broke (NaN or infinite) in its {metrics['skipped']}")
    else:
        numbers = "reward {reward:.2f}, accuracy {accuracy:.2f}, {tokens_per_second:,.0f} tokens/s"
        bar.set_postfix_str(numbers.format(**metrics), refresh=False)
    bar.update()
    if bar.n - bar.initial == 3 and (warning := too_long(bar.total - bar.n, bar.format_dict["elapsed"] / 3)):
        tqdm.write(warning)


def show_plan(trainer: Trainer, longest_prompt: int) -> None:
    """The memory plan, and whether the device has so much."""
    config, device = trainer.config, trainer.policy.device
    plan, has = (
        memory_plan(trainer.policy, config, longest_prompt, config.in_bfloat16(device.type)),
        device_bytes(device),
    )
    print(plan)
    if config.recompute_activations:
        print("  activations are computed again in the backward pass (--no-recompute-activations keeps them)")
    if plan.peak > has:
        print(f"  there are {has / 1e9:.1f} GB; a lower --max-batch or --micro-batch-tokens takes less")


def evaluated(models: dict, trainer: Trainer, out: Path, count: int) -> None:
    """The table of the models by name, and evaluation.json."""
    graphs = trainer.config.cuda_graphs
    columns = {
        name: toy.evaluate(model, trainer.tokenizer, count=count, cuda_graphs=graphs) for name, model in models.items()
    }
    checkpoint.write_text(out / "evaluation.json", json.dumps(columns, indent=1))
    print(f"\n{table(columns, count)}\n")
    if "GRPO" in columns:
        print(*(textwrap.fill(sentence, 110) for sentence in what_to_see(*columns.values())), "", sep="\n")
    print("P0 is like the training stories; P1 and P2 are longer, and there the friend is right less and less.")
    print("process: every step is the story's and right, and so is the answer. lucky: a right answer without that.\n")


def try_next(settings: Settings, both: bool) -> None:
    """The commands that a reader of the table may want now."""
    mine, usual = settings.config.seed, CLIPOConfig.for_track("toy").seed
    seed = "" if mine == usual else f" --seed {mine}"
    commands = {
        f"--both --seed {mine + 1}": "both from another warm start",
        **({} if settings.paper else {f"--paper{seed}": "CLIPO with the paper's own constants"}),
    }
    if not both:
        commands = {f"--both{seed}": "GRPO and CLIPO from this start, side by side", **commands}
    print("Try next:")
    for options, what in commands.items():
        print(f"  python train.py {options:20}{what}")


def settings_and_folder(given: dict) -> tuple[Settings, Path]:
    """What a new or resumed run computes, and where it is written. Raises UserError."""
    for name in ("save_every", "log_groups", "warm_start_batches", "test_stories"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {given[name]}; expected 1 or more")
    for name in ("model", "data"):  # a run may be resumed from another folder
        if name in given and Path(given[name]).exists() and given[name] not in ("toy", *TRAINING_SETS):
            given[name] = str(Path(given[name]).resolve())
    if not given.get("resume"):
        settings = settings_from(given)
        out = Path(given.get("out", default_out(settings)))
        if (out / "settings.json").exists() or checkpoint.checkpoints(out):
            raise UserError(f"{out} already holds a run; go on with --resume --out {out}, or choose another --out")
        return settings, out
    if "out" not in given:
        raise UserError("--resume is given without --out; expected --out with the folder of the run to go on with")
    return settings_of_run(given, Path(given["out"])), Path(given["out"])


def check_room(policy, longest_prompt: int, max_new_tokens: int) -> None:
    """Raise UserError if the longest sequence there may be is too long for the model."""
    room, longest = getattr(policy.config, "max_position_embeddings", None), longest_prompt + max_new_tokens
    if room and longest > room:
        raise UserError(
            f"--max-new-tokens is {max_new_tokens}, prompts have up to {longest_prompt} tokens, {longest} in all, but "
            f"the model has {room} positions; expected fewer (--max-prompt-tokens drops long prompts)"
        )


def knows_the_stories(tokenizer) -> bool:
    """Is it of one of the toy world's own models? They have had their warm start."""
    return tokenizer is not None and tokenizer.get_vocab() == toy.make_tokenizer().get_vocab()


def open_run(
    settings: Settings, out: Path, device: torch.device, resume: bool, stop: StopAsked
) -> tuple[Trainer, ToyTask | DataTask]:
    """The trainer and its task, as they begin or as the last checkpoint left them. Raises UserError, OSError."""
    config = settings.config
    policy, tokenizer = checkpoint.load_model(settings.model, device) if settings.model else (None, None)
    if settings.data == "toy" and not resume and not knows_the_stories(tokenizer):
        del policy  # another takes its place, and its memory
        start = out.parent, settings.size, config.seed, settings.warm_start_batches, device
        settings.model = str(warm_started(*start, stop=stop, model=settings.model))
        policy, tokenizer = checkpoint.load_model(settings.model, device)
    task = ToyTask(config) if settings.data == "toy" else DataTask(config, settings.data, tokenizer)
    check_room(policy, task.longest_prompt, config.max_new_tokens)
    config = fitting(policy, config, task.longest_prompt, config.in_bfloat16(device.type), device_bytes(device))
    try:
        trainer = Trainer(policy, tokenizer, are_correct, config, settings.engine)
    except (ValueError, NotImplementedError) as reason:
        raise UserError(f"model {settings.model}: {reason}") from reason
    if saved := checkpoint.newest_whole(out) if resume else None:
        checkpoint.resume(trainer, saved)
        checkpoint.publish(saved, out)
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        checkpoint.keep_until(out / file, trainer.steps_done)
    checkpoint.write_text(out / "settings.json", json.dumps(dataclasses.asdict(settings), indent=1))
    return trainer, task


@contextmanager
def one_line_for(out: Path):
    """What a folder, a GPU or too little memory can do to a run becomes UserError."""
    try:
        yield
    except OSError as reason:
        why = f"{reason.filename or out}: {reason.strerror or reason}"
        raise UserError(f"{why}; expected a folder with room that can be written; what was saved stays") from reason
    except CaptureFailed as reason:
        raise UserError(f"--cuda-graphs: {reason}; leave it out, and rollouts go on without") from reason
    except RuntimeError as reason:
        if not (isinstance(reason, OutOfMemory) or ran_out_of_memory(reason)):
            raise
        why = f"out of memory: {in_short(reason)}"
        raise UserError(
            f"{why}; expected a smaller --max-new-tokens or model, or more memory; what was saved stays"
        ) from reason


def run(given: dict, grpo: Path | None = None) -> int:
    """One run; returns its exit status. Raises UserError, and KeyboardInterrupt that says what is kept.

    Of `--both` the first part ends without page and table; the second has the first, `grpo`, beside it there.
    """
    settings, out = settings_and_folder(given)
    checkpoint.refuse_links(out)
    device, config = checkpoint.device_from(given.get("device")), settings.config
    is_part = given.get("both", False)
    go_on = settings.command if is_part else f"python train.py --resume --out {shlex.quote(str(out))}"
    with one_line_for(out), StopAsked() as stop:
        out.mkdir(parents=True, exist_ok=True)
        with checkpoint.only_one(out / "lock"):
            trainer, task = open_run(settings, out, device, given.get("resume", False), stop)
            if config.weight > 0 and config.steps <= config.head_warmup_steps:
                print(f"all {config.steps} steps are head warm-up (--head-warmup-steps {config.head_warmup_steps}): "
                      "the policy will not change")  # fmt: skip
            show_plan(trainer, task.longest_prompt)
            room = config.max_new_tokens
            if settings.data == "toy" and (most := toy.longest_response(trainer.tokenizer, task.problems(0))) > room:
                print(f"  a sound response may have {most} tokens; --max-new-tokens {room} cuts it off")
            early = train(trainer, task, out, given.get("save_every", 20), given.get("log_groups", 2), stop)
            if early and trainer.steps_done < config.steps:
                write_report([out])
                print(f"{early}; saved after step {trainer.steps_done}; to go on: {go_on}")
                return 130 if early == "stopped" else 1
            try:
                if stop.asked:  # while the last step was saved
                    raise KeyboardInterrupt
                if grpo or not is_part:
                    finish(settings, trainer, out, given.get("test_stories", 300), grpo)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped; all steps are done and saved; to go on: {go_on}") from None
    return 0


def run_both(given: dict) -> int:
    """GRPO, then CLIPO, from one warm start; then a table and a page of both. What is done is not done again."""
    if wrong := sorted({"model", "data", "weight", "resume"} & set(given)):
        raise UserError(
            f"--both is given with --{wrong[0]}; expected --both without it: it trains the toy world's own model with "
            "and without the contrastive reward, and goes on by itself where it was stopped"
        )
    runs, grpo = Path(given.get("out", "runs")), None
    for weight in ({"weight": 0.0}, {}):
        part = {**given, **weight}
        out = runs / default_out(settings_from(part)).name
        part |= {"out": str(out), "resume": (out / "settings.json").exists()}
        if status := run(part, grpo):
            return status
        grpo = out
    return 0


def finish(settings: Settings, trainer: Trainer, out: Path, test_stories: int, grpo: Path | None) -> None:
    """What comes when all steps are done: on the toy world the table, and the page; with the run of GRPO, if given."""
    if settings.data == "toy":
        device = trainer.policy.device
        models = {"start": checkpoint.load_model(settings.model, device)[0]}
        if grpo:
            models |= {"GRPO": checkpoint.load_model(str(grpo), device)[0], "CLIPO": trainer.policy}
        else:
            models["trained"] = trainer.policy
        evaluated(models, trainer, out, test_stories)
        try_next(settings, both=grpo is not None)
    page = write_report([out, grpo] if grpo else [out])
    print(f"\n{out} holds the model, metrics.jsonl, rollouts.jsonl; open {page} in a browser")


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
        given = vars(parser().parse_args(arguments or ["--both"]))
        given["command"] = shlex.join(["python", "train.py", *arguments])
        return run_both(given) if given.get("both") else run(given)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:  # without a text: outside the training steps, or for the second time
        print(str(stopped) or "stopped; what was saved before stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
