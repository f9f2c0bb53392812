"""From lines to tables: shares of a results file's lines, their means, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from config import CLIPOConfig
from lab.arms import FROZEN, TRACK1, Arm
from lab.provenance import markdown
from lab.runs import EVALUATED
from run.table import ROWS
from tasks import toy

STEPS = CLIPOConfig.for_track("toy").steps
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


def way(lines: Lines, arm: str, against: str, ceiling: str | None, *what: str) -> float | None:
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


def over_history(lines: Sequence[dict], name: str, steps: slice | None = None) -> float:
    """Mean over runs of the mean over steps of something that each step measured; not a number if none did.

    (Where a run went on to twice the steps, its first part, as for all others.)
    """

    def known(line: dict) -> list[float]:
        values = line["history"].get(name, [])
        return [v for v in values[: len(values) >> line["doubled"]][steps or slice(None)] if v is not None]

    means = [np.mean(values) for line in lines if (values := known(line))]
    return float(np.mean(means)) if means else float("nan")


def decimal(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


HELD = 0.10  # a start is held that loses no more of its right answers
EARLY = slice(0, 10)  # the steps whose push is told: before there is much to copy, or to hold
TIMES = {"": "greedy", "_twice": "greedy_twice"}  # after the usual number of steps, and after twice as many: track1


def lied_to(line: dict, how: str = "greedy") -> float:
    """The share of right answers to P0's stories with a friend who is wrong."""
    return share(line, "liar", "answer", how)


def is_held(line: dict, starts: dict[int, dict], how: str) -> bool:
    return lied_to(line, how) - lied_to(starts[line["seed"]]) > -HELD - 1e-9  # (of shares that are rounded)


def shares_of_the_way(lines: Lines, arm: str, how: str, against: str = "GRPO", ceiling: str = "oracle") -> list[float]:
    """Seed by seed, on "P0, friend wrong": how far an arm comes from GRPO's share to the oracle's, if that is more."""
    low, top = ({line["seed"]: lied_to(line, how) for line in lines[name]} for name in (against, ceiling))
    return [
        (lied_to(line, how) - low[line["seed"]]) / (top[line["seed"]] - low[line["seed"]])
        for line in lines[arm]
        if top[line["seed"]] > low[line["seed"]]
    ]


def counted(arm: str, lines: Lines, how: str) -> dict:
    """A row: how many starts an arm holds, on "P0, friend wrong", and what else is measured of it. In percent."""
    mine, starts = lines[arm], {line["seed"]: line for line in lines["warm start"]}
    if arm == "warm start":
        steps, how = 0, "greedy"
    else:
        steps = STEPS << EVALUATED.index(how)
    lied, compared = [lied_to(line, how) for line in mine], arm not in ("warm start", "GRPO")
    above = [lied_to(line, how) - lied_to(starts[line["seed"]]) for line in mine]
    return {
        "arm": arm,
        "steps": steps,
        "held": f"{sum(is_held(line, starts, how) for line in mine)} of {len(mine)}" if steps else None,
        "median": f"{100 * np.median(lied):.0f}",
        "mean (seeds)": percent(lied),
        "minus the start's": interval(above) if steps else None,
        "minus GRPO's": interval(differences(lines, arm, "GRPO", "liar", "answer", how)) if compared else None,
        "of the way, median": f"{100 * np.median(shares_of_the_way(lines, arm, how)):.0f}%" if compared else None,
        "patched": f"{100 * np.mean(shares(mine, 'liar', 'patched', how)):.0f}",
        "sampled sound": percent(shares(mine, "sampled", "process", how)),
        "P2 answers": f"{100 * np.mean(shares(mine, 'P2', 'answer', how)):.0f}",
    }


def counts_table(arms: dict[str, Arm], lines: Lines) -> str:
    """The warm start, and every arm each time that it was evaluated."""
    times = [(arm, how) for how in EVALUATED for arm in arms if arm != "warm start" and how in lines[arm][0]]
    return markdown([counted(arm, lines, how) for arm, how in [("warm start", ""), *times]])


def worlds_table(arms: dict[str, Arm], lines: Lines) -> str:
    """Arms whose starts differ, each beside its own: right answers to "P0, friend wrong", after 60 and 120 steps."""
    rows = []
    for arm, spec in arms.items():
        mine, starts = lines[arm], {line["seed"]: line for line in lines[f"start, {arm}"]}
        if not mine:
            continue
        row = {"arm": arm, "right at the start": percent([lied_to(starts[line["seed"]]) for line in mine])}
        for steps, how in zip((STEPS, 2 * STEPS), TIMES.values(), strict=True):
            if how in mine[0]:
                held = sum(is_held(line, starts, how) for line in mine)
                row[f"held, {steps} steps"] = f"{held} of {len(mine)}"
                row[f"right, {steps}"] = percent([lied_to(line, how) for line in mine])
                row[f"patched, {steps}"] = percent(shares(mine, "liar", "patched", how))
                row[f"sampled sound, {steps}"] = percent(shares(mine, "sampled", "process", how))
                if spec.against:
                    row[f"difference, {steps}"] = interval(differences(lines, arm, spec.against, "liar", "answer", how))
        rows.append(row)
    return markdown(rows)


def early_stopping(lines: Lines) -> str:
    """GRPO stopped where most of its responses are sound, by looking: the best five steps; and CLIPO's last five."""

    def best(line: dict) -> float:
        process = line["history"]["process"]
        return max(float(np.mean(process[i : i + 5])) for i in range(len(process) - 4))

    def last(line: dict) -> float:
        return float(np.mean(line["history"]["process"][-5:]))

    grpo = {line["seed"]: best(line) for line in lines["GRPO"]}
    return (
        f"Sound among sampled responses in training, percent: GRPO in its best five steps "
        f"{100 * np.mean(list(grpo.values())):.0f}, CLIPO in its last five "
        f"{100 * np.mean([last(line) for line in lines['CLIPO']]):.0f}; difference "
        f"{interval([last(line) - grpo[line['seed']] for line in lines['CLIPO'] if line['seed'] in grpo])}."
    )


def comparison(arms: dict[str, Arm], lines: Lines) -> str:
    """One row per arm that has been run; greedy answers.

    The difference and the share of the way are of right answers to "P0, friend wrong", or to P2 where that was not
    measured. gap, on floor and no contrast are means over steps: `runs.payments`, the share of anchors whose reward is
    the least possible, and the share of groups without an anchor. push: the mean advantage of sound responses less that
    of right but unsound ones, in the first ten steps.
    """
    rows, lied = [], all("liar" in line["greedy"] for arm in arms for line in lines[arm])
    level = "liar" if lied else "P2"
    for arm, spec in arms.items():
        if not lines[arm]:
            continue
        pays = spec.config.get("weight") != 0.0 and "history" in lines[arm][0]
        paired = spec.against and lines[spec.against]
        come = way(lines, arm, spec.against, spec.ceiling, level, "answer") if paired else None
        row = {"arm": arm, "P0 process": percent(shares(lines[arm], "P0", "process"))}
        if lied:
            row["P0, friend wrong"] = percent(shares(lines[arm], "liar", "answer"))
            if all(line.get("doubled") for line in lines[arm]):
                row[f"after {2 * STEPS} steps"] = percent(shares(lines[arm], "liar", "answer", "greedy_twice"))
        row |= {
            "P2 answers": percent(shares(lines[arm], "P2", "answer")),
            "difference": interval(differences(lines, arm, spec.against, level, "answer")) if paired else "",
            "to": spec.against if paired else "",
            "of the way to the oracle": "" if come is None else f"{100 * come:.0f}%",
            "gap": decimal(over_history(lines[arm], "gap")) if pays else "",
            "on floor": decimal(over_history(lines[arm], "on_floor")) if pays and not spec.trainer else "",
            "no contrast": decimal(over_history(lines[arm], "groups_without_contrast")) if pays else "",
        }  # fmt: skip
        if lied:
            row["push"] = decimal(push(lines[arm])) if "history" in lines[arm][0] else ""
        rows.append(row)
    widest = max(rows, key=len, default={})  # (the start has no second time)
    return markdown([{name: row.get(name) for name in widest} for row in rows])


def push(lines: Sequence[dict]) -> float:
    """By how much the first steps push towards sound responses rather than right but unsound ones."""
    return over_history(lines, "push_sound", EARLY) - over_history(lines, "push_unsound", EARLY)


def levels_table(arms: dict[str, Arm], lines: Lines) -> str:
    """Every level and metric: the mean over seeds of every arm, in percent, after the usual steps / twice as many."""
    rows = []
    for level in (*toy.LEVELS, "sampled"):
        for metric in ("answer", "process", "lucky"):
            title = ROWS["liar"][0] if level == "liar" else level
            row = {"level": title, "share": {"lucky": "lucky, of the right"}.get(metric, f"{metric} right")}
            for arm in arms:
                if lines[arm]:
                    times = [how for how in TIMES.values() if how in lines[arm][0]]
                    means = [known_mean(shares(lines[arm], level, metric, how)) for how in times]
                    row[arm] = " / ".join("none" if mean is None else f"{100 * mean:.0f}" for mean in means)
            rows.append(row)
    return markdown(rows)


def each_seed(lines: Lines) -> str:
    """CLIPO, start by start: what it ends with, and what is paid while it is trained."""
    rows, last = [], [slice(end - 10, end) for end in (STEPS, 2 * STEPS)]
    for start, line in zip(lines["warm start"], lines["CLIPO"], strict=True):
        found = {name: np.array(line["history"][name], dtype=float) for name in ("sound_share", "push_unsound")}
        lucky = [1 - np.nanmean(found["sound_share"][steps]) for steps in (EARLY, *last)]
        rows.append({
            "seed": line["seed"],
            "right: start": f"{100 * lied_to(start):.0f}",
            f"{STEPS}, {2 * STEPS} steps": ", ".join(f"{100 * lied_to(line, how):.0f}" for how in TIMES.values()),
            "patched": ", ".join(f"{100 * share(line, 'liar', 'patched', how):.0f}" for how in TIMES.values()),
            "unsound, of the right: steps 1 to 10, 51 to 60, 111 to 120": ", ".join(f"{100 * x:.0f}" for x in lucky),
            "their advantage: steps 1 to 10, 11 to 30": ", ".join(
                f"{np.nanmean(found['push_unsound'][steps]):.2f}" for steps in (EARLY, slice(10, 30))
            ),
        })  # fmt: skip
    return markdown(rows)


def compared(arms: dict[str, Arm], lines: Lines) -> list[str]:
    return [comparison(arms, lines)]


def counted_and_compared(arms: dict[str, Arm], lines: Lines) -> list[str]:
    """Once every arm was run: first how many starts each holds."""
    if not all(lines.values()):
        return compared(arms, lines)
    title = 'Right answers to "P0, friend wrong"; held: no more than ten points below the start.'
    return [title, counts_table(arms, lines), comparison(arms, lines)]


def track1_tables(arms: dict[str, Arm], lines: Lines) -> list[str]:
    parts = counted_and_compared(arms, lines)
    if all(lines.values()):
        parts += [early_stopping(lines), f"Means over seeds after {STEPS} / {2 * STEPS} steps:"]
        parts.append(levels_table(arms, lines))
        parts += [
            "CLIPO, seed by seed: right and patched answers where the friend is wrong; what is sampled in training:",
            each_seed(lines),
        ]
    return parts


def each_in_its_world(arms: dict[str, Arm], lines: Lines) -> list[str]:
    """Arms whose starts differ: first how many each holds."""
    title = 'Right answers to "P0, friend wrong"; held: no more than ten points below the arm\'s own start.'
    return [title, worlds_table(arms, lines), comparison(arms, lines)]


def track1_json(lines: Lines) -> dict:
    """{level, or level_twice: shares as fractions}.

    "liar", right answers to P0's stories with a friend who is wrong: how many of the seeds each arm holds, each arm's
    mean, CLIPO's paired difference to GRPO with its 95% t-interval low, high, and its median share of the way from GRPO
    to the oracle. Other levels: {metric_greedy: means, difference, share of the way, CLIPO's worst seed}; only seeds in
    which both arms have the share count (a lucky share needs a right answer); null: there is no number.
    """
    result: dict[str, dict] = {}
    starts = {line["seed"]: line for line in lines["warm start"]}
    for end, how in TIMES.items():
        low_high = t_interval(differences(lines, "CLIPO", "GRPO", "liar", "answer", how))
        result["liar" + end] = {
            "held": {arm: sum(is_held(line, starts, how) for line in lines[arm]) for arm in TRACK1},
            "seeds": len(lines["CLIPO"]),
            "median_share": float(np.median(shares_of_the_way(lines, "CLIPO", how))),
            "start": known_mean([lied_to(line) for line in lines["warm start"]]),
            **{JSON_NAMES[arm]: known_mean([lied_to(line, how) for line in lines[arm]]) for arm in TRACK1},
            **{name: known_mean([x]) for name, x in zip(("diff", "low", "high"), low_high, strict=True)},
        }
        for level in [level for level in toy.LEVELS if level != "liar"]:
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


def frozen_tables(lines: Sequence[dict]) -> list[str]:
    """What copying is paid under each setting, and what soundness is, by how often the friend is right."""
    rates = sorted({line["world"]["friend_right"][0] for line in lines})
    of = {rate: [line for line in lines if line["world"]["friend_right"][0] == rate] for rate in rates}

    def by_rate(value: Callable[[dict, str], float]) -> str:
        return markdown([
            {"arm": arm, **{f"friend right {rate}": f"{np.mean([value(line, arm) for line in of[rate]]):+.2f}"
                            for rate in rates}}
            for arm in FROZEN
        ])  # fmt: skip

    def right(kind: str) -> dict:
        return {
            f"friend right {rate}": f"{100 * np.mean([line['right'][kind] for line in lines]):.0f}%"
            for rate, lines in of.items()
        }

    rights = [{"sampled responses": f"{kind}, right", **right(kind)} for kind in ("calculated", "copied")]
    ns = range(1, 17)
    by_right = [{"n right of 16": n, **{arm: pooled(lines, arm, str(n)) for arm in FROZEN}} for n in ns]
    return [
        "What the policy samples:", markdown(rights),
        "Mean advantage of a response that copies minus that of one that calculates; positive: copying grows.",
        by_rate(lambda line, arm: line["arms"][arm]["copied"] - line["arms"][arm]["calculated"]),
        "Paid for soundness: a sound right answer minus an unsound right one of its group, in standard deviations of "
        "the group's rewards.",
        by_rate(lambda line, arm: line["arms"][arm]["gap"]),
        "Anchors on the floor:", by_rate(lambda line, arm: line["arms"][arm]["on_floor"]).replace("+", ""),
        "What the paper's constants can say at all. A perfect head pays all anchors of a group the same. Copying is "
        "outbid where (1 + rc of a copy) / (1 + rc of a sound answer) is below (calculated, right) / (copied, right).",
        what_can_be_said(),
        "The first of these by how many of a group's 16 answers are right, all friends together:", markdown(by_right),
    ]  # fmt: skip


def by_step(line: dict) -> list[str]:
    """What each head is paid on the rollouts of a frozen policy: for copying in all, and for soundness step by step."""
    copying = {arm: found["copied"] - found["calculated"] for arm, found in line["arms"].items()}
    tables = [
        "Mean advantage of a response that copies minus that of one that calculates; positive: copying grows.",
        markdown([{"arm": arm, "all steps but the first third": f"{value:+.2f}"} for arm, value in copying.items()]),
    ]
    for title, name in (
        ("Push: the mean advantage of sound responses less that of right but unsound ones.", "push_by_step"),
        ("Gap: a sound right answer less an unsound one of its group, in standard deviations.", "gap_by_step"),
        ("The head's loss, before its updates of the step.", "loss_by_step"),
    ):
        rows = []
        for arm, found in line["arms"].items():
            values = [float("nan") if value is None else value for value in found[name]]
            size = 4 if len(values) <= 20 else 12
            parts = {f"{k + 1} to {k + size}": values[k : k + size] for k in range(0, len(values), size)}
            means = {steps: decimal(np.nanmean(part)) for steps, part in parts.items()}
            rows.append({"arm": arm, **{str(k + 1): decimal(values[k]) for k in range(4)}, **means})
        tables += [title + f" Steps, and means of {'four' if size == 4 else 'twelve'}:", markdown(rows)]
    return tables


def pooled(lines: Sequence[dict], arm: str, n: str) -> str:
    """The mean over all groups with n right answers, and how many there are."""
    cells = [cell for line in lines if (cell := line["arms"][arm]["by_right"].get(n))]
    count, total = np.sum(cells, axis=0) if cells else (0, 0.0)
    return f"{total / count:+.2f} ({count:.0f})" if count else ""


def least_ratio(n: int, weight: float = 0.2, floor: float = -0.5) -> float:
    """(1 + rc of a copy) / (1 + rc of a sound answer), the least that any embedding reaches; n right answers.

    Copies are on the floor; m of the n are sound, all at one place, copies by `apart` less similar (in units of tau).
    With probability (m - 1) / (n - 1) a sound anchor's positive j is sound. InfoNCE, the wrong ones far from the sound.

    >>> round(least_ratio(4), 2), round(least_ratio(11), 2)
    (0.64, 0.85)
    """
    best = 1.0
    for m in range(2, n):
        for apart in np.linspace(0, 20, 201):
            near = np.log(m - 1 + (n - m) * np.exp(-apart))  # L where j is sound; where it is a copy, `apart` more
            paid = [max(-weight * loss, floor) for loss in (near, near + apart)]
            rc = (paid[0] * (m - 1) + paid[1] * (n - m)) / (n - 1)
            best = min(best, (1 + floor) / (1 + rc))
    return float(best)


def what_can_be_said(ns: Sequence[int] = range(3, 15)) -> str:
    """What the paper's reward can tell apart in a group with n right answers."""
    return markdown([
        {
            "n right": n,
            "rc of a head that is perfect by its loss": f"{max(-0.2 * np.log(n - 1), -0.5):.2f}",
            "least ratio of any embedding": f"{least_ratio(n):.2f}",
        }
        for n in ns
    ])  # fmt: skip


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
