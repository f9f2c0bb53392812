"""The table at the end of a toy run: answers on stories of every level, and two sentences on what to see in it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from clipo import end_of_sequence_ids
from engine.guard import Trainer
from engine.rollouts import generate
from run import folder
from run.intervals import wilson
from run.models import load_model
from tasks.data import prompt_ids
from tasks.grading import are_correct
from tasks.toy import LEVELS, WORLD, World, is_sound, longest_response, stories_to_test

Levels = dict[str, dict[str, tuple[int, int]]]  # {level: {metric: (successes, trials)}}


def measure_levels(
    model,
    tokenizer,
    *,
    count: int = 300,
    temperature: float = 0.0,
    world: World = WORLD,
    seed: int = 0,
    cuda_graphs: bool | None = None,
    levels: Sequence[str] = tuple(LEVELS),
) -> Levels:
    """Answers on `count` fixed stories of each level: {level: {metric: (successes, trials)}}.

    Metrics: "answer" right; "process" right, which is `is_sound`; "lucky", the right answers whose process is not, out
    of all right ones.
    """
    generator = torch.Generator().manual_seed(seed)
    results = {}
    for name in levels:
        test = stories_to_test(name, count, world, seed)
        rollouts = generate(
            model,
            [prompt_ids(tokenizer, story.question, suffix="") for story in test],
            samples_per_prompt=1,
            max_new_tokens=max(48, longest_response(tokenizer, test) + 16),  # some tokenizers split numbers
            eos_token_id=end_of_sequence_ids(model, tokenizer),
            temperature=temperature,
            generator=generator,
            cuda_graphs=cuda_graphs,
        )
        texts = tokenizer.batch_decode(rollouts.tokens[:, 0].cpu(), skip_special_tokens=True)
        right = are_correct(texts, [story.answer for story in test])
        sound = [is_sound(story, text) for text, story in zip(texts, test, strict=True)]
        lucky = sum(r and not s for r, s in zip(right, sound, strict=True))
        results[name] = {"answer": (sum(right), count), "process": (sum(sound), count), "lucky": (lucky, sum(right))}
    return results


def write_table(models: dict, trainer: Trainer, out: Path, count: int, world: World) -> None:
    """Print the table of the models by name ("start" is the first), and what to see in it; keep it, evaluation.json."""
    columns = {
        name: measure_levels(model, trainer.tokenizer, count=count, world=world, cuda_graphs=trainer.config.cuda_graphs)
        for name, model in models.items()
    }
    folder.write_text(out / "evaluation.json", json.dumps(columns, indent=1))
    print(f"\n{table_of_levels(columns, count)}\n")
    if "GRPO" in columns:
        print(*(textwrap.fill(sentence, 110) for sentence in what_to_see(*columns.values())), "", sep="\n")
    print("P0 is like the training stories; P1 and P2 are longer, and there the friend is right less and less.")
    print("process: every step is the story's and right, and so is the answer. lucky: a right answer without that.")


def open_models(start: str, trainer: Trainer, grpo: Path | None) -> dict:
    """The columns of the table: the start and the trained model; beside GRPO's run, all three."""
    device = trainer.policy.device
    models = {"start": load_model(start, device)[0]}
    if grpo:
        return models | {"GRPO": load_model(str(grpo), device)[0], "CLIPO": trainer.policy}
    return models | {"trained": trainer.policy}


def table_of_levels(columns: dict[str, Levels], count: int) -> str:
    """Each model's shares on `count` stories of every level, in percent with 95% intervals."""
    lines = [f"{f'greedy, {count} stories a level':32}" + "".join(f"{name:>18}" for name in columns)]
    titles = {"answer": "answer right", "process": "process right", "lucky": "lucky (of the right)"}
    for level in next(iter(columns.values())):
        for metric, title in titles.items():
            cells = "".join(f"{percent(*measured[level][metric]):>18}" for measured in columns.values())
            lines.append(f"{level if metric == 'answer' else '':6}{title:26}{cells}")
    return "\n".join(lines)


def percent(successes: int, trials: int) -> str:
    """A share and its 95% Wilson interval.

    >>> percent(8, 10)
    '80% [49, 94]'
    """
    if not trials:
        return "none"
    low, high = wilson(successes, trials)
    return f"{100 * successes / trials:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"


def share_of_level(measured: Levels, level: str, metric: str) -> float:
    successes, trials = measured[level][metric]
    return successes / trials if trials else 0.0


def what_to_see(start: Levels, grpo: Levels, ours: Levels) -> tuple[str, str]:
    """Two sentences on a table of both: what became of GRPO, and what of CLIPO. They say it, too, if neither is usual.

    On P2 the friend is mostly wrong: who copies is wrong there, however right on P0, where stories are as in training.
    """
    p2 = [f"{100 * share_of_level(measured, 'P2', 'answer'):.0f}%" for measured in (start, grpo, ours)]
    fell = f"on long stories (P2), where the friend is mostly wrong, it went from {p2[0]} to {p2[1]} right answers"
    lucky = f"{100 * share_of_level(grpo, 'P0', 'lucky'):.0f}% of its right answers to short ones (P0) are lucky"
    if copied := share_of_level(grpo, "P2", "process") < share_of_level(start, "P2", "process") / 2:
        first = f"GRPO learnt to copy the friend: {fell}; {lucky}."
    elif is_behind(grpo, start):
        first = f"GRPO began to copy the friend, but is not done with it: {fell}; {lucky}."
    else:
        first = f"From this start GRPO did not learn to copy (P2: from {p2[0]} to {p2[1]}): there is nothing to rescue."
    if is_behind(grpo, ours) and share_of_level(ours, "P2", "process") > share_of_level(start, "P2", "process") / 2:
        less = "less than the start, but " if is_behind(ours, start) else ""
        second = (
            f"CLIPO, which also pays right answers for agreeing with each other, has {p2[2]} there: {less}it went on "
            "calculating, and nobody told it which steps were sound."
        )
    elif copied or is_behind(grpo, start):
        second = (
            f"CLIPO did not prevent it here ({p2[2]}): it pays what most right answers share, and among this start's "
            "sampled ones the copied may be as many as the sound."
        )
    else:
        second = f"CLIPO has {p2[2]}."
    return first, second


def is_behind(one: Levels, other: Levels) -> bool:
    """Is its share of right answers on P2 lower, so that the intervals do not meet?"""
    return wilson(*one["P2"]["answer"])[1] < wilson(*other["P2"]["answer"])[0]
