"""How much memory will a run take, and for what? A plan from the model's shape and the settings, before the first step.

    python -m engine.memory                                               the models and cards that the README names
    python -m engine.memory --model Qwen/Qwen2.5-0.5B-Instruct            with train.py's hyperparameters

`train.py` prints the plan of its run as it begins. A test holds it within 15% of what was measured, for models of two
sizes; `python -m lab.bench update` compares the two on any machine.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from border import OptionParser, UserError, in_short, status_of
from config import TRACKS, CLIPOConfig, add_options, config_from
from engine.compiled import why_not
from engine.forward import round_up
from engine.rollouts import pace_on
from engine.update import LOGITS_AT_ONCE


@dataclass
class Plan:
    """Bytes by what they are for. Rollouts and update take turns; what lasts is there all the time."""

    lasting: dict[str, float] = field(default_factory=dict)
    rollouts: dict[str, float] = field(default_factory=dict)
    update: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes at most at one time."""
        return sum(self.lasting.values()) + max(sum(self.rollouts.values()), sum(self.update.values()))

    def __str__(self):
        unit, name = (1e9, "GB") if self.peak >= 1e9 else (1e6, "MB")
        lines = [f"memory, planned: {self.peak / unit:.1f} {name} at most"]
        for title, parts in (("always", self.lasting), ("and rollouts", self.rollouts), ("or the update", self.update)):
            words = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items() if size)
            lines.append(f"  {title:13} {sum(parts.values()) / unit:6.1f}  = {words}")
        return "\n".join(lines)


class Shape:
    """What of a model decides its memory; in numbers, not bytes."""

    def __init__(self, model: nn.Module):
        config, heads = model.config, model.config.num_attention_heads
        self.width, self.words, self.layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
        self.feed_forward = getattr(config, "intermediate_size", None) or 4 * self.width
        head_width = getattr(config, "head_dim", None) or self.width // heads
        self.keys = head_width * (getattr(config, "num_key_value_heads", None) or heads)  # all key heads' width
        self.weights = sum(p.numel() for p in model.parameters())
        self.matrices = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))

    def cast(self, product: int) -> int:
        """Bytes of the matrices' copies that autocast makes, for as long as a phase lasts."""
        return 2 * self.matrices if product == 2 else 0


def memory_plan(model: nn.Module, config: CLIPOConfig, longest_prompt: int, bfloat16: bool) -> Plan:
    """The memory that training `model` with `config` takes, if all prompts and rollouts are as long as they may be.

    model: a causal LM of the Llama family (gated feed-forward; for others the activations are a guess). It may be on
    the device "meta", with a shape but no weights. bfloat16: are matrix products computed in it?
    """
    shape, product = Shape(model), 2 if bfloat16 else 4  # bytes of a number that a matrix product made
    head = shape.width * (config.d_embed + shape.width * config.head_mlp)
    lasting = {"weights": 4 * shape.weights, "optimiser": 8 * shape.weights + 12 * head}
    if config.beta > 0:
        lasting["reference"] = product * shape.weights
    count = config.prompts_per_step * config.samples_per_prompt * config.max_new_tokens
    lasting["last step's rollouts"] = 13 * count  # a token's id, log-prob and mask
    kept, rollouts = plan_rollouts(model, shape, config, longest_prompt, product)
    return Plan(lasting | kept, rollouts, plan_update(shape, config, longest_prompt, product))


def plan_rollouts(model, shape: Shape, config: CLIPOConfig, longest_prompt: int, product: int) -> tuple[dict, dict]:
    """What rollouts leave for the next ones, and what they need beside."""
    B, T = config.prompts_per_step * config.samples_per_prompt, config.max_new_tokens
    rows, slots, device = min(B, config.max_batch), longest_prompt + T, device_of(model)
    prompts = math.ceil(rows / config.samples_per_prompt) * longest_prompt  # tokens of a prefill
    compiles = config.compiles(device) and why_not(model) is None
    keeps = compiles and bool(config.keep_captures)
    cached = rows * (round_up(slots, pace_on(device).bucket) if keeps else slots)
    cache, of_prefill = (product * 2 * shape.layers * shape.keys * tokens for tokens in (cached, prompts))
    parts = {
        "copy for compiled steps": product * copied_numbers(model, product == 2) if compiles else 0,
        "cache": cache,
        "logits": rows * shape.words * (8 + product),  # and probabilities and their sums
    }
    copies = shape.cast(product)
    if compiles and product == 2:  # which compiled steps have themselves
        copies -= 2 * model.get_output_embeddings().weight.numel()
    filling = prompts * (8 * shape.width + 3 * product * shape.feed_forward)  # a layer's activations
    needed = {"bfloat16 copy": copies, "cache of a prefill": of_prefill}
    needed["rollouts"] = 17 * B * T  # with a random number for each token
    if keeps:
        return parts, needed | {"activations": filling}
    decoding = parts.pop("logits")  # comes after the prefill
    return {}, needed | parts | {"activations, logits": max(filling, decoding)}


def plan_update(shape: Shape, config: CLIPOConfig, longest_prompt: int, product: int) -> dict:
    """What a micro-batch holds where its backward pass needs most, and what goes with it."""
    B, T = config.prompts_per_step * config.samples_per_prompt, config.max_new_tokens
    # Rows of one of several micro-batches: each with a prompt of its own, or so many that they share 16 prompts.
    several = min(16, config.prompts_per_step)
    alone = min(several, config.micro_batch_tokens // (T + longest_prompt))
    R = min(B, max(1, alone, (config.micro_batch_tokens - several * longest_prompt) // T))
    n, p = R * T, min(R, several) * longest_prompt  # its tokens, those of its prompts
    keys = n + R * longest_prompt  # prompt and response, for every row
    D, layers = shape.width, shape.layers
    of_responses, of_prompts = (
        layer_activations(*part, D, shape.feed_forward, product) for part in ((n, keys), (p, p))
    )
    kept, kept_of_prompts = layers * of_responses, (layers - 1) * of_prompts  # of prompts nobody asks the last layer
    if config.recompute_activations:  # a layer's input; of prompts their keys and values too
        kept, kept_of_prompts = layers * 4 * D * n, ((layers - 1) * 4 * D + layers * (4 + product) * shape.keys) * p
    chunk = min(n, max(1, LOGITS_AT_ONCE // shape.words))
    # The backward pass begins with all activations and the logits. When it has come to the prompts, those of the
    # responses are gone, but their gradients of all matrices wait for the prompts' to be added.
    mask = product * keys * T
    begin = {
        "activations": kept + kept_of_prompts + 5 * 4 * D * n + mask,
        "logits": chunk * shape.words * (16 + product),
    }
    turn = {"activations": kept_of_prompts + of_responses + mask, "waiting gradients": product * shape.matrices}
    return {
        "gradients": 4 * shape.weights,
        "bfloat16 copy": shape.cast(product),
        **max(begin, turn, key=lambda parts: sum(parts.values())),
    }


def device_bytes(device: torch.device) -> float:
    """The memory of a GPU, or of this machine; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return math.inf


def fitting(model: nn.Module, config: CLIPOConfig, longest_prompt: int, bfloat16: bool, room: float) -> CLIPOConfig:
    """The settings with two of them decided, by what fits in `room` bytes.

    `recompute_activations`: only where all activations would not fit; then `keep_captures`: where what rollouts leave
    for the next ones fits too. (In nine tenths of the room: the plan is of tensors, and an allocator has gaps.)
    """

    def fits(**chosen) -> bool:
        return memory_plan(model, replace(config, **chosen), longest_prompt, bfloat16).peak <= 0.9 * room

    if config.recompute_activations is None:
        again = not fits(recompute_activations=False, keep_captures=False)
        config = replace(config, recompute_activations=again)
    if config.keep_captures is None:
        captures = device_of(model) == "cuda" and config.compiles("cuda") and config.cuda_graphs is not False
        config = replace(config, keep_captures=captures and fits(keep_captures=True))
    return config


def copied_numbers(model: nn.Module, bfloat16: bool) -> int:
    """How many weights compiled steps copy: all matrices in bfloat16; in float32 those that go into one."""
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for name, layer in layers if bfloat16 or name.endswith(joined))


def device_of(model: nn.Module) -> str:
    """Its kind; a GPU's where it has no weights: a card is asked about."""
    return model.device.type.replace("meta", "cuda")


def layer_activations(tokens: int, keys: int, D: int, FF: int, product: int) -> float:
    """Bytes that one layer keeps for the backward pass.

    For each token input and output of both norms in float32 (the output again for each product in bfloat16), queries,
    attended values, and four of the feed-forward's width; for each key itself and its value, repeated for every head.

    >>> layer_activations(tokens=1, keys=1, D=1, FF=0, product=4)  # 16 + 8 + 8, and 8
    40
    """
    inputs = 8 if product == 4 else 5 * 2
    return tokens * ((16 + inputs + 2 * product) * D + 4 * product * FF) + keys * 2 * product * D


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """How many bytes more than at its start are allocated at most while `work` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    now = most = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


# Qwen2.5's shapes (vocabulary, width, feed-forward, layers, heads, key/value heads), and the card for each.
MODELS = {
    "Qwen2.5-0.5B": ((151_936, 896, 4864, 24, 14, 2), 24),
    "Qwen2.5-1.5B": ((151_936, 1536, 8960, 28, 12, 2), 48),
    "Qwen2.5-3B": ((151_936, 2048, 11008, 36, 16, 2), 80),
}


def qwen_config(
    vocabulary: int, width: int, feed_forward: int, layers: int, heads: int, kv_heads: int, **more
) -> Qwen2Config:
    """The configuration of a model of this shape, with tied embeddings."""
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True, **more,
    )  # fmt: skip


def without_weights(shape) -> nn.Module:
    """The model of a configuration, on the device "meta"."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def of_name(name: str) -> nn.Module:
    """The model of a folder or hub name, without its weights. Raises UserError."""
    try:
        return without_weights(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError) as reason:
        raise UserError(
            f"model {name} could not be opened: {in_short(reason)} Expected a folder that save_pretrained "
            "wrote, or the name of a causal language model on the hub"
        ) from reason


def parser() -> argparse.ArgumentParser:
    p = OptionParser(
        prog="python -m engine.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--model", metavar="NAME_OR_FOLDER", help="causal LM on the hub or in a folder")
    p.add_argument("--track", choices=list(TRACKS), help="whose defaults (default: gsm8k)")
    add_options(p.add_argument_group("hyperparameters"))
    return p


def show(arguments: Sequence[str] | None) -> None:
    """Print the plan of the model that is named, or those of MODELS. Raises UserError."""
    given = {"max_new_tokens": 1024, **vars(parser().parse_args(arguments and list(map(str, arguments))))}
    try:
        config = config_from(given, given.get("track", "gsm8k"))
    except ValueError as reason:
        raise UserError(str(reason)) from reason
    if "model" in given:
        chosen = {given["model"]: (of_name(given["model"]), device_bytes(torch.device("cpu")))}
    else:
        chosen = {
            f"{name}, for a card of {card} GB": (without_weights(qwen_config(*shape)), card * 1e9)
            for name, (shape, card) in MODELS.items()
        }
    prompt, bfloat16 = config.max_prompt_tokens, config.compute_dtype != "float32"
    for name, (model, room) in chosen.items():
        decided = fitting(model, config, prompt, bfloat16, room)
        how = "computed again" if decided.recompute_activations else "kept"
        print(f"{name}; prompts of {prompt} tokens, responses of {config.max_new_tokens}, activations {how}")
        print(f"{memory_plan(model, decided, prompt, bfloat16)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    return status_of(lambda: show(arguments))


if __name__ == "__main__":
    sys.exit(main())
