"""tsne.py: its numbers against plain loops, its pictures from a real run."""

import math

import numpy as np
import processes
import pytest
from conftest import ROOT

from run import points as run_points


def command(script, *arguments):
    return processes.run(ROOT / script, *arguments)


def cosine_distance(a, b):
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.fixture
def cloud():
    """40 points, 4 questions; question 3 has one wrong rollout only, which says nothing about the silhouette."""
    draw = np.random.default_rng(0)
    question = np.arange(40) % 4
    right = draw.random(40) < 0.6
    right[question == 3] = True
    right[3] = False
    return draw.normal(size=(40, 5)) + right[:, None], right, question


def test_silhouette_against_its_definition(cloud):
    points, right, question = cloud
    per_question = []
    for q in range(3):
        rows = [i for i in range(40) if question[i] == q]
        values = []
        for i in rows:
            distance = {
                kind: [cosine_distance(points[i], points[j]) for j in rows if j != i and right[j] == kind]
                for kind in (True, False)
            }
            own = sum(distance[right[i]]) / len(distance[right[i]])
            other = sum(distance[not right[i]]) / len(distance[not right[i]])
            values.append((other - own) / max(own, other))
        per_question.append(sum(values) / len(values))
    assert run_points.silhouette(points, right, question) == pytest.approx(sum(per_question) / 3)
    assert run_points.silhouette(points, np.ones(40, dtype=bool), question) is None


def test_purity_against_its_definition(cloud):
    points, right, question = cloud
    shares = []
    for i in np.flatnonzero(right):
        others = sorted((j for j in range(40) if j != i), key=lambda j: cosine_distance(points[i], points[j]))[:10]
        shares.append(sum(right[j] and question[j] == question[i] for j in others) / 10)
    assert run_points.purity(points, right, question) == pytest.approx(sum(shares) / len(shares))
    assert run_points.purity(points, np.zeros(40, dtype=bool), question) is None


def test_purity_where_points_coincide():
    """A point's nearest neighbour is not always itself: it must be left out by its row, not by its place."""
    points, right, question = np.ones((6, 2)), np.ones(6, dtype=bool), np.array([0, 0, 0, 0, 0, 0])
    assert run_points.purity(points, right, question, neighbours=5) == 1


def test_pictures_of_a_real_run_and_the_same_again_without_a_model(tmp_path):
    run = tmp_path / "run"
    done = command(
        "train.py", "--warm-start-batches", 3, "--prompts-per-step", 2, "--samples-per-prompt", 4, "--steps", 1,
        "--head-warmup-steps", 0, "--test-stories", 5, "--max-new-tokens", 8, "--out", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command("tsne.py", run, "--questions", 3, "--samples", 6, "--max-new-tokens", 8, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    found = run_points.load_points(tmp_path / "a" / "tsne.npz")
    assert set(found) == {"before", "run"} and set(found["before"]) == {"hidden", "right", "sound", "question"}
    assert found["run"]["z"].shape == (18, 512) and found["run"]["question"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert np.linalg.norm(found["run"]["z"], axis=1) == pytest.approx(1, abs=1e-2)
    done = command("tsne.py", "--redraw", tmp_path / "a" / "tsne.npz", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    for name in ("tsne.png", "tsne-questions.png"):
        picture = (tmp_path / "a" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and picture == (tmp_path / "b" / name).read_bytes()
