"""The reader of LaTeX: what it reads, what it refuses, and that its work is bounded by the text and not by a clock."""

import random
from fractions import Fraction

import pytest

from tasks import expressions
from tasks.expressions import BITS, LONGEST, read


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3), ("-3", -3), ("0.125", Fraction(1, 8)), (".5", Fraction(1, 2)), ("\\frac34", Fraction(3, 4)),
        ("\\frac{3}4", Fraction(3, 4)), ("\\frac3{4}", Fraction(3, 4)), ("-\\frac{-3}{4}", Fraction(3, 4)),
        ("2^{10}", 1024), ("2^10", 1024), ("2^{-2}", Fraction(1, 4)), ("2^-2", Fraction(1, 4)), ("-2^2", -4),
        ("(-2)^2", 4), ("8^{1/3}", 2), ("8^(1/3)", 2), ("\\sqrt{\\frac49}", Fraction(2, 3)), ("\\sqrt9", 3),
        ("\\sqrt[3]{-8}", -2), ("5!", 120), ("\\binom{5}{2}", 10), ("{5 \\choose 2}", 10),
        ("{6 \\over 4}", Fraction(3, 2)), ("2\\frac12", Fraction(5, 2)), ("-2\\frac12", Fraction(-5, 2)),
        ("1/2/2", Fraction(1, 4)), ("6 \\div 4", Fraction(3, 2)), ("2 \\cdot -3", -6), ("2(3)", 6), ("(2)(3)", 6),
        ("|-3|", 3),
        ("\\log 1000", 3), ("\\log_2 8", 3),
        ("\\log_{9} 27", Fraction(3, 2)), ("\\ln e^2", 2), ("\\sin \\pi", 0), ("\\tan \\pi", 0), ("\\cot 90^\\circ", 0),
        ("\\cos \\frac{\\pi}{3}", Fraction(1, 2)), ("\\tan 45^\\circ", 1), ("\\sin^2 30^\\circ", Fraction(1, 4)),
        ("\\sqrt{2}\\sqrt{8}", 4), ("e^{i\\pi}", -1), ("i^2", -1),
        ("\\frac{1+\\sqrt5}{2} \\cdot \\frac{1-\\sqrt5}{2}", -1), ("\\sqrt{3+2\\sqrt2}-\\sqrt2", 1),
        ("\\arctan 0", 0), ("10^{400}", 10**400),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert read(text) == value and isinstance(read(text), Fraction)


@pytest.mark.parametrize(
    "one, two",
    [
        ("\\sqrt{12}", "2\\sqrt3"), ("\\frac{\\pi}{2}", "0.5\\pi"), ("\\sqrt{-4}", "2i"),
        ("\\frac{1}{1+i}", "\\frac{1-i}{2}"), ("x+1", "1+x"), ("2x", "x \\cdot 2"), ("\\frac{x}{2}", "x/2"),
        ("x^{2}", "x x"), ("\\sin 2x", "2\\sin x\\cos x"), ("\\sin x (x+1)", "(x+1)\\sin x"),
        ("\\ln 2x", "\\ln 2 + \\ln x"), ("e^{x}", "\\exp(x)"), ("x^{1/2}", "\\sqrt{x}"),
        ("\\sqrt{xy}", "\\sqrt{x}\\sqrt{y}"), ("a_{1}b", "b a_{1}"), ("\\alpha+1", "1+\\alpha"), ("|x-y|", "|y-x|"),
        ("x^2\\frac12", "\\frac{x^2}{2}"), ("y=2x", "2x-y=0"), ("y=2x", "2y=4x"), ("5<y", "y>5"),
        ("1<x\\le 2", "2\\ge x>1"), ("x \\ne 1", "1 \\ne x"), ("\\{1,2\\}", "\\{2,1\\}"), ("\\{\\}", "\\emptyset"),
        ("(1,2)\\cup[3,4]", "[3,4]\\cup(1,2)"), ("x^{2010}", "(x^2)^{1005}"),
        ("\\langle 1,2 \\rangle", "\\langle 1, \\frac42 \\rangle"),
        ("\\begin{matrix}1&2\\\\3&4\\end{matrix}", "\\begin{matrix} 1 & \\sqrt4 \\\\ 3 & 2^2 \\\\ \\end{matrix}"),
    ],
)  # fmt: skip
def test_the_same_is_read_from(one, two):
    assert read(one) is not None and read(one) == read(two)


@pytest.mark.parametrize(
    "one, two",
    [
        ("x", "y"), ("x", "X"), ("x+y", "x+z"), ("x-x+3", "3"), ("|x|", "x"), ("\\sqrt{x^2}", "x"), ("(1,2)", "(1,2]"),
        ("(1,2)", "\\langle 1,2 \\rangle"), ("\\{1,2\\}", "\\{1,2,2\\}"), ("5<y", "5 \\le y"), ("5<y", "y<5"),
        ("y=2x", "y=3x"), ("1:2", "1/2"), ("\\sqrt2", "1.4142135623730950488"),
        ("\\frac{\\pi}{5^{80}}", "\\frac{\\pi}{5^{79}}"), ("10^{60}+1", "10^{60}"), ("\\infty", "-\\infty"),
        ("a_1", "a_2"), ("x^{2010}", "x^{2011}"), ("\\log x", "\\ln x"),
        ("\\begin{matrix}1&2\\end{matrix}", "\\begin{matrix}1\\\\2\\end{matrix}"), ("3=3", "3"), ("(3,3)", "3"),
    ],
)  # fmt: skip
def test_other_things_are_read_from(one, two):
    assert read(one) is not None and read(two) is not None and read(one) != read(two)


@pytest.mark.parametrize(
    "text",
    [
        "", "1/0", "0^0", "0^{-1}", "\\frac{0}{0}", "\\tan 90^\\circ", "\\ln 0", "\\log_1 5", "\\infty+1", "2\\infty",
        "\\sqrt{\\infty}", "\\frac{1}{\\infty}", "9^{9^9}", "2^{2^{20}}", "(10^9)!", "(1/2)!", "(-1)!", "3!!",
        "\\binom{10^7}{10^6}", "\\exp(10^9)", "71 1", "x2", "2(3)4", "\\frac12 3", "4\\frac32", "\\sin^{-1} x",
        "\\sin_2 x", "(1,2)+1", "\\{1\\}^2", "[1", "(1", "1)", "{1", "\\{1,2", "1,2", "1=", "<2", "x'y\"",
        "\\phantom{3}", "\\text{a}", "\\overline{3}", "1 \\ldots", "\\sum_{n=1}^{9} n", "\\int x dx", "\\lim x",
        "é", "½", "\x00", "3%", "1,,2", "\\", "1" * (LONGEST + 1), "(" * 100 + "1" + ")" * 100, "\\frac", "^2",
        "x^", "x_", "_", "\\begin{matrix}1", "&", "|1",
    ],
    ids=lambda text: ascii(text)[:20],
)  # fmt: skip
def test_what_says_nothing(text):
    assert read(text) is None


LONG = [
    "x^{2000}y^{999}+" * 18 + "1", "\\frac{1}{2+" * 24 + "1" + "}" * 24, "7^{5000}+" * 32 + "1", "1500!+" * 48 + "1",
    "\\binom{1500}{700}+" * 15 + "1", "\\sqrt[97]{x}+" * 22 + "1", "\\sin 7^{5000}+" * 19 + "1",
    "\\log_7 x^9+" * 26 + "1", "x" + "^x" * 140, "1+" * 149 + "1", "\\sqrt" * 58 + "x", "\\sin" * 70 + "x",
    "-" * 299 + "1", "(" * 150 + ")" * 150, "\\begin{matrix}" + "1&" * 120 + "1\\end{matrix}", "1/" * 149 + "1",
    "9" * 300, "\\frac{1}{7^{4000}}+" * 15 + "1", "(x+y)^{99}" * 29, "\\{" * 30, "|" * 300, "\\frac" * 59,
]  # fmt: skip


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:20])
def test_the_work_is_bounded_by_the_text(text, monkeypatch):
    """Counted, not timed: at each point at most one number for each character, none longer than BITS."""
    assert len(text) <= LONGEST
    numbers, finite = [], expressions.finite

    def counted(number):
        numbers.append(number)
        if isinstance(number, Fraction):  # also one that is refused has been computed
            assert max(number.numerator.bit_length(), number.denominator.bit_length()) <= 2 * BITS + 1
        return finite(number)

    monkeypatch.setattr(expressions, "finite", counted)
    read.cache_clear()
    read(text)
    read.cache_clear()
    assert len(numbers) <= 5 * LONGEST


def test_what_cannot_be_read_is_refused_and_nothing_else_is_raised():
    """`read` holds every exception back; here only those that it means to."""
    pieces = [
        "\\frac", "{", "}", "(", ")", "[", "]", "^", "_", "\\sqrt", "9", "0", "x", "=", ",", "/", ".", "\\{", "\\}",
        "!", "\\infty", "\\cup", "\\begin{matrix}", "\\end{matrix}", "&", "\\\\", "<", "\\log", "\\sin", "\\pi",
        "e", "i", "|", "\\binom", "\\over", "^\\circ", "\\emptyset", "\\lfloor", "\\rfloor", ":", "-", "*", "2",
        "\\alpha", "'", "\\tan",
    ]  # fmt: skip
    draw = random.Random(0)
    read_some = 0
    for _ in range(6000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        try:
            said = expressions.Reader(text).everything()
            read_some += 1
            assert hash(said) == hash(read(text)) and said == read(text)
        except (ValueError, ArithmeticError):
            assert read(text) is None
    assert read_some > 100
