"""Rollouts as points: the numbers of a panel, its picture, and the file that holds both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from border import UserError
from run.folder import plain


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


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def flat(points: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE in two dimensions from a PCA start, the same for all panels: (B, width) -> (B, 2).

    Equal points are one place. scikit-learn would divide by their spread, and its search of the NaN reads wild memory.
    """
    if np.ptp(points, axis=0).max() <= 1e-6 * np.abs(points).max():
        return np.zeros((len(points), 2))
    perplexity = min(perplexity, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=seed).fit_transform(points)


def gathered(points: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equal rollouts as one dot: which rollout stands for each dot, where it is, and how many it is.

    points (B, width), their places xy (B, 2) -> (dots,), (dots, 2), (dots,). t-SNE moves equal points apart.

    >>> points, xy = np.array([[1, 0], [0, 1], [1, 0]]), np.array([[2.0, 2.0], [5.0, 5.0], [4.0, 2.0]])
    >>> [values.tolist() for values in gathered(points, xy)]
    [[1, 0], [[5.0, 5.0], [3.0, 2.0]], [1, 2]]
    """
    _, first, dot, count = np.unique(points, axis=0, return_index=True, return_inverse=True, return_counts=True)
    places = np.zeros((len(first), 2))
    np.add.at(places, dot.ravel(), xy)
    return first, places / count[:, None], count


def draw(found: dict[str, dict], file: Path, *, perplexity: float, seed: int, by_question: bool) -> None:
    """A panel for each model and space; by verdict, or a colour for each question. A dot's area is how many it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    captions = {(row["model"], row["space"]): row for row in scores(found)}
    figure, axes = plt.subplots(
        len(SPACES), len(found), figsize=(3.2 * len(found), 6.8), layout="constrained", squeeze=False
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
    aside = file.with_name(f"{file.stem}.new.png")
    figure.savefig(aside, dpi=110)
    aside.replace(file)  # nothing is written through a link
    plt.close(figure)


def save_points(found: dict[str, dict], file: Path) -> None:
    """All that the picture is drawn from; float16 is finer than a point."""
    flat_names = {f"{name}/{kind}": values for name, one in found.items() for kind, values in one.items()}
    half = {n: v.astype(np.float16) if v.dtype == np.float32 else v for n, v in flat_names.items()}
    aside = file.with_name(f"{file.stem}.new.npz")
    np.savez_compressed(aside, **half)
    aside.replace(file)


def load_points(file: Path) -> dict[str, dict]:
    """What `save_points` wrote. Raises UserError."""
    found: dict[str, dict] = {}
    try:
        with np.load(plain(file)) as points:
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
        return fits and bool((np.abs(values) < 1e15).all())  # their squares' sums are float32 too; NaN is not below
    return values.ndim == 1 and values.dtype == {"right": bool, "sound": bool, "question": np.int64}.get(kind)
