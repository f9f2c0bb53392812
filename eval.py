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
    from border import one_line_for_ctrl_c

    one_line_for_ctrl_c()

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from border import OptionParser, UserError, status_of
from clipo import end_of_sequence_ids
from engine.check import check_model
from engine.rollouts import generate
from run import folder
from run.evaluation import DECODING, TOY_LEVELS, Decoding, Evaluation, begin, load_benchmark, place_of, settings_from
from run.models import device_from, load_model
from run.scores import comparison, graded, regrade, save_results, summarise
from tasks.data import BENCHMARKS, SUFFIX, Problem, prompt_ids
from tasks.toy import is_sound


def evaluate(model, tokenizer, benchmark: str, problems: Sequence[Problem], done: int, given: Evaluation):
    """Yields the lines of rollouts.jsonl for problems[done:], a chunk at a time.

    The draws of a chunk follow from the seed, the benchmark (of a file its name) and the chunk's place, so that a
    stopped evaluation goes on as if it had not been.
    """
    decoding, size = given.decoding_for(benchmark), given.chunk(benchmark)
    suffix = "" if benchmark in TOY_LEVELS else SUFFIX
    for first in range(done, len(problems), size):
        chunk = problems[first : first + size]
        prompts = [prompt_ids(tokenizer, problem.question, suffix) for problem in chunk]
        seed = random.Random(f"{given.seed} {Path(benchmark).name} {first}").getrandbits(63)
        start = time.perf_counter()
        responses = respond(model, tokenizer, prompts, decoding, given, seed)
        seconds = (time.perf_counter() - start) / len(chunk)
        rows = []
        for i, (problem, response) in enumerate(zip(chunk, responses, strict=True)):
            row = {"benchmark": benchmark, "problem": first + i, "question": problem.question, "gold": problem.answer}
            if benchmark in TOY_LEVELS:
                row["sound"] = [is_sound(problem, text) for text in response["texts"]]
            rows.append({**row, **response, "seconds": seconds})
        rows = graded(rows, lenient=given.lenient)
        if not given.save_rollouts:
            for row in rows:
                del row["question"], row["texts"]
        yield rows


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


def open_model(settings: Evaluation, device: torch.device):
    """Model and tokenizer. Raises UserError if it cannot be opened or `generate` cannot serve it."""
    model, tokenizer = load_model(settings.model, device)
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
    file, results = out / "rollouts.jsonl", {}
    with folder.only_one(out / "lock"):
        rows = begin(settings, out, resume)
        for benchmark in settings.data:
            try:
                problems = load_benchmark(benchmark, settings.limit, settings.world)
            except UserError as mistake:
                print(f"error: {mistake}", file=sys.stderr)
                continue
            mine = [row for row in rows if row["benchmark"] == benchmark]
            if len(mine) < len(problems):  # a chunk that was stopped within is drawn again as a whole
                mine = mine[: len(mine) // settings.chunk(benchmark) * settings.chunk(benchmark)]
            rows = [row for row in rows if row["benchmark"] != benchmark] + mine
            folder.write_lines(file, rows)
            with tqdm(total=len(problems), initial=len(mine), desc=benchmark) as bar:
                for chunk in evaluate(model, tokenizer, benchmark, problems, len(mine), settings):
                    for row in chunk:
                        folder.append_line(file, row)
                    mine, rows = mine + chunk, rows + chunk
                    verdicts = [verdict for row in mine for verdict in row["correct"]]
                    bar.set_postfix_str(f"right {sum(verdicts) / len(verdicts):.1%}", refresh=False)
                    bar.update(len(chunk))
            results[benchmark] = summarise(mine)
        if results:
            save_results(settings, results, out)
    return set(results) == set(settings.data)


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
    device = device_from(given.device)
    plans = [(settings_from(model, given, device), place_of(model, given.out)) for model in given.models]
    complete = [evaluate_model(settings, out, device, given.resume) for settings, out in plans]
    return 0 if all(complete) else 2


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    again = "stopped; the same command with --resume goes on"
    return status_of(lambda: run(parser().parse_args(arguments)), stopped=again)


if __name__ == "__main__":
    sys.exit(main())
