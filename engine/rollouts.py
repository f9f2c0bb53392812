"""The fast twin of `clipo.generate`: the same tokens, log-probs and h, from rollouts that run in waves.

What it saves beside what a forward pass does (engine/forward.py):
    Batch             rows of ended rollouts are dropped, waiting rollouts take free rows; the plain loop feeds every
                      row until the last has ended, and holds all rollouts at once
    CapturedSteps     on a GPU a decode step is one CUDA graph, not hundreds of launches (engine/graphs.py)
    CompiledSteps     that graph has half the kernels (engine/compiled.py)
    Workspace         what those graphs read and write; it may serve the next call, graphs and all
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from border import check_generate_arguments
from clipo import Rollouts, in_float32
from engine.check import check_model, may_compile
from engine.compiled import CompiledSteps
from engine.forward import (
    KVCache,
    decoded_states,
    output_logits,
    prefill,
    product_dtype,
    prompts_of,
    round_up,
    serving,
)
from engine.graphs import CapturedSteps

# ----------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the k likeliest (0: all), then all beyond the likeliest whose sum reaches p: (B, V) -> (B, V).

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]), top_k=0, top_p=0.6)
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if 0 < top_k < probs.shape[-1]:
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        likeliest, order = probs.sort(descending=True)
        before = likeliest.cumsum(-1) - likeliest  # the sum of all that is likelier
        likeliest = likeliest.masked_fill(before >= top_p * likeliest.sum(-1, keepdim=True), 0)
        probs = torch.zeros_like(probs).scatter(-1, order, likeliest)
    return probs


def first_above(probs: Tensor, share: Tensor) -> Tensor:
    """The first of each row's numbers with which their sum exceeds that share of the total: (B, V), (B,) -> (B,)."""
    sums = probs.cumsum(-1)
    threshold = share * sums[:, -1]  # below the total, as share < 1
    first = torch.searchsorted(sums, threshold[:, None], right=True)[:, 0]
    return first.clamp(max=probs.shape[-1] - 1)  # where the logits are NaN, so is the log-prob: no crash here


def by_blocks(probs: Tensor, share: Tensor, size: int = 128) -> Tensor:
    """`first_above` for many words on a GPU: the block in which it lies, then the word in it.

    A running sum over 151,936 words is a chain that a GPU does not like; the sums of their blocks are not one.

    >>> probs = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
    >>> [by_blocks(probs, torch.tensor([u]), size=2).item() for u in (0.0, 0.1, 0.3, 0.45, 0.7)]
    [0, 1, 2, 3, 4]
    """
    blocks = F.pad(probs, (0, -probs.shape[-1] % size)).unflatten(-1, (-1, size))  # (B, V / size, size)
    sums = blocks.sum(-1).cumsum(-1)
    threshold = share * sums[:, -1]
    block = torch.searchsorted(sums, threshold[:, None], right=True).clamp(max=blocks.shape[1] - 1)  # (B, 1)
    before = F.pad(sums, (1, 0)).gather(-1, block)[:, 0]
    own = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0].cumsum(-1)  # (B, size)
    # As a share of this block, and below one: the two sums round differently, and a word of no probability may follow.
    inside = ((threshold - before) / own[:, -1]).clamp(0, 1 - 2**-23)
    word = torch.searchsorted(own, (inside * own[:, -1])[:, None], right=True)
    return (block * size + word)[:, 0].clamp(max=probs.shape[-1] - 1)


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF: the first token whose cumulated probability exceeds the uniform number.

    logits (B, V), uniform (B,) in [0, 1). Returns tokens (B,) and their log-probs (B,) under the
    temperature-scaled policy, before top-k and top-p cut it. temperature 0 takes the arg max (log-probs at 1).

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [sample(logits, torch.tensor([u]), 1.0, 0, 1.0)[0].item() for u in (0.0, 0.49, 0.51, 0.79, 0.81)]
    [0, 0, 1, 1, 2]
    """
    logits = logits if temperature in (0, 1) else in_float32(logits) / temperature
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    if temperature == 0:
        chosen = probs.argmax(-1)
    else:
        draw = by_blocks if logits.device.type == "cuda" else first_above
        chosen = draw(truncate(probs, top_k, top_p), uniform)
    return chosen, probs.gather(-1, chosen[:, None])[:, 0].log()


# ----------------------------------------------------------------------------------------------------
# Waves
# ----------------------------------------------------------------------------------------------------


class Pace(NamedTuple):
    """When the decode loop stops to look, which costs time, and to drop what has ended, which saves some."""

    steps: int  # tokens per rollout between two looks at which of them ended
    bucket: int  # attention runs over the used slots, rounded up to a multiple of this
    while_waiting: float  # ended rows give way to waiting rollouts once at most this share of all rows still works
    in_the_tail: float  # when none waits, they are dropped once at most this share of all rows still works
    by_halves: bool = False  # keep a power of two of rows, so that few numbers of them come up
    least: int = 1  # keep so many rows, if there are


# On a CPU looking is free, and so is dropping, for few rows are moved; but rollouts that come in together share a
# prefill. On a GPU the host waits for every look, and every number of rows or of used slots is one more graph to
# capture; half or double its steps or bucket, or dropping at a quarter, change the time of 256 rollouts of a 0.5B model
# on an H100 by less than it varies from run to run.
PACE = {
    "cpu": Pace(steps=1, bucket=1, while_waiting=0.9, in_the_tail=1.0),
    "cuda": Pace(steps=16, bucket=256, while_waiting=0.9, in_the_tail=0.5, by_halves=True),
}


def pace_on(kind: str) -> Pace:
    """That of a kind of device; of others a GPU's."""
    return PACE.get(kind, PACE["cuda"])


@dataclass
class Written:
    """`clipo.Rollouts` in the making, one a row; the row after the last is the spare one, which nobody reads."""

    tokens: Tensor  # (B + 1, T)
    mask: Tensor  # (B + 1, T)
    logprobs: Tensor  # (B + 1, T)
    hidden: Tensor  # (B + 1, D), a sum

    @classmethod
    def room(cls, count: int, max_new_tokens: int, width: int, device: torch.device) -> Written:
        """For `count` responses and the spare one; to be cleared before use."""
        shape = count + 1, max_new_tokens
        return cls(
            tokens=torch.empty(shape, dtype=torch.long, device=device),
            mask=torch.empty(shape, dtype=torch.bool, device=device),
            logprobs=torch.empty(shape, device=device),
            hidden=torch.empty(count + 1, width, device=device),
        )

    def clear(self, pad: int) -> None:
        """All responses are empty."""
        self.tokens.fill_(pad)
        for values in (self.mask, self.logprobs, self.hidden):
            values.zero_()

    def write(self, rollout: Tensor, t: Tensor, token: Tensor, logprob: Tensor, state: Tensor) -> None:
        """Token t of some rollouts, drawn from `state` (rows, D); all else (rows,)."""
        self.tokens[rollout, t], self.logprobs[rollout, t] = token, logprob.float()
        self.mask[rollout, t] = torch.ones_like(t, dtype=torch.bool)  # True would be copied to a GPU, which waits
        # The state at t = 0 belongs to the prompt's last token: it only serves a response of one token.
        self.hidden[rollout] = state.float() + self.hidden[rollout] * (t > 1)[:, None]

    def rollouts(self, P: int) -> Rollouts:
        """Copies, without the spare one, in P groups, T the longest response."""
        longest = int(self.mask[:-1].sum(-1).max())
        hidden = self.hidden / (self.mask.sum(-1, keepdim=True) - 1).clamp(min=1)  # sum -> mean
        cut = self.tokens[:, :longest], self.mask[:, :longest], self.logprobs[:, :longest], hidden
        return Rollouts(*(values[:-1].unflatten(0, (P, -1)).clone() for values in cut))  # (B + 1, ...) -> (P, G, ...)


class Batch:
    """The rollouts under way, one per row of the KV cache.

    The row of an ended rollout goes on with a spare rollout that nobody reads, until so many have ended that dropping
    them pays for moving the others together. Then waiting rollouts, if there are any, take the free rows.
    """

    def __init__(self, count: int, max_rows: int, slots: int, max_new_tokens: int, pace: Pace, device: torch.device):
        self.spare, self.slots, self.max_new_tokens, self.pace = count, slots, max_new_tokens, pace
        self.cache = KVCache(max_rows, slots)
        self.table = torch.zeros(4, max_rows, dtype=torch.long, device=device)  # what each row does next, see `next`
        self.idle = self.table.new_tensor([[self.spare], [0], [0], [0]])

    def begin(self, prompts: Sequence[Sequence[int]], group: Tensor) -> None:
        """All `count` rollouts wait, (count,) long: which prompt each continues."""
        self.prompts, self.group, self.waiting = prompts, group, torch.arange(self.spare, device=group.device)
        self.rows = 0  # how many rows, from the first on, are in use
        self.used = 0  # no row in use has a token at this slot or beyond
        self.cache.clear()

    def next(self, rows: int) -> Tensor:
        """Rollout, t, token, position of the first rows, (4, rows): feeding `token` at `position` gives token t."""
        return self.table[:, :rows]

    def advance(self, token: Tensor, ended: Tensor) -> None:
        """Each of the first rows has got its token, (rows,), and goes on, or turns to the spare rollout if `ended`."""
        rollout, t, _, position = self.next(len(token))
        ended = ended | (t + 1 == self.max_new_tokens)
        self.table[:, : len(token)] = torch.where(ended, self.idle, torch.stack([rollout, t + 1, token, position + 1]))

    def refill(self, model) -> bool:
        """Drop ended rows where it pays and prefill for waiting rollouts. Is there anything left to decode?

        While it decodes, the host waits for the device here, in `reach`, and before a capture.
        """
        working = [row for row, rollout in enumerate(self.table[0, : self.rows].tolist()) if rollout != self.spare]
        share = self.pace.while_waiting if len(self.waiting) else self.pace.in_the_tail
        if len(working) > share * self.rows:
            return True
        self.keep(working)
        new, self.waiting = self.waiting.tensor_split([self.cache.rows - self.rows])
        if len(new):
            self.admit(new, model)
        if self.rows:
            rows = 2 ** math.ceil(math.log2(self.rows)) if self.pace.by_halves else self.rows
            self.add_idle(min(max(rows, self.pace.least), self.cache.rows))
        return self.rows > 0

    def keep(self, working: Sequence[int]) -> None:
        """Bring these N rows among the first N; the others are free.

        Only those that stand further back are moved, to places in front that have become free.
        """
        self.rows = len(working)
        if late := [row for row in working if row >= self.rows]:
            free = sorted({*range(self.rows)} - {*working})
            origin, target = (torch.tensor(rows, device=self.table.device) for rows in (late, free))
            self.cache.copy(self.cache, origin, target, slots=self.used)
            self.table[:, target] = self.table[:, origin]

    def admit(self, new: Tensor, model) -> None:
        """Rows for the waiting rollouts `new`, (N,) long: each of their prompts goes through the model once."""
        prompts, origin, token, length = prompts_of(self.group[new], self.prompts)
        filled = KVCache(len(prompts), max(map(len, prompts)))
        prefill(model, prompts, filled)
        free = slice(self.rows, self.rows + len(new))
        self.cache.copy(filled, origin, free, slots=filled.used)
        self.table[:, free] = torch.stack([new, 0 * new, token, length - 1])
        self.rows += len(new)

    def add_idle(self, rows: int) -> None:
        """Up to so many rows in all, which work for the spare rollout."""
        self.table[:, self.rows : rows] = self.idle
        self.rows = rows

    def reach(self) -> int:
        """How many slots are used until the next look, rounded up to full buckets: attention runs over no more."""
        furthest = int(self.next(self.rows)[3].max()) + self.pace.steps
        self.used = min(round_up(furthest, self.pace.bucket), self.slots)
        return self.used


def check_own_arguments(top_k: int, top_p: float, max_batch: int | None) -> None:
    """Raise ValueError with one line on the first argument out of range that `clipo.generate` does not have."""
    for wrong, message in (
        (top_k < 0, f"top_k is {top_k}; expected 0 (off) or more"),
        (not 0 < top_p <= 1, f"top_p is {top_p}; expected a number in (0, 1]"),
        (max_batch is not None and max_batch < 1, f"max_batch is {max_batch}; expected 1 or more, or None"),
    ):
        if wrong:
            raise ValueError(message)


class Chosen(NamedTuple):
    """What the steps of a rollout phase depend on, beside the model and the prompts."""

    count: int  # rollouts
    rows: int  # of them at a time, at most
    slots: int  # tokens of one, prompt included, at most
    max_new_tokens: int
    stop: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    cuda_graphs: bool | None
    compiled: bool
    dtype: torch.dtype  # of products
    inference: bool  # torch.inference_mode: its tensors are no others' to write to
    addresses: tuple[int, ...]  # of the model's tensors


class Workspace:
    """All that decode steps read and write. It stays where it is: a captured step knows addresses."""

    def __init__(self, model, chosen: Chosen):
        self.model, self.chosen, device = model, chosen, model.device
        self.pace = pace_on(device.type)
        if chosen.compiled:
            self.pace = self.pace._replace(least=2)  # one row would be compiled apart
        self.batch = Batch(chosen.count, chosen.rows, chosen.slots, chosen.max_new_tokens, self.pace, device)
        width = model.get_output_embeddings().in_features
        self.written = Written.room(chosen.count, chosen.max_new_tokens, width, device)
        self.uniform = torch.zeros(chosen.count + 1, chosen.max_new_tokens, device=device)
        self.stop = torch.tensor(chosen.stop, device=device)
        self.compiled = CompiledSteps(model, chosen.slots) if chosen.compiled else None
        captures = device.type == "cuda" and chosen.cuda_graphs is not False
        self.captured = CapturedSteps(model, demanded=bool(chosen.cuda_graphs)) if captures else None

    def step(self, rows: int, used: int) -> None:
        """One token for each of the first rows of the batch."""
        rollout, t, token, position = self.batch.next(rows)
        if self.compiled:
            state = self.compiled(token, position, self.batch.cache, used)  # (rows, D)
            logits = self.compiled.logits(state)
        else:
            state = decoded_states(self.model, token, position, self.batch.cache, used)
            logits = output_logits(self.model, state)
        how = self.chosen
        token, logprob = sample(logits, self.uniform[rollout, t], how.temperature, how.top_k, how.top_p)
        self.written.write(rollout, t, token, logprob, state)
        self.batch.advance(token, ended=(token[:, None] == self.stop).any(-1))

    def roll_out(self, prompts: Sequence[Sequence[int]], group: Tensor, uniform: Tensor) -> Rollouts:
        """One for each of group (count,) long; uniform (count, max_new_tokens)."""
        self.batch.begin(prompts, group)
        self.written.clear(pad=self.chosen.stop[0])
        self.uniform[:-1] = uniform
        while self.batch.refill(self.model):  # prefill
            used = self.batch.reach()
            for _ in range(min(self.pace.steps, self.chosen.max_new_tokens)):  # decode, sample, stop
                if self.captured:
                    self.captured(self.step, self.batch.rows, used)
                else:
                    self.step(self.batch.rows, used)
        return self.written.rollouts(len(prompts))


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    max_batch: int | None = None,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    kept: list[Workspace] | None = None,
) -> Rollouts:
    """What `clipo.generate` returns, sooner. What is not said there:

    At most `max_batch` rollouts are under way at a time (None: all); when some end, waiting ones take their rows. A
    rollout has its own row of random numbers, so others cannot change it. top_k, top_p: see `truncate`.
    cuda_graphs: see `CapturedSteps` (GPUs only; None: where they work, True: or CaptureFailed).
    compiled: decode steps by `CompiledSteps`, where this model's can be; if not, that is said once.
    kept: an empty list, the same in every call: what compiled steps read and write, and their graphs, wait in it for
    the next call. (Other steps read copies of weights that autocast frees.)

    Raises ValueError for arguments out of range, ValueError or NotImplementedError for a model that cannot be served.
    """
    stop = check_generate_arguments(model, prompts, samples_per_prompt, max_new_tokens, eos_token_id, temperature)
    check_own_arguments(top_k, top_p, max_batch)
    check_model(model)
    compiled = compiled and may_compile(model)
    group = torch.arange(len(prompts), device=model.device).repeat_interleave(samples_per_prompt)  # (B,)
    count, longest, keeps = len(group), max(map(len, prompts)) + max_new_tokens, compiled and kept is not None
    bucket = pace_on(model.device.type).bucket
    # On a GPU in 16s, see attention_mask; kept, in buckets, so that it is seldom another.
    slots, rows = round_up(longest, bucket if keeps else min(bucket, 16)), min(count, max_batch or count)
    dtype = product_dtype(model.get_input_embeddings().weight)
    addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    how = temperature, top_k, top_p, cuda_graphs, compiled, dtype, torch.is_inference_mode_enabled(), addresses
    chosen = Chosen(count, rows, slots, max_new_tokens, tuple(stop), *how)
    uniform = torch.rand(count, max_new_tokens, generator=generator).to(model.device)
    workspace = kept.pop() if kept else None
    if workspace is None or workspace.model is not model or workspace.chosen != chosen:
        workspace = None  # its memory is free before the next one's is taken
        workspace = Workspace(model, chosen)
    else:  # only compiled steps are kept
        workspace.compiled.refresh(model)
    with serving(model):
        rollouts = workspace.roll_out(prompts, group, uniform)
    if keeps:
        kept.append(workspace)
    return rollouts
