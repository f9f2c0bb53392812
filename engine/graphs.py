"""Decode steps as CUDA graphs: how `engine.rollouts.generate` runs them on a GPU. There is no plain twin of it.

It saves Python and launches: a decode step is hundreds of small kernels, each shorter than its launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from border import in_short


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Did memory run out, here or in an error that led here?

    torch has a class for it on a GPU only, and cuBLAS, cuDNN and graphs do not raise that class. A capture that ends
    for lack of memory reports only that it was ended; the reason stands in the error before it.
    """
    if error is None:
        return False
    words = "can't allocate memory", "out of memory", "ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words):
        return True
    return ran_out_of_memory(error.__cause__ or error.__context__)


class CaptureFailed(RuntimeError):
    """CUDA graphs were asked for by name, and a decode step cannot be captured."""


captures_failed: WeakKeyDictionary = WeakKeyDictionary()  # model -> why its decode steps cannot be captured


class CapturedSteps:
    """Runs `step(rows, used)` on a GPU as one CUDA graph per (rows, used): no Python and no launches per kernel.

    A decode step is about 30 kernels a layer, each shorter than its launch; a graph launches all of them at once. The
    very first step runs plainly (it loads kernels and fills autocast's cache). After it, each kind is captured when it
    comes up, which takes no longer than to run it plainly, and from then on it is replayed. All that a step reads and
    writes must stay where it is: `engine.rollouts.Workspace`. A capture that fails is said once, and this model's steps
    run plainly from then on; if graphs are `demanded`, it raises CaptureFailed.
    """

    def __init__(self, model, demanded: bool):
        self.model, self.demanded = model, demanded
        self.begun = False
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one memory for the intermediates of all graphs

    def __call__(self, step: Callable[[int, int], None], rows: int, used: int) -> None:
        """Run it; always the same step."""
        kind = rows, used
        if self.begun and kind not in self.graphs and self.model not in captures_failed:
            self.capture(step, kind)
        self.begun = True
        if kind in self.graphs:
            self.graphs[kind].replay()
        else:
            step(rows, used)

    def capture(self, step: Callable[[int, int], None], kind: tuple[int, int]) -> None:
        """Record a step without running it. Memory that runs out is for the caller to answer."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step(*kind)
        except RuntimeError as reason:
            if ran_out_of_memory(reason):
                raise
            why = f"a decode step cannot be captured as a CUDA graph ({in_short(reason)})"
            if self.demanded:
                raise CaptureFailed(f"{why}; expected cuda_graphs=False, or None: where it works") from reason
            captures_failed[self.model] = why
            warnings.warn(f"{why}; rollouts go on without, slower", stacklevel=2)
            return
        self.graphs[kind] = graph
