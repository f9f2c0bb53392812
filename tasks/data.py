"""Data sets of questions, from the hub or a file; and `DataTask`, which gives each training step its share.

To add one: a local file needs no code if `read_row` knows its columns. A data set of the hub is a line in BENCHMARKS,
and a name in TRAINING_SETS if it may be trained on.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from border import UserError, from_json, in_short
from clipo import Scored
from config import CLIPOConfig
from tasks.expressions import LONGEST
from tasks.grading import are_correct, extract_answer

# What the paper appends to every question.
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Problem:
    """A question as the model reads it (without chat template and suffix) and the answer that counts as right."""

    question: str
    answer: str


@dataclass(frozen=True)
class Source:
    """Where a data set lies on the hub. Its columns are found by `read_row`."""

    hub_id: str
    configuration: str | None = None
    test: str = "test"  # the split to evaluate on
    file: str | None = None  # its data, where it is one file at an address and no hub data set


PERTURB = "https://raw.githubusercontent.com/Kaffaljidhmah2/MATH-Perturb/main/math_perturb/math_perturb_{}.jsonl"


# All data sets that have a name: the paper's benchmarks, and MATH to train on. All are graded by `are_correct`: numbers
# exactly (TheoremQA's decimals too, where its authors allow some tolerance), letters exactly, the rest as expressions.
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


def is_source(source: str) -> bool:
    """Is it the name of a data set, or may it be a file of one?"""
    return source in BENCHMARKS or Path(source).suffix in (".parquet", ".jsonl")


def check_source(source: str) -> None:
    """Raise UserError for what is neither a name nor a file's."""
    if not is_source(source):
        raise UserError(
            f"data is {source!r}; expected {', '.join(BENCHMARKS)}, or the path of a .parquet or .jsonl file"
        )


class Unanswered(ValueError):
    """A row's solution does not say which of it is the answer."""


def load_problems(source: str, split: str = "test") -> list[Problem]:
    """Problems of a data set by name (one of BENCHMARKS) or of a local .parquet or .jsonl file.

    split: "train" or "test"; a local file is taken whole. Rows may have any of the columns that `read_row` knows. A
    solution without an answer is left out, and counted. Raises UserError for rows that cannot be read, and counts them.
    """
    check_source(source)
    rows = load_from_hub(source, split) if source in BENCHMARKS else load_file(Path(source))
    problems, refused, unanswered = [], [], []
    for number, row in enumerate(rows, 1):
        try:
            if not row_has_picture(row):
                problems.append(read_row(row))
        except Unanswered as reason:
            unanswered.append(f"{source}, row {number}: {reason}")
        except ValueError as reason:
            refused.append(f"{source}, row {number}: {reason}")
    if refused:
        raise UserError(refused[0] + (f"; so are {len(refused)} of {len(rows)} rows" if len(refused) > 1 else ""))
    if not problems:
        raise UserError(unanswered[0] if unanswered else f"{source} holds no rows; expected at least one problem")
    if unanswered:
        print(f"{len(unanswered)} of {len(rows)} rows are left out, the first of them {unanswered[0]}", file=sys.stderr)
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
        raise UserError(
            f"{name} ({source.file or source.hub_id}, {split}) could not be loaded: {type(reason).__name__}: "
            f"{in_short(reason)}. Connect to the network once, or give a local .parquet or .jsonl file"
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
            raise UserError(f"{path} is not a readable parquet file: {in_short(reason)}") from reason
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as reason:
        raise UserError(f"{path} is not UTF-8 text; expected a JSON object per line") from reason
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(from_json(line))
        except ValueError as reason:
            raise UserError(f"{path}, line {number} is not JSON ({reason}); expected an object per line") from reason
    return rows


def row_has_picture(row) -> bool:
    """TheoremQA has some questions about a picture, which a language model cannot see: they are left out."""
    return isinstance(row, dict) and row.get("Picture") is not None


def read_row(row: dict) -> Problem:
    """One row in any of the formats in use. Raises ValueError that says what is wrong with it.

    verl's (`prompt` messages, `reward_model.ground_truth`), GSM8K's (`question`, `answer`), MATH's (`problem`,
    `solution` and perhaps `answer`), TheoremQA's (`Question`, `Answer`), or multiple choice: MMLU's (`choices`,
    `answer` by number), CommonsenseQA's (`choices` with labels, `answerKey`), TruthfulQA's (`mc1_targets`).
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, not {type(row).__name__}")
    try:
        if "prompt" in row and "reward_model" in row:
            question, gold = only_message(row["prompt"]), row["reward_model"]["ground_truth"]
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
            question, gold = row["problem"], row.get("answer")
            if gold in (None, "") and isinstance(row.get("solution"), str):
                if (gold := extract_answer(row["solution"])) is None:
                    raise Unanswered('its solution has no answer; expected one in \\boxed{}, or a column "answer"')
        elif "Question" in row:
            question, gold = row["Question"], row.get("Answer")
        else:
            raise UserError(
                f"columns are {', '.join(map(str, row))}; expected prompt and reward_model, question and answer, or "
                "problem and solution"
            )
    except (KeyError, IndexError, TypeError, ValueError) as reason:
        if isinstance(reason, UserError | Unanswered):
            raise
        raise ValueError(f"its columns do not fit together ({type(reason).__name__}: {reason})") from reason
    if not question or gold in (None, ""):
        raise ValueError("question or answer is empty; expected both")
    if not isinstance(question, str) or type(gold) not in (str, int, float):
        given = f"{type(question).__name__} and {type(gold).__name__}"
        raise ValueError(f"question and answer are {given}; expected a text, and a text or number")
    question = question.removesuffix(SUFFIX).rstrip()  # verl's files bring the suffix along
    gold = gold if isinstance(gold, str) else digits(gold)
    answer = extract_answer(gold) or gold.strip()
    if len(answer) > LONGEST:
        raise Unanswered(
            f'no answer is marked in its {len(answer)} characters; expected it in \\boxed{{}}, or behind "####"'
        )
    return Problem(question, answer)


def only_message(messages: Sequence[dict]) -> str:
    """The user's message of a verl prompt that has no other. Raises UserError: any other would be lost."""
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise UserError(
            f"its prompt has messages of {', '.join(map(str, roles)) or 'nobody'}; expected one, of the user"
        )
    return messages[0]["content"]


def digits(number: int | float) -> str:
    """A number as one writes it, without an exponent. Raises ValueError for NaN and infinity.

    >>> digits(2e-05), digits(3e16), digits(0.10000000149011612)  # the last came from a column of float32
    ('0.00002', '30000000000000000', '0.1')
    """
    if not math.isfinite(number):
        raise ValueError(f"its answer is {number}; expected a number or a text")
    with np.errstate(over="ignore"):
        single = np.float32(number)
    shortest = str(single) if isinstance(number, float) and float(single) == number else str(number)
    return format(Decimal(shortest), "f")


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
# What a step is given
# ----------------------------------------------------------------------------------------------------


class DataTask:
    """A data set, shuffled anew in each epoch; prompts over the limit are left out. Raises UserError if few remain."""

    def __init__(self, config: CLIPOConfig, tokenizer, data: str):
        self.config, self.tokenizer = config, tokenizer
        everything = load_problems(data, "train")
        lengths = [len(self.prompt(problem)) for problem in everything]
        self.longest_prompt = max((n for n in lengths if n <= config.max_prompt_tokens), default=0)
        self.all = [p for p, n in zip(everything, lengths, strict=True) if n <= config.max_prompt_tokens]
        if dropped := len(everything) - len(self.all):
            print(f"{dropped} of {len(everything)} prompts are over {config.max_prompt_tokens} tokens and left out")
        if len(self.all) < config.prompts_per_step:
            raise UserError(
                f"{data} has {len(self.all)} prompts of at most {config.max_prompt_tokens} tokens; expected at least "
                f"--prompts-per-step {config.prompts_per_step}"
            )

    def problems(self, step: int) -> list[Problem]:
        """Step s takes the s-th slice of all epochs laid end to end; an epoch's order follows from seed and epoch."""
        size, count = self.config.prompts_per_step, len(self.all)
        chosen: list[Problem] = []
        for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
            order = list(range(count))
            random.Random(f"epoch {self.config.seed} {epoch}").shuffle(order)
            first, last = max(step * size - epoch * count, 0), min((step + 1) * size - epoch * count, count)
            chosen += [self.all[i] for i in order[first:last]]
        return chosen

    def more(self, step: int) -> Iterator[Problem]:
        """Further ones for a step, drawn at random, without end."""
        draw = random.Random(f"more {self.config.seed} {step}")
        while True:
            yield draw.choice(self.all)

    def prompt(self, problem: Problem) -> list[int]:
        return prompt_ids(self.tokenizer, problem.question)

    def are_correct(self, texts: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
        return are_correct(texts, [problem.answer for problem in problems])

    def measure(self, scored: Scored) -> dict:
        """Nothing: only answers are known here, no steps."""
        return {}

    def remarks(self, problem: Problem, text: str) -> dict:
        return {}
