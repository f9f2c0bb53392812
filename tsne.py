"""Draw rollouts as points: do the right answers to a question gather, and do the wrong ones scatter?

    python tsne.py runs/toy-grpo runs/toy               the toy world: before training, after GRPO, after CLIPO
    python tsne.py runs/toy --questions 6 --samples 32
    python tsne.py Qwen/Qwen2.5-0.5B-Instruct --data gsm8k    any model; one that train.py did not make has no head
    python tsne.py --redraw runs/toy/tsne.npz           the same picture again, without a model

The first panels show the model that the first run began with. A t-SNE picture alone proves nothing: it shows clusters
even where there are none. So each panel carries two numbers, computed in the original space with cosine distance:
    silhouette   of right against wrong rollouts of one question, mean over questions: 1 far apart, 0 mixed
    purity       the share of a right rollout's 10 nearest neighbours that answer the same question and are right
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from border import one_line_for_ctrl_c

    one_line_for_ctrl_c()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from border import MOST_SEED, OptionParser, UserError, check_numbers, status_of
from clipo import ContrastiveHead, end_of_sequence_ids
from engine.rollouts import generate
from run import folder
from run.models import device_from, load_model
from run.points import FEWEST, draw, load_points, save_points
from tasks.data import SUFFIX, Problem, load_problems, prompt_ids
from tasks.grading import are_correct
from tasks.toy import LEVELS, Story, is_sound, stories


def load_head(run: Path, config: dict, d_model: int, device: torch.device) -> ContrastiveHead:
    """A run's contrastive head, over hidden states of width d_model. Raises UserError."""
    try:
        weights = load_file(run / "head.safetensors", device=str(device))
    except (OSError, SafetensorError) as reason:
        raise UserError(f"{run} has no contrastive head; expected a run of train.py that has saved one") from reason
    head = ContrastiveHead(d_model, config["d_embed"], config["head_mlp"]).to(device)
    try:
        head.load_state_dict(weights)
    except RuntimeError as reason:
        raise UserError(
            f"{run}/head.safetensors does not fit its model and settings; expected all of one run"
        ) from reason
    return head


@torch.no_grad()
def embed(model, tokenizer, problems: Sequence[Problem], given: argparse.Namespace) -> dict:
    """Sampled rollouts of the problems: hidden (P, G, D), right, question and, on the toy world, sound, all (B,)."""
    on_toy = isinstance(problems[0], Story)
    rollouts = generate(
        model,
        [prompt_ids(tokenizer, problem.question, "" if on_toy else SUFFIX) for problem in problems],
        samples_per_prompt=given.samples,
        max_new_tokens=given.max_new_tokens,
        eos_token_id=end_of_sequence_ids(model, tokenizer),
        generator=torch.Generator().manual_seed(given.seed),
        max_batch=256,
        cuda_graphs=given.cuda_graphs,
    )
    rows = zip(rollouts.tokens.flatten(0, 1).cpu(), rollouts.mask.flatten(0, 1).cpu(), strict=True)
    texts = tokenizer.batch_decode([tokens[mask] for tokens, mask in rows], skip_special_tokens=True)
    asked = [problem for problem in problems for _ in range(given.samples)]
    right = torch.tensor(are_correct(texts, [problem.answer for problem in asked]))
    question = torch.arange(len(problems)).repeat_interleave(given.samples)
    found = {"hidden": rollouts.hidden, "right": right, "question": question}  # h (P, G, D), the others (B,)
    if on_toy:
        found["sound"] = torch.tensor([is_sound(story, text) for story, text in zip(asked, texts, strict=True)])
    return found


def flat_rows(values: torch.Tensor) -> np.ndarray:
    """(P, G, width) -> (B, width); what is (B,) stays so."""
    return (values.flatten(0, 1) if values.ndim == 3 else values).cpu().numpy()


def names(models: Sequence[str]) -> list[str]:
    """Of the panels: the last part of a path where that tells the models apart, else the whole, else a number too.

    >>> names(["A/toy", "B/toy", "C", "C"])
    ['A/toy', 'B/toy', 'C', 'C (2)']
    """
    short = ["before", *(Path(model).name for model in models)]  # the first run's start has a panel too
    found = []
    for i, model in enumerate(models):
        name = Path(model).name if short.count(Path(model).name) == 1 else model
        found.append(name if name not in ["before", *found] else f"{name} ({i + 1 - models.index(model)})")
    return found


def panels(models: Sequence[str], problems: Sequence[Problem], given: argparse.Namespace) -> dict[str, dict]:
    """{name: {"hidden" or "z", "right", "question", "sound"}} of each model, before them the first run's start."""
    device, found = device_from(given.device), {}
    first = folder.read_settings(Path(models[0]))
    for name, source in [*([("before", first["model"])] if first else []), *zip(names(models), models, strict=True)]:
        model, tokenizer = load_model(source, device)
        try:
            one = embed(model, tokenizer, problems, given)
        except (ValueError, NotImplementedError) as reason:
            raise UserError(f"model {source}: {reason}") from reason
        if name != "before" and (settings := folder.read_settings(Path(source))):
            hidden = one["hidden"]
            head = load_head(Path(source), settings["config"], hidden.shape[-1], device)
            if settings["config"]["center_hidden"]:
                hidden = hidden - hidden.mean(1, keepdim=True)
            with torch.no_grad():
                one["z"] = head(hidden)  # (P, G, D) -> (P, G, E)
        found[name] = {kind: flat_rows(values) for kind, values in one.items()}
    return found


def parser() -> argparse.ArgumentParser:
    p = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs of train.py, or any causal LM")
    p.add_argument("--redraw", type=Path, metavar="FILE", help="a tsne.npz: draw it again")
    p.add_argument("--data", help="toy (its P1), gsm8k, math, ... or a file (default: the first run's, else gsm8k)")
    p.add_argument("--questions", type=int, default=8, metavar="N", help="(default: 8)")
    p.add_argument("--samples", type=int, default=24, metavar="N", help="rollouts of each (default: 24)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: 48 on the toy world, else 512)")
    p.add_argument("--perplexity", type=float, default=20, help="of t-SNE (default: 20)")
    p.add_argument("--seed", type=int, default=0, help="of the rollouts and of t-SNE (default: 0)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="(default: the last run's, else this one)")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    p.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, help="(default: on a GPU where they work)")
    return p


def run(given: argparse.Namespace) -> None:
    """Sample, embed, save, draw. Raises UserError."""
    check_numbers(vars(given), dict.fromkeys(("questions", "samples", "max_new_tokens", "perplexity"), 1))
    if given.questions * given.samples < FEWEST:
        few = f"{given.questions * given.samples} rollouts are too few for a picture"
        raise UserError(f"{few}; expected {FEWEST} or more")
    check_numbers(vars(given), {"seed": 0}, MOST_SEED)
    if bool(given.runs) == bool(given.redraw):
        raise UserError("expected either runs (or models) or --redraw with a tsne.npz")
    if given.redraw:
        points, out = given.redraw, given.out or given.redraw.parent
        out.mkdir(parents=True, exist_ok=True)
    else:
        settings = folder.read_settings(Path(given.runs[0])) or {"data": "gsm8k"}
        data = given.data or settings["data"]
        given.max_new_tokens = given.max_new_tokens or (48 if data == "toy" else 512)
        if data == "toy":  # stories on which the friend is right about two times in three
            problems = stories(f"t-SNE {given.seed}", LEVELS["P1"], given.questions)
        else:
            problems = load_problems(data)[: given.questions]
        last = Path(given.runs[-1])
        out = given.out or (last if last.is_dir() else Path())
        out.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
        points = out / "tsne.npz"
        save_points(panels(given.runs, problems, given), points)
    found = load_points(points)  # also what was just made: it is rounded, and --redraw shall give the same picture
    for name, by_question in (("tsne.png", False), ("tsne-questions.png", True)):
        draw(found, out / name, perplexity=given.perplexity, seed=given.seed, by_question=by_question)
        print(out / name)


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return status_of(lambda: run(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
