"""Promises under attack, in short; `python -m lab.attack NAME` is the long form."""

import functools
import math
import subprocess
import sys

import processes
import pytest
import torch
from conftest import ROOT

import eval as evaluation
import train
import variants
from border import UserError
from lab.attack import __main__ as attack
from lab.attack import bits, signals
from run import folder as run_folder
from run import stopping
from run import warm_start as run_warm_start
from tasks import toy


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "engine, kind",
    [*((engine, kind) for engine in ("plain", "fast") for kind in ("the paper's", "the gsm8k track")),
     ("fast", "in bfloat16")],
)  # fmt: skip
def test_two_threads_give_the_same_bits_every_time(engine, kind, two_threads):
    """(With `keys[origin]` in engine/update.py, whose gradient adds in the order of the threads, they differ.)"""
    found = [bits.bits_of_a_run(engine, bits.KINDS[kind]) for _ in range(3)]
    assert bits.first_difference(found) is None


def test_a_run_resumed_on_two_threads_ends_in_the_same_bits(tmp_path, monkeypatch, two_threads):
    monkeypatch.setattr(toy, "are_correct", bits.half_right)
    begun = [*signals.RUN, "--engine", "fast", "--warm-start-batches", "3", "--prompts-per-step", "6"]
    begun += ["--samples-per-prompt", "16", "--max-new-tokens", "16", "--test-stories", "2"]
    for out, steps in (("whole", 3), ("parts", 2)):
        assert train.main([*begun, "--steps", str(steps), "--out", str(tmp_path / out)]) == 0
    resumed = ["--resume", "--out", str(tmp_path / "parts"), "--steps", "3", "--test-stories", "2"]
    assert train.main(resumed) == 0
    assert signals.result(tmp_path / "parts") == signals.result(tmp_path / "whole")


def test_other_seeds_give_other_bits():
    """Or the test above could not fail."""
    a, b = (bits.bits_of_a_run("fast", {"seed": seed}, steps=1) for seed in (0, 1))
    assert a["warm start"] == b["warm start"] and bits.first_difference([a, b]) == "rollouts of step 1"


def test_a_warm_start_that_was_stopped_goes_on_to_the_same_bits():
    tokenizer = toy.make_tokenizer()

    def fresh():
        return run_warm_start.WarmStart(
            run_warm_start.make_model("tiny", tokenizer, 0), tokenizer, toy.Demonstrator(0), batches=9, batch_size=8
        )

    whole, first, second = fresh(), fresh(), fresh()
    losses = [whole.batch() for _ in range(9)]
    for _ in range(4):
        first.batch()
    second.go_on_from({name: value.clone() for name, value in first.state().items()})
    assert [second.batch() for _ in range(5)] == losses[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


BATCHES = 8
warm_start = functools.partial(
    run_warm_start.warm_started, size="tiny", seed=0, batches=BATCHES, device=torch.device("cpu")
)  # of a folder of runs


@pytest.fixture(scope="module")
def warm_start_in_one_go(tmp_path_factory):
    return run_folder.checksum(warm_start(tmp_path_factory.mktemp("whole")) / "model.safetensors")


def before_batch(monkeypatch, number=None, act=None):
    """Call `act` before the warm start's batch of this number; the batches that are begun are listed."""
    monkeypatch.undo()
    begun, batch = [], run_warm_start.WarmStart.batch

    def watched(self):
        begun.append(self.done + 1)
        if begun[-1] == number:
            act()
        return batch(self)

    monkeypatch.setattr(run_warm_start.WarmStart, "batch", watched)
    return begun


def test_ctrl_c_in_a_warm_start_keeps_its_batches(tmp_path, monkeypatch, warm_start_in_one_go):
    with stopping.StopAsked() as stop:
        begun = before_batch(monkeypatch, 3, lambda: stop(None, None))
        with pytest.raises(KeyboardInterrupt, match=f"in the warm start, after batch 3 of {BATCHES}; it is kept, and"):
            warm_start(tmp_path, stop=stop)
    part = tmp_path / f"warm-start-tiny-seed0-{BATCHES}.part.safetensors"
    assert part.is_file() and begun == [1, 2, 3]
    begun = before_batch(monkeypatch)
    folder = warm_start(tmp_path)
    assert begun == [4, 5, 6, 7, 8]
    assert run_folder.checksum(folder / "model.safetensors") == warm_start_in_one_go and not part.exists()


def test_a_warm_start_that_ends_without_warning_goes_on_from_what_was_saved(
    tmp_path, monkeypatch, warm_start_in_one_go
):
    def killed():
        raise SystemError

    before_batch(monkeypatch, 5, killed)
    monkeypatch.setattr(run_warm_start, "SECONDS_AT_RISK", 0)
    monkeypatch.setattr(run_warm_start, "SHARE_OF_SAVING", math.inf)  # saved after each batch, however slow the disk is
    with pytest.raises(SystemError):
        warm_start(tmp_path)
    begun = before_batch(monkeypatch)
    folder = warm_start(tmp_path)
    assert begun == [5, 6, 7, 8]
    assert run_folder.checksum(folder / "model.safetensors") == warm_start_in_one_go


def test_a_stop_asked_for_while_something_is_finished_waits_and_elsewhere_does_not():
    with stopping.StopAsked() as stop:
        with stop.finishing("step"):
            stop(None, None)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                stop(None, None)  # once more
        stop.asked = False
        with pytest.raises(KeyboardInterrupt):
            stop(None, None)


def test_signals_at_random_moments_lose_nothing(capsys):
    def start(*arguments):
        return processes.Command(ROOT / "train.py", *arguments)

    assert signals.main(["--quick"], start=start) == 0, capsys.readouterr().out


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
        with run_folder.only_one(tmp_path / "lock"):
            raise AssertionError("two have it")
    holder.kill()  # who dies lets go
    holder.wait()
    with run_folder.only_one(tmp_path / "lock"):
        pass


def test_who_wants_a_warm_start_that_another_makes_waits_for_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / f"warm-start-tiny-seed0-{BATCHES}"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{folder}.lock", "1", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(run_warm_start, "make_warm_start", None)  # (cannot be called)
    assert warm_start(tmp_path) == folder and folder.is_dir()
    assert capsys.readouterr().err == f"{folder} is being made by another process: waiting for it\n"
    assert holder.wait() == 0


def test_who_waits_for_a_lock_says_so_and_gets_it(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock"), "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with run_folder.only_one(tmp_path / "lock", wait="waiting for it"):
        assert capsys.readouterr().err == "waiting for it\n"
    assert holder.wait() == 0


HOLD = """
import sys, time, pathlib
from run import folder
with folder.only_one(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 600)
    for made in sys.argv[3:]:
        pathlib.Path(made).mkdir()
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


def test_a_second_evaluation_in_the_same_folder_is_refused_in_one_line(tmp_path, capsys):
    tokenizer = toy.make_tokenizer()
    run_warm_start.make_model("tiny", tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "eval"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert evaluation.main([str(tmp_path / "model"), "--data", "toy", "--limit", "2", "--out", str(out)]) == 2
    holder.kill()
    assert capsys.readouterr().err.startswith(f"error: {out} is being written by another process; expected another")
    assert [file.name for file in out.iterdir()] == ["lock"]


def test_a_loss_without_a_chance_level_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(variants.LOSSES, "infonce", variants.LOSSES["infonce"]._replace(chance=None))
    options = ["--contrastive-kind", "infonce", "--warm-start-batches", "2", "--out", str(tmp_path / "runs" / "new")]
    assert train.main(options) == 2
    assert "the contrastive loss 'infonce' has no chance level" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["nothing"], [], ["--nothing"]])
def test_an_unknown_attack_gets_one_line(arguments, capsys):
    assert attack.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
