"""Evaluate models: how often are they right, how sure is that, and on the toy world: for the right reason?

    python eval.py runs/toy                                    the toy world's levels
    python eval.py runs/toy --samples 16 --temperature 1       pass@1, maj@16 and pass@16 of sampled answers
    python eval.py runs/toy runs/toy-grpo                      two runs, a table each
    python eval.py --compare runs/toy-grpo runs/toy            their paired difference
    python eval.py Qwen/Qwen2.5-0.5B-Instruct --data gsm8k math500 --limit 200 --save-rollouts
    python eval.py --regrade runs/eval-Qwen2.5-0.5B-Instruct/rollouts.jsonl

The table, the same in Markdown, and as JSON are written to RUN/eval/ (a hub model: runs/eval-NAME/), beside
rollouts.jsonl with a line for each problem. Stopped? The same command with --resume goes on.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from problems import one_line_for_ctrl_c

    one_line_for_ctrl_c()

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import checkpoint
import toy
from clipo import end_of_sequence_ids
from engine.rollouts import check_model, generate
from problems import (
    BENCHMARKS,
    SUFFIX,
    OptionParser,
    Problem,
    UserError,
    are_correct,
    as_number,
    extract_answer,
    load_problems,
    plain,
    prompt_ids,
)

# ----------------------------------------------------------------------------------------------------
# How sure is it?
# ----------------------------------------------------------------------------------------------------


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share. trials > 0.

    >>> [round(end, 2) for end in wilson(8, 10)]
    [0.49, 0.94]
    """
    z, p = 1.96, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95% percentile interval of the mean of per-problem values, over problems drawn anew. The same every time.

    >>> bootstrap([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    values, draw = np.asarray(values, dtype=float), np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, from n samples of which some are: unbiased (arXiv:2107.03374).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Is the most frequent answer right? Equal numbers are one answer; of equally frequent ones the first counts.

    >>> majority(["7", None, "8.0", "8"], [True, False, False, False])
    False
    """
    votes = [as_number(text) or text for text in (plain(answer) for answer in answers if answer is not None)]
    if not votes:
        return False
    winner = Counter(votes).most_common(1)[0][0]
    verdicts = [right for answer, right in zip(answers, correct, strict=True) if answer is not None]
    return verdicts[votes.index(winner)]


# ----------------------------------------------------------------------------------------------------
# From rollouts to a table
# ----------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[dict]) -> dict:
    """The figures of one benchmark, from its lines in rollouts.jsonl. Shares are fractions, intervals [low, high]."""
    k, count = len(rows[0]["correct"]), len(rows)
    right = [sum(row["correct"]) for row in rows]
    single = [n / k for n in right]
    summary = {"problems": count, "samples": k, "pass@1": share(sum(right), count) if k == 1 else mean(single)}
    if k > 1:
        summary[f"maj@{k}"] = mean([majority(row["answers"], row["correct"]) for row in rows])
        summary |= {f"pass@{j}": mean([pass_at_k(k, n, j) for n in right]) for j in (2, 4, 8, 16, 32) if j <= k}
    if "sound" in rows[0]:
        sound = [sum(row["sound"]) for row in rows]
        lucky = [sum(r and not s for r, s in zip(row["correct"], row["sound"], strict=True)) for row in rows]
        summary["process"] = share(sum(sound), count) if k == 1 else mean([n / k for n in sound])
        # Of the right answers, those whose process is wrong: a ratio of sums, so its interval is of a share.
        summary["lucky"] = share(sum(lucky), sum(right)) if sum(right) else None
    lengths = [n for row in rows for n in row["lengths"]]
    return summary | {
        "response_length": sum(lengths) / len(lengths),
        "cut_off": sum(sum(row["cut_off"]) for row in rows) / (k * count),
        "no_answer": sum(answer is None for row in rows for answer in row["answers"]) / (k * count),
        "tokens_per_second": sum(lengths) / max(sum(row["seconds"] for row in rows), 1e-9),
    }


def share(successes: int, trials: int) -> dict:
    """A share and its Wilson interval."""
    return {"value": successes / trials, "interval": list(wilson(successes, trials))}


def mean(values: Sequence[float]) -> dict:
    """A mean over problems and its bootstrap interval."""
    return {"value": sum(values) / len(values), "interval": list(bootstrap(values))}


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


def table(results: dict[str, dict], *, markdown: bool = False) -> str:
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


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, as text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def compare(before: Sequence[dict], after: Sequence[dict]) -> dict[str, dict]:
    """For each benchmark in both: the paired difference `after` - `before` over the problems that both answered.

    {"problems", "difference": mean of pass@1 differences with its bootstrap interval, "gained", "lost": how many
    problems (by the majority where there are several samples), "mcnemar_p": exact, two-sided}.
    """
    from scipy.stats import binomtest  # here: train.py imports this module too, and scipy.stats takes its time

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
            "difference": mean(single),
            "gained": gained,
            "lost": lost,
            "mcnemar_p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0,
        }
    return results


# ----------------------------------------------------------------------------------------------------
# Sampling and grading
# ----------------------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """How responses are drawn. temperature 0: greedy."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048


# The paper's protocol: greedy on its first track, 16 samples on its second.
DECODING = {
    "gsm8k": Decoding(),
    "math": Decoding(samples=16, temperature=0.6, top_p=0.95, max_new_tokens=4096),
    "toy": Decoding(max_new_tokens=48),
}
SECOND_TRACK = ("math", "math500", "math_perturb_simple", "math_perturb_hard", "amc23", "aime24", "aime25")
TOY_LEVELS = {f"toy {name}": level for name, level in toy.LEVELS.items()}


def track_of(benchmark: str) -> str:
    """Whose protocol a benchmark follows."""
    return "toy" if benchmark in TOY_LEVELS else "math" if benchmark in SECOND_TRACK else "gsm8k"


def load_benchmark(benchmark: str, limit: int | None) -> list[Problem]:
    """Its problems, or the first `limit` of them. Raises UserError."""
    if benchmark in TOY_LEVELS:
        return toy.stories(f"test {benchmark.removeprefix('toy ')} 0", TOY_LEVELS[benchmark], limit or 300)
    return load_problems(benchmark)[:limit]


def evaluate(model, tokenizer, benchmark: str, problems: Sequence[Problem], done: int, given: Evaluation):
    """Yields the lines of rollouts.jsonl for problems[done:], a chunk at a time.

    The draws of a chunk follow from the seed, the benchmark and the chunk's place, so that a stopped evaluation
    goes on as if it had not been.
    """
    decoding, size = given.decoding_for(benchmark), given.chunk(benchmark)
    suffix = "" if benchmark in TOY_LEVELS else SUFFIX
    for first in range(done, len(problems), size):
        chunk = problems[first : first + size]
        prompts = [prompt_ids(tokenizer, problem.question, suffix) for problem in chunk]
        seed = random.Random(f"{given.seed} {benchmark} {first}").getrandbits(63)
        start = time.perf_counter()
        responses = respond(model, tokenizer, prompts, decoding, given, seed)
        seconds = (time.perf_counter() - start) / len(chunk)
        rows = []
        for i, (problem, response) in enumerate(zip(chunk, responses, strict=True)):
            row = {"benchmark": benchmark, "problem": first + i, "question": problem.question, "gold": problem.answer}
            if benchmark in TOY_LEVELS:
                row["sound"] = [toy.is_sound(problem, text) for text in response["texts"]]
            rows.append({**row, **response, "seconds": seconds})
        yield graded(rows, lenient=given.lenient)


def respond(model, tokenizer, prompts, decoding: Decoding, given: Evaluation, seed: int) -> list[dict]:
    """For each prompt its responses: {"texts", "lengths" in tokens, "cut_off": did it not end?}, a list of K each.

    A prompt that leaves no room for a response gets empty ones.
    """
    k, stop = decoding.samples, end_of_sequence_ids(model, tokenizer)
    room = getattr(model.config, "max_position_embeddings", math.inf) - decoding.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens is {decoding.max_new_tokens}, but the model has "
            f"{model.config.max_position_embeddings} positions; expected fewer"
        )
    responses = [{"texts": [""] * k, "lengths": [0] * k, "cut_off": [True] * k} for _ in prompts]
    fitting = [i for i, ids in enumerate(prompts) if len(ids) <= room]
    if not fitting:
        return responses
    with torch.autocast(model.device.type, torch.bfloat16, enabled=given.dtype == "bfloat16"):
        rollouts = generate(
            model,
            [prompts[i] for i in fitting],
            samples_per_prompt=k,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=stop,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            generator=torch.Generator().manual_seed(seed),
            max_batch=given.max_batch,
            cuda_graphs=given.cuda_graphs,
        )
    rows = zip(rollouts.tokens.flatten(0, 1).cpu(), rollouts.mask.flatten(0, 1).cpu(), strict=True)
    ids = [tokens[mask].tolist() for tokens, mask in rows]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for place, i in enumerate(fitting):
        mine = slice(place * k, place * k + k)
        responses[i] = {
            "texts": texts[mine],
            "lengths": [len(row) for row in ids[mine]],
            "cut_off": [row[-1] not in stop for row in ids[mine]],
        }
    return responses


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


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """All that decides what an evaluation computes; kept as settings.json beside its results."""

    model: str
    data: list[str]
    limit: int | None
    chosen: dict  # what was chosen of Decoding; the rest follows from each benchmark's track
    track: str | None  # whose decoding, instead of each benchmark's own
    seed: int
    max_batch: int
    dtype: str
    lenient: bool
    save_rollouts: bool
    cuda_graphs: bool | None = None

    def decoding_for(self, benchmark: str) -> Decoding:
        return Decoding(**{**asdict(DECODING[self.track or track_of(benchmark)]), **self.chosen})

    def chunk(self, benchmark: str) -> int:
        """Problems between two writes: some batches' worth, so that few rows wait for the longest response."""
        return max(1, 4 * self.max_batch // self.decoding_for(benchmark).samples)


def parser() -> argparse.ArgumentParser:
    p = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "models", nargs="*", metavar="MODEL", help="a run's folder, any model's folder, or a name on the hub"
    )
    p.add_argument(
        "--data", nargs="+", metavar="NAME_OR_FILE",
        help=f"of: toy, {', '.join(BENCHMARKS)}, or .parquet and .jsonl files (default: what the run was trained on)",
    )  # fmt: skip
    p.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each (toy: 300)")
    p.add_argument("--samples", type=int, metavar="K", help="responses to each problem")
    p.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    p.add_argument("--top-p", type=float, metavar="P")
    p.add_argument("--max-new-tokens", type=int, metavar="N")
    p.add_argument("--track", choices=list(DECODING), help="whose defaults for these four (default: the benchmark's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lenient", action="store_true", help="where no answer is marked, take the last number")
    p.add_argument("--save-rollouts", action="store_true", help="questions and responses too, in rollouts.jsonl")
    p.add_argument("--resume", action="store_true", help="go on with a stopped evaluation")
    p.add_argument("--out", metavar="FOLDER", help="where the results are written (one model only)")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of matrix products (default: bfloat16 on a GPU)")
    p.add_argument("--max-batch", type=int, default=256, metavar="N", help="responses under way at once")
    p.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, help="(default: on a GPU where they work)")
    p.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="B - A, of two evaluations; needs no model")
    p.add_argument("--regrade", metavar="FILE", help="grade a rollouts.jsonl with texts again; needs no model")
    return p


def settings_from(model: str, given: argparse.Namespace, device: torch.device) -> Evaluation:
    """Raises UserError for options out of range and for data that nobody named."""
    for name, low in (("limit", 1), ("samples", 1), ("temperature", 0), ("max_new_tokens", 1), ("max_batch", 1)):
        value = getattr(given, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected {low} or more")
    if given.top_p is not None and not 0 < given.top_p <= 1:
        raise UserError(f"--top-p is {given.top_p}; expected a number in (0, 1]")
    data = given.data or trained_on(model)
    if unknown := [d for d in data if d not in ("toy", *BENCHMARKS) and Path(d).suffix not in (".parquet", ".jsonl")]:
        names = ", ".join(("toy", *BENCHMARKS))
        raise UserError(f"--data names {unknown[0]!r}; expected some of: {names}, or a .parquet or .jsonl file")
    names = ("samples", "temperature", "top_p", "max_new_tokens")
    chosen = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return Evaluation(
        model=model,
        data=[level for d in data for level in (TOY_LEVELS if d == "toy" else [d])],
        limit=given.limit,
        chosen=chosen,
        track=given.track,
        seed=given.seed,
        max_batch=given.max_batch,
        dtype=given.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        lenient=given.lenient,
        save_rollouts=given.save_rollouts,
        cuda_graphs=given.cuda_graphs,
    )


def trained_on(model: str) -> list[str]:
    """What to evaluate a run of ours on, if nobody says. Raises UserError for other models."""
    if (settings := checkpoint.read_settings(Path(model))) is None:
        raise UserError(f"no --data is given, and {model} is no run of train.py; expected --data with a benchmark")
    data = settings["data"]
    return ["math500"] if data == "math" else [data]


def folder_of(model: str) -> Path:
    """Where the results of a model go."""
    return Path(model) / "eval" if Path(model).is_dir() else Path("runs") / f"eval-{Path(model).name}"


def begin(settings: Evaluation, out: Path, resume: bool) -> list[dict]:
    """Begin an evaluation in its folder, or go on with it; the lines that it has already. Raises UserError."""
    wanted, file = asdict(settings), out / "settings.json"
    rows = checkpoint.read_lines(out / "rollouts.jsonl") if file.is_file() else []
    if rows:
        if not resume:
            raise UserError(f"{out} already holds an evaluation; go on with --resume, or choose another --out")
        check_rows(rows, out / "rollouts.jsonl")
        before = checkpoint.read_json(file, {})
        if changed := [name for name in wanted if before.get(name) != wanted[name] and name != "cuda_graphs"]:
            raise UserError(f"{out} was begun with another {', '.join(changed)}; leave it so, or choose another --out")
    file.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    return rows


ROW = {
    "benchmark": str, "problem": int, "gold": str, "lengths": [int], "cut_off": [bool], "answers": [str | None],
    "correct": [bool], "seconds": float,
}  # fmt: skip


def check_rows(rows: Sequence[dict], file: Path) -> None:
    """Are these the lines of an evaluation, the samples of a benchmark equally many? Raises UserError."""
    optional, first = {"texts": [str], "sound": [bool], "question": str}, {}
    for number, row in enumerate(rows, 1):
        shape = ROW | {name: kind for name, kind in optional.items() if name in row}
        wrong = checkpoint.misfit(row, shape)
        if not wrong:
            samples = {name: len(row[name]) for name, kind in shape.items() if isinstance(kind, list)}
            if samples != first.setdefault(row["benchmark"], samples) or len(set(samples.values())) > 1:
                wrong = "it has not as many samples as the others"
            elif 0 in samples.values():
                wrong = "it has no samples"
        if wrong:
            raise UserError(f"{file}, line {number}: {wrong}; expected what eval.py wrote")


def open_model(settings: Evaluation, device: torch.device):
    """Model and tokenizer. Raises UserError if it cannot be opened or `generate` cannot serve it."""
    model, tokenizer = checkpoint.load_model(settings.model, device)
    try:
        check_model(model)
        end_of_sequence_ids(model, tokenizer)
    except (ValueError, NotImplementedError) as reason:
        raise UserError(f"model {settings.model}: {reason}") from reason
    return model, tokenizer


def evaluate_model(settings: Evaluation, out: Path, device: torch.device, resume: bool) -> bool:
    """One model on all its benchmarks, results to `out`; False if a benchmark could not be loaded."""
    model, tokenizer = open_model(settings, device)
    out.mkdir(parents=True, exist_ok=True)
    with checkpoint.only_one(out / "lock"):
        return evaluate_opened(model, tokenizer, settings, out, resume)


def evaluate_opened(model, tokenizer, settings: Evaluation, out: Path, resume: bool) -> bool:
    """`evaluate_model`, once the model is open and the folder is this process's."""
    rows, file = begin(settings, out, resume), out / "rollouts.jsonl"
    complete, results = True, {}
    for benchmark in settings.data:
        try:
            problems = load_benchmark(benchmark, settings.limit)
        except UserError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            complete = False
            continue
        mine = [row for row in rows if row["benchmark"] == benchmark]
        if len(mine) < len(problems):  # a chunk that was stopped within is drawn again as a whole
            mine = mine[: len(mine) // settings.chunk(benchmark) * settings.chunk(benchmark)]
        rows = [row for row in rows if row["benchmark"] != benchmark] + mine
        checkpoint.write_lines(file, rows)
        with tqdm(total=len(problems), initial=len(mine), desc=benchmark) as bar:
            for chunk in evaluate(model, tokenizer, benchmark, problems, len(mine), settings):
                for row in chunk:
                    if not settings.save_rollouts:
                        del row["question"], row["texts"]
                    checkpoint.append_line(file, row)
                mine += chunk
                verdicts = [verdict for row in mine for verdict in row["correct"]]
                bar.set_postfix_str(f"right {sum(verdicts) / len(verdicts):.1%}", refresh=False)
                bar.update(len(chunk))
        rows = [row for row in rows if row["benchmark"] != benchmark] + mine
        results[benchmark] = summarise(mine)
    if results:
        print(f"\n{settings.model}: shares in percent, 95% intervals\n\n{table(results)}\n")
        saved = {"settings": asdict(settings), "results": results}
        (out / "results.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        (out / "results.md").write_text(table(results, markdown=True) + "\n", encoding="utf-8")
        print(f"{out} holds results.json, results.md and rollouts.jsonl")
    return complete


def regrade(file: Path, lenient: bool) -> str:
    """The table of a rollouts.jsonl, its texts graded again. Raises UserError."""
    rows = checkpoint.read_lines(file)
    if not rows or "texts" not in rows[0]:
        raise UserError(f"{file} holds no texts; expected the rollouts.jsonl of an evaluation with --save-rollouts")
    check_rows(rows, file)
    by_benchmark: dict[str, list[dict]] = {}
    for row in graded(rows, lenient=lenient):
        by_benchmark.setdefault(row["benchmark"], []).append(row)
    return table({benchmark: summarise(mine) for benchmark, mine in by_benchmark.items()})


def comparison(before: str, after: str) -> str:
    """The table of `compare` for two runs or evaluation folders. Raises UserError."""
    lines = []
    for folder in (before, after):
        found = [f for f in (Path(folder) / "rollouts.jsonl", Path(folder) / "eval" / "rollouts.jsonl") if f.is_file()]
        # A run's own folder holds the rollouts of its training; its evaluation lies in eval/.
        rows = checkpoint.read_lines(found[-1]) if found else []
        if not rows or "benchmark" not in rows[0]:
            raise UserError(f"{folder} holds no evaluation; run python eval.py {folder} first")
        check_rows(rows, found[-1])
        lines.append(rows)
    results = compare(*lines)
    if not results:
        raise UserError(f"{before} and {after} have no problem in common; evaluate both on the same --data")
    names = ["benchmark", "problems", f"{after} - {before}, points", "gained", "lost", "McNemar p"]
    cells = [
        [name, str(r["problems"]), cell(r["difference"]), str(r["gained"]), str(r["lost"]), f"{r['mcnemar_p']:.2g}"]
        for name, r in results.items()
    ]
    return aligned([names, *cells])


def run(given: argparse.Namespace) -> int:
    """The whole command; returns its exit status. Raises UserError."""
    if given.compare:
        print(comparison(*given.compare))
        return 0
    if given.regrade:
        print(regrade(Path(given.regrade), given.lenient))
        return 0
    if not given.models:
        raise UserError("no model is given; expected a run's folder or a model's name, as in: python eval.py runs/toy")
    if given.out and len(given.models) > 1:
        raise UserError(f"--out is given with {len(given.models)} models; expected one, or no --out")
    device = checkpoint.device_from(given.device)
    plans = [(settings_from(model, given, device), Path(given.out or folder_of(model))) for model in given.models]
    complete = [evaluate_model(settings, out, device, given.resume) for settings, out in plans]
    return 0 if all(complete) else 2


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return run(parser().parse_args(arguments))
    except (UserError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
