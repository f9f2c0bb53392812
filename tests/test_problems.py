"""Loading and grading on plain cases; real data where it is at hand."""

import json
from itertools import pairwise

import pytest
from conftest import DATA

import toy
from problems import SUFFIX, Problem, UserError, extract_answer, is_correct, load_problems, prompt_ids

REAL = {
    "gsm8k_train.parquet": 7473, "gsm8k_test.parquet": 1319, "math_train.parquet": 7500, "math500_test.parquet": 500,
}  # fmt: skip


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{18}", "18"),
        ("\\boxed{1} or rather \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{a {b} c}} and then words", "\\text{a {b} c}"),
        ("3 + 4 = 7 . #### 7", "7"),
        ("#### 1\n#### 1,234", "1,234"),
        ("\\boxed{5}\n#### 6", "5"),
        ("the answer is 18", None),  # a reward that takes the last number can be farmed
        ("\\boxed{}", None),
        ("\\boxed{unclosed", None),
        ("####", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "said, gold, right",
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("$1,800", "1800", True),
        ("0.5", "1/2", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac12", "-\\frac12", False),
        ("12.5", "12", False),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        ("x^2", "x^3", False),
        ("(1, 2)", "(2, 1)", False),
        ("100000000000000000000001", "100000000000000000000000", False),  # floats cannot tell
        ("0.1", "0.10000000000000001", False),
    ],
)
def test_is_correct(said, gold, right):
    assert is_correct(f"Therefore \\boxed{{{said}}}.", gold) is right


def test_gold_may_be_a_whole_solution():
    assert is_correct("\\boxed{0}", "so $a+b=-3+3=\\boxed{0}$.")
    assert is_correct("#### 18", "16 - 3 - 4 = 9\n#### 18")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"},
        {"problem": "How many?", "solution": "It is \\boxed{2}."},
        {"problem": "How many?", "solution": "It is \\boxed{3}.", "answer": "2"},
        {"prompt": [{"role": "user", "content": f"How many?\n{SUFFIX}"}], "reward_model": {"ground_truth": "2"}},
    ],
)
def test_every_row_format(tmp_path, row):
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(row) + "\n\n")
    assert load_problems(str(file)) == [Problem("How many?", "2")]


@pytest.mark.parametrize("name, count", REAL.items())
def test_real_data(name, count):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not at hand")
    problems = load_problems(str(DATA / name))
    assert len(problems) == count
    assert all(p.question and SUFFIX not in p.question for p in problems)
    sample = problems[::97]
    assert all(is_correct(f"\\boxed{{{p.answer}}}", p.answer) for p in sample)
    others = [(p, q) for p, q in pairwise(sample) if p.answer != q.answer]
    assert others and not any(is_correct(f"\\boxed{{{p.answer}}}", q.answer) for p, q in others)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("no.jsonl", None, "is no file"),
        ("empty.jsonl", "", "holds no rows"),
        ("cut.jsonl", '{"question": "a", "answer": "1"}\n{"question": "b', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "row 1: expected a JSON object, not list"),
        ("columns.jsonl", '{"text": "a"}', "row 1: columns are text; expected prompt and reward_model, question and"),
        ("noanswer.jsonl", '{"question": "a", "answer": ""}', "row 1: question or answer is empty"),
        ("bad.parquet", "not parquet", "is not a readable parquet file"),
        ("table.csv", "a,b", "expected gsm8k, math, or the path of a .parquet or .jsonl file"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_problems(str(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_with_and_without_a_chat_template():
    tokenizer = toy.make_tokenizer()
    assert tokenizer.decode(prompt_ids(tokenizer, "How many coins ?", suffix="")) == "How many coins ?"
    tokenizer.chat_template = (
        "{% for m in messages %}Tom says {{ m.content }} {% endfor %}{% if add_generation_prompt %}Ann says{% endif %}"
    )
    ids = prompt_ids(tokenizer, "How many coins", suffix="")
    assert tokenizer.decode(ids) == "Tom says How many coins Ann says"
