"""Loading and grading on plain cases; real data where it is at hand."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import DATA

from border import UserError
from lab.attack import __main__ as attack
from lab.attack import grader
from tasks import data as task_data
from tasks import expressions, grading, toy
from tasks.data import SUFFIX, Problem, load_problems, prompt_ids
from tasks.grading import are_correct, extract_answer, is_correct

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
    "text, answer",
    [
        ("the answer is 18", "18"),
        ("7 of them cost $1,250.50.", "1,250.50"),
        ("from 3 to -4", "-4"),
        ("\\boxed{5} and 6", "5"),
        ("no number", None),
    ],
)
def test_the_last_number_counts_only_if_asked_for(text, answer):
    assert extract_answer(text, lenient=True) == answer
    assert extract_answer(text) == (answer if "boxed" in text else None)


def test_a_lenient_reward_can_be_farmed():
    """A response that ends in a guess of every small number in turn: the last-number rule pays it now and then."""
    farm = [f"I do not know. {n}" for n in range(20)]
    assert sum(are_correct(farm, ["7"] * 20, lenient=True)) == 1
    assert not any(are_correct(farm, ["7"] * 20))


EQUAL = [
    ("18", "18"), ("18.0", "18"), ("3.0", "3"), ("$1,800", "1800"), ("1,000", "1000"), ("1{,}000", "1000"), ("+5", "5"),
    ("0.5", "1/2"), ("1/2", "0.5"), ("\\frac{1}{2}", "0.5"), ("\\dfrac12", "\\frac{1}{2}"), (".5", "\\tfrac{1}{2}"),
    ("x=5", "5"), ("5", "x = 5"), ("x=5", "5 = x"), ("10%", "0.1"), ("10\\%", "10"), ("100%", "1"), ("-\\$5", "-5"),
    ("\\text{(B)}", "B"), ("B.", "B"), ("(C)", "C"), ("\\text{True}", "True"), ("5\\text{ cm}", "5"),
    ("90^\\circ", "90"), ("x^2 + 2x + 1", "(x+1)^2"), ("2\\sqrt{3}", "\\sqrt{12}"), ("\\{1,2\\}", "\\{2,1\\}"),
    ("1\\frac12", "\\frac{3}{2}"), ("5 \\times 10^2", "500"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("3 \\pm 1", "2,4"), ("72.0 dollars", "72"), ("72hours", "72"), ("72\\ ", "72"),
    ("72 miles per hour", "72"), ("\\theta = 72^\\circ", "72"),
    ("\\begin{bmatrix} 1 \\\\ 2/4 \\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ \\frac12 \\end{pmatrix}"),
    ("x \\in [1,2]", "[1,2]"), ("x=1 or x=2", "1,2"), ("(x,y)=(1,2)", "(1,2)"),
    ("52_{8}", "52_8"), ("-2 \\text{ and } 12", "12, -2"), ("A,B", "\\text{A, B}"), ("f(x) = 1+x", "x+1"),
    *((answer, "72") for answer in (
        "72 m", "72 g", "72 h", "72 s", "72 m^2", "72 m/s", "72¢", "Answer: 72", "\\angle A = 72^\\circ", "a_1=72",
        "72\\text{ one-dollar bills}", "72\\text{ \\$}", "72 min", "72 .", "72\\text{ jelly beans}",
    )),
    ("72 m", "72m"), ("x = (4,-\\frac12)", "(4,-\\frac12)"), ("1 \\frac12", "\\frac32"), ("1+1/2", "\\frac32"),
    ("2 or 4", "3 \\pm 1"),
    ("29,\\!322,\\!216", "29322216"), ("2x - y = 1", "y = 2x - 1"), ("12.5\\pi", "\\frac{25\\pi}{2}"),
]  # fmt: skip
DIFFERENT = [
    ("12.5", "12"), ("12", "12.5"), ("\\frac12", "-\\frac12"), ("\\frac12", "\\frac13"), ("(1,2)", "[1,2]"),
    ("(2,3)", "(3,2)"), ("[1,2]", "(1,2]"), ("x^2", "x^3"), ("1%", "100%"), ("10%", "1"), ("x=5", "y=6"),
    ("18, 19", "19"), ("18 or 19", "19"), ("not 5", "5"), ("2", "4,2"), ("B", "A"), ("b", "B"), ("B or C", "B"),
    ("A and B", "B"),
    *((answer, "72") for answer in (
        "\\neq 72", "\\le 72", "\\ge 72", "2x=72", "x+1=72", "ab=72", "72 \\approx 73", "73 = 72", "72\\\\73",
        "72\\hspace{1cm}73", "1, 2, \\ldots, 72", "72, \\ldots", "72\\text{ or more}", "72 + c", "72½", "71 1", "72_8",
        "\\sim 72", "73$ $72", "\\{72,72\\}", "[72]", "\\phantom{72}", "7\\ 2", "7\\;2", "{7}{2}", "72ab", "72 x",
        "72 \\text{ dollars and } 5 \\text{ cents}",
        "72:1", "x \\to 72", "72 \\pm 0", "72 1/2", "72'", "72\\text{ dozen}",
        "72. .", "72…", "72 dollars, seventy", "72\\text{ -one}", "72\\text{ seventy-two}",
        "72\\text{ seventy-dollars}", "72\\text{ give, take}",
        "72 m or more", "72 dollars min", "72 s or 3 s", "72\\text{ \\$}73", "(x,y)=(72)", "a_1+1=72",
        "72\\text{ if the sum of all of them is meant}",
    )),
    ("B...", "B"), ("(1,2)...", "(1,2)"), ("1,2 or so", "1,2"), ("1,2 dollars or none", "1,2"), ("72 m", "72m^2"),
    ("52_9", "52_8"), ("52", "52_8"), ("2(x=5)", "x=5"), ("2x=10", "x=5"), ("1,2", "(1,2)"), ("(1,2)", "\\{1,2\\}"),
    ("1.414214", "\\sqrt{2}"), ("\\frac{3}{2^{98}}", "\\frac{1}{2^{98}}"), ("\\csc 10_{99}", "\\csc 10"),
    ("\\text{ABCD}", "\\text{CBAD}"), ("\\{1,2,2\\}", "\\{1,2\\}"), ("x-x+72", "72"),
    ("100000000000000000000001", "100000000000000000000000"), ("0.1", "0.10000000000000001"), ("0.3333333", "\\frac13"),
    ("1/0", "0"), ("", "5"), ("\\infty", "1"), ("1,00", "100"),
]  # fmt: skip


@pytest.mark.parametrize("pairs, right", [(EQUAL, True), (DIFFERENT, False)])
def test_equivalent_and_almost_equivalent_answers(pairs, right):
    said, golds = zip(*pairs, strict=True)
    verdicts = are_correct([f"Therefore \\boxed{{{answer}}}." for answer in said], golds)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not right] == []


@pytest.mark.parametrize("gold", grader.BY_HAND)
def test_no_wrong_answer_made_from_the_gold_answer_is_paid_and_every_usual_spelling_is(gold):
    wrong, right = ([(*row, gold) for row in make(gold)] for make in (grader.wrong_answers, grader.right_spellings))
    assert [row for row, paid in zip(wrong, grader.ours(wrong), strict=True) if paid] == []
    assert [row for row, paid in zip(right, grader.ours(right), strict=True) if not paid] == []


def test_the_table_counts_the_kinds_that_it_leaves_out(monkeypatch):
    monkeypatch.setattr(grader, "theirs", lambda rows: [not paid for paid in grader.ours(rows)])
    rows = [("hedged", "?", f"{n} ?", str(n)) for n in range(10, 15)] + [("changed", "'", "7'", "7")]
    rows += [("right", "GOLD.", f"{n}.", str(n)) for n in (3, 4)] + [("borderline", "ours right", "72:1", "72")]
    made = grader.table(rows)
    assert "| hedged | `10 ?` | `10` | no | yes | 5 | ours right |" in made and "| changed" not in made
    assert "Left out: 3 pairs of 2 kinds with fewer than 5 pairs each, 0 of them judged theirs right." in made


def test_nor_one_made_from_the_golds_of_the_data_sets():
    golds = grader.gold_answers(DATA, every=50)
    if len(golds) == len(grader.BY_HAND):
        pytest.skip("no data is at hand")
    draw = random.Random(0)
    wrong = [(*row, gold) for gold in golds for row in draw.sample(grader.wrong_answers(gold), 6)]
    right = [(*row, gold) for gold in golds for row in grader.right_spellings(gold)]
    assert [row for row, paid in zip(wrong, grader.ours(wrong), strict=True) if paid] == []
    assert [row for row, paid in zip(right, grader.ours(right), strict=True) if not paid] == []


@pytest.mark.parametrize("arguments", [["nothing"], [], ["--nothing"]])
def test_an_unknown_attack_gets_one_line(arguments, capsys):
    assert attack.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


HOSTILE = [
    "9^{9^{9^9}}", "\\sum_{n=1}^{10^9} \\frac{1}{n^2+\\sin n}", "\\prod_{n=1}^{10^7} n", "(10^9)!", "10!!!!!!",
    "a" * 20_000,
    "9" * 20_000, "9" * 290, "{" * 200, "(" * 250, "\\frac{" * 40, "\\sqrt{" * 100 + "1", "x^{" * 60, "1+" * 140 + "1",
    "\x005", "5\x1b[2J", "\u200f5\u202e", "\ud800", "\\int \\frac{\\sin x}{x^5+e^x} dx", "import os",
    "__import__('os')",
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: ascii(answer)[:20])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_hostile_answer_is_wrong_and_the_verdict_comes_soon(answer, in_thread):
    expressions.referee.start()
    verdicts, begin = [], time.monotonic()
    work = threading.Thread(target=lambda: verdicts.append(is_correct(f"\\boxed{{{answer}}}", "x+7")))
    if in_thread:
        work.start()
        work.join(10)
    else:
        work.run()
    assert verdicts == [False]
    assert time.monotonic() - begin < 5  # one second is promised; five tell a hang from a busy machine


def test_pairs_behind_one_that_ends_its_process_are_judged_too(monkeypatch):
    """One that takes for ever, one that takes all memory, one that raises, one that ends the interpreter."""

    def expressions_equal(answer, gold):
        if answer == "for ever":
            while True:
                pass
        return {"memory": lambda: bytearray(2**33), "raise": lambda: 1 / 0, "exit": lambda: os._exit(7)}.get(
            answer, lambda: answer == gold
        )()

    monkeypatch.setattr(expressions, "expressions_equal", expressions_equal)
    answers = ["a", "for ever", "b", "memory", "c", "raise", "d", "exit", "exit", "e", *"fghij" * 20, "for ever"]
    expected = [len(answer) == 1 and answer != "h" for answer in answers]
    with subprocess.Popen(["true"]):  # a child of somebody else, which ends meanwhile
        assert expressions.judge([(answer, "x" if answer == "h" else answer) for answer in answers]) == expected
    assert expressions.judge([]) == []


def test_the_referee_starts_again_after_it_was_killed():
    assert is_correct("\\boxed{1+x}", "x+1")
    expressions.referee.server.kill()
    expressions.referee.server.wait()
    assert is_correct("\\boxed{1+y}", "y+1")


def test_a_referee_that_dies_at_work_says_so(monkeypatch):
    expressions.referee.start()
    os.kill(expressions.referee.server.pid, signal.SIGSTOP)  # it will not answer
    threading.Timer(0.5, expressions.referee.server.kill).start()
    with pytest.warns(UserWarning, match="the grading process ended; 1 answers count as wrong"):
        assert not is_correct("\\boxed{1+z}", "z+1")
    assert is_correct("\\boxed{1+z}", "z+1")


def test_verdicts_from_several_threads_do_not_mix():
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda n: is_correct(f"\\boxed{{{n} + x}}", f"x + {n - n % 2}"), range(12)))
    assert verdicts == [n % 2 == 0 for n in range(12)]


def test_no_text_raises_or_hangs():
    """Random strings of the pieces that break parsers."""
    pieces = [
        "\\frac", "{", "}", "(", ")", "[", "^", "_", "\\sqrt", "9", "0", "x", "=", ",", "\\%", "$", "#### ", "\\boxed{",
        "\\text{", "\\left(", "-", "/", ".", " ", "\n", "\\", "\\{", "!", "\\infty", "é", "∑", "\x00", "\u202e",
    ]  # fmt: skip
    draw = random.Random(0)
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(3000)]
    assert not any(are_correct(texts, ["impossible to guess"] * len(texts)))
    for text in texts:
        assert grading.compare(text, text) is True
        grading.compare(text, "7")
    boxed = [f"\\boxed{{{text}}}" for text in texts[:60]]
    assert len(are_correct(boxed, ["x+1"] * len(boxed))) == len(boxed)


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
    assert task_data.read_row(row, "here") == Problem(f"Q?\n{options}\nThe final answer is a letter.", answer)


def test_truthfulqa_does_not_always_have_its_right_choice_first():
    rows = [{"question": f"Q{i}?", "mc1_targets": {"choices": list("abcd"), "labels": [1, 0, 0, 0]}} for i in range(40)]
    read = [task_data.read_row(row, "here") for row in rows]
    assert read == [task_data.read_row(row, "here") for row in rows]
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
    assert len(problems) == count
    assert all(p.question and SUFFIX not in p.question for p in problems)


@pytest.mark.parametrize("name", ["gsm8k_test.parquet", "math500_test.parquet"])
def test_every_gold_answer_counts_as_right_in_its_usual_spellings_and_the_next_ones_as_wrong(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not at hand")
    golds = [problem.answer for problem in load_problems(str(DATA / name))]
    spellings = ["\\boxed{%s}", "so \\boxed{ $%s$ }.", "\\boxed{%s.}", "first \\boxed{0}, then\n#### 1\n\\boxed{\\!%s}"]
    if name.startswith("gsm8k"):
        spellings += ["#### %s", "#### $%s", "\\boxed{%s.00}", "\\boxed{\\text{%s}}", "\\boxed{%s\\text{ apples}}"]
    else:
        spellings += ["\\boxed{x = %s}"]
    for spelling in spellings:
        spelt = [gold for gold in golds if "x =" not in spelling or grading.as_number(gold)]
        right = are_correct([spelling % gold for gold in spelt], spelt)
        assert [gold for gold, verdict in zip(spelt, right, strict=True) if not verdict] == [], spelling
    others = [(a, b) for a, b in pairwise(golds) if grading.compare(a, b) is not True]
    assert len(others) > 0.9 * len(golds)
    wrong = are_correct([f"\\boxed{{{a}}}" for a, _ in others], [b for _, b in others])
    assert [pair for pair, verdict in zip(others, wrong, strict=True) if verdict] == []


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
