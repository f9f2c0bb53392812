"""Every hyperparameter, with its meaning, its range and where its value comes from; and what differs between tracks.

A *track* is a task with its settings: "gsm8k" and "math" are the paper's first and second, "toy" is the world of
toy.py. The *informative form* is ours: the contrastive reward with other constants, because the paper's say little on
the toy world (docs/results.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import get_args, get_type_hints

import torch

POLICY_LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "gmpo"]
CONTRASTIVE_LOSSES = ["infonce", "supcon_out", "supcon_in", "soft_nn", "decoupled"]
SCOPES = ("group", "wrong_of_all", "cross", "batch")
ENGINES = ("plain", "fast")


def setting(default, meaning: str, source: str, *, low=None, high=None, above=None, choices=None):
    """A field of `CLIPOConfig`: its meaning, its source, its range (>= low, <= high, > above, or one of choices)."""
    about = {"meaning": meaning, "source": source, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata=about)


def has_type(value, wanted) -> bool:
    """Is it a `wanted`, told apart as in JSON? An int is a float too, True is no int, and an int is below 2**53.

    >>> has_type(1, float | None), has_type(True, int), has_type(None, str), has_type(10**99, int)
    (True, False, False, False)
    """
    kinds = get_args(wanted) or (wanted,)
    if type(value) is int:
        return (int in kinds or float in kinds) and abs(value) < 2**53
    return type(value) in kinds


def check_types(settings) -> None:
    """Raise ValueError for the first field of a dataclass that has another type than it says."""
    wanted = get_type_hints(type(settings))
    for f in fields(settings):
        if not has_type(value := getattr(settings, f.name), wanted[f.name]):
            shown = repr(value) if isinstance(value, str | int | float) else f"of type {type(value).__name__}"
            raise ValueError(f"{f.name} is {shown:.60}; expected {f.type}")


def computes_in_bfloat16(device: str) -> bool:
    """Does this kind of device have bfloat16 instructions? (Some CPUs: a 34M model's step takes half the time.)"""
    return device == "cuda" or (device == "cpu" and torch.cpu._is_avx512_bf16_supported())


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
        seed=16,  # the first of those that docs/results.md reports
    ),
}  # fmt: skip

# The paper's constants leave the reward of most anchors on its floor where groups are mostly correct. This
# form says something there: embeddings without what the group shares, a reward measured from chance, and the wrong
# rollouts of all questions as negatives, so that a right answer which looks like those is paid less.
INFORMATIVE = dict(
    center_hidden=True, contrastive_kind="decoupled", contrastive_scope="wrong_of_all", tau=0.5,
    reward_from_chance=True, weight=1.0, reward_floor=-0.9, reward_ceiling=1.0, head_steps=4,
)  # fmt: skip


@dataclass
class CLIPOConfig:
    """Every hyperparameter; the defaults are the paper's for GSM8K. Raises ValueError for a value out of range."""

    steps: int = setting(84, "training steps, head warm-up included", "paper: 6 epochs of 14", low=1, high=10**6)
    prompts_per_step: int = setting(512, "prompts in a step", "paper", low=1, high=10**6)
    mini_batch_prompts: int = setting(256, "prompts in one policy update at most", "paper", low=1)
    samples_per_prompt: int = setting(16, "rollouts of one prompt, the group size G", "paper", low=2, high=10**4)
    max_prompt_tokens: int = setting(512, "longer prompts are dropped", "paper", low=1)
    max_new_tokens: int = setting(2048, "tokens of a rollout at most", "paper", low=1)
    temperature: float = setting(1.0, "sampling temperature of rollouts", "paper", above=0)

    lr: float = setting(1e-6, "policy learning rate (AdamW)", "paper", low=0)
    lr_warmup_steps: int = setting(0, "policy steps over which lr rises linearly", "authors' code", low=0)
    weight_decay: float = setting(0.01, "policy weight decay", "verl's default", low=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", "authors' code", above=0)
    policy_loss: str = setting("grpo", "what is clipped and averaged", "paper", choices=POLICY_LOSSES)
    clip_low: float | None = setting(
        None, "the ratio is clipped below 1 - this (the loss's own)", "paper", low=0, high=1
    )
    clip_high: float | None = setting(None, "the ratio is clipped above 1 + this (the loss's own)", "paper", low=0)
    beta: float = setting(0.001, "weight of the k3 KL to the frozen start; 0: no reference is kept", "paper", low=0)
    scale_by_std: bool = setting(True, "divide advantages by the group's std (dr_grpo never does)", "paper")
    resample_tries: int = setting(
        0, "times that groups all right or all wrong are replaced by fresh prompts at most", "DAPO; 0: never", low=0
    )
    overlong_buffer: int = setting(0, "last tokens, over which a penalty of up to 1 grows", "DAPO; 0: none", low=0)

    weight: float = setting(0.2, "lambda, weight of the contrastive reward; 0 is plain GRPO", "paper", low=0)
    contrastive_kind: str = setting("infonce", "contrastive loss", "paper", choices=CONTRASTIVE_LOSSES)
    contrastive_scope: str = setting("group", "where positives and negatives come from", "paper", choices=SCOPES)
    tau: float = setting(0.05, "temperature of the similarities", "paper", above=0)
    reward_floor: float = setting(-0.5, "least contrastive reward", "paper", high=0)
    reward_ceiling: float = setting(1.0, "largest contrastive reward", "ours; the paper's is never above 0", low=0)
    reward_from_chance: bool = setting(False, "reward weight * (chance - L), not weight * -L", "paper: off; ours: on")
    shuffle_contrast: bool = setting(
        False, "control: deal the contrastive rewards out anew among the anchors of each group", "ours"
    )
    center_hidden: bool = setting(False, "subtract the group's mean from the hidden states", "paper: off; ours: on")
    d_embed: int = setting(512, "embedding width E of the head", "paper", low=1, high=2**16)
    head_mlp: bool = setting(False, "MLP head in place of a linear one", "authors' code")
    head_lr: float = setting(1e-3, "head learning rate (AdamW)", "paper", low=0)
    head_weight_decay: float = setting(0.01, "head weight decay", "paper", low=0)
    head_steps: int = setting(
        1, "head updates per step; the reward is from before them; 0: a fixed head", "paper: 1; ours: 4", low=0
    )
    head_warmup_steps: int = setting(14, "first steps, in which only the head learns (weight > 0)", "paper", low=0)

    max_batch: int = setting(256, "rollouts under way at once; the others wait for a free row", "memory only", low=1)
    cuda_graphs: bool | None = setting(
        None, "replay decode steps as CUDA graphs on a GPU (if neither is given: where it works)", "speed only"
    )
    micro_batch_tokens: int = setting(16384, "tokens in a forward and backward pass", "memory only", low=1)
    recompute_activations: bool | None = setting(
        None,
        "keep only each layer's input for the backward pass; a third slower (if neither is given: where all "
        "activations would not fit, by train.py's memory plan)",
        "authors' code: on; memory only",
    )
    compute_dtype: str = setting(
        "auto",
        "dtype of matrix products (weights and optimiser stay float32); auto: bfloat16 where the device computes in it",
        "authors' code: bfloat16",
        choices=["auto", "float32", "bfloat16"],
    )
    seed: int = setting(0, "seed of every random draw", "", low=0)

    def __post_init__(self):
        check_types(self)
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            if value is None and f.default is None:
                continue
            expected = []
            if isinstance(value, float) and not math.isfinite(value):
                expected.append("a finite number")
            if about["low"] is not None and not value >= about["low"]:
                expected.append(f"at least {about['low']}")
            if about["high"] is not None and not value <= about["high"]:
                expected.append(f"at most {about['high']}")
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

    @property
    def divide_by_std(self) -> bool:
        """Are advantages divided by their group's std?"""
        return self.scale_by_std and self.policy_loss != "dr_grpo"

    def in_bfloat16(self, device: str) -> bool:
        """Are matrix products computed in bfloat16 on this kind of device?"""
        return {"auto": computes_in_bfloat16(device), "float32": False, "bfloat16": True}[self.compute_dtype]

    @classmethod
    def for_track(cls, track: str, *, paper: bool = False, **chosen) -> CLIPOConfig:
        """The settings of a track, with `chosen` on top. On the toy world, `paper` selects the paper's constants of
        the contrastive reward in place of INFORMATIVE; elsewhere they are the defaults anyway."""
        if track not in TRACKS:
            raise ValueError(f"track is {track!r}; expected one of: {', '.join(TRACKS)}")
        informative = INFORMATIVE if track == "toy" and not paper else {}
        return cls(**{**TRACKS[track], **informative, **chosen})


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
    """The settings of a track with the options given on top. Raises ValueError that begins with the option's name."""
    names = [f.name for f in fields(CLIPOConfig)]
    try:
        return CLIPOConfig.for_track(track, paper=paper, **{n: given[n] for n in names if n in given})
    except ValueError as reason:
        name, _, expected = str(reason).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {expected}") from reason


# ----------------------------------------------------------------------------------------------------
# The border: what `generate` is asked for
# ----------------------------------------------------------------------------------------------------


def check_generate_arguments(
    model, prompts, samples_per_prompt: int, max_new_tokens: int, eos_token_id: int | Sequence[int], temperature: float
) -> list[int]:
    """The ids that end a response, as a list. Raises ValueError with one line on the first argument out of range."""
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    empty = [p for p, ids in enumerate(prompts) if not len(ids)]
    longest = max(map(len, prompts), default=0)
    room = getattr(model.config, "max_position_embeddings", math.inf)
    for wrong, message in (
        (not len(prompts), "prompts is empty; expected at least one list of token ids"),
        (bool(empty), f"prompt {empty[0] if empty else ''} has no tokens; expected at least one"),
        (samples_per_prompt < 1, f"samples_per_prompt is {samples_per_prompt}; expected 1 or more"),
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; expected 1 or more"),
        (
            longest + max_new_tokens > room,
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but the model has "
            f"{room} positions; expected fewer tokens",
        ),
        (not stop, "eos_token_id is empty; expected the id (or ids) that ends a response"),
        (not 0 <= temperature < math.inf, f"temperature is {temperature}; expected 0 (greedy) or a positive number"),
    ):
        if wrong:
            raise ValueError(message)
    return stop


def check_attends_to_all(model) -> None:
    """Raise NotImplementedError if a layer looks at anything but all tokens before: a window, a softcap, no cache."""
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds != {"full_attention"} or getattr(config, "attn_logit_softcapping", None):
        raise NotImplementedError(
            f"{config.model_type}: clipo.py serves layers that attend to all tokens before, without window or softcap; "
            "use the engine (--engine fast)"
        )
