"""What a run says while it goes on: a line of numbers for each step, some of its groups, and a bar.

A further number is a line in `describe`, and for a curve on the page one in PANELS of run/page.html. docs/extend.md has
an example, and shows how to send all numbers somewhere else too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clipo import Scored
from config import CLIPOConfig
from engine.check import not_compiled
from engine.graphs import captures_failed
from engine.guard import Trainer
from engine.memory import device_bytes, memory_plan
from run import folder
from tasks.data import DataTask
from tasks.toy import ToyTask, longest_response


class Log:
    """Writes OUT/metrics.jsonl and OUT/rollouts.jsonl, and moves the bar; `skipped_in_a_row` counts broken steps."""

    def __init__(self, trainer: Trainer, task: ToyTask | DataTask, out: Path, groups: int):
        self.trainer, self.task, self.out, self.groups = trainer, task, out, groups
        self.sizes, self.skipped_in_a_row = dict(trainer.sizes), 0
        self.bar = tqdm(total=trainer.config.steps, initial=trainer.steps_done, desc=out.name)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_):
        self.bar.close()

    def step(self, scored: Scored | None) -> dict:
        """The step that the trainer has just done; returns its line of metrics."""
        metrics = step_metrics(self.trainer, scored) | (self.task.measure(scored) if scored else {})
        if self.trainer.policy in captures_failed:
            metrics["without_cuda_graphs"] = captures_failed[self.trainer.policy]
        if why := not_compiled.get(self.trainer.policy):
            metrics["not_compiled"] = why
        folder.append_line(self.out / "metrics.jsonl", metrics)
        for row in logged_groups(scored, self.task, self.groups, self.trainer.config) if scored else ():
            folder.append_line(self.out / "rollouts.jsonl", {"step": metrics["step"], **row})
        self.skipped_in_a_row = 0 if scored else self.skipped_in_a_row + 1
        self.show(metrics)
        return metrics

    def show(self, metrics: dict) -> None:
        """The bar; above it what is out of the ordinary."""
        for name, size in self.trainer.sizes.items():
            if size < self.sizes[name]:
                option = f"--{name.replace('_', '-')}"
                tqdm.write(f"out of memory: {option} goes on with {size}, slower, the results the same")
        self.sizes = dict(self.trainer.sizes)
        if metrics["skipped"]:
            tqdm.write(
                f"step {metrics['step']} is skipped: a number broke (NaN or infinite) in its {metrics['skipped']}"
            )
        else:
            numbers = "reward {reward:.2f}, accuracy {accuracy:.2f}, {tokens_per_second:,.0f} tokens/s"
            self.bar.set_postfix_str(numbers.format(**metrics), refresh=False)
        self.bar.update()


# ----------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------


def step_metrics(trainer: Trainer, scored: Scored | None) -> dict:
    """The line of the step that a trainer has just done; of a skipped one only its number, reason and seconds."""
    metrics = {"step": trainer.steps_done, "skipped": trainer.skipped}
    if scored:
        metrics |= describe(scored, trainer.config, trainer.stop_ids) | {
            "groups_resampled": len(trainer.resampled) / len(scored.prompts),
            "tokens_per_second": int(scored.rollouts.mask.sum()) / sum(trainer.seconds.values()),
        }
    return metrics | {"seconds": trainer.seconds}


def describe(scored: Scored, config: CLIPOConfig, stop_ids: Sequence[int]) -> dict:
    """The metrics of a step. Rewards are per rollout, entropy in nats per token."""
    rollouts, rc, anchor = scored.rollouts, scored.agreement.reward, scored.agreement.pairs.anchor
    length = rollouts.mask.sum(-1)  # (P, G)
    ended = torch.isin(rollouts.tokens, torch.tensor(stop_ids, device=length.device)) & rollouts.mask

    def over_anchors(values: Tensor) -> float | None:
        return values[anchor].float().mean().item() if anchor.any() else None

    return {
        "reward": scored.reward.mean().item(),
        "accuracy": fraction(scored.correct),
        "contrastive_loss": over_anchors(scored.agreement.loss),
        "contrastive_reward": over_anchors(rc),
        "contrastive_reward_std": spread_within_groups(rc, anchor),
        "on_floor": over_anchors(rc <= config.reward_floor),
        "on_ceiling": over_anchors(rc >= config.reward_ceiling),
        "anchors": int(anchor.sum()),
        "groups_without_contrast": fraction(~anchor.any(-1)),
        "groups_without_advantage": fraction(scored.reward.std(-1) < 1e-6),
        # The mean surprise at one's own samples is an unbiased estimate of the entropy, and costs nothing.
        "entropy": -rollouts.logprobs.sum().item() / int(length.sum()),
        "response_length": length.float().mean().item(),
        "cut_off": fraction(~ended.any(-1)),
        "head_grad_norm": scored.agreement.head_grad_norm,
        **mean_of_updates(scored.updates),
    }


def fraction(flags: Tensor) -> float:
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
    """Each number's mean over the mini-batches of a step; None in a warm-up step, which has none.

    >>> mean_of_updates([{"policy_loss": 1.0, "kl": None}, {"policy_loss": 2.0, "kl": None}])["policy_loss"]
    1.5
    """
    names = ("policy_loss", "kl", "clip_fraction", "policy_grad_norm")
    values = {name: [update.get(name) for update in updates] for name in names}
    return {name: None if not of or None in of else sum(of) / len(of) for name, of in values.items()}


# ----------------------------------------------------------------------------------------------------
# Groups
# ----------------------------------------------------------------------------------------------------


def logged_groups(scored: Scored, task: ToyTask | DataTask, count: int, config: CLIPOConfig) -> Iterator[dict]:
    """The first `count` groups of a step, a row for rollouts.jsonl each; the page shows them.

    `cosine` is the matrix of the embeddings' cosines; rollouts and `positives` are numbered within the group.
    """
    agreement, G = scored.agreement, scored.correct.shape[1]
    one_drawn = config.contrastive_kind == "infonce"  # it pulls to one positive; the other losses pull to all
    pulled_to = agreement.pairs.target if one_drawn else agreement.pairs.positive  # (P, G, G), or (P, G, B)
    for g in range(min(count, len(scored.answers))):
        problem = scored.answers[g]
        own = pulled_to[g] if pulled_to.shape[-1] == G else pulled_to[g, :, g * G : g * G + G]  # (G, G)
        numbers = {
            "correct": scored.correct[g],
            "anchor": agreement.pairs.anchor[g],
            "contrastive_loss": agreement.loss[g],
            "contrastive_reward": agreement.reward[g],
            "reward": scored.reward[g],
            "advantage": scored.advantage[g],
        }
        numbers = {name: values.tolist() for name, values in numbers.items()}  # a GPU is waited for once for each
        rollouts = []
        for i, (text, to) in enumerate(zip(scored.texts[g], own.tolist(), strict=True)):
            row = {"text": text, **{name: values[i] for name, values in numbers.items()}}
            row["positives"] = [a for a, pulled in enumerate(to) if pulled and row["anchor"]]
            rollouts.append(row | task.remarks(problem, text))
        z = agreement.embedding[g]  # (G, E)
        yield {
            "question": problem.question,
            "answer": problem.answer,
            "all_positives": not one_drawn,
            "rollouts": rollouts,
            "cosine": [[round(cosine, 2) for cosine in row] for row in (z @ z.t()).tolist()],
        }


# ----------------------------------------------------------------------------------------------------
# Before the first step
# ----------------------------------------------------------------------------------------------------


def announce(trainer: Trainer, task: ToyTask | DataTask, second: bool = False) -> None:
    """The memory plan, and warnings: too little memory, nothing but warm-up, --max-new-tokens too short.

    Of two runs the second says what only it has to say.
    """
    config, device = trainer.config, trainer.policy.device
    if config.weight > 0 and config.steps <= config.head_warmup_steps:
        print(f"all {config.steps} steps are head warm-up (--head-warmup-steps {config.head_warmup_steps}): the policy "
              "will not change")  # fmt: skip
    if not trainer.sizes and (config.compile or config.keep_captures):
        print("--compile, --keep-captures: the plain engine compiles and keeps nothing; --engine fast does")
        config = replace(config, compile=False)
    elif config.keep_captures and not config.compiles(device.type):
        print("--keep-captures: nothing is kept, for decode steps are not compiled (--compile)")
    if second:
        return
    plan = memory_plan(trainer.policy, config, task.longest_prompt, config.in_bfloat16(device.type))
    print(plan)
    if config.recompute_activations:
        print("  activations are computed again in the backward pass (--no-recompute-activations keeps them)")
    if plan.peak > (has := device_bytes(device)):
        print(f"  there are {has / 1e9:.1f} GB; a lower --max-batch or --micro-batch-tokens takes less")
    if isinstance(task, ToyTask):
        room, most = config.max_new_tokens, longest_response(trainer.tokenizer, task.problems(0))
        if most > room:
            print(f"  a sound response may have {most} tokens; --max-new-tokens {room} cuts it off")
