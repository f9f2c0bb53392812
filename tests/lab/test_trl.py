"""The reward in TRL's trainer: the numbers of CLIPO.step, on one process and on two."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import CONFIGS, PROMPTS, ROOT, flat, make_model
from test_papers_models import MODELS, make_checkpoint

import clipo
import eval as evaluation
import tsne
from config import CLIPOConfig
from engine.rollouts import generate
from run import models as run_models
from run import points
from tasks import data as task_data

if not all(map(importlib.util.find_spec, ("trl", "accelerate"))):
    pytest.skip("TRL is not installed (lab/requirements.txt)", allow_module_level=True)

from accelerate import Accelerator

from lab import trl_train
from lab.trl_reward import ContrastiveReward

CPU = torch.device("cpu")


def verdicts(completion_ids, **_):
    return [float(len(ids) % 2) for ids in completion_ids]


@pytest.fixture
def rollouts(qwen2):
    return generate(
        qwen2, PROMPTS, samples_per_prompt=4, max_new_tokens=8, eos_token_id=list(range(1, 12)),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def attached(model, config):
    """The reward, with as much of a trainer as it asks for."""
    wrapped = Accelerator(cpu=True).prepare(model)
    callbacks = []
    trainer = SimpleNamespace(
        model=model.train(), model_wrapped=wrapped, accelerator=Accelerator(cpu=True), num_generations=4,
        args=SimpleNamespace(per_device_train_batch_size=3), add_callback=callbacks.append,
        processing_class=lambda text: {"input_ids": [json.loads(t) for t in text]},
    )  # fmt: skip
    reward = ContrastiveReward(verdicts, config)
    reward.attach(trainer)
    assert callbacks == [reward]
    return reward


def called(reward, rollouts):
    rows = flat(rollouts)
    ids = [row[keep].tolist() for row, keep in zip(rows.tokens, rows.mask, strict=True)]
    prompts = [json.dumps(PROMPTS[g]) for g in rows.group.tolist()]
    return reward(prompts=prompts, completions=[""] * len(ids), completion_ids=ids), ids


@pytest.mark.parametrize("name", ["qwen2", "llama-3-rope", "gemma2"])
def test_it_embeds_as_the_rollout_loop_does(name):
    model = make_model(CONFIGS[name])
    rollouts = generate(
        model, PROMPTS, samples_per_prompt=4, max_new_tokens=8, eos_token_id=list(range(1, 20)),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert rollouts.mask.sum(-1).min() == 1 and rollouts.mask.sum(-1).max() > 2
    reward = attached(model, CLIPOConfig())
    rows = flat(rollouts)
    ids = [row[keep].tolist() for row, keep in zip(rows.tokens, rows.mask, strict=True)]
    hidden = reward.embed([PROMPTS[g] for g in rows.group.tolist()], ids)
    torch.testing.assert_close(hidden, rows.hidden, atol=1e-4, rtol=1e-4)
    assert model.training  # as it was


def test_it_pays_what_a_step_of_clipo_pays(qwen2, rollouts):
    config = CLIPOConfig(head_warmup_steps=0, samples_per_prompt=4)
    reward, half = attached(qwen2, config), clipo.HeadTrainer(32, CPU, config)
    for _ in range(3):  # the head learns in between
        got, ids = called(reward, rollouts)
        correct = torch.tensor(verdicts(ids)).bool()
        found = half.contrastive_step(rollouts.hidden, correct.view(-1, 4))
        half.steps_done += 1
        assert found.pairs.anchor.any() and not found.pairs.anchor.all()
        torch.testing.assert_close(torch.tensor(got), found.reward.flatten(), atol=1e-4, rtol=1e-4)


def test_warm_up_pays_nothing_and_evaluation_has_no_opinion(qwen2, rollouts):
    reward = attached(qwen2, CLIPOConfig(head_warmup_steps=2))
    before = reward.half.head.layers[0].weight.clone()
    paid = [sum(map(abs, called(reward, rollouts)[0])) for _ in range(3)]
    assert paid[:2] == [0, 0] and paid[2] > 0
    assert not torch.equal(before, reward.half.head.layers[0].weight)
    reward.trainer.model.eval()
    assert called(reward, rollouts)[0] == [None] * 16 and reward.half.steps_done == 3
    with pytest.raises(ValueError, match=r"has no trainer; expected reward\.attach"):
        ContrastiveReward(verdicts, CLIPOConfig())(prompts=[], completions=[], completion_ids=[])


def test_an_empty_completion_and_a_verdict_of_none_are_wrong_answers(qwen2, rollouts):
    """TRL's own accuracy reward gives None where it cannot read the gold answer."""
    reward, ids = attached(qwen2, CLIPOConfig(head_warmup_steps=0)), called(attached(qwen2, CLIPOConfig()), rollouts)[1]
    ids[1], prompts = [], [json.dumps(PROMPTS[b // 4]) for b in range(16)]
    reward.is_correct = lambda completion_ids, **_: [None if len(i) % 2 == 0 else 1.0 for i in completion_ids]
    paid = reward(prompts=prompts, completions=[""] * 16, completion_ids=ids)
    assert all(p == 0 for p, i in zip(paid, ids, strict=True) if len(i) % 2 == 0) and any(paid)
    hidden = reward.embed([PROMPTS[0]] * 2, [[], [7]])
    torch.testing.assert_close(hidden[0], hidden[1])  # both are the state of the prompt's last token
    assert hidden.isfinite().all()


def test_saved_and_read_again_it_goes_on_as_before(qwen2, rollouts, tmp_path):
    config = CLIPOConfig(head_warmup_steps=0)
    whole, first, second = (attached(qwen2, config) for _ in range(3))
    for reward in (whole, first):
        called(reward, rollouts)
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    (tmp_path / "checkpoint-1").mkdir()
    first.on_save(SimpleNamespace(output_dir=tmp_path), state, None)
    second.on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None)
    assert called(second, rollouts)[0] == called(whole, rollouts)[0]


# ----------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------

SETTINGS = ["--clipo", "samples_per_prompt=8", "max_new_tokens=12", "head_warmup_steps=0", "d_embed=8",
            "--trl", "max_steps=3", "learning_rate=1e-3", "bf16=false", "save_steps=2",
            "use_cpu=true"]  # fmt: skip


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    """A model that answers with the right number or with one more, evenly; and its questions."""
    folder = tmp_path_factory.mktemp("guesser")
    make_checkpoint(folder, MODELS["Qwen2.5"])
    data = folder / "questions.jsonl"
    questions = [{"question": f"Tom has {n} coins. How many?", "answer": str(n)} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    model, tokenizer = run_models.load_model(str(folder), "cpu")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(120):
        for extra, words in ((0, "so"), (0, "so Tom"), (1, "so"), (1, "has")):
            for n, row in enumerate(questions):
                prompt = task_data.prompt_ids(tokenizer, row["question"])
                ids = tokenizer(f"{words} #### {n + extra}<|im_end|>")["input_ids"]
                labels = torch.tensor([[-100] * len(prompt) + ids])
                model(input_ids=torch.tensor([prompt + ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder, data


NO_GROUP_LEFT = """
import sys, torch.distributed
from lab import trl_train
status = trl_train.main()
sys.exit(status or 7 * torch.distributed.is_initialized())  # its threads may abort a process that ends beside them
"""


def launch(count, out, guesser, *more):
    """lab.trl_train, in one process or in several of accelerate's."""
    folder, data = guesser
    options = ["--model", folder, "--data", data, "--out", out, *SETTINGS, f"per_device_train_batch_size={24 // count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if count == 1:
        done = processes.run("-m", "lab.trl_train", *options, *more, cwd=ROOT, env=environment)
    else:
        program = out.with_suffix(".py")
        program.write_text(NO_GROUP_LEFT)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", count]
        command += ["--multi_gpu", "--main_process_port", 0]  # its way to start several, on CPUs too
        command = list(map(str, [*command, program, *options, *more]))
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def logged(out):
    """Prompt, completion and rewards of every rollout of every step."""
    import pandas

    tables = [pandas.read_parquet(file) for file in sorted((out / "completions").glob("*.parquet"))]
    assert len(tables) == 3
    return pandas.concat(tables)


def test_two_processes_give_the_rewards_of_one_and_the_model_opens_everywhere(guesser, tmp_path, capsys):
    launch(1, tmp_path / "one", guesser)
    launch(2, tmp_path / "two", guesser)  # 3 groups of 8 on 2 x 12 places: the second is split
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 3 * 24
    for column in ("prompt", "completion"):
        assert [str(value) for value in one[column]] == [str(value) for value in two[column]]
    accuracy, contrast = torch.tensor(one["accuracy"].to_numpy()), torch.tensor(one["contrastive_reward"].to_numpy())
    assert 0.2 < accuracy.mean() < 0.8 and contrast.view(3, 24).std(-1).min() > 0.01
    for column in ("accuracy", "contrastive_reward", "advantage"):
        torch.testing.assert_close(
            torch.tensor(one[column].to_numpy()), torch.tensor(two[column].to_numpy()), atol=1e-3, rtol=1e-3
        )

    out = tmp_path / "two"
    assert evaluation.main([str(out), "--max-new-tokens", "8"]) == 0
    options = ["--questions", "3", "--samples", "5", "--max-new-tokens", "8"]
    assert tsne.main([str(out), *options]) == 0
    found = points.load_points(out / "tsne.npz")
    assert found["two"]["z"].shape == (15, 8) and set(found) == {"before", "two"}

    again = launch(1, out, guesser, "max_steps=4", "--resume")  # from checkpoint-3
    assert "4/4" in again.stderr
    assert json.loads((out / "checkpoint-4" / "head_state.json").read_text())["steps_done"] == 4


def test_mistakes_get_one_line(capsys):
    for arguments, message in (
        (["--model", "/nowhere", "--out", "x"], "error: model /nowhere could not be opened"),
        (["--model", "m", "--out", "x", "--clipo", "lr"], "error: "),
    ):
        assert trl_train.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(message) and said.count("\n") == 1
