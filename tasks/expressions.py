r"""What a piece of LaTeX says, as a value: two pieces that say the same have equal values.

    read("\\sqrt{12}") == read("2\\sqrt{3}")      read("(1,2]") != read("(1,2)")      read("1/0") is None

A text is read once, from left to right, and computed while it is read: rationals exactly, other numbers to 50 digits,
expressions with letters at five fixed points. Nothing is simplified, searched or guessed, and what is not finite or has
more than BITS bits is no number. So the work is bounded by the length of the text, and no clock decides.
"""

from __future__ import annotations

import math
import operator
import random
import re
import threading
from collections.abc import Callable, Hashable
from fractions import Fraction
from functools import lru_cache

from mpmath import MPContext

BITS = 2**14  # of the longest number: 2^{10000} is one, 9^{9^9} is none
DEEPEST = 30  # brackets inside each other
LONGEST = 300  # characters; MATH's longest answer has 159
mp = MPContext()  # our own: nobody else changes its precision
mp.dps = 100  # of which 50 count
NOTHING = mp.mpf(10) ** -80  # what is left of a number where all but the last of its digits cancelled
LOCK = threading.Lock()

GREEK = (
    "alpha|beta|gamma|delta|Delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|"
    "psi|omega|Omega|ell"
)
VARIABLE = rf"(?:\\(?:{GREEK})(?![a-zA-Z])|[a-zA-Z])(?:_(?:\w|\{{\w+\}}))?'*"
NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+", flags=re.ASCII)
TOKEN = re.compile(
    rf"\s*({NUMBER.pattern}|{VARIABLE}|\\(?:begin|end)\{{matrix\}}|\\[a-zA-Z]+|\\.|[^\s\w]|_)\s*", flags=re.ASCII
)


class UnreadableError(ValueError):
    """The text says nothing that can be computed."""


@lru_cache(2**14)
def read(text: str) -> Hashable:
    r"""What the text says: a number, an expression, a list, a set, an interval, a matrix, a relation; None if nothing.

    >>> read("2/4"), read("0.5") == read("\\frac12"), read("(x+1)^2") == read("x^2+2x+1"), read("9^{9^9}")
    (Fraction(1, 2), True, True, None)
    >>> read("(1,2)") == read("(1,2]"), read("\\{1,2\\}") == read("\\{2,1\\}"), read("5 < y") == read("y > 5")
    (False, True, True)
    """
    try:
        with LOCK:
            return Reader(text).everything()
    except Exception:  # whatever a model wrote: what cannot be computed says nothing
        return None


# Numbers: Fractions as long as it goes, then mpmath's.


def each(function: Callable, *vectors: list) -> list:
    """The function at every point; None where an argument is."""
    if not all(isinstance(vector, list) for vector in vectors):
        raise UnreadableError("a list or infinity is no number")
    return [None if None in numbers else finite(function(*numbers)) for numbers in zip(*vectors, strict=True)]


def finite(number):
    """The number, without a real or imaginary part that is nothing beside the other. Raises if it is no finite one."""
    if isinstance(number, Fraction):
        fits = max(number.numerator.bit_length(), number.denominator.bit_length()) <= BITS
    else:
        if abs(mp.im(number)) <= NOTHING * abs(number):
            number = mp.re(number)
        elif abs(mp.re(number)) <= NOTHING * abs(number):
            number = mp.mpc(0, mp.im(number))
        fits = number == 0 or (mp.isfinite(number) and abs(mp.mag(number)) <= BITS)
    if not fits:
        raise UnreadableError("not finite, or too large or small")
    return number


def add(a, b):
    r"""a + b, which is 0 where the digits cancel: \sqrt{2}\sqrt{3} - \sqrt{6}.

    >>> add(mp.mpf(1) / 3, Fraction(-1, 3)), add(Fraction(1, 3), Fraction(1, 3))
    (Fraction(0, 1), Fraction(2, 3))
    """
    total = a + b
    cancelled = not isinstance(total, Fraction) and abs(total) <= NOTHING * abs(mp.convert(a))
    return Fraction(0) if cancelled else total


def divide(a, b):
    return a * (1 / b)


def power(base, exponent):
    """base ** exponent, exactly where it is rational. Its length is known before it is computed.

    >>> power(Fraction(8, 27), Fraction(-2, 3)), power(Fraction(-8), Fraction(1, 3)), power(Fraction(2), Fraction(10))
    (Fraction(9, 4), Fraction(-2, 1), Fraction(1024, 1))
    """
    if not base and mp.re(exponent) > 0:
        return Fraction(0)
    if not base:
        raise UnreadableError("0^0 or 1/0")
    if isinstance(exponent, Fraction) and exponent.denominator < 100:
        base = root(base, exponent.denominator)
        if isinstance(base, Fraction):
            if max(abs(base.numerator), base.denominator).bit_length() * abs(exponent.numerator) > BITS:
                raise UnreadableError("too large")
            return base**exponent.numerator
        exponent = exponent.numerator
    return exponential(mp.log(base) * exponent)


def root(number, degree: int):
    """Exactly where it is rational; of a negative number the real root, if the degree is odd.

    >>> root(Fraction(9, 4), 2), root(Fraction(-8), 3)
    (Fraction(3, 2), Fraction(-2, 1))
    """
    if degree == 1:
        return number
    if degree % 2 and not mp.im(number) and mp.re(number) < 0:
        return -root(-number, degree)
    if isinstance(number, Fraction) and number > 0:
        exact = Fraction(*(int(mp.nint(mp.root(n, degree))) for n in (number.numerator, number.denominator)))
        if exact**degree == number:
            return exact
    return mp.root(number, degree)


def exponential(number):
    if abs(number) > BITS:
        raise UnreadableError("too large")
    return mp.exp(number)


def factorial(number):
    if not isinstance(number, Fraction) or number.denominator != 1 or not 0 <= number <= 1500:
        raise UnreadableError("no factorial")
    return Fraction(math.factorial(int(number)))


def choose(n, k):
    return factorial(n) / factorial(k) / factorial(n - k)


def or_zero(number):
    """0 for what has 80 zeros behind the point: sin(pi), where pi has 100 digits.

    >>> or_zero(mp.sin(mp.pi)), or_zero(mp.mpf(1))
    (Fraction(0, 1), mpf('1.0'))
    """
    return Fraction(0) if abs(number) < NOTHING else number


FUNCTIONS = {
    "\\sin": lambda x: or_zero(mp.sin(x)), "\\tan": lambda x: or_zero(divide(mp.sin(x), or_zero(mp.cos(x)))),
    "\\cos": lambda x: or_zero(mp.cos(x)), "\\cot": lambda x: or_zero(divide(mp.cos(x), or_zero(mp.sin(x)))),
    "\\sec": lambda x: 1 / or_zero(mp.cos(x)), "\\csc": lambda x: 1 / or_zero(mp.sin(x)), "\\exp": exponential,
    "\\arcsin": mp.asin, "\\arccos": mp.acos, "\\arctan": mp.atan, "\\ln": mp.log,
    "\\log": lambda x, base=10: divide(mp.log(x), mp.log(base)),
}  # fmt: skip
CLOSES = {"(": ")]", "[": "])", "\\{": ["\\}"], "\\langle": ["\\rangle"]}
RELATIONS = {"=": "=", "<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}  # and turned round
OPERATIONS = {"*": operator.mul, "\\cdot": operator.mul, "\\times": operator.mul, "/": divide, "\\div": divide}
TWO = {"\\frac": divide, "\\binom": choose}
CONSTANTS = {"e": mp.exp(1), "i": mp.mpc(0, 1), "\\pi": +mp.pi}
OPENS = {*CLOSES, *TWO, *CONSTANTS, "{", "\\sqrt"}  # "|" would also close


class Reader:
    """Reads a text once. A number or an expression is the list of its values at the points; all else is a tuple."""

    def __init__(self, text: str):
        tokens = [*TOKEN.finditer(text)]
        if len(text) > LONGEST or sum(len(token[0]) for token in tokens) < len(text):
            raise UnreadableError(text)
        self.tokens, self.depth = [token[1] for token in reversed(tokens)], 0  # the next one stands last
        self.names = tuple(sorted({token for token in self.tokens if re.fullmatch(VARIABLE, token)} - {"e", "i"}))
        # Three points where all letters are positive, and two where they are negative.
        self.points = [{name: point(name, k) for name in self.names} for k in range(5 if self.names else 1)]

    def everything(self) -> Hashable:
        said = self.statement()
        if self.tokens:
            raise UnreadableError("more follows")
        return (self.names, said) if self.names else said

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *wanted: str) -> str:
        """The next token if it is one of those, else "" and it stays."""
        return self.tokens.pop() if self.peek() in wanted and self.tokens else ""

    def need(self, *wanted: str) -> str:
        if not (token := self.take(*wanted)):
            raise UnreadableError(f"expected {wanted}")
        return token

    # From the loosest to the tightest: relations, unions, ratios, sums, products, powers, atoms.

    def statement(self) -> Hashable:
        sides, relations = [self.union()], []
        while relation := self.take(*RELATIONS):
            relations.append(relation)
            sides.append(self.union())
        if relations[:1] in ([">"], ["\\ge"]):  # y > 5 is 5 < y
            sides, relations = sides[::-1], [RELATIONS[relation] for relation in relations[::-1]]
        if relations == ["="] and all(isinstance(side, list) for side in sides):
            # Two equations say the same if their differences do, up to a factor: y = 2x and 2x - y = 0.
            difference = each(lambda a, b: add(a, -b), *sides)
            if difference[0] and len(set(difference)) > 1:
                return "=", value_of(each(lambda a: divide(a, difference[0]), difference))
        parts = [value_of(side) for side in sides]
        return (*relations, *in_order(parts, relations[0] in "=\\ne")) if relations else parts[0]

    def joined(self, mark: str, part: Callable, any_order: bool) -> list | tuple:
        """Parts with a mark between them; a single one as it is."""
        parts = [part()]
        while self.take(mark):
            parts.append(part())
        return parts[0] if len(parts) == 1 else (mark, *in_order(map(value_of, parts), any_order))

    def union(self) -> list | tuple:
        return self.joined("\\cup", self.ratio, any_order=True)

    def ratio(self) -> list | tuple:
        return self.joined(":", self.sum, any_order=False)

    def sum(self) -> list | tuple:
        self.depth += 1
        if self.depth > DEEPEST:
            raise UnreadableError("too deep")
        total = self.signed(self.product)
        while self.peek() in ("+", "-"):
            total = each(add, total, self.signed(self.product))
        self.depth -= 1
        return total

    def signed(self, part: Callable) -> list | tuple:
        sign, value = self.take("+", "-"), part()
        if sign == "-":
            return ("-\\infty",) if value == ("\\infty",) else each(operator.neg, value)
        return value

    def product(self) -> list | tuple:
        product = self.factor()
        while self.peek() in OPERATIONS or self.starts_factor():
            operation = OPERATIONS.get(self.take(*OPERATIONS))
            factor = self.signed(self.factor) if operation else self.factor()
            product = each(operation or operator.mul, product, factor)
        return product

    def starts_factor(self) -> bool:
        """A number directly behind anything is no factor: 71 1 is not 71."""
        return self.peek() in OPENS or self.peek() in FUNCTIONS or self.peek() in self.names

    def factor(self) -> list | tuple:
        base = self.mixed(self.atom()) if NUMBER.match(self.peek()) else self.atom()
        while sign := self.take("^", "!"):
            if sign == "!":
                base = each(factorial, base)
                if self.peek() == "!":
                    raise UnreadableError("double factorial")
            elif self.take("\\circ"):
                base = each(lambda a: a * mp.pi / 180, base)
            else:
                base = self.raised(base, self.exponent())
        return base

    def exponent(self) -> list:
        return self.signed(self.atom)  # x^10 is typed for x^{10}

    def raised(self, base: list, exponent: list) -> list:
        whole = all(isinstance(a, Fraction) and a.denominator == 1 for a in exponent)
        return each(power, base if whole else self.where_positive(base), exponent)

    def where_positive(self, argument: list) -> list:
        """Roots and logarithms of letters are compared where the letters are positive: there the usual rules hold."""
        depends = isinstance(argument, list) and len(set(argument)) > 1
        return [*argument[:3], None, None] if depends else argument

    def group(self) -> list | tuple:
        r"""What stands in braces, or one digit or letter where there are none: \frac12."""
        if self.peek() != "{" and self.peek()[:1].isdigit():
            digit, rest = self.peek()[0], self.tokens.pop()[1:]
            self.tokens += [rest] * bool(rest)
            return self.constant(Fraction(digit))
        return self.atom()

    def constant(self, number) -> list:
        return [number] * len(self.points)

    def atom(self) -> list | tuple:
        token = self.tokens.pop() if self.tokens else ""
        if NUMBER.match(token):
            return self.constant(Fraction(token))
        if token in self.names:
            return [values[token] for values in self.points]
        if token in CONSTANTS:
            return self.constant(CONSTANTS[token])
        if token in CLOSES:
            return self.bracketed(token)
        if token in TWO:
            return each(TWO[token], self.group(), self.group())
        if token in FUNCTIONS:
            return self.function(token)
        match token:
            case "{":
                inside = self.sum()
                if over := self.take("\\over", "\\choose"):
                    inside = each(divide if over == "\\over" else choose, inside, self.sum())
                self.need("}")
                return inside
            case "|":
                inside = self.sum()
                self.need("|")
                return each(abs, inside)
            case "\\sqrt":
                degree = (
                    self.bracketed(self.take("["), alone=True) if self.peek() == "[" else self.constant(Fraction(2))
                )
                return self.raised(self.group(), each(lambda n: divide(Fraction(1), n), degree))
            case "\\infty":
                return (token,)
            case "\\emptyset":
                return "\\{", "\\}"
            case "\\begin{matrix}":
                return self.matrix()
        raise UnreadableError(token)

    def mixed(self, number: list) -> list:
        r"""The number, or with a fraction behind it their sum: 1\frac12. But 4\frac{3}{2} may be that or a product."""
        if self.peek() != "\\frac":
            return number
        fraction = self.atom()
        if not isinstance(fraction, list) or not isinstance(fraction[0], Fraction) or len(set(fraction)) > 1:
            return each(operator.mul, number, fraction)
        if number[0].denominator != 1 or not 0 < fraction[0] < 1:
            raise UnreadableError("neither a mixed number nor a product")
        return each(add, number, fraction)

    def function(self, name: str) -> list:
        base = [self.group()] if self.take("_") else []
        exponent = self.exponent() if self.take("^") else self.constant(Fraction(1))
        argument = self.factor()  # sin 2x is sin(2x), but sin x cos x and sin x (x + 1) are products
        while self.peek() in self.names or self.peek() in ("\\pi", "\\frac", "\\sqrt"):
            argument = each(operator.mul, argument, self.factor())
        if (base and name != "\\log") or -1 in exponent:
            raise UnreadableError("an index, or an inverse that may be a reciprocal")
        argument = self.where_positive(argument) if name in ("\\log", "\\ln") else argument
        return self.raised(each(FUNCTIONS[name], argument, *base), exponent)

    def bracketed(self, opening: str, alone: bool = False) -> list | tuple:
        """A bracket around one number or expression, or a tuple, an interval, a set."""
        items = []
        while items or self.peek() not in CLOSES[opening]:
            items.append(self.union())
            if not self.take(","):
                break
        closing = self.need(*CLOSES[opening])
        if len(items) == 1 and (alone or opening + closing == "()"):
            return items[0]
        return opening, *in_order(map(value_of, items), opening == "\\{"), closing

    def matrix(self) -> tuple:
        rows = [[]]
        while not self.take("\\end{matrix}"):
            rows[-1].append(value_of(self.sum()))
            if self.take("\\\\") and self.peek() != "\\end{matrix}":
                rows.append([])
            elif self.peek() != "\\end{matrix}":
                self.need("&")
        return "matrix", *map(tuple, rows)


def point(name: str, k: int):
    """The value of a letter at point k."""
    draw = random.Random(f"{name} {k}")
    return mp.mpf(draw.choice((41, 43, 47, 53, 59))) / draw.randrange(30, 64) * (1 if k < 3 else -1)


def in_order(values, sort: bool) -> list:
    return sorted(values, key=repr) if sort else list(values)


def value_of(side: list | tuple) -> Hashable:
    """A constant as a rational or its 50 digits, an expression as 50 digits at each point; what is no number as it is.

    >>> value_of([Fraction(1, 2)]), value_of([mp.mpf(1) / 3]), value_of([Fraction(1, 2), mp.mpf(2), None])
    (Fraction(1, 2), Fraction(1, 3), ('0.5', '2.0', None))
    """
    if isinstance(side, tuple):
        return side
    if len(side) == 1:
        return rounded(side[0])
    return tuple(None if number is None else mp.nstr(mp.convert(number), 50) for number in side)


def rounded(number) -> Hashable:
    """A rational exactly, also if it was reached through roots; another number to 50 digits."""
    if isinstance(number, Fraction):
        return number
    if mp.im(number):
        return rounded(mp.re(number)), rounded(mp.im(number))
    digits = mp.nstr(mp.re(number), 80)
    exact = Fraction(digits).limit_denominator(10**15)
    return exact if abs(exact - Fraction(digits)) <= abs(exact) / 10**60 else mp.nstr(mp.re(number), 50)
