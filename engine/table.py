"""The table at the end of a toy run, and two sentences that say what to see in it."""

from __future__ import annotations

from eval import wilson

Levels = dict[str, dict[str, tuple[int, int]]]  # what toy.evaluate measures: {level: {metric: (successes, trials)}}


def table(columns: dict[str, Levels], count: int) -> str:
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


def share(measured: Levels, level: str, metric: str) -> float:
    successes, trials = measured[level][metric]
    return successes / trials if trials else 0.0


def what_to_see(start: Levels, grpo: Levels, ours: Levels) -> tuple[str, str]:
    """Two sentences on a table of both: what became of GRPO, and what of CLIPO. They say it, too, if neither is usual.

    On P2 the friend is mostly wrong: who copies is wrong there, however right on P0, where stories are as in training.
    """
    p2 = [f"{100 * share(measured, 'P2', 'answer'):.0f}%" for measured in (start, grpo, ours)]
    fell = f"on long stories (P2), where the friend is mostly wrong, it went from {p2[0]} to {p2[1]} right answers"
    lucky = f"{100 * share(grpo, 'P0', 'lucky'):.0f}% of its right answers to short ones (P0) are lucky"
    if copied := share(grpo, "P2", "process") < share(start, "P2", "process") / 2:
        first = f"GRPO learnt to copy the friend: {fell}; {lucky}."
    elif is_behind(grpo, start):
        first = f"GRPO began to copy the friend, but is not done with it: {fell}; {lucky}."
    else:
        first = f"From this start GRPO did not learn to copy (P2: from {p2[0]} to {p2[1]}): there is nothing to rescue."
    if is_behind(grpo, ours) and share(ours, "P2", "process") > share(start, "P2", "process") / 2:
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
