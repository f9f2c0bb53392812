"""Is a response's final answer the gold one?

An answer is hostile text: whatever a model wrote. Every verdict takes bounded time and memory, nothing here raises for
a text, and what cannot be decided is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from tasks.expressions import referee


def extract_answer(text: str, *, lenient: bool = False) -> str | None:
    """The final answer of a response: what stands in the last \\boxed{}, else after the last "####"; else None.

    `lenient` falls back to the last number. Never in training: a reward that takes the last number can be farmed.

    >>> extract_answer("First \\\\boxed{1}, then \\\\boxed{\\\\frac{1}{2}}."), extract_answer("3 + 4 = 7 . #### 7")
    ('\\\\frac{1}{2}', '7')
    >>> extract_answer("The answer is 7.") is None, extract_answer("The answer is 7.", lenient=True)
    (True, '7')
    """
    _, boxed, inside = text.rpartition("\\boxed{")
    if boxed:
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", inside, flags=re.DOTALL):  # \{ and \} are letters, not braces
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return inside[: brace.start()].strip() or None
    _, marked, after = text.rpartition("####")
    if marked and (answer := after.strip(" \t").partition("\n")[0].strip()):
        return answer
    numbers = re.findall(r"[+-]?(?:\d[\d,]*\d|\d)(?:\.\d+)?", text, flags=re.ASCII) if lenient else []
    return numbers[-1] if numbers else None


def is_correct(text: str, gold: str, *, lenient: bool = False) -> bool:
    """Does the response's final answer equal the gold answer? See `are_correct`.

    >>> is_correct("so \\\\boxed{1,000.0}", "1000"), is_correct("so \\\\boxed{12.5}", "12"), is_correct("so 12", "12")
    (True, False, False)
    """
    return are_correct([text], [gold], lenient=lenient)[0]


def are_correct(texts: Sequence[str], golds: Sequence[str], *, lenient: bool = False) -> list[bool]:
    """For each response: does its final answer equal the gold answer (or that of a whole gold solution)?

    Numbers and letters are compared here, exactly; what is neither goes through math-verify, in `Referee`.
    """
    verdicts = [False] * len(texts)
    undecided: dict[tuple[str, str], list[int]] = {}  # the same answers come again and again
    for i, (text, gold) in enumerate(zip(texts, golds, strict=True)):
        answer = extract_answer(text, lenient=lenient)
        gold = extract_answer(gold) or gold.strip()
        verdict = answer is not None and compare(answer, gold)
        if verdict is None:
            undecided.setdefault((answer, gold), []).append(i)
        else:
            verdicts[i] = verdict
    for rows, verdict in zip(undecided.values(), referee.compare(list(undecided)), strict=True):
        for i in rows:
            verdicts[i] = verdict
    return verdicts


# Characters that math-verify may see; MATH-500's longest answer has 53. A longer answer must match exactly.
LONGEST = 300
# A gold answer in words or in a named base: the answer has the same words, or the same digits and base.
WORDS = r"\\(?:text|mbox|mathrm|textbf)\{[^{}]*[a-zA-Z]{2}[^{}]*\}|[a-zA-Z]{4,}"
BASED = r"[+-]?(?:\\text\{)?[0-9A-Z.]+\}?_\{?\d+\}?"
ELLIPSIS = r"\.[ $]*\.|…|\\[a-z]*dots"
UNIT_LETTER = r" [mghs](?:\^[23]|/[hs])?$"  # of metres, grams, hours, seconds; beside an expression it is a variable
IRRATIONAL = r"\\(?:sqrt|pi|ln|log|sin|cos|tan)(?![a-z])"


def compare(answer: str, gold: str) -> bool | None:
    r"""True or False where strings, letters, numbers or the shape decide; None where math-verify has to.

    A reward is stricter than a test: what is paid is learnt. So the whole answer has to be of the gold answer's kind,
    and a number beside anything but a unit, a currency sign or "x =" is another answer.

    >>> compare("\\text{(B)}", "B"), compare("B or C", "B"), compare("10\\%", "0.1"), compare("x + 1", "1 + x")
    (True, False, True, None)
    >>> compare("x = 72 apples", "72"), compare("72 or more", "72"), compare("\\neq 72", "72"), compare("71 1", "72")
    (True, False, False, False)
    """
    if answer == gold:
        return True
    in_words = re.fullmatch(WORDS, gold)
    answer, gold = plain(answer), plain(gold)
    if len(answer) > LONGEST or len(gold) > LONGEST or not answer.isprintable():
        return False
    if answer == gold:
        return True
    if re.search(ELLIPSIS, answer):  # what it leaves open may be anything
        return bare(answer) == bare(gold)
    if re.fullmatch("[A-Z](?:, ?[A-Z])*", gold):
        return sorted(answer.strip("().: ").replace(" ", "").split(",")) == sorted(gold.replace(" ", "").split(","))
    number, gold_number = as_number(answer), as_number(gold)
    if number is None or gold_number is None:
        if in_words or re.fullmatch(BASED, gold):
            return bare(answer) == bare(gold)
        answer, gold = map(without_unit, as_values(answer, gold))
        gold_number = as_number(gold)
        number = as_number(answer if gold_number is None else re.sub(UNIT_LETTER, "", answer))
    if number is not None and gold_number is not None:
        return same_number(*number, *gold_number)
    if "." in answer and re.search(IRRATIONAL, gold) and not re.search(IRRATIONAL, answer):
        return False  # for math-verify, which rounds, 1.414214 is the root of 2
    kind = shape(gold)
    if kind is None:
        return bare(answer) == bare(gold)
    return None if shape(answer) == kind else False


def bare(text: str) -> str:
    r"""Without spaces, braces, \\text and capitals.

    >>> bare("52_{8}"), bare("\\text{Two lines}")
    ('52_8', 'twolines')
    """
    return re.sub(r"\\(?:text|mbox|mathrm|textbf)(?![a-zA-Z])|[{} ]", "", text).casefold()


@lru_cache(2**12)  # the same answers come again and again
def plain(text: str) -> str:
    r"""Without what only decorates an answer: $...$, \\text{}, \\left, spacing, a closing period, "Answer:".

    >>> plain("$\\text{(B)}.$"), plain("\\dfrac12\\!"), plain("1\\,000"), plain("7\\ 2"), plain("Answer: 7..")
    ('(B)', '\\frac12', '1000', '7 2', '7..')
    """
    text = re.sub(r"(?<=\d),\\!(?=\d)|(?<=\d)\\,(?=\d{3}(?!\d))|\\!", "", text.strip())
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<!\\)\\[,;: ]|(?<=\w)~|[ \t\r\n]+", " ", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(" +", " ", text).lstrip("$ ").removeprefix("Answer:").lstrip("$ ")
    before = text.rstrip("$ .\\")
    text = before if text.count(".", len(before)) < 2 else text  # two periods are no end
    wrapped = re.fullmatch(r"(?:\\(?:text|mbox|mathrm|textbf|mathbf))?\{([^{}]*)\}", text)
    return (wrapped[1] if wrapped else text).strip()


GREEK = r"\\(?:alpha|beta|gamma|delta|Delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega)(?![a-zA-Z])"
# What may stand before "=" and is no part of the answer: x, a_1, \theta, \angle A; (x, y) before as many values;
# f(x) where x comes again.
NAME = (
    rf"(?:[a-zA-Z](?:_\w|_\{{\w+\}})?|{GREEK}|m?\\angle ?[A-Z]{{1,3}}|\([a-z](?:, ?[a-z])+\)(?= *= *\(.*,)|"
    r"[a-zA-Z]\((?P<of>[a-z])\)(?= *=.*(?P=of)))"
)
EITHER = r",? ?(?:\\(?:text|mbox)\{,? *(?:or|and) *\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])),? ?"


def as_values(answer: str, gold: str) -> tuple[str, str]:
    r"""Both without "x =", where one lacks it or both have the same. "or" and "and" become commas where gold is a list.

    >>> as_values("x = 5", "5"), as_values("5 = x", "x = 6"), as_values("x=1 or x=2", "1, 2")
    (('5', '5'), ('5', '6'), ('1,2', '1, 2'))
    >>> as_values("ab = 5", "5"), as_values("y = 5", "x = 5")
    (('ab = 5', '5'), ('y = 5', '5'))
    """
    gold = re.sub(EITHER, ",", gold)
    if re.search(r",|\\pm", gold):
        answer = re.sub(EITHER, ",", answer)
    if re.match(r"[(\[]|\\\{", gold):
        answer = re.sub(r"^[a-z] ?\\in(?![a-zA-Z]) ?", "", answer)
    if "=" in gold:
        answer, gold = (re.sub(rf"^([^=]*[^= a-zA-Z]) *= *([a-z]|{GREEK})$", r"\2=\1", side) for side in (answer, gold))
    (name, value), (gold_name, gold_value) = named(answer), named(gold)
    if name == gold_name or "=" not in answer or "=" not in gold:
        return value, gold_value
    return (answer, gold) if shape(gold_value) != "v:" else (answer, gold_value)  # 2x = 10 is not yet x = 5


def named(text: str) -> tuple[str | None, str]:
    r"""A name and the value or values that the text gives it; None where it does not.

    >>> named("x = 5"), named("x=1,x=2"), named("2x = 10")
    (('x', '5'), ('x', '1,2'), (None, '2x = 10'))
    """
    names = [found[0].rstrip("= ").lstrip(", ") for found in re.finditer(rf"(?:^|,) *{NAME} *=", text)]
    if len(set(names)) != 1 or len(names) != text.count("="):
        return None, text
    return names[0], re.sub(rf"(^|,) *{NAME} *= *", r"\1", text)


@lru_cache(2**12)
def as_number(text: str) -> tuple[Fraction, bool] | None:
    """An integer, decimal or fraction, exactly, and whether it is a percentage; else None.

    Read are thousands' commas, a currency sign, a/b, \\frac{a}{b}, \\frac12 and a closing percent sign.

    >>> as_number("$1,250.50"), as_number("-\\\\frac{3}{4}"), as_number("10%"), as_number("x + 1")
    ((Fraction(2501, 2), False), (Fraction(-3, 4), False), (Fraction(10, 1), True), None)
    """
    text = re.sub(r"^([+-]?)\s*[$€£]\s*", r"\1", text.replace("{,}", ",")).rstrip("$€£¢ ")
    percent = text.endswith("%")
    text = text.rstrip("% ")
    if len(text) > 100:
        return None
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", text, flags=re.ASCII):
        text = text.replace(",", "")
    if fraction := re.fullmatch(r"([+-]?)\\frac(?:\{(-?\d+)\}|(\d))\s?(?:\{(\d+)\}|(\d))", text, flags=re.ASCII):
        sign, *parts = fraction.groups()
        numerator, denominator = (part for part in parts if part is not None)
        text = f"{sign}{numerator}/{denominator}"
    if not (number := re.fullmatch(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:\s?/\s?(\d+))?", text, flags=re.ASCII)):
        return None
    divisor = int(number[2] or 1)
    return (Fraction(number[1]) / divisor, percent) if divisor else None


def same_number(a: Fraction, a_percent: bool, b: Fraction, b_percent: bool) -> bool:
    """Exact equality; a percentage beside a plain number may be either the number or a hundredth of it.

    >>> same_number(Fraction(10), True, Fraction(1, 10), False), same_number(Fraction(10), True, Fraction(10), False)
    (True, True)
    >>> same_number(Fraction(1), True, Fraction(100), True)
    False
    """
    if a_percent == b_percent:
        return a == b
    percent, number = (a, b) if a_percent else (b, a)
    return number in (percent, percent / 100)


# Questions count whatever they like, so no list holds all units. Words are taken for one if there are at most
# MOST_WORDS and none is a number, makes another number of the one before it, doubts it, or is an adverb in -ly.
MOST_WORDS = 5
COUNT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
NO_UNIT = set(COUNT.split()) | set(
    """or more less at least most not no nor never about around approx almost circa over under above below up down to
    than between beyond and plus minus times divided multiplied by squared cubed hundred hundreds thousand thousands
    million millions billion billions trillion trillions dozen dozens half halves third thirds fourth fourths fifth
    fifths sixth sixths eighth eighths tenth tenths hundredths thousandths percent base mod modulo choose factorial
    negative positive ish so maybe perhaps if unless either neither but except without through until else other another
    false wrong incorrect greater fewer larger smaller higher lower maximum minimum twice double triple some several etc
    onwards onward guess is was equals sin cos tan log ln exp sqrt pi inf infinity any all then instead mixed decimal
    binary octal hex hexadecimal remainder estimated estimate est rounded ballpark max min tops upwards upward bound
    limit pair couple score gross grand lakh crore bn mn tens doubled tripled halved reciprocal repeating recurring
    excluded untrue nope none nothing undefined unknown unsure uncertain thereabouts give take i we think believe
    suppose hope say otherwise whatever anything nobody knows""".split()
)
SHORT_UNITS = "cm mm km kg mg ml mL ft yd in mi lb oz hr hrs lbs sq mph kph rpm min sec pm am".split()
VARIABLES = "x y z n k i e a b c K M B".split()  # or thousands, millions, billions
IN_LY = "daily weekly monthly yearly hourly family jelly butterfly assembly".split()  # and no adverbs, or of time
QUOTED = r"\\(?:text|mbox|mathrm|textnormal|textrm) ?\{"


def without_unit(text: str) -> str:
    r"""The text before a unit at its end: words (bare ones from two letters on), a power, degrees. Else the text.

    >>> without_unit("5\\text{ cm}^2"), without_unit("90^\\circ"), without_unit("$5 per hour"), without_unit("5 km/h")
    ('5', '90', '$5', '5')
    >>> without_unit("72 or more"), without_unit("72x"), without_unit("72ab"), without_unit("x + 1")
    ('72 or more', '72x', '72ab', 'x + 1')
    """
    begin = re.search(rf" ?(?:{QUOTED}|(?<![a-zA-Z\\{{])[a-zA-Z]{{2}})", text)
    if begin and begin.start():
        unit = re.sub(QUOTED + r"([^{}]*)\}", r" \1 ", text[begin.start() :])
        unit = re.sub(r"\^ ?(?:[23]|\{[23]\})|\\cdot|\^$", " ", unit)
        unit = re.sub(rf"\b(?:{COUNT.replace(' ', '|')})-(?=[a-zA-Z]+ +[a-zA-Z])", "", unit)  # one-dollar bills
        words = re.findall("[a-zA-Z]+|[$€£¢]", unit) or ["x"]
        told = (
            "{" in begin[0]
            or words[0] in SHORT_UNITS
            or re.match(r"(?= ?[a-zA-Z]*[aeiouyAEIOUY])(?: |\w)[a-zA-Z]{3}", unit)
        )
        told = told and words[0] not in VARIABLES and len(words) <= MOST_WORDS
        if told and re.fullmatch(r"[a-zA-Z .()/~$€£¢-]*", unit):
            others = [word.lower() for word in words[words[0] in SHORT_UNITS :]]  # (72 min: minutes)
            if not any(word in NO_UNIT or (word.endswith("ly") and word not in IN_LY) for word in others):
                text = text[: begin.start()]
    return re.sub(r" ?(?:\^ ?(?:\\circ|\{ ?\\circ ?\})|°|\\degrees?)(?: ?[CF])?$", "", text).strip()


# What a LaTeX token is to `shape`. Numbers are d (one digit) and n, other values v. A command not named here is unread.
TOKENS = {
    "d": r"\d(?![\d.])", "n": r"\d+(?:\.\d*)?|\.\d+", "v": rf"[a-zA-Z](?:_(?:\w|\{{\w+\}}))?|{GREEK}|\\pi|\\infty",
    "F": r"\\frac", "S": r"\\sqrt", "f": r"\\(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp)(?![a-zA-Z])",
    "s": r"[+-]", "*": r"\*|/|\\cdot|\\times|\\div", "u": r"\\cup",
    "B": r"\\begin\{[pb]matrix\}", "E": r"\\end\{[pb]matrix\}",
    "{}": r"\\[{}]", ";": r"\\\\", "≤": r"\\leq?(?![a-zA-Z])|≤", "≥": r"\\geq?(?![a-zA-Z])|≥", "": r"\s+",
    "same": r"[()\[\]{}^_!|,:=<>&]",
}  # fmt: skip
TOKEN = re.compile("|".join(f"({pattern})" for pattern in TOKENS.values()))
KINDS = list(TOKENS)
SUM = r"s?[ndv]v*(?:(?:\*s?|s)[ndv]v*)*"  # no number directly behind anything: neither 71 1 nor 72(3)4
REDUCTIONS = [
    (rf"\{{{SUM}\}}", "g"), (r"F[gvd][gvd]", "v"), (rf"S(?:\[{SUM}\])?[gvd]", "v"), (r"[nd](?:\^[gvdn]|!)", "n"),
    (r"[vg]\^[gvdn]|v!", "v"), (rf"\({SUM}\)|\|{SUM}\|", "v"), (r"f(?:_[gvd])?(?:\^[gvd])?[ndv]v*", "v"),
]  # fmt: skip


@lru_cache(2**12)
def shape(text: str) -> str | None:
    r"""What is left of LaTeX when each expression is v, behind it the variables; None where it is no mathematics.

    Brackets, relations and the number of items stay. Two answers can be equal only where this is the same.

    >>> shape("2\\sqrt{3}"), shape("(1, x^2]"), shape("2x = 72"), shape("\\{1,2\\}"), shape("3 \\pm 1")
    ('v:', '(v,v]:x', 'v=v:x', 'v,v:', 'v,v:')
    >>> shape("\\phantom{72}"), shape("71 1"), shape("72_8"), shape("1, \\ldots")
    (None, None, None, None)
    """
    text = re.sub(r"\^ ?(?:\\circ|\{ ?\\circ ?\})|°", "", text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}"))
    text = re.sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", re.sub(r"%$", "", text))
    text = re.sub(r"\\sqrt ?(\d)(?!\d)", r"\\sqrt{\1}", re.sub(r"\\frac ?(\d) ?\{", r"\\frac{\1}{", text))
    if text.count("\\pm") == 1 and "," not in text:
        text = text.replace("\\pm", "+") + "," + text.replace("\\pm", "-")
    pieces, end, variables = [], 0, set()
    for token in TOKEN.finditer(text):
        if token.start() != end:
            return None
        end = token.end()
        kind = KINDS[token.lastindex - 1]
        pieces.append(token[0] if kind in ("same", "{}") else kind)
        if kind == "v" and token[0] not in ("\\pi", "\\infty", "e", "i"):
            variables.add(token[0])
    left, before = "".join(pieces), None
    while left != before and end == len(text):
        before = left
        for pattern, value in REDUCTIONS:
            left = re.sub(pattern, value, left)
    left = re.sub("^g$", "v", left)
    left = re.sub(SUM, "v", left)
    if end != len(text) or not left or re.search(r"[FSfgs*^_!|]|vv|(?<!\\)[{}]", left):
        return None
    if re.fullmatch(r"\\\{v(,v)+\\\}", left):
        left = left[2:-2]  # the set of some values is the list of them, in any order
    return f"{left}:{''.join(sorted(variables))}"
