"""The figures of lab.paper, drawn from lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from config import CLIPOConfig
from lab.arms import DIAL_FRIEND, DIAL_MISTAUGHT, ENDS, FRIEND, SOUND, TEMPERATURE, TRACK1
from lab.tables import TIMES, Lines, is_held, lied_to, over_history, push, shares

# One look an arm, in all figures: a colour that colour-blind readers can tell apart, a line for grey print, a marker.
LOOKS = {
    "GRPO": {"color": "#B34700", "linestyle": "--", "marker": "s"},
    "CLIPO": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "CLIPO, shuffled": {"color": "#7FB8D8", "linestyle": "-.", "marker": "^"},
    "oracle": {"color": "#009E73", "linestyle": ":", "marker": "D"},
    "paper's constants": {"color": "#8A4A73", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
}
OTHER = {"color": "0.55", "marker": "X"}
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


def track1_figure(lines: Lines, file: Path) -> None:
    """Every seed a dot: right answers where the friend is wrong. Beside it, a file: sound rollouts over training."""
    figure, dots = plot().subplots(figsize=(7.5, 4.6), layout="constrained")
    steps = CLIPOConfig.for_track("toy").steps
    for place, arm in enumerate(TRACK1):
        for end, (how, fill) in enumerate(zip(TIMES.values(), ("full", "none"), strict=True)):
            values, row = [lied_to(line, how) for line in lines[arm]], place + 0.45 * end
            look = {"marker": LOOKS[arm]["marker"], "color": LOOKS[arm]["color"], "fillstyle": fill}
            dots.plot(values, np.array(beside(values, 0.012, 0.045)) + row, linestyle="", markersize=4.5, **look)
            dots.plot(np.median(values), row, "|", color="black", markersize=20)
    start = np.median([lied_to(line) for line in lines["warm start"]])
    dots.axvline(start, color="0.4", linewidth=0.8, linestyle=":")
    title = (
        'Right answers to "P0, friend wrong": a dot is a seed, the bar their\n'
        f"median, the dotted line that of the starts (full: {steps} steps, hollow: {2 * steps})"
    )
    dots.set_title(title, fontsize=11)
    dots.set(xlabel="share of stories", xlim=(-0.02, 1))
    dots.set_yticks(np.arange(len(TRACK1)) + 0.22, list(TRACK1))
    dots.invert_yaxis()
    dots.grid(alpha=0.3)
    save(figure, file)
    figure, curves = plot().subplots(figsize=(7.5, 3.8), layout="constrained")
    for arm in TRACK1:
        curves.plot(*curve(lines[arm], "process"), **line_of(arm))
    curves.axvline(steps, color="0.6", linewidth=0.8)
    curves.set(title="Sound rollouts during training (P0), mean over seeds", xlabel="step", ylabel="share", ylim=(0, 1))
    curves.legend()
    curves.grid(alpha=0.3)
    save(figure, file.with_name(f"{file.stem}-process.png"))


def push_figure(lines: dict[tuple[str, bool], list[dict]], file: Path) -> None:
    """Where the first ten steps push, against where a run ends. lines: of an arm, in the usual world or in others."""
    figure, axis = plot().subplots(figsize=(8, 6), layout="constrained")
    for (arm, usual), part in sorted(lines.items(), key=lambda item: [*LOOKS, "others"].index(item[0][0])):
        if np.isnan(push(part)):  # the oracle's right responses are all sound
            continue
        look = {name: LOOKS[arm][name] for name in ("color", "marker")} if arm in LOOKS else OTHER
        axis.plot([push([line]) for line in part], [lied_to(line) for line in part], linestyle="", markersize=5,
                  label=arm if usual else f"{arm}, in other worlds", alpha=0.8,
                  fillstyle="full" if usual else "none", **look)  # fmt: skip
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set(title="Where the first ten steps push, and where 60 steps end",
             xlabel="mean advantage of sound responses minus that of right but unsound ones, steps 1 to 10",
             ylabel='right answers to "P0, friend wrong"', ylim=(-0.03, 1.03))  # fmt: skip
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
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


def dial_figure(lines: Lines, file: Path) -> None:
    """CLIPO over two dials: how many starts it loses, and how many answers are patched where the friend is wrong."""
    how, cells = "greedy_twice", {}
    for place in np.ndindex(len(DIAL_MISTAUGHT), len(DIAL_FRIEND)):
        arm = f"friend {DIAL_FRIEND[place[1]]}, mis-taught {DIAL_MISTAUGHT[place[0]]}"
        starts = {line["seed"]: line for line in lines[f"start, {arm}"]}
        lost = [not is_held(line, starts, how) for line in lines[arm]]
        patched = 100 * np.mean(shares(lines[arm], "liar", "patched", how))
        cells[place] = np.mean(lost), f"lost {sum(lost)} of {len(lost)}\npatched {patched:.0f}%"
    shown = np.reshape([share for share, _ in cells.values()], (len(DIAL_MISTAUGHT), -1))
    figure, axis = plot().subplots(figsize=(6.4, 4.6), layout="constrained")
    axis.imshow(shown, vmin=0, vmax=1, cmap="Greys", origin="lower", aspect="auto")
    for (i, j), (share, words) in cells.items():
        axis.text(j, i, words, ha="center", va="center", color="white" if share > 0.6 else "black")
    axis.set(title="CLIPO after 120 steps, where the friend is wrong")
    axis.set(xlabel="how often the friend is right in training", ylabel="share of sums that are taught wrong")
    axis.set_xticks(range(len(DIAL_FRIEND)), DIAL_FRIEND)
    axis.set_yticks(range(len(DIAL_MISTAUGHT)), DIAL_MISTAUGHT)
    save(figure, file)


def phase_figure(lines: Lines, file: Path) -> None:
    """Process on P2 over the world's two dials: GRPO, CLIPO, and their difference, with what was paid for soundness."""

    def cells(name: str, measure: Callable[[Sequence[dict]], float]) -> np.ndarray:
        return np.array([[measure(lines[f"{name}, sound {s}, friend {f}"]) for f in FRIEND] for s in SOUND])

    grpo, ours = (cells(name, lambda runs: np.mean(shares(runs, "P2", "process"))) for name in ("GRPO", "CLIPO"))
    paid = cells("CLIPO", lambda runs: over_history(runs, "gap"))
    figure, axes = plot().subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    for axis, title, values in zip(axes, ("GRPO", "CLIPO", "CLIPO minus GRPO"), (grpo, ours, ours - grpo), strict=True):
        compares = values is not grpo and values is not ours
        low, colours = (-1, "PuOr") if compares else (0, "Greys")
        axis.imshow(values, vmin=low, vmax=1, cmap=colours, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            words = f"{100 * value:+.0f}\npaid {paid[i, j]:+.1f}" if compares else f"{100 * value:.0f}"
            axis.text(j, i, words, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
        axis.set(title=title, xlabel="how often the friend is right in training",
                 ylabel="share of sound demonstrations")  # fmt: skip
        axis.set_xticks(range(len(FRIEND)), FRIEND)
        axis.set_yticks(range(len(SOUND)), SOUND)
    figure.suptitle("Sound on P2, percent")
    figure.supxlabel("paid: contrastive reward of sound minus unsound right answers of a group, in standard deviations "
                     "of its rewards, mean over training", fontsize=9)  # fmt: skip
    save(figure, file)
