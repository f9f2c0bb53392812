"""Does a long run stay as it began? Memory, open files and seconds per step of many small steps.

    python -m lab.soak                  2,000 steps of the smallest toy run; results/soak.md and results/soak.png
    python -m lab.soak --steps 60 --out runs/trial      does the command work?

The run is train.py's own, in a process of its own; /proc is read while it runs (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from border import OptionParser
from lab.provenance import ROOT, commit, markdown, processor
from run import folder as run_folder

SMALLEST = (
    "--warm-start-batches 3 --prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 8 --head-warmup-steps 1 "
    "--test-stories 5 --device cpu --weight 1"
)


def watch(steps: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The run: samples (N, 3) of steps done, MB of memory and open files; and seconds of each step (steps,)."""
    out, said = folder / "run", folder / "said"  # (a pipe that nobody reads would fill up and stop the run)
    command = [sys.executable, str(ROOT / "train.py"), *SMALLEST.split(), "--steps", str(steps), "--out", str(out)]
    with said.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    here, samples = Path("/proc") / str(process.pid), []
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        done = len(run_folder.whole_lines(metrics))
        if 0 < done < steps:
            try:
                pages = int((here / "statm").read_text().split()[1])
                samples.append((done, pages * 4096 / 1e6, len(list((here / "fd").iterdir()))))
            except OSError:  # it has just ended
                break
    if process.wait():
        raise RuntimeError(f"the run failed:\n{said.read_text(encoding='utf-8')[-2000:]}")
    rows = run_folder.read_lines(metrics)
    return np.array(samples), np.array([sum(row["seconds"].values()) for row in rows])


def quarters(samples: np.ndarray, seconds: np.ndarray) -> list[dict]:
    """Medians over each quarter of the steps.

    >>> quarters(np.array([[1, 10.0, 7], [4, 30.0, 9]]), np.array([0.1, 0.2, 0.3, 0.4]))[3]
    {'steps': '4 to 4', 'memory, MB': '30', 'open files': '9', 'ms per step': '400'}
    """
    rows, ends = [], np.linspace(0, len(seconds), 5).astype(int)
    for first, last in pairwise(ends):
        here = samples[(samples[:, 0] > first) & (samples[:, 0] <= last)]
        memory, files = (f"{np.median(here[:, i]):.0f}" if len(here) else "" for i in (1, 2))
        rows.append({
            "steps": f"{first + 1:,} to {last:,}", "memory, MB": memory, "open files": files,
            "ms per step": f"{1000 * np.median(seconds[first:last]):.0f}",
        })  # fmt: skip
    return rows


def draw(samples: np.ndarray, seconds: np.ndarray, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(samples[:, 0], samples[:, 1], color="black", linewidth=1)
    axes[1].plot(samples[:, 0], samples[:, 2], color="black", linewidth=1)
    axes[2].plot(np.arange(len(seconds)) + 1, 1000 * seconds, ".", color="0.6", markersize=2, label="each step")
    width = max(1, len(seconds) // 40)
    blocks = [np.median(seconds[i : i + width]) for i in range(0, len(seconds), width)]
    axes[2].plot(np.arange(len(blocks)) * width + width / 2, 1000 * np.array(blocks), color="black", label="median")
    axes[2].legend()
    tops = (1.2 * samples[:, 1].max(), 1.2 * samples[:, 2].max(), 3000 * np.median(seconds))
    titles, units = ("Memory", "Open files", "Time of a step"), ("MB", "number", "ms")
    for axis, title, unit, top in zip(axes, titles, units, tops, strict=True):
        axis.set(title=title, xlabel="step", ylabel=unit, ylim=(0, top))
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OptionParser(
        prog="python -m lab.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="(default: 2000)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER", help="(default: results)")
    given = parser.parse_args(arguments)
    if given.steps < 8:
        parser.error(f"--steps is {given.steps}; expected 8 or more")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            samples, seconds = watch(given.steps, Path(folder))
    except RuntimeError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    about = f"`python -m lab.soak`; seed 0; {processor()}; torch {torch.__version__}; commit {commit()}; medians."
    text = f"# {given.steps:,} steps of the smallest toy run\n\n{about}\n\n{markdown(quarters(samples, seconds))}\n"
    (given.out / "soak.md").write_text(text, encoding="utf-8")
    draw(samples, seconds, given.out / "soak.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
