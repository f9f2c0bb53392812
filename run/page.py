"""A page for a run: its curves, and what the contrastive reward paid to single rollouts.

    python -m run.page runs/toy                  writes runs/toy/report.html; also while the run goes on
    python -m run.page runs/toy runs/toy-grpo    two runs, one drawn over the other, into the first one's folder

One file that opens from disk and asks nothing of a network. `train.py` writes it at the end of a run. The page itself
is run/page.html; what is filled in here is its data and a policy that lets no script run but the page's own. Until
November 2026 the command was engine.report.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from border import OptionParser, UserError, misfit, status_of
from run import folder as run_folder

TEMPLATE = Path(__file__).with_name("page.html")
BUDGET = 3_500_000  # characters of groups on a page: it stays well under 5 MB
POINTS = 1000  # of a curve
FLOAT32 = 3.4e38  # where it ends
LONGEST = 6000  # characters of a response
ROLLOUT = {
    "text": str, "correct": bool, "anchor": bool, "positives": [int], "contrastive_loss": float,
    "contrastive_reward": float, "reward": float, "advantage": float,
}  # fmt: skip
GROUP = {"step": int, "question": str, "rollouts": [ROLLOUT]}


def read_run(folder: Path) -> dict:
    """All that the page shows of a run. Raises UserError if the folder holds no run, or one without a step."""
    if (settings := run_folder.read_settings(folder)) is None:
        raise UserError(f"{folder} holds no run (no settings.json); expected the folder of a run of train.py")
    try:
        metrics = run_folder.read_lines(folder / "metrics.jsonl", {"step": int, "seconds": dict})
        groups = run_folder.read_lines(folder / "rollouts.jsonl", GROUP)
        for number, group in enumerate(groups, 1):
            if wrong := misfit_within(group):
                raise UserError(f"rollouts.jsonl, line {number}: {wrong}")
    except (OSError, UserError) as reason:
        raise UserError(f"{folder}: its lines cannot be read ({reason}); expected what train.py wrote") from reason
    config = settings.pop("config")
    settings.pop("checksums", None)
    if not metrics:
        raise UserError(f"{folder} has no finished step yet; expected one in metrics.jsonl")
    return {
        "name": folder.resolve().name,
        "command": settings.pop("command", ""),
        "settings": {**settings, **config},
        "steps": config["steps"],
        "done": metrics[-1]["step"],
        "skipped": sum(bool(row.get("skipped")) for row in metrics),
        "evaluation": read_evaluation(folder / "evaluation.json"),
        "metrics": thinned([curve_point(row) for row in metrics], POINTS),
        "groups": [{**group, "rollouts": [shortened(rollout) for rollout in group["rollouts"]]} for group in groups],
    }


def misfit_within(group: dict) -> str | None:
    """What in a group does not fit the rest of it: the page would look for what is not there."""
    rows, n = group["rollouts"], len(group["rollouts"])
    if not n:
        return "it has no rollouts"
    if wrong := misfit(group, {"cosine": [[float]]}) if "cosine" in group else None:
        return wrong
    if {len(row) for row in group.get("cosine", [])} - {n} or len(group.get("cosine", rows)) != n:
        return "cosine has not a row and a column for each rollout"
    if not all(0 <= i < n for row in rows for i in row["positives"]):
        return "positives name a rollout that is not there"
    if not all(row.get("bad_step") is None or fits_pair(row["bad_step"]) for row in rows):
        return "bad_step is no pair of places"
    return None


def fits_pair(value) -> bool:
    return misfit(value, [int]) is None and len(value) == 2


def read_evaluation(file: Path) -> dict:
    """{model: {level: {metric: [successes, trials]}}}; {} if there is none yet. Raises UserError."""
    if not file.exists():
        return {}

    def is_table(value, depth: int) -> bool:
        if depth == 0:
            return isinstance(value, list) and len(value) == 2 and all(type(count) is int for count in value)
        return isinstance(value, dict) and all(is_table(part, depth - 1) for part in value.values())

    table = run_folder.read_json(file, {})
    if (
        not is_table(table, 3)
        or len({str({level: list(of) for level, of in one.items()}) for one in table.values()}) > 1
    ):
        raise UserError(f"{file} is no table of levels; expected what train.py wrote")
    return table


def curve_point(row: dict) -> dict:
    """A step's numbers, flat: the seconds of each phase beside the others."""
    numbers = row["seconds"] | {name: value for name, value in row.items() if name != "seconds"}
    return {**numbers, "warm": row.get("policy_loss", 0) is None}


def shortened(rollout: dict) -> dict:
    """A response of many pages keeps its beginning and its end."""
    text, half = rollout["text"], LONGEST // 2
    if len(text) <= LONGEST:
        return rollout
    cut = f"{text[:half]} [... {len(text) - LONGEST:,} characters left out ...] {text[-half:]}"
    return {name: value for name, value in rollout.items() if name != "bad_step"} | {"text": cut}


def thinned(rows: list, most: int) -> list:
    """At most `most` of the rows, evenly spread, the first and the last among them.

    >>> thinned([0, 1, 2, 3, 4, 5, 6], 4)
    [0, 2, 4, 6]
    """
    if len(rows) <= most:
        return rows
    if most < 2:
        return rows[-1:] * most
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def fit(run: dict, budget: int) -> None:
    """Leave out steps of the group viewer, evenly, until the groups take at most `budget` characters."""
    steps = sorted({group["step"] for group in run["groups"]})
    size = {step: 0 for step in steps}
    for group in run["groups"]:
        size[group["step"]] += len(as_json(group))
    kept = steps
    while kept and sum(size[step] for step in kept) > budget:
        kept = thinned(steps, len(kept) * 9 // 10)
    left_out = len(steps) - len(kept)
    run["groups"] = [group for group in run["groups"] if group["step"] in set(kept)]
    run["note"] = f"{left_out} of {len(steps)} steps are left out here to keep the page small." if left_out else ""


def as_json(value) -> str:
    """JSON that can stand inside a page: five significant digits, null for what is no number of ours, no "<" anywhere.

    A browser reads 1.8e308 as no number either, and computes with what it reads: float32's range leaves it room.

    >>> as_json({"loss": float("nan"), "text": "</script>", "kl": 0.123456})
    '{"loss":null,"text":"\\\\u003c/script>","kl":0.12346}'
    """

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        if isinstance(value, float):
            return float(f"{value:.5g}") if abs(value) < FLOAT32 else None
        if isinstance(value, int) and abs(value) >= 2**53:
            return None
        return value

    return json.dumps(plain(value), separators=(",", ":")).replace("<", "\\u003c")


def page(runs: Sequence[dict], budget: int = BUDGET) -> str:
    """The whole page, with at most `budget` characters of groups."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for run in runs:
        fit(run, budget // len(runs))
    script = text[text.index("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = text.replace("<!-- POLICY -->", f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
    return text.replace("<!-- DATA -->", f'<script type="application/json" id="data">{as_json(list(runs))}</script>')


def write_page(folders: Sequence[Path], budget: int = BUDGET) -> Path:
    """Write the page of one run, or of two, into the first one's folder. Raises UserError."""
    if len(folders) > 2:
        raise UserError(f"{len(folders)} runs are given; expected one or two")
    file = folders[0] / "report.html"
    run_folder.write_text(file, page([read_run(folder) for folder in folders], budget))
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OptionParser(
        prog="python -m run.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one or two folders of runs of train.py")
    parser.add_argument(
        "--kilobytes", type=int, default=BUDGET // 1000, metavar="N", help=f"of groups, at most ({BUDGET // 1000})"
    )
    given = parser.parse_args(arguments)
    if given.kilobytes < 1:
        parser.error(f"--kilobytes is {given.kilobytes}; expected 1 or more")
    return status_of(lambda: print(write_page(given.runs, 1000 * given.kilobytes)))


if __name__ == "__main__":
    sys.exit(main())
