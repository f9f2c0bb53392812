"""How long grading takes."""

from __future__ import annotations

import random
import statistics

from lab.bench.machine import Machine
from tasks import grading


def grading_table(machine: Machine) -> list[dict]:
    """Seconds to grade the rollouts of a large step: 16 to a question, of five different answers."""
    count = 160 if machine.quick else 8192
    draw = random.Random(0)
    kinds = {
        "numbers": lambda: str(draw.randrange(5)),
        "expressions": lambda: f"\\frac{{x+{draw.randrange(5)}}}{{2}}",
        "expressions, one rollout in 100 hostile": lambda: (
            "9^{9^{9^9}}" if draw.random() < 0.01 else f"\\frac{{x+{draw.randrange(5)}}}{{2}}"
        ),
    }
    rows = []
    for kind, answer in kinds.items():
        golds = [
            f"\\frac{{{i}+x}}{{2}}" if kind != "numbers" else str(i) for i in range(count // 16) for _ in range(16)
        ]
        texts = [f"\\boxed{{{answer()}}}" for _ in golds]
        seconds = statistics.median(
            machine.seconds(lambda texts=texts, golds=golds: grading.are_correct(texts, golds))
            for _ in range(machine.runs)
        )
        rows.append({"rollouts": f"{count:,}", "answers": kind, "s": f"{seconds:.2f}"})
    return rows
