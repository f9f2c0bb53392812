r"""How an answer is judged: the response's final answer and the gold answer are read, and what they say is compared.

An answer is hostile text: whatever a model wrote. Every verdict takes bounded time and memory, nothing here raises for
a text, and what cannot be read must have the gold answer's words. What is paid is learnt, so grading is strict: behind
a number may stand only a unit of tasks/units.py or a word of the gold answer. In full: docs/real-models.md, Grading.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from tasks.expressions import LONGEST, VARIABLE, read
from tasks.units import CIRCULAR, Unit, without_unit

# What opens and closes; \\{ and \\} are letters, \\\\ a new line.
BRACE = re.compile(r"\\boxed\s*(?:\{|(-?\d+(?:\.\d+)?))|\\\\(?!boxed)|\\[{}]|[{}]")


def extract_answer(text: str, *, lenient: bool = False) -> str | None:
    """The final answer of a response: what stands in the last \\boxed{}, else after the last "####"; else None.

    What is thought aloud, in <think>, is no answer; nor is a box that is not closed, or is empty.
    `lenient` falls back to the last number. Never in training: a reward that takes the last number can be farmed.

    >>> extract_answer("First \\\\boxed{1}, then \\\\boxed{\\\\frac{1}{2}}."), extract_answer("3 + 4 = 7 . #### 7")
    ('\\\\frac{1}{2}', '7')
    >>> extract_answer("The answer is 7.") is None, extract_answer("The answer is 7.", lenient=True)
    (True, '7')
    """
    if "think>" in text:
        text = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    answer, opened = None, []  # of each brace that is open inside a box: where its content begins
    for brace in BRACE.finditer(text, first) if (first := text.find("\\boxed")) >= 0 else ():
        if brace[1] and not opened:
            answer = brace[1]  # \boxed 2
        elif brace[0] == "}" and opened:
            begin = opened.pop()
            if not opened:  # of a box in a box, the outer one
                answer = text[begin : brace.start()].strip() or answer
        elif (brace[0] == "{" and opened) or (brace[0].startswith("\\boxed") and not brace[1]):
            opened.append(brace.end())
    if answer and not opened:
        return answer
    _, marked, after = text.rpartition("####")
    if marked and not opened and (answer := after.strip(" \t").partition("\n")[0].strip("* \t\r")):
        return answer
    numbers = re.findall(r"[+−-]?(?:\d[\d,]*\d|\d)(?:\.\d+)?", text, flags=re.ASCII) if lenient else []
    return numbers[-1] if numbers else None


def is_correct(text: str, gold: str, *, lenient: bool = False) -> bool:
    """Does the response's final answer equal the gold answer (or that of a whole gold solution)?

    >>> is_correct("so \\\\boxed{1,000.0}", "1000"), is_correct("so \\\\boxed{12.5}", "12"), is_correct("so 12", "12")
    (True, False, False)
    """
    answer = extract_answer(text, lenient=lenient)
    return answer is not None and are_equal(answer, extract_answer(gold) or gold.strip())


def are_correct(texts: Sequence[str], golds: Sequence[str], *, lenient: bool = False) -> list[bool]:
    """`is_correct` for each response."""
    return [is_correct(text, gold, lenient=lenient) for text, gold in zip(texts, golds, strict=True)]


WHOLE = re.compile(r"-?\d{1,50}", flags=re.ASCII)


def are_equal(answer: str, gold: str) -> bool:
    r"""Does the answer say what the gold answer says?

    >>> are_equal("\\text{(B)}", "B"), are_equal("B or C", "B"), are_equal("10\\%", "0.1"), are_equal("x + 1", "1 + x")
    (True, False, True, True)
    >>> are_equal("x = 72 apples", "72"), are_equal("72 or more", "72"), are_equal("\\neq 72", "72")
    (True, False, False)
    """
    if answer == gold:
        return True
    if WHOLE.fullmatch(answer) and WHOLE.fullmatch(gold):  # nothing to read, as most often
        return int(answer) == int(gold)
    if "\\approx" in gold:  # only a gold answer may round; the number before it is meant, if there is one
        before, _, behind = gold.partition("\\approx")
        if are_equal(answer.removeprefix("\\approx"), before.strip() if re.search(r"\d", before) else behind):
            return True
    if max(len(answer), len(gold)) > LONGEST:
        return False
    golds = readings(gold)
    return any(said.agrees(meant) for meant in golds for said in readings(answer, golds[0].unit.words))


def vote(answer: str) -> Hashable:
    r"""What the answer counts as in a majority: the same for two answers of the same value.

    >>> vote("x=5") == vote("5.0"), vote("1,2") == vote("\\{2,1\\}"), vote("no") == vote("on")
    (True, True, False)
    """
    if len(answer) > LONGEST:
        return answer
    first = readings(answer, frozenset())[0]
    return (first.value, first.percent)


# ----------------------------------------------------------------------------------------------------
# Spellings: what can be written in several ways gets one.
# ----------------------------------------------------------------------------------------------------

CHARACTERS = {
    "−–‐‑－": "-", "×": "\\times ", "·⋅": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "°": "^\\circ ",
    "√": "\\sqrt ", "≤⩽": "\\le ", "≥⩾": "\\ge ", "≠": "\\ne ", "∈": "\\in ", "∪": "\\cup ", "±": "\\pm ",
    "∅": "\\emptyset ", "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "⅓": "\\frac13 ", "⅔": "\\frac23 ",
    "′’": "'", "\u00a0\u2009\u200a\u2006\u202f": "~", "ℝ": "\\mathbb{R}", "θ": "\\theta ", "α": "\\alpha ",
    "β": "\\beta ", "，": ",", "％": "%", "⟨": "\\langle ", "⟩": "\\rangle ",
}  # fmt: skip
ONE_CHARACTER = str.maketrans({each: to for several, to in CHARACTERS.items() for each in several})
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
END = "(?![a-zA-Z])"
IN_TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|normal)?|[mh]box|math(?:rm|bf|it|sf)|operatorname|boxed|boldsymbol|bm) ?\{([^{}]*)\}"
)
LAST = (r"(?<![.…\s\\]) ?[.,;] ?$", "")  # a single one
SPELLINGS = [(re.compile(pattern), to) for pattern, to in (
    LAST,
    (r"^[\s*]*(?:\$+(.*[^\\$])\$+|\\\((.*)\\\)|\\\[(.*)\\\])[\s.*]*$", r"\1\2\3"),
    (rf"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?){END}|\\phantom *(?:-|\{{-\}})|^\*\*|\*\*$|(?<!\\)\\$", ""),
    (r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|,?\\!|\\[,;:]|~|,)\d{3})+(?!,?\d)", lambda number: thousands(number)),
    (r"\\!", ""), (rf"(?<!\\)\\[,;: ]|\\q?quad{END}|\\(?:rm|bf){END}|(?<=.)~|\s", " "),
    (IN_TEXT, r" \1 "), (IN_TEXT, r" \1 "), (r"\\math(?:rm|bf|it) +", " "),  # twice, for one in the other
    (rf" *(?:\{{ ?\\?% ?\}}|\\?%|(?<![a-zA-Z])(?:percent(?:age)?|per cent|pct){END})", "%"),
    (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\[lr]?vert|\\mid", "|"), (r"(?<=[\w)}])\*\*(?=[\w({])", "^"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\[dt]binom", r"\\binom"), (r"\\ast", "*"), (r"\\?:=|\\coloneqq", "="),
    (rf"\\leq?q?(?:slant)?{END}|<=", r"\\le "), (rf"\\geq?q?(?:slant)?{END}|>=", r"\\ge "), (rf"\\lt{END}", "<"),
    (rf"\\gt{END}", ">"), (rf"\\neq?{END}|\\not ?=|!=", r"\\ne "), (r"\\varnothing", r"\\emptyset "),
    (rf"\\mathbb ?\{{?R\}}?|\\R{END}", r"(-\\infty,\\infty)"),
    (rf" *\^? ?(?:\\(?:circ|degrees?){END} ?|\{{ ?\\circ ?\}})", r"^\\circ "),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?", lambda number: period(*number.groups())),
    (r"(?<![\w.])(\d+)(\.\d+)?[eE]((?(2)[+-]?)\d{1,3})(?![\w.])", r"(\1\2*10^{\3})"),
    (rf"(?<![a-zA-Z\\])(sqrt|pi|sin|cos|tan|log|ln|exp|theta){END}", r"\\\1 "),
    (rf"(?<![a-zA-Z\\])(?:infinity|inf){END}", r"\\infty "),
    (r"\\(begin|end)\{[pb](?:small)?matrix\}", r"\\\1{matrix}"),
    (r"[(\[]? ?\\begin\{(?:array\} ?\{[clr| ]*|smallmatrix|matrix)\}", r"\\begin{matrix}"),
    (r"\\end\{(?:array|smallmatrix|matrix)\} ?[)\]]?", r"\\end{matrix}"),
    (r"\\sqrt +(\d+)", r"\\sqrt{\1}"), (" +", " "), (r"(?<=\d) over (?=\d)", "/"),
    (r"(?<![\d.] )(?<![\d.])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"^ ?(?:\\(?:implies|Rightarrow|therefore) ?|(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?::| is:?) ?)", ""),
    LAST,
)]  # fmt: skip


def thousands(number: re.Match) -> str:
    """1,234 is one number, but inside brackets a comma parts two: (1,234)."""
    before = number.string[: number.start()]
    inside = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    return number[0] if inside and re.search(r"\d,\d", number[0]) else re.sub(r"\D", "", number[0])


def period(before: str, first: str, repeated: str) -> str:
    r"""0.1\overline{6} as a fraction.

    >>> period("0", "1", "6")
    '(15/90)'
    """
    whole = int(before + first + repeated) - int("0" + before + first)
    return f"({whole}/{'9' * len(repeated)}{'0' * len(first)})"


def plain(text: str) -> str:
    r"""The text in its one spelling, without what only decorates it.

    >>> plain("$\\text{(B)}.$"), plain("\\dfrac12\\!"), plain("1\\,000"), plain("7\\ 2"), plain("Answer: 7..")
    ('(B)', '\\frac12', '1000', '7 2', '7..')
    """
    text = re.sub(r"[⁰¹²³⁴-⁹⁻ⁿ]+", lambda power: f"^{{{power[0].translate(RAISED)}}}", text)
    text = text.translate(ONE_CHARACTER)
    for pattern, to in SPELLINGS:
        text = pattern.sub(to, text).strip()
    return text


# ----------------------------------------------------------------------------------------------------
# Readings
# ----------------------------------------------------------------------------------------------------

# What may stand before "=" and is no part of the answer.
NAME = "|".join((
    rf"(?![ei]\b){VARIABLE}", r"[a-zA-Z]_\{[^{}]*\}",  # x, a_{n+1}
    r"(?:[f-hp-sA-Z]|f\^\{-1\})'*\((?:[a-z]|-?[\d.]+|-?\\pi|-?\\frac\{?\d+\}?\{?\d+\}?|[A-Z][^()]*)\)",  # f(3), P(A)
    r"[A-Z]{2,3}|\\overline ?\{[A-Z]{2}\}|\|[A-Z]{2}\||\[[A-Z]{3,}\]|m? ?\\angle ?[A-Z]{1,3}",  # lengths, areas, angles
    rf"\\(?:sin|cos|tan|cot|sec|csc) ?{VARIABLE}", r"\([a-z](?:, ?[a-z])+\)(?= ?= ?\(.*,)",  # (x, y), of a pair
    "[Tt]otal|[Aa]rea|[Pp]erimeter|[Vv]olume|[Ss]um|[Cc]ost|[Pp]rofit|[Aa]nswer|[Pp]robability",
))  # fmt: skip
NAMED = re.compile(rf"({NAME}) ?(?:=|\\in ?(?=[(\[]|\\\{{)) ?([^=]+)|([^=]+) ?= ?({NAME})")
EITHER = re.compile(r" ?,? ?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]) ?,? ?")
WITH_FRACTION = re.compile(r"(-?\d+) and (\\frac ?\d ?\d|\\frac ?\{\d+\} ?\{\d+\}|\d+/\d+)")


class Reading(NamedTuple):
    """One way to understand an answer."""

    value: Hashable
    name: str = ""  # "x" in x = 5
    unit: Unit = Unit()
    percent: bool = False

    def agrees(self, gold: Reading) -> bool:
        """The same value, and no other name or unit. A percentage may be the number or a hundredth of it."""
        if (self.name and gold.name and self.name != gold.name) or not self.unit.agrees(gold.unit):
            return False
        if self.value == gold.value:
            return True
        percent, number = (self, gold) if self.percent else (gold, self)
        both = isinstance(percent.value, Fraction) and isinstance(number.value, Fraction)
        return both and percent.percent != number.percent and percent.value == 100 * number.value


@lru_cache(2**14)
def readings(answer: str, known: frozenset[str] | None = None) -> tuple[Reading, ...]:
    r"""Every way to understand an answer, mostly one; as words if it is no mathematics. See `unit_of` for `known`.

    >>> readings("x = 5\\text{ cm}")
    (Reading(value=Fraction(5, 1), name='x', unit=Unit(measures=(('cm', 1),), words=frozenset()), percent=False),)
    >>> readings("Yes")
    (Reading(value=('words', 'yes'), name='', unit=Unit(measures=(), words=frozenset()), percent=False),)
    """
    text = plain(answer)
    if not text.isprintable():  # control characters and other things that nobody sees
        return (Reading(("words", answer)),)
    ways = [text, WITH_FRACTION.sub(r"(\1+\2)", text)] if WITH_FRACTION.fullmatch(text) else [text]
    found = [reading(way, known, literal) for way in ways for literal in (False, True)]
    found = tuple(dict.fromkeys(filter(None, found)))
    bare = re.sub("[{} ]", "", text)
    return found or (Reading(("words", bare.casefold() if re.search("[a-zA-Z]{2}", bare) else bare)),)


def reading(text: str, known: frozenset[str] | None, literal: bool) -> Reading | None:
    """A single item, or a list of them in any order. `literal`: m is no meter, and y = 2x an equation."""
    is_set = re.fullmatch(r"\\\{((?:(?!\\[{}]).)+)\\\}", text)
    parts = split(is_set[1] if is_set else text)
    ranges = [as_range(part) for part in parts]
    if len({name for name, _ in ranges}) == 1 and ranges[0][0]:
        parts = [f"{ranges[0][0]} \\in " + "\\cup".join(interval for _, interval in ranges)]
    items = [item(part, known, literal) for part in parts]
    if None in items:
        return None
    names, units, percents = ({each[k] for each in items} for k in (1, 2, 3))
    if len(units - {Unit()}) > 1 or len(percents) > 1:
        return None
    several = len(names - {""}) > 1
    values = [(name, value) if several else value for some, name, _, _ in items for value in some]
    if is_set and len(values) == 1:
        values = [read(text)]
    elif len(values) > 1:
        values = [("\\{", *sorted(values, key=repr), "\\}")]
    return Reading(values[0], "" if several else max(names), max(units, key=any), *percents)


def split(text: str) -> list[str]:
    r"""At the commas, "and" and "or" outside of all brackets.

    >>> split("(1,2), 3 or 4"), split("x^{2,1}")
    (['(1,2)', '3', '4'], ['x^{2,1}'])
    """
    items, depth = [""], 0
    for piece in re.split(r"(\\?[()\[\]{}]|\\[lr]angle|[,;])", EITHER.sub(",", text)):
        depth += (piece in OPENING) - (piece in CLOSING)
        if piece in (",", ";") and not depth:
            items.append("")
        else:
            items[-1] += piece
    return [one.strip() for one in items]


OPENING, CLOSING = ("(", "[", "{", "\\{", "\\langle"), (")", "]", "}", "\\}", "\\rangle")


def item(text: str, known: frozenset[str] | None, literal: bool) -> tuple[list, str, Unit, bool] | None:
    r"""The values of one item of a list (several where \pm stands in it), its name, its unit, whether it has a %.

    >>> item("x = \\pm 3%", None, False)
    ([Fraction(3, 1), Fraction(-3, 1)], 'x', Unit(measures=(), words=frozenset()), True)
    """
    name, percent = "", text.endswith("%")
    if text[:1] == "(" and not CIRCULAR.search(text):
        text = text.replace("^\\circ", "")  # (3, 90^\circ)
    text, unit = without_unit(text.rstrip("% "), known, literal)
    if named := NAMED.fullmatch(text):
        of, value = (named[1], named[2]) if named[1] else (named[4], named[3])
        lone = re.fullmatch(VARIABLE, value.strip()) and value.strip() not in "ei" and "(" not in of  # x = y
        if not lone and not (literal and re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", value)):
            text, name = value.strip(), of.replace(" ", "")
    first, *others = text.split("\\pm")
    if len(others) > 3 or is_words(text):
        return None
    turns = product("+-", repeat=len(others))
    values = [read(first + "".join(map("".join, zip(turn, others, strict=True)))) for turn in turns]
    return None if None in values else (values, name, unit, percent)


def is_words(text: str) -> bool:
    """Are letters beside each other a word, not a product? Its letters would be multiplied, and TTH paid for HTT.

    >>> [is_words(text) for text in ("ab", "zxy", "2ab", "AB+CD", "TAG", "no", "htt", "x-axis", "x_{max}")]
    [False, False, False, False, True, True, True, True, False]
    """
    runs = re.findall(r"(?<![a-zA-Z\\])[a-zA-Z]{2,}", re.sub(r"_\{\w+\}|\\(?:begin|end)\{matrix\}", "", text))
    if any(len(run) > 3 for run in runs):
        return True
    alone = re.fullmatch(r"[+-]? ?([a-zA-Z]{2,3})", text)
    return alone is not None and not re.fullmatch(r"(?!.*(.).*\1)(?:[abcxyz]+|[bckmnpqrsvwxyz]+)", alone[1])


def as_range(text: str) -> tuple[str, str]:
    r"""The letter and its interval, where an inequality says that.

    >>> as_range("1 < x \\le 2"), as_range("5 > y"), as_range("1 < 2")
    (('x', '(1,2]'), ('y', '(-\\infty,5)'), ('', ''))
    """
    parts = [part.strip() for part in re.split(rf"(<|>|\\le{END}|\\ge{END})", text)]
    if parts[1:] and parts[1] in (">", "\\ge"):
        parts = [{">": "<", "\\ge": "\\le"}.get(part, part) for part in parts[::-1]]
    if len(parts) == 3:
        parts = ["-\\infty", "<", *parts] if re.fullmatch(VARIABLE, parts[0]) else [*parts, "<", "\\infty"]
    if len(parts) != 5 or not {parts[1], parts[3]} <= {"<", "\\le"} or not re.fullmatch(VARIABLE, parts[2]):
        return "", ""
    low, opens, name, closes, high = parts
    return name, f"{'(' if opens == '<' else '['}{low},{high}{')' if closes == '<' else ']'}"
