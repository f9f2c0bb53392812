"""A user's mistakes, and the one line that each gets: what was given, what was expected, what to do."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import save_file

import eval as evaluation
import train
import tsne
from config import CLIPOConfig
from lab.attack import mistakes
from run import page
from run import settings as run_settings
from run import warm_start as run_warm_start
from tasks import toy

Dataset = pytest.importorskip("datasets", reason="not installed (requirements.txt)").Dataset

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
    run_warm_start.make_model("tiny", tokenizer, 0).save_pretrained(here / "model")
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
    rows("deep.jsonl", good[0], 100_000 * "[")
    rows("deep-row.jsonl", good[0], 400 * "[" + 400 * "]")
    rows("surrogate.jsonl", good[0], {"question": "\ud800", "answer": "1"})
    rows("digits.jsonl", good[0], f'{{"question": "x", "answer": {5000 * "9"}}}')
    rows("no-text.jsonl", good[0], {"question": ["x"], "answer": {"y": 1}})
    rows("line-break.jsonl", {"colour\nred": 1})
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
    broken("unfitting-layers", num_hidden_layers=9)
    broken("more-layers", num_hidden_layers=9, layer_types=None)
    broken("odd-eos", ["generation_config.json"]).joinpath("generation_config.json").write_text('{"eos_token_id": "x"}')
    for name, ids in (("empty", []), ("far", [10**9, 1]), ("below", -1), ("true", True)):
        folder = broken(f"{name}-eos", ["generation_config.json"])
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    broken("no-heads", num_attention_heads=0)
    of_parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    templates = ("syntax", "{% if %}"), ("unknown", "{{ colour() }}"), ("raising", "{{ 1 / 0 }}"), ("parts", of_parts)
    for name, template in templates:
        (broken(f"template-{name}") / "chat_template.jinja").write_text(template)
    (broken("bad-tokenizer", ["tokenizer_config.json"]) / "tokenizer.json").write_text('{"model": 1}')
    broken("encoder", model_type="bert", architectures=["BertModel"])
    run = dataclasses.asdict(run_settings.Settings("model", "toy", "toy", False, "tiny", 3, CLIPOConfig()))

    def settings(edits=(), **config):
        return json.dumps({**run, **dict(edits), "config": {**run["config"], **config}})

    for name, text in (
        ("bad-run", "{"), ("list-run", "[1]"), ("deep-run", 100_000 * "["), ("untyped-run", settings(steps="ten")),
        ("no-data-run", settings({"data": None})), ("size-run", settings({"size": "huge"})),
        ("batches-run", settings({"warm_start_batches": "3"})), ("low-run", settings(d_embed=-1)),
        ("no-lines-run", settings()), ("good-run", settings()), ("wide-run", settings(d_embed=7)),
        ("old-run", '{"model": "m", "data": "toy", "config": {"colour": 1}}'),
    ):  # fmt: skip
        (here / name).mkdir()
        (here / name / "settings.json").write_text(text)
    (here / "no-lines-run" / "metrics.jsonl").write_text('{"step": 1, "seconds": 3}\n')
    for file in (here / "model").iterdir():
        shutil.copy(file, here / "wide-run")
    save_file({"layers.0.weight": torch.zeros(512, 128)}, here / "wide-run" / "head.safetensors")
    row = {"benchmark": "b", "problem": 0, "question": "x", "gold": "1", "texts": ["1"], "lengths": [1],
           "cut_off": [False], "answers": ["1"], "correct": [True], "seconds": 1.0}  # fmt: skip
    rows("texts-only.jsonl", {"texts": ["x"]})
    rows("graded.jsonl", row, {**row, "texts": ["1", 2]})
    rows("uneven.jsonl", row, {**row, "texts": ["1", "2"]})
    np.savez(here / "other.npz", colour=np.zeros(3))
    np.save(here / "array.npy", np.zeros(3))
    (here / "array.npy").rename(here / "array.npz")
    (here / "cut.npz").write_bytes((here / "other.npz").read_bytes()[:50])
    good_points = {"m/hidden": np.ones((12, 3), np.float16), "m/right": np.ones(12, bool), "m/question": np.arange(12)}
    np.savez(here / "nan.npz", **{**good_points, "m/hidden": np.full((12, 3), np.nan, np.float16)})
    np.savez(here / "uneven.npz", **{**good_points, "m/right": np.ones(11, bool)})
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
        "model {here}/small-vocabulary: its tokenizer has 77 tokens, its embedding only 75; "
        "expected a tokenizer made for this model",
    ),
    (
        with_model("encoder"),
        "model {here}/encoder: its files hold no bert...; expected the files of the causal language model that ...",
    ),
    (
        with_model("unfitting-layers"),
        f"model {{here}}/unfitting-layers could not be opened: ...{SAVED}",
    ),
    (
        with_model("more-layers"),
        "model {here}/more-layers: its files hold no model.layers... (...); expected the files of the causal ...",
    ),
    (
        with_model("odd-eos"),
        "model {here}/odd-eos: its eos_token_id is 'x'; expected the id of a token, or a list of ids",
    ),
    *(
        (with_model(f"{name}-eos"), f"model {{here}}/{name}-eos: its eos_token_id is {ids}; expected the id of a ...")
        for name, ids in (("empty", "[]"), ("far", "[1000000000, 1]"), ("below", "-1"), ("true", "True"))
    ),
    (with_model("no-heads"), f"model {{here}}/no-heads could not be opened: ...{SAVED}"),
    (with_model("bad-tokenizer"), f"model {{here}}/bad-tokenizer could not be opened: ...{SAVED}"),
    (
        with_model("template-syntax"),
        "model {here}/template-syntax: its chat template cannot be used (TemplateSyntaxError: ...); expected one ...",
    ),
    (
        with_model("template-unknown"),
        "model {here}/template-unknown: its chat template cannot be used (UndefinedError: ...); expected one ...",
    ),
    (
        with_model("template-raising"),
        "model {here}/template-raising: its chat template cannot be used (ZeroDivisionError: ...); expected one ...",
    ),
    (
        with_model("template-parts"),
        "model {here}/template-parts: its chat template makes '' of the question 'How many are 3 and 4?', which is ...",
    ),
    (
        with_data("deep.jsonl"),
        "{here}/deep.jsonl, line 2 is not JSON (it is nested too deeply); expected an object per line",
    ),
    (
        with_data("deep-row.jsonl"),
        "{here}/deep-row.jsonl, line 2 is not JSON (it is nested too deeply); expected an object per line",
    ),
    (
        with_data("surrogate.jsonl"),
        "{here}/surrogate.jsonl, line 2 is not JSON (...surrogates not allowed); expected an object per line",
    ),
    (with_data("digits.jsonl"), "{here}/digits.jsonl, line 2 is not JSON (...4300...); expected an object per line"),
    (
        with_data("no-text.jsonl"),
        "{here}/no-text.jsonl, row 2: question and answer are list and dict; expected a text, and a text or number",
    ),
    (with_data("line-break.jsonl"), f"{{here}}/line-break.jsonl, row 1: columns are colour red; {COLUMNS}"),
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
    *(
        (with_options(f"--{name}={value}"), f"--{name} is {value}; expected at {bound}")
        for name, value, bound in (
            ("lr", "1e+38", "most 1"),
            ("head-lr", "1e+38", "most 1"),
            ("weight-decay", "1e+44", "most 1"),
            ("head-weight-decay", "1e+30", "most 1"),
            ("clip-high", "1e+39", "most 1000000"),
            ("reward-floor", "-1e+300", "least -1000000"),
            ("reward-ceiling", "1e+300", "most 1000000"),
            ("beta", "1e+300", "most 1000000"),
            ("weight", "1e+39", "most 1000000"),
            ("max-grad-norm", "1e+39", "most 1000000"),
            ("temperature", "1e+39", "most 100"),
            ("tau", "1e+39", "most 100"),
            ("seed", 2**52, f"most {2**32 - 1}"),
            ("head-steps", 10**9, "most 1000000"),
            ("save-every", 10**9, "most 1000000"),
            ("log-groups", 10**9, "most 1000000"),
            ("warm-start-batches", 10**9, "most 1000000"),
            ("test-stories", 10**9, "most 1000000"),
        )
    ),
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
    *(
        (
            with_options(f"--device {name}"),
            f"--device {name} cannot be used here; expected cpu, or cuda where there ...",
        )
        for name in ("meta", "xpu", "mps", "hpu", "cpu:x")
    ),
    (with_options("--steps 1000000000"), "--steps is 1000000000; expected at most 1000000"),
    (
        with_options("--seed 99999999999999999999"),
        "--seed is 99999999999999999999; expected int...",
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
    *(
        (
            f"--resume --out {name}-run",
            f"{name}-run/settings.json cannot be read ({said}); expected what train.py wrote",
        )
        for name, said in (
            ("list", "it is list, not dict"),
            ("deep", "it is nested too deeply"),
            ("no-data", "data is NoneType, not str"),
        )
    ),
    *(
        (f"--resume --out {name}-run", f"{name}-run/settings.json cannot be used ({said}); expected what ...")
        for name, said in (
            ("untyped", "steps is 'ten'; expected int"),
            ("size", "size is 'huge'; expected one of: tiny..."),
            ("low", "d_embed is -1; expected at least 1"),
            ("batches", "warm_start_batches is '3'; expected int"),
        )
    ),
    ("--resume --out good-run --steps 0", "--steps is 0; expected at least 1"),
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
    ("model --data good.jsonl --temperature inf", "--temperature is inf; expected at most 1000000"),
    ("model --data good.jsonl --samples 9999999", "--samples is 9999999; expected at most 1000000"),
    (
        "model --data good.jsonl --seed 9999999999999999999",
        "--seed is 9999999999999999999; expected at most 4294967295",
    ),
    ("model --data good.jsonl --top-p 0", "--top-p is 0.0; expected a number in (0, 1]"),
    ("model --data good.jsonl --limit 0", "--limit is 0; expected 1 or more"),
    (
        "model --data good.jsonl --max-new-tokens 9999",
        "--max-new-tokens is 9999, but the model has 256 positions; expected fewer",
    ),
    ("no-eos --data good.jsonl", "model no-eos: neither model nor tokenizer has an end-of-sequence token; ..."),
    ("--compare nowhere model", "nowhere holds no evaluation; run python eval.py nowhere first"),
    ("untyped-run", "untyped-run/settings.json cannot be used (steps is 'ten'; expected int); expected what ..."),
    ("no-data-run", "no-data-run/settings.json cannot be read (data is NoneType, not str); expected what ..."),
    ("--regrade list.jsonl", "list.jsonl, line 1: it is list, not dict; expected what train.py or eval.py wrote"),
    ("--regrade half.jsonl", "half.jsonl, line 2 is no JSON (...); expected an object per line"),
    ("--regrade texts-only.jsonl", "texts-only.jsonl, line 1: it has no benchmark; expected what eval.py wrote"),
    ("--regrade graded.jsonl", "graded.jsonl, line 2: texts[1] is int, not str; expected what eval.py wrote"),
    ("--regrade uneven.jsonl", "uneven.jsonl, line 2: it has not as many samples as the others; expected what ..."),
    ("--regrade folder.jsonl", "...folder.jsonl..."),
    ("--regrade good.jsonl", "good.jsonl holds no texts; expected the rollouts.jsonl of an evaluation ..."),
]
PICTURES = [
    ("", "expected either runs (or models) or --redraw with a tsne.npz"),
    ("model --data empty.jsonl", "empty.jsonl holds no rows; expected at least one problem"),
    ("bad-run", "bad-run/settings.json cannot be read (...); expected what train.py wrote"),
    ("model --data good.jsonl --perplexity nan", "--perplexity is nan; expected 1 or more"),
    ("/nowhere --data toy", f"model /nowhere could not be opened: ... {SAVED}"),
    ("model --questions 0", "--questions is 0; expected 1 or more"),
    ("model --questions 3 --samples 3", "9 rollouts are too few for a picture; expected 10 or more"),
    ("no-eos --data good.jsonl", "model no-eos: neither model nor tokenizer has an end-of-sequence token; ..."),
    ("untyped-run", "untyped-run/settings.json cannot be used (steps is 'ten'; expected int); expected what ..."),
    ("model --data good.jsonl --seed -1", "--seed is -1; expected 0 or more"),
    (
        "wide-run --max-new-tokens 3 --questions 2 --samples 5",
        "wide-run/head.safetensors does not fit its model and settings; expected all of one run",
    ),
    ("--redraw folder.jsonl", "folder.jsonl cannot be read; expected a tsne.npz that this command wrote"),
    ("--redraw array.npz", "array.npz cannot be read; expected a tsne.npz that this command wrote"),
    ("--redraw cut.npz", "cut.npz cannot be read; expected a tsne.npz that this command wrote"),
    ("--redraw other.npz", "other.npz: its arrays have no model's name; expected a tsne.npz that this command wrote"),
    ("--redraw nan.npz", "nan.npz: the arrays of 'm' are no points with verdicts; expected a tsne.npz that ..."),
    ("--redraw uneven.npz", "uneven.npz: the arrays of 'm' are not equally long; expected all of one picture"),
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
    ("untyped-run", "untyped-run/settings.json cannot be used (steps is 'ten'; expected int); expected what ..."),
    ("no-lines-run", "no-lines-run: its lines cannot be read (...line 1: seconds is int, not dict; ..."),
    ("old-run", "old-run has no finished step yet; expected one in metrics.jsonl"),
    ("a b c", "3 runs are given; expected one or two"),
]
TABLE = [
    (program, *row)
    for program, rows in ((train, TRAINING), (evaluation, EVALUATION), (tsne, PICTURES), (page, PAGES))
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


@pytest.mark.parametrize("program", ["train.py", "eval.py", "tsne.py"])
def test_ctrl_c_while_modules_are_imported_gets_one_line(program):
    """Interrupted as soon as torch is being loaded."""
    at_work = subprocess.Popen([sys.executable, ROOT / program], stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{at_work.pid}/maps")
    if not maps.exists():
        pytest.skip("there is no /proc that would tell when")
    while "libtorch" not in maps.read_text():
        assert at_work.poll() is None
        time.sleep(0.005)
    at_work.send_signal(signal.SIGINT)
    assert at_work.communicate(timeout=60)[1] == "stopped\n"
    assert at_work.returncode == -signal.SIGINT  # 130 in a shell


def test_with_trl_the_data_is_read_before_the_gpu_is_asked_for(place, monkeypatch, capfd):
    pytest.importorskip("trl")
    from lab import trl_train

    monkeypatch.chdir(place)
    for options, said in (
        ("--data half.jsonl", "error: half.jsonl, line 2 is not JSON"),
        ("--data good.jsonl --resume", "error: x holds no checkpoint to resume from"),
        ("--data good.jsonl --clipo steps=ten", "error: --clipo or --trl: steps is 'ten'; expected int"),
        ("--data good.jsonl --trl colour=1", "error: --clipo or --trl: "),
    ):
        assert trl_train.main(f"--model model --out x {options}".split()) == 2
        errors = capfd.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in errors) == 1 and errors[-1].startswith(said)


def test_files_changed_at_random_get_one_line_too(capsys):
    """`python -m lab.attack mistakes` is the long form."""
    assert mistakes.main(["--quick", "--seed", "1"]) == 0, capsys.readouterr().out


def test_the_attack_knows_a_traceback_when_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "main", lambda arguments: {}["nothing"])
    assert "KeyError" in mistakes.outcome(page, "run", tmp_path, limit=9)
    monkeypatch.setattr(page, "main", lambda arguments: 2)
    assert "status 2" in mistakes.outcome(page, "run", tmp_path, limit=9)


def test_every_number_has_both_ends():
    """Whatever is added to CLIPOConfig."""
    for f in dataclasses.fields(CLIPOConfig):
        if isinstance(f.default, int | float) and not isinstance(f.default, bool):
            for huge in (10**12, -(10**12)):
                with pytest.raises(ValueError, match=f"^{f.name} is -?1.*; expected (at (least|most)|more than) "):
                    CLIPOConfig(**{f.name: type(f.default)(huge)})
