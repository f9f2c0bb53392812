"""GSM8K on a pretrained model, all of it, but on a small model and made-up rows; cut into chunks too."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_papers_models import MODELS, make_checkpoint

from border import UserError
from engine import update
from lab import gsm8k
from run import folder as run_folder
from run import models as run_models
from run import scores
from run import warm_start as run_warm_start
from tasks import data as task_data

SMALL = (
    "--steps 2 --prompts-per-step 2 --mini-batch-prompts 2 --samples-per-prompt 3 --max-new-tokens 8 "
    "--head-warmup-steps 1 --engine fast"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_checkpoint(folder, MODELS["Qwen2.5"])
    answer = "{n} = <<{n}={n}>>{n}\n#### {n}"
    rows = [{"question": f"Tom has {n} coins. How many?", "answer": answer.format(n=n)} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module", autouse=True)
def half_right():
    """What a random model writes is never right; here every second answer is, when it is evaluated."""
    patched = pytest.MonkeyPatch()
    patched.setattr(scores, "are_correct", lambda texts, golds, **_: [i % 2 == 0 for i, _ in enumerate(texts)])
    yield
    patched.undo()


def all_of_it(place, out, minutes):
    rows = str(place / "rows.jsonl")
    given = ["--model", str(place), "--train", rows, "--test", rows, "--batches", "6", "--device", "cpu"]
    return gsm8k.main([*given, "--minutes", str(minutes), "--out", str(out), "--", *SMALL])


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "gsm8k"
    assert all_of_it(place, out, minutes=60) == 0
    return out


def test_each_arm_has_its_settings_and_its_answers(place, whole):
    settings = {arm: run_folder.read_json(whole / arm / "settings.json", {}) for arm in gsm8k.ARMS}
    assert {s["model"] for s in settings.values()} == {str(whole / "start")} and settings["grpo"]["track"] == "gsm8k"
    assert {s["data"] for s in settings.values()} == {str(whole / "questions.jsonl")}
    config = {arm: s["config"] for arm, s in settings.items()}
    assert config["grpo"]["weight"] == 0 and config["clipo-paper"]["tau"] == 0.05
    assert config["clipo"]["tau"] == 0.5 and config["clipo"]["contrastive_kind"] == "decoupled"
    assert config["clipo-shuffled"] == config["clipo"] | {"shuffle_contrast": True}
    assert all(c["lr"] == 5e-6 and c["steps"] == 2 for c in config.values())
    for name in ("start", *gsm8k.ARMS):
        for how, samples in (("greedy", 1), ("sampled", 4)):
            results = run_folder.read_json(whole / name / how / "results.json", {})["results"]
            assert [figures["problems"] for figures in results.values()] == [1, 4]  # unseen, and the test
            lines = run_folder.read_lines(whole / name / how / "rollouts.jsonl")
            assert all(len(line["correct"]) == samples and max(line["lengths"]) <= 8 for line in lines)


def test_questions_are_those_of_the_seen_that_are_solved_now_and_then(place, whole, tmp_path, monkeypatch):
    seen = run_folder.read_lines(place / "rows.jsonl")[:-1]
    assert run_folder.read_lines(whole / "unseen.jsonl") == run_folder.read_lines(place / "rows.jsonl")[-1:]
    chosen = run_folder.read_lines(whole / "questions.jsonl")
    assert sorted(row["question"] for row in chosen) == sorted(row["question"] for row in seen)  # 8 of 16, each
    right = iter([1, 2, 14, 15, 0])
    lines = [{"correct": [True] * n + [False] * (16 - n)} for n in right]
    monkeypatch.setattr(gsm8k, "answered", lambda *_: lines)
    given = SimpleNamespace(out=tmp_path, questions=99)
    rows = [{"question": str(n), "answer": "#### 1"} for n in range(5)]
    gsm8k.choose(rows, given, [])
    asked = run_folder.read_lines(tmp_path / "asked.jsonl")
    assert run_folder.read_lines(tmp_path / "questions.jsonl") == asked[1:3] and asked != rows
    lines[:] = [{"correct": [True] * 16}] * 5
    with pytest.raises(UserError, match=r"^none of 5 questions is solved in 2 to 14 of 16 samples; expected a larger"):
        gsm8k.choose(rows, given, [])


def test_in_chunks_it_ends_in_the_same_bits(place, whole, tmp_path, capsys):
    out, chunks = tmp_path / "gsm8k", 1
    while status := all_of_it(place, out, minutes=0.02 * 2**chunks):  # longer and longer: on any machine it ends
        assert status == 130 and capsys.readouterr().out.endswith("the time is over; the same command goes on\n")
        chunks += 1
    assert chunks > 1
    table = capsys.readouterr().out
    assert "unseen, sampled, 1 or 2 steps" in table and "rows, greedy" in table
    for name in ("start", *gsm8k.ARMS):
        assert f"| {name} | " in table
        assert (out / name / "model.safetensors").read_bytes() == (whole / name / "model.safetensors").read_bytes()
    (out / "questions.jsonl").write_text("")  # chosen anew
    assert all_of_it(place, out, minutes=60) == 0
    assert (out / "questions.jsonl").read_bytes() == (whole / "questions.jsonl").read_bytes()


def test_the_start_learns_the_boxed_solutions(place):
    model, tokenizer = run_models.load_model(str(place), torch.device("cpu"))
    rows = gsm8k.worked_solutions(str(place / "rows.jsonl"))
    solutions = gsm8k.Solutions(rows, seed=0)
    assert ("Tom has 3 coins. How many?", "3 = 3\nThe answer is \\boxed{3}.") in solutions.pairs
    training = run_warm_start.WarmStart(model, tokenizer, solutions, batches=40, batch_size=8, pretrained=True)
    losses = [training.batch() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    # the first loss again, from the text of prompts as train.py and eval.py write them
    model, tokenizer = run_models.load_model(str(place), torch.device("cpu"))
    again, total, count = gsm8k.Solutions(rows, seed=0), 0.0, 0
    for question, response in (again.pair() for _ in range(8)):
        prompt = task_data.prompt_ids(tokenizer, question)
        ids = torch.tensor([[*prompt, *tokenizer(response + "<|im_end|>", add_special_tokens=False)["input_ids"]]])
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= logprobs.gather(1, ids[0, len(prompt) :, None]).sum().item()
        count += ids.shape[1] - len(prompt)
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


def test_a_large_vocabularys_logits_in_pieces_teach_the_same(place, monkeypatch):
    rows, found = gsm8k.worked_solutions(str(place / "rows.jsonl")), []
    for at_once in (2**27, 5 * 600):  # five tokens at a time
        for module in (run_warm_start, update):
            monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
        model, tokenizer = run_models.load_model(str(place), torch.device("cpu"))
        model.double()  # a sum of weights may be near 0
        training = run_warm_start.WarmStart(model, tokenizer, gsm8k.Solutions(rows, seed=0), batches=3, pretrained=True)
        found.append([*(training.batch() for _ in range(2)), *(p.detach().sum().item() for p in model.parameters())])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"question": "How many?", "answer": "72"}], "0 of 1 rows hold a worked solution"),
        ([{"question": "How many?", "answer": "7 + 2 = 9 #### 9"}, {"question": "?", "answer": 3}], "1 of 2 rows"),
        ([], "0 of 0 rows"),
        ([{"question": 5, "answer": "7 + 2 = 9 #### 9"}], "0 of 1 rows"),
        ([{"answer": "7 + 2 = 9 #### 9"}], "0 of 1 rows"),
        ([{"question": "How many?", "answer": "7 + 2 = 9 #### 9"}], "holds one row; expected more"),
    ],
)
def test_rows_without_worked_solutions_are_refused(place, tmp_path, capsys, rows, expected):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", place, "--train", tmp_path / "rows.jsonl", "--test", place / "rows.jsonl"]
    given += ["--out", tmp_path / "out"]
    status = gsm8k.main(list(map(str, given)))
    said = capsys.readouterr().err
    assert status == 2 and expected in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["--test", "nowhere.jsonl"], "error: nowhere.jsonl is no file"),
        (["--train", "nowhere.jsonl"], "error: nowhere.jsonl is no file"),
        (["--model", "/nowhere"], "error: model /nowhere could not be opened"),
        (["--minutes", "0"], "error: --minutes is 0.0; expected a number above 0"),
        (["--questions", "0"], "error: --questions is 0; expected a number above 0"),
        (["--test", "ROWS", "ROWS"], "error: --test is "),
        (["--", "--stepz", "3"], "error: unrecognized arguments: --stepz"),
        (["--", "--steps", "0"], "error: --steps is 0; expected at least 1"),
        (["--", "--data=math"], "error: --data is given after --; expected options of train.py"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_trained(place, tmp_path, capsys, wrong, expected):
    rows, out = str(place / "rows.jsonl"), tmp_path / "out"
    wrong = [rows if part == "ROWS" else part for part in wrong]
    given = ["--model", str(place), "--train", rows, "--test", rows, "--out", str(out), *wrong]
    try:
        status = gsm8k.main(given)
    except SystemExit as ended:  # argparse's way
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2 and said.strip().splitlines()[-1].startswith(expected) and "Traceback" not in said
    assert not (out / "start").exists() and not (out / "grpo").exists()


def test_what_was_begun_otherwise_is_not_gone_on_with(place, whole, tmp_path, capsys):
    rows = [{"question": f"Ann has {n}?", "answer": f"{n} = <<{n}={n}>>{n} #### {n}"} for n in range(3)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = (whole / "begun.json").read_text()
    usual = ["--model", place, "--train", place / "rows.jsonl", "--test", place / "rows.jsonl", "--batches", "6"]
    for changed, name in ((["--train", tmp_path / "others.jsonl"], "train"), (["--batches", "7"], "batches")):
        assert gsm8k.main(list(map(str, [*usual, *changed, "--out", whole, "--", *SMALL]))) == 2
        assert f"was begun with another {name}; expected the same, or a fresh --out\n" in capsys.readouterr().err
    assert (whole / "begun.json").read_text() == begun
    assert gsm8k.main(list(map(str, [*usual, "--out", place]))) == 2  # which holds a model
    assert not (place / "start").exists()
