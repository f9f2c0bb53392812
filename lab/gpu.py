"""All that needs a GPU to be measured, in pieces of some minutes: does it run, is it exact, how fast, how much memory?

    python -m lab.gpu                        # every piece that results/gpu.json does not hold yet; stopped, it goes on
    python -m lab.gpu exact rollouts-0.5B    # only these and what begins so (exact-graphs), again if they are there
    python -m lab.gpu --minutes 12           # those worth most first; none begins that would not end in time
    python -m lab.gpu --plan                 # what the pieces are, with estimated minutes; needs no GPU
    python -m lab.gpu --draw                 # the tables in Markdown, from the file; needs no GPU
    python -m lab.gpu --out runs/gpu.json    # on another machine, or another torch, than that file's
    python -m lab.gpu --quick                # does every piece still work? Its numbers mean nothing
    pip install -r lab/requirements.txt      # first, for the pieces `trl`

The file is written after each piece. A piece that fails leaves its reason there, the others go on, and the next call
tries it again. The models have random weights, as in `lab.bench`, whose tables most pieces are.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers

import eval as evaluation
import train
from border import OptionParser, UserError, status_of
from engine.rollouts import generate
from engine.update import response_logprobs
from lab import gsm8k
from lab.bench.against_trl import trl_table
from lab.bench.candidates import attention_table, passes_table
from lab.bench.decode import decode_table
from lab.bench.load import Load, make_model, make_prompts
from lab.bench.machine import Machine
from lab.bench.rollouts import rollouts_rows
from lab.bench.step import step_table
from lab.bench.update import memory_row, update_table
from lab.bench.waits import waits_table
from lab.provenance import ROOT, commit, markdown
from run import folder as run_folder

MINUTES = 8  # after so many of a piece no further round of its runs begins


@dataclass(frozen=True)
class Piece:
    about: str
    minutes: float  # estimated
    measure: Callable[..., list[dict]]  # of a machine, and of the load if there is one
    load: Load | None = None
    tried: bool = True  # must it run with --quick on whatever takes the place of a GPU?

    def run(self, machine: Machine) -> list[dict]:
        if self.load is None:
            return self.measure(machine)
        small = Load("1M", 2, min(self.load.G, 4), min(self.load.T, 24))
        return self.measure(machine, small if machine.quick else self.load)


# ----------------------------------------------------------------------------------------------------
# What is measured here and not in lab.bench
# ----------------------------------------------------------------------------------------------------


def rates(machine: Machine) -> list[dict]:
    flops, traffic = machine.rates()
    room = torch.cuda.get_device_properties(machine.device).total_memory
    return [{"bfloat16 matmul": f"{flops / 1e12:.0f} Tflop/s", "copy": f"{traffic / 1e9:.0f} GB/s",
             "memory": f"{room / 1e9:.1f} GB"}]  # fmt: skip


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Where two lists of tokens part; None if nowhere.

    >>> first_difference([5, 6, 7], [5, 9, 7]), first_difference([5, 6], [5]), first_difference([5], [5])
    (1, 1, None)
    """
    pairs = list(zip(ours, theirs, strict=False))
    return next((t for t, (a, b) in enumerate(pairs) if a != b), None if len(ours) == len(theirs) else len(pairs))


def greedy(machine: Machine, load: Load, cuda_graphs: bool) -> list[dict]:
    """Greedy tokens in float32 against transformers', which gets one prompt at a time, without padding."""
    machine = replace(machine, dtype=torch.float32)
    model, prompts = make_model(load.size, machine), make_prompts(load)
    chosen = dict(eos_token_id=1, max_new_tokens=load.T)
    ours = generate(model, prompts, samples_per_prompt=1, temperature=0, cuda_graphs=cuda_graphs, **chosen)
    parted = []
    for prompt, tokens, mask in zip(prompts, ours.tokens, ours.mask, strict=True):
        ids = torch.tensor([prompt], device=machine.device)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **chosen)
        parted.append(first_difference(tokens[mask].tolist(), theirs[0, len(prompt) :].tolist()))
    at = ", ".join(str(t) for t in parted if t is not None)
    what = f"greedy tokens in float32, {'with' if cuda_graphs else 'without'} CUDA graphs, against transformers'"
    return [{"what": what, "load": str(load), "equal": f"{parted.count(None)} of {load.P}", "parted at": at or "none"}]


def precision(machine: Machine, load: Load) -> list[dict]:
    """Log-probs of sampled tokens against those of the update in float32."""
    machine = replace(machine, dtype=torch.float32)
    model, prompts = make_model(load.size, machine), make_prompts(load)
    made = generate(model, prompts, samples_per_prompt=load.G, max_new_tokens=load.T, eos_token_id=1, cuda_graphs=False)
    again = torch.no_grad()(partial(response_logprobs, model, prompts, made))
    exact, found = again(), {"of rollouts in float32": made.logprobs}
    with torch.autocast(machine.device.type, torch.bfloat16):
        found["of the update in bfloat16 (autocast)"] = again()
    model.bfloat16()
    found["of the update, all weights in bfloat16"] = again()
    off = {name: (logprobs - exact)[made.mask].abs() for name, logprobs in found.items()}
    return [
        {"what": f"log-probs {name}", "load": str(load), "off by": f"{o.mean().item():.1e}",
         "at most": f"{o.max().item():.1e}"}
        for name, o in off.items()
    ]  # fmt: skip


def toy_run(machine: Machine) -> list[dict]:
    """train.py, --resume and eval.py on the toy world, at their default options but for few steps."""
    small = "--prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 8 --head-warmup-steps 1 --lr-warmup-steps 1"
    first, last = (2, 3) if machine.quick else (8, 12)
    batches, tests = ("3", "2") if machine.quick else ("20", "20")
    device, rows = machine.device.type, []
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        shared, stories = ["--device", device, "--out", out], ["--test-stories", tests]
        options = [*small.split() * machine.quick, "--warm-start-batches", batches, "--steps", str(first)]
        options += ["--test-stories", "0"] if machine.quick else stories
        for name, command, arguments in (
            (f"train.py, {first} steps", train.main, [*options, *shared]),
            (f"train.py --resume, to step {last}", train.main, ["--resume", "--steps", str(last), *stories, *shared]),
            ("eval.py", evaluation.main, [out, "--limit", tests, "--device", device]),
        ):
            begin = time.perf_counter()
            if status := command(arguments):
                raise RuntimeError(f"{name} ended with status {status}; its reason stands above")
            rows.append({"what": name, "s": f"{time.perf_counter() - begin:.1f}"})
        steps = run_folder.read_lines(Path(out) / "metrics.jsonl")
    seconds = [sum(step["seconds"].values()) for step in steps if step["policy_loss"] is not None]
    return [*rows, {"what": "a step that updates the policy, median", "s": f"{statistics.median(seconds):.2f}"}]


def gpu_tests(machine: Machine) -> list[dict]:
    """The project's tests that have to do with GPUs. Raises RuntimeError where one fails, or they take too long."""
    where = ["tests/engine/test_gpu.py"] if machine.quick else []
    at_once = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # (-vv: against the -q of pyproject.toml, so that each test is named when it ends, should the last not be reached)
    command = [sys.executable, "-m", "pytest", "--tb=short", "-vv", *at_once, "-k", "gpu", *where]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60 * MINUTES, check=False,
        )  # fmt: skip
        status, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        status, said = 1, (stopped.stdout or b"").decode(errors="replace") + f"\nstopped after {MINUTES} minutes"
    summary = said.rstrip().rpartition("\n")[2]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", summary)}
    if status:
        print(said[-8000:], file=sys.stderr)
        named = re.findall(r"(?:FAILED|ERROR) (\S+::\S+)|^(\S+::\S+) (?:FAILED|ERROR)", said, re.MULTILINE)
        failed = ", ".join(dict.fromkeys(before or after for before, after in named))
        raise RuntimeError(f"{summary}: {failed or 'no failed test is named'}")
    return [{what: counts.get(what, 0) for what in ("passed", "failed", "skipped")}]


def rollouts(machine: Machine, load: Load, peer: str) -> list[dict]:
    """Ours and one of transformers' ways, in turn."""
    return rollouts_rows(replace(machine, runs=min(machine.runs, 3 if load.T <= 512 else 2)), load, [peer])


def against_trl(machine: Machine, load: Load) -> list[dict]:
    if not (rows := trl_table(machine, load)):
        raise RuntimeError("TRL is not installed here; expected `pip install -r lab/requirements.txt`")
    return rows


def first_track(machine: Machine) -> list[dict]:
    if machine.quick:
        raise RuntimeError("it wants a pretrained model; tests/lab/test_gsm8k.py tries it with a small one")
    return gsm8k.go_on(gsm8k.parser().parse_args(["--minutes", str(MINUTES - 0.5)]))


def memory(machine: Machine, load: Load) -> list[dict]:
    return [memory_row(machine, load, prompt=32 if machine.quick else 512)]


# ----------------------------------------------------------------------------------------------------
# The pieces, in the order in which they run, and the goals for what they measure
# ----------------------------------------------------------------------------------------------------

WAYS = {"eager": "generate", "static": "generate, static cache, compiled", "continuous": "continuous batching"}
ROLLOUTS = {  # minutes of a piece for each of these ways
    ("0.5B", 512): (1.5, 2, 2), ("1.5B", 512): (2, 2.5, 2.5), ("0.5B", 2048): (6, 5, 5), ("1.5B", 2048): (7, 7, 6),
}  # fmt: skip
UPDATES = {"0.5B": 2, "1.5B": 2, "3B": 4}  # minutes of a piece
GREEDY, DECODED = Load("0.5B", 8, 1, 64), Load("0.5B", 16, 16, 512)

PIECES = {
    "rates": Piece("matmul and copy at their best", 0.3, rates),
    "exact": Piece("greedy tokens against transformers'", 0.5, partial(greedy, cuda_graphs=False), GREEDY),
    "exact-graphs": Piece("the same by replayed graphs", 0.4, partial(greedy, cuda_graphs=True), GREEDY),
    "exact-bfloat16": Piece("log-probs against float32's", 0.3, precision, Load("0.5B", 8, 4, 64)),
    "toy": Piece("train.py, --resume and eval.py; seconds per step", 0.9, toy_run),
    **{
        f"rollouts-{size}-{T}-{way}": Piece(
            f"against {peer}", n, partial(rollouts, peer=peer), Load(size, 16, 16, T), tried=way == "eager"
        )
        for (size, T), minutes in ROLLOUTS.items()
        for (way, peer), n in zip(WAYS.items(), minutes, strict=True)
    },
    "tests": Piece("the project's tests for GPUs", 4, gpu_tests),
    "trl": Piece("a step against TRL's", 2, against_trl, Load("1M", 16, 16, 40), tried=False),
    "trl-0.5B": Piece("the same", 5, against_trl, Load("0.5B", 8, 8, 256), tried=False),
    "step": Piece("its phases; what CLIPO adds", 3, lambda m, load: step_table(m, [load]), DECODED),
    **{
        f"update-{size}": Piece("alone", n, lambda m, load: update_table(m, [load]), Load(size, 16, 16, 1024))
        for size, n in UPDATES.items()
    },
    **{
        f"memory-{size}": Piece("the plan against the peak", n, memory, Load(size, 16, 16, 1024))
        for size, n in UPDATES.items()
    },
    "waits": Piece("where the host waits for the GPU", 0.3, waits_table),
    "profile": Piece("a decode step: plain, replayed, kernels, floor", 1, decode_table, DECODED, tried=False),
    "attention": Piece("one query a row: four ways, replayed", 0.8, attention_table),
    "passes": Piece("the update's passes: as they are, compiled, packed", 1.5, passes_table, Load("0.5B", 4, 8, 512)),
    "gsm8k": Piece("the paper's first track at 135M: one chunk of several", 7.5, first_track, tried=False),
}

FIRST = (  # what is worth most, where there are only minutes
    "rates", "rollouts-0.5B-512-eager", "profile", "update-0.5B", "trl-0.5B", "attention", "rollouts-0.5B-512-static",
    "exact-graphs", "passes", "rollouts-0.5B-2048-eager", "rollouts-1.5B-512-eager",
)  # fmt: skip

GOALS = {  # by the side that a row is about
    "ours": "40% of the floor", "generate": "10x", "generate, static cache, compiled": "2x",
    "TRL GRPOTrainer": "4x", "TRL GRPOTrainer, with its default of activation checkpointing": "4x",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


def machine_here(quick: bool) -> Machine:
    if not torch.cuda.is_available():
        raise UserError("no GPU is here; expected a CUDA device; `--plan` lists what would be measured")
    return Machine(torch.device("cuda"), torch.bfloat16, runs=1 if quick else 3, quick=quick)


def about(machine: Machine) -> dict:
    """What numbers must have in common to stand in one file."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True, check=False) if shutil.which(ask[0]) else None
    return {
        "device": machine.describe()["processor"],
        "driver": driver.stdout.split("\n")[0] if driver else "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"quick": "its numbers mean nothing"} if machine.quick else {}),
    }


def read(file: Path) -> dict:
    """What was measured. Raises UserError."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(saved["machine"], dict) and all(isinstance(piece, dict) for piece in saved["pieces"].values()):
            return saved
        reason = "not a result"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as mistake:
        reason = getattr(mistake, "strerror", None) or f"{type(mistake).__name__}: {mistake}"
    raise UserError(f"{file} cannot be read ({reason}); expected what `python -m lab.gpu` wrote, or another --out")


def measured(piece: Piece, machine: Machine) -> dict:
    """Its rows and seconds, or its one-line reason why there are none."""
    begin = time.perf_counter()
    try:
        result = {"rows": piece.run(replace(machine, until=begin + 60 * MINUTES))}
    except (Exception, SystemExit) as reason:
        traceback.print_exc()
        line = next(iter(str(reason).strip().splitlines()), "no reason given")
        tolerated = machine.quick and not piece.tried
        result = {"not run here" if tolerated else "failed": f"{type(reason).__name__}: {line}"}
    torch.compiler.reset()  # what was compiled keeps memory
    gc.collect()
    torch.cuda.empty_cache()
    return {**result, "seconds": round(time.perf_counter() - begin, 1)}


def measure(
    names: Sequence[str], again: bool, out: Path, machine: Machine, command: str, minutes: float = math.inf
) -> list[str]:
    """Run the pieces that `out` does not hold, or all of them `again`; the names of those that failed.

    A piece that by its estimate would not end within `minutes` of the beginning is left out.
    """
    end = time.perf_counter() + 60 * minutes
    here = about(machine)
    saved = read(out) if out.exists() else {"machine": here, "pieces": {}}
    if saved["machine"] != here:
        raise UserError(f"{out} holds numbers of {saved['machine']}, and this is {here}; expected another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        if "rows" in saved["pieces"].get(name, {}) and not again:
            print(f"{name}: {out} holds it")
            continue
        if (left := (end - time.perf_counter()) / 60) < PIECES[name].minutes:
            print(f"{name}: left out, it takes some {PIECES[name].minutes} minutes and {left:.1f} are left")
            continue
        print(f"\n## {name}\n", flush=True)
        result = measured(PIECES[name], machine)
        saved["pieces"][name] = {**result, "commit": commit(), "command": command}
        run_folder.write_text(out, json.dumps(saved, indent=1) + "\n")
        print(markdown(result["rows"]) if "rows" in result else result, f"\n{result['seconds']} s", flush=True)
        failed += [name] * ("failed" in result)
    return failed


def drawn(saved: dict) -> str:
    """The tables of a file, in Markdown, one for each kind of piece, goals beside."""
    text = [", ".join(f"{name} {value}" for name, value in saved["machine"].items()) + "; medians of three runs or two"]
    for kind in dict.fromkeys(name.split("-")[0] for name in PIECES):
        pieces = {name: saved["pieces"].get(name, {}) for name in PIECES if name.split("-")[0] == kind}
        rows = [row for piece in pieces.values() for row in piece.get("rows", [])]
        rows = [row | ({"goal": GOALS[row["side"]]} if row.get("side") in GOALS else {}) for row in rows]
        text.append(f"## {kind}" + (f"\n\n{markdown(rows)}" if rows else ""))
        commits = sorted({piece["commit"] for piece in pieces.values() if "commit" in piece})
        text += [f"`python -m lab.gpu {kind}`, commit {', '.join(commits)}"] * bool(commits)
        for name, piece in pieces.items():
            if "rows" not in piece:
                why = piece.get("failed", piece.get("not run here"))
                text.append(f"`{name}`: {f'could not be measured ({why})' if why else 'not measured yet'}")
    return "\n\n".join(text)


def plan() -> str:
    lines = [
        f"{name:30}{piece.minutes:5.1f}  {piece.about}{f' ({piece.load})' if piece.load else ''}"
        for name, piece in PIECES.items()
    ]
    total = sum(piece.minutes for piece in PIECES.values())
    return "\n".join(["minutes, estimated and not measured, on one H100:", *lines, f"{'together':30}{total:5.1f}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OptionParser(
        prog="python -m lab.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="only these (default: all that are not there yet)")
    parser.add_argument("--plan", action="store_true", help="list the pieces with estimated minutes")
    parser.add_argument("--draw", action="store_true", help="print the tables of the file")
    parser.add_argument("--minutes", type=float, metavar="M", help="what is worth most, as far as it fits into so many")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: results/gpu.json; quick: runs/gpu.json)")
    given = parser.parse_args(arguments)
    for wanted in given.pieces:
        if not any(name == wanted or name.startswith(f"{wanted}-") for name in PIECES):
            parser.error(f"unknown piece {wanted!r}; expected some of: {', '.join(PIECES)}")
    names = [n for n in PIECES if not given.pieces or any(n == p or n.startswith(f"{p}-") for p in given.pieces)]
    if given.minutes is not None:
        if not 0 < given.minutes < math.inf:
            parser.error(f"--minutes is {given.minutes}; expected a number above 0")
        names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    out = given.out or ROOT / ("runs" if given.quick else "results") / "gpu.json"
    command = " ".join(["python -m lab.gpu", *(sys.argv[1:] if arguments is None else map(str, arguments))])
    failed: list[str] = []

    def run() -> None:
        if given.plan:
            print(plan())
        elif given.draw:
            print(drawn(read(out)))
        else:
            failed.extend(
                measure(names, bool(given.pieces), out, machine_here(given.quick), command, given.minutes or math.inf)
            )

    status = status_of(run)
    if failed:
        print(f"error: failed: {', '.join(failed)}; their reasons stand in {out}", file=sys.stderr)
    return status or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
