"""Every hyperparameter, with its meaning, its range and where its value comes from; and what differs between tracks.

A *track* is a task with its settings: "gsm8k" and "math" are the paper's first and second, "toy" is the world of
tasks/toy.py. The *informative form* is ours: the contrastive reward that the toy run has in place of the paper's.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields

import torch

from border import MOST, MOST_SEED, check_types

POLICY_LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "gmpo"]
CONTRASTIVE_LOSSES = ["infonce", "supcon_out", "supcon_in", "soft_nn", "decoupled"]
SCOPES = ("group", "wrong_of_all", "cross", "batch")
ENGINES = ("plain", "fast")

# Learning rates and weight decays end at 1. A step then cannot break a weight: AdamW moves it by less than ten times
# the rate, and rate times decay, at most 1, shrinks it and never turns it round.


def setting(default, meaning: str, source: str, *, low=None, high=None, above=None, choices=None):
    """A field of `CLIPOConfig`: its meaning, its source, its range (>= low, <= high, > above, or one of choices).

    A number without them is at most MOST, up or down.
    """
    about = {"meaning": meaning, "source": source, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata=about)


def computes_in_bfloat16(device: str) -> bool:
    """Does this kind of device have bfloat16 instructions? (Some CPUs: a 34M model's step takes half the time.)"""
    return device == "cuda" or (device == "cpu" and torch.cpu._is_avx512_bf16_supported())


# Decode steps of a run that repay half a minute of compiling, where each is a millisecond sooner.
REPAYS_COMPILING = 30_000

# What each track sets differently from the defaults of CLIPOConfig. "math" is the paper's second track.
TRACKS: dict[str, dict] = {
    "gsm8k": {},
    "math": dict(
        steps=580, prompts_per_step=128, mini_batch_prompts=128, max_new_tokens=4096, d_embed=2048, head_warmup_steps=58
    ),
    "toy": dict(
        steps=60, prompts_per_step=8, mini_batch_prompts=8, max_prompt_tokens=128, max_new_tokens=24,
        lr=1e-4, lr_warmup_steps=5, beta=0.02, head_warmup_steps=4, micro_batch_tokens=2560,
        compute_dtype="float32",  # bfloat16 gains a fifth at this size, and not every CPU has it
        seed=32,  # the first of those that docs/results.md reports
    ),
}  # fmt: skip

# Under the paper's constants the reward of the toy world's anchors hardly differs. In this form it does. README's table
# says what each entry replaces.
INFORMATIVE = dict(
    center_hidden=True, contrastive_kind="decoupled", contrastive_scope="wrong_of_all", tau=0.5,
    reward_from_chance=True, weight=1.0, reward_floor=-0.9, reward_ceiling=1.0, head_steps=4,
)  # fmt: skip


@dataclass
class CLIPOConfig:
    """Every hyperparameter; the defaults are the paper's for GSM8K. Raises ValueError for a value out of range."""

    steps: int = setting(
        84, "training steps, head warm-up included", "paper: 6 epochs of 14 full batches; here 5.76 passes",
        low=1,
    )  # fmt: skip
    prompts_per_step: int = setting(512, "prompts in a step", "paper", low=1)
    mini_batch_prompts: int = setting(256, "prompts in one policy update at most", "paper", low=1)
    samples_per_prompt: int = setting(16, "rollouts of one prompt, the group size G", "paper", low=2, high=10**4)
    max_prompt_tokens: int = setting(512, "longer prompts are dropped", "paper", low=1)
    max_new_tokens: int = setting(2048, "tokens of a rollout at most", "paper", low=1)
    temperature: float = setting(1.0, "sampling temperature of rollouts", "paper", above=0, high=100)

    lr: float = setting(1e-6, "policy learning rate (AdamW)", "paper", low=0, high=1)
    lr_warmup_steps: int = setting(0, "policy steps over which lr rises linearly", "authors' code", low=0)
    weight_decay: float = setting(0.01, "policy weight decay", "verl's default", low=0, high=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", "authors' code", above=0)
    policy_loss: str = setting("grpo", "what is clipped and averaged", "paper", choices=POLICY_LOSSES)
    clip_low: float | None = setting(
        None, "the ratio is clipped below 1 - this (the loss's own)", "paper", low=0, high=1
    )
    clip_high: float | None = setting(None, "the ratio is clipped above 1 + this (the loss's own)", "paper", low=0)
    beta: float = setting(0.001, "weight of the k3 KL to the frozen start; 0: none, as in DAPO", "paper", low=0)
    scale_by_std: bool = setting(True, "divide advantages by the group's std", "paper")
    resample_tries: int = setting(
        0, "so many times at most, groups all right or all wrong make room for fresh prompts", "DAPO; 0: never", low=0
    )
    overlong_buffer: int = setting(
        0, "a penalty grows from 0 to 1 over so many tokens before the longest length", "DAPO; 0: none", low=0
    )

    weight: float = setting(0.2, "lambda, weight of the contrastive reward; 0 is plain GRPO", "paper", low=0)
    contrastive_kind: str = setting("infonce", "contrastive loss", "paper", choices=CONTRASTIVE_LOSSES)
    contrastive_scope: str = setting("group", "where positives and negatives come from", "paper", choices=SCOPES)
    tau: float = setting(0.05, "temperature of the similarities", "paper", above=0, high=100)
    reward_floor: float = setting(-0.5, "least contrastive reward", "paper", high=0)
    reward_ceiling: float = setting(1.0, "largest contrastive reward, where it is measured from chance", "ours", low=0)
    reward_from_chance: bool = setting(
        False, "pay weight * (chance level - L), not weight * -L", "paper: off; ours: on"
    )
    shuffle_contrast: bool = setting(False, "control: each group's contrastive rewards, dealt out at random", "ours")
    center_hidden: bool = setting(False, "subtract the group's mean from the hidden states", "paper: off; ours: on")
    d_embed: int = setting(512, "embedding width E of the head", "paper", low=1, high=2**16)
    head_mlp: bool = setting(False, "MLP head in place of a linear one", "authors' code")
    head_lr: float = setting(1e-3, "head learning rate (AdamW)", "paper", low=0, high=1)
    head_weight_decay: float = setting(0.01, "head weight decay", "paper", low=0, high=1)
    head_steps: int = setting(
        1, "head updates per step, after the reward is paid; 0: a fixed head", "paper: 1; ours: 4", low=0
    )
    head_warmup_steps: int = setting(14, "first steps, in which only the head learns (weight > 0)", "paper", low=0)

    max_batch: int = setting(256, "rollouts under way at once; the others wait for a free row", "memory only", low=1)
    cuda_graphs: bool | None = setting(
        None, "replay decode steps as CUDA graphs on a GPU (default: where it works)", "speed only"
    )
    compile: bool | None = setting(
        None, "compile the decode step (default: on a GPU, in a run that is long enough to repay it)", "speed only"
    )
    keep_captures: bool | None = setting(
        None,
        "keep graphs, cache and weights' copies of compiled decode steps for the next rollouts (default: on a GPU, "
        "where memory has room for them beside the update)",
        "speed only",
    )
    micro_batch_tokens: int = setting(16384, "tokens in a forward and backward pass", "memory only", low=1)
    recompute_activations: bool | None = setting(
        None,
        "keep only each layer's input for the backward pass; a third slower (default: where memory asks for it)",
        "authors' code: on; memory only",
    )
    compute_dtype: str = setting(
        "auto",
        "dtype of matrix products (weights and optimiser stay float32); auto: bfloat16 where the device computes in it",
        "authors' code: bfloat16",
        choices=["auto", "float32", "bfloat16"],
    )
    seed: int = setting(0, "seed of every random draw", "", low=0, high=MOST_SEED)

    def __post_init__(self):
        check_types(self)
        if self.policy_loss == "dr_grpo":
            self.scale_by_std = False  # which is what makes it Dr. GRPO
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            if value is None and f.default is None:
                continue
            expected = []
            if isinstance(value, float) and not math.isfinite(value):
                expected.append("a finite number")
            if isinstance(value, float | int):
                low, high = (
                    bound if about[end] is None else about[end] for end, bound in (("low", -MOST), ("high", MOST))
                )
                if not value >= low and (about["low"] is not None or math.isfinite(value)):
                    expected.append(f"at least {low}")
                if value > high and math.isfinite(value):
                    expected.append(f"at most {high}")
            if about["above"] is not None and not value > about["above"]:
                expected.append(f"more than {about['above']}")
            if about["choices"] and value not in about["choices"]:
                expected.append(f"one of: {', '.join(about['choices'])}")
            if expected:
                raise ValueError(f"{f.name} is {value!r}; expected {' and '.join(expected)}")
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}; expected at most max_new_tokens, {self.max_new_tokens}"
            )

    def in_bfloat16(self, device: str) -> bool:
        """Are matrix products computed in bfloat16 on this kind of device?"""
        return {"auto": computes_in_bfloat16(device), "float32": False, "bfloat16": True}[self.compute_dtype]

    def compiles(self, device: str) -> bool:
        """Is the decode step compiled on this kind of device?"""
        if self.compile is None:
            return device == "cuda" and self.steps * self.max_new_tokens >= REPAYS_COMPILING
        return self.compile

    @classmethod
    def for_track(cls, track: str, *, paper: bool = False, **chosen) -> CLIPOConfig:
        """The settings of a track, with `chosen` on top. On the toy world, `paper` selects the paper's constants of
        the contrastive reward in place of INFORMATIVE; elsewhere they are the defaults anyway."""
        if track not in TRACKS:
            raise ValueError(f"track is {track!r}; expected one of: {', '.join(TRACKS)}")
        informative = INFORMATIVE if track == "toy" and not paper else {}
        without_kl = {"beta": 0.0} if chosen.get("policy_loss") == "dapo" else {}  # DAPO has none
        return cls(**{**TRACKS[track], **informative, **without_kl, **chosen})


# What changes a run's speed or memory alone, by its own word.
ONLY_SPEED = [f.name for f in fields(CLIPOConfig) if f.metadata["source"].endswith(("memory only", "speed only"))]


def add_options(group: argparse._ArgumentGroup) -> None:
    """An option for every hyperparameter, with its meaning, its default on each track, and its source."""
    for f in fields(CLIPOConfig):
        about = f.metadata
        values = {name: {**track, **(INFORMATIVE if name == "toy" else {})} for name, track in TRACKS.items()}
        special = "".join(f"; {name}: {v[f.name]}" for name, v in values.items() if f.name in v)
        kind = float if f.default is None else type(f.default)
        if "bool" in f.type:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": kind, **({"choices": about["choices"]} if about["choices"] else {"metavar": kind.__name__})}
        text = f"{about['meaning']} (default: {f.default}{special})" + (about["source"] and f" [{about['source']}]")
        group.add_argument("--" + f.name.replace("_", "-"), help=text.replace("%", "%%"), **how)


def config_from(given: dict, track: str, paper: bool = False) -> CLIPOConfig:
    """The settings of a track, with the options given on top. A ValueError names the option first."""
    chosen = {f.name: given[f.name] for f in fields(CLIPOConfig) if f.name in given}
    try:
        return CLIPOConfig.for_track(track, paper=paper, **chosen)
    except ValueError as reason:
        name, _, expected = str(reason).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {expected}") from reason
