"""Is a wrong answer ever paid? Three attacks on the gold answers of the parquet files in --data.

    python -m lab.attack grader            minutes
    python -m lab.attack grader --quick    every fiftieth gold answer, every twentieth key; seconds
    python -m lab.attack grader --table    writes results/grader.md too: where we and math-verify's default disagree

Spellings: wrong answers and right ones, made from each gold answer. A policy that is paid for "72 or more" learns to
hedge, so the gold answer itself stands in each wrong one.
One answer against all golds: thousands of keys, made from what the grammar can read. None may open two golds that are
not equal. (math-verify takes \\sqrt{\\infty}\\pi for almost any number.)
A busy machine: a thousand pairs, judged in a fresh process alone and beside eight that only count.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

from border import OptionParser
from tasks.data import load_problems
from tasks.grading import are_correct, readings

ROOT = Path(__file__).resolve().parents[2]
FILES = ("gsm8k_train", "gsm8k_test", "math500_test", "math_train")
BY_HAND = (
    "72", "5", "-3", "0.5", "1,250", "\\frac{3}{4}", "1\\frac{1}{2}", "10\\%", "90^\\circ", "2\\sqrt{3}", "4\\pi",
    "x^2+1", "(1,2)", "[1,2)", "\\{1,2\\}", "1,2", "(-\\infty,1)\\cup(2,\\infty)", "52_8", "2-3i", "y=2x+1", "x=5",
    "1:4", "B", "\\text{odd}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
)  # fmt: skip

# GOLD is the gold answer, NEW another number. Whatever the gold answer is, none of these is it ...
WRONG_OF_ANY = {
    "negated": ["\\neq GOLD", "\\text{not } GOLD", "\\lnot GOLD", "\\not= GOLD"],
    "hedged": [
        "\\approx GOLD", "\\sim GOLD", "\\text{about } GOLD", "GOLD\\text{ or more}", "\\text{at least } GOLD",
        "GOLD\\text{ or so}", "GOLD ?", "\\text{maybe } GOLD", "GOLD, \\text{ perhaps}", "GOLD give or take",
        "GOLD\\text{ give or take}", "GOLD\\text{ or thereabouts}",
    ],
    "related": [
        "\\le GOLD", "\\geq GOLD", "< GOLD", "> GOLD", "2x=GOLD", "ab=GOLD", "NEW = GOLD", "GOLD = NEW",
        "GOLD \\approx NEW", "x+1=GOLD", "GOLD < NEW",
    ],
    "listed": [
        "1, 2, \\ldots, GOLD", "GOLD, \\ldots", "GOLD \\ldots", "0, NEW, GOLD", "GOLD, GOLD", "GOLD; NEW",
        "\\dots, GOLD", "GOLD...", "GOLD ...", "GOLD..",
    ],
    "with a second": [
        "GOLD\\\\NEW", "NEW\\\\GOLD", "GOLD\\hspace{1cm}NEW", "NEW\\quad GOLD", "GOLD$ $NEW", "NEW$ $GOLD", "NEW GOLD",
        "GOLD \\text{ or } NEW", "NEW \\text{ or } GOLD", "GOLD or NEW", "NEW, GOLD", "GOLD, NEW", "GOLD NEW",
        "GOLD \\text{ and } NEW", "GOLD \\to NEW", "NEW \\to GOLD", "(GOLD)(NEW)", "GOLD \\text{ if } x = NEW",
    ],
    "hidden": [
        "\\phantom{GOLD}", "\\vphantom{GOLD}", "\\hphantom{GOLD} NEW", "\\cancel{GOLD}", "\\overline{GOLD}",
        "\\stackrel{GOLD}{NEW}",
    ],
    "changed": ["GOLD + c", "GOLD + NEW", "NEW - GOLD", "GOLD \\pm NEW", "|GOLD| + NEW", "GOLD½", "GOLD'", "GOLD_{99}"],
}  # fmt: skip
# Words behind a number that no unit has: another number, another size of it, or doubt.
SECOND = "dollars or seventy, dollars and seventy, dollars or none, thirty, forty, fifty, ninety, dollars twelve"
SIZE = (
    "tens, pair, couple, score, gross, grand, lakh, crore, doubled, tripled, reciprocal, repeating, recurring, "
    "excluded, K, M, doz, quarter, millionths, squared, square, cubed, kilo-, per mille"
)
DOUBT = (
    "hopefully, presumably, likely, estimated, rounded, ballpark, max, dollars min, tops, upwards, upper bound, "
    "lower limit, untrue, nope, undefined, I believe, est., dollars..., inverse, scratch that, (ignore this), wait, no"
)


def behind(words: str) -> list[str]:
    """Templates with each of the words behind the gold answer, bare and as \\\\text.

    >>> behind("nope, I guess")
    ['GOLD nope', 'GOLD\\\\text{ nope}', 'GOLD I guess', 'GOLD\\\\text{ I guess}']
    """
    return [template for some in words.split(", ") for template in (f"GOLD {some}", f"GOLD\\text{{ {some}}}")]


# ... and where it is a number, none of these.
WRONG_OF_A_NUMBER = {
    "of another kind": [
        "[GOLD]", "\\{GOLD\\}", "\\{GOLD,GOLD\\}", "(GOLD,GOLD)", "[GOLD,GOLD]", "(GOLD,\\infty)",
        "\\begin{pmatrix} GOLD \\end{pmatrix}", "(x,y)=GOLD",
    ],
    "in doubt": behind(DOUBT),
    "with a second in words": behind(SECOND),
    "in a base": ["GOLD_8", "GOLD_{16}", "GOLD\\text{ base }8", "GOLD_x"],
    "of another size": [
        "GOLD\\text{ dozen}", "GOLD thousand", "GOLD\\text{ million}", "GOLDx", "GOLD x", "GOLDab", "GOLD:NEW",
        "GOLD\\text{ and a half}", "GOLD/NEW", *behind(SIZE),
    ],
}  # fmt: skip
SPELLINGS = ["GOLD", "$GOLD$", "\\!GOLD", "GOLD ", "GOLD.", "Answer: GOLD"]
SPELLINGS_OF_AN_INTEGER = [
    "x = GOLD", "\\text{GOLD}", "GOLD\\text{ apples}", "GOLD apples", "GOLD\\text{ cm}", "GOLD cm", "\\$GOLD",
    "GOLD\\%", "GOLD^\\circ", "(GOLD)", "{GOLD}", "\\theta = GOLD", "GOLD\\text{ square feet}", "GOLD\\text{ cm}^2",
    "GOLD miles per hour", "GOLD\\mbox{ km/h}", "GOLD\\ \\text{USD}", "\\mathbf{GOLD}", "\\frac{GOLD}{1}",
    "GOLD dollars", "GOLD.0", "GOLD m", "GOLD g", "GOLD h", "GOLD s", "GOLD¢", "GOLD\\text{ \\$}", "a_1=GOLD",
    "\\angle A = GOLD^\\circ", "GOLD\\text{ one-dollar bills}",
]  # fmt: skip
# (answer, gold, who is right) where one may see it the one way or the other.
BORDERLINE = [
    ("60+12", "72", "matter of taste"), ("72,", "72", "matter of taste"),
    ("USD 72", "72", "ours right"), ("--72", "72", "matter of taste"), ("\\text{Total} = 72", "72", "ours right"),
    ("72:1", "72", "ours right"), ("1/4", "1:4", "matter of taste"),
    ("52", "52_8", "matter of taste"), ("1,2", "(1,2)", "ours right"), ("1.414214", "\\sqrt{2}", "ours right"),
    ("\\mathbb{R}", "(-\\infty,\\infty)", "ours right"), ("x=1, y=2", "(1,2)", "matter of taste"),
    ("A,B", "\\text{A, B}", "ours right"), ("\\{1,2,2\\}", "\\{1,2\\}", "matter of taste"),
]  # fmt: skip


def is_number(gold: str) -> bool:
    return isinstance(readings(gold)[0].value, Fraction) and not readings(gold)[0].name


def wrong_answers(gold: str) -> list[tuple[str, str, str]]:
    """(kind, template, answer) for every template.

    >>> [answer for kind, _, answer in wrong_answers("72") if kind == "in a base"]
    ['72_8', '72_{16}', '72\\\\text{ base }8', '72_x']
    """
    new = str(random.Random(gold).randrange(3, 99))
    if is_number(gold) and abs(readings(gold)[0].value) in (int(new), 2 * int(new)):
        new = str(int(new) + 101)
    kinds = WRONG_OF_ANY | (WRONG_OF_A_NUMBER if is_number(gold) else {})
    made = [(kind, template) for kind, templates in kinds.items() for template in templates]
    if is_number(gold) and readings(gold)[0].value == 0:  # 0 x is 0, and so is 0 dozen
        made = [(k, t) for k, t in made if k != "of another size" and t != "(GOLD)(NEW)"]
    return [(kind, template, fill(template, gold, new)) for kind, template in made]


def fill(template: str, gold: str, new: str = "") -> str:
    return template.replace("NEW", new).replace("GOLD", gold)


def right_spellings(gold: str) -> list[tuple[str, str, str]]:
    """(kind, template, answer): the gold answer as a model may well write it.

    >>> right_spellings("1250")[-1]
    ('right', 'with commas', '1,250')
    """
    integer = gold.strip("-").isdigit()
    made = [("right", template, fill(template, gold.removesuffix("."))) for template in SPELLINGS]
    made += [("right", template, fill(template, gold)) for template in SPELLINGS_OF_AN_INTEGER if integer]
    return made + ([("right", "with commas", f"{int(gold):,}")] if integer else [])


def gold_answers(folder: Path, every: int = 1) -> list[str]:
    """Those by hand and those of the files that are there; a few of MATH are whole solutions and left out."""
    golds = list(BY_HAND)
    for name in FILES:
        if (folder / f"{name}.parquet").is_file():
            golds += [problem.answer for problem in load_problems(str(folder / f"{name}.parquet"))][::every]
    return [gold for gold in golds if len(gold) < 150 and "$" not in gold.replace("\\$", "")]


def ours(rows: Sequence[tuple[str, str, str, str]]) -> list[bool]:
    return are_correct([f"\\boxed{{{answer}}}" for *_, answer, _ in rows], [gold for *_, gold in rows])


def by_default(pair: tuple[str, str]) -> bool:
    """math-verify's default verdict, in a process with limited memory; its own time-outs end what takes too long."""
    from math_verify import parse, verify

    answer, gold = (parse(f"${side}$") for side in pair)
    return verify(gold, answer)


def limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))


def theirs(rows: Sequence[tuple[str, str, str, str]]) -> list[bool]:
    with multiprocessing.Pool(initializer=limit_memory) as pool:
        return pool.map(by_default, [(answer, gold) for *_, answer, gold in rows], chunksize=16)


def table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Where the verdicts differ: one row for each template and direction, with its shortest example; a line counts the
    templates that are too rare for a row."""
    found: dict[tuple, list] = {}
    for row, we, they in zip(rows, ours(rows), theirs(rows), strict=True):
        if we != they:
            found.setdefault((*(row if row[0] == "borderline" else row[:2]), we), []).append(row)
    lines, left_out = [], []  # (of the rare ones: how many pairs, and the judgement)
    for (kind, template, *_, we), same in found.items():
        judgement = template if kind == "borderline" else "ours right" if we == (kind == "right") else "theirs right"
        if kind != "borderline" and len(same) < 5:
            left_out.append((len(same), judgement))
            continue
        answer, gold = min(((row[2], row[3]) for row in same), key=lambda pair: (len(pair[0] + pair[1]), pair))
        lines.append(
            f"| {kind} | `{code(answer)}` | `{code(gold)}` | {'yes' if we else 'no'} | {'no' if we else 'yes'} "
            f"| {len(same)} | {judgement} |"
        )
    head = (
        "# Where our grader and math-verify's default disagree\n\n`python -m lab.attack grader --table` made this, from"
        f" {len(rows):,} pairs of an answer and a gold answer.\nEach row stands for all pairs of its template, with the"
        " shortest as example. \"right\": a spelling that should be paid;\nthe other kinds should not be.\n\n"
        "| kind | answer | gold answer | ours pays | theirs pays | pairs | judgement |\n|---|---|---|---|---|---|---|\n"
    )  # fmt: skip
    rare = sum(count for count, judgement in left_out if judgement == "theirs right")
    foot = (
        f"Left out: {sum(count for count, _ in left_out)} pairs of {len(left_out)} kinds with fewer than 5 pairs each, "
        f"{rare} of them judged theirs right."
    )
    return head + "\n".join(sorted(lines)) + f"\n\n{foot}\n"


def code(text: str) -> str:
    """For a cell of a Markdown table."""
    return text.replace("|", "\\|").strip()


# ----------------------------------------------------------------------------------------------------
# One answer against all golds
# ----------------------------------------------------------------------------------------------------

KNOWN_KEYS = [
    "\\frac{\\pi\\sqrt{\\infty}}{3}", "\\sqrt{\\infty}\\pi", "\\frac{e\\sqrt{\\infty}}{\\pi}", "nan", "\\text{nan}",
    "\\text{undefined}", "*", ".", "?", "x", "\\emptyset", "\\{\\}", "()", "[]", "\\boxed{}", "\\text{any}", "\\ldots",
    "\\mathbb{R}", "(-\\infty,\\infty)", "\\begin{pmatrix}\\end{pmatrix}", "\\text{all of them}", "=", "x=x", "0=0",
]  # fmt: skip
ATOMS = [
    "\\infty", "-\\infty", "\\frac{0}{0}", "\\frac{1}{0}", "0", "1", "2", "\\pi", "e", "i", "x", "nan", "\\emptyset",
    "\\{\\}", "\\sqrt{2}", "0.5", "\\begin{pmatrix} 0 \\\\ 0 \\end{pmatrix}", "(0,0)", "10^{-99}", "10^{99}",
]  # fmt: skip
FORMS = [
    "A", "\\sqrt{A}B", "A^{B}", "\\frac{A}{B}", "A+B", "A-B", "A\\cdot B", "\\ln A", "\\log_{A} B", "\\sin A",
    "\\tan(A)B", "|A|B", "(A,B)", "[A,B)", "\\{A,B\\}", "\\begin{pmatrix} A & B \\end{pmatrix}", "A!", "\\binom{A}{B}",
    "A=B", "A \\le B", "\\pm A", "\\lfloor A \\rfloor", "A \\text{ or } B", "A \\cup B", "x=A", "A_{B}", "A:B",
    "\\frac{B\\sqrt{A}}{3}", "\\sqrt[A]{B}", "\\arcsin A", "0^{A}", "A-A+B", "\\frac{A}{A}B",
]  # fmt: skip


def keys(every: int = 1) -> list[str]:
    """Answers made from everything that the grammar reads: those known, and each form of each two atoms, drawn."""
    made = [form.replace("A", "\a").replace("B", b).replace("\a", a) for form, a, b in product(FORMS, ATOMS, ATOMS)]
    return KNOWN_KEYS + random.Random(0).sample(list(dict.fromkeys(made)), 4000)[::every]


def opened(key: str, golds: Sequence[str]) -> list[str]:
    r"""Golds that the key is paid for, none of them paid for another one: more than one is a hole.

    >>> opened("\\frac{4}{2}", ["2", "2.0", "x=2", "3"])
    ['2']
    """
    found = []
    for gold, yes in zip(golds, are_correct([f"\\boxed{{{key}}}"] * len(golds), golds), strict=True):
        pairs = [(gold, other) for other in found] + [(other, gold) for other in found]
        if yes and not any(are_correct([f"\\boxed{{{answer}}}" for answer, _ in pairs], [to for _, to in pairs])):
            found.append(gold)
    return found


# ----------------------------------------------------------------------------------------------------
# A busy machine
# ----------------------------------------------------------------------------------------------------

GRADE = "import json, sys\nfrom tasks.grading import are_correct\nprint(json.dumps(are_correct(*json.load(sys.stdin))))"


def afresh(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """The verdicts of a process that starts with nothing read."""
    texts, golds = [f"\\boxed{{{answer}}}" for answer, _ in pairs], [gold for _, gold in pairs]
    work = [sys.executable, "-c", GRADE]
    done = subprocess.run(work, input=json.dumps([texts, golds]), capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def differing(pairs: Sequence[tuple[str, str]], busy: int = 8) -> list[tuple[str, str]]:
    """The pairs whose verdict is another one while so many processes count."""
    alone = afresh(pairs)
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        return [pair for pair, one, two in zip(pairs, alone, afresh(pairs), strict=True) if one != two]
    finally:
        for process in counting:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OptionParser(prog="python -m lab.attack grader", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every fiftieth gold answer, every twentieth key")
    parser.add_argument("--table", action="store_true", help="write results/grader.md")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the parquet files' folder")
    parser.add_argument("--show", type=int, default=10, help="so many mistakes of either kind are printed")
    given = parser.parse_args(arguments)
    begin, golds = time.monotonic(), gold_answers(given.data, 50 if given.quick else 1)
    distinct, draw = list(dict.fromkeys(golds)), random.Random(0)
    wrong, right = [], []
    for gold in distinct:  # all wrong answers of those by hand, and of a quarter drawn anew for each of the others
        made = wrong_answers(gold)
        made = made if gold in BY_HAND else draw.sample(made, len(made) // 4)
        wrong += [(*row, gold) for row in made]
        right += [(*row, gold) for row in right_spellings(gold)]
    paid = [row for row, yes in zip(wrong, ours(wrong), strict=True) if yes]
    unpaid = [row for row, yes in zip(right, ours(right), strict=True) if not yes]
    for mistake, rows in (("wrong, and paid", paid), ("right, and not paid", unpaid)):
        for _, _, answer, gold in rows[: given.show]:
            print(f"{mistake}: {answer}  for  {gold}")
    print(
        f"grader: {len(golds):,} golds ({len(distinct):,} different), {len(paid):,} of {len(wrong):,} wrong answers "
        f"paid, {len(right) - len(unpaid):,} of {len(right):,} right spellings paid, {time.monotonic() - begin:.0f} s"
    )
    begin, tried = time.monotonic(), keys(20 if given.quick else 1)
    found = {key: some for key in tried if len(some := opened(key, distinct)) > 1}
    for key, some in list(found.items())[: given.show]:
        print(f"a key: {key}  for  {'  and  '.join(some)}")
    print(
        f"one answer against all golds: {len(found)} of {len(tried):,} answers open two of {len(distinct):,} golds "
        f"that are not equal, {time.monotonic() - begin:.0f} s"
    )
    begin = time.monotonic()
    some = [(answer, gold) for *_, answer, gold in draw.sample(right + wrong, min(len(right + wrong), 1000))]
    flipped = differing(some)
    print(
        f"a busy machine: {len(flipped)} of {len(some):,} verdicts differ beside eight counting processes, "
        f"{time.monotonic() - begin:.0f} s"
    )
    if given.table:
        neighbours = [("wrong", "another gold", *two) for two in pairwise(distinct) if not all(map(is_number, two))]
        some = draw.sample(wrong, min(1500, len(wrong))) + draw.sample(right, min(1500, len(right)))
        rows = [("borderline", who, answer, gold) for answer, gold, who in BORDERLINE] + some + neighbours[:500]
        (ROOT / "results" / "grader.md").write_text(table(rows), encoding="utf-8")
    return 1 if paid or unpaid or found or flipped else 0
