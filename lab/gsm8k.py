"""Real questions on one GPU: GSM8K with a pretrained model of 135M. It is the recipe for 0.5B or 1.5B, too.

    pip install -r requirements.txt -r lab/requirements.txt
    python -m lab.smollm runs/smollm
    python -m lab.gsm8k                                      eight minutes of it; the same command goes on, to the table
    python -m lab.gsm8k --minutes 12                         in a quarter of an hour on a GPU
    python -m lab.gsm8k --train rows.jsonl --test gsm8k.jsonl p1.jsonl            from files, without the hub

A verdict teaches only where it differs within a group. So, in turn:
    start      the model learns to imitate GSM8K's worked solutions, with the answer in \\boxed{}
    questions  it answers others of the training set 16 times each; those are kept that it solves in 2 to 14 of 16
    arms       GRPO, CLIPO in our form, its rewards shuffled, and CLIPO with the paper's constants, on these questions
    answers    start and arms answer unseen questions of the training set, and the tests: greedily and sampled, all and
               by the number of steps in the solution
SETTINGS are what is not the paper's: as many steps of as many questions as fit into minutes, and a larger learning rate
for a smaller model. They were not tuned.
"""

from __future__ import annotations

import argparse
import json
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
from run import folder, stopping
from run import models as run_models
from run import warm_start as run_warm_start
from run.evaluation import load_benchmark
from run.scores import cell, summarise
from run.settings import Settings, as_options, new_settings
from run.settings import parser as settings_parser
from tasks.data import SUFFIX, load_file, load_from_hub
from tasks.grading import extract_answer

SETTINGS = dict(
    steps=60, prompts_per_step=64, mini_batch_prompts=64, max_new_tokens=256, head_warmup_steps=6, lr=5e-6
)  # fmt: skip
ARMS = {
    "grpo": {"weight": 0.0},
    "clipo": INFORMATIVE,
    "clipo-shuffled": {**INFORMATIVE, "shuffle_contrast": True},
    "clipo-paper": {},
}
TESTS = ["gsm8k", "gsm_symbolic", "gsm_p1", "gsm_p2"]
SAMPLES = 16  # answers of the start to a question that may be trained on; of each model, when it is measured, a quarter
SOLVED = range(2, 15)  # so many of them right: neither too hard nor too easy
UNSEEN = 500  # questions of the training set that nothing is trained on, a tenth if there are few


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


def worked_solutions(source: str) -> list[dict]:
    """Rows as on the hub: `question`, and in `answer` the worked solution and the number. Raises UserError."""
    rows = load_from_hub(source, "train") if source == "gsm8k" else load_file(Path(source))
    answers = [row.get("answer") if isinstance(row, dict) else None for row in rows]
    worked = [a for a in answers if isinstance(a, str) and a.partition("####")[0].strip() and extract_answer(a)]
    asked = [row for row in rows if isinstance(row, dict) and isinstance(row.get("question"), str)]
    if not rows or len(worked) < len(rows) or len(asked) < len(rows):
        raise UserError(
            f"{source}: {min(len(worked), len(asked))} of {len(rows)} rows hold a worked solution; expected in each a "
            'question, and as its answer the solution and "#### 72"'
        )
    if len(rows) < 2:
        raise UserError(f"{source} holds one row; expected more, for some are kept unseen")
    return rows


def steps_of(solution: str) -> str:
    """How many steps a worked solution has, as the table counts them: by its notes for a calculator.

    >>> steps_of("3 + 4 = <<3+4=7>>7\\n7 + 1 = <<7+1=8>>8\\n#### 8"), steps_of("#### 8")
    ('1 or 2', '1 or 2')
    """
    steps = solution.count("<<")
    return "1 or 2" if steps < 3 else "3 or 4" if steps < 5 else "5 or more"


class Solutions:
    """Demonstrates worked solutions, at random."""

    suffix = SUFFIX

    def __init__(self, rows: Sequence[dict], seed: int):
        self.pairs = [(row["question"], boxed(row["answer"])) for row in rows]
        self.random = random.Random(f"solutions {seed}")

    def pair(self) -> tuple[str, str]:
        return self.random.choice(self.pairs)


def all_parts(given: argparse.Namespace) -> dict[str, dict]:
    """Do what is not done yet; each model's measurements. Raises KeyboardInterrupt where a part was stopped, UserError.

    {model: {"greedy" or "sampled": {test: its figures}, "steps": {how many: figures of the sampled unseen}}}
    """
    out, device, here = given.out, run_models.device_from(given.device), []
    if given.device:
        here = ["--device", given.device]
    for test in given.test:  # what is wrong there is said now, not after hours
        load_benchmark(test, 1, {})
    rows = worked_solutions(given.train)
    begin_or_refuse(given)
    unseen = min(UNSEEN, len(rows) // 10 + 1)
    seen, held_out = rows[:-unseen], rows[-unseen:]
    make_start(given, seen, device)
    if not folder.read_lines(questions := out / "questions.jsonl"):
        choose(seen, given, here)
    folder.write_lines(out / "unseen.jsonl", held_out)
    for arm, changed in ARMS.items():
        if is_done(out / arm):
            continue
        settings = as_options(SETTINGS | changed)
        begin = ["--model", out / "start", "--data", questions, "--track", "gsm8k", *settings, *given.more]
        begun = (out / arm / "settings.json").exists()
        ended(arm, train.main([*(["--resume"] if begun else begin), "--out", out / arm, *here]))
    return {name: measured(name, held_out, given, here) for name in ("start", *ARMS)}


def begin_or_refuse(given: argparse.Namespace) -> None:
    """Raise UserError for options that would be refused after hours, and where OUT was begun with others."""
    chosen_here = {"--model", "--data", "--track", "--out", "--resume", "--both", "--weight"}
    if clash := sorted(chosen_here & {option.partition("=")[0] for option in given.more}):
        raise UserError(f"{clash[0]} is given after --; expected options of train.py that are not chosen here")
    names = [Path(test).stem for test in given.test]
    if len({*names, "unseen"}) <= len(names):
        raise UserError(f"--test is {' '.join(given.test)}; expected names that differ, and none of them unseen")
    settings_of(given)
    here = {
        "model": str(Path(given.model).resolve()) if Path(given.model).exists() else given.model,
        "train": folder.checksum(Path(given.train)) if Path(given.train).is_file() else given.train,
        "batches": given.batches, "questions": given.questions, "more": given.more,
    }  # fmt: skip
    file = given.out / "begun.json"
    if file.exists():
        before = folder.read_json(file, {})
        if changed := [name for name in here if before.get(name) != here[name]]:
            raise UserError(f"{given.out} was begun with another {changed[0]}; expected the same, or a fresh --out")
    else:
        folder.refuse_others(given.out, [])
        given.out.mkdir(parents=True, exist_ok=True)
        folder.write_text(file, json.dumps(here, indent=1) + "\n")


def make_start(given: argparse.Namespace, seen: Sequence[dict], device) -> None:
    """The supervised start, if it is not there."""
    if (given.out / "start").is_dir():
        return
    model = run_models.load_model(given.model, device)
    training = run_warm_start.WarmStart(*model, Solutions(seen, seed=0), batches=given.batches, pretrained=True)
    with stopping.StopAsked() as stop:
        run_warm_start.make_warm_start(given.out / "start", training, stop)


def settings_of(given: argparse.Namespace) -> Settings:
    """Of every arm, but for what makes it that arm. Raises UserError for options that train.py would refuse."""
    options = ["--model", "start", "--data", "gsm8k", *as_options(SETTINGS), *given.more]
    return new_settings(vars(settings_parser().parse_args(list(map(str, options)))) | {"command": ""})


def answered(model: Path, out: Path, data: Sequence, samples: int, given: argparse.Namespace, here: list) -> list[dict]:
    """The lines of eval.py: greedy answers, or several sampled ones."""
    longest = settings_of(given).config.max_new_tokens  # no longer than in training
    how = ["--samples", samples, "--temperature", int(samples > 1), "--max-new-tokens", longest, *here]
    arguments = [model, "--out", out, "--resume", "--data", *data, *how]
    ended("eval.py", evaluation.main(list(map(str, arguments))))
    return folder.read_lines(out / "rollouts.jsonl")


def choose(seen: Sequence[dict], given: argparse.Namespace, here: list) -> None:
    """OUT/questions.jsonl: of so many questions those that the start solves now and then. Raises UserError."""
    asked, start = given.out / "asked.jsonl", given.out / "start"
    rows = random.Random("questions").sample(list(seen), min(given.questions, len(seen)))
    folder.write_lines(asked, rows)
    right = [sum(row["correct"]) for row in answered(start, given.out / "asked", [asked], SAMPLES, given, here)]
    chosen = [row for row, n in zip(rows, right, strict=True) if n in SOLVED]
    now_and_then = f"in {SOLVED[0]} to {SOLVED[-1]} of {SAMPLES} samples"
    print(f"of {len(rows)} questions the start solves {len(chosen)} {now_and_then}")
    if not chosen:
        raise UserError(
            f"none of {len(rows)} questions is solved {now_and_then}; expected a larger --model, more --batches (in a "
            "fresh --out), or more --questions"
        )
    folder.write_lines(given.out / "questions.jsonl", chosen)


def measured(name: str, held_out: Sequence[dict], given: argparse.Namespace, here: list) -> dict:
    """Greedy and sampled answers of a model."""
    model, unseen = given.out / name, given.out / "unseen.jsonl"
    found = {}
    for how, samples in (("greedy", 1), ("sampled", SAMPLES // 4)):
        lines = answered(model, model / how, [unseen, *given.test], samples, given, here)
        of = {test: [line for line in lines if line["benchmark"] == str(test)] for test in (unseen, *given.test)}
        found[how] = {Path(test).stem: summarise(of[test])["pass@1"] for test in of}
    steps = {}
    for row, line in zip(held_out, of[unseen], strict=True):
        steps.setdefault(steps_of(row["answer"]), []).append(line)
    return {**found, "steps": {many: summarise(steps[many])["pass@1"] for many in sorted(steps)}}


def is_done(run: Path) -> bool:
    """Has it saved its last step?"""
    settings = folder.read_settings(run)
    return bool(settings) and folder.state_folder(run, settings["config"]["steps"]).is_dir()


def ended(part: str, status: int) -> None:
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{part} ended with status {status}; its reason stands above")


def go_on(given: argparse.Namespace) -> list[dict]:
    """As much as there is time for; once all is done, each model's answers. Raises TimeOver, UserError."""
    over = threading.Event()

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGINT)  # what a reader's Ctrl-C does: all parts keep what they have

    clock = threading.Timer(60 * given.minutes, end)
    clock.start()
    try:
        found = all_parts(given)
    except KeyboardInterrupt:
        if over.is_set():
            raise TimeOver("the time is over; the same command goes on") from None
        raise
    finally:
        clock.cancel()
    return [
        {
            "model": name,
            **{f"{test}, {how}": cell(share) for how in ("greedy", "sampled") for test, share in of[how].items()},
            **{f"unseen, sampled, {many} steps": cell(share) for many, share in of["steps"].items()},
        }
        for name, of in found.items()
    ]


def parser() -> argparse.ArgumentParser:
    p = OptionParser(
        prog="python -m lab.gsm8k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default=str(ROOT / "runs" / "smollm"), help="(default: runs/smollm)")
    p.add_argument("--train", default="gsm8k", metavar="FILE", help="worked solutions (default: the hub's gsm8k)")
    p.add_argument("--test", nargs="+", default=TESTS, metavar="NAME_OR_FILE", help=f"(default: {' '.join(TESTS)})")
    p.add_argument("--batches", type=int, default=600, metavar="N", help="of 32 solutions in the start (default: 600)")
    p.add_argument("--questions", type=int, default=2000, metavar="N", help="asked 16 times each (default: 2000)")
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
    for name in ("minutes", "batches", "questions"):
        if not 0 < (value := getattr(given, name)) < 10**6:
            known.error(f"--{name} is {value}; expected a number above 0")
    try:
        return status_of(
            lambda: print("\nanswers right, in percent, with 95% intervals\n", markdown(go_on(given)), sep="\n")
        )
    except (TimeOver, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped; the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
