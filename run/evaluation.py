"""What an evaluation computes: benchmarks, each with its decoding; and where it is written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from border import MOST_SEED, UserError, check_numbers, misfit
from run import folder
from tasks.data import BENCHMARKS, Problem, is_source, load_problems
from tasks.toy import LEVELS, World, stories_to_test


@dataclass
class Decoding:
    """How responses are drawn. temperature 0: greedy."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048


# The paper's protocol: greedy on its first track, 16 samples on its second.
DECODING = {
    "gsm8k": Decoding(),
    "math": Decoding(samples=16, temperature=0.6, top_p=0.95, max_new_tokens=4096),
    "toy": Decoding(max_new_tokens=48),
}
SECOND_TRACK = ("math", "math500", "math_perturb_simple", "math_perturb_hard", "amc23", "aime24", "aime25")
TOY_LEVELS = {f"toy {name}": level for name, level in LEVELS.items()}


def track_of(benchmark: str) -> str:
    """The row of DECODING for a benchmark: toy levels have theirs, SECOND_TRACK is sampled, all others are greedy."""
    return "toy" if benchmark in TOY_LEVELS else "math" if benchmark in SECOND_TRACK else "gsm8k"


def load_benchmark(benchmark: str, limit: int | None, world: dict) -> list[Problem]:
    """Its problems, or the first `limit` of them; `world`: changes to the toy world. Raises UserError."""
    if benchmark in TOY_LEVELS:
        return stories_to_test(benchmark.removeprefix("toy "), limit or 300, World.changed(world))
    return load_problems(benchmark)[:limit]


@dataclass
class Evaluation:
    """All that decides what an evaluation computes; kept as settings.json beside its results."""

    model: str
    data: list[str]
    limit: int | None
    chosen: dict  # what was chosen of Decoding; the rest follows from each benchmark's track
    track: str | None  # whose decoding, instead of each benchmark's own
    seed: int
    max_batch: int
    dtype: str
    lenient: bool
    save_rollouts: bool
    cuda_graphs: bool | None = None
    world: dict = field(default_factory=dict)  # changes to tasks.toy.World: those of the run

    def decoding_for(self, benchmark: str) -> Decoding:
        return Decoding(**{**asdict(DECODING[self.track or track_of(benchmark)]), **self.chosen})

    def chunk(self, benchmark: str) -> int:
        """Problems between two writes: some batches' worth, so that few rows wait for the longest response."""
        return max(1, 4 * self.max_batch // self.decoding_for(benchmark).samples)


def settings_from(model: str, given: argparse.Namespace, device: torch.device) -> Evaluation:
    """Raises UserError for options out of range and for data that nobody named."""
    lowest = {"limit": 1, "samples": 1, "temperature": 0, "max_new_tokens": 1, "max_batch": 1}
    check_numbers(vars(given), lowest)
    check_numbers(vars(given), {"seed": 0}, MOST_SEED)
    if given.top_p is not None and not 0 < given.top_p <= 1:
        raise UserError(f"--top-p is {given.top_p}; expected a number in (0, 1]")
    data = given.data or trained_on(model)
    if unknown := [d for d in data if d != "toy" and not is_source(d)]:
        names = ", ".join(("toy", *BENCHMARKS))
        raise UserError(f"--data names {unknown[0]!r}; expected some of: {names}, or a .parquet or .jsonl file")
    world = (folder.read_settings(Path(model)) or {}).get("world", {})
    try:
        World.changed(world)
    except ValueError as reason:
        raise UserError(f"{model}/settings.json has no toy world ({reason}); expected what train.py wrote") from reason
    names = ("samples", "temperature", "top_p", "max_new_tokens")
    chosen = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return Evaluation(
        model=model,
        data=[level for d in data for level in (TOY_LEVELS if d == "toy" else [d])],
        limit=given.limit,
        chosen=chosen,
        track=given.track,
        seed=given.seed,
        max_batch=given.max_batch,
        dtype=given.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        lenient=given.lenient,
        save_rollouts=given.save_rollouts,
        cuda_graphs=given.cuda_graphs,
        world=world,
    )


def trained_on(model: str) -> list[str]:
    """What to evaluate a run of ours on, if nobody says. Raises UserError for other models."""
    if (settings := folder.read_settings(Path(model))) is None:
        raise UserError(f"no --data is given, and {model} is no run of train.py; expected --data with a benchmark")
    data = settings["data"]
    if Path(data).suffix in (".parquet", ".jsonl"):
        print(f"{model} is evaluated on {data}, on which it was trained: this tells what it remembers. --data chooses "
              "other questions", file=sys.stderr)  # fmt: skip
    return ["math500"] if data == "math" else [data]


def place_of(model: str, chosen: str | None) -> Path:
    """Where the results of a model go: to the folder chosen, or beside it. Raises UserError if it has other content."""
    beside = Path(model) / "eval" if Path(model).is_dir() else Path("runs") / f"eval-{Path(model).name}"
    out = Path(chosen) if chosen else beside
    folder.refuse_others(out, ["settings.json", "rollouts.jsonl", "results.json", "results.md"])
    folder.refuse_odd(out)
    if (out / "settings.json").exists():
        folder.read_json(out / "settings.json", {"chosen": dict, "data": [str], "max_batch": int})
    elif folder.whole_lines(out / "rollouts.jsonl"):
        raise UserError(f"{out} holds rollouts.jsonl without its settings.json; expected a new or empty --out")
    return out


def begin(settings: Evaluation, out: Path, resume: bool) -> list[dict]:
    """Begin an evaluation in its folder, or go on with it; the lines that it has already. Raises UserError."""
    wanted, file = asdict(settings), out / "settings.json"
    rows = folder.read_lines(out / "rollouts.jsonl") if file.is_file() else []
    if rows:
        if not resume:
            raise UserError(f"{out} already holds an evaluation; go on with --resume, or choose another --out")
        check_rows(rows, out / "rollouts.jsonl")
        before = folder.read_json(file, {})
        if changed := [name for name in wanted if before.get(name) != wanted[name] and name != "cuda_graphs"]:
            raise UserError(f"{out} was begun with another {', '.join(changed)}; leave it so, or choose another --out")
    folder.write_text(file, json.dumps(wanted, indent=1))
    return rows


ROW = {
    "benchmark": str, "problem": int, "gold": str, "lengths": [int], "cut_off": [bool], "answers": [str | None],
    "correct": [bool], "seconds": float,
}  # fmt: skip


def check_rows(rows: Sequence[dict], file: Path) -> None:
    """Are these the lines of an evaluation, the samples of a benchmark equally many? Raises UserError."""
    optional, first = {"texts": [str], "sound": [bool], "question": str}, {}
    for number, row in enumerate(rows, 1):
        shape = ROW | {name: kind for name, kind in optional.items() if name in row}
        wrong = misfit(row, shape)
        if not wrong:
            samples = {name: len(row[name]) for name, kind in shape.items() if isinstance(kind, list)}
            if samples != first.setdefault(row["benchmark"], samples) or len(set(samples.values())) > 1:
                wrong = "it has not as many samples as the others"
            elif 0 in samples.values():
                wrong = "it has no samples"
        if wrong:
            raise UserError(f"{file}, line {number}: {wrong}; expected what eval.py wrote")
