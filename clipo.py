"""CLIPO: Contrastive Learning in Policy Optimization (arXiv:2603.10101). The whole method, to read beside the paper.

GRPO asks of a rollout only whether its final answer is right. CLIPO also asks whether it *agrees with the other right
answers to the same question*: sound solutions share structure, errors scatter. One step is

    rollouts -> verifiable reward -> contrastive head -> contrastive reward -> advantages -> policy update

and the sections below stand in that order. The last ends in `CLIPO.step`, which reads like the paper's algorithm.

Everything here is plain and exact, and complete: to understand this file you need no other. config.py has the values of
all settings, variants.py the other losses and the controls. engine/ has a fast twin of these lines, which tests hold
equal to them, and what keeps a long run alive.

Shapes have these letters. Rollouts come as rectangles, G for each of P prompts:
    P prompts   G rollouts per prompt   B = P*G rollouts   T response tokens   Q tokens in a forward pass
    V vocabulary   D model width   E embedding width   H key/value heads
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from border import check_attends_to_all, check_generate_arguments
from config import CLIPOConfig

# =====================================================================================================
# 1. Rollouts: read each prompt once (prefill), then decode G responses to it, one token at a time
#
#    y_t ~ pi( . | x, y_<t)       log pi(y_t | x, y_<t) and the model's hidden states are kept on the way:
#    h = mean of the last layer's states over all response tokens except the last      (trajectory embedding)
#
#    A state is the last layer's output after the final norm. The response's last token is never fed to the model, so it
#    has no state; of a response of one token, h is the state of the prompt's last token.
# =====================================================================================================


class Rollouts(NamedTuple):
    """G sampled responses to each of P prompts."""

    tokens: Tensor  # (P, G, T) long, right-padded with an end-of-sequence id
    mask: Tensor  # (P, G, T) bool, True up to and with the end-of-sequence token
    logprobs: Tensor  # (P, G, T) float32, under the policy that sampled them (the old policy); 0 where mask is False
    hidden: Tensor  # (P, G, D) float32, the trajectory embedding h

    def of(self, prompts: slice) -> Rollouts:
        """The rollouts of some of the prompts."""
        return Rollouts(*(values[prompts] for values in self))


class KVCache:
    """Keys and values of every layer, so that decoding a token computes that token only.

    A row's slot n holds its token at *position* n. Rows of different length therefore sit in one cache without padding
    between prompt and response, and the attention mask is one comparison: slot <= position.
    """

    def __init__(self, slots: int):
        self.slots = slots  # longest prompt + longest response
        self.layers: list[list[Tensor]] = []  # per layer keys and values, each (rows, H, slots, head width)
        self.positions: Tensor | None = None  # (rows, Q): where the next forward pass writes

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> list[Tensor]:
        """Called by each attention layer: store the new (rows, H, Q, head width), return all."""
        if layer == len(self.layers):
            self.layers.append([new.new_zeros(*new.shape[:2], self.slots, new.shape[3]) for new in (keys, values)])
        row = torch.arange(len(keys), device=keys.device)[:, None]
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            # Two indices with a slice between them: their axes (rows, Q) come first, then H, head width.
            store[row, :, self.positions] = new.transpose(1, 2).to(store.dtype)
        return self.layers[layer]

    def repeat(self, times: int) -> None:
        """Each row so many times: G rollouts go on from one prompt."""
        self.layers = [[store.repeat_interleave(times, 0) for store in layer] for layer in self.layers]


def last_states(model, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Run tokens (rows, Q) at positions (rows, Q) through the model: its last layer's states, (rows, Q, D)."""
    cache.positions = positions
    look = torch.arange(cache.slots, device=tokens.device) <= positions[:, :, None]  # (rows, Q, slots)
    output = model.base_model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=look[:, None],  # (rows, 1, Q, slots)
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def prefill(model, prompts: Sequence[Sequence[int]], cache: KVCache) -> None:
    """Each prompt through the model once, all but its last token: that one is fed by the first decode step."""
    longest = max(map(len, prompts)) - 1
    if longest:  # short prompts are padded on the right; nothing looks there before it is overwritten
        tokens = torch.tensor([[*ids[:-1], *[0] * (longest + 1 - len(ids))] for ids in prompts], device=model.device)
        last_states(model, tokens, torch.arange(longest, device=model.device).expand_as(tokens), cache)


def output_logits(model, states: Tensor) -> Tensor:
    """States (..., D) -> logits (..., V), through the model's own output layer."""
    return model.get_output_embeddings()(states)


def in_float32(logits: Tensor) -> Tensor:
    """In float32 at least: bfloat16 keeps three digits, too few for a log-prob."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF: the first token whose cumulated probability exceeds the uniform number.

    logits (B, V), uniform (B,) in [0, 1). Returns tokens (B,) and their log-probs (B,) under the temperature-scaled
    policy. temperature 0 takes the likeliest token (and its log-prob at temperature 1).

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [sample(logits, torch.tensor([u]), 1.0)[0].item() for u in (0.0, 0.49, 0.51, 0.79, 0.81)]
    [0, 0, 1, 1, 2]
    """
    probs = (in_float32(logits) / (temperature or 1.0)).softmax(-1)  # (B, V)
    cumulated = probs.cumsum(-1)
    token = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]  # (B, V) -> (B,)
    token = token.clamp(max=logits.shape[-1] - 1)  # where logits are NaN, no sum exceeds the number
    if temperature == 0:
        token = probs.argmax(-1)
    return token, probs.gather(-1, token[:, None])[:, 0].log()


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """Sample `samples_per_prompt` responses to each of P prompts (lists of token ids, any lengths).

    temperature 0 is greedy. `generator` is a CPU generator: each rollout gets its own row of random numbers, drawn
    before the first token. Raises ValueError for arguments out of range, NotImplementedError for a model with layers
    that do not attend to every token before, such as a sliding window.
    """
    stop = check_generate_arguments(model, prompts, samples_per_prompt, max_new_tokens, eos_token_id, temperature)
    check_attends_to_all(model)
    P, G, T, device = len(prompts), samples_per_prompt, max_new_tokens, model.device
    uniform = torch.rand(P * G, T, generator=generator).to(device)
    prefill(model, prompts, cache := KVCache(max(map(len, prompts)) + T))
    cache.repeat(G)

    token = torch.tensor([ids[-1] for ids in prompts], device=device).repeat_interleave(G)  # (P,) -> (B,)
    position = torch.tensor([len(ids) - 1 for ids in prompts], device=device).repeat_interleave(G)
    tokens = torch.full((P * G, T), stop[0], device=device)
    mask, logprobs = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.float32)
    hidden, ends = 0.0, torch.tensor(stop, device=device)  # hidden is (B, D) from the first step on
    working = torch.ones_like(token, dtype=torch.bool)  # (B,): has this response not ended yet?
    for t in range(T):
        state = last_states(model, token[:, None], position[:, None], cache)[:, 0]  # (B, 1, D) -> (B, D)
        token, logprob = sample(output_logits(model, state), uniform[:, t], temperature)
        tokens[:, t], mask[:, t] = token.where(working, stop[0]), working
        logprobs[:, t] = logprob.where(working, 0.0)
        # t = 0 feeds the prompt's last token. Its state counts for a response of one token only: (t > 1) drops it.
        hidden = torch.where(working[:, None], state.float() + hidden * (t > 1), hidden)
        working = working & ~torch.isin(token, ends)
        position = position + 1
        if not working.any():
            break
    hidden = hidden / (mask.sum(-1, keepdim=True) - 1).clamp(min=1)  # sum -> mean
    made = (tokens[:, : t + 1], mask[:, : t + 1], logprobs[:, : t + 1], hidden)  # (B, longest response), (B, D)
    return Rollouts(*(values.unflatten(0, (P, G)) for values in made))  # (B, ...) -> (P, G, ...)


def response_logprobs(
    model, prompts: Sequence[Sequence[int]], rollouts: Rollouts, *, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the response tokens by one forward pass per prompt, differentiable: (P, G, T), 0 where masked."""
    groups = []
    for prompt, tokens in zip(prompts, rollouts.tokens, strict=True):  # tokens (G, T)
        before = tokens.new_tensor(prompt).expand(len(tokens), -1)
        logits = model(input_ids=torch.cat([before, tokens], 1), use_cache=False).logits[:, len(prompt) - 1 : -1]
        logprobs = (in_float32(logits) / temperature).log_softmax(-1)  # (G, T, V): each place predicts the next token
        groups.append(logprobs.gather(-1, tokens[:, :, None])[:, :, 0])
    return torch.stack(groups).masked_fill(~rollouts.mask, 0)


# =====================================================================================================
# 2. The contrastive head:   z = normalise(W h)
# =====================================================================================================


class ContrastiveHead(nn.Module):
    """From h to a unit vector: one linear map, or with `mlp=True` Linear-ReLU-Linear of width D, all without bias.

    forward: (..., D) -> (..., E). (The paper's contrastive head; the MLP is an option of the authors' code.)
    """

    def __init__(self, d_model: int, d_embed: int = 512, mlp: bool = False):
        super().__init__()
        first = [nn.Linear(d_model, d_model, bias=False), nn.ReLU()] if mlp else []
        self.layers = nn.Sequential(*first, nn.Linear(d_model, d_embed, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.normalize(self.layers(hidden), dim=-1)


# =====================================================================================================
# 3. Contrast.  An anchor is a right rollout i whose group has another right one and a wrong one; a runs over its group.
#
#    L_i  = -s_ij + log sum_{a != i} exp(s_ia)        s_ia = z_i . z_a / tau,  j one other right rollout, drawn
#    rc_i = max(-lambda L_i, floor)                   for anchors; 0 for all others
#
#    This is InfoNCE. The paper's sum has a = i in it; the authors' code leaves it out, and so do we.
# =====================================================================================================


class Pairs(NamedTuple):
    """What rollout a is to rollout i of the same group: (P, G, G) bool, indexed [question, i, a].

    variants.pairs_in_scope reaches over all questions.
    """

    target: Tensor  # a is the j that was drawn for i
    positive: Tensor  # both are right, and a is not i
    negative: Tensor  # i is right, a is wrong

    @property
    def anchor(self) -> Tensor:
        """Who is an anchor: (P, G) bool."""
        return self.positive.any(-1) & self.negative.any(-1)


def draw_pairs(correct: Tensor, generator: torch.Generator | None = None) -> Pairs:
    """The pairs of each group. Each rollout with positives draws one of them, j, uniformly. correct: (P, G) bool.

    >>> pairs = draw_pairs(torch.tensor([[True, True, False]]))
    >>> pairs.anchor
    tensor([[ True,  True, False]])
    >>> pairs.target[0, 0], pairs.negative[0, 0]  # to the first rollout
    (tensor([False,  True, False]), tensor([False, False,  True]))
    """
    one, other = correct[:, :, None], correct[:, None, :]
    positive = one & other & ~torch.eye(correct.shape[1], dtype=torch.bool, device=correct.device)  # (P, G, G)
    return Pairs(draw_one(positive, generator), positive, negative=one & ~other)


def draw_one(allowed: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One allowed entry of each row, uniformly; none where none is allowed: (..., G) bool -> (..., G) bool."""
    noise = torch.rand(allowed.shape, generator=generator).to(allowed.device)
    drawn = noise.masked_fill(~allowed, -1).argmax(-1, keepdim=True)  # (..., G) -> (..., 1)
    return torch.zeros_like(allowed).scatter(-1, drawn, True) & allowed


def similarities(z: Tensor, tau: float) -> Tensor:
    """s_ia = z_i . z_a / tau: (P, G, E) -> (P, G, G)."""
    return z @ z.transpose(-1, -2) / tau


def log_sum(similarity: Tensor, allowed: Tensor) -> Tensor:
    """log sum of exp(s) over the allowed entries of each row: (P, G, G) -> (P, G).

    It needs no epsilon inside the log, which would bend small sums. A row with none allowed is never an anchor's. It
    sums over all instead, because the gradient of log 0 is NaN.

    >>> log_sum(torch.tensor([[[20.0, 1.0, 1.0, 0.0]]]), torch.tensor([[[False, True, True, True]]]))  # log(2e + 1)
    tensor([[1.8620]])
    """
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    return similarity.masked_fill(~allowed, -math.inf).logsumexp(-1)


def infonce(z: Tensor, pairs: Pairs, tau: float = 0.05) -> Tensor:
    """L (P, G) of every anchor, 0 for all others, from unit vectors z (P, G, E).

    Three orthogonal z, two of them of right answers: s is 0 between any two, so L = log 2, as if nothing were known.
    >>> infonce(torch.eye(3)[None], draw_pairs(torch.tensor([[True, True, False]])))
    tensor([[0.6931, 0.6931, 0.0000]])
    """
    s = similarities(z, tau)  # (P, G, E) -> (P, G, G)
    others = pairs.positive | pairs.negative  # of an anchor i: all a != i
    loss = log_sum(s, others) - (s * pairs.target).sum(-1)  # (P, G, G) -> (P, G)
    return torch.where(pairs.anchor, loss, 0.0)


def contrastive_reward(
    loss: Tensor, pairs: Pairs, *, weight: float = 0.2, floor: float = -0.5, chance: Tensor | float = 0.0
) -> Tensor:
    """rc_i = max(weight (chance - L_i), floor) for anchors, 0 for all others: (P, G) -> (P, G). The loss is detached.

    chance: the loss that is paid nothing. The paper's is 0, so that every anchor is paid less than nothing.

    >>> contrastive_reward(torch.tensor([[1.0, 4.0, 0.0]]), draw_pairs(torch.tensor([[True, True, False]])))
    tensor([[-0.2000, -0.5000,  0.0000]])
    """
    return torch.where(pairs.anchor, (weight * (chance - loss.detach())).clamp(min=floor), 0.0)


# =====================================================================================================
# 4. Group-relative advantage (GRPO, arXiv:2402.03300):   A_i = (R_i - mean R) / (std R + eps),   R = r + rc
# =====================================================================================================


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards (P, G) -> advantages (P, G), each against its own group; the std with Bessel's correction.

    `scale_by_std=False` gives Dr. GRPO's advantage (arXiv:2503.20783).

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.1547, -0.5773, -0.5773],
            [ 0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    centred = centred.masked_fill(equal, 0)  # the mean is rounded, and a std of nearly nothing would blow that up
    return centred / (rewards.std(-1, keepdim=True) + eps) if scale_by_std else centred


# =====================================================================================================
# 5. Policy update:   J = mean[ min(rho A, clip(rho, 1 - low, 1 + high) A) - beta k3 ],   rho = pi / pi_old
#
#    the mean over all response tokens of a mini-batch; k3 estimates the KL to the frozen start (the reference)
# =====================================================================================================


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float):
    """Two results for every token: min(rho A, clip(rho) A), 0 where masked; and did the clip remove its gradient?

    log_ratio = log rho (P, G, T), advantages (P, G, 1), mask (P, G, T); both results (P, G, T). (PPO, arXiv:1707.06347)

    A token became 1.5 times as likely; a good one counts as 1.2 at most, a bad one in full:
    >>> ratio, A, mask = torch.tensor([[[1.5], [1.5]]]), torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 2, 1)
    >>> clipped_surrogate(ratio.log(), A, mask, 0.2, 0.2)[0].flatten()
    tensor([ 1.2000, -1.5000])
    """
    ratio = log_ratio.exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(free, clipped) * mask, clipped < free


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's samples: exp(q - p) - (q - p) - 1 >= 0.

    logprobs p and ref_logprobs q, both (P, G, T), result (P, G, T). (Schulman's k3, as in GRPO.)

    >>> kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # 0.5 + log 2 - 1
    tensor([0.1931])
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def token_mean(mask: Tensor) -> Tensor:
    """How much each token counts in the mean over all response tokens: (P, G, T) bool -> (P, G, T), sum 1.

    >>> token_mean(torch.tensor([[[True, True], [True, False]]]))
    tensor([[[0.3333, 0.3333],
             [0.3333, 0.0000]]])
    """
    return mask / mask.sum()


class PolicyLoss(NamedTuple):
    """One way to clip and to average, with the clip range of its paper. variants.POLICY_LOSSES has the others."""

    surrogate: Callable[..., tuple[Tensor, Tensor]]
    mean: Callable[[Tensor], Tensor]
    low: float
    high: float


GRPO = PolicyLoss(clipped_surrogate, token_mean, 0.2, 0.2)


def policy_gradient(
    policy,
    reference,
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    advantages: Tensor,
    config: CLIPOConfig,
    form: PolicyLoss = GRPO,
) -> dict[str, float | None]:
    """Accumulate the gradient of -J in the parameters' `.grad`; no weight moves. advantages (P, G); reference or None.

    Group by group: gradients add up, and the activations of one group are held at a time.
    Returns "policy_loss" (-J), "kl", and "clip_fraction": the share of tokens whose gradient the clip removed.
    """
    low = form.low if config.clip_low is None else config.clip_low
    high = form.high if config.clip_high is None else config.clip_high
    mean = form.mean(rollouts.mask)  # (P, G, T), over which the surrogate is averaged
    per_token = token_mean(rollouts.mask)  # KL and clip fraction are means over tokens under every loss
    total = {"policy_loss": 0.0, "kl": None if reference is None else 0.0, "clip_fraction": 0.0}
    for p, prompt in enumerate(prompts):
        own = slice(p, p + 1)
        group, temperature = rollouts.of(own), config.temperature
        logprobs = response_logprobs(policy, [prompt], group, temperature=temperature)  # (1, G, T)
        log_ratio = logprobs - group.logprobs
        surrogate, cut = form.surrogate(log_ratio, advantages[own, :, None], group.mask, low, high)
        loss = -(surrogate * mean[own]).sum()
        total["clip_fraction"] += (cut * per_token[own]).sum().item()
        if reference is not None:
            with torch.no_grad():
                ref_logprobs = response_logprobs(reference, [prompt], group, temperature=temperature)
            kl = (kl_k3(logprobs, ref_logprobs) * per_token[own]).sum()
            total["kl"] += kl.item()
            loss = loss + config.beta * kl
        total["policy_loss"] += loss.item()
        loss.backward()
    return total


# =====================================================================================================
# 6. The step
# =====================================================================================================


@dataclass
class Parts:
    """The five functions that a step calls. Others with the same arguments plug in."""

    generate: Callable = generate
    pairs: Callable = draw_pairs
    loss: Callable = infonce
    reward: Callable = contrastive_reward
    policy_gradient: Callable = policy_gradient


class Agreement(NamedTuple):
    """What the contrastive half of a step found; all but the last is from before the head's first update."""

    embedding: Tensor  # (P, G, E) z
    pairs: Pairs
    loss: Tensor  # (P, G) L
    reward: Tensor  # (P, G) rc
    head_grad_norm: float | None


class Sampled(NamedTuple):
    """Rollouts and the verifiable reward."""

    prompts: list[Sequence[int]]  # P
    answers: list  # P, what `are_correct` grades the responses to each prompt by
    rollouts: Rollouts
    texts: list[list[str]]  # P lists of G responses
    correct: Tensor  # (P, G) bool, r: is the final answer right?


class Scored(NamedTuple):
    """All that one step found out: the fields of `Sampled`, then its own."""

    prompts: list[Sequence[int]]
    answers: list
    rollouts: Rollouts
    texts: list[list[str]]
    correct: Tensor
    agreement: Agreement
    reward: Tensor  # (P, G) R = r + rc
    advantage: Tensor  # (P, G) A
    updates: list[dict]  # of each mini-batch; none in a warm-up step


def end_of_sequence_ids(model, tokenizer) -> list[int]:
    """The token ids that end a response: the generation config's and the tokenizer's. ValueError if there is none."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    ids += [tokenizer.eos_token_id] * (tokenizer.eos_token_id not in (None, *ids))
    if not ids:
        raise ValueError("neither model nor tokenizer has an end-of-sequence token; set tokenizer.eos_token")
    return ids


ROLLOUT, PAIRS, CONTROL = range(3)  # what a step draws random numbers for; the last is variants.shuffled


class HeadTrainer:
    """The contrastive half of the trainer: the head, its optimiser, and what agreement is paid.

    d_model: width D of the hidden states. Every random draw of a step follows from (config.seed, steps_done); whoever
    takes the steps counts them.
    """

    def __init__(self, d_model: int, device: torch.device, config: CLIPOConfig, parts: Parts | None = None):
        self.config, self.steps_done, self.parts = config, 0, parts or Parts()
        with torch.random.fork_rng(devices=[]):  # the head's first weights disturb nobody's random numbers
            torch.manual_seed(config.seed)
            self.head = ContrastiveHead(d_model, config.d_embed, config.head_mlp).to(device)
        self.head_optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.head_lr, weight_decay=config.head_weight_decay
        )

    def random(self, purpose: int) -> torch.Generator:
        """This step's random numbers for one purpose, so that no purpose can disturb another's."""
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.steps_done) * 3 + purpose)

    def contrastive_step(self, hidden: Tensor, correct: Tensor) -> Agreement:
        """Embed h (P, G, D), pay agreement, then train the head. correct: (P, G) bool.

        Under plain GRPO, lambda = 0, agreement is paid nothing. The head learns all the same, to be looked at.
        """
        config, parts, random, grad_norm = self.config, self.parts, self.random(PAIRS), None
        hidden = hidden.detach()
        if config.center_hidden:  # ours: take away what the answers to one question share
            hidden = hidden - hidden.mean(1, keepdim=True)
        for update in range(max(1, config.head_steps)):  # the paper: 1. Of a fixed head, 0: one pass, for the reward
            z = self.head(hidden)  # (P, G, D) -> (P, G, E)
            pairs = parts.pairs(correct, random)  # with a new j every time
            loss = parts.loss(z, pairs, config.tau)  # (P, G)
            if update == 0:  # what is paid is from before the head's first update
                reward = parts.reward(loss, pairs, weight=config.weight, floor=config.reward_floor)
                found = z.detach(), pairs, loss.detach(), reward
            if not pairs.anchor.any() or config.head_steps == 0:
                break
            loss[pairs.anchor].mean().backward()
            grad_norm = self.descend(self.head_optimizer)
        return Agreement(*found, grad_norm)

    def descend(self, optimizer: torch.optim.Optimizer) -> float:
        """Clip the gradient, one optimiser step; the norm before the clip. RuntimeError if that is no finite number."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()


class CLIPO(HeadTrainer):
    """The trainer: policy, frozen reference, and the contrastive half; `step` is one training step.

    policy: a transformers causal LM; tokenizer: its tokenizer; are_correct(response texts, answers) -> list of bool."""

    def __init__(self, policy, tokenizer, are_correct: Callable[..., Sequence[bool]], config: CLIPOConfig, parts=None):
        super().__init__(policy.get_output_embeddings().in_features, policy.device, config, parts)
        self.policy = policy.eval()  # no dropout, so that old and new log-probs are of one policy
        self.tokenizer, self.are_correct = tokenizer, are_correct
        self.stop_ids = end_of_sequence_ids(policy, tokenizer)
        self.reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
        self.policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def step(self, prompts: Sequence[Sequence[int]], answers: Sequence) -> Scored:
        """One training step on P prompts (lists of token ids) and their answers."""
        sampled = self.roll_out(list(prompts), list(answers), self.random(ROLLOUT))  # y and h; r
        agreement = self.contrastive_step(sampled.rollouts.hidden, sampled.correct)  # z, L, rc; then the head learns
        reward = self.total_reward(sampled, agreement.reward)  # R = r + rc
        advantage = group_advantages(reward, scale_by_std=self.config.scale_by_std)  # A
        updates = [] if self.warming_up else self.update(sampled.prompts, sampled.rollouts, advantage)  # theta
        self.steps_done += 1
        return Scored(*sampled, agreement, reward, advantage, updates)

    @property
    def warming_up(self) -> bool:
        """True while only the head learns: the paper's reward of an untrained head is the floor for nearly all anchors.

        Plain GRPO does not wait.
        """
        return self.config.weight > 0 and self.steps_done < self.config.head_warmup_steps

    def roll_out(self, prompts: list, answers: list, random: torch.Generator) -> Sampled:
        """G rollouts of each prompt, and whether their final answers are right."""
        config = self.config
        G = config.samples_per_prompt
        rollouts = self.parts.generate(
            self.policy,
            prompts,
            samples_per_prompt=G,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self.stop_ids,
            temperature=config.temperature,
            generator=random,
        )
        rows = zip(rollouts.tokens.flatten(0, 1).cpu(), rollouts.mask.flatten(0, 1).cpu(), strict=True)
        texts = self.tokenizer.batch_decode([tokens[mask] for tokens, mask in rows], skip_special_tokens=True)
        verdicts = self.are_correct(texts, [answer for answer in answers for _ in range(G)])
        correct = torch.tensor(verdicts, dtype=torch.bool, device=rollouts.mask.device)
        groups = [texts[i : i + G] for i in range(0, len(texts), G)]
        return Sampled(prompts, answers, rollouts, groups, correct.view(-1, G))

    def total_reward(self, sampled: Sampled, contrastive: Tensor) -> Tensor:
        """R = r + rc, (P, G)."""
        return sampled.correct.float() + contrastive

    def update(self, prompts: list, rollouts: Rollouts, advantage: Tensor) -> list[dict]:
        """One optimiser step per mini-batch, near-equal parts of the prompts; from the second on, rho is not 1."""
        config = self.config
        done = self.steps_done - (config.head_warmup_steps if config.weight > 0 else 0)
        for group in self.policy_optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (done + 1) / max(1, config.lr_warmup_steps))
        updates = []
        for rows in torch.arange(len(prompts)).tensor_split(math.ceil(len(prompts) / config.mini_batch_prompts)):
            mine = slice(int(rows[0]), int(rows[-1]) + 1)
            stats = self.parts.policy_gradient(
                self.policy, self.reference, prompts[mine], rollouts.of(mine), advantage[mine], config
            )
            updates.append({**stats, "policy_grad_norm": self.descend(self.policy_optimizer)})
        return updates
