"""Qwen2.5, Llama-3.1 and DeepSeek-R1-Distill-Qwen: small checkpoints of their kind through all commands.

Their configurations in small, random weights, tokenizers with their special tokens, classes and splitting of text, and
chat templates that write what theirs write for one question.
"""

import json

import pytest
import torch
import transformers
from conftest import make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import eval as evaluation
import train
import tsne
from run import models as run_models
from run import points
from tasks import data as task_data
from tasks import grading

QUESTIONS = [
    {"question": f"Tom has {n} coins and finds {n + 2} more. How many coins are there?", "answer": f"#### {2 * n + 2}"}
    for n in range(8)
]
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, initializer_range=0.2)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURNS = "{% for m in messages %}OPEN{{ m.role }}CLOSE{{ m.content }}END{% endfor %}OPENassistantCLOSE"
MODELS = {
    "Qwen2.5": dict(
        config=lambda V: Qwen2Config(
            vocab_size=V, **SMALL, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-6,
            tie_word_embeddings=True, max_position_embeddings=32768,
        ),
        tokenizer_class="Qwen2Tokenizer",
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        tokens=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None),
        ends=["<|im_end|>", "<|endoftext|>"],
        template="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        + TURNS.replace("OPEN", "<|im_start|>").replace("CLOSE", "\n").replace("END", "<|im_end|>\n"),
        ending="<|im_start|>assistant\n",
    ),
    "Llama-3.1": dict(
        config=lambda V: LlamaConfig(
            vocab_size=V, **SMALL, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=131072,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        tokenizer_class="PreTrainedTokenizerFast",
        special=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        tokens=dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        ends=["<|end_of_text|>", "<|eot_id|>"],
        template="{{ bos_token }}"
        + TURNS.replace("OPEN", "<|start_header_id|>")
        .replace("CLOSE", "<|end_header_id|>\n\n")
        .replace("END", "<|eot_id|>"),
        ending="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "DeepSeek-R1-Distill-Qwen": dict(
        config=lambda V: Qwen2Config(
            vocab_size=V, **SMALL, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4, rms_norm_eps=1e-6,
            tie_word_embeddings=False, max_position_embeddings=131072,
        ),
        tokenizer_class="LlamaTokenizerFast",
        special=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"],
        tokens=dict(
            bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>", pad_token="<｜end▁of▁sentence｜>"
        ),
        ends=["<｜end▁of▁sentence｜>"],
        template="{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜><think>\n",
        ending="<｜Assistant｜><think>\n",
    ),
}  # fmt: skip


def make_checkpoint(folder, kind, split=SPLIT):
    """Its files as the hub has them; the tokenizer as the library `tokenizers` reads its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=kind["special"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([q["question"] for q in QUESTIONS] + ["10 10 10 45 67"] * 9, trainer)
    model = make_model(kind["config"](tokenizer.get_vocab_size()))
    ids = [tokenizer.token_to_id(token) for token in kind["ends"]]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ids if len(ids) > 1 else ids[0])
    model.config.eos_token_id = ids
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = kind["template"] + "{{ '' }}"  # or its last line break would be dropped
    declared = {"tokenizer_class": kind["tokenizer_class"], "chat_template": template, **kind["tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    return tokenizer


@pytest.mark.parametrize("name", list(MODELS))
def test_train_save_load_eval_and_tsne(name, tmp_path, capsys):
    kind, folder, out = MODELS[name], tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    as_written = make_checkpoint(folder, kind)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    tokenizer = run_models.load_tokenizer(str(folder))
    for text in (QUESTIONS[3]["question"], "\\boxed{12}\n\n  x  é 日本 123"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == as_written.encode(text).ids
    prompt = task_data.prompt_ids(tokenizer, QUESTIONS[0]["question"])
    written = tokenizer.decode(prompt)
    assert written.endswith(kind["ending"]) and QUESTIONS[0]["question"] + "\n" + task_data.SUFFIX in written
    if bos := kind["tokens"]["bos_token"]:
        assert prompt.count(tokenizer.convert_tokens_to_ids(bos)) == 1 and written.startswith(bos)

    settings = ["--steps", "2", "--head-warmup-steps", "1", "--prompts-per-step", "4", "--mini-batch-prompts", "2",
                "--samples-per-prompt", "4", "--max-new-tokens", "10", "--lr", "1e-3", "--d-embed", "16"]  # fmt: skip
    assert train.main(["--model", folder, "--data", data, "--out", out, *settings]) == 0
    assert "memory, planned: " in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [None, None] and rows[1]["kl"] is not None

    model, reopened = run_models.load_model(str(out), "cpu")
    start = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert model.config.rope_parameters == start.config.rope_parameters
    assert task_data.prompt_ids(reopened, QUESTIONS[0]["question"]) == prompt
    ends = model.generation_config.eos_token_id
    assert [ends] if isinstance(ends, int) else ends == [as_written.token_to_id(token) for token in kind["ends"]]

    evaluated = tmp_path / "eval"
    assert evaluation.main([str(out), "--data", str(data), "--max-new-tokens", "8", "--out", str(evaluated)]) == 0
    assert len((evaluated / "rollouts.jsonl").read_text().splitlines()) == len(QUESTIONS)
    options = ["--questions", "2", "--samples", "5", "--max-new-tokens", "8", "--out", str(tmp_path / "tsne")]
    assert tsne.main([str(out), *options]) == 0
    found = points.load_points(tmp_path / "tsne" / "tsne.npz")
    assert found["run"]["z"].shape == (10, 16) and found["before"]["hidden"].shape == (10, 32)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_tokenizers_own_file_wins_over_what_its_class_would_make_of_it(name, tmp_path):
    """Three digits at a time, where Qwen2Tokenizer, which transformers puts in for any qwen2 model, takes one."""
    as_written = make_checkpoint(tmp_path, MODELS[name], split=SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"))
    text = "12 and 4567 10 10 10"
    assert run_models.load_tokenizer(str(tmp_path))(text, add_special_tokens=False)["input_ids"] == (
        as_written.encode(text).ids
    )


def test_a_tokenizer_without_such_a_file(tmp_path):
    """Vocabulary and merges alone, as GPT-2 had them."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    transformers.GPT2Config().save_pretrained(tmp_path)
    assert run_models.load_tokenizer(str(tmp_path))("abba")["input_ids"] == [3, 2, 1]


def test_an_answer_after_a_think_block_is_found():
    response = "so 3 + 5 is \\boxed{9}? no.\n</think>\n\nThere are \\boxed{8} coins.<｜end▁of▁sentence｜>"
    assert grading.are_correct([response], ["8"]) == [True]
