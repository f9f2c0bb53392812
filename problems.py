"""Questions, and how their answers are checked.

A problem is a question in words and an answer. Training and evaluation load and grade them through this module.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

# ----------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------

# What the paper appends to every question.
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Problem:
    """A question as the model reads it (without chat template and suffix) and the answer that counts as right."""

    question: str
    answer: str


class UserError(ValueError):
    """A mistake of the user's: the message says what was given, what was expected and what to do, on one line."""


class OptionParser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line, not the whole usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


def status_of(command: Callable[[], None]) -> int:
    """Run a command: 0, or 2 and one line for a user's mistake or a file that cannot be written."""
    try:
        command()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except OSError as reason:
        print(f"error: {reason.filename}: {reason.strerror}; expected a folder that can be written", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Source:
    """Where a data set lies on the hub. Its columns are found by `read_row`."""

    hub_id: str
    configuration: str | None = None
    test: str = "test"  # the split to evaluate on
    file: str | None = None  # its data, where it is one file at an address and no hub data set


PERTURB = "https://raw.githubusercontent.com/Kaffaljidhmah2/MATH-Perturb/main/math_perturb/math_perturb_{}.jsonl"

# The paper's benchmarks, and MATH to train on. All are graded by `are_correct`: numbers exactly (TheoremQA's decimals
# too, where its authors allow some tolerance), letters exactly, the rest as expressions.
BENCHMARKS = {
    "gsm8k": Source("openai/gsm8k", "main"),
    "gsm_symbolic": Source("apple/GSM-Symbolic", "main"),
    "gsm_p1": Source("apple/GSM-Symbolic", "p1"),
    "gsm_p2": Source("apple/GSM-Symbolic", "p2"),
    "math": Source("DigitalLearningGmbH/MATH-lighteval", "default"),
    "math500": Source("HuggingFaceH4/MATH-500"),
    "math_perturb_simple": Source("json", test="train", file=PERTURB.format("simple")),
    "math_perturb_hard": Source("json", test="train", file=PERTURB.format("hard")),
    "amc23": Source("math-ai/amc23"),
    "aime24": Source("HuggingFaceH4/aime_2024", test="train"),
    "aime25": Source("math-ai/aime25"),
    "theoremqa": Source("TIGER-Lab/TheoremQA"),
    "mmlu": Source("cais/mmlu", "all"),
    "truthfulqa": Source("truthfulqa/truthful_qa", "multiple_choice", test="validation"),
    "commonsenseqa": Source("tau/commonsense_qa", test="validation"),
}
TRAINING_SETS = ("gsm8k", "math")  # those with a split "train" that is meant for it


def load_problems(source: str, split: str = "test") -> list[Problem]:
    """Problems of a data set by name (one of BENCHMARKS) or of a local .parquet or .jsonl file.

    split: "train" or "test" (a local file is taken whole). Rows may have any of the columns that `read_row` knows.
    Raises UserError.
    """
    if source in BENCHMARKS:
        rows = load_from_hub(source, split)
    elif Path(source).suffix in (".parquet", ".jsonl"):
        rows = load_file(Path(source))
    else:
        raise UserError(
            f"data is {source!r}; expected {', '.join(BENCHMARKS)}, or the path of a .parquet or .jsonl file"
        )
    problems = [read_row(row, f"{source}, row {i + 1}") for i, row in enumerate(rows) if not row_has_picture(row)]
    if not problems:
        raise UserError(f"{source} holds no rows; expected at least one problem")
    return problems


def load_from_hub(name: str, split: str) -> list[dict]:
    """The rows of a data set on the Hugging Face hub, through its local cache."""
    from datasets import load_dataset

    source = BENCHMARKS[name]
    files = {} if source.file is None else {"data_files": source.file}
    try:
        return list(
            load_dataset(source.hub_id, source.configuration, split=source.test if split == "test" else split, **files)
        )
    except Exception as reason:  # no network, no such split, a damaged cache: the library has no common class for them
        first_line = (str(reason).splitlines() or [""])[0]
        raise UserError(
            f"{name} ({source.file or source.hub_id}, {split}) could not be loaded: {type(reason).__name__}: "
            f"{first_line}. Connect to the network once, or give a local .parquet or .jsonl file"
        ) from reason


def load_file(path: Path) -> list[dict]:
    """The rows of a local file."""
    if not path.is_file():
        raise UserError(f"{path} is no file; expected a .parquet or .jsonl file")
    if path.suffix == ".parquet":
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we say ourselves what is wrong with a file
        try:
            # In memory: a cache on disk would outlive the file that it was made from.
            return list(datasets.Dataset.from_parquet(str(path), keep_in_memory=True))
        except Exception as reason:  # pyarrow and datasets raise a dozen classes for a damaged file
            raise UserError(f"{path} is not a readable parquet file: {str(reason).splitlines()[0]}") from reason
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):  # noqa: B007
            if line.strip():
                rows.append(json.loads(line))
    except json.JSONDecodeError as reason:
        raise UserError(f"{path}, line {number} is not JSON ({reason.msg}); expected an object per line") from reason
    except UnicodeDecodeError as reason:
        raise UserError(f"{path} is not UTF-8 text; expected a JSON object per line") from reason
    return rows


def row_has_picture(row) -> bool:
    """TheoremQA has some questions about a picture, which a language model cannot see: they are left out."""
    return isinstance(row, dict) and row.get("Picture") is not None


def read_row(row: dict, where: str) -> Problem:
    """One row in any of the formats in use. Raises UserError that names the row.

    verl's (`prompt` messages, `reward_model.ground_truth`), GSM8K's (`question`, `answer`), MATH's (`problem`,
    `solution` and perhaps `answer`), TheoremQA's (`Question`, `Answer`), or multiple choice: MMLU's (`choices`,
    `answer` by number), CommonsenseQA's (`choices` with labels, `answerKey`), TruthfulQA's (`mc1_targets`).
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, not {type(row).__name__}")
    try:
        if "prompt" in row and "reward_model" in row:
            question, gold = row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]
        elif "mc1_targets" in row:
            question, gold = with_choices(row["question"], *shuffled(row["mc1_targets"], row["question"]))
        elif "choices" in row and "answerKey" in row:
            right = list(row["choices"]["label"]).index(row["answerKey"])
            question, gold = with_choices(row["question"], row["choices"]["text"], right)
        elif "choices" in row:
            question, gold = with_choices(row["question"], row["choices"], row["answer"])
        elif "question" in row:
            question, gold = row["question"], row.get("answer")
        elif "problem" in row:
            question, gold = row["problem"], row.get("answer") or row.get("solution")
        elif "Question" in row:
            question, gold = row["Question"], row.get("Answer")
        else:
            raise UserError(
                f"{where}: columns are {', '.join(map(str, row))}; expected prompt and reward_model, "
                "question and answer, or problem and solution"
            )
    except (KeyError, IndexError, TypeError, ValueError) as reason:
        if isinstance(reason, UserError):
            raise
        raise UserError(f"{where}: its columns do not fit together ({type(reason).__name__}: {reason})") from reason
    if not question or gold in (None, ""):
        raise UserError(f"{where}: question or answer is empty; expected both")
    question = str(question).removesuffix(SUFFIX).rstrip()  # verl's files bring the suffix along
    return Problem(question, extract_answer(str(gold)) or str(gold).strip())


def with_choices(question: str, choices: Sequence[str], right: int) -> tuple[str, str]:
    """A multiple-choice question in words, and the letter of the right choice.

    >>> with_choices("How many?", ["one", "two"], 1)
    ('How many?\\nA. one\\nB. two\\nThe final answer is a letter.', 'B')
    """
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *options, "The final answer is a letter."]), LETTERS[: len(options)][right]


def shuffled(targets: dict, question: str) -> tuple[list[str], int]:
    """TruthfulQA's choices, whose first is always the right one, in an order that follows from the question."""
    order = list(range(len(targets["choices"])))
    random.Random(question).shuffle(order)
    return [targets["choices"][i] for i in order], [targets["labels"][i] for i in order].index(1)


def prompt_ids(tokenizer, question: str, suffix: str = SUFFIX) -> list[int]:
    """The token ids of a prompt: question and suffix, in the tokenizer's chat template where it has one."""
    text = f"{question}\n{suffix}" if suffix else question
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them already
    ids = tokenizer(text + "\n" if suffix else text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # the answer is still to come


# ----------------------------------------------------------------------------------------------------
# Grading. An answer is hostile text: whatever a model wrote. Every verdict takes bounded time and memory, nothing
# here raises for a text, and what cannot be decided is wrong.
# ----------------------------------------------------------------------------------------------------


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


def compare(answer: str, gold: str) -> bool | None:
    """True or False where equality of strings, letters or numbers decides; None where math-verify has to.

    >>> compare("\\\\text{(B)}", "B"), compare("B or C", "B"), compare("10\\\\%", "0.1"), compare("x + 1", "1 + x")
    (True, False, True, None)
    """
    if answer == gold:
        return True
    answer, gold = plain(answer), plain(gold)
    if ("=" in answer) != ("=" in gold):  # "x = 5" beside "5"
        answer, gold = (re.sub(r"^[a-zA-Z]\s*=\s*(?=[^=]*$)", "", side) for side in (answer, gold))
    if len(answer) > LONGEST or len(gold) > LONGEST or not answer.isprintable():
        return False
    if answer == gold:
        return True
    if re.fullmatch("[A-Z]", gold):
        return answer.strip("().: ") == gold
    number, gold_number = as_number(answer), as_number(gold)
    if number is not None and gold_number is not None:
        return same_number(*number, *gold_number)
    return None


def plain(text: str) -> str:
    """Without what only decorates an answer: $...$, \\text{}, \\left, spacing, a closing period.

    >>> plain("$\\\\text{(B)}.$"), plain("\\\\dfrac12\\\\!")
    ('(B)', '\\\\frac12')
    """
    text = re.sub(r"[ \t\r\n]+", " ", text.strip())
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "$").replace("\\%", "%")
    text = text.lstrip("$ ").rstrip("$ .")
    wrapped = re.fullmatch(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", text)
    return (wrapped[1] if wrapped else text).strip()


def as_number(text: str) -> tuple[Fraction, bool] | None:
    """An integer, decimal or fraction, exactly, and whether it is a percentage; else None.

    Read are thousands' commas, a currency sign, a/b, \\frac{a}{b}, \\frac12 and a closing percent sign.

    >>> as_number("$1,250.50"), as_number("-\\\\frac{3}{4}"), as_number("10%"), as_number("x + 1")
    ((Fraction(2501, 2), False), (Fraction(-3, 4), False), (Fraction(10, 1), True), None)
    """
    text = re.sub(r"^([+-]?)\s*[$€£]\s*", r"\1", text.replace("{,}", ",")).rstrip("$€£ ")
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


class Referee:
    """Compares expressions by math-verify, safely: in processes that the kernel ends.

    math-verify can take seconds and gigabytes over nine characters, and its own time-out works in the main thread
    only. So a server process (this file, run as a script) imports it once and compares the pairs in children that it
    forks. An alarm ends a child SECONDS after it began with a pair, and it cannot allocate more than BYTES: the pair
    over which it ended is wrong.
    """

    SECONDS = 0.7
    BYTES = 2**31

    def __init__(self):
        self.lock = threading.Lock()
        self.server: subprocess.Popen | None = None

    def start(self) -> None:
        """Run the server, unless it runs. Raises RuntimeError if it cannot be, for without it all would be wrong."""
        if self.server is not None and self.server.poll() is None:
            return
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        if self.server.stdout.readline() != "ready\n":  # after a second or so: it imports math-verify
            raise RuntimeError("math-verify cannot be imported (the reason stands above); install requirements.txt")

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (answer, gold): are they equal?"""
        if not pairs:
            return []
        with self.lock:
            self.start()
            try:
                self.server.stdin.write(json.dumps(pairs) + "\n")
                self.server.stdin.flush()
                return json.loads(self.server.stdout.readline())
            except (OSError, ValueError):  # the server itself was killed; the next call starts another
                self.server.kill()
                warnings.warn(f"the grading process ended; {len(pairs)} answers count as wrong", stacklevel=2)
                return [False] * len(pairs)

    def stop(self) -> None:
        if self.server is not None:
            self.server.kill()


referee = Referee()
atexit.register(referee.stop)


def serve() -> None:
    """The server: reads a line of pairs, writes a line of verdicts, until its input ends."""
    import gc
    import logging

    logging.disable()  # math-verify warns that its time-outs are off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for gold, answer in (("\\frac{x+1}{2}", "\\frac{x}{2}"), ("[1,2)", "(1,2)"), ("\\{1,\\sqrt{2}\\}", "x=3,y=\\pi")):
        expressions_equal(answer, gold)  # imports and caches that every child then has ready
    gc.freeze()  # or every child's garbage collection would copy the memory that it shares
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(judge(json.loads(line))), flush=True)


def judge(pairs: Sequence[Sequence[str]]) -> list[bool]:
    """The verdict on each pair, from as many children at a time as there are cores, each with 32 pairs at most."""
    verdicts = [False] * len(pairs)
    waiting = [(first, min(first + 32, len(pairs))) for first in range(0, len(pairs), 32)]
    working: dict[int, tuple[int, int, int]] = {}  # process: its pipe, and from which to which pair
    while waiting or working:
        while waiting and len(working) < (os.cpu_count() or 1):
            first, end = waiting.pop()
            pipe, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                compare_or_die(pairs[first:end], write)
            os.close(write)
            working[pid] = pipe, first, end
        pid, _ = os.wait()
        pipe, first, end = working.pop(pid)
        said = os.read(pipe, 32)
        os.close(pipe)
        for i, verdict in enumerate(said, first):
            verdicts[i] = verdict == ord("1")
        if first + len(said) < end:  # it died over the next pair, which is wrong; another goes on behind it
            waiting.append((first + len(said) + 1, end))
    return verdicts


def compare_or_die(pairs: Sequence[Sequence[str]], pipe: int) -> None:
    """In a child: write "1" or "0" for each pair. A pair that takes too long or too much memory ends the process."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (Referee.BYTES, Referee.BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        for answer, gold in pairs:
            signal.setitimer(signal.ITIMER_REAL, Referee.SECONDS)
            equal = False
            with suppress(Exception):  # what it cannot read is not right
                equal = expressions_equal(answer, gold)
            os.write(pipe, b"1" if equal else b"0")
    finally:
        os._exit(0)


def expressions_equal(answer: str, gold: str) -> bool:
    """Are two LaTeX expressions equal for math-verify? May take any time and raise anything."""
    from math_verify import parse, verify

    # None: no time-outs of its own, which would put another alarm in place of ours.
    sides = [parse(f"${side}$", parsing_timeout=None) for side in (gold, answer)]
    return verify(*sides, timeout_seconds=None)


if __name__ == "__main__":
    serve()
