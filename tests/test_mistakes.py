"""A user's mistakes, and the one line that each gets: what was given, what was expected, what to do."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from datasets import Dataset

import eval as evaluation
import toy
import train
import tsne
from engine import report

TRAIN = (
    "--model {model} --data {data} --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --steps 1 --out out"
)
NO_HUB = (
    "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files. "
    "Expected a folder that save_pretrained wrote, or the name of a causal language model on the hub"
)
SAVED = "Expected a folder that save_pretrained wrote, or the name of a causal language model on the hub"
COLUMNS = "expected prompt and reward_model, question and answer, or problem and solution"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model and data set, and with everything that can be wrong with either."""
    here = tmp_path_factory.mktemp("mistakes")
    tokenizer = toy.make_tokenizer()
    toy.make_model("tiny", tokenizer, 0).save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")

    def rows(name, *lines):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (here / name).write_text(text)

    good = [{"question": f"Tom has {i} coins", "answer": str(i)} for i in range(4)]
    rows("good.jsonl", *good)
    rows("empty.jsonl")
    rows("no-answer.jsonl", good[0], {"question": "x"})
    rows("null-answer.jsonl", good[0], {"question": "x", "answer": None})
    rows("no-question.jsonl", {"answer": "x"})
    rows("half.jsonl", good[0], "{half")
    rows("list.jsonl", [1, 2])
    rows("data.csv", "question,answer")
    (here / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    (here / "folder.jsonl").mkdir()
    Dataset.from_list([{"colour": 1}]).to_parquet(here / "columns.parquet")
    Dataset.from_list(good).to_parquet(here / "cut.parquet")
    whole = (here / "cut.parquet").read_bytes()
    (here / "cut.parquet").write_bytes(whole[: len(whole) // 2])

    def broken(name, missing=(), **edits):
        folder = here / name
        shutil.copytree(here / "model", folder)
        for file in missing:
            (folder / file).unlink()
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
        if edits:
            (folder / "config.json").write_text(json.dumps({**config, **edits}))
        return folder

    broken("no-config", ["config.json"])
    (broken("bad-config") / "config.json").write_text("{")
    broken("no-tokenizer", ["tokenizer.json", "tokenizer_config.json"])
    broken("no-weights", ["model.safetensors"])
    cut = broken("cut-weights") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    no_eos = broken("no-eos", ["generation_config.json"], eos_token_id=None)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    plain.save_pretrained(no_eos)
    larger = toy.make_tokenizer()
    larger.add_tokens(["zig", "zag"])
    larger.save_pretrained(broken("small-vocabulary"))
    broken("encoder", model_type="bert", architectures=["BertModel"])
    for name, text in (("bad-run", "{"), ("old-run", '{"model": "m", "data": "toy", "config": {"colour": 1}}')):
        (here / name).mkdir()
        (here / name / "settings.json").write_text(text)
    (here / "a-file").write_text("x")
    shutil.copytree(here / "old-run", here / "a-run")
    return here


def with_model(model):
    return TRAIN.format(model=model, data="good.jsonl")


def with_data(data):
    return TRAIN.format(model="model", data=data)


def with_options(options):
    return f"{with_data('good.jsonl')} {options}"


# (command line, what it says after "error: "; "..." stands for anything; {here} for the folder)
TRAINING = [
    (with_model("nowhere"), f"model nowhere could not be opened: {NO_HUB}"),
    (
        with_model("no-config"),
        "model {here}/no-config has no config.json; expected a folder that save_pretrained wrote",
    ),
    (with_model("bad-config"), f"model {{here}}/bad-config could not be opened: ...is not a valid JSON file. {SAVED}"),
    (with_model("a-file"), f"model {{here}}/a-file could not be opened: ...{SAVED}"),
    (
        with_model("no-tokenizer"),
        "model {here}/no-tokenizer: its tokenizer knows no text; expected the tokenizer's files beside the model's",
    ),
    (with_model("no-weights"), f"model {{here}}/no-weights could not be opened: Error no file named ...{SAVED}"),
    (
        with_model("cut-weights"),
        f"model {{here}}/cut-weights could not be opened: Error while deserializing ...{SAVED}",
    ),
    (
        with_model("no-eos"),
        "model {here}/no-eos: neither model nor tokenizer has an end-of-sequence token; set tokenizer.eos_token",
    ),
    (
        with_model("small-vocabulary"),
        "model {here}/small-vocabulary: its tokenizer has 81 tokens, its embedding only 79; "
        "expected a tokenizer made for this model",
    ),
    (
        with_model("encoder"),
        "model {here}/encoder: BertLMHeadModel cannot be served by KVCache: its logits are off ...",
    ),
    (with_data("nowhere.jsonl"), "nowhere.jsonl is no file; expected a .parquet or .jsonl file"),
    (with_data("folder.jsonl"), "{here}/folder.jsonl is no file; expected a .parquet or .jsonl file"),
    (with_data("empty.jsonl"), "{here}/empty.jsonl holds no rows; expected at least one problem"),
    (with_data("no-answer.jsonl"), "{here}/no-answer.jsonl, row 2: question or answer is empty; expected both"),
    (with_data("null-answer.jsonl"), "{here}/null-answer.jsonl, row 2: question or answer is empty; expected both"),
    (with_data("no-question.jsonl"), f"{{here}}/no-question.jsonl, row 1: columns are answer; {COLUMNS}"),
    (with_data("half.jsonl"), "{here}/half.jsonl, line 2 is not JSON (...); expected an object per line"),
    (with_data("list.jsonl"), "{here}/list.jsonl, row 1: expected a JSON object, not list"),
    (with_data("binary.jsonl"), "{here}/binary.jsonl is not UTF-8 text; expected a JSON object per line"),
    (with_data("cut.parquet"), "{here}/cut.parquet is not a readable parquet file: ..."),
    (with_data("columns.parquet"), f"{{here}}/columns.parquet, row 1: columns are colour; {COLUMNS}"),
    (with_data("data.csv"), "data is '{here}/data.csv'; expected gsm8k, ... or the path of a .parquet or .jsonl file"),
    (with_data("gsm8k"), "gsm8k (openai/gsm8k, train) could not be loaded: ...give a local .parquet or .jsonl file"),
    (with_options("--samples-per-prompt 1"), "--samples-per-prompt is 1; expected at least 2"),
    (with_options("--temperature 0"), "--temperature is 0.0; expected more than 0"),
    (with_options("--temperature nan"), "--temperature is nan; expected a finite number and more than 0"),
    (with_options("--lr -1"), "--lr is -1.0; expected at least 0"),
    (with_options("--lr nan"), "--lr is nan; expected a finite number and at least 0"),
    (with_options("--beta inf"), "--beta is inf; expected a finite number"),
    (with_options("--weight -0.1"), "--weight is -0.1; expected at least 0"),
    (with_options("--clip-low 2"), "--clip-low is 2.0; expected at most 1"),
    (with_options("--reward-floor 1"), "--reward-floor is 1.0; expected at most 0"),
    (with_options("--tau 0"), "--tau is 0.0; expected more than 0"),
    (with_options("--steps 0"), "--steps is 0; expected at least 1"),
    (with_options("--seed -1"), "--seed is -1; expected at least 0"),
    (with_options("--overlong-buffer 99"), "--overlong-buffer is 99; expected at most max_new_tokens, 4"),
    (with_options("--save-every 0"), "--save-every is 0; expected 1 or more"),
    (with_options("--log-groups 0"), "--log-groups is 0; expected 1 or more"),
    (with_options("--warm-start-batches 0"), "--warm-start-batches is 0; expected 1 or more"),
    (
        with_options("--prompts-per-step 9"),
        "{here}/good.jsonl has 4 prompts of at most 512 tokens; expected at least --prompts-per-step 9",
    ),
    (
        with_options("--max-prompt-tokens 2"),
        "{here}/good.jsonl has 0 prompts of at most 2 tokens; expected at least --prompts-per-step 2",
    ),
    (
        with_options("--max-new-tokens 100000"),
        "--max-new-tokens is 100000, prompts have up to 20 tokens, 100020 in all, but the model has 256 positions; "
        "expected fewer (--max-prompt-tokens drops long prompts)",
    ),
    (
        with_options("--device cuda:99"),
        "--device cuda:99 cannot be used here; expected cpu, or cuda where there is a GPU",
    ),
    (
        with_options("--device abacus"),
        "--device abacus cannot be used here; expected cpu, or cuda where there is a GPU",
    ),
    (
        with_options("--policy-loss ppo"),
        "argument --policy-loss: invalid choice: 'ppo' (...); --help lists every option",
    ),
    (with_options("--steps two"), "argument --steps: invalid int value: 'two'; --help lists every option"),
    (with_options("--colour blue"), "unrecognized arguments: --colour blue; --help lists every option"),
    (with_options("--out a-file"), "a-file: File exists; expected a folder with room that can be written; ..."),
    (with_options("--out /proc/run"), "/proc/run: ...; expected a folder with room that can be written; ..."),
    (
        with_options("--out a-run"),
        "a-run already holds a run; go on with --resume --out a-run, or choose another --out",
    ),
    (
        "--data good.jsonl",
        "--data is {here}/good.jsonl but no --model is given; expected --model with a folder or a hub name",
    ),
    ("--resume", "--resume is given without --out; expected --out with the folder of the run to go on with"),
    (
        "--resume --out nowhere",
        "nowhere holds no run to resume (no settings.json); expected --out with the folder of a run",
    ),
    (
        "--resume --out bad-run",
        "bad-run/settings.json cannot be read (...); expected what train.py wrote",
    ),
    (
        "--resume --out old-run",
        "old-run/settings.json cannot be used (...'colour'); expected what this version of train.py wrote",
    ),
]
EVALUATION = [
    ("", "no model is given; expected a run's folder or a model's name, as in: python eval.py runs/toy"),
    ("nowhere --data good.jsonl", f"model nowhere could not be opened: {NO_HUB}"),
    ("model --data empty.jsonl", "empty.jsonl holds no rows; expected at least one problem"),
    ("model --data nothing", "--data names 'nothing'; expected some of: toy, ..."),
    ("model --data good.jsonl --samples 0", "--samples is 0; expected 1 or more"),
    ("model --data good.jsonl --temperature -1", "--temperature is -1.0; expected 0 or more"),
    ("model --data good.jsonl --top-p 0", "--top-p is 0.0; expected a number in (0, 1]"),
    ("model --data good.jsonl --limit 0", "--limit is 0; expected 1 or more"),
    (
        "model --data good.jsonl --max-new-tokens 9999",
        "--max-new-tokens is 9999, but the model has 256 positions; expected fewer",
    ),
    ("no-eos --data good.jsonl", "model no-eos: neither model nor tokenizer has an end-of-sequence token; ..."),
    ("--compare nowhere model", "nowhere holds no evaluation; run python eval.py nowhere first"),
    ("--regrade good.jsonl", "good.jsonl holds no texts; expected the rollouts.jsonl of an evaluation ..."),
]
PICTURES = [
    ("", "expected either runs (or models) or --redraw with a tsne.npz"),
    ("model --data empty.jsonl", "empty.jsonl holds no rows; expected at least one problem"),
    ("bad-run", "bad-run/settings.json cannot be read (...); expected what train.py wrote"),
    ("model --data good.jsonl --perplexity nan", "--perplexity is nan; expected 1 or more"),
    ("model --questions 3 --samples 3", "9 rollouts are too few for a picture; expected 10 or more"),
    ("no-eos --data good.jsonl", "model no-eos: neither model nor tokenizer has an end-of-sequence token; ..."),
    ("--redraw a-file", "a-file cannot be read; expected a tsne.npz that this command wrote"),
    (
        "model --data good.jsonl --out a-file/x --max-new-tokens 3",
        "a-file/x: Not a directory; expected a folder that can be written",
    ),
]
PAGES = [
    ("", "the following arguments are required: RUN; --help lists every option"),
    ("nowhere", "nowhere holds no run (no settings.json); expected the folder of a run of train.py"),
    ("bad-run", "bad-run/settings.json cannot be read (...); expected what train.py wrote"),
    ("old-run", "old-run has no finished step yet; expected one in metrics.jsonl"),
    ("a b c", "3 runs are given; expected one or two"),
]
TABLE = [
    (program, *row)
    for program, rows in ((train, TRAINING), (evaluation, EVALUATION), (tsne, PICTURES), (report, PAGES))
    for row in rows
]


@pytest.mark.parametrize("program, line, said", TABLE, ids=[f"{p.__name__} {line[-40:]}" for p, line, _ in TABLE])
def test_a_mistake_gets_its_line_and_status_2(place, monkeypatch, capfd, program, line, said):
    monkeypatch.chdir(place)
    before = {file: file.stat().st_mtime_ns for file in place.glob("*/*") if file.is_file()}
    try:
        status = program.main(line.split())
    except SystemExit as stopped:  # argparse
        status = stopped.code
    last = capfd.readouterr().err.splitlines()
    errors = [
        text for text in last if not text.rstrip().endswith("it/s]") and text.strip()
    ]  # (a bar that did not move)
    assert status == 2 and len(errors) == 1
    parts = ("error: " + said.replace("{here}", str(place))).split("...")
    assert errors[0].startswith(parts[0]) and errors[0].endswith(parts[-1])
    assert all(part in errors[0] for part in parts) and (len(parts) > 1 or errors[0] == parts[0])
    assert before == {file: file.stat().st_mtime_ns for file in before}  # nothing is lost


def test_the_table_is_as_long_as_promised():
    assert len(TRAINING) >= 40


def test_what_is_no_mistake(place, monkeypatch, capsys):
    """Models without a chat template or a pad token are served; long prompts are dropped and counted."""
    monkeypatch.chdir(place)
    shutil.copytree("model", "no-pad")
    tokenizer = toy.make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained("no-pad")
    rows = [json.loads(line) for line in Path("good.jsonl").read_text().splitlines()]
    rows.append({"question": "Tom has " * 30, "answer": "5"})
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TRAIN.format(model="no-pad", data="long.jsonl").replace("--out out", "--out no-mistake")
    assert train.main([*options.split(), "--max-prompt-tokens", "40"]) == 0
    assert "1 of 5 prompts are over 40 tokens and left out" in capsys.readouterr().out
