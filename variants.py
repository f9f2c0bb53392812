"""What the paper compares CLIPO with, what we add, and the controls.

Losses, pairs and rewards take a place in `clipo.Parts`, policy losses that of `clipo.GRPO`. DynamicSampling is a CLIPO.

    parts             the functions that a config asks for
    LOSSES            contrastive losses, each with its chance level
    pairs_in_scope    positives and negatives from other questions
    reward            measured from chance; shuffled
    POLICY_LOSSES     what is clipped and averaged: Dr. GRPO, DAPO, GSPO, GMPO
    DynamicSampling   a step with DAPO's resampling and its penalty for length

A new loss is a function, a line in its table here, and its name in config.py (docs/extend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import clipo
from clipo import CLIPO, CONTROL, GRPO, Pairs, Parts, PolicyLoss, Rollouts, Sampled, draw_one, log_sum, similarities
from config import CLIPOConfig

# =====================================================================================================
# Contrastive losses. Pos: the other right rollouts of an anchor, Neg: the wrong ones; s_ia = z_i . z_a / tau
#
#    infonce      L_i = -s_ij + log sum_{a in Pos u Neg} exp(s_ia)          one j drawn from Pos  (paper: clipo.infonce)
#    supcon_out   the same, mean over all j in Pos                                                 (arXiv:2004.11362)
#    supcon_in    L_i = -log 1/|Pos| sum_{j in Pos} exp(s_ij) + log sum_{a in Pos u Neg} exp(s_ia) (arXiv:2004.11362)
#    soft_nn      L_i = -log sum_{j in Pos} exp(s_ij) + log sum_{a in Pos u Neg} exp(s_ia)         (arXiv:1902.01889)
#    decoupled    L_i = 1/|Pos| sum_{j in Pos} log(1 + sum_{k in Neg} exp(s_ik - s_ij))            (ours)
#
# All take z (P, G, E), pairs and tau and return (P, G), 0 where there is no anchor. The examples are that of
# `clipo.log_sum`: an anchor with two positives at similarity 1 and a wrong one at 0.
# =====================================================================================================

EXAMPLE = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # z: three agree, one is at right angles
EXAMPLE_RIGHT = torch.tensor([[True, True, True, False]])


def over_positives(values: Tensor, pairs: Pairs) -> Tensor:
    """The mean over each anchor's positives, 0 for rows without an anchor: (P, G, G) -> (P, G)."""
    mean = (values * pairs.positive).sum(-1) / pairs.positive.sum(-1).clamp(min=1)
    return torch.where(pairs.anchor, mean, 0.0)


def supcon_out(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """-s_ij + log sum over all others of exp(s_ia), mean over positives.

    >>> supcon_out(EXAMPLE, clipo.draw_pairs(EXAMPLE_RIGHT), tau=1.0)  # -1 + log(2e + 1)
    tensor([[0.8620, 0.8620, 0.8620, 0.0000]])
    """
    s = similarities(z, tau)
    return over_positives(log_sum(s, pairs.positive | pairs.negative)[..., None] - s, pairs)


def soft_nn(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """-log of the softmax's share that falls on positives.

    >>> soft_nn(EXAMPLE, clipo.draw_pairs(EXAMPLE_RIGHT), tau=1.0)  # -log(2e) + log(2e + 1)
    tensor([[0.1688, 0.1688, 0.1688, 0.0000]])
    """
    s = similarities(z, tau)
    loss = log_sum(s, pairs.positive | pairs.negative) - log_sum(s, pairs.positive)
    return torch.where(pairs.anchor, loss, 0.0)


def supcon_in(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """-log of a positive's mean share of the softmax: `soft_nn` + log |Pos|.

    >>> supcon_in(EXAMPLE, clipo.draw_pairs(EXAMPLE_RIGHT), tau=1.0)  # 0.1688 + log 2
    tensor([[0.8620, 0.8620, 0.8620, 0.0000]])
    """
    count = pairs.positive.sum(-1).clamp(min=1)
    return soft_nn(z, pairs, tau) + torch.where(pairs.anchor, count.log(), 0.0)


def decoupled(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """log(1 + sum over wrong ones of exp(s_ik - s_ij)), mean over positives.

    No positive stands in another one's denominator. As the wrong ones move away L nears 0; InfoNCE nears log |Pos|.

    >>> decoupled(EXAMPLE, clipo.draw_pairs(EXAMPLE_RIGHT), tau=1.0)  # log(1 + exp(0 - 1))
    tensor([[0.3133, 0.3133, 0.3133, 0.0000]])
    """
    s = similarities(z, tau)
    return over_positives(F.softplus(log_sum(s, pairs.negative)[..., None] - s), pairs)


class ContrastiveLoss(NamedTuple):
    """A loss, and its *chance level*: what it is for embeddings that tell nothing apart (every similarity the same)."""

    loss: Callable[[Tensor, Pairs, float], Tensor]
    chance: Callable[[Tensor, Tensor], Tensor] | None = None  # of |Pos| and |Neg|, both (P, G)


def log_of_all(positives: Tensor, negatives: Tensor) -> Tensor:
    return (positives + negatives).log()


LOSSES = {
    "infonce": ContrastiveLoss(clipo.infonce, log_of_all),
    "supcon_out": ContrastiveLoss(supcon_out, log_of_all),
    "supcon_in": ContrastiveLoss(supcon_in, log_of_all),
    "soft_nn": ContrastiveLoss(soft_nn, lambda positives, negatives: (1 + negatives / positives).log()),
    "decoupled": ContrastiveLoss(decoupled, lambda positives, negatives: (1 + negatives).log()),
}


def chance_from_counts(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """How a loss's chance level follows from |Pos| and |Neg|. ValueError for a loss without one."""
    if LOSSES[kind].chance is None:
        raise ValueError(
            f"the contrastive loss {kind!r} has no chance level, and the reward is measured from it; expected one in "
            "its line of variants.LOSSES, or --no-reward-from-chance"
        )
    return LOSSES[kind].chance


def chance_level(kind: str, pairs: Pairs) -> Tensor:
    """The loss (P, G) of anchors whose embeddings tell nothing apart. ValueError for a loss without one.

    >>> chance_level("decoupled", clipo.draw_pairs(EXAMPLE_RIGHT)).exp()
    tensor([[2., 2., 2., 1.]])
    """
    return chance_from_counts(kind)(pairs.positive.sum(-1).float(), pairs.negative.sum(-1).float())


# =====================================================================================================
# Where positives and negatives come from
#
#    group          both from the anchor's group                                           (paper: clipo.draw_pairs)
#    wrong_of_all   positives from the group, negatives the wrong rollouts of all questions (ours)
#    cross          positives from the group, everything else of the batch a negative       (authors' code)
#    batch          both from all questions: other right rollouts and wrong ones            (authors' code)
# =====================================================================================================


def pairs_in_scope(correct: Tensor, generator: torch.Generator | None = None, *, scope: str) -> Pairs:
    """`clipo.Pairs` that reach over all questions: (P, G, B) bool. a counts through the batch: question 1 begins at G.

    >>> correct = torch.tensor([[True, True], [True, False]])
    >>> for scope in ("wrong_of_all", "cross", "batch"):
    ...     pairs = pairs_in_scope(correct, scope=scope)
    ...     print(scope, pairs.positive[0, 0].int().tolist(), pairs.negative[0, 0].int().tolist())
    wrong_of_all [0, 1, 0, 0] [0, 0, 0, 1]
    cross [0, 1, 0, 0] [0, 0, 1, 1]
    batch [0, 1, 1, 0] [0, 0, 0, 1]
    """
    (P, G), device = correct.shape, correct.device
    rollout = torch.arange(P * G, device=device)
    itself = rollout == rollout.view(P, G, 1)  # (P, G, B)
    same_question = rollout // G == torch.arange(P, device=device)[:, None, None]  # (P, 1, B)
    one, other = correct[:, :, None], correct.flatten()
    positive = one & other & ~itself
    if scope != "batch":
        positive = positive & same_question
    negative = one & ~positive & ~itself if scope == "cross" else one & ~other
    return Pairs(draw_one(positive, generator), positive, negative)


def over_the_batch(loss: Callable[[Tensor, Pairs, float], Tensor]) -> Callable[[Tensor, Pairs, float], Tensor]:
    """A loss for pairs that reach over all questions: the whole batch is one group of B. z (P, G, E) -> (P, G)."""

    def of(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
        one_group = Pairs(*(part.flatten(0, 1) for part in pairs))  # (P, G, B) -> (B, B)
        return loss(z.flatten(0, 1), one_group, tau).view(z.shape[:2])

    return of


# =====================================================================================================
# What agreement is paid
# =====================================================================================================


def reward(loss: Tensor, pairs: Pairs, *, weight: float, floor: float, ceiling: float, chance_of: str) -> Tensor:
    """rc_i = clip(weight (chance - L_i), floor, ceiling) for anchors, 0 for others; chance_of names the loss.

    >>> pairs = clipo.draw_pairs(EXAMPLE_RIGHT)
    >>> reward(torch.zeros(1, 4), pairs, weight=1.0, floor=-0.5, ceiling=1.0, chance_of="decoupled")  # log 2 - 0
    tensor([[0.6931, 0.6931, 0.6931, 0.0000]])
    """
    chance = chance_level(chance_of, pairs)
    return clipo.contrastive_reward(loss, pairs, weight=weight, floor=floor, chance=chance).clamp(max=ceiling)


def shuffle_within_groups(values: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Deal the values of the chosen entries out anew among the chosen entries of their group; all (P, G).

    The control of every claim about the contrastive reward: each group keeps its numbers, and who gets which is random.

    >>> values, chosen = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, True, False, True]])
    >>> shuffle_within_groups(values, chosen, torch.Generator().manual_seed(1))
    tensor([[2., 4., 3., 1.]])
    """
    noise = torch.rand(values.shape, generator=generator).to(values.device)
    to = (~chosen).int().argsort(stable=True)  # the chosen places in order, then the others
    origin = noise.masked_fill(~chosen, 2.0).argsort(stable=True)  # the chosen ones in any order, then the others
    return values.scatter(-1, to, values.gather(-1, origin))


# =====================================================================================================
# Policy losses: what is clipped                                       the mean is over
#
#    grpo      every token's ratio rho                                  all tokens                    (clipo.GRPO)
#    dr_grpo   the same; advantages are not divided by the std          B times T_max places          (arXiv:2503.20783)
#    dapo      the same, more room above: 1 + 0.28                      all tokens                    (arXiv:2503.14476)
#    gspo      a response's geometric mean, to 1 - 3e-4, 1 + 4e-4       responses                     (arXiv:2507.18071)
#    gmpo      log rho in [-0.4, 0.4], before the geometric mean        responses                     (arXiv:2507.20673)
#
# Surrogates take log rho (..., T), advantages (..., 1), mask (..., T) and return two (..., T), as `clipped_surrogate`.
# =====================================================================================================


def response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over each response's tokens: (..., T) -> (..., 1).

    >>> response_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def clip_responses(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float):
    """GSPO: every token has its response's ratio, (pi(y) / pi_old(y)) ^ (1 / |y|)."""
    whole = response_mean(log_ratio, mask).expand_as(log_ratio)
    return clipo.clipped_surrogate(whole, advantages, mask, low, high)


def clip_geometric(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float):
    """GMPO: the geometric mean of token ratios, each bounded on the side that A would push it to."""
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    surrogate = response_mean(bounded, mask).exp() * advantages
    return surrogate.expand_as(log_ratio), bounded != log_ratio


def over_places(mask: Tensor, max_new_tokens: int) -> Tensor:
    """A mean over B times T_max places, filled or not: (P, G, T) -> (P, G, T).

    It is the token mean times (mean length / T_max): a batch of short responses weighs less against the KL.

    >>> over_places(torch.tensor([[[True, True], [True, False]]]), max_new_tokens=10)
    tensor([[[0.0500, 0.0500],
             [0.0500, 0.0000]]])
    """
    return mask / (mask[..., 0].numel() * max_new_tokens)


def over_responses(mask: Tensor) -> Tensor:
    """A mean over responses of their means over tokens: (P, G, T) -> (P, G, T).

    >>> over_responses(torch.tensor([[[True, True], [True, False]]]))
    tensor([[[0.2500, 0.2500],
             [0.5000, 0.0000]]])
    """
    return mask / (mask.sum(-1, keepdim=True) * mask[..., 0].numel())


POLICY_LOSSES = {
    "grpo": GRPO,
    "dr_grpo": GRPO._replace(mean=over_places),
    "dapo": GRPO._replace(high=0.28),
    "gspo": PolicyLoss(clip_responses, over_responses, 3e-4, 4e-4),
    "gmpo": PolicyLoss(clip_geometric, over_responses, 0.4, 0.4),
}


# =====================================================================================================
# From a config to the parts of a step
# =====================================================================================================


def policy_loss(config: CLIPOConfig) -> PolicyLoss:
    """The policy loss of these settings."""
    form = POLICY_LOSSES[config.policy_loss]
    if form.mean is over_places:
        return form._replace(mean=partial(over_places, max_new_tokens=config.max_new_tokens))
    return form


def parts(config: CLIPOConfig, random: Callable[[int], torch.Generator]) -> Parts:
    """The functions that these settings ask for: clipo.py's own, where the settings are the paper's.

    random(purpose) gives a step's random numbers (`HeadTrainer.random`). Raises ValueError for a loss without a chance
    level where the reward is measured from it.
    """
    chosen, loss, scope = Parts(), LOSSES[config.contrastive_kind].loss, config.contrastive_scope
    if scope == "group":
        chosen.loss = loss
    else:
        chosen.pairs, chosen.loss = partial(pairs_in_scope, scope=scope), over_the_batch(loss)
    if config.reward_from_chance:
        chance_from_counts(config.contrastive_kind)  # raises before the first step
        chosen.reward = partial(reward, ceiling=config.reward_ceiling, chance_of=config.contrastive_kind)
    if config.shuffle_contrast:
        chosen.reward = shuffled(chosen.reward, random)
    if config.policy_loss != "grpo":
        chosen.policy_gradient = partial(clipo.policy_gradient, form=policy_loss(config))
    return chosen


def shuffled(reward: Callable[..., Tensor], random: Callable[[int], torch.Generator]) -> Callable[..., Tensor]:
    """The control: the same rewards, dealt out anew among the anchors of each group."""

    def of(loss: Tensor, pairs: Pairs, **chosen) -> Tensor:
        return shuffle_within_groups(reward(loss, pairs, **chosen), pairs.anchor, random(CONTROL))

    return of


# =====================================================================================================
# DAPO's step
# =====================================================================================================


def overlong_penalty(length: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """0 up to max_new_tokens - buffer tokens, then falling evenly to -1 at max_new_tokens: (P, G) -> (P, G) float.

    buffer 0: no penalty. (DAPO's soft overlong punishment.)

    >>> overlong_penalty(torch.tensor([[5, 8, 9, 10]]), max_new_tokens=10, buffer=4)
    tensor([[ 0.0000, -0.5000, -0.7500, -1.0000]])
    """
    if buffer == 0:
        return torch.zeros_like(length, dtype=torch.float32)
    return ((max_new_tokens - buffer - length) / buffer).clamp(-1, 0)


def replaced(rollouts: Rollouts, which: Tensor, new: Rollouts) -> Rollouts:
    """These rollouts with `new` in place of the groups `which`, (N,) long; T becomes the longer of the two."""
    longest = max(rollouts.tokens.shape[2], new.tokens.shape[2])
    shorter = min(rollouts, new, key=lambda r: r.tokens.shape[2])
    stop = int(shorter.tokens[0, 0, -1])  # all of the shorter have ended

    def merged(mine: Tensor, theirs: Tensor, pad: int = 0) -> Tensor:
        if mine.ndim == 3 and mine.shape[2] != theirs.shape[2]:
            mine, theirs = (F.pad(part, (0, longest - part.shape[2]), value=pad) for part in (mine, theirs))
        return mine.index_copy(0, which, theirs)

    return Rollouts(
        merged(rollouts.tokens, new.tokens, pad=stop),
        merged(rollouts.mask, new.mask),
        merged(rollouts.logprobs, new.logprobs),
        rollouts.hidden.index_copy(0, which, new.hidden),
    )


class DynamicSampling(CLIPO):
    """CLIPO's step with what DAPO adds. With the default settings it is the plain step.

    A group all right or all wrong has no advantage from r. A fresh prompt takes its place, `resample_tries` times at
    most; then it stays. And a response near the longest length pays `overlong_penalty`.
    """

    fresh: Iterator[tuple[Sequence[int], object]] | None = None  # further prompts, each with its answer
    resampled: set[int]  # the groups of the last step whose prompt is a fresh one

    def roll_out(self, prompts: list, answers: list, random: torch.Generator) -> Sampled:
        self.resampled = set()
        sampled = super().roll_out(prompts, answers, random)
        for _ in range(self.config.resample_tries):
            dull = (sampled.correct.all(-1) | ~sampled.correct.any(-1)).nonzero()[:, 0]
            if not len(dull):
                break
            self.resampled |= set(dull.tolist())
            fresh = [next(self.fresh) for _ in dull]
            new = super().roll_out(*map(list, zip(*fresh, strict=True)), random)
            for g, *one in zip(dull.tolist(), new.prompts, new.answers, new.texts, strict=True):
                sampled.prompts[g], sampled.answers[g], sampled.texts[g] = one
            sampled = sampled._replace(
                rollouts=replaced(sampled.rollouts, dull, new.rollouts),
                correct=sampled.correct.index_copy(0, dull, new.correct),
            )
        return sampled

    def total_reward(self, sampled: Sampled, contrastive: Tensor) -> Tensor:
        length, config = sampled.rollouts.mask.sum(-1), self.config
        penalty = overlong_penalty(length, config.max_new_tokens, config.overlong_buffer)
        return super().total_reward(sampled, contrastive) + penalty
