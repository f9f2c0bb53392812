"""The machine that is measured: its clock, its peak memory, its best rates; and sides that take turns on it."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from lab.provenance import commit, processor


@dataclass
class Machine:
    device: torch.device
    dtype: torch.dtype
    runs: int  # measured runs of each side; the table has their median
    quick: bool
    compile: bool = False  # on a CPU: are compiled decode steps measured too?
    until: float = math.inf  # no round of runs begins that would end after this, by time.perf_counter

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with suppress(OSError):  # a sandbox may forbid it; then it is the peak since the start
                Path("/proc/self/clear_refs").write_text("5")  # the kernel's own way to reset VmHWM

    def peak(self) -> float | None:
        """GB at most since `forget_peak`: allocated on the GPU, or resident in the whole process."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        if sys.platform != "linux":
            return None
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9

    def rates(self) -> tuple[float, float]:
        """What it reaches at its best: flops per second of a large matrix product, bytes per second of a large copy."""
        n, megabytes = (512, 64) if self.quick else (8192, 1024) if self.on_gpu else (2048, 256)
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=self.device)
        target = source.clone()
        product = min(self.seconds(lambda: a @ a) for _ in range(6))
        copied = min(self.seconds(lambda: target.copy_(source)) for _ in range(6))
        return 2 * n**3 / product, 2 * len(source) / copied  # a copy reads and writes

    def describe(self) -> dict:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else processor()
        return {
            "processor": name,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
        }


def compare(machine: Machine, sides: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of every run of each side. They take turns, so that a slow minute of the machine hits all of them."""
    times = {name: [] for name in sides}
    for run in range(-1, machine.runs):
        if run > 0 and time.perf_counter() + sum(took[-1] for took in times.values()) > machine.until:
            break
        for name, side in sides.items():
            seconds = machine.seconds(lambda side=side, run=run: side(run))
            if run >= 0:  # the first of each only warms up
                times[name].append(seconds)
    return times


def times_faster(ours: list[float], theirs: list[float]) -> str:
    """Median and range over runs of the ratio of two speeds, run by run."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
