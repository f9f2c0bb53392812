"""Promises under attack, in short; `python -m lab.attack NAME` is the long form."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import checkpoint
import toy
import train
from lab.attack import bits, signals
from problems import UserError


@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize("kind", ["the paper's", "with KL, two mini-batches"])
def test_two_threads_give_the_same_bits_every_time(engine, kind):
    """(With `keys[origin]` in engine/update.py, whose gradient adds in the order of the threads, they differ.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [bits.bits_of_a_run(engine, bits.KINDS[kind]) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    assert bits.first_difference(found) is None


def test_other_seeds_give_other_bits():
    """Or the test above could not fail."""
    a, b = (bits.bits_of_a_run("fast", {"seed": seed}, steps=1) for seed in (0, 1))
    assert a["warm start"] == b["warm start"] and bits.first_difference([a, b]) == "rollouts of step 1"


def test_a_warm_start_that_was_stopped_goes_on_to_the_same_bits():
    tokenizer = toy.make_tokenizer()

    def fresh():
        return toy.WarmStart(toy.make_model("tiny", tokenizer, 0), tokenizer, 0, batches=9, batch_size=8)

    whole, first, second = fresh(), fresh(), fresh()
    losses = [whole.batch() for _ in range(9)]
    for _ in range(4):
        first.batch()
    second.go_on_from({name: value.clone() for name, value in first.state().items()})
    assert [second.batch() for _ in range(5)] == losses[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_a_stop_asked_for_while_something_is_finished_waits_and_elsewhere_does_not():
    with train.StopAsked() as stop:
        with train.finishing(stop, "step"):
            stop(None, None)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                stop(None, None)  # once more
        stop.asked = False
        with pytest.raises(KeyboardInterrupt):
            stop(None, None)


def test_signals_at_random_moments_lose_nothing(capsys):
    assert signals.main(["--quick"]) == 0, capsys.readouterr().out


def test_a_message_that_is_not_true_is_found(tmp_path):
    out = tmp_path / "run"
    assert signals.what_is_wrong(130, "stopped in the warm start, after batch 3 of 9; it is kept", out)
    assert signals.what_is_wrong(130, "stopped; saved after step 4; to go on: ...", out)
    assert signals.what_is_wrong(1, "error", out) == "status 1"
    assert signals.what_is_wrong(130, "stopped; what was saved before stays", out) is None


def test_two_processes_do_not_write_one_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is being written by another process; expected another --out"):
        with checkpoint.only_one(tmp_path / "lock"):
            raise AssertionError("two have it")
    holder.kill()  # who dies lets go
    holder.wait()
    with checkpoint.only_one(tmp_path / "lock"):
        pass


def test_who_waits_for_a_lock_says_so_and_gets_it(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock"), "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with checkpoint.only_one(tmp_path / "lock", wait="waiting for it"):
        assert capsys.readouterr().err == "waiting for it\n"
    assert holder.wait() == 0


HOLD = """
import sys, time, pathlib, checkpoint
with checkpoint.only_one(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 600)
"""


def test_a_second_run_in_the_same_folder_is_refused_in_one_line(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert train.main(["--warm-start-batches", "500", "--out", str(out)]) == 2
    holder.kill()
    assert capsys.readouterr().err.startswith(f"error: {out} is being written by another process; expected another")
    assert [file.name for file in out.iterdir()] == ["lock"]
