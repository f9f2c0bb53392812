"""What keeps a run alive, around the parts of `clipo.CLIPO.step`: the step itself is the plain one.

    memory     when it runs out, less goes on at a time, and what that computes is the same
    numbers    one that is NaN or infinite reaches no weight; the step is skipped from there on
    precision  matrix products in bfloat16 over float32 weights, where the settings ask for it
    time       of each phase of a step

`Trainer` is what train.py trains with. With the plain parts it changes no bit; tests/engine holds it to that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import variants
from clipo import Agreement, Pairs, Rollouts, Scored
from config import ENGINES, CLIPOConfig
from engine import rollouts as fast_rollouts
from engine import update as fast_update
from engine.check import check_model
from engine.graphs import ran_out_of_memory


class BrokenNumbers(ArithmeticError):
    """A number of this `phase` of a step is NaN or infinite. No weight has seen it."""

    def __init__(self, phase: str):
        super().__init__(f"a number of the phase {phase!r} is NaN or infinite")
        self.phase = phase


def require_finite(phase: str, *values: Tensor) -> None:
    """Raise BrokenNumbers if one is NaN or infinite."""
    if not all(value.isfinite().all() for value in values):
        raise BrokenNumbers(phase)


class BrokenWeights(RuntimeError):
    """A weight is NaN or infinite after a step of finite numbers: nothing of it may be saved."""


class OutOfMemory(RuntimeError):
    """Even the least at a time does not fit in memory."""


@contextmanager
def all_at_once():
    """The plain parts take all at once: when memory runs out in here, nothing is left but to say so."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(
            "a step does not fit, and the plain engine takes all at once; --engine fast need not"
        ) from error


class Trainer(variants.DynamicSampling):
    """`clipo.CLIPO` for real runs, with the parts that the settings and `engine` ask for, each of them guarded.

    engine: "plain", the functions of clipo.py, or "fast", their twins in engine/. Raises ValueError or
    NotImplementedError for a policy that `generate` cannot serve.
    """

    def __init__(self, policy, tokenizer, are_correct: Callable, config: CLIPOConfig, engine: str = "fast"):
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; expected one of: {', '.join(ENGINES)}")
        check_model(policy, engine)
        super().__init__(policy, tokenizer, are_correct, config)
        parts = variants.parts(config, self.random)
        # What goes on at a time; halved when memory runs out. The plain parts have nothing to halve.
        self.sizes: dict[str, int] = {}
        self.kept: list[fast_rollouts.Workspace] | None = None  # what rollouts leave for the next ones
        if engine == "fast":
            gradient = partial(fast_update.policy_gradient, form=variants.policy_loss(config))
            generate = partial(
                fast_rollouts.generate,
                cuda_graphs=config.cuda_graphs,
                compiled=config.compiles(policy.device.type),
            )
            parts = replace(parts, generate=generate, policy_gradient=gradient)
            self.sizes = {"max_batch": config.max_batch, "micro_batch_tokens": config.micro_batch_tokens}
            self.kept = [] if config.keep_captures else None
        self.unguarded = parts
        self.parts = replace(parts, generate=self.generate, loss=self.loss, policy_gradient=self.policy_gradient)
        if self.reference is not None and config.in_bfloat16(policy.device.type):  # nobody updates it
            for parameter in self.reference.parameters():  # a rotary embedding's frequencies stay float32
                parameter.data = parameter.data.bfloat16()
        if policy.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # see `our_attention`; the plain parts use the library's
            # The GPU's default makes another copy of all weights on the way.
            self.policy_optimizer = torch.optim.AdamW(
                policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
            )
        self.skipped: str | None = None  # the phase in which a number of the last step broke
        self.seconds: dict[str, float] = {}  # of each phase of the last step
        self.phase, self.since = "", time.perf_counter()

    def step(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence,
        fresh: Iterator[tuple[Sequence[int], object]] | None = None,
    ) -> Scored | None:
        """One training step on P prompts (lists of token ids) and their answers; None if a number broke.

        `fresh` gives further prompts with their answers where config.resample_tries asks for them. A step in which a
        number breaks is skipped from there on; `skipped` is then the phase. Raises ValueError if there is no `fresh`
        where one is needed, or not one answer to each prompt; OutOfMemory if even a single rollout does not fit.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; expected one answer to each prompt")
        if self.config.resample_tries and fresh is None:
            raise ValueError("resample_tries is set but `fresh` is None; expected an iterator of (prompt, answer)")
        self.fresh, self.skipped = fresh, None
        self.seconds, self.phase, self.since = {}, "", time.perf_counter()
        try:
            scored = super().step(prompts, answers)
        except BrokenNumbers as broken:
            self.skipped = broken.phase
            self.steps_done += 1
            for optimizer in (self.policy_optimizer, self.head_optimizer):
                optimizer.zero_grad(set_to_none=True)
            return None
        self.lap("update")
        return scored

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this phase. A GPU is waited for, or its work would count later."""
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    # ------------------------------------------------------------------------------------------------
    # The parts, guarded
    # ------------------------------------------------------------------------------------------------

    def generate(self, policy, prompts, *, max_new_tokens: int, generator: torch.Generator, **chosen) -> Rollouts:
        """Rollouts in bfloat16 if asked for, in as large waves as fit, all finite."""
        resampled = self.phase == "rollout"  # what has passed were the verdicts on the rollouts before
        if resampled:
            self.lap("verify")
        state = generator.get_state()

        def attempt(tokens: int = max_new_tokens, **sizes) -> Rollouts:
            generator.set_state(state)
            kept = None if resampled else self.kept  # (fewer rollouts, which would take the place of all)
            chosen_now = {**chosen, **sizes, "max_new_tokens": tokens, "generator": generator, "kept": kept}
            with self.mixed_precision():
                return self.unguarded.generate(policy, prompts, **chosen_now)

        def one_of(tokens: int) -> Rollouts:
            return attempt(tokens, max_batch=1)

        if self.sizes:
            rollouts = self.in_memory("max_batch", attempt, 1, one_of)
        else:
            with all_at_once(), self.mixed_precision():
                chosen |= {"max_new_tokens": max_new_tokens, "generator": generator}
                rollouts = self.unguarded.generate(policy, prompts, **chosen)
        require_finite("rollout", rollouts.logprobs, rollouts.hidden)
        self.lap("rollout")
        return rollouts

    def contrastive_step(self, hidden: Tensor, correct: Tensor) -> Agreement:
        """The plain one, timed."""
        self.lap("verify")
        agreement = super().contrastive_step(hidden, correct)
        self.lap("contrast")
        return agreement

    def loss(self, z: Tensor, pairs: Pairs, tau: float) -> Tensor:
        """A finite one."""
        loss = self.unguarded.loss(z, pairs, tau)
        require_finite("contrast", loss)
        return loss

    def policy_gradient(self, policy, reference, prompts, rollouts: Rollouts, advantages: Tensor, config) -> dict:
        """The gradient, in bfloat16 products if asked for, in as large micro-batches as fit, of a finite loss."""
        longest = rollouts.mask.sum(-1).flatten()

        def attempt(prompts=prompts, rollouts=rollouts, advantages=advantages, **sizes) -> dict:
            self.policy_optimizer.zero_grad(set_to_none=True)
            with self.mixed_precision():
                return self.unguarded.policy_gradient(policy, reference, prompts, rollouts, advantages, config, **sizes)

        def one_of(tokens: int) -> dict:
            p, g = divmod(int(longest.argmax()), advantages.shape[1])
            cut = (part[p : p + 1, g : g + 1, :tokens] for part in rollouts)  # of h, (1, 1, D), nobody asks
            one = prompts[p : p + 1], Rollouts(*cut), advantages[p : p + 1, g : g + 1]
            return attempt(*one, micro_batch_tokens=tokens)

        if self.sizes:
            stats = self.in_memory("micro_batch_tokens", attempt, int(longest.max()), one_of)
        else:
            with all_at_once():
                stats = attempt()
        require_finite("update", *(torch.tensor(value) for value in stats.values() if value is not None))
        return stats

    def descend(self, optimizer: torch.optim.Optimizer) -> float:
        """An optimiser step, or BrokenNumbers where the gradient is no number: before any weight has seen it.

        The bounds in config.py leave AdamW no way from finite numbers to a broken weight, so no copy is kept to undo a
        step with. A look at the weights afterwards costs a read of them, and holds for what the bounds do not know: an
        optimiser of somebody's own, a defect of the hardware. BrokenWeights ends the run before it saves.
        """
        phase = "update" if optimizer is self.policy_optimizer else "contrast"
        try:
            norm = super().descend(optimizer)
        except RuntimeError as reason:
            if "non-finite" not in str(reason):
                raise
            raise BrokenNumbers(phase) from reason
        finite = [p.isfinite().all() for group in optimizer.param_groups for p in group["params"]]
        if not torch.stack(finite).all():  # a GPU is waited for once
            raise BrokenWeights(f"a weight became NaN or infinite in step {self.steps_done + 1} ({phase})")
        self.lap(phase)
        return norm

    def mixed_precision(self):
        """bfloat16 matrix products over float32 weights: in bfloat16 weights, an update of 1e-6 would round away.

        The context copies each matrix to bfloat16 once and holds the copy as long as it lasts, so each rollout phase
        and each mini-batch opens its own: an optimiser step inside would go unseen.
        """
        device = self.policy.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.in_bfloat16(device))

    def in_memory(self, size: str, attempt: Callable[..., Any], least: int, one_of: Callable[[int], Any]):
        """attempt(size=n) with n = self.sizes[size], which is halved for good, down to `least`, while memory runs out.

        Less at a time takes longer and computes the same. What rollouts left for the next ones goes first. Raises
        OutOfMemory if `least` does not fit either; it says for how many tokens a single rollout would, which
        `one_of(tokens)` tries.
        """
        most, had = self.config.max_new_tokens, bool(self.kept)
        while (result := self.unless_memory_runs_out(lambda: attempt(**{size: self.sizes[size]}))) is None:
            if had:
                had = False
                continue
            if self.sizes[size] <= least:
                tokens = most // 2
                while tokens and self.unless_memory_runs_out(lambda: (one_of(tokens),)) is None:  # noqa: B023
                    tokens //= 2
                fits = f"one of up to {tokens} would" if tokens else "nor does one of a single token"
                raise OutOfMemory(f"a rollout of up to {most} tokens does not fit, {fits}")
            self.sizes[size] = max(self.sizes[size] // 2, least)
        return result

    def unless_memory_runs_out(self, attempt: Callable[[], Any]):
        """Its result, or None: what it had allocated is free again."""
        try:
            return attempt()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        self.kept = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        return None
