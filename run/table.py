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
from tasks.toy import LEVELS, TRAINING_LEVEL, WORLD, World, is_patched, is_sound, longest_response, stories_to_test

Levels = dict[str, dict[str, tuple[int, int]]]  # {level: {metric: (successes, trials)}}
ROWS = {  # of the table: level -> its title, and what it says
    "P0": ("P0", "stories as in training. The friend is right {friend} here, so that copying her pays."),
    "liar": (
        "P0, friend wrong",
        "the same stories, and the friend is wrong in each: only a model that calculates can be right.",
    ),
    "sampled": ("P0, sampled", "answers drawn at random, as in training; all other rows are greedy."),
    "P2": ("P2, longer", "4 or 5 clauses in place of 2 or 3; here the friend is mostly wrong."),
}
METRICS = {"answer": "answer right", "process": "and every step"}


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
    of all right ones; "patched", which is `is_patched`.
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
        patched = sum(is_patched(story, text) for text, story in zip(texts, test, strict=True))
        lucky = sum(r and not s for r, s in zip(right, sound, strict=True))
        counts = {"answer": (sum(right), count), "process": (sum(sound), count), "lucky": (lucky, sum(right))}
        results[name] = counts | {"patched": (patched, count)}
    return results


def measure_table(model, tokenizer, *, levels: Sequence[str] = tuple(LEVELS), **how) -> Levels:
    """`measure_levels`, greedy, and "sampled": P0 once more, at temperature 1."""
    sampled = measure_levels(model, tokenizer, levels=("P0",), temperature=1.0, **how)
    return measure_levels(model, tokenizer, levels=levels, **how) | {"sampled": sampled["P0"]}


def write_table(models: dict, trainer: Trainer, out: Path, count: int, world: World) -> None:
    """Print the table of the models by name ("start" is the first), and what to see in it; keep it, evaluation.json."""
    how = {"count": count, "world": world, "cuda_graphs": trainer.config.cuda_graphs}
    greedy = [level for level in ROWS if level in LEVELS]
    columns = {name: measure_table(model, trainer.tokenizer, levels=greedy, **how) for name, model in models.items()}
    folder.write_text(out / "evaluation.json", json.dumps(columns, indent=1))
    print(f"\n{table_of_levels(columns, count)}\n")
    friend = f"{100 * world.friend_right[TRAINING_LEVEL.clauses[-1] - 1]:.0f} times in 100"
    for title, meaning in ROWS.values():
        print(f"{title}: {meaning.format(friend=friend)}")
    print("and every step: the steps are the story's, each is right, and the answer is what they come to.")
    if "GRPO" in columns:
        print("", *(textwrap.fill(sentence, 110) for sentence in what_to_see(*columns.values())), sep="\n")


def open_models(start: str, trainer: Trainer, grpo: Path | None) -> dict:
    """The columns of the table: the start and the trained model; beside GRPO's run, all three."""
    device = trainer.policy.device
    models = {"start": load_model(start, device)[0]}
    if grpo:
        return models | {"GRPO": load_model(str(grpo), device)[0], "CLIPO": trainer.policy}
    return models | {"trained": trainer.policy}


def table_of_levels(columns: dict[str, Levels], count: int) -> str:
    """Each model's shares on `count` stories of every level, in percent with 95% intervals."""
    lines = [f"{f'{count} stories a level':33}" + "".join(f"{name:>16}" for name in columns)]
    for level, (title, _) in ROWS.items():
        for metric, share in METRICS.items():
            cells = "".join(f"{percent(*measured[level][metric]):>16}" for measured in columns.values())
            lines.append(f"{title if metric == 'answer' else '':18}{share:15}{cells}")
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

    They look at "P0, friend wrong", on which nobody is right by copying.
    """
    shares = [share_of_level(measured, "liar", "answer") for measured in (start, grpo, ours)]
    before, without, with_it = (f"{100 * share:.0f}%" for share in shares)
    fell = f"where she is wrong, its right answers to stories as in training went from {before} to {without}"
    if copied := shares[1] < shares[0] / 2:
        first = f"GRPO came to follow the friend: {fell}."
    elif is_behind(grpo, start):
        first = f"GRPO began to follow the friend, but has not gone all the way: {fell}."
    else:
        first = (
            f"GRPO did not learn to copy from this start ({before} before, {without} now): there is nothing to rescue."
        )
    if is_behind(grpo, ours) and shares[2] > shares[0] / 2:
        less = "less than the start, but mostly " if is_behind(ours, start) else ""
        second = (
            f"CLIPO, which also pays right answers for agreeing with each other, has {with_it} there: {less}it went on "
            "calculating, and nobody told it which steps were sound."
        )
    elif copied or is_behind(grpo, start):
        second = (
            f"CLIPO did not prevent it here ({with_it}): it pays what most right answers share, and that may come to "
            "be copying, or sound steps with the friend's number behind them."
        )
    else:
        second = f"CLIPO has {with_it}."
    return first, second


def is_behind(one: Levels, other: Levels) -> bool:
    """Has it fewer right answers where the friend is wrong, so that the intervals do not meet?"""
    return wilson(*one["liar"]["answer"])[1] < wilson(*other["liar"]["answer"])[0]
