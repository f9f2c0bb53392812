"""From an evaluation's lines to its tables: graded, summarised, compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from border import UserError
from run import folder
from run.evaluation import Evaluation, check_rows
from run.intervals import mean_over_problems, pass_at_k, share_of
from tasks.grading import are_correct, extract_answer, vote


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Is the most frequent answer right? Equal values are one answer; of equally frequent ones the first counts.

    >>> majority(["7", None, "x = 8", "8.0"], [False, False, True, True])
    True
    """
    votes = [vote(answer) for answer in answers if answer is not None]
    if not votes:
        return False
    winner = Counter(votes).most_common(1)[0][0]
    verdicts = [right for answer, right in zip(answers, correct, strict=True) if answer is not None]
    return verdicts[votes.index(winner)]


def summarise(rows: Sequence[dict]) -> dict:
    """The figures of one benchmark, from its lines in rollouts.jsonl. Shares are fractions, intervals [low, high]."""
    k, count = len(rows[0]["correct"]), len(rows)
    right = [sum(row["correct"]) for row in rows]
    single = [n / k for n in right]
    summary = {
        "problems": count,
        "samples": k,
        "pass@1": share_of(sum(right), count) if k == 1 else mean_over_problems(single),
    }
    if k > 1:
        summary[f"maj@{k}"] = mean_over_problems([majority(row["answers"], row["correct"]) for row in rows])
        summary |= {
            f"pass@{j}": mean_over_problems([pass_at_k(k, n, j) for n in right]) for j in (2, 4, 8, 16, 32) if j <= k
        }
    if "sound" in rows[0]:
        sound = [sum(row["sound"]) for row in rows]
        lucky = [sum(r and not s for r, s in zip(row["correct"], row["sound"], strict=True)) for row in rows]
        summary["process"] = share_of(sum(sound), count) if k == 1 else mean_over_problems([n / k for n in sound])
        # Of the right answers, those whose process is wrong: a ratio of sums, so its interval is of a share.
        summary["lucky"] = share_of(sum(lucky), sum(right)) if sum(right) else None
    lengths = [n for row in rows for n in row["lengths"]]
    return summary | {
        "response_length": sum(lengths) / len(lengths),
        "cut_off": sum(sum(row["cut_off"]) for row in rows) / (k * count),
        "no_answer": sum(answer is None for row in rows for answer in row["answers"]) / (k * count),
        "tokens_per_second": sum(lengths) / max(sum(row["seconds"] for row in rows), 1e-9),
    }


def cell(value) -> str:
    """A figure as it stands in the table: shares in percent.

    >>> cell({"value": 0.8, "interval": [0.49, 0.943]}), cell(12.34), cell(None)
    ('80.0 [49.0, 94.3]', '12.3', 'none')
    """
    if isinstance(value, dict):
        low, high = value["interval"]
        return f"{100 * value['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"


COLUMNS = {
    "problems": "problems", "samples": "samples", "response_length": "tokens", "cut_off": "cut off",
    "no_answer": "no answer", "tokens_per_second": "tokens/s",
}  # fmt: skip


def table_of_benchmarks(results: dict[str, dict], *, markdown: bool = False) -> str:
    """One line per benchmark; shares in percent, intervals at 95%."""
    names = list(dict.fromkeys(name for summary in results.values() for name in summary))
    names.sort(key=lambda name: name in ("response_length", "cut_off", "no_answer", "tokens_per_second"))
    lines = [["benchmark", *(COLUMNS.get(name, name) for name in names)]]
    for benchmark, summary in results.items():
        shares = {name: f"{100 * summary[name]:.1f}" for name in ("cut_off", "no_answer")}
        lines.append([benchmark, *(shares.get(n) or (cell(summary[n]) if n in summary else "") for n in names)])
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return aligned(lines)


def save_results(settings: Evaluation, results: dict[str, dict], out: Path) -> None:
    """The table of an evaluation: shown, and kept as Markdown and JSON."""
    print(f"\n{settings.model}: shares in percent, 95% intervals\n\n{table_of_benchmarks(results)}\n")
    saved = {"settings": asdict(settings), "results": results}
    folder.write_text(out / "results.json", json.dumps(saved, indent=1) + "\n")
    folder.write_text(out / "results.md", table_of_benchmarks(results, markdown=True) + "\n")
    print(f"{out} holds results.json, results.md and rollouts.jsonl")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, as text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def paired_differences(before: Sequence[dict], after: Sequence[dict]) -> dict[str, dict]:
    """For each benchmark in both: the paired difference `after` - `before` over the problems that both answered.

    {"problems", "difference": mean of pass@1 differences with its bootstrap interval, "gained", "lost": how many
    problems (by the majority where there are several samples), "mcnemar_p": exact, two-sided}.
    """
    from scipy.stats import binomtest  # here, because it takes its time

    first = {(row["benchmark"], row["problem"], row["gold"]): row for row in before}
    pairs: dict[str, list[tuple[dict, dict]]] = {}
    for row in after:
        if (key := (row["benchmark"], row["problem"], row["gold"])) in first:
            pairs.setdefault(row["benchmark"], []).append((first[key], row))
    results = {}
    for benchmark, both in pairs.items():
        single = [sum(b["correct"]) / len(b["correct"]) - sum(a["correct"]) / len(a["correct"]) for a, b in both]
        verdicts = [tuple(majority(row["answers"], row["correct"]) for row in pair) for pair in both]
        gained, lost = verdicts.count((False, True)), verdicts.count((True, False))
        results[benchmark] = {
            "problems": len(both),
            "difference": mean_over_problems(single),
            "gained": gained,
            "lost": lost,
            "mcnemar_p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0,
        }
    return results


def graded(rows: Sequence[dict], *, lenient: bool) -> list[dict]:
    """The rows with the answers extracted from their texts and the verdicts on them."""
    texts = [text for row in rows for text in row["texts"]]
    verdicts = iter(are_correct(texts, [row["gold"] for row in rows for _ in row["texts"]], lenient=lenient))
    return [
        {
            **row,
            "answers": [extract_answer(text, lenient=lenient) for text in row["texts"]],
            "correct": [next(verdicts) for _ in row["texts"]],
        }
        for row in rows
    ]


def regrade(file: Path, lenient: bool) -> str:
    """The table of a rollouts.jsonl, its texts graded again. Raises UserError."""
    rows = folder.read_lines(file)
    if not rows or "texts" not in rows[0]:
        raise UserError(f"{file} holds no texts; expected the rollouts.jsonl of an evaluation with --save-rollouts")
    check_rows(rows, file)
    by_benchmark: dict[str, list[dict]] = {}
    for row in graded(rows, lenient=lenient):
        by_benchmark.setdefault(row["benchmark"], []).append(row)
    return table_of_benchmarks({benchmark: summarise(mine) for benchmark, mine in by_benchmark.items()})


def comparison(before: str, after: str) -> str:
    """The table of `paired_differences` for two runs or evaluation folders. Raises UserError."""
    lines = []
    for run in (before, after):
        found = [f for f in (Path(run) / "rollouts.jsonl", Path(run) / "eval" / "rollouts.jsonl") if f.is_file()]
        # A run's own folder holds the rollouts of its training; its evaluation lies in eval/.
        rows = folder.read_lines(found[-1]) if found else []
        if not rows or "benchmark" not in rows[0]:
            raise UserError(f"{run} holds no evaluation; run python eval.py {run} first")
        check_rows(rows, found[-1])
        lines.append(rows)
    results = paired_differences(*lines)
    if not results:
        raise UserError(f"{before} and {after} have no problem in common; evaluate both on the same --data")
    names = ["benchmark", "problems", f"{after} - {before}, points", "gained", "lost", "McNemar p"]
    cells = [
        [name, str(r["problems"]), cell(r["difference"]), str(r["gained"]), str(r["lost"]), f"{r['mcnemar_p']:.2g}"]
        for name, r in results.items()
    ]
    return aligned([names, *cells])
