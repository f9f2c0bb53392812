"""Muon: steps of orthogonal matrices. The toy world's warm start learns with it; the method never does.

After as many batches its model is further than AdamW's (docs/speed.md). torch.optim.Muon is the same in
bfloat16, which is slow on most CPUs and rounds off a tiny model's steps; here it is float32, all matrices of a shape
at a time.

Source: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

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
