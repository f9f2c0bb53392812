"""GSM8K with a pretrained model of 135M, on one GPU: a short supervised start, then the paper's first track from it.

    pip install -r requirements.txt -r lab/requirements.txt
    python -m lab.smollm runs/smollm
    python -m lab.gsm8k                                      eight minutes of it; the same command goes on, to the table
    python -m lab.gsm8k --train rows.jsonl --test gsm8k.jsonl p1.jsonl p2.jsonl           from files, without the hub

Its parts, in turn: the model learns to imitate GSM8K's worked solutions, with the answer in \\boxed{}; from there go
GRPO, CLIPO in our form and CLIPO with the paper's constants; then all four are evaluated greedily. SETTINGS are what
is not the paper's: so many steps of so many prompts as fit into minutes, and a larger learning rate for a smaller
model. They were not tuned.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import transformers

import eval as evaluation
import train
from border import OptionParser, UserError, status_of
from config import INFORMATIVE
from lab.provenance import ROOT, markdown
from run import folder as run_folder
from run import models as run_models
from run import stopping
from run import warm_start as run_warm_start
from run.evaluation import load_benchmark
from run.scores import cell
from run.settings import as_options
from tasks.data import SUFFIX, load_file, load_from_hub
from tasks.grading import extract_answer

SETTINGS = dict(
    steps=60, prompts_per_step=64, mini_batch_prompts=64, max_new_tokens=256, head_warmup_steps=6, lr=5e-6
)  # fmt: skip
ARMS = {"grpo": {"weight": 0.0}, "clipo": INFORMATIVE, "clipo-paper": {}}
TESTS = ["gsm8k", "gsm_symbolic", "gsm_p1", "gsm_p2"]


class TimeOver(Exception):
    """What was done is kept."""


def boxed(solution: str) -> str:
    """A worked solution of GSM8K as a response: without the notes for a calculator, its answer in a box.

    >>> print(boxed("He has 3 + 4 = <<3+4=7>>7 coins.\\n#### 7"))
    He has 3 + 4 = 7 coins.
    The answer is \\boxed{7}.
    """
    work, _, answer = solution.rpartition("####")
    return f"{re.sub('<<.*?>>', '', work).strip()}\nThe answer is \\boxed{{{answer.strip()}}}."


class Solutions:
    """Demonstrates worked solutions, at random; rows as on the hub: `question`, `answer`. Raises UserError."""

    suffix = SUFFIX

    def __init__(self, source: str, seed: int):
        rows = load_from_hub(source, "train") if source == "gsm8k" else load_file(Path(source))
        answers = [row.get("answer") if isinstance(row, dict) else None for row in rows]
        worked = [a for a in answers if isinstance(a, str) and a.partition("####")[0].strip() and extract_answer(a)]
        if not rows or len(worked) < len(rows):
            raise UserError(
                f"{source}: {len(worked)} of {len(rows)} rows hold a worked solution; expected in each a question, and "
                'as its answer the solution and "#### 72"'
            )
        self.pairs = [(row["question"], boxed(answer)) for row, answer in zip(rows, answers, strict=True)]
        self.random = random.Random(f"solutions {seed}")

    def pair(self) -> tuple[str, str]:
        return self.random.choice(self.pairs)


def all_parts(given: argparse.Namespace) -> None:
    """Do what is not done yet. Raises KeyboardInterrupt where a part was stopped, UserError where it failed."""
    start, device = given.out / "start", run_models.device_from(given.device)
    for test in given.test:  # what is wrong there is said now, not after hours
        load_benchmark(test, 1, {})
    given.out.mkdir(parents=True, exist_ok=True)
    if not start.is_dir():
        training = run_warm_start.WarmStart(
            *run_models.load_model(given.model, device), Solutions(given.train, seed=0),
            batches=given.batches, pretrained=True,
        )  # fmt: skip
        with stopping.StopAsked() as stop:
            run_warm_start.make_warm_start(start, training, stop)
        del training
    here, folders = ["--device", given.device] if given.device else [], [start]
    for arm, changed in ARMS.items():
        folders.append(out := given.out / arm)
        if is_done(out):
            continue
        begin = [
            "--model",
            start,
            "--data",
            given.train,
            "--track",
            "gsm8k",
            *as_options(SETTINGS | changed),
            *given.more,
        ]
        begun = (out / "settings.json").exists()
        ended(arm, train.main([*(["--resume"] if begun else begin), "--out", out, *here]))
    longest = run_folder.read_settings(out)["config"]["max_new_tokens"]  # no longer answers than in training
    asked = ["--resume", "--data", *given.test, "--max-new-tokens", str(longest), *here]
    ended("eval.py", evaluation.main([*map(str, folders), *asked]))


def is_done(run: Path) -> bool:
    """Has it saved its last step?"""
    settings = run_folder.read_settings(run)
    return bool(settings) and run_folder.state_folder(run, settings["config"]["steps"]).is_dir()


def ended(part: str, status: int) -> None:
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{part} ended with status {status}; its reason stands above")


def go_on(given: argparse.Namespace) -> list[dict]:
    """As much as there is time for; once all is done, greedy answers of each model. Raises TimeOver, UserError."""
    over = threading.Event()

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGINT)  # what a reader's Ctrl-C does: all parts keep what they have

    clock = threading.Timer(60 * given.minutes, end)
    clock.start()
    try:
        all_parts(given)
    except KeyboardInterrupt:
        if over.is_set():
            raise TimeOver("the time is over; the same command goes on") from None
        raise
    finally:
        clock.cancel()
    found = {name: run_folder.read_json(given.out / name / "eval" / "results.json", {}) for name in ("start", *ARMS)}
    return [
        {"model": name, **{test: cell(figures["pass@1"]) for test, figures in saved["results"].items()}}
        for name, saved in found.items()
    ]


def parser() -> argparse.ArgumentParser:
    p = OptionParser(
        prog="python -m lab.gsm8k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default=str(ROOT / "runs" / "smollm"), help="(default: runs/smollm)")
    p.add_argument("--train", default="gsm8k", metavar="FILE", help="worked solutions (default: the hub's gsm8k)")
    p.add_argument("--test", nargs="+", default=TESTS, metavar="NAME_OR_FILE", help=f"(default: {' '.join(TESTS)})")
    p.add_argument("--batches", type=int, default=400, metavar="N", help="of 32 solutions in the start (default: 400)")
    p.add_argument("--minutes", type=float, default=8, help="after which it stops (default: 8)")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "gsm8k", metavar="FOLDER", help="(default: runs/gsm8k)")
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, ... (default: a GPU if there is one)")
    p.add_argument("more", nargs="*", metavar="-- OPTION", help="further options of train.py, after --")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = parser()
    given = known.parse_args(arguments)
    for name in ("minutes", "batches"):
        if not 0 < (value := getattr(given, name)) < 10**6:
            known.error(f"--{name} is {value}; expected a number above 0")
    try:
        return status_of(lambda: print("\ngreedy answers right, in percent\n", markdown(go_on(given)), sep="\n"))
    except (TimeOver, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped; the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
