"""Questions, and how their answers are checked.

A problem is a question in words and an answer. Training and evaluation load and grade them through this module.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

# What the paper appends to every question.
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."

# name -> (hub id, configuration); columns are found as in a local file.
HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default"),
}


@dataclass(frozen=True)
class Problem:
    """A question as the model reads it (without chat template and suffix) and the answer that counts as right."""

    question: str
    answer: str


class UserError(ValueError):
    """A mistake of the user's: the message says what was given, what was expected and what to do, on one line."""


def load_problems(source: str, split: str = "train") -> list[Problem]:
    """Problems of a data set by name ("gsm8k", "math") or of a local .parquet or .jsonl file.

    Rows are in one of the formats in use: verl's (`prompt` messages, `reward_model.ground_truth`), GSM8K's
    (`question`, `answer`) or MATH's (`problem`, `solution` and perhaps `answer`). Raises UserError.
    """
    if source in HUB:
        rows = load_from_hub(source, split)
    elif Path(source).suffix in (".parquet", ".jsonl"):
        rows = load_file(Path(source))
    else:
        raise UserError(f"data is {source!r}; expected {', '.join(HUB)}, or the path of a .parquet or .jsonl file")
    problems = [read_row(row, f"{source}, row {i + 1}") for i, row in enumerate(rows)]
    if not problems:
        raise UserError(f"{source} holds no rows; expected at least one problem")
    return problems


def load_from_hub(name: str, split: str) -> list[dict]:
    """The rows of a data set on the Hugging Face hub, through its local cache."""
    from datasets import load_dataset

    hub_id, configuration = HUB[name]
    try:
        return list(load_dataset(hub_id, configuration, split=split))
    except Exception as reason:  # no network, no such split, a damaged cache: the library has no common class for them
        first_line = (str(reason).splitlines() or [""])[0]
        raise UserError(
            f"{name} ({hub_id}, split {split}) could not be loaded: {type(reason).__name__}: {first_line}. "
            "Connect to the network once, or give a local .parquet or .jsonl file"
        ) from reason


def load_file(path: Path) -> list[dict]:
    """The rows of a local file."""
    if not path.is_file():
        raise UserError(f"{path} is no file; expected a .parquet or .jsonl file")
    if path.suffix == ".parquet":
        from datasets import Dataset

        try:
            # In memory: a cache on disk would outlive the file that it was made from.
            return list(Dataset.from_parquet(str(path), keep_in_memory=True))
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


def read_row(row: dict, where: str) -> Problem:
    """One row in any of the known formats. Raises UserError that names the row."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, not {type(row).__name__}")
    if "prompt" in row and "reward_model" in row:
        question, gold = row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]
    elif "question" in row:
        question, gold = row["question"], row.get("answer")
    elif "problem" in row:
        question, gold = row["problem"], row.get("answer") or row.get("solution")
    else:
        raise UserError(
            f"{where}: columns are {', '.join(map(str, row))}; expected prompt and reward_model, "
            "question and answer, or problem and solution"
        )
    if not question or gold in (None, ""):
        raise UserError(f"{where}: question or answer is empty; expected both")
    question = str(question).removesuffix(SUFFIX).rstrip()  # verl's files bring the suffix along
    return Problem(question, extract_answer(str(gold)) or str(gold).strip())


def prompt_ids(tokenizer, question: str, suffix: str = SUFFIX) -> list[int]:
    """The token ids of a prompt: question and suffix, in the tokenizer's chat template where it has one."""
    text = f"{question}\n{suffix}" if suffix else question
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them already
    ids = tokenizer(text + "\n" if suffix else text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # the answer is still to come


def extract_answer(text: str) -> str | None:
    """The final answer of a response: what stands in the last \\boxed{}, else after the last "####"; else None.

    There is no fall-back to the last number: a reward that takes it can be farmed.

    >>> extract_answer("First \\\\boxed{1}, then \\\\boxed{\\\\frac{1}{2}}."), extract_answer("3 + 4 = 7 . #### 7")
    ('\\\\frac{1}{2}', '7')
    >>> extract_answer("The answer is 7.") is None
    True
    """
    start = text.rfind("\\boxed{")
    if start >= 0:
        inside = start + len("\\boxed{")
        depth = 1
        for end in range(inside, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[inside:end].strip() or None
    marked = re.findall(r"####[ \t]*(\S[^\n]*)", text)
    return marked[-1].strip() if marked else None


def is_correct(text: str, gold: str) -> bool:
    """Does the response's final answer equal the gold answer? Numbers exactly, all else through math-verify.

    >>> is_correct("so \\\\boxed{1,000.0}", "1000"), is_correct("so \\\\boxed{12.5}", "12"), is_correct("so 12", "12")
    (True, False, False)
    """
    answer = extract_answer(text)
    if answer is None:
        return False
    gold = extract_answer(gold) or gold.strip()
    if answer == gold:
        return True
    number, gold_number = as_number(answer), as_number(gold)
    if number is not None and gold_number is not None:
        return number == gold_number
    return same_expression(answer, gold)


def as_number(text: str) -> Fraction | None:
    """An integer, decimal or fraction, exactly; with thousands' commas, a leading $ or a closing period. Else None.

    >>> as_number("$1,250.50"), as_number("-3/4"), as_number("x + 1") is None
    (Fraction(2501, 2), Fraction(-3, 4), True)
    """
    text = text.strip().rstrip(".").replace("\\$", "").replace("$", "").replace("\\!", "").strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?", text, flags=re.ASCII) or len(text) > 100:
        return None
    numerator, _, denominator = text.partition("/")
    divisor = int(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


def same_expression(answer: str, gold: str) -> bool:
    """Are two LaTeX expressions equal for math-verify? False where it cannot tell."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))
    except Exception:  # it parses whatever a model wrote; what it cannot read is not right
        return False
