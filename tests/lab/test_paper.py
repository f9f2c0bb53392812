"""The paper in miniature: its statistics by hand, its runs for real, its committed tables from the committed lines."""

import json

import processes
import pytest
import torch
from conftest import ROOT

import clipo
from config import INFORMATIVE, CLIPOConfig
from lab import arms, figures, paper, runs, tables
from lab.runs import Run
from tasks import toy

RESULTS = ROOT / "results"


def command(*arguments):
    return processes.run("-m", "lab.paper", *arguments, cwd=ROOT)


def test_equal_runs_have_equal_keys():
    assert Run("train", 0, {"a": 1, "b": 2}).key == Run("train", 0, {"b": 2, "a": 1}).key
    worlds = {"sound_demos": 0.7}, {"demo_clauses": (1, 2, 3, 4, 4)}, {"demo_clauses": [1, 2, 3, 4, 4]}, {}
    assert len({Run("train", 0, world=world).key for world in worlds}) == 1  # what is not said is as usual
    assert Run("train", 0, world={"sound_demos": 0.6}).key != Run("train", 0).key
    assert len({Run("train", 0).key, Run("train", 1).key, Run("start", 0).key, Run("train", 0, batches=3).key}) == 4


def test_a_run_is_known_by_all_that_decides_its_numbers():
    usual = arms.CLIPO.run(3)
    assert CLIPOConfig.for_track("toy", seed=3, **usual.config) == CLIPOConfig.for_track("toy", seed=3)
    assert toy.World.changed(usual.world) == toy.WORLD
    repeats = arms.Arm({"samples_per_prompt": 16}, world={"slips": toy.World().slips})
    assert repeats.run(3) == usual != arms.Arm(world={"slips": 0.1}).run(3)
    assert (usual.doubled, arms.CLIPO.run(3, steps=5).doubled, arms.SMALL["GRPO"].run(3).doubled) == (1, 1, 0)
    short = arms.Arm({"tau": 0.1}).run(3, steps=5)
    assert (short.config["tau"], short.config["steps"], short.batches, short.stories) == (0.1, 5, 10, 10)


def test_without_a_contrastive_reward_its_form_makes_no_other_run():
    assert arms.GRPO.run(3) == arms.Arm(arms.PAPER | arms.LONGER | arms.WITHOUT).run(3)
    assert arms.GRPO.run(3) != arms.Arm(arms.WITHOUT | {"lr": 1e-5}).run(3)


def test_a_pretrained_model_has_a_warm_start_of_its_own(tmp_path, monkeypatch, capsys):
    run = arms.SMOLLM["CLIPO"].run(16)
    assert (run.size, run.batches, run.stories, run.start.size, run.start.batches) == (
        "smollm",
        600,
        200,
        "smollm",
        600,
    )
    asked = {}
    monkeypatch.setattr(runs, "warm_started", lambda *known, **named: asked.update(named) or tmp_path)
    monkeypatch.setattr(runs, "load_model", lambda folder, device: (folder, "tokenizer"))
    assert runs.open_start(run.start, tmp_path, torch.device("cpu"))[0] == str(tmp_path)
    assert asked["model"] == str(runs.PRETRAINED["smollm"])
    runs.open_start(Run("start", 16), tmp_path, torch.device("cpu"))
    assert asked["model"] is None

    monkeypatch.setitem(runs.PRETRAINED, "smollm", tmp_path / "nothing")
    with pytest.raises(SystemExit):
        paper.main(["smollm", "--out", str(tmp_path / "out")])
    assert "nothing is missing; expected a model there: python -m lab.smollm runs/smollm" in capsys.readouterr().err


def test_the_papers_arm_has_the_papers_constants_and_the_ladder_ends_at_ours():
    assert CLIPOConfig.for_track("toy", **arms.PAPER) == CLIPOConfig.for_track("toy", paper=True)
    assert arms.LADDER["paper's constants"].run(0) == arms.FORMS["paper's constants"].run(0)
    assert list(arms.LADDER.values())[-1].run(0) == arms.CLIPO.run(0)
    assert {name for change in arms.CHANGES.values() for name in change} == set(INFORMATIVE) - {"reward_ceiling"}
    assert INFORMATIVE["reward_ceiling"] == CLIPOConfig().reward_ceiling
    assert {name for name in arms.THREE if arms.THREE[name] != arms.PAPER[name]} == {
        "center_hidden", "reward_from_chance", "reward_floor",
    }  # fmt: skip


def test_every_arm_is_valid_and_compared_with_an_arm_of_its_own_table():
    for experiment in paper.EXPERIMENTS.values():
        for arm in experiment.arms.values():
            CLIPOConfig.for_track("toy", **arm.config)
            toy.World(**arm.world)
            assert arm.against is None or arm.against in experiment.arms
            if arm.against:  # the same world and size, or the difference says nothing about the method
                other, top = experiment.arms[arm.against], experiment.arms[arm.ceiling or arm.against]
                for name in ("world", "size", "batches"):
                    assert getattr(arm, name) == getattr(other, name) == getattr(top, name)
                assert top.trainer == "oracle" or not arm.ceiling


def line(seed, right):
    return {"seed": seed, "greedy": {"P2": {"answer": [right, 100]}}}


def test_the_share_of_the_way_is_of_the_means_over_the_seeds_that_all_have():
    lines = {"low": [line(0, 20), line(1, 30)], "us": [line(0, 70), line(1, 80), line(2, 0)]}
    assert tables.way(lines, "us", "low", "top", "P2", "answer") is None
    lines["top"] = [line(1, 90), line(0, 80)]
    assert tables.way(lines, "us", "low", "top", "P2", "answer") == pytest.approx(50 / 60)
    lines["top"] = [line(0, 20), line(1, 30)]  # a ceiling that is none
    assert tables.way(lines, "us", "low", "top", "P2", "answer") is None


def measured(seed, right, sampled=0):
    """A run's line, with so many right answers to 100 stories whose friend is wrong."""
    greedy = {"liar": {"answer": [right, 100], "patched": [5, 100]}, "P2": {"answer": [right, 100]}}
    greedy["sampled"] = {"process": [sampled, 100]}
    return {"seed": seed, "greedy": greedy, "greedy_twice": greedy}


def test_a_start_is_held_that_loses_no_more_than_ten_points():
    lines = {"warm start": [measured(0, 80, 40), measured(1, 70, 40)], "GRPO": [measured(0, 0), measured(1, 10)]}
    lines |= {"oracle": [measured(0, 90), measured(1, 80)], "CLIPO": [measured(0, 70, 70), measured(1, 58, 60)]}
    row = tables.counted("CLIPO", lines, "greedy")
    assert (row["held"], row["median"], row["mean (seeds)"]) == ("1 of 2", "64", "64 (70, 58)")
    assert row["minus the start's"].startswith("-11 [") and row["minus GRPO's"].startswith("+59 [")
    assert row["of the way, median"] == "73%"  # of 70 / 90 and 48 / 70
    assert (row["patched"], row["sampled sound"], row["steps"]) == ("5", "65 (70, 60)", tables.STEPS)
    start = tables.counted("warm start", lines, "greedy_twice")
    assert start["steps"] == 0 and start["held"] is None and start["sampled sound"] == "40 (40, 40)"
    assert tables.counts_table(dict.fromkeys(lines), lines).count("\n") == 1 + 1 + 2 * 3


def test_arms_whose_starts_differ_stand_each_beside_its_own():
    lines = {"start, GRPO": [measured(0, 80), measured(1, 70)], "start, CLIPO": [measured(1, 40), measured(0, 50)]}
    lines |= {"GRPO": [measured(0, 70, 20), measured(1, 59, 10)], "CLIPO": [measured(0, 60, 30)]}
    worlds = {"GRPO": arms.Arm(against=None), "CLIPO": arms.Arm()}
    ours = "50 (50) | 1 of 1 | 60 (60) | 5 (5) | 30 (30) | 1 of 1 | 60 (60) | 5 (5) | 30 (30) | -10 | -10"
    first, *rest = tables.worlds_table(worlds, lines).splitlines()[2:]
    assert first.startswith("| GRPO | 75 (80, 70) | 1 of 2 | 64 (70, 59) | 5 (5, 5) | 15 (20, 10) | 1 of 2 |")
    assert rest == [f"| CLIPO | {ours} |"]
    lines["CLIPO"] = []
    assert len(tables.worlds_table(worlds, lines).splitlines()) == 3


def test_clipo_start_by_start():
    run = measured(7, 64) | {
        "history": {"sound_share": [0.5] * 10 + [None] * 40 + [0.75] * 10 + [0.0] * 50 + [1.0] * 10,
                    "push_unsound": [-0.25] * 10 + [None, *[0.5] * 19] + [9.0] * 90},
    }  # fmt: skip
    row = tables.each_seed({"warm start": [measured(7, 80)], "CLIPO": [run]}).splitlines()[2]
    assert row == "| 7 | 80 | 64, 64 | 5, 5 | 50, 25, 0 | -0.25, 0.50 |"


def test_grpo_is_stopped_where_most_of_its_responses_are_sound():
    def line(process):
        return {"seed": 0, "history": {"process": process}}

    lines = {"GRPO": [line([0.0, *[0.5] * 5, 0.1, 0.0])], "CLIPO": [line([0.2] * 5 + [0.6] * 5)]}
    assert "GRPO in its best five steps 50, CLIPO in its last five 60; difference +10." in tables.early_stopping(lines)


def test_the_push_of_the_first_ten_steps():
    history = {"push_sound": [0.5] * 10 + [9.0] * 110, "push_unsound": [None, *[0.1] * 119]}
    assert tables.push([{"history": history, "doubled": 1}]) == pytest.approx(0.4)


def test_the_push_figure_has_every_start_of_every_arm_once(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(paper, "push_figure", lambda lines, file: seen.update(lines))
    assert paper.draw_push(tmp_path, runs.known_runs(ROOT / "results" / "runs.jsonl"))
    dots = [json.dumps([line[name] for name in ("config", "trainer", "world", "seed", "batches")], sort_keys=True)
            for part in seen.values() for line in part]  # fmt: skip
    assert len(dots) == len(set(dots)) > 200
    for arm in ("GRPO", "CLIPO"):
        assert {line["seed"] for line in seen[arm, True]} == {*range(32, 48), *range(1000, 1008)}
    assert all(line["world"]["forms"] == [1, 1, 1] for line in seen["others", False] if line["trainer"] == "same steps")


def test_what_a_frozen_policys_head_is_paid_by_hand():
    frozen, right = runs.Frozen(), torch.tensor([[True, True, False, False]])
    pairs = clipo.draw_pairs(right)
    loss, rc = torch.tensor([[0.0, 3.0, 9.0, 9.0]]), torch.tensor([[0.0, -0.5, 0.0, 0.0]])
    agreement = clipo.Agreement(None, pairs, loss, rc, None)
    calculated = torch.tensor([[True, False, True, False]])
    frozen.add(agreement, right, calculated & right, calculated, CLIPOConfig(), measured=False)
    assert frozen.gaps == []  # a step of the first third is told by itself alone
    frozen.add(agreement, right, calculated & right, calculated, CLIPOConfig(), measured=True)
    advantage = clipo.group_advantages(torch.tensor([[1.0, 0.5, 0.0, 0.0]]))[0]
    found = frozen.summary()
    assert found["calculated"] == pytest.approx(((advantage[0] + advantage[2]) / 2).item())
    assert found["copied"] == pytest.approx(((advantage[1] + advantage[3]) / 2).item())
    assert found["by_right"] == {"2": [1, pytest.approx(found["copied"] - found["calculated"])]}
    apart = pytest.approx((advantage[0] - advantage[1]).item(), rel=1e-4)
    assert found["on_floor"] == 0.5 and found["gap"] == apart and found["loss_by_step"] == [1.5, 1.5]
    assert found["gap_by_step"] == [apart, apart] and found["push_by_step"] == [apart, apart]


def test_no_run_begins_that_would_not_end_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "longest", 0.0)
    monkeypatch.setattr(runs, "execute", lambda run, *_: {"seconds": 30})
    now = runs.time.time()
    assert runs.attempt(Run("start", 0), tmp_path, "cpu", until=now + 10) == (
        {"seconds": 30},
        "",
    )  # nothing is known yet
    assert runs.attempt(Run("start", 1), tmp_path, "cpu", until=now + 10) == (None, "")
    assert runs.attempt(Run("start", 1), tmp_path, "cpu", until=now + 60) == ({"seconds": 30}, "")


def test_step_by_step_by_hand():
    steps = {name: [float(i) for i in range(8)] for name in ("push_by_step", "gap_by_step", "loss_by_step")}
    steps["gap_by_step"][5] = None  # a step without a group that has both
    parts = tables.by_step({"arms": {"ours": steps | {"copied": 0.5, "calculated": -0.25}}})
    assert parts[1].splitlines()[-1] == "| ours | +0.75 |"
    assert parts[3].splitlines()[-1] == "| ours | 0.00 | 1.00 | 2.00 | 3.00 | 1.50 | 5.50 |"
    assert parts[5].splitlines()[-1] == "| ours | 0.00 | 1.00 | 2.00 | 3.00 | 1.50 | 5.67 |"


def test_dots_of_equal_seeds_stand_beside_each_other():
    moved = figures.beside([0.3, 0.3, 0.3, 0.9, 0.302])
    assert len(set(zip([0.3, 0.3, 0.3, 0.9, 0.3], moved, strict=True))) == 5


def test_differences_are_paired_by_seed():
    lines = {"a": [line(0, 10), line(1, 50), line(2, 30)], "b": [line(1, 60), line(0, 30)]}
    assert tables.differences(lines, "b", "a", "P2", "answer") == pytest.approx([0.1, 0.2])


def test_payments_by_hand():
    """Two mixed groups; a third without unsound correct ones says nothing."""
    correct = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    sound = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    rc = torch.tensor([[0.1, 0.3, 0.0, 0.0], [0.4, 0.1, 0.0, 0.3], [0.9, 0.0, 0.0, 0.0]])
    reward = correct + rc
    got = runs.payments(rc, reward, correct, sound)
    std = [torch.tensor(rs).std().item() for rs in ([1.1, 1.3, 0.0, 0.0], [1.4, 1.1, 0.0, 1.3])]
    assert got == [
        (pytest.approx(1 / 2), pytest.approx((0.1 - 0.3) / std[0], rel=1e-4)),
        (pytest.approx(1 / 3), pytest.approx((0.4 - 0.2) / std[1], rel=1e-4)),
    ]
    advantage = clipo.group_advantages(reward)[1]
    assert got[1][1] == pytest.approx((advantage[0] - (advantage[1] + advantage[3]) / 2).item(), rel=1e-4)


def test_mean_cosine_against_a_loop():
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(4, 6, 5), dim=-1)
    correct = torch.rand(4, 6) < 0.7
    correct[3] = torch.arange(6) == 2  # one right rollout has no other
    per_group = []
    for g in range(4):
        rows = [i for i in range(6) if correct[g, i]]
        pairs = [float(z[g, i] @ z[g, j]) for i in rows for j in rows if i != j]
        per_group += [sum(pairs) / len(pairs)] if pairs else []
    assert len(per_group) == 3
    assert runs.mean_cosine(z, correct) == pytest.approx(sum(per_group) / len(per_group), rel=1e-4)
    assert runs.mean_cosine(z, torch.zeros(4, 6).bool()) is None


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """One seed of track1, two steps a run, from a warm start of three batches. Returns the results folder."""
    folder = tmp_path_factory.mktemp("paper")
    tiny = {"prompts_per_step": 4, "samples_per_prompt": 4, "head_warmup_steps": 1, "steps": 2}
    short = {"batches": 3, "stories": 2}
    wanted = [
        Run(
            "train",
            0,
            runs.all_settings(arm.config | tiny),
            {},
            trainer=arm.trainer,
            doubled=0 if arm.trainer else 1,
            **short,
        )
        for arm in [
            *arms.TRACK1.values(),
            arms.RIVALS["same steps"],
            arms.Arm(trainer="similar text"),
            arms.Arm(trainer="frozen start"),
        ]
    ]
    wanted.append(Run("frozen", 0, {"ours": tiny, "fixed": {**tiny, "head_steps": 0}}, {}, **short))
    runs.make(wanted, folder / "runs.jsonl", folder / "starts", workers=2, device="cpu")
    return folder, wanted


def test_runs_are_made_once_with_all_they_measure(trial):
    folder, wanted = trial
    known = runs.known_runs(folder / "runs.jsonl")
    assert set(known) == {run.key for run in wanted} | {wanted[0].start.key}
    before = (folder / "runs.jsonl").read_text()
    runs.make(wanted, folder / "runs.jsonl", folder / "starts", workers=2, device="cpu")
    assert (folder / "runs.jsonl").read_text() == before
    one = known[wanted[1].key]
    assert {"commit", "machine", "seconds", "seed", "config"} <= set(one)
    assert set(one["greedy"]) == set(one["greedy_twice"]) == {*toy.LEVELS, "sampled"}
    assert all(len(values) == 4 for values in one["history"].values())
    frozen = known[wanted[-1].key]
    assert set(frozen["arms"]) == {"ours", "fixed"} and 0 <= frozen["copied"] <= 1


def test_arms_of_a_seed_are_paired(trial):
    """In the first step every arm has the same model, the same stories and the same rollouts."""
    folder, wanted = trial
    known = runs.known_runs(folder / "runs.jsonl")
    usual = [run for run in wanted[:-1] if run.trainer != "oracle"]  # (whose accuracy is something else)
    first = [[known[run.key]["history"][name][0] for name in ("accuracy", "process")] for run in usual]
    assert all(values == first[0] for values in first)


def test_a_short_trial_of_the_command_asks_for_short_runs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(paper, "make", lambda wanted, *_: asked.extend(wanted))
    assert paper.main(["track1", "--seeds", "1", "--steps", "3", "--out", str(tmp_path)]) == 0
    assert asked == [arm.run(32, 3) for arm in arms.TRACK1.values()]
    assert {(run.batches, run.stories, run.config["steps"]) for run in asked} == {(10, 10, 3)}


def test_a_failed_run_is_reported_and_the_others_are_kept(tmp_path):
    short = {"batches": 1, "stories": 5}
    wanted = [Run("start", 0, **short), Run("train", 0, {"steps": -1}, **short)]
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 runs failed; the first:.*steps is -1; expected at least 1"):
        runs.make(wanted, tmp_path / "runs.jsonl", tmp_path / "starts", workers=1, device="cpu")
    assert len(runs.known_runs(tmp_path / "runs.jsonl")) == 1


def test_a_failed_picture_ends_the_command_with_its_reason(tmp_path, capfd):
    (tmp_path / "tsne.npz").write_bytes(b"no points")
    assert paper.main(["tsne", "--draw", "--out", str(tmp_path)]) == 1
    said = capfd.readouterr().err
    assert "tsne.npz cannot be read" in said and "error: tsne.py --redraw" in said and "Traceback" not in said


@pytest.mark.skipif(not (RESULTS / "runs.jsonl").exists(), reason="no committed runs")
def test_committed_tables_are_those_of_the_committed_lines(tmp_path):
    for name in ("runs.jsonl", "tsne.npz"):
        if (RESULTS / name).exists():
            (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    done = command("all", "--draw", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    tables, committed = (
        {file.name for pattern in ("*.md", "track1.json") for file in folder.glob(pattern)}
        for folder in (tmp_path, RESULTS)
    )
    assert tables == committed - {"soak.md", "grader.md"}
    for name in tables:
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), name
    assert {file.name for file in tmp_path.glob("*.png")} <= {file.name for file in RESULTS.glob("*.png")}
    if "track1.json" not in tables:
        return
    shown = json.loads((tmp_path / "track1.json").read_text())
    assert set(shown) == {level + end for level in toy.LEVELS for end in ("", "_twice")}
    lied = shown["liar"]
    assert lied["diff"] == pytest.approx(lied["clipo"] - lied["grpo"]) and lied["low"] < lied["diff"] < lied["high"]
    assert set(lied["held"]) == set(arms.TRACK1) and all(0 <= n <= lied["seeds"] for n in lied["held"].values())
    figures = shown["P2_twice"]["answer_greedy"]
    assert set(figures) == {"grpo", "clipo", "oracle", "shuffled", "diff", "low", "high", "share", "worst", "seeds"}
    assert figures["diff"] == pytest.approx(figures["clipo"] - figures["grpo"])


@pytest.mark.parametrize(
    "wrong, message", [(["nothing"], "invalid choice: 'nothing'"), (["track1", "--seeds", 0], "1 or more")]
)
def test_mistakes_get_one_line(wrong, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        paper.main(list(map(str, wrong)))
    assert message in capsys.readouterr().err
