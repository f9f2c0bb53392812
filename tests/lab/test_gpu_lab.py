"""lab.gpu: what there is to measure, what a stopped or failed run leaves, and what a decode step may not do."""

import json
from dataclasses import replace

import pytest
import torch

from lab import gpu
from lab.bench.machine import Machine, compare
from lab.bench.waits import WATCHED, waits_table
from lab.gpu import Piece

real_pieces = gpu.PIECES


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Runs the command with three pieces that note when they run; the second fails while `broken` holds anything."""
    ran, broken = [], [True]

    def piece(name):
        def measure(machine):
            ran.append(name)
            if name == "two" and broken:
                raise RuntimeError("no luck\nand more lines")
            return [{"what": name, "side": "ours"}]

        return Piece(f"the piece {name}", 1, measure)

    def run(*arguments):
        ran.clear()
        return gpu.main([*arguments, "--out", str(tmp_path / "results" / "gpu.json")])

    run.ran, run.broken, run.file = ran, broken, tmp_path / "results" / "gpu.json"
    monkeypatch.setattr(gpu, "PIECES", {name: piece(name) for name in ("one", "two", "two-more")})
    cpu = Machine(torch.device("cpu"), torch.float32, runs=1, quick=False)
    monkeypatch.setattr(gpu, "machine_here", lambda quick: cpu)
    return run


def test_every_piece_is_planned_and_takes_less_than_eight_minutes(capsys):
    assert gpu.main(["--plan"]) == 0
    plan = capsys.readouterr().out
    assert all(f"{name} " in plan and 0 < piece.minutes < 8 for name, piece in gpu.PIECES.items())
    assert "estimated and not measured" in plan
    first = list(gpu.PIECES)[: list(gpu.PIECES).index("rollouts-0.5B-512-eager") + 1]
    assert sum(gpu.PIECES[name].minutes for name in first) <= 5  # does it run, is it exact, how fast


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_one_line(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no GPU is here; expected a CUDA device; `--plan`") and said.count("\n") == 1


def test_an_unknown_piece_gets_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["rates", "nothing"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: unknown piece 'nothing'; expected some of: rates, exact")
    assert said.count("\n") == 1


def test_in_some_minutes_what_is_worth_most_comes_first_and_what_does_not_fit_is_left_out(lab, monkeypatch, capsys):
    assert set(gpu.FIRST) <= set(real_pieces)
    lab.broken.clear()
    monkeypatch.setattr(gpu, "FIRST", ("two-more", "two"))
    now, pieces = [0.0], gpu.PIECES
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    for name, piece in pieces.items():  # each takes its minute, and a half

        def measure(machine, work=piece.measure):
            now[0] += 90
            return work(machine)

        pieces[name] = replace(piece, measure=measure)
    assert lab("--minutes", "3") == 0 and lab.ran == ["two-more", "two"]
    assert "one: left out, it takes some 1 minutes and 0.0 are left" in capsys.readouterr().out
    assert lab("--minutes", "1") == 0 and lab.ran == ["one"]
    with pytest.raises(SystemExit):
        lab("--minutes", "0")
    assert "error: --minutes is 0.0; expected a number above 0" in capsys.readouterr().err


def test_a_piece_that_fails_is_recorded_and_only_it_runs_again(lab, capsys):
    assert lab() == 1 and lab.ran == ["one", "two", "two-more"]
    assert capsys.readouterr().err.endswith(f"error: failed: two; their reasons stand in {lab.file}\n")
    saved = json.loads(lab.file.read_text())
    assert saved["pieces"]["two"]["failed"] == "RuntimeError: no luck"
    assert saved["pieces"]["one"]["rows"] == [{"what": "one", "side": "ours"}]
    assert {"device", "driver", "torch", "transformers"} == set(saved["machine"])
    assert {"commit", "command", "seconds"} < set(saved["pieces"]["one"])
    lab.broken.clear()
    assert lab() == 0 and lab.ran == ["two"]
    assert lab() == 0 and lab.ran == []


def test_pieces_that_are_named_run_again_and_so_do_those_that_begin_so(lab):
    lab.broken.clear()
    assert lab("one") == 0 and lab() == 0 and lab.ran == ["two", "two-more"]
    assert lab("two") == 0 and lab.ran == ["two", "two-more"]
    assert lab("two-more") == 0 and lab.ran == ["two-more"]


def test_a_piece_may_be_impossible_on_what_takes_a_gpus_place(lab, monkeypatch):
    def fail(machine):
        raise RuntimeError("no kernel here")

    quick = Machine(torch.device("cpu"), torch.float32, runs=1, quick=True)
    monkeypatch.setattr(gpu, "machine_here", lambda quick_wanted: quick)
    monkeypatch.setattr(gpu, "PIECES", {"one": Piece("", 1, fail, tried=False)})
    assert lab("--quick") == 0
    saved = json.loads(lab.file.read_text())
    assert saved["pieces"]["one"]["not run here"] == "RuntimeError: no kernel here" and "quick" in saved["machine"]


@pytest.mark.parametrize("text", ["", "[]", '{"machine": {}}', '{"machine": {}, "pieces": {"one": 3}}'])
@pytest.mark.parametrize("option", [[], ["--draw"]])
def test_a_file_that_is_no_result_gets_one_line(lab, text, option, capsys):
    lab.file.parent.mkdir()
    lab.file.write_text(text)
    assert lab(*option) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {lab.file} cannot be read (") and said.count("\n") == 1
    assert lab.file.read_text() == text and not lab.ran


def test_numbers_of_another_machine_are_left_alone(lab, capsys):
    lab.file.parent.mkdir()
    lab.file.write_text(json.dumps({"machine": {"device": "another"}, "pieces": {}}))
    assert lab() == 2
    assert "holds numbers of {'device': 'another'}" in capsys.readouterr().err


def test_a_hand_made_file_is_drawn_with_goals_beside(tmp_path, capsys):
    rows = [{"side": "ours", "ratio": "1x"}, {"side": "generate", "ratio": "15x"}]
    pieces = {
        "rollouts-0.5B-512-eager": {"rows": rows, "seconds": 1, "commit": "abc", "command": "c"},
        "profile": {"failed": "RuntimeError: no kernel", "seconds": 1, "commit": "abc", "command": "c"},
    }
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"machine": {"device": "H100"}, "pieces": pieces}))
    assert gpu.main(["--draw", "--out", str(file)]) == 0
    drawn = capsys.readouterr().out
    assert "| ours | 1x | 40% of the floor |\n| generate | 15x | 10x |" in drawn
    assert "`profile`: could not be measured (RuntimeError: no kernel)" in drawn
    assert "`toy`: not measured yet" in drawn and "commit abc" in drawn and "device H100" in drawn


def test_no_round_of_runs_begins_that_would_end_too_late():
    calls = []
    late = Machine(torch.device("cpu"), torch.float32, runs=5, quick=True, until=0.0)
    times = compare(late, {"a": calls.append, "b": calls.append})
    assert calls == [-1, -1, 0, 0] and len(times["a"]) == len(times["b"]) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_decode_step_on_a_gpu_waits_for_nothing_and_copies_nothing():
    rows = waits_table(Machine(torch.device("cuda"), torch.bfloat16, runs=1, quick=True))
    steps = [row for row in rows if row["what"] == "decode step"]
    assert [(row["line"], row["waits"], row["copies to it"]) for row in steps] == [("nowhere", 0, 0)]
    assert {row["what"] for row in rows} == set(WATCHED)
    assert sum(row["waits"] for row in rows if row["what"] == "look") <= 2


def test_tests_that_take_too_long_are_stopped_and_it_is_said(monkeypatch):
    monkeypatch.setattr(gpu, "MINUTES", 0.02)
    with pytest.raises(RuntimeError, match=r"^stopped after 0.02 minutes: no failed test is named$"):
        gpu.gpu_tests(Machine(torch.device("cpu"), torch.float32, runs=1, quick=True))
