"""Ctrl-C and SIGTERM at any moment: is what was done kept, is the message true, and does it go on to the same bits?

    python -m lab.attack signals                 a hundred signals, over as many runs as they last for
    python -m lab.attack signals --count 5       fewer

A small run of train.py, warm start included, is stopped at random moments and begun again by the same command, or by
--resume once it has steps, until it ends. Then its model, metrics and rollouts must be those of a run nobody stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from run.folder import checksum, read_lines

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "--warm-start-batches 40 --prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 8 --head-warmup-steps 1 "
    "--lr-warmup-steps 1 --steps 20 --save-every 1 --device cpu"
).split()
SHORTER = "--warm-start-batches 6 --steps 5".split()
EVALUATION = ["--test-stories", "5"]


def start(*arguments: str | Path) -> subprocess.Popen:
    """train.py, begun."""
    command, environment = [sys.executable, ROOT / "train.py", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def as_a_user_would(run: Sequence[str], out: Path) -> list[str | Path]:
    """The run's own options, or --resume where there is something to resume."""
    options = ["--resume"] if (out / "settings.json").exists() else run
    return [*options, *EVALUATION, "--save-every", "1", "--out", out]


def result(out: Path) -> tuple:
    """All that a run computes, without its timings."""
    metrics = [
        {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")}
        for row in read_lines(out / "metrics.jsonl")
    ]
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    return checksum(out / "model.safetensors"), checksum(out / "rollouts.jsonl"), metrics, evaluation


def what_is_wrong(status: int, said: str, out: Path) -> str | None:
    """With how a stopped command ended: a traceback, a status of its own, a promise that is not kept."""
    part = list(out.parent.glob("*.part.safetensors"))
    if "Traceback" in said:
        return "a traceback"
    if status not in (0, 130, -signal.SIGINT, -signal.SIGTERM):
        return f"status {status}"
    if "stopped in the warm start" in said and not part:
        return "it says that the warm start is kept, and it is not"
    if "saved after step" in said:
        step = int(said.split("saved after step")[1].split(";")[0])
        if not (out / "checkpoints" / f"step-{step:06d}" / "state.json").exists():
            return f"it says that step {step} is saved, and it is not"
    return None


def storm(
    folder: Path, begin: Callable, draw: random.Random, signals: int = 0, longest: float = 0.0
) -> tuple[int, list[str]]:
    """Stop a run at most `signals` times before it may end; how often it was, and what was wrong."""
    out, sent, wrong = folder / "run", 0, []
    while True:
        process, last = begin(out), sent >= signals
        if not last:
            for _ in range(draw.choice((1, 1, 1, 2))):  # sometimes impatiently
                time.sleep(draw.uniform(0, 0.7 * longest))
                if process.poll() is None:
                    process.send_signal(draw.choice((signal.SIGINT, signal.SIGTERM)))
                    sent += 1
        said = "".join(process.communicate())
        if problem := what_is_wrong(process.returncode, said, out):
            wrong.append(f"{problem}: {' | '.join(said.splitlines()[-3:])}")
        if process.returncode == 0 or (last and wrong):
            return sent, wrong


def main(arguments: Sequence[str] | None = None, *, start: Callable = start) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.attack signals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="signals in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--quick", action="store_true", help="three signals, a shorter run")
    given = parser.parse_args(arguments)
    count, draw, begin = 3 if given.quick else given.count, random.Random(given.seed), time.time()
    run, sent, runs, wrong = [*RUN, *(SHORTER if given.quick else [])], 0, 0, []

    def begin_run(out: Path):
        return start(*as_a_user_would(run, out))

    with tempfile.TemporaryDirectory() as scratch:
        calm = Path(scratch) / "calm"
        started = time.time()
        _, problems = storm(calm, begin_run, draw)
        longest, expected = time.time() - started, result(calm / "run")
        wrong += problems
        while sent < count:
            runs += 1
            folder = Path(scratch) / f"storm-{runs}"
            more, problems = storm(folder, begin_run, draw, min(count - sent, 12), longest)
            sent, wrong = sent + more, wrong + problems
            if not problems and result(folder / "run") != expected:
                wrong.append(f"run {runs} ended in other bits")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"signals: {sent} in {runs} runs, {len(wrong)} things wrong, {time.time() - begin:.0f} s")
    return 1 if wrong else 0
