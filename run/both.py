"""The first command: GRPO, then CLIPO, from one warm start. What is done is not done again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from border import UserError
from run.settings import default_out, new_settings


def two_runs(given: dict) -> Iterator[dict]:
    """The options of the two runs, in turn; the second knows the folder of the first as "grpo". Raises UserError."""
    if wrong := sorted({"model", "data", "weight", "resume"} & set(given)):
        raise UserError(
            f"--both is given with --{wrong[0]}; expected --both without it: it trains the toy world's own model with "
            "and without the contrastive reward, and goes on by itself where it was stopped"
        )
    runs, grpo = Path(given.get("out", "runs")), None
    for weight in ({"weight": 0.0}, {}):
        part = {**given, **weight}
        out = runs / default_out(new_settings(part)).name
        yield part | {"out": str(out), "resume": (out / "settings.json").exists(), "grpo": grpo}
        grpo = out
