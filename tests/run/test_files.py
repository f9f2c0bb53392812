"""Runs and files: what is not ours stays, a run goes on with what it began with, and odd folders are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import PROMPTS, ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_safety import TINY_RUN, toy_trainer
from test_step import ANSWERS, step

import eval as evaluation
import train
import tsne
from border import UserError
from engine.guard import BrokenWeights
from exercises import grade
from run import folder as run_folder
from run import models as run_models
from run import page, points, stopping
from run import warm_start as run_warm_start
from tasks import toy

DATA = [{"question": f"Tom has {i} coins", "answer": str(i)} for i in range(4)]
ON_DATA = "--prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --head-warmup-steps 1".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, and its warm start beside it."""
    out = tmp_path_factory.mktemp("finished") / "runs" / "run"
    options = [*TINY_RUN, "--steps", "2", "--save-every", "1", "--test-stories", "5"]
    assert train.main([*options, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of both."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    out = tmp_path / "runs" / "run"
    settings = json.loads((out / "settings.json").read_text())
    settings["model"] = str(out.parent / Path(settings["model"]).name)
    (out / "settings.json").write_text(json.dumps(settings))
    return out


def error(capsys, program, *arguments):
    """The one line that a command ends with."""
    try:
        status = program.main(list(map(str, arguments)))
    except SystemExit as stopped:  # argparse
        status = stopped.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, lines
    return lines[0]


def resume(run, *more):
    return ["--resume", "--out", run, "--test-stories", "5", *more]


def tree(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def save_start(folder, seed=0, size="tiny"):
    tokenizer = toy.make_tokenizer()
    run_warm_start.make_model(size, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------
# What a run begins with
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start, out",
    [(".", "."), (".", "new/run"), ("checkpoints/step-000002", "."), ("checkpoints/step-000002", "checkpoints/new")],
)
def test_a_run_is_not_written_into_the_model_that_it_begins_with(run, capsys, start, out):
    (run / "settings.json").unlink()  # a model as others have them
    before = tree(run)
    said = error(capsys, train, "--model", run / start, "--data", "toy", *TINY_RUN, "--out", run / out)
    assert "lies in the model that the run begins with" in said or "already holds a run" in said
    assert tree(run) == before


def test_a_run_that_was_written_into_its_start_is_not_resumed(run, capsys):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "model": str(run), "checksums": {}}))
    assert "lies in the model that the run begins with" in error(capsys, train, *resume(run, "--steps", "3"))


def test_a_warm_starts_folder_is_no_place_for_a_run(tmp_path, capsys):
    out = tmp_path / "warm-start-tiny-seed32-3"
    assert "name of a warm start" in error(capsys, train, *TINY_RUN, "--steps", "1", "--out", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_start_that_has_changed_is_named_and_refused(run, capsys, name):
    start = run.parent / "warm-start-tiny-seed32-3"
    content = (start / name).read_bytes()
    (start / name).write_bytes(content + b" ")
    said = error(capsys, train, *resume(run, "--steps", "3"))
    assert said == (
        f"error: {start / name} has changed since the run began, or is gone; expected the file that it began with"
    )
    (start / name).write_bytes(content)
    assert train.main(list(map(str, resume(run, "--steps", "3")))) == 0


def test_data_that_have_changed_are_named_and_refused(tmp_path, capsys):
    model, data = save_start(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    begun = ["--model", model, "--data", data, *ON_DATA, "--steps", "1", "--out", tmp_path / "run"]
    assert train.main(list(map(str, begun))) == 0
    data.write_text(data.read_text().replace("Tom", "Ann"))
    said = error(capsys, train, "--resume", "--out", tmp_path / "run", "--steps", "2")
    assert said.startswith(f"error: {data} has changed since the run began")


def test_two_models_of_one_last_name_have_a_warm_start_each(tmp_path):
    """And so does one that was written anew. The toy's own keep their names, by which results are found again."""
    names = set()
    for place, seed in (("a", 0), ("b", 1), ("a", 2)):
        names.add(run_warm_start.name_of(str(save_start(tmp_path / place / "model", seed))))
    assert len(names) == 3 and all(name.startswith("model-") for name in names)
    assert run_warm_start.name_of("one/model") != run_warm_start.name_of("two/model")
    made = run_warm_start.warm_started(tmp_path / "runs", "tiny", 0, 1, torch.device("cpu"))
    assert made.name == "warm-start-tiny-seed0-1"
    cpu = torch.device("cpu")
    made = [
        run_warm_start.warm_started(tmp_path / "runs", "tiny", 0, 1, cpu, model=str(tmp_path / name / "model"))
        for name in ("a", "b")
    ]
    assert made[0] != made[1] and not torch.equal(
        *(load_file(m / "model.safetensors")["model.norm.weight"] for m in made)
    )


def test_runs_may_be_moved(run, tmp_path, capsys):
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    settings = json.loads((run / "settings.json").read_text())
    run.parent.rename(moved)
    assert train.main(list(map(str, resume(moved / "run", "--steps", "3")))) == 0
    assert run_folder.read_settings(moved / "run")["model"] == str(moved / "warm-start-tiny-seed32-3")
    del settings["checksums"]  # as older versions wrote it
    (moved / "run" / "settings.json").write_text(json.dumps(settings))
    assert run_folder.read_settings(moved / "run")["model"] == str(moved / "warm-start-tiny-seed32-3")
    (moved / "run" / "settings.json").write_text(json.dumps({**settings, "model": "/gone/run"}))
    assert run_folder.read_settings(moved / "run")["model"] == "/gone/run"  # nobody knows whether it is that one


def test_another_number_of_threads_is_said(run, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert train.main(list(map(str, resume(run, "--steps", "3")))) == 0
    finally:
        torch.set_num_threads(before)
    assert f"the run began on {before} threads and goes on on {before + 1}" in capsys.readouterr().err
    assert train.main(list(map(str, resume(run, "--steps", "4")))) == 0
    assert "threads" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# What is ours
# ----------------------------------------------------------------------------------------------------


def test_a_save_touches_only_what_is_ours(tmp_path):
    t = toy_trainer()
    mine = ["step-000001.best", "step-000001-copy", "best", "step-1", "notes.d"]
    for name in mine:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "precious").write_text(name)
    (tmp_path / "checkpoints" / "notes.txt").write_text("precious")
    (tmp_path / "checkpoints" / "step-000009.writing").mkdir()  # ours, cut short
    for _ in range(4):
        step(t, PROMPTS, ANSWERS)
        run_folder.save(t, tmp_path)
    assert [f.name for f in run_folder.checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    assert all((tmp_path / "checkpoints" / name / "precious").read_text() == name for name in mine)
    assert (tmp_path / "checkpoints" / "notes.txt").exists()
    assert not (tmp_path / "checkpoints" / "step-000009.writing").exists()


def test_the_millionth_step_comes_last(tmp_path):
    for name in ("step-1000000", "step-999999"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [f.name for f in run_folder.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "metrics.jsonl", "checkpoints/best/model.safetensors"])
def test_a_run_does_not_begin_among_files_of_others(tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious\n")
    said = error(capsys, train, *TINY_RUN, "--steps", "1", "--out", out)
    first = name.split("/")[0]
    assert said == f"error: {out} holds {first}, which is not of this command; expected a new or empty --out"
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [out / name] and (out / name).read_text() == "precious\n"


def test_what_a_run_left_that_never_began_is_in_nobodys_way(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoints" / "step-000001.writing").mkdir(parents=True)
    for name in ("lock", "metrics.jsonl", "rollouts.jsonl", "settings.json.new"):
        (out / name).touch()
    assert train.main([*TINY_RUN, "--steps", "1", "--out", str(out)]) == 0


@pytest.mark.parametrize("place", [".", "eval", "checkpoints/step-000002"])
def test_an_evaluation_is_not_written_among_files_of_others(run, capsys, place):
    (run / "eval").mkdir()
    (run / "eval" / "results.csv").write_text("precious")
    before = tree(run)
    said = error(capsys, evaluation, run, "--limit", "1", "--out", run / place)
    assert "which is not of this command; expected a new or empty --out" in said and tree(run) == before


def test_an_evaluation_does_not_take_other_settings_for_its_own(run, capsys):
    out = run.parent / "out"
    out.mkdir()
    shutil.copy(run / "settings.json", out)
    said = error(capsys, evaluation, run, "--limit", "1", "--out", out)
    assert said == f"error: {out}/settings.json cannot be read (it has no chosen); expected what train.py wrote"


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(run, capsys):
    shutil.rmtree(run / "checkpoints")
    before = tree(run)
    said = error(capsys, train, *resume(run, "--steps", "3"))
    assert f"{run} has saved a model, but {run}/checkpoints holds no checkpoint" in said and tree(run) == before


def test_a_run_that_had_not_saved_begins_again(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def pulled(*_):
        raise SystemError

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save", pulled)
        with pytest.raises(SystemError):
            train.main([*TINY_RUN, "--steps", "1", "--out", str(out)])
    assert (out / "metrics.jsonl").read_text()
    assert train.main(list(map(str, resume(out)))) == 0
    assert [row["step"] for row in run_folder.read_lines(out / "metrics.jsonl")] == [1]


def test_a_damaged_line_costs_itself_alone(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "los\0\0\n{"step": 3}\n[]\n{"step": 4}\n{"step": 5}\n\0\0\n{"step": 4}\n')
    run_folder.keep_until(file, 4)
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 4}\n{"step": 4}\n'
    assert "line 2, 4, 7 is damaged and left out" in capsys.readouterr().err


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_saved_files_have_the_mode_that_files_get_here(tmp_path, mask):
    t, before = toy_trainer(), os.umask(mask)
    try:
        step(t, PROMPTS, ANSWERS)
        run_folder.save(t, tmp_path)
        run_folder.write_tensors(tmp_path / "part.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    assert len(modes) > 8 and set(modes.values()) == {0o666 & ~mask}, modes


# ----------------------------------------------------------------------------------------------------
# Runs that end early
# ----------------------------------------------------------------------------------------------------


def start(*arguments, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {})
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **more)


def test_without_bars_it_trains_too(tmp_path):
    """TQDM_DISABLE=1 is what people set in their CI."""
    done = start(
        *TINY_RUN, "--steps", "2", "--out", tmp_path / "run", env={"TQDM_DISABLE": "1"}, stderr=subprocess.PIPE
    )
    assert done.communicate()[1] == "" and done.returncode == 0


def test_a_reader_who_leaves_ends_nothing(tmp_path):
    """As `train.py ... 2>&1 | head -1`."""
    read, write = os.pipe()
    process = start(
        *TINY_RUN, "--steps", "3", "--save-every", "1", "--out", tmp_path / "run", stdout=write, stderr=write
    )
    os.close(write)
    os.read(read, 1)
    os.close(read)
    assert process.wait() == 0
    assert len(run_folder.read_lines(tmp_path / "run" / "metrics.jsonl")) == 3
    assert (tmp_path / "run" / "report.html").exists()


def test_without_any_output_it_trains_too(finished, tmp_path):
    command = f"{sys.executable} {ROOT}/train.py --resume --steps 3 --test-stories 5 --out run >&- 2>&-"
    shutil.copytree(finished.parent, tmp_path / "runs")
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path / "runs").returncode == 0
    assert len(run_folder.read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")) == 3


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminal closes here")
def test_a_closed_terminal_saves(tmp_path):
    out = tmp_path / "run"
    process = processes.Command(ROOT / "train.py", *TINY_RUN, "--steps", "5000", "--out", out)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(2):  # as a terminal and its shell do
        process.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    said, _ = process.communicate()
    assert process.returncode == 130 and "stopped; saved after step" in said
    assert len(run_folder.checkpoints(out)) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminal closes here")
def test_nohup_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.StopAsked():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "reason",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_under_a_warm_start_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, reason):
    def full(*_, **__):
        raise reason

    monkeypatch.setattr(run_warm_start.PreTrainedTokenizerFast, "save_pretrained", full)
    said = error(capsys, train, *TINY_RUN, "--steps", "1", "--out", tmp_path / "run")
    assert "No space left" in said and "expected a folder with room" in said
    assert not list(tmp_path.glob("*.writing-*"))


class PanicException(BaseException):
    """As the bridge to Rust raises it."""


def test_a_tokenizers_panic_gets_one_line(tmp_path, monkeypatch, capsys):
    def panic(*_, **__):
        raise PanicException("index out of bounds")

    model = save_start(tmp_path / "model")
    with monkeypatch.context() as patched:
        patched.setattr(run_models, "load_tokenizer", panic)
        said = error(capsys, train, "--model", model, "--data", "toy", "--out", tmp_path / "run")
        assert said.startswith(f"error: model {model} could not be opened: index out of bounds")
    for program, place in ((evaluation, "load_benchmark"), (tsne, "stories")):  # wherever else
        monkeypatch.setattr(program, place, panic)
        assert "a library gave up: index out of bounds" in error(capsys, program, model, "--data", "toy")


@pytest.mark.parametrize("program", [train, evaluation, tsne])
@pytest.mark.parametrize("name, said", [("x" * 300, "File name too long"), ("a\udce9", "is no UTF-8 text")])
def test_a_name_that_cannot_be_gets_one_line(program, name, said, tmp_path, capsys, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {train: TINY_RUN, evaluation: [finished], tsne: [finished]}[program]
    assert said in error(capsys, program, *more, "--out", name)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_breaks_is_not_saved(tmp_path, monkeypatch, capsys):
    """An optimiser of somebody's own: the bounds in config.py leave AdamW no way there."""
    t = toy_trainer()
    monkeypatch.setattr(t.policy_optimizer, "step", lambda: next(t.policy.parameters()).data.fill_(float("inf")))
    with pytest.raises(BrokenWeights, match=r"a weight became NaN or infinite in step 1 \(update\)"):
        step(t, PROMPTS, ANSWERS)

    adam = torch.optim.AdamW.step

    def at_last(self, *arguments):
        adam(self, *arguments)
        if next(iter(self.state.values()))["step"] == 3 and len(self.param_groups[0]["params"]) > 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", at_last)
    settings = ["--save-every", "1", "--head-warmup-steps", "0", "--steps", "6", "--out", tmp_path / "run"]
    said = error(capsys, train, *TINY_RUN, "--warm-start-batches", "2", *settings)
    assert "a weight became NaN or infinite in step" in said and "what was saved stays" in said
    newest = run_folder.newest_whole(tmp_path / "run")
    assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())


EXTREMES = "--lr 1 --weight-decay 1 --head-lr 1 --head-weight-decay 1 --max-grad-norm 1000000 --beta 0".split()


def test_the_largest_rates_and_decays_break_no_weight(tmp_path):
    status = train.main([*TINY_RUN, *EXTREMES, "--steps", "8", "--out", str(tmp_path / "run")])
    assert status in (0, 1)  # it may well end as the numbers that follow break, with its weights whole
    for name in ("model.safetensors", "head.safetensors"):
        assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / name).values())


# ----------------------------------------------------------------------------------------------------
# Folders from somebody else
# ----------------------------------------------------------------------------------------------------


def sealed(checkpoint, files=None):
    seal = json.loads((checkpoint / run_folder.SEAL).read_text())
    seal["sha256"] = {name: run_folder.checksum(checkpoint / name) for name in files or seal["sha256"]}
    (checkpoint / run_folder.SEAL).write_text(json.dumps(seal))


def change(name, kind, make):
    def changed(tensors):
        key = next(key for key in tensors if key.startswith(f"{name}/") and key.endswith(kind))
        tensors[key] = make(tensors[key])

    return changed


ODD = {
    "shape": change("policy", "exp_avg", lambda t: t[..., :1]),
    "integers": change("policy", "exp_avg_sq", lambda t: t.long()),
    "negative": change("policy", "exp_avg_sq", lambda t: t - 1),
    "nan": change("policy", "exp_avg", lambda t: t * float("nan")),
    "no step": change("policy", "step", lambda t: t * 0),
    "name": lambda tensors: tensors.update({"policy/0": torch.zeros(1)}),
    "owner": lambda tensors: tensors.update({"nobody/0/exp_avg": torch.zeros(1)}),
    "number": lambda tensors: tensors.update({"policy/one/exp_avg": torch.zeros(1)}),
    "far": lambda tensors: tensors.update({"policy/999/exp_avg": torch.zeros(1)}),
    "kind": lambda tensors: tensors.update({"policy/0/colour": torch.zeros(1)}),
    "missing": lambda tensors: tensors.pop("policy/0/step"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_moments_of_an_optimiser_get_one_line(run, capsys, odd):
    newest = run_folder.checkpoints(run)[-1]
    tensors = load_file(newest / "optimizers.safetensors")
    ODD[odd](tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, newest / "optimizers.safetensors")
    sealed(newest)
    said = error(capsys, train, *resume(run, "--steps", "3"))
    assert said.startswith(f"error: {newest}/optimizers.safetensors cannot be used (") and "expected what" in said


@pytest.mark.parametrize("name", ["head.safetensors", "optimizers.safetensors", "model.safetensors"])
def test_a_cut_file_under_a_seal_that_fits_gets_one_line(run, capsys, name):
    newest = run_folder.checkpoints(run)[-1]
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    (newest / name).write_bytes(content[:1000])
    sealed(newest)
    assert name.split(".")[0] in error(capsys, train, *resume(run, "--steps", "3"))


@pytest.mark.parametrize(
    "seal",
    ["{}", "[]", '{"steps_done": 2, "sha256": {}}', '{"steps_done": "2", "sha256": {}}',
     '{"steps_done": 2, "sha256": {"head.safetensors": "", "optimizers.safetensors": "", "../../lock": ""}}'],
)  # fmt: skip
def test_a_seal_that_seals_nothing_is_damaged(run, seal):
    first, newest = run_folder.checkpoints(run)
    (newest / run_folder.SEAL).write_text(seal)
    assert run_folder.newest_whole(run) == first


def test_a_run_without_a_model_gets_one_line(run, capsys):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "model": ""}))
    for program, arguments in ((train, resume(run)), (tsne, [run]), (page, [run])):
        assert "settings.json cannot be used (model is empty)" in error(capsys, program, *arguments)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "name",
    [*run_folder.LOGS, "lock", "settings.json", "evaluation.json", "checkpoints/step-000002/state.json"],
)
def test_nobody_waits_at_a_pipe(run, capsys, name):
    """A reader of one waits until somebody writes."""
    (run / name).unlink()
    os.mkfifo(run / name)
    said = error(capsys, train, *resume(run, "--steps", "3"))
    assert f"{run / name} is no plain file" in said or "holds no run to resume" in said
    if name in ("metrics.jsonl", "rollouts.jsonl", "settings.json", "evaluation.json"):
        said = error(capsys, page, run)
        assert "is no plain file" in said or "holds no run" in said
    os.mkfifo(run / "tsne.npz")
    assert "cannot be read" in error(capsys, tsne, "--redraw", run / "tsne.npz")
    (run / "eval").mkdir()
    os.mkfifo(run / "eval" / "lock")
    if name != "settings.json":
        assert "is no plain file" in error(capsys, evaluation, run, "--limit", "1")
    os.mkfifo(run / "vocab.json")
    assert "is no plain file; expected a folder that save_pretrained wrote" in error(
        capsys, train, "--model", run, "--out", run.parent / "new"
    )


def test_attention_is_ours_whatever_the_configuration_says(tmp_path, capsys):
    model = save_start(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for asked in ("flex_attention", "eager"):
        (model / "config.json").write_text(json.dumps({**config, "_attn_implementation": asked}))
        assert run_models.load_model(str(model), "cpu")[0].config._attn_implementation == "sdpa"
    (model / "config.json").write_text(json.dumps({**config, "_attn_implementation": "somebody/attention"}))
    said = error(capsys, train, "--model", model, "--data", "toy", "--out", tmp_path / "run")
    assert "asks for an attention of the hub, somebody/attention, which is code" in said


def test_a_template_without_an_end_is_named(capsys):
    with run_models.said_if_endless("model x: its chat template is still at work", seconds=0.01):
        time.sleep(0.2)
    assert "still at work; it is a program of the folder's, which has no limit" in capsys.readouterr().err


HUGE = [float("nan"), float("inf"), 1.8e308, 1.7976931348623157e308, -1e300, 10**400, 2**53]


@pytest.mark.parametrize("place", ["metrics", "rollouts", "cosine", "evaluation"])
def test_no_number_leaves_the_page_empty(open_page, run, place):
    metrics, groups = (run_folder.read_lines(run / name) for name in run_folder.LOGS)
    table = json.loads((run / "evaluation.json").read_text())
    for i, value in enumerate(HUGE):
        group = groups[i % len(groups)]
        rollout = group["rollouts"][i // len(groups)]
        if place == "metrics":
            seconds = {"update": value, "step": "x"}
            metrics.append({**metrics[-1], "step": 3 + i, "kl": value, "reward": value, "seconds": seconds})
        elif place == "rollouts" and isinstance(value, float):
            rollout |= dict.fromkeys(("reward", "advantage", "contrastive_loss", "contrastive_reward"), value)
        elif place == "cosine" and isinstance(value, float):
            group["cosine"][0][i // len(groups)] = value
        elif place == "evaluation" and isinstance(value, int):
            table["trained"]["P0"]["answer"] = [value, 5]
    run_folder.write_lines(run / "metrics.jsonl", metrics)
    run_folder.write_lines(run / "rollouts.jsonl", groups)
    (run / "evaluation.json").write_text(json.dumps(table))
    opened = open_page(page.write_page([run]))
    assert opened.locator("#curves .panel").count() > 5 and opened.locator("#settings tr").count() > 20
    assert opened.locator("#cards .card").count() == 4


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rollouts": []}, "it has no rollouts"),
        ({"question": 3}, "question is int, not str"),
        ({"cosine": [[1.0]]}, "cosine has not a row and a column for each rollout"),
        ({"cosine": "x"}, "cosine is str, not list"),
        ({"positives": [99]}, "positives name a rollout that is not there"),
        ({"bad_step": 3}, "bad_step is no pair of places"),
        ({"reward": None}, "reward is NoneType, not float"),
    ],
)
def test_a_group_that_the_page_could_not_draw_is_named(run, capsys, change, said):
    groups = run_folder.read_lines(run / "rollouts.jsonl")
    inner = set(change) & {"positives", "bad_step", "reward"}
    groups[0] = {**groups[0], **({} if inner else change)}
    if inner:
        groups[0]["rollouts"][0] |= change
    run_folder.write_lines(run / "rollouts.jsonl", groups)
    assert said in error(capsys, page, run) and "line 1" in error(capsys, page, run)


def test_a_table_with_holes_is_refused(run):
    table = json.loads((run / "evaluation.json").read_text())
    del table["trained"]["P0"]["answer"]
    (run / "evaluation.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="is no table of levels"):
        page.write_page([run])


# ----------------------------------------------------------------------------------------------------
# Pictures, marks
# ----------------------------------------------------------------------------------------------------


def test_equal_points_are_one_dot(tmp_path):
    """scikit-learn divides by their spread, and its search of the NaN ends the process (a segmentation fault)."""
    equal_points = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (10, 1))
    question = np.zeros(10, dtype=np.int64)
    one = {"hidden": equal_points, "z": equal_points * 0, "right": np.ones(10, bool), "question": question}
    points.save_points({"A/toy": one, "/B/toy": one}, tmp_path / "tsne.npz")
    found = points.load_points(tmp_path / "tsne.npz")
    assert set(found) == {"A/toy", "/B/toy"}
    points.draw(found, tmp_path / "tsne.png", perplexity=20, seed=0, by_question=False)
    assert (tmp_path / "tsne.png").read_bytes().startswith(b"\x89PNG")
    assert points.gathered(equal_points, points.flat(equal_points, 20, 0))[1].tolist() == [[0.0, 0.0]]
    huge = {"hidden": equal_points * np.float32(1e30), "right": one["right"], "question": question}
    np.savez(tmp_path / "huge.npz", **{f"m/{name}": values for name, values in huge.items()})
    with pytest.raises(UserError, match="are no points with verdicts"):
        points.load_points(tmp_path / "huge.npz")


def test_a_picture_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / "tsne.npz")
    one = {"hidden": np.random.rand(10, 3).astype(np.float32), "right": np.ones(10, bool), "question": np.arange(10)}
    points.save_points({"m": one}, tmp_path / "tsne.npz")
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["precious", "tsne.npz"]


def test_runs_of_one_last_name_have_a_panel_each(run, tmp_path):
    other = tmp_path / "other" / "run"
    shutil.copytree(run, other)
    small = ["--questions", "2", "--samples", "6", "--max-new-tokens", "4", "--out", str(tmp_path)]
    assert tsne.main([str(run), str(other), *small]) == 0
    assert set(points.load_points(tmp_path / "tsne.npz")) == {"before", str(run), str(other)}


def test_it_is_said_that_a_mark_can_be_forged(tmp_path):
    assert "A mark can be forged" in grade.__doc__
    assert "A mark can be forged" in (ROOT / "exercises" / "teacher.md").read_text()
    os.mkfifo(tmp_path / "results")  # an answer may make one: nobody waits there
    assert list(grade.read(tmp_path / "results")) == []
