"""The warm start: supervised training on demonstrations, before the first step of RL. Made once, kept for all runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from border import UserError
from clipo import end_of_sequence_ids, in_float32
from engine.forward import output_logits, pad_right
from engine.update import LOGITS_AT_ONCE, micro_batches, token_logprobs
from run import folder as run_folder
from run.models import load_model
from run.settings import Settings, checksums_now, checksums_of, refuse_changed
from run.stopping import StopAsked
from tasks.data import prompt_ids
from tasks.toy import SIZES, WORLD, Demonstrator, World, make_tokenizer

# ----------------------------------------------------------------------------------------------------
# The toy world's own model
# ----------------------------------------------------------------------------------------------------


def make_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of one of SIZES with random weights."""
    width, layers, heads, feed_forward = SIZES[size]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,  # transformers' 0.02 would learn far slower at this width
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def knows_the_stories(tokenizer) -> bool:
    """Is it of one of the toy world's own models? They have had their warm start."""
    return tokenizer is not None and tokenizer.get_vocab() == make_tokenizer().get_vocab()


# ----------------------------------------------------------------------------------------------------
# Muon: steps of orthogonal matrices (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024)
#
# After as many batches the toy world's model is further than AdamW's (docs/speed.md). torch.optim.Muon is the same in
# bfloat16, which is slow on most CPUs and rounds off a tiny model's steps; here it is float32, all matrices of a shape
# at a time.
# ----------------------------------------------------------------------------------------------------


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's polynomial: takes singular values in (0, 1] to about 0.7 to 1.2


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each matrix with all its singular values brought near 1: about U V^T of its U S V^T. (N, rows, cols), likewise.

    >>> m = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.2, 0.0]]])  # singular values 3 and 0.2
    >>> [round(s, 1) for s in torch.linalg.svdvals(orthogonal(m))[0].tolist()]
    [1.1, 0.7]
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller side first: its products are the cheap ones
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. lr is AdamW's: a step's mean square is brought to what AdamW's usually is (0.2 lr)."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                of_shape.setdefault(p.shape, []).append(p)
            for shape, alike in of_shape.items():
                for p in alike:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                means = [self.state[p]["momentum_buffer"] for p in alike]
                for p, mean in zip(alike, means, strict=True):
                    mean.lerp_(p.grad, 1 - group["momentum"])
                ahead = [p.grad.lerp(mean, group["momentum"]) for p, mean in zip(alike, means, strict=True)]  # Nesterov
                for p, direction in zip(alike, orthogonal(torch.stack(ahead)), strict=True):
                    p.add_(direction, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


# ----------------------------------------------------------------------------------------------------
# Supervised training
# ----------------------------------------------------------------------------------------------------


class WarmStart:
    """Supervised training on pairs of a `demonstrator`, in place: lr up over a tenth of the batches, then down to 0.

    Muon for the layers' matrices, AdamW for the rest; a pretrained model is moved gently, by AdamW alone. `state` and
    `go_on_from` let it stop and go on, to the same bits.
    """

    def __init__(
        self,
        model,
        tokenizer,
        demonstrator: Demonstrator,
        *,
        batches: int = 600,
        batch_size: int = 32,
        pretrained: bool = False,
    ):
        self.model, self.tokenizer, self.batches, self.batch_size = model.train(), tokenizer, batches, batch_size
        self.demonstrator, self.done, self.pretrained = demonstrator, 0, pretrained
        self.end = end_of_sequence_ids(model, tokenizer)[0]
        if pretrained:
            self.optimizers = {"adam": torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98))}
        else:
            matrices = [p for p in model.base_model.layers.parameters() if p.ndim == 2]
            others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
            self.optimizers = {
                "muon": Muon(matrices, lr=5e-3),
                "adam": torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.98)),
            }

    def batch(self) -> float:
        """The next batch; its mean loss per token of the responses. The questions are not learnt."""
        tokenizer, device = self.tokenizer, self.model.device
        budget = 1024 if device.type == "cpu" else 2**20  # tokens at once: what a core's cache holds; on a GPU all
        demonstrations = [self.demonstrator.pair() for _ in range(self.batch_size)]
        questions = [prompt_ids(tokenizer, question, self.demonstrator.suffix) for question, _ in demonstrations]
        responses = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in demonstrations]
        sequences = [[*q, *r, self.end] for q, r in zip(questions, responses, strict=True)]
        learnt = sum(map(len, sequences)) - sum(map(len, questions))
        total = 0.0
        for rows in micro_batches([len(s) for s in sequences], budget):
            tokens = pad_right([sequences[row] for row in rows], device)  # (rows, S)
            with self.mixed_precision():
                states = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            begins, ends = (
                torch.tensor([[len(of[row])] for row in rows], device=device) for of in (questions, sequences)
            )
            place = torch.arange(1, tokens.shape[1], device=device)
            of_response = (place >= begins) & (place < ends)  # (rows, S-1)
            loss = self.loss(states[of_response], tokens[:, 1:][of_response]) / learnt
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rise = max(1, self.batches // 10)
        share = min((self.done + 1) / rise, (self.batches - self.done) / max(1, self.batches - rise))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * share
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        return total

    def mixed_precision(self):
        """A pretrained model's products in bfloat16, on a GPU."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.pretrained and self.model.device.type == "cuda")

    def loss(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The sum of -log p of tokens (n,), each from its state (n, D); in pieces where the vocabulary is large."""
        with self.mixed_precision():
            if len(tokens) * self.model.get_output_embeddings().out_features > LOGITS_AT_ONCE:
                return -token_logprobs(self.model, states, tokens, temperature=1.0).sum()
            return F.cross_entropy(in_float32(output_logits(self.model, states)), tokens, reduction="sum")

    def state(self) -> dict[str, Tensor]:
        """All that the batches to come depend on."""
        weights = {f"weight/{name}": p.detach() for name, p in self.model.named_parameters()}
        moments = {
            f"{name}/{i}/{kind}": value
            for name, optimizer in self.optimizers.items()
            for i, of_one in optimizer.state_dict()["state"].items()
            for kind, value in of_one.items()
        }
        return {"done": torch.tensor(self.done), **weights, **moments}

    def go_on_from(self, state: dict[str, Tensor]) -> None:
        """Into a fresh warm start with the same demonstrator. Raises KeyError for the state of something else."""
        self.done = int(state["done"])
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state[f"weight/{name}"])
        moments: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.optimizers}
        for key, value in state.items():
            owner, _, rest = key.partition("/")
            if owner in moments:
                i, kind = rest.split("/")
                moments[owner].setdefault(int(i), {})[kind] = value
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments[name]})
        for _ in range(self.done * self.batch_size):  # demonstrations that were seen
            self.demonstrator.pair()


def warm_start(
    model,
    tokenizer,
    seed: int,
    *,
    world: World = WORLD,
    on_batch: Callable[[float], None] = lambda loss: None,
    **chosen,
) -> None:
    """A whole `WarmStart` on stories; the model is in evaluation mode afterwards."""
    training = WarmStart(model, tokenizer, Demonstrator(seed, world), **chosen)
    while training.done < training.batches:
        on_batch(training.batch())
    model.eval()


# ----------------------------------------------------------------------------------------------------
# Its folder
# ----------------------------------------------------------------------------------------------------


def open_start(settings: Settings, runs: Path, device: torch.device, resume: bool, stop: StopAsked):
    """Policy and tokenizer that a run begins with; on the toy world, warm-started. `settings.model` is then its folder.

    A model that knows the stories has had its warm start. Raises UserError if a run goes on and its start has changed.
    """
    threads = torch.get_num_threads()
    if resume:
        refuse_changed(settings)
        if device.type == "cpu" and settings.threads not in (None, threads):
            print(
                f"the run began on {settings.threads} threads and goes on on {threads}, which add in another order: to "
                f"the bits it would have had, OMP_NUM_THREADS={settings.threads}", file=sys.stderr,
            )  # fmt: skip
    policy, tokenizer = load_model(settings.model, device) if settings.model else (None, None)
    if settings.on_toy and not resume and not knows_the_stories(tokenizer):
        del policy  # another takes its place, and its memory
        start = runs, settings.size, settings.config.seed, settings.warm_start_batches, device
        world = World.changed(settings.world)
        settings.model = str(warm_started(*start, world=world, stop=stop, model=settings.model))
        policy, tokenizer = load_model(settings.model, device)
    if not resume:
        settings.checksums, settings.threads = checksums_now(settings), threads
    return policy, tokenizer


def warm_started(
    runs: Path,
    size: str,
    seed: int,
    batches: int,
    device: torch.device,
    world: World = WORLD,
    stop: StopAsked | None = None,
    model: str | None = None,
) -> Path:
    """The folder of a warm-started model, made on first use and kept for the next run: the toy world's own of a size,
    or a pretrained `model` that has now seen demonstrations.
    """
    changed = [  # how often the friend is right on a test does not show in demonstrations
        f"{f.name}={getattr(world, f.name)}"
        for f in dataclasses.fields(world)
        if f.name != "friend_right" and getattr(world, f.name) != getattr(WORLD, f.name)
    ]
    whose = name_of(model) if model else size
    folder = runs / "-".join([f"warm-start-{whose}-seed{seed}-{batches}", *changed])
    runs.mkdir(parents=True, exist_ok=True)
    with run_folder.only_one(Path(f"{folder}.lock"), wait=f"{folder} is being made by another process: waiting for it"):
        if not folder.is_dir():
            demonstrator = Demonstrator(seed, world)
            if model:
                opened = load_model(model, device)
                training = WarmStart(*opened, demonstrator, batches=batches, batch_size=8, pretrained=True)
            else:
                tokenizer = make_tokenizer()
                fresh = make_model(size, tokenizer, seed).to(device)
                training = WarmStart(fresh, tokenizer, demonstrator, batches=batches)
            make_warm_start(folder, training, stop)
    return folder.resolve()


def name_of(model: str) -> str:
    """Of a warm start's model: two folders of one last name are two models, and so is one that was written anew."""
    if not Path(model).is_dir():
        return model.replace("/", "--")
    content = json.dumps(checksums_of(Path(model)))
    return f"{Path(model).name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


SECONDS_AT_RISK = 20  # of work, that a pulled plug may cost a warm start
SHARE_OF_SAVING = 1 / 20  # of its time at most goes into saving; where that asks for it, more is at risk


def make_warm_start(folder: Path, training: WarmStart, stop: StopAsked | None) -> None:
    """Train it, or go on where that was stopped. Raises KeyboardInterrupt, saved, if `stop` was asked."""
    model, batches, device = training.model, training.batches, training.model.device
    part = Path(f"{folder}.part.safetensors")
    try:
        if run_folder.plain(part).exists():
            training.go_on_from(load_file(part, device=str(device)))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as reason:
        raise UserError(f"{part} cannot be used ({reason}); delete it, and the warm start begins anew") from reason
    parameters, saved, took = sum(p.numel() for p in model.parameters()), time.monotonic(), 0.0
    title = f"warm start ({parameters / 1e6:.2f}M parameters)"
    at_work = stop.finishing("batch") if stop else nullcontext()
    with tqdm(total=batches, initial=training.done, desc=title) as bar, at_work:
        while training.done < batches:
            bar.set_postfix(loss=f"{training.batch():.2f}", refresh=False)
            bar.update()
            asked = stop is not None and stop.asked
            if asked or time.monotonic() - saved > max(SECONDS_AT_RISK, took / SHARE_OF_SAVING):
                begin = time.monotonic()
                run_folder.write_tensors(part, training.state())
                saved = time.monotonic()
                took = saved - begin
            if asked:
                raise KeyboardInterrupt(
                    f"stopped in the warm start, after batch {training.done} of {batches}; it is kept, and the same "
                    "command goes on"
                )
    aside = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    try:
        run_folder.save_model(model.eval(), training.tokenizer, aside)
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    part.unlink(missing_ok=True)
