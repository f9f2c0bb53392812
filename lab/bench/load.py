"""What the tables work on: a load, and the model with random weights, prompts, trainer and rollouts that it names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import clipo
from config import CLIPOConfig
from engine.guard import Trainer
from engine.memory import MODELS, qwen_config
from lab.bench.machine import Machine

# name: vocabulary, width, feed-forward, layers, heads, key/value heads. The last three are Qwen2.5's.
SIZES = {
    "1M": (512, 128, 512, 4, 4, 2),
    "34M": (4096, 512, 1536, 10, 8, 2),
    **{name.removeprefix("Qwen2.5-"): shape for name, (shape, _) in MODELS.items()},
}


@dataclass(frozen=True)
class Load:
    """What one run of a table does: P prompts of 16 to 64 tokens, G rollouts each, of T tokens at most."""

    size: str
    P: int
    G: int
    T: int
    late: bool = False  # one token in T ends its response, not three

    def __str__(self):
        return f"{self.size}, {self.P} x {self.G} rollouts, up to {self.T} tokens{', late ends' * self.late}"


def make_model(size: str, machine: Machine, dtype: torch.dtype | None = None):
    config = qwen_config(*SIZES[size], eos_token_id=1, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or machine.dtype)
    return model.to(machine.device).eval()


def make_prompts(load: Load) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (load.P,), generator=g).tolist()
    return [torch.randint(2, SIZES[load.size][0], (n,), generator=g).tolist() for n in lengths]


def ending_ids(load: Load) -> list[int]:
    """So many ids end a response that its mean length is about T / 3, or 2 T / 3, under a nearly uniform policy."""
    return list(range(1, 1 + max(1, round((1 if load.late else 3) * SIZES[load.size][0] / load.T))))


def make_tokenizer(size: str) -> PreTrainedTokenizerFast:
    """Token i is the word "i"."""
    words = {"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, SIZES[size][0])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def even(texts: Sequence[str], _answers: object = None) -> list[bool]:
    """Verdicts that are mixed within groups: is the sum of a response's numbers even?"""
    return [sum(int(word) for word in text.split() if word.isdigit()) % 2 == 0 for text in texts]


def make_trainer(machine: Machine, load: Load, eos: list[int], **settings) -> Trainer:
    """GRPO + CLIPO at the paper's constants, beyond the warm-up, with float32 weights and activations kept."""
    config = CLIPOConfig(
        **{
            "prompts_per_step": load.P, "mini_batch_prompts": load.P, "samples_per_prompt": load.G,
            "max_new_tokens": load.T, "head_warmup_steps": 0, "beta": 0.0, "micro_batch_tokens": 4096,
            "recompute_activations": False,
            "compute_dtype": str(machine.dtype).removeprefix("torch."), **settings,
        }
    )  # fmt: skip
    model = make_model(load.size, machine, torch.float32)
    model.generation_config.eos_token_id = eos
    return Trainer(model, make_tokenizer(load.size), even, config)


def some_rollouts(machine: Machine, load: Load) -> clipo.Rollouts:
    """Random tokens; lengths spread evenly from T / 4 to T, in no order."""
    shape, on = (load.P, load.G, load.T), machine.device
    order = torch.randperm(load.P * load.G, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(load.T / 4, load.T, load.P * load.G).long()[order].view(load.P, load.G, 1).to(on)
    mask = torch.arange(load.T, device=on) < lengths
    tokens = torch.randint(2, SIZES[load.size][0], shape, device=on)
    logprobs = torch.zeros(shape, device=on).masked_fill(mask, -math.log(SIZES[load.size][0]))
    return clipo.Rollouts(tokens, mask, logprobs, torch.zeros(*shape[:2], SIZES[load.size][1], device=on))
