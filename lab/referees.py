"""The trainers behind a referee's questions: each changes one thing that no setting names.

    oracle            a ceiling, by cheating: only a sound response is rewarded, steps and all
    same steps        agreement counted on the text: the share of the other right answers with the same steps
    similar text      agreement counted on the text: the mean similarity to the other right answers
    frozen start      agreement in the mean hidden states of the frozen starting policy, without a head: nothing learns
    paper's anchors   the usual ones, but none in a group without a wrong answer: the paper's rule

The two on texts pay between the floor and the ceiling of the contrastive reward, so that the rewards are of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn

from clipo import Pairs, Sampled
from config import CLIPOConfig
from engine.guard import Trainer
from tasks.toy import Story, ToyTask, is_sound

# ----------------------------------------------------------------------------------------------------
# The oracle
# ----------------------------------------------------------------------------------------------------


class OracleTask(ToyTask):
    """Right is only a sound response: one, or where steps have several forms, one in any of them."""

    def are_correct(self, texts: Sequence[str], problems: Sequence[Story]) -> list[bool]:
        return [is_sound(story, text) for story, text in zip(problems, texts, strict=True)]


# ----------------------------------------------------------------------------------------------------
# Agreement without the head
# ----------------------------------------------------------------------------------------------------


def same_steps(one: str, other: str) -> float:
    """1 if two responses have the same steps, whatever their answers; else 0.

    >>> same_steps("3 + 2 = 5 . #### 5", "3 + 2 = 5 . #### 7"), same_steps("#### 5", "3 + 2 = 5 . #### 5")
    (1.0, 0.0)
    """
    return float(one.split("####")[0].split() == other.split("####")[0].split())


def similar_text(one: str, other: str) -> float:
    """How alike the words of two responses are, 0 to 1: twice the matching words over all (Ratcliff and Obershelp).

    >>> similar_text("3 + 2 = 5", "3 + 1 = 4")  # three of five
    0.6
    """
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


def agreement(texts: Sequence[str], correct: Sequence[bool], alike: Callable[[str, str], float]) -> list[float | None]:
    """Of one group: each right response's mean likeness to the other right ones; None for those without any.

    >>> agreement(["a", "a", "b", "c"], [True, True, True, False], lambda one, other: float(one == other))
    [0.5, 0.5, 0.0, None]
    """
    right = [i for i, is_right in enumerate(correct) if is_right]
    if len(right) < 2:
        return [None] * len(texts)
    known: dict[tuple[str, str], float] = {}

    def of(one: str, other: str) -> float:  # many responses are equal
        if (one, other) not in known:
            known[one, other] = known[other, one] = alike(one, other)
        return known[one, other]

    means = {i: sum(of(texts[i], texts[j]) for j in right if j != i) / (len(right) - 1) for i in right}
    return [means.get(i) for i in range(len(texts))]


class TextAgreement(Trainer):
    """Pays agreement of texts in place of the embeddings': from the reward's floor (none) to its ceiling (all)."""

    alike: Callable[[str, str], float]

    def total_reward(self, sampled: Sampled, contrastive: Tensor) -> Tensor:
        low, high = self.config.reward_floor, self.config.reward_ceiling
        paid = [
            [0.0 if mean is None else low + (high - low) * mean for mean in agreement(texts, right, self.alike)]
            for texts, right in zip(sampled.texts, sampled.correct.tolist(), strict=True)
        ]
        return sampled.correct.float() + torch.tensor(paid, device=contrastive.device)


class SameSteps(TextAgreement):
    alike = staticmethod(same_steps)


class SimilarText(TextAgreement):
    alike = staticmethod(similar_text)


class FrozenStart(Trainer):
    """The usual reward, of the states that the frozen start has for the same rollouts; no head, nothing learns."""

    def __init__(self, policy, tokenizer, are_correct: Callable, config: CLIPOConfig, engine: str = "fast"):
        super().__init__(policy, tokenizer, are_correct, replace(config, head_steps=0), engine)
        if self.reference is None:
            raise ValueError(f"beta is {config.beta}, so that no frozen start is kept; expected more than 0")
        self.head.layers = nn.Sequential()  # z = normalise(h)

    def roll_out(self, prompts: list, answers: list, random: torch.Generator) -> Sampled:
        sampled = super().roll_out(prompts, answers, random)
        y = sampled.rollouts
        groups = zip(sampled.prompts, y.tokens, y.mask, strict=True)
        states = torch.stack([frozen_states(self.reference, *group) for group in groups])  # (P, G, D)
        return sampled._replace(rollouts=y._replace(hidden=states))


@torch.no_grad()
def frozen_states(model, prompt: Sequence[int], tokens: Tensor, mask: Tensor) -> Tensor:
    """h of one group under another model: tokens (G, T), mask (G, T) -> (G, D). As `clipo.generate` defines it."""
    before = tokens.new_tensor(prompt).expand(len(tokens), -1)
    states = model.base_model(input_ids=torch.cat([before, tokens], 1), use_cache=False).last_hidden_state
    fed = mask.roll(-1, 1)  # the response's tokens but the last
    fed[:, -1] = False
    mean = (states[:, len(prompt) :] * fed[:, :, None]).sum(1) / fed.sum(1, keepdim=True).clamp(min=1)
    return torch.where(fed.any(1, keepdim=True), mean, states[:, len(prompt) - 1]).float()


class PapersAnchors(Trainer):
    """No anchor where all are right, though the wrong answers of other questions could be its negatives."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        usual = self.parts.pairs

        def in_mixed_groups(correct: Tensor, generator: torch.Generator | None = None) -> Pairs:
            pairs, mixed = usual(correct, generator), ~correct.all(-1)
            return pairs._replace(negative=pairs.negative & mixed[:, None, None])

        self.parts = replace(self.parts, pairs=in_mixed_groups)


TRAINERS: dict[str, type[Trainer]] = {
    "": Trainer,
    "oracle": Trainer,
    "same steps": SameSteps,
    "similar text": SimilarText,
    "frozen start": FrozenStart,
    "paper's anchors": PapersAnchors,
}


def of_kind(kind: str) -> tuple[type[ToyTask], type[Trainer]]:
    """Task and trainer of an arm: a name above, or "" for the usual ones."""
    return OracleTask if kind == "oracle" else ToyTask, TRAINERS[kind]
