"""train.py as its users run it: real runs in a process of their own, small enough for two cores."""

import dataclasses
import json
import re
import signal
import time

import processes
import pytest
import torch
from conftest import DATA, ROOT, SIZE
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import train
import tsne
from config import CLIPOConfig
from run import folder as run_folder
from run import models as run_models
from run import points
from run import settings as run_settings
from run.settings import default_out, new_settings
from run.table import ROWS, what_to_see
from tasks import data as task_data
from tasks import toy

TINY_RUN = [
    "--warm-start-batches", "3", "--prompts-per-step", "2", "--samples-per-prompt", "4", "--max-new-tokens", "8",
    "--head-warmup-steps", "1", "--lr-warmup-steps", "1", "--test-stories", "10",
]  # fmt: skip


def run(*arguments):
    return processes.run(ROOT / "train.py", *arguments)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_timings(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Four steps in one go."""
    folder = tmp_path_factory.mktemp("toy")
    done = run(*TINY_RUN, "--steps", 4, "--out", folder / "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole", done.stdout


def test_a_model_of_the_toy_world_has_no_second_warm_start(toy_run, tmp_path):
    options = [*TINY_RUN, "--steps", 1, "--test-stories", 0]
    done = run("--model", toy_run[0], "--data", "toy", *options, "--out", tmp_path / "runs" / "on")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "runs").glob("warm-start*"))
    assert json.loads((tmp_path / "runs" / "on" / "settings.json").read_text())["model"] == str(toy_run[0].resolve())


def test_a_toy_run_leaves_everything_it_promises(toy_run):
    out, stdout = toy_run
    for title, meaning in ROWS.values():
        assert re.search(rf"^{title} +answer right +\d+% \[\d+, \d+\] +\d+% \[\d+, \d+\]$", stdout, re.M)
        assert f"{title}: {meaning[:20]}" in stdout
    metrics = lines(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert {"reward", "accuracy", "process", "contrastive_loss", "on_floor", "entropy", "seconds"} <= set(metrics[0])
    rollouts = lines(out / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == [1, 1, 2, 2, 3, 3, 4, 4]
    one = rollouts[0]["rollouts"]
    assert len(one) == 4
    assert set(one[0]) == {
        "text", "correct", "sound", "bad_step", "anchor", "positives", "contrastive_loss", "contrastive_reward",
        "reward", "advantage",
    }  # fmt: skip
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert set(evaluation["trained"]) == set(ROWS)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """GRPO and CLIPO by one command, stopped in the second run, and gone on with by the same command."""
    folder = tmp_path_factory.mktemp("both")
    options = [*TINY_RUN, "--both", "--steps", 3, "--save-every", 1, "--out", folder]
    given = vars(run_settings.parser().parse_args(map(str, options))) | {"command": ""}
    grpo, ours = (folder / default_out(new_settings(given | part)).name for part in ({"weight": 0.0}, {}))
    process = processes.Command(ROOT / "train.py", *options)
    while not (ours / "metrics.jsonl").exists() or not (ours / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stopped, _ = process.communicate(timeout=120)
    before = (grpo / "model.safetensors").stat().st_mtime_ns
    again = run(*options)
    assert again.returncode == 0, again.stderr
    assert (grpo / "model.safetensors").stat().st_mtime_ns == before  # done already
    return grpo, ours, process.returncode, stopped, again.stdout


def test_both_prints_one_table_of_start_grpo_and_clipo(both):
    grpo, ours, _, _, stdout = both
    assert stdout.count("10 stories a level") == stdout.count("  and rollouts ") == 1
    assert re.search(r"a level +start +GRPO +CLIPO$", stdout, re.M)
    interval = r" +(\d+% \[\d+, \d+\]|none)"
    for title, _ in ROWS.values():
        assert re.search(rf"^{title} +answer right({interval}){{3}}$", stdout, re.M)
    assert list(json.loads((ours / "evaluation.json").read_text())) == ["start", "GRPO", "CLIPO"]
    page = (ours / "report.html").read_text()
    assert f'"name":"{ours.name}"' in page and f'"name":"{grpo.name}"' in page  # one drawn over the other


def test_both_start_from_the_same_model_and_differ_in_the_weight_alone(both):
    grpo, ours = (json.loads((folder / "settings.json").read_text()) for folder in both[:2])
    assert grpo["model"] == ours["model"]
    assert {name for name in ours["config"] if grpo["config"][name] != ours["config"][name]} == {"weight"}
    first = [lines(folder / "metrics.jsonl")[0] for folder in both[:2]]
    assert first[0]["accuracy"] == first[1]["accuracy"]


def test_both_can_be_stopped_and_the_same_command_goes_on(both):
    _, ours, status, stopped, _ = both
    assert status in (0, 130)  # (it may have been done when the signal came)
    assert status == 0 or f"to go on: python train.py {' '.join(TINY_RUN)} --both" in stopped
    assert [row["step"] for row in lines(ours / "metrics.jsonl")] == [1, 2, 3]


def test_no_options_at_all_are_both(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "one_run", lambda given, *_: asked.append(given) or 0)
    assert train.main([]) == 0
    assert [part["command"] for part in asked] == ["python train.py"] * 2
    assert [(part.get("weight"), part["out"]) for part in asked] == [(0.0, "runs/toy-grpo"), (None, "runs/toy")]


@pytest.mark.parametrize(
    "options, name",
    [
        ("", "toy"),
        ("--steps 3 --max-batch 4 --engine fast", "toy"),
        ("--weight 0", "toy-grpo"),
        ("--paper --seed 3", "toy-paper-seed3"),
        ("--policy-loss dapo", "toy-dapo"),
        ("--size small --lr 1e-3", "toy-small-lr-0.001"),
        ('--world {"mistaught":0.2}', "toy-mistaught-0.2"),
        ("--model a/b --data c/d.jsonl", "d-b"),
    ],
)
def test_each_kind_of_run_has_a_folder_of_its_own(options, name):
    given = vars(run_settings.parser().parse_args(options.split())) | {"command": ""}
    assert str(default_out(new_settings(given))) == f"runs/{name}"


def lied_to(right):
    """A model with so many right answers to 100 stories with a friend who is wrong."""
    return {"liar": {"answer": (right, 100)}}


@pytest.mark.parametrize(
    "grpo, ours, first, second",
    [
        (1, 80, "GRPO came to follow", "80% there: it went on"),
        (1, 45, "GRPO came to follow", "45% there: less than the start, but mostly it went on"),
        (1, 2, "GRPO came to follow", "did not prevent it here (2%)"),
        (1, 30, "GRPO came to follow", "did not prevent it here (30%)"),
        (55, 80, "GRPO began to follow", "80% there: it went on"),
        (55, 50, "GRPO began to follow", "did not prevent it here (50%)"),
        (75, 80, "GRPO did not learn to copy", "CLIPO has 80%."),
    ],
)
def test_the_sentences_say_what_the_table_shows(grpo, ours, first, second):
    told = what_to_see(lied_to(78), lied_to(grpo), lied_to(ours))
    assert first in told[0] and second in told[1]
    assert "78%" in told[0] and f"{grpo}%" in told[0] and f"{ours}%" in told[1]


def test_dapo_replaces_groups_and_logs_the_stories_that_were_answered(tmp_path):
    """This model is never right: every group is replaced twice, and the log has the last stories drawn."""
    dapo = ["--policy-loss", "dapo", "--resample-tries", 2, "--overlong-buffer", 4]
    done = run(*TINY_RUN, *dapo, "--test-stories", 0, "--steps", 1, "--out", tmp_path / "dapo")
    assert done.returncode == 0, done.stderr
    (metrics,) = lines(tmp_path / "dapo" / "metrics.jsonl")
    assert metrics["accuracy"] == 0 and metrics["groups_resampled"] == 1
    config = CLIPOConfig.for_track("toy", prompts_per_step=2)
    drawn = toy.ToyTask(config, toy.make_tokenizer()).more(0)
    last = [next(drawn).question for _ in range(4)][-2:]
    assert [row["question"] for row in lines(tmp_path / "dapo" / "rollouts.jsonl")] == last


def test_the_saved_folder_opens_with_from_pretrained(toy_run):
    out, _ = toy_run
    model = AutoModelForCausalLM.from_pretrained(out)
    newest = run_folder.checkpoints(out)[-1]
    saved = AutoModelForCausalLM.from_pretrained(newest).state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in model.state_dict().items())
    head = load_file(out / "head.safetensors")
    assert [tuple(w.shape) for w in head.values()] == [(512, 128)]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["data"] == "toy" and settings["config"]["steps"] == 4
    text = "Tom has 3 coins. How many coins does Tom have now? Ann says 3"
    assert run_models.load_tokenizer(str(out))(text)["input_ids"] == toy.make_tokenizer()(text)["input_ids"]


def test_a_resumed_run_is_the_same_to_the_bit(toy_run):
    whole, _ = toy_run
    parts = whole.parent / "parts"
    assert run(*TINY_RUN, "--steps", 2, "--test-stories", 0, "--out", parts).returncode == 0
    with (parts / "metrics.jsonl").open("a") as file:  # a step that was run but not saved
        file.write(json.dumps({"step": 3, "reward": 9}) + "\n" + '{"step": 4, "rew')  # and a line that a kill cut
    again = run("--resume", "--out", parts, "--steps", 4, "--test-stories", 0)
    assert again.returncode == 0, again.stderr
    assert without_timings(lines(parts / "metrics.jsonl")) == without_timings(lines(whole / "metrics.jsonl"))
    assert lines(parts / "rollouts.jsonl") == lines(whole / "rollouts.jsonl")
    for name in ("model.safetensors", "head.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, toy_run, number):
    out = tmp_path / "run"
    model = next(toy_run[0].parent.glob("warm-start-*[0-9]"))  # (not its lock)
    process = processes.Command(
        ROOT / "train.py", *TINY_RUN, "--model", model, "--data", "toy", "--steps", 100000, "--out", out
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    steps = len(lines(out / "metrics.jsonl"))
    assert f"saved after step {steps}; to go on: python train.py --resume --out {out}" in stdout
    again = run("--resume", "--out", out, "--steps", steps + 1, "--test-stories", 0)
    assert again.returncode == 0, again.stderr
    assert len(lines(out / "metrics.jsonl")) == steps + 1
    assert json.loads((out / "settings.json").read_text())["command"].endswith(f"--out {out} --steps {steps + 1}")


def train_tokenizer(texts, chat_template=None):
    """A byte-level BPE tokenizer of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = chat_template
    return wrapped


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
SMALL = {**SIZE, "vocab_size": 400, "max_position_embeddings": 1024, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "model_class, config, template",
    [(Qwen2ForCausalLM, Qwen2Config(**SMALL), TEMPLATE), (LlamaForCausalLM, LlamaConfig(**SMALL), None)],
    ids=["qwen2", "llama"],
)
def test_real_gsm8k_questions(tmp_path, model_class, config, template):
    data = DATA / "gsm8k_train.parquet"
    if not data.is_file():
        pytest.skip("gsm8k_train.parquet is not at hand")
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "model")
    tokenizer = train_tokenizer([p.question for p in task_data.load_problems(str(data))[:500]], template)
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    done = run(
        "--model", tmp_path / "model", "--data", data, "--steps", 2, "--out", out, "--head-warmup-steps", 1,
        "--prompts-per-step", 4, "--samples-per-prompt", 4, "--max-new-tokens", 12, "--lr", 1e-3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained, base = (AutoModelForCausalLM.from_pretrained(f) for f in (out, tmp_path / "model"))
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)  # weight decay moves it even without reward
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["track"], settings["config"]["beta"], settings["config"]["weight"]) == ("gsm8k", 0.001, 0.2)
    first = lines(out / "rollouts.jsonl")[0]
    assert first["question"] in {p.question for p in task_data.load_problems(str(data))}
    assert AutoTokenizer.from_pretrained(out) is not None
    question = first["question"]
    assert run_models.load_tokenizer(str(out))(question)["input_ids"] == tokenizer(question)["input_ids"]
    options = ["--questions", "2", "--samples", "5", "--max-new-tokens", "8", "--out", str(tmp_path / "tsne")]
    assert tsne.main([str(out), str(tmp_path / "model"), *options]) == 0  # a model that is no run has no head
    found = points.load_points(tmp_path / "tsne" / "tsne.npz")
    assert {name: "z" in one for name, one in found.items()} == {"before": False, "run": True, "model": False}
    assert all(one["hidden"].shape == (10, 32) and "sound" not in one for one in found.values())


def test_every_epoch_visits_every_prompt_once_in_its_own_order(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"question": f"How many {n}", "answer": str(n)}) + "\n" for n in range(10)))
    task = task_data.DataTask(CLIPOConfig(prompts_per_step=4), toy.make_tokenizer(), str(file))
    drawn = [p.answer for step in range(10) for p in task.problems(step)]
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(e, key=int) == [str(n) for n in range(10)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "-1"], "--lr is -1.0; expected at least 0"),
        (["--samples-per-prompt", "1"], "--samples-per-prompt is 1; expected at least 2"),
        (["--save-every", "0"], "--save-every is 0; expected 1 or more"),
        (["--data", "gsm8k"], "--data is gsm8k but no --model is given"),
        (["--both", "--weight", "0"], "--both is given with --weight"),
        (["--both", "--model", "x"], "--both is given with --model"),
        (["--world", "{"], "--world is {: "),
        (["--world", "[1]"], "--world is [1]: expected an object of dials and their values"),
        (["--world", '{"luck": 1}'], "luck is no dial; expected some of: friend_right,"),
        (["--world", '{"mistaught": {"a": 1}}'], "mistaught is {'a': 1}; expected as in 0.08"),
        (["--world", '{"mistaught": NaN}'], "mistaught is nan; expected as in 0.08"),
        (["--world", '{"unsound": [4, 2, 2, 1]}'], "unsound is [4, 2, 2, 1]; expected as in {'nonsense': 4,"),
        (["--world", '{"demo_clauses": [0, 0, 0, 0, 0]}'], "demo_clauses is [0, 0, 0, 0, 0]; expected as in (1, 2,"),
        (["--resume"], "--resume is given without --out"),
        (["--resume", "--out", "nowhere"], "nowhere holds no run to resume"),
        (["--model", "."], " has no config.json; expected a folder that save_pretrained wrote"),
        (["--model", "no/such-model"], "model no/such-model could not be opened"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--out", "/proc/run"], "expected a folder with room that can be written"),
    ],
)
def test_a_users_mistake_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_folder_with_a_run_is_not_overwritten_and_other_settings_are_refused(toy_run, capsys):
    out, _ = toy_run
    before = (out / "metrics.jsonl").read_bytes()
    assert train.main([*TINY_RUN, "--out", str(out)]) == 2
    assert f"already holds a run; go on with --resume --out {out}" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(out), "--weight", "0", "--seed", "3"]) == 2
    assert "--weight was 1.0, given 0.0, --seed was 32, given 3" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(CLIPOConfig):
        assert f"--{field.name.replace('_', '-')}" in said
        assert f"(default: {field.default}" in said
    assert "(default: 512; math: 128; toy: 8)" in said
