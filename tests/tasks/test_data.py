"""Rows of every format are read right, or refused in one line that counts them; prompts with and without a template."""

import json
import re

import pytest
from conftest import DATA

from border import UserError
from tasks import toy
from tasks.data import SUFFIX, Problem, load_problems, prompt_ids, read_row

datasets = pytest.importorskip("datasets", reason="not installed (requirements.txt)")
REAL = {
    "gsm8k_train.parquet": 7473,
    "gsm8k_test.parquet": 1319,
    "math_train.parquet": 7499,
    "math500_test.parquet": 500,
}
CASES = DATA.parent / "cases" / "rows.jsonl"


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


@pytest.mark.parametrize(
    "row, options, answer",
    [
        ({"question": "Q?", "choices": ["x", "y", "z"], "answer": 2}, "A. x\nB. y\nC. z", "C"),  # MMLU
        (
            {"question": "Q?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
            "A. x\nB. y", "B",
        ),  # CommonsenseQA
    ],
)  # fmt: skip
def test_multiple_choice_is_a_question_with_lettered_options(row, options, answer):
    assert read_row(row) == Problem(f"Q?\n{options}\nThe final answer is a letter.", answer)


def test_truthfulqa_does_not_always_have_its_right_choice_first():
    rows = [{"question": f"Q{i}?", "mc1_targets": {"choices": list("abcd"), "labels": [1, 0, 0, 0]}} for i in range(40)]
    read = [read_row(row) for row in rows]
    assert read == [read_row(row) for row in rows]
    assert {problem.answer for problem in read} == set("ABCD")
    assert all(f"{problem.answer}. a\n" in problem.question for problem in read)


def test_questions_about_a_picture_are_left_out(tmp_path):
    file = tmp_path / "some.jsonl"
    rows = [{"Question": "1+1?", "Answer": 2, "Picture": None}, {"Question": "What?", "Answer": 3, "Picture": "bytes"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_problems(str(file)) == [Problem("1+1?", "2")]


@pytest.mark.parametrize("name, count", REAL.items())
def test_real_data(name, count):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not at hand")
    problems = load_problems(str(DATA / name))
    assert len(problems) == count  # of MATH one solution has nothing in its box
    assert all(p.question and SUFFIX not in p.question for p in problems)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("no.jsonl", None, "is no file"),
        ("empty.jsonl", "", "holds no rows"),
        ("cut.jsonl", '{"question": "a", "answer": "1"}\n{"question": "b', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "row 1: expected a JSON object, not list"),
        ("columns.jsonl", '{"text": "a"}', "row 1: columns are text; expected prompt and reward_model, question and"),
        ("choice.jsonl", '{"question": "a", "choices": ["x"], "answer": 7}', "row 1: its columns do not fit together"),
        ("noanswer.jsonl", '{"question": "a", "answer": ""}', "row 1: question or answer is empty"),
        ("bad.parquet", "not parquet", "is not a readable parquet file"),
        ("table.csv", "a,b", "truthfulqa, commonsenseqa, or the path of a .parquet or .jsonl file"),
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


def read(tmp_path, *lines):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return load_problems(str(file))


@pytest.mark.parametrize(
    "line, answer",
    [
        ('{"problem": "q?", "answer": 0, "solution": "Then none are left."}', "0"),
        ('{"problem": "q?", "answer": 0}', "0"),
        ('{"problem": "q?", "answer": "0"}', "0"),
        ('{"question": "q?", "answer": "073"}', "073"),
        ('{"question": "q?", "answer": 0.00002}', "0.00002"),
        ('{"question": "q?", "answer": 3e16}', "30000000000000000"),
        ('{"question": "q?", "answer": -1.5e-7}', "-0.00000015"),
        ('{"question": "q?", "answer": 12345678901234567890}', "12345678901234567890"),
        ('{"problem": "q?", "solution": "So $x = \\\\boxed 6$."}', "6"),
    ],
)
def test_an_answer_is_read_as_it_is_meant(tmp_path, line, answer):
    assert read(tmp_path, line) == [Problem("q?", answer)]


def test_a_column_of_float32_is_read_as_it_was_written(tmp_path):
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("float32")})
    rows = datasets.Dataset.from_dict({"question": ["a?", "b?"], "answer": [0.1, 2.5]}, features=features)
    rows.to_parquet(tmp_path / "some.parquet")
    assert [problem.answer for problem in load_problems(str(tmp_path / "some.parquet"))] == ["0.1", "2.5"]


def verl(*roles):
    messages = [{"role": role, "content": f"{role}?"} for role in roles]
    return json.dumps({"prompt": messages, "reward_model": {"ground_truth": "3"}})


@pytest.mark.parametrize(
    "line, why",
    [
        ('{"question": "q?", "answer": NaN}', "its answer is nan; expected a number or a text"),
        ('{"question": "q?", "answer": -Infinity}', "its answer is -inf; expected"),
        ('{"question": "q?", "answer": true}', "question and answer are str and bool; expected a text, and a text or"),
        ('{"question": "q?", "answer": ["3", "4"]}', "question and answer are str and list; expected"),
        (verl("user", "assistant"), "its prompt has messages of user, assistant; expected one, of the user"),
        (verl("system", "user"), "its prompt has messages of system, user; expected one, of the user"),
        (verl(), "its prompt has messages of nobody; expected one"),
    ],
)
def test_what_cannot_be_read_right_is_refused_and_counted(tmp_path, line, why):
    good = '{"question": "q?", "answer": "1"}'
    with pytest.raises(UserError, match=re.escape(f"some.jsonl, row 2: {why}")) as one:
        read(tmp_path, good, line)
    assert "rows" not in str(one.value)
    with pytest.raises(UserError, match=r"some\.jsonl, row 2: .*; so are 3 of 5 rows$"):
        read(tmp_path, good, line, line, good, line)


@pytest.mark.parametrize(
    "line, why",
    [
        ('{"problem": "q?", "solution": "Nobody knows."}', "its solution has no answer; expected one in \\boxed{}, or"),
        (json.dumps({"question": "q?", "answer": "word " * 99}), "no answer is marked in its 494 characters; expected"),
    ],
)
def test_a_solution_without_an_answer_is_left_out_and_counted_in_one_line(tmp_path, capsys, line, why):
    with pytest.raises(UserError, match=re.escape(f"some.jsonl, row 1: {why}")):
        read(tmp_path, line)
    good = '{"question": "q?", "answer": "1"}'
    assert len(read(tmp_path, good, line, line, good, line)) == 2
    said = capsys.readouterr().err
    assert said.startswith("3 of 5 rows are left out, the first of them ") and f"row 2: {why}" in said
    assert said.count("\n") == 1


def test_the_rows_from_outside(tmp_path):
    if not CASES.is_file():
        pytest.skip("no cases are at hand")
    for case in map(json.loads, CASES.read_text().splitlines()):
        try:
            (problem,) = read(tmp_path, case["line"])
        except UserError:
            assert "refused" in case["should_read"], case["name"]
        else:
            assert [problem.question, problem.answer] == case["should_read"], case["name"]
