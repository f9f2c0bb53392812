"""Nothing lost, nothing silent: pulled plugs, damaged files, broken numbers, too little memory, full disks."""

import copy
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from conftest import PROMPTS, ROOT
from test_step import ANSWERS, even, same, step, trainer, weights

import clipo
import engine.forward as forward
import engine.graphs as graphs
import engine.guard as guard
import engine.rollouts as fast
import engine.update as update
import train
import variants
from border import UserError
from config import CLIPOConfig
from engine.guard import OutOfMemory, Trainer
from run import folder as run_folder
from run import warm_start as run_warm_start
from tasks import toy

TINY_RUN = (
    "--warm-start-batches 3 --prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 8 --head-warmup-steps 1 "
    "--lr-warmup-steps 1 --test-stories 0"
).split()

# ----------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------


def toy_trainer(seed=0):
    """A trainer whose tokenizer can be saved."""
    tokenizer = toy.make_tokenizer()
    config = CLIPOConfig(
        seed=seed, prompts_per_step=4, samples_per_prompt=4, max_new_tokens=6, head_warmup_steps=0, beta=0.0, lr=1e-3
    )
    return Trainer(run_warm_start.make_model("tiny", tokenizer, seed), tokenizer, even, config)


def everything(t):
    """All that a trainer is, as one dictionary of tensors."""
    model = {f"policy {name}": value for name, value in t.policy.state_dict().items()}
    head = {f"head {name}": value for name, value in t.head.state_dict().items()}
    return {**model, **head, **run_folder.optimizer_tensors(t), "step": torch.tensor(t.steps_done)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, and what the trainer was at each."""
    out, t, states = tmp_path_factory.mktemp("saved"), toy_trainer(), {}
    for number in (1, 2):
        step(t, PROMPTS, ANSWERS)
        (out / "metrics.jsonl").open("a").write(json.dumps({"step": number}) + "\n")
        run_folder.save(t, out)
        states[number] = copy.deepcopy(everything(t))
    return out, t, states


def test_a_checkpoint_holds_all_of_a_trainer(saved_twice):
    out, _, states = saved_twice
    for folder, number in zip(run_folder.checkpoints(out), (1, 2), strict=True):
        fresh = toy_trainer()
        run_folder.resume(fresh, folder)
        assert equal(everything(fresh), states[number])


class Pulled(BaseException):
    """The plug."""


def test_a_plug_pulled_at_any_moment_of_a_save_costs_nothing_that_was_saved(saved_twice, tmp_path, monkeypatch):
    """Every call that changes a file or folder is the last one, one after the other."""
    before, t, states = saved_twice
    step(t, PROMPTS, ANSWERS)
    states = {**states, 3: copy.deepcopy(everything(t))}
    calls, last = 0, 0

    def until_the_plug_is_pulled(function):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Pulled
            return function(*arguments, **options)

        return wrapped

    for place, name in (
        (os, "fsync"), (os, "link"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
        (run_folder, "save_file"), (run_folder.json, "dumps"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, until_the_plug_is_pulled(getattr(place, name)))

    found = []
    for moment in range(1, 1000):
        out = tmp_path / str(moment)
        last = 0
        shutil.copytree(before, out)
        calls, last = 0, moment
        try:
            run_folder.save(t, out)
        except Pulled:
            pass
        done, last = calls < moment, 0
        folder = run_folder.newest_whole(out)
        number = int(folder.name.removeprefix("step-"))
        found.append(number)
        if moment % 7 == 1 or done:
            fresh = toy_trainer()
            run_folder.resume(fresh, folder)
            assert equal(everything(fresh), states[number])
        run_folder.save(t, out)  # what the plug left lying about is in nobody's way
        assert [f.name for f in run_folder.checkpoints(out)] == ["step-000002", "step-000003"]
        assert not [f for f in (out / "checkpoints").iterdir() if f.suffix] and not list(out.glob("*.new"))
        shutil.rmtree(out)
        if done:
            break
    assert done and len(found) > 20 and found == sorted(found) and set(found) == {2, 3}


@pytest.mark.parametrize("how", ["cut short", "one bit", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.safetensors", "tokenizer.json", run_folder.SEAL])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved_twice, tmp_path, capsys, name, how):
    out = tmp_path / "run"
    shutil.copytree(saved_twice[0], out)
    first, second = run_folder.checkpoints(out)
    for folder, expected in ((second, first), (first, None)):
        file = folder / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(content if how == "one bit" else content[: len(content) // 2])
        if expected:
            assert run_folder.newest_whole(out) == expected
            said = capsys.readouterr().err
            named = (
                second if name == run_folder.SEAL and how == "one bit" else f"{second}: {name} "
            )  # which sum is wrong?
            assert said.startswith(str(named)) and said.count("\n") == 1
        else:
            with pytest.raises(UserError, match="all of its 2 checkpoints are damaged"):
                run_folder.newest_whole(out)


def test_lines_behind_a_checkpoint_may_be_anything(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n\0\0\0\0\n{"step": 3}\n{"st')
    run_folder.keep_until(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    file.write_text('{"step": 1}\nno json\n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        run_folder.read_lines(file)


def without_timings(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    """SIGKILL at random moments; CLIPO_KILLS=20 for a night's worth. It saves at every step: many hit a save."""
    kills, rng = int(os.environ.get("CLIPO_KILLS", 2)), random.Random(0)
    options = [*TINY_RUN, "--steps", "20", "--save-every", "1", "--device", "cpu"]

    def start(out, *more):
        begun = (out / "settings.json").exists()
        command = ["--resume", "--test-stories", "0"] if begun else options
        return processes.Command(ROOT / "train.py", *command, "--out", out, "--save-every", "1")

    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    process = start(whole)
    assert process.wait() == 0, process.communicate()
    for _ in range(kills):
        process, steps = start(killed), len(run_folder.checkpoints(killed))
        while process.poll() is None and len(list(killed.glob("metrics.jsonl"))) == 0:
            time.sleep(0.02)
        seen = (killed / "metrics.jsonl").stat().st_mtime_ns
        while process.poll() is None and (killed / "metrics.jsonl").stat().st_mtime_ns == seen:
            time.sleep(0.01)  # until it has begun to train
        time.sleep(rng.random() * 0.4)
        process.kill()
        process.wait()
        assert len(run_folder.checkpoints(killed)) >= min(steps, 1)
    process = start(killed)
    assert process.wait() == 0, process.communicate()
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_timings(whole / log) == without_timings(killed / log)
    for name in ("model.safetensors", "head.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


# ----------------------------------------------------------------------------------------------------
# A folder from elsewhere
# ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train.main([*TINY_RUN, "--steps", "2", "--test-stories", "5", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-000003.writing", "settings.json.new"])
def test_a_link_in_a_runs_folder_is_refused(finished, tmp_path, capsys, name):
    out, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, out)
    outside.mkdir()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(outside)
    assert train.main(["--resume", "--out", str(out), "--steps", "3"]) == 2
    said = capsys.readouterr().err
    assert f"{out / name} is a link to {outside}; expected a run's folder without links" in said
    assert not list(outside.iterdir())


def test_nothing_is_written_through_a_hard_link(finished, tmp_path):
    out, outside = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(finished, out)
    for name in ("metrics.jsonl", "rollouts.jsonl", "settings.json", "report.html", "evaluation.json", "config.json"):
        precious = outside.with_name(f"precious {name}")
        shutil.copyfile(out / name, precious)
        (out / name).unlink()
        os.link(precious, out / name)
    before = {file: file.read_bytes() for file in tmp_path.glob("precious*")}
    assert train.main(["--resume", "--out", str(out), "--steps", "3", "--test-stories", "5"]) == 0
    assert len(before) == 6 and all(file.read_bytes() == content for file, content in before.items())


def test_code_that_lies_beside_a_model_is_not_run(finished, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(finished, model)
    (model / "settings.json").unlink()
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\n")
    assert train.main(["--model", str(model), "--data", "toy", "--out", str(tmp_path / "out")]) == 2
    assert "could not be opened" in capsys.readouterr().err and not (tmp_path / "hacked").exists()


# ----------------------------------------------------------------------------------------------------
# Broken numbers
# ----------------------------------------------------------------------------------------------------


def break_number(t, monkeypatch, where, value):
    """Put NaN or infinity into one place of the next step."""
    if where == "rollout":
        output_logits = forward.output_logits
        monkeypatch.setattr(fast, "output_logits", lambda *a: output_logits(*a).index_fill(-1, torch.tensor(5), value))
    elif where in ("contrastive_loss", "policy_loss"):
        part = {"contrastive_loss": "loss", "policy_loss": "policy_gradient"}[where]
        function = getattr(t.unguarded, part)

        def broken(*arguments, **options):
            found = function(*arguments, **options)
            return {**found, "policy_loss": value} if part == "policy_gradient" else found + value

        monkeypatch.setattr(t.unguarded, part, broken)
    else:
        parameter = next((t.head if where == "gradient of the head" else t.policy).parameters())
        handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), value))
        return handle.remove
    return monkeypatch.undo


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "where, phase",
    [
        ("rollout", "rollout"),
        ("contrastive_loss", "contrast"),
        ("gradient of the head", "contrast"),
        ("policy_loss", "update"),
        ("gradient of the policy", "update"),
    ],
)
def test_a_broken_number_never_reaches_a_weight(monkeypatch, where, phase, value):
    if where == "rollout" and value == -float("inf"):
        value = float("nan")  # a logit of -inf is a token that cannot be drawn, and no broken number
    t = trainer(lr=1e-2)
    step(t, PROMPTS, ANSWERS)
    policy, head, moments = weights(t.policy), weights(t.head), copy.deepcopy(run_folder.optimizer_tensors(t))
    mend = break_number(t, monkeypatch, where, value)
    metrics = step(t, PROMPTS, ANSWERS)
    mend()
    assert metrics == {"step": 2, "skipped": phase, "seconds": metrics["seconds"]} and t.last is None
    assert same(policy, weights(t.policy))
    if phase != "update":  # there the head has learnt from this step's whole numbers
        assert same(head, weights(t.head))
        assert equal(moments, run_folder.optimizer_tensors(t))
    assert all(p.grad is None for module in (t.policy, t.head) for p in module.parameters())
    again = step(t, PROMPTS, ANSWERS)
    assert again["skipped"] is None and not same(policy, weights(t.policy))
    assert all(p.isfinite().all() for module in (t.policy, t.head) for p in module.parameters())


def test_three_broken_steps_in_a_row_end_the_run_with_its_state_saved(tmp_path, monkeypatch, capsys):
    out, parts, seen = tmp_path / "run", variants.parts, []

    def sometimes_broken(*arguments, **options):
        found = clipo.policy_gradient(*arguments, **options)
        seen.append(found)
        return {**found, "policy_loss": float("nan")} if len(seen) in (2, 4, 5, 6) else found

    monkeypatch.setattr(variants, "parts", lambda *given: replace(parts(*given), policy_gradient=sometimes_broken))
    assert train.main([*TINY_RUN, "--steps", "9", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "3 steps in a row were skipped, the last for its update; saved after step 7; to go on: python" in said.out
    skipped = [row["skipped"] for row in run_folder.read_lines(out / "metrics.jsonl")]
    assert skipped == [None, None, "update", None, "update", "update", "update"]
    assert [f.name for f in run_folder.checkpoints(out)] == ["step-000007"]
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(out), "--test-stories", "0"]) == 0
    assert len(run_folder.read_lines(out / "metrics.jsonl")) == 9


# ----------------------------------------------------------------------------------------------------
# Too little memory
# ----------------------------------------------------------------------------------------------------


def test_it_is_told_when_memory_runs_out():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert graphs.ran_out_of_memory(real.value) and graphs.ran_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory")
    )
    assert not graphs.ran_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    "first, then",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA error: operation failed due to a previous error"),
        (RuntimeError("CUDA error: out of memory"), "a decode step cannot be captured"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    ],
)
def test_it_is_told_in_a_capture_and_of_a_gpus_libraries_too(first, then):
    try:
        try:
            raise first
        except RuntimeError:
            if then is None:
                raise
            raise RuntimeError(then)  # noqa: B904, as torch.cuda.graph does where it ends
    except RuntimeError as error:
        assert graphs.ran_out_of_memory(error)


def test_with_less_memory_the_update_is_cut_finer_and_stays_the_same(monkeypatch):
    plenty, little = trainer(lr=1e-3), trainer(lr=1e-3)
    for t in (plenty, little):
        t.policy.double()  # (AdamW makes a whole step of a gradient that is all rounding)
    step(plenty, PROMPTS, ANSWERS)
    row_logprobs, failures = update.row_logprobs, []

    def on_a_small_machine(model, prompts, origin, tokens, *more):
        asked = [len(prompts[p]) - 1 for p in origin.unique().tolist()]  # each is computed once
        if tokens.numel() + len(asked) * max(asked) > 24:
            failures.append(tokens.numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return row_logprobs(model, prompts, origin, tokens, *more)

    monkeypatch.setattr(update, "row_logprobs", on_a_small_machine)
    assert step(little, PROMPTS, ANSWERS)["skipped"] is None
    assert failures and little.sizes["micro_batch_tokens"] <= 24
    torch.testing.assert_close(weights(little.policy), weights(plenty.policy), rtol=1e-4, atol=1e-6)
    failures.clear()
    step(little, PROMPTS, ANSWERS)
    assert not failures  # what was learnt about the machine is kept


def test_with_less_memory_rollouts_run_in_waves_and_stay_the_same(monkeypatch):
    plenty, little = trainer(), trainer()
    step(plenty, PROMPTS, ANSWERS)
    cache, rows = forward.KVCache, []

    def on_a_small_machine(count, slots):
        rows.append(count)
        if count > 4:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return cache(count, slots)

    monkeypatch.setattr(fast, "KVCache", on_a_small_machine)
    step(little, PROMPTS, ANSWERS)
    assert little.sizes["max_batch"] <= 4
    for ours, theirs in zip(little.last.rollouts, plenty.last.rollouts, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "room, said", [(14, "one of up to 4 would"), (10, "nor does one of a single token")]
)  # slots; the prompt takes 10
def test_a_rollout_that_cannot_fit_ends_with_the_number_that_would(monkeypatch, room, said):
    t, cache = trainer(max_new_tokens=9), forward.KVCache

    def on_a_small_machine(rows, slots):
        if slots > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return cache(rows, slots)

    monkeypatch.setattr(fast, "KVCache", on_a_small_machine)
    with pytest.raises(OutOfMemory, match=f"a rollout of up to 9 tokens does not fit, {said}"):
        step(t, PROMPTS, ANSWERS)
    assert t.sizes["max_batch"] == 1


def test_an_update_that_cannot_fit_ends_with_the_number_that_would(monkeypatch):
    t, row_logprobs = trainer(max_new_tokens=9), update.row_logprobs

    def on_a_small_machine(model, prompts, origin, tokens, *more):
        if tokens.numel() > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return row_logprobs(model, prompts, origin, tokens, *more)

    monkeypatch.setattr(update, "row_logprobs", on_a_small_machine)
    before = weights(t.policy)
    with pytest.raises(OutOfMemory, match="a rollout of up to 9 tokens does not fit, one of up to 2 would"):
        step(t, PROMPTS, ANSWERS)
    assert same(before, weights(t.policy))


def test_what_cannot_fit_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def too_little(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr(fast, "KVCache", too_little)
    for module in (fast, guard):
        monkeypatch.setattr(module, "check_model", lambda *_: None)
    run = [*TINY_RUN, "--engine", "fast", "--steps", "2", "--out", str(tmp_path / "run")]
    assert train.main(run) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "error: out of memory: a rollout of up to 8 tokens does not fit, nor does one of a single token; expected a "
        "smaller --max-new-tokens or model, or more memory; what was saved stays"
    )


# ----------------------------------------------------------------------------------------------------
# A full disk
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB, room for one checkpoint and a little more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here (it takes root)")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_costs_nothing_that_was_saved(small_disk, finished, capsys):
    model = next(finished.parent.glob("warm-start-*[0-9]"))  # (not its lock)
    out = small_disk / "run"
    options = ["--model", str(model), "--data", "toy", "--save-every", "1", *TINY_RUN]
    assert train.main([*options, "--steps", "1", "--out", str(out)]) == 0
    (small_disk / "filler").write_bytes(b"x" * (2**20 * 2))
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(out), "--steps", "3", "--save-every", "1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "expected a folder with room" in said and "what was saved stays" in said
    assert [f.name for f in run_folder.checkpoints(out)] == ["step-000001"]
    assert run_folder.newest_whole(out) is not None
    (small_disk / "filler").unlink()
    resumed = ["--resume", "--out", str(out), "--steps", "3", "--save-every", "3", "--test-stories", "0"]
    assert train.main(resumed) == 0


def test_the_newest_state_is_named_by_its_step(saved_twice):
    assert Path(run_folder.newest_whole(saved_twice[0])).name == "step-000002"


def test_a_soak_measures_every_quarter(tmp_path, capsys):
    from lab import soak

    assert soak.main(["--steps", "40", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "soak.md").read_text()
    assert "31 to 40" in table and (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    last = table.splitlines()[-1].split("|")
    assert float(last[2]) > 100 and int(last[3]) > 3 and float(last[4]) > 0  # MB, files, ms
