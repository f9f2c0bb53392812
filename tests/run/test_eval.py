"""Evaluation: the statistics against plain counting, the command on real files and small random models."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DATA

import eval as evaluation
from run import evaluation as run_evaluation
from run import table as run_table
from run import warm_start as run_warm_start
from run.intervals import bootstrap, pass_at_k, wilson
from run.models import load_model
from run.scores import majority, paired_differences, summarise, table_of_benchmarks
from tasks import toy
from tasks.data import BENCHMARKS
from tasks.grading import are_correct


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy model after a few supervised batches: it writes answers, right and wrong."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "small", toy.make_tokenizer()
    model = run_warm_start.make_model("tiny", tokenizer, seed=0)
    run_warm_start.warm_start(model, tokenizer, seed=0, batches=50, batch_size=24)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments):
    return evaluation.main([str(a) for a in arguments])


def lines(out):
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---- statistics ----


@pytest.mark.parametrize("n, right", [(6, 0), (6, 1), (6, 4), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, right):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_majority():
    assert majority(["1", "2.0", "2", None, None, None], [False, True, True, False, False, False])
    assert not majority([None, None], [False, False])
    assert majority(["5", "6"], [True, False]) and not majority(["6", "5"], [False, True])  # the first of a tie
    assert majority(["$\\frac12$", "0.5", "1"], [True, True, False])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_intervals_hold_the_truth_about_95_times_in_100(p):
    draw = np.random.default_rng(1)
    samples = draw.random((400, 60)) < p
    for interval in (lambda s: wilson(int(s.sum()), len(s)), lambda s: bootstrap(s, resamples=400)):
        inside = np.mean([low <= p <= high for low, high in map(interval, samples)])
        assert (0.80 if p == 0.05 else 0.90) < inside < 0.99  # (the bootstrap is known to be short near 0)


def row(problem, correct, answers=None, **more):
    k = len(correct)
    return {
        "benchmark": "b", "problem": problem, "gold": "1", "correct": correct, "answers": answers or ["1"] * k,
        "lengths": [4] * k, "cut_off": [False] * k, "seconds": 0.5, **more,
    }  # fmt: skip


def test_summary_of_single_samples():
    rows = [row(0, [True], sound=[False]), row(1, [True], sound=[True]), row(2, [False], [None], sound=[False])]
    got = summarise(rows)
    assert got["pass@1"] == {"value": 2 / 3, "interval": list(wilson(2, 3))}
    assert got["process"]["value"] == 1 / 3 and got["lucky"]["value"] == 1 / 2
    assert got["no_answer"] == 1 / 3 and got["cut_off"] == 0 and got["response_length"] == 4
    assert got["tokens_per_second"] == pytest.approx(12 / 1.5)
    assert "maj@1" not in got


def test_summary_of_several_samples():
    rows = [row(0, [True, False, False, False], ["1", "2", "2", "3"]), row(1, [True, True, False, True])]
    got = summarise(rows)
    assert got["pass@1"]["value"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert got["maj@4"]["value"] == 1 / 2
    assert got["pass@2"]["value"] == pytest.approx((1 / 2 + 1) / 2) and got["pass@4"]["value"] == 1
    assert "pass@8" not in got


def test_paired_difference_and_mcnemar():
    before = [row(i, [i < 1]) for i in range(20)]
    after = [row(i, [1 <= i < 9]) for i in range(20)] + [row(99, [True])]  # the last one has no partner
    got = paired_differences(before, after)["b"]
    assert (got["problems"], got["gained"], got["lost"]) == (20, 8, 1)
    assert got["mcnemar_p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert got["difference"]["value"] == pytest.approx(7 / 20)
    low, high = got["difference"]["interval"]
    assert 0 < low < 7 / 20 < high
    assert paired_differences(before, before)["b"]["mcnemar_p"] == 1


def test_table_has_every_figure_in_both_forms():
    results = {"one": summarise([row(0, [True])]), "two": summarise([row(0, [True, False])])}
    text, markdown = table_of_benchmarks(results), table_of_benchmarks(results, markdown=True)
    assert "100.0 [20.7, 100.0]" in text and "maj@2" in text
    assert [line.count("|") for line in markdown.splitlines()] == [markdown.splitlines()[0].count("|")] * 4


# ---- the command ----


def test_toy_run_from_end_to_end(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, "--data", "toy", "--limit", 30, "--out", out, "--save-rollouts") == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert list(results) == ["toy P0", "toy liar", "toy P1", "toy P2", "toy NoOp"]
    assert table_of_benchmarks(results) in capsys.readouterr().out
    assert (out / "results.md").read_text().count("\n") == 7
    rows = lines(out)
    assert len(rows) == 5 * 30
    for level in results:
        mine = [r for r in rows if r["benchmark"] == level]
        stories = toy.stories_to_test(level.removeprefix("toy "), 30)
        assert [r["question"] for r in mine] == [story.question for story in stories]
        texts = [r["texts"][0] for r in mine]
        right, sound = are_correct(texts, [s.answer for s in stories]), list(map(toy.is_sound, stories, texts))
        assert [r["correct"][0] for r in mine] == right
        assert results[level]["pass@1"]["value"] == sum(right) / 30
        assert results[level]["process"]["value"] == sum(sound) / 30
    assert any(r["correct"][0] for r in rows) and not all(r["correct"][0] for r in rows)


def test_a_run_is_asked_in_its_own_world(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run")
    settings = {"model": str(folder), "data": "toy", "config": {}, "world": {"friend_right": [0.5] * 5}}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    options = ["--data", "toy", "--limit", 10, "--save-rollouts"]
    assert run(tmp_path / "run", *options) == 0
    there, usual = (toy.stories_to_test("P0", 10, toy.World(**dials)) for dials in ({"friend_right": (0.5,) * 5}, {}))
    asked = [row["question"] for row in lines(tmp_path / "run" / "eval") if row["benchmark"] == "toy P0"]
    assert asked == [story.question for story in there] != [story.question for story in usual]
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {"world": {"luck": 1}}))
    capsys.readouterr()
    assert run(tmp_path / "run", *options, "--out", tmp_path / "again") == 2
    assert "settings.json has no toy world (luck is no dial; expected some of:" in capsys.readouterr().err


def test_the_toy_figures_are_those_that_training_prints(folder, tmp_path):
    assert run(folder, "--data", "toy", "--limit", 20, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    model, tokenizer = load_model(str(folder), "cpu")
    for level, counts in run_table.measure_levels(model, tokenizer, count=20).items():
        for metric, name in (("answer", "pass@1"), ("process", "process")):
            assert results[f"toy {level}"][name]["value"] == counts[metric][0] / counts[metric][1]


SAMPLED = (
    "--data", "toy", "--limit", 5, "--samples", 3, "--temperature", 1, "--max-batch", 2, "--max-new-tokens", 20,
    "--save-rollouts",
)  # fmt: skip


def test_a_stopped_evaluation_goes_on_as_if_it_had_not_been(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(folder, *SAMPLED, "--out", whole) == 0
    rows = without_time(lines(whole))
    assert len(rows) == 25 and len({tuple(r["texts"]) for r in rows}) == 25
    for kept in (0, 1, 7, 25):  # nothing; within a chunk of two; in the second level; all
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(whole, cut)
        text = (whole / "rollouts.jsonl").read_text().splitlines(keepends=True)
        torn = text[kept][:30] if kept < 25 else ""
        (cut / "rollouts.jsonl").write_text("".join(text[:kept]) + torn)
        assert run(folder, *SAMPLED, "--out", cut, "--resume") == 0
        assert without_time(lines(cut)) == rows


def test_regrade_makes_the_table_again_and_sees_another_gold(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, *SAMPLED, "--out", out) == 0
    first = capsys.readouterr().out
    assert run("--regrade", out / "rollouts.jsonl") == 0
    assert capsys.readouterr().out.strip() in first
    rows = lines(out)
    for r in rows:
        r["gold"] = "nothing says this"
    (out / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert run("--regrade", out / "rollouts.jsonl") == 0
    again = capsys.readouterr().out
    assert again.strip() not in first and " 0.0 [0.0, 0.0]" in again


def test_comparison_of_two_runs(folder, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for out, seed in ((a, 0), (b, 1)):
        assert run(folder, *SAMPLED, "--out", out, "--seed", seed) == 0
    capsys.readouterr()
    assert run("--compare", a, b) == 0
    shown = capsys.readouterr().out
    assert all(level in shown for level in run_evaluation.TOY_LEVELS) and "McNemar" in shown
    assert run("--compare", a, tmp_path) == 2
    assert "holds no evaluation; run python eval.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gsm8k_test.parquet", "math500_test.parquet"])
def test_real_problems_with_a_small_random_model(folder, tmp_path, name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not at hand")
    out = tmp_path / "out"
    given = ("--data", DATA / name, "--limit", 8, "--samples", 2, "--temperature", 0.6, "--top-p", 0.95)
    assert run(folder, *given, "--max-new-tokens", 12, "--out", out) == 0
    rows = lines(out)
    assert len(rows) == 8 and all(len(r["correct"]) == 2 and "texts" not in r for r in rows)
    assert json.loads((out / "results.json").read_text())["results"][str(DATA / name)]["problems"] == 8


def test_a_prompt_that_leaves_no_room_counts_as_unanswered(folder, tmp_path):
    file, out = tmp_path / "two.jsonl", tmp_path / "out"
    questions = ["Tom has 3 coins. " * 60, "Tom has 3 coins."]
    file.write_text("".join(json.dumps({"question": q, "answer": "3"}) + "\n" for q in questions))
    assert run(folder, "--data", file, "--max-new-tokens", 10, "--out", out) == 0
    first, second = lines(out)
    assert first["lengths"] == [0] and first["correct"] == [False] and first["cut_off"] == [True]
    assert second["lengths"][0] > 0


def test_a_benchmark_that_cannot_be_loaded_gets_a_line_and_the_others_run(folder, tmp_path, capsys):
    out = tmp_path / "out"
    missing = tmp_path / "missing.jsonl"
    assert run(folder, "--data", missing, "toy", "--limit", 2, "--out", out) == 2
    assert capsys.readouterr().err.count(f"error: {missing} is no file") == 1
    assert len(lines(out)) == 2 * len(toy.LEVELS)


def test_every_benchmark_has_a_protocol():
    assert {run_evaluation.track_of(name) for name in BENCHMARKS} == {"gsm8k", "math"}
    given = evaluation.parser().parse_args(["x", "--data", "toy", "math500", "gsm8k", "--max-new-tokens", "9"])
    settings = run_evaluation.settings_from("x", given, torch.device("cpu"))
    assert settings.decoding_for("toy P1") == run_evaluation.Decoding(1, 0.0, 1.0, 9)
    assert settings.decoding_for("math500") == run_evaluation.Decoding(16, 0.6, 0.95, 9)
    assert settings.decoding_for("gsm8k") == run_evaluation.Decoding(1, 0.0, 1.0, 9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no model is given"),
        (["MODEL"], "no --data is given, and"),
        (["MODEL", "--data", "gsm9k"], "--data names 'gsm9k'; expected some of: toy, gsm8k,"),
        (["MODEL", "--data", "toy", "--samples", "0"], "--samples is 0; expected 1 or more"),
        (["MODEL", "--data", "toy", "--temperature", "nan"], "--temperature is nan; expected 0 or more"),
        (["MODEL", "--data", "toy", "--top-p", "0"], "--top-p is 0.0; expected a number in (0, 1]"),
        (
            ["MODEL", "--data", "toy", "--max-new-tokens", "300"],
            "--max-new-tokens is 300, but the model has 256 positions",
        ),
        (["MODEL", "MODEL", "--data", "toy", "--out", "x"], "--out is given with 2 models"),
        (["/nowhere", "--data", "toy"], "model /nowhere could not be opened"),
        (["--regrade", "/nowhere.jsonl"], "holds no texts"),
    ],
)
def test_mistakes_get_one_clear_line(folder, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    assert run(*[copied if a == "MODEL" else a for a in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_nothing_is_overwritten_and_other_settings_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, *SAMPLED, "--out", out) == 0
    before = (out / "rollouts.jsonl").read_text()
    assert run(folder, *SAMPLED, "--out", out) == 2
    assert "already holds an evaluation" in capsys.readouterr().err
    assert run(folder, *SAMPLED, "--seed", 5, "--out", out, "--resume") == 2
    assert "was begun with another seed" in capsys.readouterr().err
    assert (out / "rollouts.jsonl").read_text() == before


def test_a_mistake_leaves_no_folder_that_blocks_the_next_try(folder, tmp_path):
    given = (folder, "--data", "toy", "--limit", 2, "--out", tmp_path / "out")
    assert run(*given, "--max-new-tokens", 300) == 2
    assert run("/nowhere", *given[1:]) == 2
    assert run(*given) == 0


def test_a_model_that_cannot_be_served_is_refused(folder, tmp_path, monkeypatch, capsys):
    def refuse(model):
        raise NotImplementedError("it cannot be served by KVCache")

    monkeypatch.setattr(evaluation, "check_model", refuse)
    assert run(folder, "--data", "toy", "--out", tmp_path / "out") == 2
    assert "it cannot be served by KVCache" in capsys.readouterr().err
