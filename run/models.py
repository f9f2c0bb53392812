"""Open a model of a folder or of the hub, on a device."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from border import UserError, has_type, in_short, is_panic
from tasks.data import prompt_ids


def device_from(name: str | None) -> torch.device:
    """The device asked for (a GPU with a number becomes the current one), else a GPU if any. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if (device := torch.device(name)).type not in ("cpu", "cuda"):
            raise RuntimeError("torch knows more kinds than are tested here")
        torch.zeros(1, device=name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # graphs are captured on the current one
    except (RuntimeError, AssertionError) as reason:
        raise UserError(f"--device {name} cannot be used here; expected cpu, or cuda where there is a GPU") from reason
    return device


def load_tokenizer(source: str):
    """The tokenizer of a folder or hub model, as its own tokenizer.json describes it.

    For some model types, Qwen2 among them, AutoTokenizer builds the family's tokenizer from that file's vocabulary,
    whatever else stands there: a text then falls into other tokens than the model was trained on, without a word.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
    except Exception:  # it has no such file, or a broken one, for which tokenizers has no class
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_model(source: str, device: str | torch.device):
    """Model (float32, evaluation mode) and tokenizer of a folder or a hub name. Raises UserError."""
    check_folder(Path(source))
    try:
        tokenizer = load_tokenizer(source)
        knows_text = bool(tokenizer("1 + 1")["input_ids"])
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if "/" in str(kernel := config._attn_implementation):
            raise ValueError(f"its config.json asks for an attention of the hub, {kernel}, which is code.")
        config._attn_implementation = "sdpa"  # the file's own word would win over an argument
        model, found = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except BaseException as reason:  # what a broken folder makes transformers and its libraries raise has no class
        if not (isinstance(reason, Exception) or is_panic(reason)):
            raise
        raise UserError(
            f"model {source} could not be opened: {in_short(reason)} Expected a folder that save_pretrained wrote, "
            "or the name of a causal language model on the hub"
        ) from reason
    if missing := sorted(found["missing_keys"]):  # they would be random numbers
        raise UserError(
            f"model {source}: its files hold no {missing[0]} ({len(missing)} weights are missing in all); "
            "expected the files of the causal language model that its config.json describes"
        )
    if not knows_text:
        raise UserError(
            f"model {source}: its tokenizer knows no text; expected the tokenizer's files beside the model's"
        )
    try:
        check_fit(model, tokenizer)
    except ValueError as reason:
        raise UserError(f"model {source}: {reason}") from reason
    return model.to(device).eval(), tokenizer


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder that holds no model, or something that one cannot read to its end."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model {folder} has no config.json; expected a folder that save_pretrained wrote")
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(
                f"model {folder}: {file.name} is no plain file; expected a folder that save_pretrained wrote"
            )


QUESTION = "How many are 3 and 4?"


def check_fit(model, tokenizer) -> None:
    """Raise ValueError if tokenizer, its chat template and the model were not made for each other."""
    vocabulary = model.get_input_embeddings().num_embeddings
    stop = getattr(model.generation_config, "eos_token_id", None)
    ids = stop if isinstance(stop, list) else [0 if stop is None else stop]
    if not ids or not all(has_type(token, int) and 0 <= token < vocabulary for token in ids):
        raise ValueError(f"its eos_token_id is {stop!r}; expected the id of a token, or a list of ids")
    if tokenizer.chat_template:
        try:
            with said_if_endless("its chat template is still at work"):
                text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
            prompt_ids(tokenizer, QUESTION)
        except Exception as reason:  # a chat template is a program of the folder's
            raise ValueError(
                f"its chat template cannot be used ({type(reason).__name__}: {in_short(reason)}); "
                "expected one that takes a user's message, or none"
            ) from reason
        if QUESTION not in text:
            raise ValueError(
                f"its chat template makes {text!r:.60} of the question {QUESTION!r}, which is lost; expected one that "
                "takes a message's content as a text"
            )
    if (tokens := 1 + max(tokenizer.get_vocab().values())) > vocabulary:
        raise ValueError(
            f"its tokenizer has {tokens} tokens, its embedding only {vocabulary}; "
            "expected a tokenizer made for this model"
        )


@contextmanager
def said_if_endless(what: str, seconds: float = 20):
    """Nothing ends a template: it is trusted as far as it can get, which is not out of Jinja's sandbox."""
    line = f"{what}; it is a program of the folder's, which has no limit of time or memory; Ctrl-C ends it"
    timer = Timer(seconds, print, [line], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_room(policy, longest_prompt: int, max_new_tokens: int) -> None:
    """Raise UserError if the longest sequence there may be is too long for the model."""
    room, longest = getattr(policy.config, "max_position_embeddings", None), longest_prompt + max_new_tokens
    if room and longest > room:
        raise UserError(
            f"--max-new-tokens is {max_new_tokens}, prompts have up to {longest_prompt} tokens, {longest} in all, but "
            f"the model has {room} positions; expected fewer (--max-prompt-tokens drops long prompts)"
        )
