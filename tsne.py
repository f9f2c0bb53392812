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
    from problems import one_line_for_ctrl_c

    one_line_for_ctrl_c()

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

import checkpoint
import toy
from clipo import ContrastiveHead, end_of_sequence_ids
from engine.rollouts import generate
from problems import SUFFIX, OptionParser, Problem, UserError, are_correct, load_problems, prompt_ids, status_of

# ----------------------------------------------------------------------------------------------------
# Numbers that belong to a panel
# ----------------------------------------------------------------------------------------------------


def silhouette(points: np.ndarray, right: np.ndarray, question: np.ndarray) -> float | None:
    """Silhouette of right against wrong among the rollouts of a question, cosine distance, mean over questions.

    points (B, width), right (B,) bool, question (B,). Questions without two of each say nothing; None if all are so.

    >>> points = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> silhouette(points, np.array([True, True, False, False]), np.zeros(4))
    1.0
    """
    scores = []
    for q in np.unique(question):
        here = question == q
        if min(right[here].sum(), (~right[here]).sum()) >= 2:
            scores.append(silhouette_score(points[here], right[here], metric="cosine"))
    return float(np.mean(scores)) if scores else None


def purity(points: np.ndarray, right: np.ndarray, question: np.ndarray, neighbours: int = 10) -> float | None:
    """Of the nearest neighbours of right rollouts, the share that are right answers to the same question.

    points (B, width), right (B,) bool, question (B,), cosine distance. None if no rollout is right.

    >>> points = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> purity(points, np.array([True, True, True, False]), np.array([0, 0, 1, 1]), neighbours=1)
    0.6666666666666666
    """
    if not right.any():
        return None
    search = NearestNeighbors(n_neighbors=min(neighbours + 1, len(points)), metric="cosine").fit(points)
    near = search.kneighbors(points[right], return_distance=False)
    rows = np.flatnonzero(right)
    shares = []
    for row, others in zip(rows, near, strict=True):
        others = [o for o in others if o != row][:neighbours]  # a point's first neighbour is mostly itself
        shares.append(np.mean([right[o] and question[o] == question[row] for o in others]))
    return float(np.mean(shares))


# ----------------------------------------------------------------------------------------------------
# Rollouts and their embeddings
# ----------------------------------------------------------------------------------------------------


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
    on_toy = isinstance(problems[0], toy.Story)
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
        found["sound"] = torch.tensor([toy.is_sound(story, text) for story, text in zip(asked, texts, strict=True)])
    return found


def flat_rows(values: torch.Tensor) -> np.ndarray:
    """(P, G, width) -> (B, width); what is (B,) stays so."""
    return (values.flatten(0, 1) if values.ndim == 3 else values).cpu().numpy()


def panels(models: Sequence[str], problems: Sequence[Problem], given: argparse.Namespace) -> dict[str, dict]:
    """{name: {"hidden" or "z", "right", "question", "sound"}} of each model, before them the first run's start."""
    device, found = checkpoint.device_from(given.device), {}
    first = checkpoint.read_settings(Path(models[0]))
    for name, source in [*([("before", first["model"])] if first else []), *((Path(m).name, m) for m in models)]:
        model, tokenizer = checkpoint.load_model(source, device)
        try:
            one = embed(model, tokenizer, problems, given)
        except (ValueError, NotImplementedError) as reason:
            raise UserError(f"model {source}: {reason}") from reason
        if name != "before" and (settings := checkpoint.read_settings(Path(source))):
            hidden = one["hidden"]
            head = load_head(Path(source), settings["config"], hidden.shape[-1], device)
            if settings["config"]["center_hidden"]:
                hidden = hidden - hidden.mean(1, keepdim=True)
            with torch.no_grad():
                one["z"] = head(hidden)  # (P, G, D) -> (P, G, E)
        found[name] = {kind: flat_rows(values) for kind, values in one.items()}
    return found


# ----------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------

CAPTION = (
    "A t-SNE picture alone proves nothing. Silhouette (right against wrong, within a question) and purity (10 nearest "
    "neighbours)\nare computed in the original space, with cosine distance. A number: so many rollouts in a dot."
)
FEWEST = 10  # points of a picture
SPACES = {"hidden": "mean hidden state h", "z": "the head's embedding z"}


def scores(found: dict[str, dict]) -> list[dict]:
    """The numbers of every panel."""
    return [
        {
            "model": name,
            "space": space,
            "silhouette": number(silhouette(one[space], one["right"], one["question"])),
            "purity": number(purity(one[space], one["right"], one["question"])),
            "right": f"{one['right'].mean():.2f}",
            "sound": f"{one['sound'].mean():.2f}" if "sound" in one else "",
        }
        for name, one in found.items()
        for space in SPACES
        if space in one
    ]


def flat(points: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE in two dimensions from a PCA start, the same for all panels: (B, width) -> (B, 2)."""
    perplexity = min(perplexity, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=seed).fit_transform(points)


def gathered(points: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equal rollouts as one dot: which rollout stands for each dot, where it is, and how many it is.

    points (B, width), their places xy (B, 2) -> (dots,), (dots, 2), (dots,). (t-SNE moves equal points apart a little.)

    >>> points, xy = np.array([[1, 0], [0, 1], [1, 0]]), np.array([[2.0, 2.0], [5.0, 5.0], [4.0, 2.0]])
    >>> [values.tolist() for values in gathered(points, xy)]
    [[1, 0], [[5.0, 5.0], [3.0, 2.0]], [1, 2]]
    """
    _, first, dot, count = np.unique(points, axis=0, return_index=True, return_inverse=True, return_counts=True)
    places = np.zeros((len(first), 2))
    np.add.at(places, dot.ravel(), xy)
    return first, places / count[:, None], count


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def draw(found: dict[str, dict], file: Path, *, perplexity: float, seed: int, by_question: bool) -> None:
    """A panel for each model and space; by verdict, or a colour for each question. A dot's area is how many it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    captions = {(row["model"], row["space"]): row for row in scores(found)}
    figure, axes = plt.subplots(
        len(SPACES), len(found), figsize=(4.2 * len(found), 8.4), layout="constrained", squeeze=False
    )
    for row, (space, title) in zip(axes, SPACES.items(), strict=True):
        for axis, (name, one) in zip(row, found.items(), strict=True):
            axis.set(xticks=[], yticks=[], title=f"{name}: {title}".replace("$", "\\$"))  # no formula
            if space not in one:
                axis.text(0.5, 0.5, "no head", ha="center", transform=axis.transAxes)
                continue
            first, xy, count = gathered(one[space], flat(one[space], perplexity, seed))
            right, question = one["right"][first], one["question"][first]
            sound = one["sound"][first] if "sound" in one else np.ones_like(right)
            for is_right, is_sound, marker, colour, label in (
                (True, True, "o", "tab:blue", "right, sound" if "sound" in one else "right"),
                (True, False, "^", "tab:orange", "right by wrong steps"),
                (False, True, "x", "0.55", "wrong" if "sound" not in one else None),
                (False, False, "x", "0.55", "wrong"),
            ):
                here = (right == is_right) & (sound == is_sound)
                if here.any():
                    colours = (
                        {"c": question[here], "cmap": "tab20", "vmin": 0, "vmax": 19}
                        if by_question
                        else {"color": colour}
                    )
                    axis.scatter(*xy[here].T, s=16 * count[here], marker=marker, label=label, alpha=0.7, **colours)
            for place, n in zip(xy[count > 2], count[count > 2], strict=True):
                axis.annotate(str(n), place, ha="center", va="center", fontsize=7)
            caption = captions[name, space]
            axis.set_xlabel("silhouette {silhouette}, purity {purity}; {right} right".format(**caption))
    figure.suptitle(CAPTION, fontsize=10)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    figure.savefig(file, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


def save_points(found: dict[str, dict], file: Path) -> None:
    """All that the picture is drawn from; float16 is finer than a point."""
    flat_names = {f"{name}/{kind}": values for name, one in found.items() for kind, values in one.items()}
    half = {n: v.astype(np.float16) if v.dtype == np.float32 else v for n, v in flat_names.items()}
    np.savez_compressed(file, **half)


def load_points(file: Path) -> dict[str, dict]:
    """What `save_points` wrote. Raises UserError."""
    found: dict[str, dict] = {}
    try:
        with np.load(file) as points:
            arrays = {key: points[key] for key in points}
    except Exception as reason:  # numpy and zipfile raise a dozen classes for what is no .npz, or a broken one
        raise UserError(f"{file} cannot be read; expected a tsne.npz that this command wrote") from reason
    for key, values in arrays.items():
        name, _, kind = key.rpartition("/")
        found.setdefault(name, {})[kind] = values.astype(np.float32) if values.dtype == np.float16 else values
    for name, one in found.items():
        if not {"hidden", "right", "question"} <= set(one) or not all(map(is_points, one, one.values())):
            wrong = f"the arrays of {name!r} are no points with verdicts" if name else "its arrays have no model's name"
            raise UserError(f"{file}: {wrong}; expected a tsne.npz that this command wrote")
        if len({len(values) for values in one.values()}) > 1:
            raise UserError(f"{file}: the arrays of {name!r} are not equally long; expected all of one picture")
    if not found:
        raise UserError(f"{file} is empty; expected a tsne.npz that this command wrote")
    return found


def is_points(kind: str, values: np.ndarray) -> bool:
    """Is an array of a tsne.npz what its name says: points (B, width), or (B,) of verdicts or numbers?"""
    if kind in SPACES:
        fits = values.ndim == 2 and len(values) >= FEWEST and values.shape[1] > 1 and values.dtype == np.float32
        return fits and bool(np.isfinite(values).all())
    return values.ndim == 1 and values.dtype == {"right": bool, "sound": bool, "question": np.int64}.get(kind)


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
    for option in ("questions", "samples", "max_new_tokens", "perplexity"):
        if (value := getattr(given, option)) is not None and not 1 <= value < math.inf:
            raise UserError(f"--{option.replace('_', '-')} is {value}; expected 1 or more")
    if given.questions * given.samples < FEWEST:
        few = f"{given.questions * given.samples} rollouts are too few for a picture"
        raise UserError(f"{few}; expected {FEWEST} or more")
    if not 0 <= given.seed < 2**32:
        raise UserError(f"--seed is {given.seed}; expected 0 to {2**32 - 1}")
    if bool(given.runs) == bool(given.redraw):
        raise UserError("expected either runs (or models) or --redraw with a tsne.npz")
    if given.redraw:
        points, out = given.redraw, given.out or given.redraw.parent
        out.mkdir(parents=True, exist_ok=True)
    else:
        settings = checkpoint.read_settings(Path(given.runs[0])) or {"data": "gsm8k"}
        data = given.data or settings["data"]
        given.max_new_tokens = given.max_new_tokens or (48 if data == "toy" else 512)
        if data == "toy":  # stories on which the friend is right about two times in three
            problems = toy.stories(f"t-SNE {given.seed}", toy.LEVELS["P1"], given.questions)
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
