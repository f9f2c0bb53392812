r"""What may stand beside a number: units, currency signs, and what questions count.

A list of words that are no units is never complete: a policy finds "72 or so", "72 doz" and "72 (ignore this)". So
these are lists of words that are. Whatever else stands behind a number makes it another answer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Measures are told apart from each other; on a line the first name stands for the others.
MEASURES = {name: line.split()[0] for line in r"""
mm millimeter millimetre;cm centimeter centimetre;dm decimeter;m meter metre;km kilometer kilometre;in inch;ft foot feet
yd yard;mi mile;mg milligram;g gram gm;kg kilogram kilo;oz ounce;lb pound;ton tonne;ml mL milliliter millilitre
L liter litre;gal gallon;qt quart;pt pint;cup;tbsp tablespoon;tsp teaspoon;s sec second;min minute;h hr hour;day;week
month;yr year;rpm;$ \$ dollar USD buck;¢ cent penny pennies;€ euro EUR;£;rupee Rs;^\circ degree;rad radian
C Celsius;F Fahrenheit;acre;hectare;calorie kcal;joule;watt;volt;newton;unit;am a.m;pm p.m
""".strip().replace("\n", ";").split(";") for name in line.split()}  # fmt: skip
# What questions count, in the singular, and what may stand beside it.
COUNTED = set("""
acorn adult angle animal ant apartment apple arrangement award baby bag ball balloon banana bar barrel basket batch
battery bead bean bed bedroom bee bench berry bicycle bike bill bird blanket block blueberry board boat book bottle bowl
box boy bracelet branch bread brick brother bucket building bulb bunch bundle burger bus button cage cake can candle
candy car card carrot carton case cat cell chair chapter cherry chicken child children chip chocolate choice circle
class classmate classroom clip coin color colour column combination committee computer container cookie corner cost
couch cow crab crate crayon cream cupcake customer dap daughter desk diagonal diamond dice die digit dime dish divisor
dog doll donut door dose drawer dress drink driver drop duck edge egg element elephant email employee envelope episode
eraser event face factor family farm fee fence field fish flag floor flower fork friend frog fruit gallery game garden
gift girl glass goal goat grade grandchildren grape group guest guitar hair handshake hat horse house inning insect
integer item jacket jar jelly jellybean job journal juice key kid kite kitten lamp lap leaf leaves leg lego lemon lesson
letter light lime line lion loaf loaves lollipop machine magazine man mango marble mark marker match meal medal member
men message mice monkey morning mouse movie muffin nail necklace neighbor nest newspaper nickel night note
notebook number nut object onion orange order outcome outfit page paint painting pancake pant paper paragraph parent
part participant passenger path patient pattern peach pear pearl pebble pen pencil people permutation person phone photo
picture pie piece pig pill pillow pizza plane plant plate player plum point pole polygon possibility poster potato
present prime problem profit project pumpkin pupil puppy push-up pushup puzzle question rabbit ribbon ring river rock
roll room rope rose row sale salesman sandwich seashell seat seed sentence serving set sheep sheet shelf shell shelves
ship shirt shoe shot shovel show sibling side sister situp skirt slice slot snack snake sock soda solution son song
spider spoon stair stamp star step stick sticker stone store story strawberry street student subset sweater table tablet
task teacher team teeth tent test text ticket tie tile time tip tire toilet token tomato tooth towel tower toy train
tray tree triangle trip trophy truck tub tulip turn turtle uniform value van vase vegetable vehicle vertex vertices
video visit visitor vote wall watch watermelon way wheel win window wing woman women word worker
""".split())  # fmt: skip
BESIDE = set("""
of the a an each every per more fewer extra full whole different distinct possible red blue green yellow white black
purple pink brown gold silver big small large new used fresh hot ice baseball tennis stuffed plastic wooden working
right
""".split())  # fmt: skip
BEHIND = set("total altogether left remaining old long tall wide high away apart each".split())  # alone too
SCALES = set("thousand million billion trillion hundred dozen half halves third quarter tenth pair score".split())
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
UNIT_TOKEN = re.compile(r" *(?:(\\?[$€£¢]|\^\\circ|[ap]\.m|[a-zA-Z]+(?:-up)?)|\^ ?\{?([23])\}?|([/()-]|\\cdot))")
COMPOUND = re.compile(r"(?<= )(?:one|two|five|ten|twenty|fifty|hundred)-(?=[a-z]+ [a-z])")  # one-dollar bills
CURRENCY = re.compile(r"^([^=]*= ?|)([+-]?) ?(?:US)?(\\?\$|€|£|USD|Rs\.?) ?(?=[-\d.(\\])(?!\\?[$€£])")
CIRCULAR = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")  # whose degrees are no unit


class Unit(NamedTuple):
    """What stands behind a number: measures with their powers, and other words in the singular."""

    measures: tuple[tuple[str, int], ...] = ()
    words: frozenset[str] = frozenset()

    def agrees(self, other: Unit) -> bool:
        """A missing unit agrees with any; centimeters not with millimeters, areas or hours, nor apples with books.

        >>> unit_of(" cm^2").agrees(unit_of(" square centimeters")), unit_of(" cm").agrees(unit_of(" hours"))
        (True, False)
        """
        if not any(self) or not any(other):
            return True
        if "unit" in dict(self.measures + other.measures):  # square units are square meters, but no cubic ones
            return [power for _, power in self.measures] == [power for _, power in other.measures]
        return self.measures == other.measures and bool(self.measures or self.words & other.words)


def unit_of(text: str, known: frozenset[str] | None = frozenset()) -> Unit | None:
    """The unit that the text is; None if it is none. `known` are further good words; None: all of four letters are.

    >>> unit_of(" miles per hour"), unit_of(" red apples").words, unit_of(" or more"), unit_of(" squared")
    (Unit(measures=(('mi', 1), ('h', -1)), words=frozenset()), frozenset({'apple'}), None, None)
    """
    text = re.sub(r"\bin (?=total|all|the|each)|(?<=\bsq)\.|(?<=\bcu)\.", "", COMPOUND.sub("", text))
    text = re.sub(r"\bmph\b", "mi/h", re.sub(r"\bk(?:m|p)h\b", "km/h", text))
    measures, words, alone, power, per, joined, end = [], set(), True, 1, 1, True, 0
    for token in UNIT_TOKEN.finditer(text):
        if token.start() != end:
            return None
        end = token.end()
        word, exponent, mark = token.groups()
        one = word if word in MEASURES else singular(word or "")
        if exponent and measures:
            measures[-1] = measures[-1][0], measures[-1][1] * int(exponent)
        elif mark or word in ("per", "a", "an", "each", "every"):
            joined, per = True, -1 if mark in (None, "/") and measures else 1
        elif word in POWERS:
            power = POWERS[word]
        elif one in MEASURES and (measures[-1:] == [("^\\circ", 1)] if MEASURES[one] in ("C", "F") else joined):
            measures.append((MEASURES[one], per * power))  # joined: no dollars min
            power, joined = 1, False
        elif one and one not in MEASURES and (one in COUNTED or one in (known or ())):
            words.add(one)
        elif word in BESIDE | BEHIND:
            alone = alone and word in BEHIND
        elif one and known is None and re.fullmatch("[a-z]{4,}", word) and one not in SCALES | MEASURES.keys():
            words.add(one)
        else:
            return None
    whole = end == len(text) and text.count("(") == text.count(")") and not text.endswith(("-", "/"))
    says = whole and power == 1 and (measures or words or alone)
    return Unit(tuple(measures), frozenset(words)) if says else None


def singular(word: str) -> str:
    """
    >>> singular("apples"), singular("Boxes"), singular("berries"), singular("glass")
    ('apple', 'box', 'berry', 'glass')
    """
    word = word.lower()
    forms = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word))
    return next((form for form in forms if form in COUNTED or form in MEASURES), word)


def without_unit(text: str, known: frozenset[str] | None, literal: bool) -> tuple[str, Unit]:
    r"""The text before a unit, behind a currency sign; and the unit.

    >>> without_unit("90^\\circ", frozenset(), False)[0], without_unit("$5 per hour", frozenset(), False)[0]
    ('90', '5')
    >>> [without_unit(text, frozenset(), False)[0] for text in ("72 or more", "72x", "72 ab", "72 m")]
    ['72 or more', '72x', '72 ab', '72']
    """
    paid = Unit()
    if before := CURRENCY.match(text):
        paid = Unit(((MEASURES[before[3].strip(".")], 1),))
        text = before[1] + before[2] + text[before.end() :]
    for begin in re.finditer(r" *(?:(?<![a-zA-Z\\{_^(])[a-zA-Z]+|\\?[$€£¢]|\^\\circ)", text):
        word, number = begin[0], text[: begin.start()]
        one = re.fullmatch(r" *[a-zA-Z]", word)
        if not number or (one and (literal or word[0] != " " or word[-1] not in "mghsL")):
            continue
        if "circ" in word and (CIRCULAR.search(number) or "circ" in number):
            continue
        if (unit := unit_of(text[begin.start() :], known)) is not None:
            return number, Unit(tuple(dict.fromkeys(paid.measures + unit.measures)), unit.words)
    return text, paid
