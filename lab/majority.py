"""Does the reward follow the majority? Groups of a toy run whose right answers are mostly unsound, beside the others.

    python train.py --engine fast --weight 1 --seed 46 --log-groups 8 --out runs/seed46
    python -m lab.majority runs/seed46

It reads rollouts.jsonl, where train.py writes the first groups of each step, all of them with --log-groups 8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from border import OptionParser, UserError, status_of
from lab.provenance import markdown
from run.folder import read_lines

GROUP = {"step": int, "rollouts": [{"correct": bool, "sound": bool, "advantage": float}]}  # of what train.py wrote


def by_majority(groups: Sequence[dict]) -> dict:
    """How many groups have more unsound right answers than sound ones, and what an unsound one is paid there and not.

    An unsound right answer against two sound ones, and two against one:
    >>> def group(*answers):
    ...     return {"rollouts": [{"correct": True, "sound": sound, "advantage": paid} for sound, paid in answers]}
    >>> by_majority([group((True, 0.5), (True, 0.5), (False, -1.0)), group((True, -1.4), (False, 0.7), (False, 0.7))])
    {'groups': 2, 'mostly unsound': '50%', 'advantage of unsound right answers there': '+0.70', 'elsewhere': '-1.00'}
    """
    there, elsewhere, mostly = [], [], 0
    for group in groups:
        right = [rollout for rollout in group["rollouts"] if rollout["correct"]]
        unsound = [rollout["advantage"] for rollout in right if not rollout["sound"]]
        mostly += (majority := 2 * len(unsound) > len(right))
        (there if majority else elsewhere).extend(unsound)
    return {
        "groups": len(groups),
        "mostly unsound": f"{100 * mostly / len(groups):.0f}%",
        "advantage of unsound right answers there": f"{sum(there) / len(there):+.2f}" if there else None,
        "elsewhere": f"{sum(elsewhere) / len(elsewhere):+.2f}" if elsewhere else None,
    }


def table(run: Path, window: int) -> str:
    """A row for every so many steps of a run. Raises UserError."""
    groups = read_lines(run / "rollouts.jsonl", GROUP)
    if not groups:
        raise UserError(f"{run} has no groups in a rollouts.jsonl; expected the folder of a run of train.py's")
    windows: dict[int, list[dict]] = {}
    for group in groups:
        windows.setdefault((group["step"] - 1) // window, []).append(group)
    return markdown([
        {"steps": f"{k * window + 1} to {(k + 1) * window}", **by_majority(part)} for k, part in sorted(windows.items())
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OptionParser(
        prog="python -m lab.majority", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a toy run of train.py's")
    parser.add_argument("--window", type=int, default=20, metavar="N", help="steps in a row of the table (default: 20)")
    given = parser.parse_args(arguments)
    if given.window < 1:
        parser.error(f"--window is {given.window}; expected 1 or more")
    return status_of(lambda: print(table(given.run, given.window)))


if __name__ == "__main__":
    sys.exit(main())
