"""The plots of the experiments, from your answers: each is written beside the answer, as plot.png.

python -m exercises.plots 8                                       of 7, 8, 9, 10, 11
CLIPO_ANSWERS=exercises/solutions python -m exercises.plots 8     the solution's

expected.png in each folder is the solution's plot with the number that the task begins with, not the one to be found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

import clipo
import variants
from exercises.checking import HERE, answer_of, file_of, picking, predicted, told
from tasks import toy
from tasks.grading import are_correct

# A made-up group: which of its 16 rollouts are right, and which of those are sound.
RIGHT = torch.tensor([True] * 9 + [False] * 7)
SOUND = torch.tensor([True] * 6 + [False] * 10)


# ----------------------------------------------------------------------------------------------------
# What is measured
# ----------------------------------------------------------------------------------------------------


def made_up_groups(count: int, gather: Tensor, shared: float = 0.0) -> Tensor:
    """States (count, 16, 8): some gather, all others scatter. The same every time.

    shared: how large the part is that all rollouts of a group have in common, because they answer one question.
    """
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(count, 1, 8, generator=draw)
    states = torch.where(gather[:, None], centre, 0) + torch.randn(count, 16, 8, generator=draw)
    return states + shared * torch.randn(count, 1, 8, generator=draw)


def gap(rc: Tensor, sound: Tensor = SOUND) -> float:
    """What rc (P, 16) pays sound right answers more than unsound ones, in standard deviations of the group's R."""
    R = torch.where(RIGHT, 1 + rc, 0.0)
    gaps = rc[:, sound].mean(-1) - rc[:, RIGHT & ~sound].mean(-1)
    return (gaps / (R.std(-1) + 1e-6)).mean().item()


def paid_for_soundness(loss: Callable[..., Tensor], tau: float = 0.5, sound: Tensor = SOUND) -> float:
    """The gap that -L pays. The first six right ones gather (SOUND); `sound` (16,) bool may call others sound."""
    z = F.normalize(made_up_groups(2000, gather=SOUND), dim=-1)  # so many, because InfoNCE's pay hangs on its draw
    rc = -loss(z, clipo.draw_pairs(RIGHT.expand(2000, 16), torch.Generator().manual_seed(0)), tau)  # (2000, 16)
    return gap(rc - rc[:, RIGHT].mean(-1, keepdim=True), sound)


def the_five() -> dict[str, Callable[..., Tensor]]:
    """The losses of variants.py. (InfoNCE by another way: exercise 6 asks for clipo.infonce.)"""
    infonce = {"infonce": lambda z, pairs, tau: picking(z, pairs, tau)}
    return {name: each.loss for name, each in variants.LOSSES.items()} | infonce


def learning(G: int, learn: Callable[..., Tensor], updates: int):
    """(L, pairs) of 32 made-up groups, half of them right, before each update of a head."""
    torch.manual_seed(0)
    head, right = clipo.ContrastiveHead(64, 512), torch.arange(G) < G // 2
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    hidden = torch.randn(32, G, 64) + 0.7 * torch.randn(32, 1, 64) * right[:, None]  # right ones gather a little
    pairs = clipo.draw_pairs(right.expand(32, G), torch.Generator().manual_seed(0))
    for _ in range(updates):
        loss = learn(head(hidden), pairs)  # (32, G)
        yield loss.detach(), pairs
        loss[pairs.anchor].mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def on_the_floor(G: int, weight: float, floor: float = -0.5) -> float:
    """The share of the anchors whose -weight L is not above the floor, before the head has learnt."""
    ((loss, pairs),) = learning(G, lambda z, pairs: picking(z, pairs, 0.05), 1)
    return (-weight * loss[pairs.anchor] <= floor).float().mean().item()


def paid_by(farm: Callable[[str], str], clauses: int) -> dict[str, float]:
    """The shares of 200 stories for which either checker pays a farmed response."""
    stories = toy.stories("exercise 9", toy.Level((clauses,)), 200)
    texts, golds = [farm(story.question) for story in stories], [story.answer for story in stories]
    return {name: sum(are_correct(texts, golds, lenient=name == "lenient")) / 200 for name in ("strict", "lenient")}


def two_changes(answer, centring: bool, from_chance: bool, shared: float) -> float:
    """The gap that the decoupled loss pays with each of the two changes of exercise 11, or without it."""
    states = made_up_groups(2000, gather=SOUND, shared=shared)
    pairs = clipo.draw_pairs(RIGHT.expand(2000, 16), torch.Generator().manual_seed(0))
    z = F.normalize(answer.centred(states) if centring else states, dim=-1)
    chance = answer.chance_level(pairs.positive.sum(-1).float(), pairs.negative.sum(-1).float())  # (2000, 16)
    loss = variants.decoupled(z, pairs, tau=0.5)
    return gap(answer.reward(loss, chance if from_chance else torch.zeros_like(loss), pairs.anchor))


# ----------------------------------------------------------------------------------------------------
# Plots: each draws into a figure and returns what was predicted and what was measured
# ----------------------------------------------------------------------------------------------------


def plot_7(answer, figure) -> dict[str, tuple[float, float]]:
    """The shares of the anchors on the paper's floor, and on a toy run's ceiling, while a head learns."""
    left, right = figure.subplots(1, 2, sharey=True)
    for G, style in ((8, "-"), (12, "--"), (16, ":")):
        shares = []
        for loss, pairs in learning(G, lambda z, pairs: picking(z, pairs, 0.05), 60):
            reward = answer.contrastive_reward(loss, pairs, weight=answer.WEIGHT)
            shares.append((reward[pairs.anchor] <= -0.5).float().mean().item())
        left.plot(shares, style, color="black", label=f"G = {G}, half of them right")
        shares = []
        for loss, pairs in learning(G, lambda z, pairs: variants.decoupled(z, pairs, 0.5), 60):
            chance = math.log(1 + G - G // 2)
            shares.append((chance - loss[pairs.anchor] >= 1).float().mean().item())
        right.plot(shares, style, color="black")
    guess = predicted(answer.PREDICTION, 0, 1)
    left.plot([0], [guess], "x", color="black", markersize=10, label="your prediction, G = 16, weight 0.2")
    left.set(xlabel="updates of the head", ylabel="share of the anchors", ylim=(-0.05, 1.05))
    right.set(xlabel="updates of the head")
    left.set_title(f"On the paper's floor: max(-{answer.WEIGHT:g} L, -0.5)")
    right.set_title("On a toy run's ceiling: clip(chance - L, -0.9, 1)")
    left.legend()
    if answer.WEIGHT != 0.2:
        print(f"on the floor at first, G = 16, weight {answer.WEIGHT:g}: {on_the_floor(16, answer.WEIGHT):.2g}")
    return {"on the floor at first, G = 16, weight 0.2": (guess, on_the_floor(16, 0.2))}


def plot_8(answer, figure) -> dict[str, tuple[float, float]]:
    """Mean |A| over the size of the differences."""
    axes, sizes = figure.subplots(), [10 ** (-step / 4) for step in range(29)]
    for scale_by_std, style, name in ((True, "-", "divided by the std"), (False, "--", "not divided (Dr. GRPO)")):
        axes.loglog(sizes, [answer.mean_size(s, scale_by_std) for s in sizes], style, color="black", label=name)
    guess, SIZE = predicted(answer.PREDICTION, 0, 1000), answer.SIZE
    axes.plot([SIZE], [answer.mean_size(SIZE, True)], "o", color="black", label=f"SIZE = {SIZE:g}")
    axes.plot([1e-3], [guess], "x", color="black", markersize=10, label="your prediction")
    axes.set(xlabel="size of the differences between the rewards", ylabel="mean |A| of the group")
    axes.set_title("Dividing by the std blows any difference up to one size")
    axes.legend()
    return {"mean |A| at size 0.001": (guess, answer.mean_size(1e-3, True))}


def plot_9(answer, figure) -> dict[str, tuple[float, float]]:
    """What both checkers pay for farmed responses."""
    axes, shares = figure.subplots(), paid_by(answer.farmed_response, answer.CLAUSES)
    axes.bar(list(shares), [100 * share for share in shares.values()], color=["0.3", "0.7"], edgecolor="black")
    guess = predicted(answer.PREDICTION, 0, 1)
    axes.plot(["lenient"], [100 * guess], "x", color="black", markersize=10, label="your prediction for 5 clauses")
    axes.set(ylabel="responses that are paid, percent", xlabel="answer checker", ylim=(0, 105))
    axes.set_title(f"Responses without any work, on stories of {answer.CLAUSES} clauses")
    axes.legend()
    seen = {5: (guess, shares["lenient"])}
    return {f"paid by the lenient checker, {n} clauses": both for n, both in seen.items() if n == answer.CLAUSES}


def plot_10(answer, figure) -> dict[str, tuple[float, float]]:
    """Paid for soundness by the five losses and yours; and a cartoon of what that comes to in training."""
    left, right = figure.subplots(1, 2)
    paid = {name: paid_for_soundness(loss) for name, loss in {**the_five(), "yours": answer.my_loss}.items()}
    left.barh(list(paid), list(paid.values()), color="0.6", edgecolor="black")
    left.set(xlabel="paid to sound right answers more\nthan to unsound ones, standard deviations of R")
    left.set_title("What each loss pays for soundness")
    left.invert_yaxis()
    updates = torch.arange(61)
    for style, (name, size) in zip(("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3))), paid.items(), strict=True):
        share = torch.sigmoid(math.log(2) + 0.2 * size * updates)  # begins at two of three
        right.plot(updates, share, linestyle=style, color="black", label=name)
    right.set(xlabel="updates", ylabel="sound share of the right answers", ylim=(0, 1.05))
    right.set_title("If each update moved the log-odds\nby 0.2 of that (a cartoon)")
    right.legend()
    return {}


def plot_11(answer, figure) -> dict[str, tuple[float, float]]:
    """What each of the two changes pays for soundness, both, and neither; and the most that can be paid."""
    axes, found = figure.subplots(), {}
    for name, centring, from_chance in FORMS:
        found[name] = two_changes(answer, centring, from_chance, answer.SHARED)
    axes.barh(list(found), list(found.values()), color="0.6", edgecolor="black")
    guesses = {name: predicted(answer.PREDICTION.get(name), -2, 2) for name, *_ in FORMS[1:]}
    axes.plot(list(guesses.values()), list(guesses), "x", color="black", markersize=10, label="your prediction")
    oracle = gap(torch.where(SOUND, 0.0, -1.0).expand(1, 16))  # R = 1 for sound answers, 0 for all others
    axes.axvline(oracle, color="black", linestyle=":", label="an oracle, which sees the steps")
    axes.set(xlabel="paid to sound right answers more than to unsound ones, standard deviations of R")
    axes.set_title(f"What the two changes pay, alone and together (SHARED = {answer.SHARED:g})")
    axes.invert_yaxis()
    axes.legend()
    return {name: (guess, found[name]) for name, guess in guesses.items()} if answer.SHARED == 8 else {}


FORMS = (  # of exercise 11: its name, and which of the two changes it has
    ("neither", False, False),
    ("centring alone", True, False),
    ("chance alone", False, True),
    ("both", True, True),
)
PLOTS = {
    "7": ("07_reward_cap", plot_7),
    "8": ("08_equal_rewards", plot_8),
    "9": ("09_lenient_checker", plot_9),
    "10": ("10_own_loss", plot_10),
    "11": ("11_two_changes", plot_11),
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in PLOTS:
        print(f"error: {' '.join(arguments) or 'nothing'} given; expected one of: {', '.join(PLOTS)}", file=sys.stderr)
        return 2
    exercise, plot = PLOTS[arguments[0]]
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    try:
        compared = plot(answer_of(exercise), figure)
    except (Exception, pytest.fail.Exception) as reason:
        print(f"error: {told(reason, file_of(exercise))}", file=sys.stderr)
        return 2
    for what, (guess, measured) in compared.items():
        print(f"{what}: you predicted {guess:.2g}, it is {measured:.2g}")
    file = HERE / exercise / "plot.png"
    figure.savefig(file, dpi=80)
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
