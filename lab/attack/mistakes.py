"""Files that are not what they should be: does each get its one line, and never a traceback?

    python -m lab.attack mistakes                        400 changed files, some minutes
    python -m lab.attack mistakes --quick                40
    python -m lab.attack mistakes --seed 123 --count 1   one of them again

Small good files of every kind that the programs read are made once. Each case copies them, changes one at random (its
bytes, length, values, names; or another file or a folder in its place), and runs a program on the copy, in this
process. Good is status 0 (the change did not matter), 1 or 130, or 2 with one line of error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import eval as evaluation
import train
import tsne
from run import folder as run_folder
from run import page
from run import warm_start as run_warm_start
from tasks import toy

SMALL = "--prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 4 --test-stories 2 --device cpu --steps"
EVALUATE = "model --data problems.jsonl --max-new-tokens 4 --save-rollouts --device cpu --out"
DRAW = "--questions 2 --samples 6 --max-new-tokens 4 --device cpu"
CASES = (  # a program, its command line, and which files are changed
    (train, f"--model model --data problems.jsonl --out new {SMALL} 1", "model/*"),
    (train, f"--model model --data problems.jsonl --out new {SMALL} 1", "problems.jsonl"),
    (train, f"--model model --data problems.parquet --out new {SMALL} 1", "problems.parquet"),
    (train, "--resume --out run --steps 3 --test-stories 2 --device cpu", "run/**/*"),
    (train, "--resume --out run --steps 3 --test-stories 2 --device cpu", "run/*.json*"),
    (evaluation, f"{EVALUATE} eval --resume", "eval/*"),
    (evaluation, "run --limit 2 --device cpu", "run/*.json"),
    (evaluation, "--regrade eval/rollouts.jsonl", "eval/*.jsonl"),
    (evaluation, "--compare eval eval-again", "eval*/*.jsonl"),
    (tsne, f"run {DRAW}", "run/*"),
    (tsne, "--redraw points/tsne.npz", "points/tsne.npz"),
    (page, "run", "run/*.json*"),
)
VALUES = [
    None, True, -1, 0, 3, 0.5, 1e308, 10**30, -(10**9), 10**6, float("nan"), "", "x", "cpu", "\ud800", "\0", "a\nb",
    "../..", [], {}, [[1]], [None], {"a": 1}, 300 * "x",
]  # fmt: skip


class TimeUp(BaseException):
    """A case took too long; no `except Exception` may keep it."""


def make(folder: Path) -> None:
    """The good files. RuntimeError if a program does not take them."""
    from datasets import Dataset, disable_progress_bars  # here, so that its tests can be collected without

    disable_progress_bars()
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    run_warm_start.make_model("tiny", tokenizer, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [{"question": f"Tom has {i} coins. How many?", "answer": str(i)} for i in range(4)]
    run_folder.write_lines(folder / "problems.jsonl", problems)
    Dataset.from_list(problems).to_parquet(folder / "problems.parquet")
    for program, line in (
        (train, f"--out run --warm-start-batches 3 --head-warmup-steps 1 --save-every 1 {SMALL} 2"),
        (evaluation, f"{EVALUATE} eval"),
        (evaluation, f"{EVALUATE} eval-again"),
        (tsne, f"run {DRAW} --out points"),
    ):
        if wrong := outcome(program, line, folder, limit=120):
            raise RuntimeError(f"{program.__name__} {line}: {wrong}")


# ----------------------------------------------------------------------------------------------------
# Changes. Each takes a file (a text, bytes, arrays) and draws what to do to it.
# ----------------------------------------------------------------------------------------------------


def change_value(value, draw: random.Random):
    """A JSON value with one of its parts, at any depth, taken away or replaced."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < 0.2:
            del value[key]
        else:
            value[key] = change_value(value[key], draw)
        return value
    return draw.choice(VALUES)


def change_json(file: Path, draw: random.Random) -> None:
    """One value; in a .jsonl of one line."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
    i = draw.randrange(len(lines))
    lines[i] = json.dumps(change_value(json.loads(lines[i]), draw))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_arrays(file: Path, draw: random.Random) -> None:
    """One array of an .npz: gone, or of another shape, type or name."""
    with np.load(file) as points:
        arrays = dict(points)
    name = draw.choice(list(arrays))
    values = arrays.pop(name)
    changed = [
        {}, {name: values[:-1]}, {name: values.astype(np.float64)}, {name: values.astype(str)}, {name: values[None]},
        {name: values[:0]}, {name: values * np.float16(np.nan)}, {"x": values}, {name + "/x": values},
        {"$" + name: values},
    ]  # fmt: skip
    np.savez(file, **arrays, **draw.choice(changed))


def change_bytes(file: Path, draw: random.Random) -> None:
    """Some bytes: turned, taken away or put in, in the first thousand or anywhere."""
    old = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(min(len(old), draw.choice([1000, 10**9])) or 1)
        old[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    file.write_bytes(old)


def replace_file(file: Path, draw: random.Random) -> None:
    """Cut, emptied, taken away; a folder, a link to nowhere, deep JSON or another of the files in its place."""
    old, others = file.read_bytes(), [f for f in file.parents[1].rglob("*") if f.is_file() and f != file]
    kind = draw.randrange(7)
    if kind < 3:
        file.write_bytes([old[: draw.randrange(len(old) or 1)], b"", 10_000 * b"["][kind])
        return
    file.unlink()
    if kind == 3:
        file.mkdir()
    elif kind == 4:
        file.symlink_to("nowhere")
    elif kind == 5:
        shutil.copy(draw.choice(others), file)


def changed(folder: Path, pattern: str, draw: random.Random) -> str:
    """Change one of the files that fit the pattern; what was done to which."""
    file = draw.choice(sorted(f for f in folder.glob(pattern) if f.is_file()))
    ways = [change_bytes, replace_file]
    if file.suffix in (".json", ".jsonl"):
        ways += 4 * [change_json]
    elif file.suffix == ".npz":
        ways += 2 * [change_arrays]
    way = draw.choice(ways)
    if file.stat().st_nlink > 1:  # a checkpoint's file, published: the copy in its folder stays whole
        text = file.read_bytes()
        file.unlink()
        file.write_bytes(text)
    way(file, draw)
    return f"{way.__name__} {file.relative_to(folder)}"


# ----------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeUp when they are over."""

    def ring(number, frame):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second: the first may come where nothing can raise
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(program, line: str, folder: Path, limit: float) -> str | None:
    """Run a program; what was wrong with how it ended, None if nothing was. Raises TimeUp."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    here = Path.cwd()
    os.chdir(folder)
    try:
        with within(limit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                status = program.main(line.split())
            except SystemExit as stopped:  # argparse
                status = stopped.code
    except Exception:
        return traceback.format_exc(limit=-6)
    finally:
        os.chdir(here)
    errors.flush()
    said = errors.buffer.getvalue().decode()
    lines = [text for text in said.splitlines() if text.startswith("error: ")]
    if "Traceback" in said or status not in (0, 1, 2, 130) or (status == 2 and len(lines) != 1):
        return f"status {status}:\n{said}"
    return None


def attack(good: Path, seed: int, limit: float) -> tuple[str, str | None]:
    """One case: what was done, and what was wrong with how the program took it."""
    draw = random.Random(seed)
    program, line, pattern = draw.choice(CASES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(good, folder)
        done = f"{program.__name__} {line} after {changed(folder, pattern, draw)}"
        return done, outcome(program, line, folder, limit)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.attack mistakes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="40 cases")
    parser.add_argument("--count", type=int, metavar="N", help="cases (default: 400)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first case; the next one's is S + 1")
    parser.add_argument("--limit", type=float, default=10, metavar="SECONDS", help="for a case (default: 10)")
    given = parser.parse_args(arguments)
    count, begin, wrong, slow = given.count or (40 if given.quick else 400), time.time(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch) / "good"
        good.mkdir()
        make(good)
        for seed in range(given.seed, given.seed + count):
            try:
                done, found = attack(good, seed, given.limit)
            except TimeUp:  # a huge number is no mistake where that much is meant
                slow += 1
                continue
            if found:
                wrong += 1
                print(f"--seed {seed} --count 1: {done}\n{found}\n")
    cut = f", {slow} cut off after {given.limit:.0f} s" if slow else ""
    print(f"mistakes: {count:,} changed files, {wrong} tracebacks{cut}, {time.time() - begin:.0f} s")
    return 1 if wrong else 0
