"""How cost grows with the group, the response and the batch."""

from __future__ import annotations

import statistics
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clipo
from lab.bench.load import Load
from lab.bench.machine import Machine
from lab.bench.step import step_phases


def growth_table(machine: Machine) -> list[dict]:
    """Seconds per step as the group or the response grows, and of the contrast alone as the batch does."""
    groups = (4, 8) if machine.quick else (4, 8, 16, 32, 64)
    lengths = (16, 32) if machine.quick else (128, 256, 512, 1024, 2048)
    batches = (256, 512) if machine.quick else (256, 1024, 4096, 16_384)
    rows = []
    for load in [Load("1M", 4, G, lengths[0]) for G in groups] + [Load("1M", 4, 8, T) for T in lengths[1:]]:
        phases = step_phases(machine, load)
        rows.append(
            {
                "what": str(load),
                "rollout, s": f"{phases['rollout']:.2f}",
                "update, s": f"{phases['update']:.2f}",
                "contrast, ms": f"{1000 * phases['contrast']:.1f}",
            }
        )
    for B in batches:
        seconds, elements = contrast_cost(machine, B)
        rows.append(
            {
                "what": f"contrast of {B:,} rollouts in groups of 16",
                "contrast, ms": f"{1000 * seconds:.1f}",
                "largest tensor": f"{elements:,}",  # embeddings are B x 512; the whole batch's cosines would be B x B
            }
        )
    return rows


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that anything under it makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, given=(), named=None):
        made = function(*given, **(named or {}))
        tensors = [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return made


def contrast_cost(machine: Machine, B: int) -> tuple[float, int]:
    """Median seconds of head, loss and backward, and the elements of the largest tensor on the way."""
    hidden = torch.randn(B // 16, 16, 896, device=machine.device)
    head = clipo.ContrastiveHead(896).to(machine.device)
    correct = (torch.arange(B, device=machine.device) % 2 == 0).view(-1, 16)

    def contrast() -> None:
        z = head(hidden)
        with largest:
            pairs = clipo.draw_pairs(correct)
            clipo.infonce(z, pairs)[pairs.anchor].mean().backward()

    largest = LargestTensor()
    contrast()
    found, largest = largest.elements, nullcontext()  # it is no part of what is timed
    return statistics.median(machine.seconds(contrast) for _ in range(max(3, machine.runs))), found
