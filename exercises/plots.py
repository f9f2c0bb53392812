"""The plots of the experiments, from your answers: each is written beside the answer, as plot.png.

python -m exercises.plots 8                                   of 7, 8, 9, 10
CLIPO_ANSWERS=exercises/solutions python -m exercises.plots 8     the one to expect
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

import clipo
import toy
import variants
from exercises.checking import HERE, answer_of
from problems import are_correct

# A made-up group: which of its 16 rollouts are right, and which of those are sound.
RIGHT = torch.tensor([True] * 9 + [False] * 7)
SOUND = torch.tensor([True] * 6 + [False] * 10)


def made_up_groups(count: int, gather: Tensor) -> Tensor:
    """Embeddings (count, 16, 8) on the unit sphere: some gather, all others scatter. The same every time."""
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(count, 1, 8, generator=draw)
    return F.normalize(torch.where(gather[:, None], centre, 0) + torch.randn(count, 16, 8, generator=draw), dim=-1)


def paid_for_soundness(loss: Callable[..., Tensor], tau: float = 0.5, sound: Tensor = SOUND) -> float:
    """What -L pays a sound right answer more than an unsound one, in standard deviations of its group's R; a mean.

    The first six right ones gather (SOUND); `sound` (16,) bool may call others sound.
    """
    z = made_up_groups(2000, gather=SOUND)  # (2000, 16, 8); so many, because InfoNCE's pay hangs on its draw
    pairs = clipo.draw_pairs(RIGHT.expand(2000, 16), torch.Generator().manual_seed(0))
    rc = -loss(z, pairs, tau)  # (2000, 16)
    R = torch.where(RIGHT, 1 + rc - rc[:, RIGHT].mean(-1, keepdim=True), 0.0)
    gaps = rc[:, sound].mean(-1) - rc[:, RIGHT & ~sound].mean(-1)
    return (gaps / (R.std(-1) + 1e-6)).mean().item()


def plot_7(answer, axes) -> None:
    """The share of anchors on the floor while a head learns on made-up groups."""
    for G, style in ((8, "-"), (12, "--"), (16, ":")):
        torch.manual_seed(0)
        head, shares = clipo.ContrastiveHead(64, 512), []
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        right = torch.arange(G) < G // 2
        hidden = torch.randn(32, G, 64) + 0.7 * torch.randn(32, 1, 64) * right[:, None]  # right ones gather a little
        pairs = clipo.draw_pairs(right.expand(32, G), torch.Generator().manual_seed(0))
        for _ in range(60):
            loss = clipo.infonce(head(hidden), pairs)
            reward = answer.contrastive_reward(loss.detach(), pairs)
            shares.append((reward[pairs.anchor] <= -0.5).float().mean().item())
            loss[pairs.anchor].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        axes.plot(shares, style, color="black", label=f"G = {G}, half of them right")
    axes.set(xlabel="updates of the head", ylabel="share of the anchors on the floor", ylim=(-0.05, 1.05))
    axes.set_title("An untrained head pays most anchors of a large group the same")
    axes.legend()


def plot_8(answer, axes) -> None:
    """Mean |A| over the size of the differences."""
    sizes = [10 ** (-step / 4) for step in range(25)]
    for scale_by_std, style, name in ((True, "-", "divided by the std"), (False, "--", "not divided (Dr. GRPO)")):
        axes.loglog(sizes, [answer.mean_size(s, scale_by_std) for s in sizes], style, color="black", label=name)
    axes.set(xlabel="size of the differences between the rewards", ylabel="mean |A| of the group")
    axes.set_title("Dividing by the std blows any difference up to one size")
    axes.legend()


def plot_9(answer, axes) -> None:
    """What both checkers pay for farmed responses."""
    stories = toy.stories("exercise 9", toy.LEVELS["P0"], 200)
    texts, golds = [answer.farmed_response(story.question) for story in stories], [story.answer for story in stories]
    paid = [100 * sum(are_correct(texts, golds, lenient=lenient)) / 200 for lenient in (False, True)]
    axes.bar(["strict", "lenient"], paid, color=["0.3", "0.7"], edgecolor="black")
    axes.set(ylabel="responses that are paid, percent", xlabel="answer checker", ylim=(0, 105))
    axes.set_title("A response without any work is paid by the lenient checker")


def plot_10(answer, axes) -> None:
    """Paid for soundness: the five losses and yours."""
    losses = {**variants.LOSSES, "yours": answer.MINE}
    axes.barh(list(losses), [paid_for_soundness(each.loss) for each in losses.values()], color="0.6", edgecolor="black")
    axes.set(xlabel="paid to sound right answers more than to unsound ones, standard deviations of R")
    axes.set_title("What each loss pays for soundness, on made-up groups")
    axes.invert_yaxis()


PLOTS = {
    "7": ("07_reward_cap", plot_7),
    "8": ("08_equal_rewards", plot_8),
    "9": ("09_lenient_checker", plot_9),
    "10": ("10_own_loss", plot_10),
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in PLOTS:
        print(f"error: {' '.join(arguments) or 'nothing'} given; expected one of: {', '.join(PLOTS)}", file=sys.stderr)
        return 2
    exercise, plot = PLOTS[arguments[0]]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    try:
        plot(answer_of(exercise), axes)
    except NotImplementedError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    file = HERE / exercise / "plot.png"
    figure.savefig(file, dpi=80)
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
