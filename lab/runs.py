"""Toy runs for the tables and figures of `lab.paper`: what one run measures, and many of them on all cores.

A run is decided by its seed and by what it changes of the toy track's settings, of the toy world and of the trainer
(lab/referees.py). Runs of one seed start from the same warm-started model and see the same stories, so that their
differences are paired. A results file holds one JSON line per run; what stands there is never run again, so that a
stopped command goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import checkpoint
import toy
from clipo import ROLLOUT
from config import CLIPOConfig
from engine.guard import Trainer
from lab.provenance import ROOT, commit, processor
from lab.referees import of_kind
from problems import are_correct
from train import ToyTask, take_step, warm_started

PRETRAINED = {"smollm": ROOT / "runs" / "smollm"}  # a size that is a model of its own: python -m lab.smollm runs/smollm
SHARES = 5  # bins of the share of sound ones among a group's correct rollouts


def fingerprint() -> str:
    """Of everything that a run does not name because it is the default (it does name its seed): another default makes
    other runs."""
    only_speed = ("max_batch", "cuda_graphs", "micro_batch_tokens", "recompute_activations")
    config = {name: v for name, v in asdict(CLIPOConfig.for_track("toy", seed=0)).items() if name not in only_speed}
    usual = [config, asdict(toy.WORLD)]
    return hashlib.sha256(json.dumps(usual, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Run:
    """kind "start": the warm-started model as it is; "train": trained on; "frozen": heads on a frozen policy."""

    kind: str
    seed: int
    config: dict = field(default_factory=dict)  # changes to CLIPOConfig.for_track("toy"); "frozen": {arm: changes}
    world: dict = field(default_factory=dict)  # changes to toy.World()
    trainer: str = ""  # one of lab.referees.TRAINERS
    twice: bool = False  # go on to twice the steps, and evaluate there too
    size: str = "tiny"  # of the model, one of toy.SIZES or PRETRAINED
    batches: int = 600  # of the warm start
    stories: int = 300  # of each level in an evaluation
    levels: tuple[str, ...] = ("P0", "P2")  # that are evaluated
    defaults: str = field(default_factory=fingerprint)

    @property
    def key(self) -> str:
        """Equal for equal runs, whatever order or type (list, tuple) their settings came in."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def start(self) -> Run:
        """The run whose warm-started model this one begins with, whatever the friend is like in training."""
        world = {name: value for name, value in self.world.items() if name != "friend_right"}
        same = {name: getattr(self, name) for name in ("size", "batches", "stories")}
        return Run("start", self.seed, {}, world, levels=tuple(toy.LEVELS), **same)


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


class Mechanism:
    """Gathers, step by step, what the contrastive reward pays for soundness."""

    def __init__(self):
        self.gap: list[float | None] = []  # of each step, the mean over its groups
        self.by_share = [[0, 0.0] for _ in range(SHARES)]  # number of groups and sum of their gaps, by sound share

    def add(self, *scored: Tensor) -> None:
        gaps = payments(*scored)
        for share, gap in gaps:
            cell = self.by_share[min(int(share * SHARES), SHARES - 1)]
            cell[0], cell[1] = cell[0] + 1, cell[1] + gap
        self.gap.append(sum(gap for _, gap in gaps) / len(gaps) if gaps else None)


def open_start(run: Run, runs: Path, device: torch.device):
    """The warm-started model of a run, its tokenizer, its world."""
    world = toy.World(**run.world)
    pretrained = str(PRETRAINED[run.size]) if run.size in PRETRAINED else None
    folder = warm_started(runs, run.size, run.seed, run.batches, device, world, model=pretrained)
    return *checkpoint.load_model(str(folder), device), world


def evaluation(run: Run, model, tokenizer, world: toy.World) -> dict:
    """Greedy answers: {level: {metric: (successes, trials)}}."""
    return toy.evaluate(model, tokenizer, count=run.stories, world=world, levels=run.levels)


KEPT = ("accuracy", "process", "on_floor", "contrastive_reward_std", "groups_without_contrast", "entropy")


def execute_train(run: Run, runs: Path, device: torch.device) -> dict:
    """Train from the warm start; each step's measurements, and the evaluation after the last one (or two)."""
    model, tokenizer, world = open_start(run, runs, device)
    config = CLIPOConfig.for_track("toy", seed=run.seed, **run.config)
    trainer, task = of_kind(run.trainer, model, tokenizer, config, world)
    mechanism, found = Mechanism(), {}
    history: dict[str, list] = {name: [] for name in (*KEPT, "sound_share", "cosine")}
    for step in range(1, config.steps * (1 + run.twice) + 1):
        metrics, _, sound = take_step(trainer, task)
        scored, sound = trainer.last, torch.tensor(sound, device=device)
        correct, paid = scored.correct, scored.reward - scored.correct.float()  # (of a penalty for length, too)
        metrics["sound_share"] = (correct & sound).sum().item() / max(1, correct.sum().item())
        metrics["cosine"] = mean_cosine(scored.contrast.embedding, correct)
        mechanism.add(paid, scored.reward, correct, sound)
        for name, values in history.items():
            values.append(metrics[name])
        if step % config.steps == 0:
            found["greedy" if step == config.steps else "greedy_twice"] = evaluation(
                run, trainer.policy, tokenizer, world
            )
    return {"history": {**history, "gap": mechanism.gap}, "gap_by_share": mechanism.by_share, **found}


def execute_frozen(run: Run, runs: Path, device: torch.device) -> dict:
    """Every arm's head learns from the same rollouts of the warm-started policy, which stays as it is.

    Measured once a third of the steps is over: {arm: mean gap over groups, by sound share, share on the floor}.
    """
    model, tokenizer, world = open_start(run, runs, device)
    trainers = {
        arm: Trainer(model, tokenizer, are_correct, CLIPOConfig.for_track("toy", seed=run.seed, **changes))
        for arm, changes in run.config.items()
    }
    first = next(iter(trainers.values()))
    task, found = ToyTask(first.config, world), {arm: (Mechanism(), []) for arm in trainers}
    for step in range(first.config.steps):
        stories = task.problems(step)
        prompts = [tokenizer(story.question)["input_ids"] for story in stories]
        answers = [story.answer for story in stories]
        _, rollouts, texts, correct = first.roll_out(prompts, answers, first.random(ROLLOUT))
        sound = torch.tensor(task.soundness(stories, texts), device=device)
        for arm, trainer in trainers.items():
            contrast = trainer.contrast(rollouts.hidden, correct)
            rc = contrast.reward
            trainer.steps_done += 1
            if step >= first.config.steps // 3:
                mechanism, on_floor = found[arm]
                mechanism.add(rc, correct + rc, correct, sound)
                on_floor += (rc[contrast.pairs.anchor] <= trainer.config.reward_floor).tolist()
    return {
        "arms": {
            arm: {
                "gap": sum(total for _, total in mechanism.by_share) / max(1, sum(n for n, _ in mechanism.by_share)),
                "by_share": mechanism.by_share,
                "on_floor": sum(on_floor) / max(1, len(on_floor)),
            }
            for arm, (mechanism, on_floor) in found.items()
        }
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
    return {Run(**{n: line[n] for n in names}).key: line for line in checkpoint.read_lines(file)}


def make(wanted: Sequence[Run], file: Path, runs: Path, workers: int, device: str) -> None:
    """Bring every wanted run, and the warm start it begins with, into the results file; a process and a thread each.

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
        for line, error in pool.imap_unordered(partial(attempt, runs=runs.resolve(), device=device), missing):
            if line is None:
                failed.append(error)
            else:
                checkpoint.append_line(file, line)
            bar.update()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed; the first:\n{failed[0]}")


def begin_worker() -> None:
    """One thread: two runs side by side beat one on two threads. Ctrl-C is the parent's, who then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def attempt(run: Run, runs: Path, device: str) -> tuple[dict | None, str]:
    """Its line, or None and what went wrong."""
    try:
        return execute(run, runs, torch.device(device)), ""
    except Exception:
        return None, f"{run.key}\n{traceback.format_exc()[-2000:]}"
