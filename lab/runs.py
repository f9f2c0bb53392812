"""Toy runs for the tables and figures of `lab.paper`: what one run measures, and many of them on all cores.

A run is decided by its seed and by what it changes of the toy track's settings, of the toy world and of the trainer
(lab/referees.py). Runs of one seed start from the same warm-started model and see the same stories, so that their
differences are paired. A results file holds one JSON line per run; what stands there is never run again, so that a
stopped command goes on.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import shlex
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import train
from clipo import ROLLOUT, Agreement, Scored, group_advantages
from config import ONLY_SPEED, CLIPOConfig
from engine.guard import Trainer
from lab.provenance import ROOT, commit, processor
from lab.referees import of_kind
from run.folder import append_line, read_lines
from run.models import load_model
from run.settings import Settings, as_options
from run.table import measure_table
from run.warm_start import warm_started
from tasks.grading import are_correct
from tasks.toy import Story, ToyTask, World, is_sound, push, soundness

PRETRAINED = {"smollm": ROOT / "runs" / "smollm"}  # a size that is a model of its own: python -m lab.smollm runs/smollm


CONTRASTIVE = (
    "contrastive_kind", "contrastive_scope", "tau", "reward_floor", "reward_ceiling", "reward_from_chance",
    "shuffle_contrast", "center_hidden", "d_embed", "head_mlp", "head_lr", "head_weight_decay", "head_steps",
    "head_warmup_steps",
)  # fmt: skip


def all_settings(changes: dict) -> dict:
    """Every setting of a toy run that decides its numbers, but the seed: other defaults, another day, are other runs.

    Without a contrastive reward those of the head and of the reward decide nothing, and are left out.
    """
    config = CLIPOConfig.for_track("toy", **changes)
    without = ("seed", *ONLY_SPEED, *(() if config.weight else CONTRASTIVE))
    return {name: value for name, value in asdict(config).items() if name not in without}


@dataclass(frozen=True)
class Run:
    """kind "start": the warm-started model as it is; "train": trained on; "frozen": heads on a frozen policy."""

    kind: str
    seed: int
    config: dict = field(default_factory=dict)  # `all_settings`; "start": none; "frozen": {arm: all_settings}
    world: dict = field(default_factory=dict)  # dials of toy.World: all, as they were when the line was made
    trainer: str = ""  # one of lab.referees.TRAINERS
    doubled: int = 0  # so many times it goes on to twice the steps, and is evaluated there too
    size: str = "tiny"  # of the model, one of toy.SIZES or PRETRAINED
    batches: int = 600  # of the warm start
    stories: int = 300  # of each level in an evaluation

    @property
    def key(self) -> str:
        """Equal for equal runs, whatever order or type (list, tuple) their settings came in.

        A dial that is not given, as in lines that are older than it, stands where it usually stands.
        """
        return json.dumps(asdict(self) | {"world": asdict(World.changed(self.world))}, sort_keys=True)

    @property
    def start(self) -> Run:
        """The run whose warm-started model this one begins with."""
        same = {name: getattr(self, name) for name in ("size", "batches", "stories")}
        return Run("start", self.seed, {}, self.world, **same)


# ----------------------------------------------------------------------------------------------------
# What a run measures
# ----------------------------------------------------------------------------------------------------


def payments(contrastive: Tensor, reward: Tensor, correct: Tensor, sound: Tensor) -> list[tuple[float, float]]:
    """(share of sound among the correct, gap) of every group with both a sound and an unsound correct rollout.

    The gap is what the contrastive reward pays a sound correct rollout more than an unsound one, in units of the
    standard deviation of the group's rewards R: by so much their advantages differ. All arguments (P, G).

    R is 1, 0.5 and 0, its standard deviation 0.5:
    >>> rc, correct = torch.tensor([[0.0, -0.5, 0.0]]), torch.tensor([[True, True, False]])
    >>> (share, gap), = payments(rc, correct + rc, correct, torch.tensor([[True, False, False]]))
    >>> share, round(gap, 4)
    (0.5, 1.0)
    """
    gaps = []
    for paid, std, right, wrongly in zip(contrastive, reward.std(-1), correct & sound, correct & ~sound, strict=True):
        if right.any() and wrongly.any():
            share = right.sum() / (right | wrongly).sum()
            gap = (paid[right].mean() - paid[wrongly].mean()) / (std + 1e-6)
            gaps.append((share.item(), gap.item()))
    return gaps


def mean_cosine(embedding: Tensor, correct: Tensor) -> float | None:
    """Mean cosine between two correct rollouts of one group, over all groups with two: (P, G, E), (P, G).

    >>> mean_cosine(torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]]), torch.tensor([[True, True, False]]))
    0.6000000238418579
    """
    means = []
    for group, right in zip(embedding, correct, strict=True):
        z = group[right]
        if len(z) > 1:
            means.append(((z @ z.t()).sum() - len(z)) / (len(z) * (len(z) - 1)))  # the diagonal is 1
    return torch.stack(means).mean().item() if means else None


def mean_gap(*scored: Tensor) -> float | None:
    """The mean gap of `payments` over the groups of a step; None if no group has one."""
    gaps = [gap for _, gap in payments(*scored)]
    return sum(gaps) / len(gaps) if gaps else None


def measured(task: type[ToyTask]) -> type[ToyTask]:
    """A kind of task that also measures, in each step, what soundness is paid and how the head sees it."""

    class Measured(task):
        def measure(self, scored: Scored) -> dict:
            correct, sound = scored.correct, soundness(scored)
            paid = scored.reward - correct.float()  # a penalty for length, too
            return super().measure(scored) | {
                "sound_share": (correct & sound).sum().item() / max(1, correct.sum().item()),
                "cosine": mean_cosine(scored.agreement.embedding, correct),
                "gap": mean_gap(paid, scored.reward, correct, sound),
            }

    return Measured


def open_start(run: Run, runs: Path, device: torch.device):
    """The warm-started model of a run, its tokenizer, its world."""
    world = World.changed(run.world)
    pretrained = str(PRETRAINED[run.size]) if run.size in PRETRAINED else None
    folder = warm_started(runs, run.size, run.seed, run.batches, device, world, model=pretrained)
    return *load_model(str(folder), device), world


def evaluation(run: Run, model, tokenizer, world: World) -> dict:
    """What is measured of a model: {level, or "sampled": {metric: (successes, trials)}}."""
    return measure_table(model, tokenizer, count=run.stories, world=world)


EVALUATED = "greedy", "greedy_twice", "greedy_four_times"  # after the run's steps, and each time it was doubled
KEPT = (
    "accuracy", "process", "on_floor", "contrastive_reward_std", "groups_without_contrast", "entropy", "sound_share",
    "cosine", "gap", "push_sound", "push_unsound", "push_wrong",
)  # fmt: skip


def execute_train(run: Run, runs: Path, device: torch.device) -> dict:
    """Train from the warm start; each step's measurements, and the evaluation after the last one (or two)."""
    steps, found = run.config["steps"], {}
    task, trainer = of_kind(run.trainer)
    task, world = measured(task), World.changed(run.world)
    model = ["--model", PRETRAINED[run.size], "--data", "toy"] if run.size in PRETRAINED else ["--size", run.size]
    begin = [
        *model, "--engine", "fast", "--world", json.dumps(run.world), "--warm-start-batches", run.batches,
        *as_options({"seed": run.seed, **{name: v for name, v in run.config.items() if v is not None}}),
    ]  # fmt: skip
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix="run-") as out:
        shared = ["--out", out, "--device", device, "--test-stories", 0, "--save-every", 10**6]
        for times, name in enumerate(EVALUATED[: 1 + run.doubled]):
            options = ["--resume", "--steps", steps << times] if times else begin
            quietly(train.main, [*options, *shared], task, trainer)
            found[name] = evaluation(run, *load_model(out, device), world)
        metrics = read_lines(Path(out) / "metrics.jsonl")
    history = {name: [step[name] for step in metrics] for name in KEPT}
    return {"history": history, **found}


def quietly(main: Callable, arguments: Sequence, task: type[ToyTask], trainer: type[Trainer]) -> None:
    """train.py, without what it says, which RuntimeError quotes if it does not end well."""

    def new_task(settings: Settings, tokenizer) -> ToyTask:
        return task(settings.config, tokenizer, World.changed(settings.world))

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(list(map(str, arguments)), new_task=new_task, new_trainer=trainer)
    if status:
        raise RuntimeError(f"train.py {shlex.join(map(str, arguments))} ended with status {status}: {said.getvalue()}")


def calculates(story: Story, text: str) -> bool:
    """Does a response go through all of a story, whatever it makes of it? (Copying has always fewer steps.)

    >>> story = Story("", "5", start=3, steps=(("+", 4), ("-", 2)))
    >>> calculates(story, "3 + 4 = 8 . 8 - 2 = 6 . #### 6"), calculates(story, "3 + 2 = 5 . #### 5")
    (True, False)
    """
    return text.count("=") == len(story.steps)


class Frozen:
    """What one head is paid on the rollouts of a frozen policy: step by step, and those that are measured together."""

    def __init__(self):
        self.gap_by_step, self.push_by_step, self.loss_by_step = [], [], []
        self.gaps, self.on_floor = [], []
        self.advantages = {"calculated": [], "copied": []}
        self.by_right = {}  # {n right of a group: [groups, sum of their (copied - calculated)]}

    def add(
        self, agreement: Agreement, correct: Tensor, sound: Tensor, calculated: Tensor, config: CLIPOConfig, *,
        measured: bool,
    ) -> None:  # fmt: skip
        reward = correct + agreement.reward
        advantage = group_advantages(reward, scale_by_std=config.scale_by_std)
        gaps = [gap for _, gap in payments(agreement.reward, reward, correct, sound)]
        pushes = push(advantage, correct, sound)
        self.gap_by_step.append(sum(gaps) / len(gaps) if gaps else None)
        known = None not in (pushes["push_sound"], pushes["push_unsound"])
        self.push_by_step.append(pushes["push_sound"] - pushes["push_unsound"] if known else None)
        self.loss_by_step.append(agreement.loss[agreement.pairs.anchor].mean().item())
        if not measured:
            return
        self.gaps += gaps
        self.on_floor += (agreement.reward[agreement.pairs.anchor] <= config.reward_floor).tolist()
        self.advantages["calculated"] += advantage[calculated].tolist()
        self.advantages["copied"] += advantage[~calculated].tolist()
        for paid, right, one in zip(advantage, correct, calculated, strict=True):
            if one.any() and not one.all():
                cell = self.by_right.setdefault(int(right.sum()), [0, 0.0])
                cell[0], cell[1] = cell[0] + 1, cell[1] + (paid[~one].mean() - paid[one].mean()).item()

    def summary(self) -> dict:
        means = {kind: sum(all_of) / max(1, len(all_of)) for kind, all_of in self.advantages.items()}
        return {
            "gap": sum(self.gaps) / max(1, len(self.gaps)),
            "on_floor": sum(self.on_floor) / max(1, len(self.on_floor)),
            **means,
            "by_right": {str(n): cell for n, cell in sorted(self.by_right.items())},
            **{name: getattr(self, name) for name in ("gap_by_step", "push_by_step", "loss_by_step")},
        }


def execute_frozen(run: Run, runs: Path, device: torch.device) -> dict:
    """Every arm's head learns from the same rollouts of the warm-started policy, which stays as it is.

    Measured once a third of the steps is over. {"arms": {arm: its `Frozen.summary`}, and shares of all rollouts}.
    """
    model, tokenizer, world = open_start(run, runs, device)
    trainers = {
        arm: Trainer(model, tokenizer, are_correct, CLIPOConfig.for_track("toy", seed=run.seed, **changes))
        for arm, changes in run.config.items()
    }
    first = next(iter(trainers.values()))
    task, found = ToyTask(first.config, tokenizer, world), {arm: Frozen() for arm in trainers}
    right = {"calculated": [], "copied": []}
    for step in range(first.config.steps):
        stories = task.problems(step)
        prompts, answers = [task.prompt(story) for story in stories], [story.answer for story in stories]
        sampled = first.roll_out(prompts, answers, first.random(ROLLOUT))
        groups = list(zip(stories, sampled.texts, strict=True))
        sound, calculated = (
            torch.tensor([[is_true(story, text) for text in texts] for story, texts in groups], device=device)
            for is_true in (is_sound, calculates)
        )
        measured = step >= first.config.steps // 3
        if measured:
            right["calculated"] += sampled.correct[calculated].tolist()
            right["copied"] += sampled.correct[~calculated].tolist()
        for arm, trainer in trainers.items():
            agreement = trainer.contrastive_step(sampled.rollouts.hidden, sampled.correct)
            trainer.steps_done += 1
            found[arm].add(agreement, sampled.correct, sound, calculated, trainer.config, measured=measured)
    return {
        "arms": {arm: frozen.summary() for arm, frozen in found.items()},
        "right": {kind: sum(flags) / max(1, len(flags)) for kind, flags in right.items()},
        "copied": len(right["copied"]) / (len(right["copied"]) + len(right["calculated"])),
    }


def execute(run: Run, runs: Path, device: torch.device) -> dict:
    """Do it; its line for the results file."""
    begin = time.perf_counter()
    if run.kind == "start":
        found = {"greedy": evaluation(run, *open_start(run, runs, device))}
    elif run.kind == "train":
        found = execute_train(run, runs, device)
    else:
        found = execute_frozen(run, runs, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    machine = {"processor": name, "torch": torch.__version__, "transformers": transformers.__version__}
    seconds = round(time.perf_counter() - begin, 1)
    return {**asdict(run), **rounded(found), "seconds": seconds, "commit": commit(), "machine": machine}


def rounded(value):
    """Four decimals are more than any of these measurements knows.

    >>> rounded({"gap": [0.123456, None, 3]})
    {'gap': [0.1235, None, 3]}
    """
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


# ----------------------------------------------------------------------------------------------------
# Many runs
# ----------------------------------------------------------------------------------------------------


def known_runs(file: Path) -> dict[str, dict]:
    """The results file by the keys of its runs."""
    names = Run.__dataclass_fields__
    return {Run(**{n: line[n] for n in names}).key: line for line in read_lines(file)}


def make(wanted: Sequence[Run], file: Path, runs: Path, workers: int, device: str, until: float = math.inf) -> None:
    """Bring every wanted run, and the warm start it begins with, into the results file; a process and a thread each.

    until: a time.time() after which none is to end; none begins that would, if it took as long as its worker's longest.
    Raises RuntimeError, when all others are done, if one failed.
    """
    have = known_runs(file)
    everything = {run.key: run for run in [*(run.start for run in wanted), *wanted]}
    missing = [run for key, run in everything.items() if key not in have]
    # Seed by seed, so that a stopped command leaves whole ones; a warm start a seed ahead, so that nobody waits for it.
    missing.sort(key=lambda run: run.seed - 1.5 * (run.kind == "start"))
    failed = []
    processes = multiprocessing.get_context("spawn").Pool(
        workers, begin_worker
    )  # ended with this block, whatever comes
    with processes as pool, tqdm(total=len(missing), desc="runs", disable=not missing) as bar:
        for line, error in pool.imap_unordered(
            partial(attempt, runs=runs.resolve(), device=device, until=until), missing
        ):
            if line:
                append_line(file, line)
            elif error:
                failed.append(error)
            bar.update()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed; the first:\n{failed[0]}")


def begin_worker() -> None:
    """One thread: two runs side by side beat one on two threads. Ctrl-C is the parent's, who then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


longest = 0.0  # seconds that one of this worker's runs took


def attempt(run: Run, runs: Path, device: str, until: float) -> tuple[dict | None, str]:
    """Its line, or None and what went wrong; None and nothing if there is no time for it."""
    global longest
    if time.time() + longest > until:
        return None, ""
    try:
        line = execute(run, runs, torch.device(device))
    except Exception:
        return None, f"{run.key}\n{traceback.format_exc()[-2000:]}"
    longest = max(longest, line["seconds"])
    return line, ""
