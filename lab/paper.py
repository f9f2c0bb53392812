"""The paper in miniature: its tables and figures re-drawn on the toy world, with seeds, intervals and controls.

    python -m lab.paper track1                    one table: run what is missing in results/runs.jsonl, then draw
    python -m lab.paper all                       everything; stop it at any time, the same command goes on
    python -m lab.paper all --draw                draw again from the runs that are there, train nothing
    python -m lab.paper track1 --seeds 1 --steps 3    does it work? Written to runs/trial, its numbers mean nothing

NAME is one of: {names}.

Every table compares arms seed by seed with the arm they are measured against: the same warm start, the same stories.
Intervals are 95% t-intervals of the mean paired difference over seeds. Shares are of {stories} stories, in percent.
The *oracle* is a ceiling, by cheating: it is rewarded if the whole response is sound, steps and all.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

import toy
import tsne
from config import INFORMATIVE, CLIPOConfig
from lab.provenance import markdown
from lab.runs import PRETRAINED, ROOT, SHARES, Run, known_runs, make
from problems import OptionParser

# ----------------------------------------------------------------------------------------------------
# Arms: what is compared
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What is changed of the toy track, the toy world and the trainer, and which arms it is compared with."""

    config: dict = field(default_factory=dict)
    against: str | None = "GRPO"
    world: dict = field(default_factory=dict)
    trainer: str = ""  # one of lab.referees.TRAINERS
    ceiling: str = "oracle"
    size: str = "tiny"

    def run(self, seed: int, steps: int | None = None) -> Run:
        """What only repeats a default is left out, so that the same arm under two names is one run.

        With `steps` it is a short one that only tries the command: a short warm start, a short evaluation.
        """
        config = self.config | ({"steps": steps} if steps else {})
        usual, usual_world = CLIPOConfig.for_track("toy"), toy.WORLD
        config = {name: value for name, value in config.items() if value != getattr(usual, name)}
        world = {name: value for name, value in self.world.items() if value != getattr(usual_world, name)}
        short = {"batches": 30, "stories": 30} if steps else SHORTER.get(self.size, {})
        whole = {"twice": True, "levels": tuple(toy.LEVELS)} if self.is_of_track1 else {}
        return Run("train", seed, config, world, trainer=self.trainer, size=self.size, **short, **whole)

    @property
    def is_of_track1(self) -> bool:
        """Its arms are measured on every level, and after twice the steps too, whatever table asks for them."""
        mine = self.config, self.world, self.trainer, self.size
        return any(mine == (arm.config, arm.world, arm.trainer, arm.size) for arm in TRACK1.values())


PAPER = {f.name: f.default for f in fields(CLIPOConfig) if f.name in INFORMATIVE}  # the paper's constants
SHUFFLED = {"shuffle_contrast": True}
WITHOUT = {"weight": 0.0}
GRPO, CLIPO, ORACLE = Arm(WITHOUT, against=None), Arm(), Arm(WITHOUT, trainer="oracle")
ENDS = {"GRPO": GRPO, "oracle": ORACLE}  # between which an arm is measured

TRACK1 = {"GRPO": GRPO, "CLIPO": CLIPO, "CLIPO, shuffled": Arm(SHUFFLED), "oracle": ORACLE}
MECHANISM = {
    "CLIPO": CLIPO,
    "CLIPO, shuffled": Arm(SHUFFLED),
    "paper's constants": Arm(PAPER),
    "GRPO": GRPO,
    "oracle": ORACLE,
}
REFEREE = ENDS | {
    "CLIPO": CLIPO,
    "CLIPO, shuffled": Arm(SHUFFLED),
    "paper's constants": Arm(PAPER),
    **{f"GRPO, beta {beta}": Arm(WITHOUT | {"beta": beta}) for beta in (0.1, 0.5)},
    "GRPO, a quarter of lr": Arm(WITHOUT | {"lr": 2.5e-5}),
    "CLIPO, no KL": Arm({"beta": 0.0}),
    "agreement of texts: same steps": Arm(trainer="same steps"),
    "agreement of texts: similarity": Arm(trainer="similar text"),
    "agreement in the frozen start": Arm(trainer="frozen start"),
}
SHORTER = {  # warm start (in batches) and evaluation of models that take hours
    "small": {"batches": 300},
    "smollm": {"batches": 100, "stories": 100},
}
AUTO = {"compute_dtype": "auto"}  # matrix products in bfloat16 where the CPU computes in it
SMALL = {  # a model of 27M parameters
    "GRPO": Arm(WITHOUT | AUTO, None, size="small"),
    "paper's constants": Arm(PAPER | AUTO, size="small"),
    "CLIPO": Arm(AUTO, size="small"),
    "oracle": Arm(WITHOUT | AUTO, trainer="oracle", size="small"),
}
LAPTOP = {  # what a pretrained model of 135M can do on two cores in hours: a gentler update of fewer, longer responses
    "lr": 1e-5, "steps": 40, "prompts_per_step": 4, "mini_batch_prompts": 4, "samples_per_prompt": 8,
    "max_new_tokens": 48, **AUTO,
}  # fmt: skip
SMOLLM = {
    "GRPO": Arm(WITHOUT | LAPTOP, None, size="smollm"),
    "CLIPO": Arm(LAPTOP, size="smollm"),
    "paper's constants": Arm(PAPER | LAPTOP, size="smollm"),
    "CLIPO, shuffled": Arm(SHUFFLED | LAPTOP, size="smollm"),
    "oracle": Arm(WITHOUT | LAPTOP, trainer="oracle", size="smollm"),
}
BASELINES = {
    name + plus: Arm(config | weight, against)
    for name, config in {
        "GRPO": {},
        "DAPO": {"policy_loss": "dapo", "resample_tries": 3, "overlong_buffer": 3},
        "GSPO": {"policy_loss": "gspo"},
        "GMPO": {"policy_loss": "gmpo"},
    }.items()
    for plus, weight, against in (("", WITHOUT, None), (" + CLIPO", {}, name))
} | {"oracle": ORACLE}
LOSSES = ENDS | {
    kind: Arm({"contrastive_kind": kind}) for kind in ("decoupled", "infonce", "supcon_out", "supcon_in", "soft_nn")
}
HEAD = ENDS | {
    "trained": CLIPO,
    "fixed": Arm({"head_steps": 0}),
    "MLP": Arm({"head_mlp": True}),
    "no warm-up": Arm({"head_warmup_steps": 0}),
    "warm-up of 12 steps": Arm({"head_warmup_steps": 12}),
}
TEMPERATURE = ENDS | {f"tau {t}": Arm({"tau": t}) for t in (0.02, 0.05, 0.1, 0.5)}
WEIGHT = ENDS | {f"lambda {weight}": Arm({"weight": weight}) for weight in (0.1, 0.3, 1.0, 2.0)}
PRECISION = ENDS | {"float32": CLIPO, "bfloat16": Arm({"compute_dtype": "bfloat16"})}
GROUP_SIZE = {
    f"{name}, G = {size}": Arm(
        config | {"samples_per_prompt": size, "prompts_per_step": 128 // size, "mini_batch_prompts": 128 // size},
        against,
    )
    for size in (4, 8, 16, 32)
    for name, config, against in (("GRPO", WITHOUT, None), ("CLIPO", {}, f"GRPO, G = {size}"))
} | {"oracle": replace(ORACLE, against="GRPO, G = 16")}
UNSCALED = {"scale_by_std": False}
SCOPE = (
    ENDS
    | {scope: Arm({"contrastive_scope": scope}) for scope in ("group", "wrong_of_all", "batch")}
    | {
        # Two ideas of ours: consensus over all questions by a head that the verdicts do not teach, and advantages that
        # do not blow up what little tells the rollouts of an all-right group apart.
        "batch, tau 0.2, fixed head": Arm({"contrastive_scope": "batch", "tau": 0.2, "head_steps": 0}),
        "GRPO, unscaled": Arm(UNSCALED | WITHOUT, None),
        "wrong_of_all, unscaled": Arm(UNSCALED, "GRPO, unscaled"),
    }
)

# From the paper's constants to ours, one change on top of the other.
CHANGES: dict[str, dict] = {
    "group mean off": {"center_hidden": True},
    "from chance": {"reward_from_chance": True},
    "floor -0.9": {"reward_floor": INFORMATIVE["reward_floor"]},
    "weight 1": {"weight": INFORMATIVE["weight"]},
    "all positives": {"contrastive_kind": "supcon_out"},
    "decoupled": {"contrastive_kind": "decoupled"},
    "tau 0.5": {"tau": INFORMATIVE["tau"]},
    "4 head steps": {"head_steps": INFORMATIVE["head_steps"]},
    "negatives from the batch": {"contrastive_scope": INFORMATIVE["contrastive_scope"]},
}
RUNGS = {"paper's constants": PAPER}
for change in CHANGES:
    RUNGS[f"+ {change}"] = list(RUNGS.values())[-1] | CHANGES[change]
LADDER = ENDS | {name: Arm(config) for name, config in RUNGS.items()}
# The same changes alone, for frozen policies: each added to the paper's constants, each taken away from ours.
ALONE = {f"paper's, {name}": PAPER | change for name, change in CHANGES.items()}
TAKEN_AWAY = {
    f"ours without: {name}": {key: PAPER[key] for key in change}
    for name, change in CHANGES.items()
    if name != "all positives"  # without them, as without "decoupled", the loss is the paper's
}


def in_world(world: dict, where: str) -> dict[str, Arm]:
    """GRPO, CLIPO and the oracle in another world, or for another time."""
    grpo, oracle = f"GRPO, {where}", f"oracle, {where}"
    return {
        grpo: Arm(WITHOUT, None, world),
        f"CLIPO, {where}": Arm({}, grpo, world, ceiling=oracle),
        oracle: Arm(WITHOUT, grpo, world, "oracle", ceiling=oracle),
    }


SOUND, FRIEND = (0.4, 0.6, 0.8), (0.80, 0.90, 0.99)  # the dials of the phase map
PHASE = {
    name: arm
    for sound in SOUND
    for friend in FRIEND  # (training stories have up to 3 clauses)
    for name, arm in in_world(
        {"sound_demos": sound, "friend_right": (friend,) * 3 + toy.WORLD.friend_right[3:]},
        f"sound {sound}, friend {friend}",
    ).items()
}
LIMITS = in_world({}, "as usual") | in_world({"mistaught": 0.2}, "20% of sums mis-taught")

# ----------------------------------------------------------------------------------------------------
# From lines to tables
# ----------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------

# One look an arm, in all figures: a colour that colour-blind readers can tell apart, a line for grey print, a marker.
LOOKS = {
    "GRPO": {"color": "#B34700", "linestyle": "--", "marker": "s"},
    "CLIPO": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "CLIPO, shuffled": {"color": "#7FB8D8", "linestyle": "-.", "marker": "^"},
    "oracle": {"color": "#009E73", "linestyle": ":", "marker": "D"},
    "paper's constants": {"color": "#8A4A73", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
}
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # of what is no arm of its own


def line_of(arm: str) -> dict:
    """How an arm's curve is drawn."""
    return {"label": arm, **{name: LOOKS[arm][name] for name in ("color", "linestyle")}}


def beside(values: Sequence[float], size: float = 0.015, step: float = 0.11) -> list[float]:
    """By how much each dot is moved aside, so that none hides another: those closer than `size` stand in a column.

    >>> beside([0.50, 0.80, 0.505, 0.51])
    [0.0, 0.0, 0.11, -0.11]
    """
    moved: list[float] = []
    for i, value in enumerate(values):
        taken = {moved[j] for j in range(i) if abs(values[j] - value) < size}
        places = (k * step * side for k in range(len(values)) for side in (1, -1))
        moved.append(next(place for place in places if place not in taken) + 0.0)
    return moved


def curve(lines: Sequence[dict], name: str, window: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean over runs and over windows of steps; windows in which nothing was measured are left out."""
    values = np.array([[np.nan if v is None else v for v in line["history"][name]] for line in lines], dtype=float)
    steps, means = [], []
    for first in range(0, values.shape[1], window):
        part = values[:, first : first + window]
        if not np.isnan(part).all():
            steps.append(first + part.shape[1] / 2 + 0.5)
            means.append(np.nanmean(part))
    return np.array(steps), np.array(means)


def plot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, file: Path) -> None:
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plot().close(figure)


def mechanism_figure(lines: Lines, file: Path, few: int = 20) -> None:
    """What the reward pays for soundness: over training, by the sound share (of no fewer than `few` groups: the mean of
    fewer says little), and what stands on the floor."""
    figure, axes = plot().subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for arm in [a for a in MECHANISM if a not in ENDS]:
        axes[0].plot(*curve(lines[arm], "gap"), **line_of(arm))
        axes[2].plot(*curve(lines[arm], "on_floor"), **line_of(arm))
        bins = np.sum([line["gap_by_share"] for line in lines[arm]], axis=0)  # (SHARES, 2)
        some = bins[:, 0] >= few
        middles = (np.arange(SHARES)[some] + 0.5) / SHARES
        axes[1].plot(middles, bins[some, 1] / bins[some, 0], marker=LOOKS[arm]["marker"], **line_of(arm))
    unit = "paid to sound minus unsound,\nin standard deviations of the group's reward"
    axes[0].set(title="What soundness is paid, over training", xlabel="step", ylabel=unit)
    axes[1].set(title="... by how many of the right answers are sound",
                xlabel="sound share of a group's correct rollouts", ylabel=unit, xlim=(0, 1))  # fmt: skip
    axes[2].set(title="Anchors on the reward's floor", xlabel="step", ylabel="share of anchors", ylim=(-0.02, 1.02))
    for axis in axes:
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[1].legend()
    save(figure, file)


def track1_figure(lines: Lines, file: Path) -> None:
    """Every seed a dot: answers on the longest stories, and the share of sound rollouts over training."""
    figure, (dots, curves) = plot().subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    steps = CLIPOConfig.for_track("toy").steps
    for place, arm in enumerate(TRACK1):
        for end, (how, fill) in enumerate(zip(TIMES.values(), ("full", "none"), strict=True)):
            values, row = shares(lines[arm], "P2", "answer", how), place + 0.45 * end
            look = {"marker": LOOKS[arm]["marker"], "color": LOOKS[arm]["color"], "fillstyle": fill}
            dots.plot(values, np.array(beside(values, 0.012, 0.045)) + row, linestyle="", markersize=4.5, **look)
            dots.plot(np.mean(values), row, "|", color="black", markersize=20)
        curves.plot(*curve(lines[arm], "process"), **line_of(arm))
    title = (
        f"Right answers on P2, greedy: a dot is a seed, the bar their mean\n(full: {steps} steps, hollow: {2 * steps})"
    )
    dots.set(title=title, xlabel="share of stories", xlim=(0, 1))
    dots.set_yticks(np.arange(len(TRACK1)) + 0.22, list(TRACK1))
    dots.invert_yaxis()
    curves.axvline(steps, color="0.6", linewidth=0.8)
    curves.set(title="Sound rollouts during training (P0), mean over seeds", xlabel="step", ylabel="share", ylim=(0, 1))
    curves.legend()
    for axis in (dots, curves):
        axis.grid(alpha=0.3)
    save(figure, file)


def temperature_figure(lines: Lines, file: Path) -> None:
    """Does a low temperature align the correct rollouts of a group?"""
    figure, axis = plot().subplots(figsize=(6.5, 4.2), layout="constrained")
    for arm, style in zip([a for a in TEMPERATURE if a not in ENDS], STYLES, strict=False):
        axis.plot(*curve(lines[arm], "cosine"), linestyle=style, label=arm)
    axis.set(title="Alignment of a group's correct rollouts", xlabel="step", ylabel="mean cosine of z")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, file)


def phase_figure(lines: Lines, file: Path) -> None:
    """Process on P2 over the world's two dials: GRPO, CLIPO, and their difference, with what was paid for soundness."""

    def cells(name: str, measure: Callable[[Sequence[dict]], float]) -> np.ndarray:
        return np.array([[measure(lines[f"{name}, sound {s}, friend {f}"]) for f in FRIEND] for s in SOUND])

    grpo, ours = (cells(name, lambda runs: np.mean(shares(runs, "P2", "process"))) for name in ("GRPO", "CLIPO"))
    paid = cells("CLIPO", lambda runs: over_history(runs, "gap"))
    figure, axes = plot().subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axis, title, values in zip(axes, ("GRPO", "CLIPO", "CLIPO minus GRPO"), (grpo, ours, ours - grpo), strict=True):
        compares = values is not grpo and values is not ours
        low, colours = (-1, "PuOr") if compares else (0, "Greys")
        axis.imshow(values, vmin=low, vmax=1, cmap=colours, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            words = f"{100 * value:+.0f}\npaid {paid[i, j]:+.1f}" if compares else f"{100 * value:.0f}"
            axis.text(j, i, words, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
        axis.set(title=f"Sound on P2, percent: {title}", xlabel="how often the friend is right in training",
                 ylabel="share of sound demonstrations")  # fmt: skip
        axis.set_xticks(range(len(FRIEND)), FRIEND)
        axis.set_yticks(range(len(SOUND)), SOUND)
    figure.supxlabel("paid: contrastive reward of sound minus unsound right answers of a group, in standard deviations "
                     "of its rewards, mean over training", fontsize=9)  # fmt: skip
    save(figure, file)


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    title: str
    arms: dict[str, Arm]
    seeds: int = 4
    figure: Callable[[Lines, Path], None] | None = None


FIRST = 16  # seeds below it were looked at while the world was made
EXPERIMENTS = {  # the most important first: `all` may be stopped
    "track1": Experiment("Track I in miniature", TRACK1, 16, track1_figure),
    "referee": Experiment("What a referee would ask", REFEREE, 4),
    "mechanism": Experiment("What the contrastive reward pays for", MECHANISM, 4, mechanism_figure),
    "limits": Experiment("Where does it not hold?", LIMITS, 2),
    "phase": Experiment("When does it help? The world's two dials", PHASE, 1, phase_figure),
    "ladder": Experiment("From the paper's constants to ours, one change on top of the other", LADDER, 2),
    "baselines": Experiment("Policy losses, each with and without CLIPO", BASELINES, 1),
    "head": Experiment("The contrastive head", HEAD, 1),
    "scope": Experiment("Where positives and negatives come from", SCOPE, 1),
    "losses": Experiment("Contrastive losses", LOSSES, 1),
    "temperature": Experiment("Temperature tau", TEMPERATURE, 1, temperature_figure),
    "weight": Experiment("Weight lambda", WEIGHT, 1),
    "groupsize": Experiment("Group size at equal rollouts per step", GROUP_SIZE, 1),
    "precision": Experiment("Matrix products in bfloat16, weights and optimiser in float32", PRECISION, 1),
    "small": Experiment("A model of 27M parameters", SMALL, 1),
    "smollm": Experiment(
        "A pretrained model: SmolLM2-135M-Instruct, on 100 stories", SMOLLM, 1, partial(mechanism_figure, few=10)
    ),
}
NAMES = [*EXPERIMENTS, "tsne", "all"]
APART = {"smollm"}  # not of `all`: it wants a model that is not made here
FROZEN = {**RUNGS, **ALONE, **TAKEN_AWAY}
FROZEN_SEEDS = range(FIRST, FIRST + 2)


def frozen_run(seed: int) -> Run:
    return Run("frozen", seed, {arm: Arm(config).run(seed).config for arm, config in FROZEN.items()})


def seeds_of(experiment: Experiment, seeds: int | None) -> range:
    """Its own number of seeds, or another."""
    return range(FIRST, FIRST + (seeds or experiment.seeds))


def wanted(name: str, seeds: int | None, steps: int | None) -> list[Run]:
    """All runs of an experiment, seed by seed, so that a stopped command leaves whole seeds."""
    experiment = EXPERIMENTS[name]
    runs = [arm.run(seed, steps) for seed in seeds_of(experiment, seeds) for arm in experiment.arms.values()]
    return runs + [frozen_run(seed) for seed in FROZEN_SEEDS if name == "mechanism" and not steps]


def draw(name: str, out: Path, known: dict[str, dict], seeds: int | None, steps: int | None) -> bool:
    """The table of an experiment, and its figure, from the lines that are there. False if it has none of its own."""
    experiment = EXPERIMENTS[name]
    lines: Lines = {
        arm: [known[key] for seed in seeds_of(experiment, seeds) if (key := spec.run(seed, steps).key) in known]
        for arm, spec in experiment.arms.items()
    }
    used = {id(line): line for part in lines.values() for line in part}.values()
    shared = name != "track1" and {arm for arm, spec in experiment.arms.items() if spec.is_of_track1}
    if not any(part for arm, part in lines.items() if not (shared and arm in shared)):
        return False
    expected, arms = len(seeds_of(experiment, seeds)), experiment.arms
    missing = [f"{arm} ({len(part)} of {expected} seeds)" for arm, part in lines.items() if len(part) < expected]
    starts = [{arm.run(seed, steps).start.key for arm in arms.values()} for seed in seeds_of(experiment, seeds)]
    if all(len(keys) == 1 for keys in starts):  # all arms of a seed begin with the same model
        arms = {"warm start": Arm(against=None), **arms}
        lines["warm start"] = [known[key] for (key,) in starts if key in known]
    parts = [f"# {experiment.title}", provenance(name, list(used)), comparison(arms, lines)]
    if missing:
        parts.append(f"Not complete yet: {', '.join(missing)}.")
    if experiment.figure and all(lines.values()):
        experiment.figure(lines, out / f"{name}.png")
    if name == "track1" and all(lines.values()):
        usual = CLIPOConfig.for_track("toy").steps
        parts += [f"After {usual} steps, and after twice as many:", twice_table(lines)]
        parts += [f"Means over seeds after {usual} / {2 * usual} steps:", levels_table(arms, lines)]
        (out / "track1.json").write_text(json.dumps(track1_json(lines), indent=1) + "\n", encoding="utf-8")
    if name == "mechanism" and (frozen := [known[r.key] for s in FROZEN_SEEDS if (r := frozen_run(s)).key in known]):
        parts += ["With frozen policies:", frozen_table(frozen)]
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return True


def make_tsne(out: Path, runs: Path) -> None:
    """Train GRPO and CLIPO with train.py, as a reader would; embed and draw rollouts of both."""
    for name, options in (("GRPO", ["--weight", "0"]), ("CLIPO", [])):
        if not (runs / name / "head.safetensors").exists():
            shutil.rmtree(runs / name, ignore_errors=True)
            command = ["train.py", *options, "--out", str(runs / name), "--device", "cpu"]
            if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
                raise RuntimeError(f"{shlex.join(command)} did not end well; what it said stands above")
    embed_and_draw(str(runs / "GRPO"), str(runs / "CLIPO"), "--out", str(out), "--device", "cpu")


def embed_and_draw(*arguments: str) -> None:
    """tsne.py, as a reader would call it. Raises RuntimeError if it fails, which it has then told."""
    if tsne.main(arguments):
        raise RuntimeError(f"{shlex.join(['tsne.py', *arguments])} did not end well; what it said stands above")


def tabulate_tsne(out: Path) -> None:
    """The numbers that go with each panel."""
    found = tsne.load_points(out / "tsne.npz")
    seed = CLIPOConfig.for_track("toy").seed
    about = f"`python -m lab.paper tsne`; seed {seed}; silhouette and purity as tsne.py defines them."
    table = markdown(tsne.scores(found))
    (out / "tsne.md").write_text(f"# t-SNE: what its panels are worth\n\n{about}\n\n{table}\n", encoding="utf-8")


def make_and_draw(name: str, out: Path, given: argparse.Namespace) -> bool:
    """One experiment, as the command line asks for it. False if there is nothing to draw."""
    file, runs = out / "runs.jsonl", ROOT / "runs" / "paper"
    if name == "tsne":
        points = out / "tsne.npz"
        if not given.draw:
            make_tsne(out, runs)
        elif points.exists():
            embed_and_draw("--redraw", str(points))
        else:
            return False
        tabulate_tsne(out)
        return True
    if not given.draw:
        make(wanted(name, given.seeds, given.steps), file, runs, given.workers, given.device)
    return draw(name, out, known_runs(file), given.seeds, given.steps)


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.format(names=", ".join(NAMES), stories=Run.stories)
    parser = OptionParser(
        prog="python -m lab.paper", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", choices=NAMES, help="what to run and draw")
    parser.add_argument("--draw", action="store_true", help="only draw, from the runs that are there")
    parser.add_argument("--seeds", type=int, metavar="N", help="fewer or more seeds")
    parser.add_argument("--steps", type=int, metavar="N", help="shorter runs, to try the command")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: results; runs/trial with --seeds or --steps"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (all cores)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: all workers share that GPU")
    given = parser.parse_args(arguments)
    for option in ("seeds", "steps", "workers"):
        if (value := getattr(given, option)) is not None and value < 1:
            parser.error(f"--{option} is {value}; expected 1 or more")
    if given.name == "smollm" and not given.draw and not PRETRAINED["smollm"].is_dir():
        parser.error(f"{PRETRAINED['smollm']} is missing; expected a model there: python -m lab.smollm runs/smollm")
    everything = [name for name in NAMES[:-1] if name not in APART or given.draw]
    names = everything if given.name == "all" else [given.name]
    out = given.out or (ROOT / "runs" / "trial" if given.seeds or given.steps else ROOT / "results")
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            print(out / f"{name}.md" if make_and_draw(name, out, given) else f"{name}: not run yet")
    except KeyboardInterrupt:
        print("stopped; what is finished stays, and the same command goes on", file=sys.stderr)
        return 130
    except RuntimeError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
