"""What lab.majority counts, on lines by hand and of a real run."""

import json

import pytest

import train
from lab import majority
from lab.soak import SMALLEST


def test_a_row_for_every_so_many_steps(tmp_path, capsys):
    def rollout(correct, sound, advantage):
        return {"correct": correct, "sound": sound, "advantage": advantage}

    tie = [rollout(True, True, 0.5), rollout(True, False, -0.5), rollout(False, False, -9.0)]
    mostly = [rollout(True, True, -1.5), rollout(True, False, 0.75), rollout(True, False, 0.25)]
    lines = [{"step": step, "rollouts": group} for step, group in ((1, tie), (2, mostly), (3, mostly), (4, tie[2:]))]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert majority.main([str(tmp_path), "--window", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 1 to 2 | 2 | 50% | +0.50 | -0.50 |",
        "| 3 to 4 | 2 | 50% | +0.50 |  |",
    ]


def test_it_reads_what_train_wrote(tmp_path, capsys):
    assert train.main([*SMALLEST.split(), "--steps", "2", "--log-groups", "2", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert majority.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| 1 to 20 | 4 | ")


@pytest.mark.parametrize(
    "text, message", [(None, "has no groups"), ("{}\n", "line 1: it has no step"), ("x\n", "is no JSON")]
)
def test_what_is_no_toy_run_is_named(tmp_path, capsys, text, message):
    if text:
        (tmp_path / "rollouts.jsonl").write_text(text)
    assert majority.main([str(tmp_path)]) == 2 and message in capsys.readouterr().err
