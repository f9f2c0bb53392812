"""What a table says of itself: the machine, the commit; and how it is written down, in Markdown."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from config import computes_in_bfloat16

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    features = torch.backends.cpu.get_cpu_capability() + ", bfloat16" * computes_in_bfloat16("cpu")
    return f"{os.cpu_count()} x {name} ({features})"


def commit() -> str:
    """The commit at work, with "-dirty" if the code was changed since; what a measurement wrote is no code."""
    if not shutil.which("git"):
        return "unknown"
    git = [
        subprocess.run(["git", *what], capture_output=True, text=True, check=False).stdout.strip()
        for what in (["describe", "--always"], ["status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"])
    ]
    return git[0] + ("-dirty" if git[1] else "") or "unknown"


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table; a column for every key but those that hold more than a cell."""
    names = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], dict)))
    cells = [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])
