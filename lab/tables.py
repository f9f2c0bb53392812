"""From lines to tables: shares of a results file's lines, their means, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from lab.arms import FROZEN, TRACK1, Arm
from lab.provenance import markdown
from lab.runs import SHARES
from tasks import toy

Lines = dict[str, list[dict]]  # arm -> its lines in the results file, by seed


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% t-interval of independent values; the ends are not a number for fewer than two.

    >>> [round(x, 3) for x in t_interval([1.0, 2.0, 3.0])]  # 2 -+ 4.303 / sqrt 3
    [2.0, -0.484, 4.484]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def share(line: dict, level: str, metric: str, how: str = "greedy") -> float:
    """A fraction that an evaluation measured: `metric` answer, process or lucky."""
    successes, trials = line[how][level][metric]
    return successes / trials if trials else float("nan")


def shares(lines: Sequence[dict], *what: str) -> list[float]:
    return [share(line, *what) for line in lines]


def known_mean(values: Sequence[float]) -> float | None:
    """The mean of what is a number: a share out of no trials is none.

    >>> known_mean([0.5, float("nan")]), known_mean([float("nan")])
    (0.5, None)
    """
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def differences(lines: Lines, arm: str, against: str, *what: str) -> list[float]:
    """Seed by seed: the arm's share minus the other arm's."""
    other = {line["seed"]: share(line, *what) for line in lines[against]}
    return [share(line, *what) - other[line["seed"]] for line in lines[arm] if line["seed"] in other]


def percent(values: Sequence[float]) -> str:
    """The mean, in percent, with each seed's.

    >>> percent([0.5, 0.25])
    '38 (50, 25)'
    """
    return f"{100 * np.mean(values):.0f} ({', '.join(f'{100 * v:.0f}' for v in values)})"


def way(lines: Lines, arm: str, against: str, ceiling: str, *what: str) -> float | None:
    """The share of the way from `against` to the ceiling that an arm has come: of the means over their common seeds."""
    ours, floor, top = (
        {line["seed"]: share(line, *what) for line in lines.get(name, [])} for name in (arm, against, ceiling)
    )
    if not (common := sorted(set(ours) & set(floor) & set(top))):
        return None
    ours, floor, top = (float(np.mean([of[seed] for seed in common])) for of in (ours, floor, top))
    return (ours - floor) / (top - floor) if top > floor else None


def interval(values: Sequence[float]) -> str:
    """The mean in points, with sign, and its interval.

    >>> interval([0.1, 0.2, 0.3])
    '+20 [-5, 45]'
    """
    mean, low, high = (100 * x for x in t_interval(values))
    return f"{mean:+.0f}" + ("" if len(values) < 2 else f" [{low:.0f}, {high:.0f}]")


def over_history(lines: Sequence[dict], name: str) -> float:
    """Mean over runs of the mean over steps of something that each step measured; not a number if none did.

    (Where a run went on to twice the steps, its first half, as for all others.)
    """

    def known(line: dict) -> list[float]:
        values = line["history"][name]
        return [v for v in values[: len(values) // (1 + line["twice"])] if v is not None]

    means = [np.mean(values) for line in lines if (values := known(line))]
    return float(np.mean(means)) if means else float("nan")


def decimal(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def comparison(arms: dict[str, Arm], lines: Lines) -> str:
    """One row per arm that has been run; greedy answers.

    gap, on floor and no contrast are means over steps: `runs.payments`, the share of anchors whose reward is the least
    possible, and the share of groups without an anchor.
    """
    rows = []
    for arm, spec in arms.items():
        if not lines[arm]:
            continue
        pays = spec.config.get("weight") != 0.0 and "history" in lines[arm][0]
        paired = spec.against and lines[spec.against]
        come = way(lines, arm, spec.against, spec.ceiling, "P2", "answer") if paired else None
        rows.append({
            "arm": arm,
            "P0 process": percent(shares(lines[arm], "P0", "process")),
            "P2 answers (seeds)": percent(shares(lines[arm], "P2", "answer")),
            "P2 process": percent(shares(lines[arm], "P2", "process")),
            "P2 answers, difference": interval(differences(lines, arm, spec.against, "P2", "answer")) if paired else "",
            "to": spec.against if paired else "",
            "of the way to the oracle": "" if come is None else f"{100 * come:.0f}%",
            "gap": decimal(over_history(lines[arm], "gap")) if pays else "",
            "on floor": decimal(over_history(lines[arm], "on_floor")) if pays and not spec.trainer else "",
            "no contrast": decimal(over_history(lines[arm], "groups_without_contrast")) if pays else "",
        })  # fmt: skip
    return markdown(rows)


TIMES = {"": "greedy", "_twice": "greedy_twice"}  # after the default number of steps, and after twice as many


def levels_table(arms: dict[str, Arm], lines: Lines) -> str:
    """Every level and metric: the mean over seeds of every arm, in percent, after the usual steps / twice as many."""
    rows = []
    for level in toy.LEVELS:
        for metric in ("answer", "process", "lucky"):
            row = {"level": level, "share": {"lucky": "lucky, of the right"}.get(metric, f"{metric} right")}
            for arm in arms:
                means = [
                    known_mean(shares(lines[arm], level, metric, how)) for how in TIMES.values() if how in lines[arm][0]
                ]
                row[arm] = " / ".join("none" if mean is None else f"{100 * mean:.0f}" for mean in means)
            rows.append(row)
    return markdown(rows)


def track1_json(lines: Lines) -> dict:
    """{level, or level_twice: {metric_greedy: each arm's mean, and CLIPO's paired difference to GRPO's}}, as fractions.

    low, high: the difference's 95% t-interval. share: of the way from GRPO to the oracle. worst: CLIPO's lowest seed.
    Only seeds in which both arms have the share count (a lucky share needs a right answer); null: there is no number.
    """
    result: dict[str, dict] = {}
    for level in toy.LEVELS:
        for end, how in TIMES.items():
            for metric in ("answer", "process", "lucky"):
                what = level, metric, how
                changes = [d for d in differences(lines, "CLIPO", "GRPO", *what) if not np.isnan(d)]
                interval = t_interval(changes) if changes else [np.nan] * 3
                ours = [value for value in shares(lines["CLIPO"], *what) if not np.isnan(value)]
                result.setdefault(level + end, {})[f"{metric}_greedy"] = {
                    **{JSON_NAMES[arm]: known_mean(shares(lines[arm], *what)) for arm in TRACK1},
                    **{name: known_mean([x]) for name, x in zip(("diff", "low", "high"), interval, strict=True)},
                    "share": way(lines, "CLIPO", "GRPO", "oracle", *what) if metric != "lucky" else None,
                    "worst": min(ours, default=None),
                    "seeds": len(changes),
                }
    return result


JSON_NAMES = {"GRPO": "grpo", "CLIPO": "clipo", "CLIPO, shuffled": "shuffled", "oracle": "oracle"}


def twice_table(lines: Lines) -> str:
    """Track I's arms after the usual number of steps and after twice as many: P2 answers of every seed."""
    rows = []
    for arm in TRACK1:
        row = {"arm": arm}
        for title, how in zip(("usual", "twice"), TIMES.values(), strict=True):
            what = "P2", "answer", how
            row[f"P2 answers, {title} (seeds)"] = percent(shares(lines[arm], *what))
            row[f"minus GRPO's, {title}"] = interval(differences(lines, arm, "GRPO", *what)) if arm != "GRPO" else ""
            come = way(lines, arm, "GRPO", "oracle", *what) if arm != "GRPO" else None
            row[f"of the way to the oracle, {title}"] = "" if come is None else f"{100 * come:.0f}%"
        rows.append(row)
    return markdown(rows)


def frozen_table(lines: Sequence[dict]) -> str:
    """What each setting pays for soundness while the policy stays as the warm start left it."""
    rows = []
    for arm in FROZEN:
        gaps = [line["arms"][arm]["gap"] for line in lines]
        mean, low, high = t_interval(gaps)
        rows.append({
            "arm": arm,
            "gap": f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
            **{f"sound {i / SHARES:.1f} to {(i + 1) / SHARES:.1f}": pooled(lines, arm, i) for i in range(SHARES)},
            "on floor": f"{np.mean([line['arms'][arm]['on_floor'] for line in lines]):.2f}",
        })  # fmt: skip
    return markdown(rows)


def pooled(lines: Sequence[dict], arm: str, share: int) -> str:
    """Mean gap over all groups of one bin of sound shares."""
    count, total = np.sum([line["arms"][arm]["by_share"][share] for line in lines], axis=0)
    return f"{total / count:+.2f}" if count else ""


def provenance(name: str, lines: Sequence[dict]) -> str:
    """Which command made the lines, on what, from which commits."""
    seeds, machines = sorted({line["seed"] for line in lines}), sorted({line["machine"]["processor"] for line in lines})
    torches, commits = (
        sorted({line["machine"]["torch"] for line in lines}),
        sorted({line["commit"] for line in lines}),
    )
    return (
        f"`python -m lab.paper {name}`; seeds {', '.join(map(str, seeds))}; {'; '.join(machines)}, one thread per run, "
        f"torch {', '.join(torches)}; commit {', '.join(commits)}; {len(lines)} runs, "
        f"{sum(line['seconds'] for line in lines) / 60:.0f} core minutes."
    )
