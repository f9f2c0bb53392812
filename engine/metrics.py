"""What a step says about itself: the numbers of a line in metrics.jsonl, from what the step found out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipo import Scored
from config import CLIPOConfig


def share(flags: Tensor) -> float:
    return flags.float().mean().item()


def spread_within_groups(reward: Tensor, anchor: Tensor) -> float | None:
    """Mean over groups with anchors of the std of their rewards: what the reward can still tell apart. Both (P, G).

    >>> spread_within_groups(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, True, False]]))
    1.4142135381698608
    """
    groups = [values[chosen] for values, chosen in zip(reward, anchor, strict=True) if chosen.any()]
    stds = [values.std().item() if len(values) > 1 else 0.0 for values in groups]
    return sum(stds) / len(stds) if stds else None


def mean_of_updates(updates: Sequence[dict]) -> dict:
    """Over the mini-batches of a step; None in a warm-up step, which has none.

    >>> mean_of_updates([{"policy_loss": 1.0, "kl": None}, {"policy_loss": 2.0, "kl": None}])["policy_loss"]
    1.5
    """
    names = ("policy_loss", "kl", "clip_fraction", "policy_grad_norm")
    values = {name: [update.get(name) for update in updates] for name in names}
    return {name: None if not of or None in of else sum(of) / len(of) for name, of in values.items()}


def describe(scored: Scored, config: CLIPOConfig, stop_ids: Sequence[int]) -> dict:
    """The metrics of a step. Rewards are per rollout, entropy in nats per token."""
    rollouts, rc, anchor = scored.rollouts, scored.contrast.reward, scored.contrast.pairs.anchor
    length = rollouts.mask.sum(-1)  # (P, G)
    ended = torch.isin(rollouts.tokens, torch.tensor(stop_ids, device=length.device)) & rollouts.mask

    def over_anchors(values: Tensor) -> float | None:
        return values[anchor].float().mean().item() if anchor.any() else None

    return {
        "reward": scored.reward.mean().item(),
        "accuracy": share(scored.correct),
        "contrastive_loss": over_anchors(scored.contrast.loss),
        "contrastive_reward": over_anchors(rc),
        "contrastive_reward_std": spread_within_groups(rc, anchor),
        "on_floor": over_anchors(rc <= config.reward_floor),
        "on_ceiling": over_anchors(rc >= config.reward_ceiling),
        "anchors": int(anchor.sum()),
        "groups_without_contrast": share(~anchor.any(-1)),
        "groups_without_advantage": share(scored.reward.std(-1) < 1e-6),
        # The mean surprise at one's own samples is an unbiased estimate of the entropy, and costs nothing.
        "entropy": -rollouts.logprobs.sum().item() / int(length.sum()),
        "response_length": length.float().mean().item(),
        "cut_off": share(~ended.any(-1)),
        "head_grad_norm": scored.contrast.head_grad_norm,
        **mean_of_updates(scored.updates),
    }
