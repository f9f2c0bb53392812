"""How fast is it, and how far from what the machine could do? Both sides in one process, medians of several runs.

    python -m lab.bench                          # all that this machine can measure; about 20 minutes on two CPU cores
    python -m lab.bench rollouts step            # only these tables
    python -m lab.bench --quick                  # does every table still work? Seconds; its numbers mean nothing
    python -m lab.bench --json bench.json --chart step.png
    pip install -r lab/requirements.txt          # first, for the table `trl`

The models have random weights: speed does not depend on their values. Responses end at random, because that is what
rollouts do and what padding wastes: *early*, after a third of the longest on average, or *late*, after two thirds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lab.bench.against_trl import trl_table
from lab.bench.grading import grading_table
from lab.bench.growth import growth_table
from lab.bench.machine import Machine
from lab.bench.rollouts import rollouts_table
from lab.bench.step import draw_step, step_table
from lab.bench.tricks import tricks_table
from lab.bench.update import update_table
from lab.bench.waits import waits_table
from lab.provenance import markdown

TABLES: dict[str, Callable[[Machine], list[dict]]] = {
    "rollouts": rollouts_table,
    "tricks": tricks_table,
    "trl": trl_table,
    "step": step_table,
    "update": update_table,
    "waits": waits_table,
    "growth": growth_table,
    "grading": grading_table,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of: {', '.join(TABLES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one run")
    parser.add_argument("--runs", type=int, help="measured runs of each side (default: 5)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="rollouts on a CPU: with compiled decode steps, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and tables there too")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the table `step` as bars there (.png)")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"unknown table {unknown[0]!r}; expected some of: {', '.join(TABLES)}")
    if given.runs is not None and given.runs < 1:
        parser.error(f"--runs is {given.runs}; expected 1 or more")
    chosen = given.tables or list(TABLES)
    if given.chart and "step" not in chosen:
        parser.error("--chart draws the table `step`; name it too")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    machine = Machine(
        device, getattr(torch, dtype), given.runs or (1 if given.quick else 5), given.quick, given.compile
    )
    flops, traffic = machine.rates()
    about = {**machine.describe(), "matmul": f"{flops / 1e9:.0f} Gflop/s", "copy": f"{traffic / 1e9:.0f} GB/s"}
    about["command"] = " ".join(["python -m lab.bench", *(sys.argv[1:] if arguments is None else arguments)])
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    results = {}
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        if rows := TABLES[name](machine):
            results[name] = rows
            print(markdown(rows), flush=True)
        if given.json:  # after every table: a long run that is stopped keeps what it has measured
            given.json.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n")
    if given.chart:
        draw_step(results["step"], given.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
