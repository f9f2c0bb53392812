"""What is paid and what is not: by kind, in small tables of our own; the cases and the data where they are at hand."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import DATA, ROOT

from lab.attack import grader
from tasks.data import load_problems
from tasks.grading import are_correct, are_equal, extract_answer, is_correct, readings, vote

CASES = DATA.parent / "cases" / "grading.jsonl"


# ----------------------------------------------------------------------------------------------------
# The final answer of a response
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{18}", "18"),
        ("\\boxed{1} or rather \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{a {b} c}} and then words", "\\text{a {b} c}"),
        ("3 + 4 = 7 . #### 7", "7"),
        ("#### 1\n#### 1,234", "1,234"),
        ("#### **1,234**", "1,234"),
        ("**#### 12**", "12"),
        ("\\boxed{5}\n#### 6", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed\n {5}", "5"),
        ("\\\\boxed{5}", "5"),
        ("\\boxed{\\{5\\}}", "\\{5\\}"),
        ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("It goes in \\boxed, so \\boxed{5}", "5"),
        ("\\boxed{5}, which stands within \\boxed{} as asked", "5"),
        ("the answer is $\\boxed 5$.", "5"),
        ("\\boxed{-\\boxed{5}}", "-\\boxed{5}"),  # of a box in a box, the outer one
        ("<think>\\boxed{6}</think> \\boxed{5}", "5"),
        ("\\boxed{6} </think> \\boxed{5}", "5"),
        ("\\boxed{5} <think> or \\boxed{6}?", "5"),
        ("<think>\\boxed{5}</think> I do not know.", None),  # thought aloud is not answered
        ("<think>\\boxed{5}", None),
        ("\\boxed{5} </think>", None),
        ("the answer is 18", None),  # a reward that takes the last number can be farmed
        ("\\boxed{}", None),
        ("\\boxed{unclosed", None),
        ("\\boxed{5} and \\boxed{cut o", None),
        ("\\boxed{I guess \\boxed{5}", None),
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


def test_the_last_number_keeps_its_minus_sign():
    assert is_correct("it falls to −8", "-8", lenient=True)
    assert not is_correct("it falls to −8", "8", lenient=True)


def test_a_lenient_reward_can_be_farmed():
    """A response that ends in a guess of every small number in turn: the last-number rule pays it now and then."""
    farm = [f"I do not know. {n}" for n in range(20)]
    assert sum(are_correct(farm, ["7"] * 20, lenient=True)) == 1
    assert not any(are_correct(farm, ["7"] * 20))


def test_gold_may_be_a_whole_solution():
    assert is_correct("\\boxed{0}", "so $a+b=-3+3=\\boxed{0}$.")
    assert is_correct("#### 18", "16 - 3 - 4 = 9\n#### 18")
    assert is_correct("\\boxed{2}", "Adding both, we have $x = \\boxed 2$.")


# ----------------------------------------------------------------------------------------------------
# Right answers, (answer, gold), by kind
# ----------------------------------------------------------------------------------------------------

EQUAL = {
    "numbers": [
        ("18", "18"), ("18.0", "18"), ("3.0", "3"), ("$1,800", "1800"), ("1,000", "1000"), ("1{,}000", "1000"),
        ("+5", "5"), ("0.5", "1/2"), ("1/2", "0.5"), ("\\frac{1}{2}", "0.5"), ("\\dfrac12", "\\frac{1}{2}"),
        (".5", "\\tfrac{1}{2}"), ("10%", "0.1"), ("10\\%", "10"), ("100%", "1"), ("-\\$5", "-5"), ("004", "4"),
        ("29,\\!322,\\!216", "29322216"), ("1\\frac12", "\\frac{3}{2}"), ("1 \\frac12", "\\frac32"),
        ("1+1/2", "\\frac32"), ("1 1/2", "\\frac32"), ("12.5\\pi", "\\frac{25\\pi}{2}"), ("\\$-4", "-4"),
        ("5 \\times 10^2", "500"), ("2\\sqrt{3}", "\\sqrt{12}"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("\\log_2 32", "5"), ("e^{\\ln 7}", "7"), ("\\sin 30^\\circ", "\\frac12"), ("-2i+3", "3-2i"),
        ("\\sqrt[3]{-27}", "-3"), ("|2-5|", "3"), ("4!", "24"),
    ],
    "names": [
        ("x=5", "5"), ("5", "x = 5"), ("x=5", "5 = x"), ("\\theta = 72^\\circ", "72"), ("\\angle A = 72^\\circ", "72"),
        ("a_1=72", "72"), ("a_{n-1} = 72", "72"), ("72 = x", "72"), ("x := 72", "72"), ("\\implies 72", "72"),
        ("PQ = 7", "7"), ("|PQ| = 7", "7"), ("[PQR] = 7", "7"), ("\\tan A = 7", "7"), ("\\overline{PQ} = 7", "7"),
        ("h(4) = 7", "7"), ("P(A) = \\frac15", "0.2"), ("P(A \\cap B) = 0.2", "\\frac15"), ("f^{-1}(3) = 2", "2"),
        ("f(x) = 1+x", "x+1"), ("(x,y)=(1,2)", "(1,2)"), ("x = (4,-\\frac12)", "(4,-\\frac12)"),
        ("\\text{Total} = 72", "72"), ("Answer: 72", "72"), ("x=3, y=4", "y=4, x=3"), ("PQ=3, RS=4", "RS=4, PQ=3"),
        ("y=3x+1", "3x+1"), ("3x+1", "y=3x+1"),
    ],
    "words": [
        ("\\text{(B)}", "B"), ("B.", "B"), ("(C)", "C"), ("C", "(\\text{C})"), ("D", "\\text{(D)},"),
        ("\\text{True}", "True"), ("no", "No"), ("YES", "\\text{Yes}"), ("\\text{even}", "Even"),
        ("A,B", "\\text{A, B}"), ("B and A", "A,B"), ("52_{8}", "52_8"), ("A5_{16}", "A5_{16}"),
    ],
    "units": [
        ("5\\text{ cm}", "5"), ("5", "5\\text{ cm}"), ("90^\\circ", "90"), ("90 degrees", "90^\\circ"),
        ("72.0 dollars", "72"), ("72hours", "72"), ("72 miles per hour", "72"), ("72 m", "72m"), ("72 .", "72"),
        ("6 hrs", "6\\text{ hours}"), ("\\$6", "6 dollars"), ("6¢", "6\\text{ cents}"), ("72 sq. ft.", "72"),
        ("8\\text{ sq cm}", "8\\text{ cm}^2"), ("8 cm²", "8\\text{ square centimeters}"), ("9 in", "9\\text{ inches}"),
        ("8 cm²", "8\\text{ square units}"), ("15\\text{ red apples}", "15\\text{ apples}"), ("72 years old", "72"),
        ("30 mph", "30\\text{ miles per hour}"), ("30 kph", "30 km/h"), ("72 apples in total", "72"),
        ("7 flurbs", "7\\text{ flurbs}"), ("7", "7\\text{ flurbs}"), ("3.1", "\\approx 3.1 \\text{ mph}"),
        ("\\approx 3.1", "\\approx 3.1 \\text{ mph}"), ("$\\approx 3.1 \\text{ mph}$", "\\approx 3.1 \\text{ mph}"),
        *((answer, "72") for answer in (
            "72 m", "72 g", "72 h", "72 s", "72 m^2", "72 m/s", "72¢", "72\\text{ one-dollar bills}", "72\\text{ \\$}",
            "72 min", "72\\text{ jelly beans}", "72 ft²", "72 kilos", "72 left", "72 books", "72 times",
            "72 more books", "72 \\text{ cookies}",
        )),
    ],
    "percent": [
        ("45 percent", "45\\%"), ("45\\text{\\%}", "45\\%"), ("45{\\%}", "45\\%"), ("45\\text{ percent}", "45"),
        ("45 pct", "0.45"), ("45 \\%", "45\\%"),
    ],
    "typed signs": [
        ("3 \\le z", "z \\ge 3"), ("z \\leqslant 3", "z \\le 3"), ("z \\lt 3", "z < 3"), ("z \\ne 3", "z \\neq 3"),
        ("z <= 3", "z \\leq 3"), ("3 ≤ z", "z \\ge 3"), ("3 \\neq z", "z \\ne 3"), ("−\\frac{1}{4}", "-\\frac14"),
        ("z²", "z^2"), ("z⁻¹", "\\frac1z"), ("2π", "2\\pi"), ("3 × 10^4", "30000"), ("√5", "\\sqrt{5}"), ("½", "0.5"),
        ("2½", "\\frac52"), ("√12", "2\\sqrt3"), ("**72**", "72"), ("$72$", "72"), ("\\(72\\)", "72"),
        ("$\\$72$", "72"), ("72\\ ", "72"), ("72;", "72"), ("3.5e4", "35000"), ("2e3", "2000"), ("2.5E-1", "0.25"),
        ("z**2", "z^2"), ("3*pi*b", "3\\pi b"), ("3\\pi b", "3*pi*b"), ("\\sqrt{b}", "sqrt(b)"),
        ("2*sqrt(3)", "\\sqrt{12}"), ("\\cfrac{3}{4}", "\\frac34"), ("3 - \\mathrm{e}", "3 - e"),
        ("\\mathrm e^2", "e^2"), ("\\varnothing", "\\emptyset"), ("\\{\\}", "∅"), ("\\binom{6}{2}", "15"),
        ("{90 \\over 3}", "30"), ("5 \\text{ and } \\frac34", "\\frac{23}{4}"), ("17\\text{ over }4", "\\frac{17}{4}"),
    ],
    "thousands": [
        (f"6{mark}300", "6300")
        for mark in (",", "\\,", "\\;", "\\:", "\\!", ",\\!", "{,}", "~", "\u202f", "\u2009", "\u00a0")
    ] + [("1,200/4", "300"), ("\\frac{1,200}{4}", "300"), ("1~234~567", "1234567")],
    "periods": [
        ("0.\\overline{3}", "\\frac13"), ("0.1\\overline{6}", "\\frac16"), ("1.\\bar{3}", "\\frac43"),
        ("0.\\overline{27}", "\\frac{3}{11}"), ("-0.\\overline{6}", "-\\frac23"),
    ],
    "expressions": [
        ("x^2 + 2x + 1", "(x+1)^2"), ("2x - y = 1", "y = 2x - 1"), ("0.5x", "\\frac{x}{2}"), ("ba", "ab"),
        ("\\frac{a}{b}c", "\\frac{ac}{b}"), ("x\\sqrt{x}", "\\sqrt{x^3}"), ("\\sin^2 t", "1-\\cos^2 t"),
        ("2\\ln x", "\\ln x^2"), ("\\frac{x^2-1}{x-1}", "x+1"), ("\\csc 10^\\circ", "\\frac{1}{\\sin 10^\\circ}"),
    ],
    "lists, sets and intervals": [
        ("\\{1,2\\}", "\\{2,1\\}"), ("\\{1,2\\}", "1,2"), ("3 \\pm 1", "2,4"), ("2 or 4", "3 \\pm 1"),
        ("x=1 or x=2", "1,2"), ("-2 \\text{ and } 12", "12, -2"), ("5, 7, 9", "5, 7\\text{, and }9"), ("2;3", "2,3"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(5,6),\\ (2,3)", "(2,3) \\text{ or } (5,6)"),
        ("\\pm 3, 2", "-3,2,3"), ("\\{\\pm 1, \\pm\\sqrt{3}\\}", "\\{-\\sqrt3,-1,1,\\sqrt3\\}"),
        ("\\frac{1\\pm\\sqrt5}{2}", "\\frac{1-\\sqrt5}{2}, \\frac{1+\\sqrt5}{2}"), ("x = \\pm 4", "4,-4"),
        ("x \\in [1,2]", "[1,2]"), ("[-3,5]", "x \\in [-3,5]"), ("-3 \\le x \\le 5", "[-3,5]"),
        ("x > 5", "(5,\\infty)"), ("(3,4)\\cup(1,2)", "(1,2)\\cup(3,4)"),
        ("x<2 \\text{ or } x>5", "(-\\infty,2)\\cup(5,\\infty)"), ("\\mathbb{R}", "(-\\infty,\\infty)"),
        ("(5,125)", "(5, 125)"), ("(5,125^\\circ)", "(5, 125)"), ("\\frac13", "\\$\\frac13 \\approx \\$0.33"),
        ("2:3", "2 : 3"),
        ("\\begin{bmatrix} 1 \\\\ 2/4 \\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ \\frac12 \\end{pmatrix}"), (
            "\\left[\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right]",
            "\\begin{pmatrix} 1 & 2 \\\\ 3 & \\phantom{-}4 \\end{pmatrix}",
        ),
    ],
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------
# Wrong answers, by kind
# ----------------------------------------------------------------------------------------------------

DIFFERENT = {
    "other values": [
        ("12.5", "12"), ("12", "12.5"), ("\\frac12", "-\\frac12"), ("\\frac12", "\\frac13"), ("x^2", "x^3"),
        ("1%", "100%"), ("10%", "1"), ("b", "B"), ("B", "A"), ("x=5", "y=6"), ("x=5", "y=5"), ("2x=10", "x=5"),
        ("\\frac{3}{2^{98}}", "\\frac{1}{2^{98}}"), ("\\frac{1}{7^{60}}", "\\frac{1}{7^{59}}"), ("1/0", "0"),
        ("100000000000000000000001", "100000000000000000000000"), ("", "5"), ("\\infty", "1"), ("1,00", "100"),
        ("\\csc 10_{99}", "\\csc 10"), ("52_9", "52_8"), ("52", "52_8"), ("201_3", "201_4"), ("x-x+72", "72"),
        ("|x|", "x"), ("2(x=5)", "x=5"), ("x=3, y=4", "x=4, y=3"), ("z \\ge 3", "z > 3"), ("z < 3", "z > 3"),
        ("six", "6"), ("8.2", "\\approx 8.3 \\text{ mph}"), ("\\approx 8.3", "8.3"), ("9", "\\pm 9"),
    ],
    "rounded": [
        ("1.414214", "\\sqrt{2}"), ("0.1", "0.10000000000000001"), ("0.3333333", "\\frac13"),
        ("(0.3333333,\\infty)", "(\\frac13,\\infty)"), ("0.3333333, 2", "\\frac13, 2"),
        ("[1.4142136,2)", "[\\sqrt2,2)"), ("\\{0.6666667, 1\\}", "\\{\\frac23, 1\\}"), ("0.6666667x", "\\frac{2x}{3}"),
    ],
    "brackets": [
        ("(1,2)", "[1,2]"), ("[1,2]", "(1,2]"), ("[0, 1.5]", "(0, 1.5)"), ("(2,3)", "(3,2)"), ("1,2", "(1,2)"),
        ("(1,2)", "\\{1,2\\}"), ("\\{1,2,2\\}", "\\{1,2\\}"), ("-2 < x \\le 7", "[-2,7]"),
        ("-2 \\le y \\le 7", "x \\in [-2,7]"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
    ],
    "a part, or more": [
        ("18, 19", "19"), ("18 or 19", "19"), ("not 5", "5"), ("2", "4,2"), ("B or C", "B"), ("A and B", "B"),
        ("343", "343 and 512"), ("B...", "B"), ("(1,2)...", "(1,2)"), ("1,2 or so", "1,2"),
        ("1,2 dollars or none", "1,2"),
    ],
    "letters in another order": [
        ("GTA", "TAG"), ("THT", "HTT"), ("oN", "No"), ("VI", "IV"), ("XC", "CX"), ("\\text{ABCD}", "\\text{CBAD}"),
        ("\\text{dda}", "\\text{add}"), ("x-isax", "x-axis"), ("on", "no"),
    ],
    "another unit": [
        ("7\\text{ minutes}", "7\\text{ hours}"), ("9\\text{ cm}^2", "9\\text{ cm}"),
        ("9\\text{ mm}^2", "9\\text{ cm}^2"), ("9 cm³", "9\\text{ square units}"), ("4¢", "\\$4"),
        ("4 cents", "4 dollars"), ("€4", "\\$4"), ("72 m", "72m^2"), ("7 books", "7\\text{ apples}"),
        ("7 hours", "7\\text{ apples}"), ("30 km/h", "30 mph"), ("30 degrees", "30 radians"),
    ],
    "a box in a box": [("-\\boxed{72}", "72"), ("\\boxed{72}+1", "72"), ("1\\boxed{72}", "72")],
    "pieces of a number": [
        ("x=1,x=250", "1250"), ("x=1, x=250", "1,250"), ("1 or 600", "1,600"), ("1 and 600", "1,600"),
        ("1, 600", "1,600"), ("0,072", "72"), ("0,72", "72"), ("7\\ 2", "72"), ("7\\;2", "72"), ("{7}{2}", "72"),
        ("7 2", "72"),
    ],
    "no answer": [
        (answer, "72") for answer in (
            "\\neq 72", "\\le 72", "\\ge 72", "2x=72", "x+1=72", "ab=72", "72 \\approx 73", "73 = 72", "72\\\\73",
            "72\\hspace{1cm}73", "1, 2, \\ldots, 72", "72, \\ldots", "72\\text{ or more}", "72 + c", "72½", "71 1",
            "72_8", "\\sim 72", "~72", "73$ $72", "\\{72,72\\}", "[72]", "\\phantom{72}", "72ab", "72 x", "72 = 72",
            "72 \\text{ dollars and } 5 \\text{ cents}", "72:1", "x \\to 72", "x \\in 72", "72 \\pm 0", "72 1/2",
            "72'", "--72", "72. .", "72…", "72 dollars, seventy", "72\\text{ -one}", "72\\text{ seventy-two}",
            "72\\text{ seventy-dollars}", "72\\text{ give, take}", "72 m or more", "72 dollars min", "72 s or 3 s",
            "72\\text{ \\$}73", "(x,y)=(72)", "a_1+1=72", "72\\text{ if the sum of all of them is meant}",
        )
    ],
    "hedges and scales": [
        (template.replace("WORD", word), "72")
        for word in (
            "doz", "dozen", "quarter", "quarters", "millionths", "tenths", "inverse", "scratch that", "ignore this",
            "(ignore this)", "squared", "square", "cubed", "cubic", "k", "K", "kilo-", "M", "mod 5", "wrong",
            "and counting", "negative", "or so", "apples or pears", "roughly", "at best", "upside down",
            "backwards", "in base 9", "per mille", "to the nearest ten", "minus one", "hm", "wait", "?", "!",
            "-ish", "(not sure)", "times two", "possible", "of the", "more", "or more books", "times 2", "whole",
            "percent of 8",
        )
        for template in ("72 WORD", "72\\text{ WORD}")
    ],
    "infinity, and what is no number": [
        (answer, gold)
        for answer in (
            "\\frac{\\pi\\sqrt{\\infty}}{3}", "\\sqrt{\\infty}\\pi", "\\frac{e\\sqrt{\\infty}}{\\pi}",
            "0 \\cdot \\infty", "\\infty - \\infty", "\\frac{0}{0}", "\\frac{1}{0}", "0^0", "\\tan\\frac{\\pi}{2}",
            "\\ln 0", "nan", "\\log_1 5", "\\frac{\\infty}{\\infty}", "\\sqrt{-\\infty}", "\\infty^0", "\\infty",
            "9^{9^{9^9}}", "(10^9)!", "\\emptyset",
        )
        for gold in ("0", "1", "72", "\\frac{\\pi}{3}", "x", "2-3i", "1,2", "(0,\\infty)")
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind, right", [(kind, table is EQUAL) for table in (EQUAL, DIFFERENT) for kind in table])
def test_equivalent_and_almost_equivalent_answers(kind, right):
    pairs = (EQUAL if right else DIFFERENT)[kind]
    said, golds = zip(*pairs, strict=True)
    verdicts = are_correct([f"Therefore \\boxed{{{answer}}}." for answer in said], golds)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not right] == []


def test_the_cases_from_outside():
    if not CASES.is_file():
        pytest.skip("the cases are not at hand")
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    missed = []
    for case in cases:
        lenient, answer = case.get("lenient", False), case["answer"]
        text = answer if lenient or "\\boxed" in answer or "####" in answer else f"\\boxed{{{answer}}}"
        if is_correct(text, case["gold"], lenient=lenient) is not case["right"]:
            missed.append(case)
    assert cases and missed == []


# ----------------------------------------------------------------------------------------------------
# Votes
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, two",
    [
        ("x=5", "5"), ("1,2", "2,1"), ("\\{1,2\\}", "2 or 1"), ("0.5", "\\frac12"), ("1,000", "1000"), ("Yes", "yes"),
        ("x^2-1", "(x-1)(x+1)"), ("5 \\text{ cm}", "5"), ("3 \\pm 1", "4, 2"), ("\\sqrt{12}", "2\\sqrt{3}"),
    ],
)  # fmt: skip
def test_equal_values_are_one_vote(one, two):
    assert vote(one) == vote(two)
    assert len({vote(one), vote(two)}) == 1


def test_other_values_are_other_votes():
    answers = [
        "5",
        "6",
        "1,2",
        "(1,2)",
        "(2,1)",
        "[1,2]",
        "HTT",
        "TTH",
        "x",
        "y",
        "x+1",
        "\\sqrt{2}",
        "1.414214",
        "",
        "5\\%",
    ]
    assert len(set(map(vote, answers))) == len(answers)
    assert vote("9" * 5000) != vote("8" * 5000)


# ----------------------------------------------------------------------------------------------------
# Any text, any time
# ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "9^{9^{9^9}}", "\\sum_{n=1}^{10^9} \\frac{1}{n^2+\\sin n}", "\\prod_{n=1}^{10^7} n", "(10^9)!", "10!!!!!!",
    "a" * 20_000, "{" * 100_000, "\\boxed{" * 20_000, "\\frac{" * 20_000, "-" * 100_000, "<think>" * 20_000,
    "\\boxed" + " " * 100_000, "1.1" * 40_000, "#### " * 20_000, "1,000" * 20_000, "\\binom{10^9}{10^8}",
    "9" * 20_000, "9" * 290, "{" * 200, "(" * 250, "\\frac{" * 40, "\\sqrt{" * 100 + "1", "x^{" * 60, "1+" * 140 + "1",
    "\x005", "5\x1b[2J", "\u200f5\u202e", "\ud800", "\\int \\frac{\\sin x}{x^5+e^x} dx", "import os",
    "__import__('os')", "7^{7^{5}}" * 30, "\\sqrt[7^{99}]{5}", "\\log_{1}{x}", "\\begin{pmatrix}" * 20,
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: ascii(answer)[:20])
def test_a_hostile_answer_is_wrong(answer):
    assert not is_correct(f"\\boxed{{{answer}}}", "x+7")
    assert not is_correct(answer, "x+7", lenient=True)
    assert hash(vote(answer)) == hash(vote(answer))


def test_no_text_raises():
    """Random strings of the pieces that break parsers."""
    pieces = [
        "\\frac", "{", "}", "(", ")", "[", "^", "_", "\\sqrt", "9", "0", "x", "=", ",", "\\%", "$", "#### ", "\\boxed{",
        "\\text{", "\\left(", "-", "/", ".", " ", "\n", "\\", "\\{", "!", "\\infty", "é", "∑", "\x00", "\u202e",
        "\\pm", "\\cup", "\\begin{matrix}", "&", "<", "\\in", "\\log", "e", "i", "|", "apples", "cm", " or ", "\\le",
    ]  # fmt: skip
    draw = random.Random(0)
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(5000)]
    assert not any(are_correct(texts, ["impossible to guess"] * len(texts)))
    for text in texts:
        assert are_equal(text, text)
        is_correct(f"\\boxed{{{text}}}", "7")
        vote(text)


def test_verdicts_from_several_threads_do_not_mix():
    readings.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda n: is_correct(f"\\boxed{{{n} + x}}", f"x + {n - n % 2}"), range(64)))
    assert verdicts == [n % 2 == 0 for n in range(64)]


def test_two_fresh_processes_agree():
    """Other seeds of the hash, other orders: the same verdicts and votes."""
    pairs = [pair for table in (EQUAL, DIFFERENT) for pairs in table.values() for pair in pairs]
    code = (
        "import json, sys\nfrom tasks.grading import are_correct, vote\nsaid, golds = json.load(sys.stdin)\n"
        "print(are_correct([f'\\\\boxed{{{one}}}' for one in said], golds), [repr(vote(one)) for one in said])"
    )
    outputs = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(list(zip(*pairs, strict=True))), capture_output=True,
            text=True, cwd=ROOT, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""},
        )  # fmt: skip
        outputs.add(done.stdout)
    assert len(outputs) == 1 and "True" in outputs.pop()


def test_grading_imports_neither_torch_nor_transformers():
    code = "import sys, tasks.grading; assert not {'torch', 'transformers', 'sympy', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ----------------------------------------------------------------------------------------------------
# The attacks, and the data sets
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gold", grader.BY_HAND)
def test_no_wrong_answer_made_from_the_gold_answer_is_paid_and_every_usual_spelling_is(gold):
    wrong, right = ([(*row, gold) for row in make(gold)] for make in (grader.wrong_answers, grader.right_spellings))
    assert [row for row, paid in zip(wrong, grader.ours(wrong), strict=True) if paid] == []
    assert [row for row, paid in zip(right, grader.ours(right), strict=True) if not paid] == []


def test_nor_one_made_from_the_golds_of_the_data_sets():
    golds = grader.gold_answers(DATA, every=50)
    if len(golds) == len(grader.BY_HAND):
        pytest.skip("no data is at hand")
    draw = random.Random(0)
    wrong = [(*row, gold) for gold in golds for row in draw.sample(grader.wrong_answers(gold), 6)]
    right = [(*row, gold) for gold in golds for row in grader.right_spellings(gold)]
    assert [row for row, paid in zip(wrong, grader.ours(wrong), strict=True) if paid] == []
    assert [row for row, paid in zip(right, grader.ours(right), strict=True) if not paid] == []


def test_no_key_opens_two_golds():
    golds = [*grader.BY_HAND, *map(str, range(100)), "0.25", "\\sqrt{7}", "\\frac{\\pi}{6}", "x^3", "\\emptyset"]
    assert {key: some for key in grader.keys(40) if len(some := grader.opened(key, golds)) > 1} == {}
    assert len(grader.keys()) > 3000


def test_a_key_that_opens_two_golds_is_found(monkeypatch):
    monkeypatch.setattr(grader, "are_correct", lambda texts, golds: ["key" in text for text in texts])
    assert grader.opened("key", ["1", "2"]) == ["1", "2"]


def test_a_verdict_that_differs_on_a_busy_machine_is_found(monkeypatch):
    pairs = [("1+x", "x+1"), ("2", "3")]
    assert grader.differing(pairs, busy=2) == []
    answers = iter([[True, False], [True, True]])
    monkeypatch.setattr(grader, "afresh", lambda pairs: next(answers))
    assert grader.differing(pairs, busy=1) == [("2", "3")]


def test_the_table_counts_the_kinds_that_it_leaves_out(monkeypatch):
    monkeypatch.setattr(grader, "theirs", lambda rows: [not paid for paid in grader.ours(rows)])
    rows = [("hedged", "?", f"{n} ?", str(n)) for n in range(10, 15)] + [("changed", "'", "7'", "7")]
    rows += [("right", "GOLD.", f"{n}.", str(n)) for n in (3, 4)] + [("borderline", "ours right", "72:1", "72")]
    made = grader.table(rows)
    assert "| hedged | `10 ?` | `10` | no | yes | 5 | ours right |" in made and "| changed" not in made
    assert "Left out: 3 pairs of 2 kinds with fewer than 5 pairs each, 0 of them judged theirs right." in made


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
        spelt = [gold for gold in golds if "x =" not in spelling or grader.is_number(gold)]
        right = are_correct([spelling % gold for gold in spelt], spelt)
        assert [gold for gold, verdict in zip(spelt, right, strict=True) if not verdict] == [], spelling
    others = [(a, b) for a, b in pairwise(golds) if vote(a) != vote(b)]
    assert len(others) > 0.9 * len(golds)
    wrong = are_correct([f"\\boxed{{{a}}}" for a, _ in others], [b for _, b in others])
    assert [pair for pair, verdict in zip(others, wrong, strict=True) if verdict] == []
