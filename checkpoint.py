"""A run's folder: open models, save a training state, go on from it.

OUT/                          the newest model: config.json, model.safetensors, tokenizer.json, ...
    head.safetensors          its contrastive head
    settings.json             everything that was chosen, to run it again
    metrics.jsonl             a line per step
    rollouts.jsonl            some groups of each step
    report.html               a page that shows them
    checkpoints/step-000060/  complete training states, the last two: model, tokenizer, head, trainer.pt
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from clipo import CLIPO
from problems import UserError

KEPT = 2  # checkpoints


def device_from(name: str | None) -> torch.device:
    """The device asked for, else a GPU if there is one. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as reason:
        raise UserError(f"--device {name} cannot be used here; expected cpu, or cuda where there is a GPU") from reason
    return torch.device(name)


def load_tokenizer(source: str):
    """The tokenizer of a folder or hub model, as its own files describe it.

    For some model types, Qwen2 among them, AutoTokenizer puts the family's tokenizer in place of a generic one
    that was trained for this model, and the token ids come out wrong without a word. A generic one we open as such.
    """
    declared = get_tokenizer_config(source).get("tokenizer_class")
    generic = declared in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(source)


def load_model(source: str, device: str | torch.device):
    """Model (float32, evaluation mode) and tokenizer of a folder or a hub name. Raises UserError."""
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"model {source} has no config.json; expected a folder that save_pretrained wrote")
    try:
        tokenizer = load_tokenizer(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, RuntimeError) as reason:
        first_line = (str(reason).splitlines() or [""])[0]
        raise UserError(
            f"model {source} could not be opened: {first_line} Expected a folder that save_pretrained wrote, "
            "or the name of a causal language model on the hub"
        ) from reason
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model {source}: its tokenizer has {len(tokenizer)} tokens, its embedding only {vocabulary}; "
            "expected a tokenizer made for this model"
        )
    return model.to(device).eval(), tokenizer


def save(trainer: CLIPO, out: Path) -> Path:
    """Write a complete training state into `out`/checkpoints and publish its model in `out`; returns its folder.

    It is written aside and renamed when whole, so that a folder called step-N is always complete.
    """
    folder = out / "checkpoints" / f"step-{trainer.steps_done:06d}"
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    trainer.policy.save_pretrained(aside)
    trainer.tokenizer.save_pretrained(aside)
    save_file(trainer.head.state_dict(), aside / "head.safetensors")
    optimizers = {"policy": trainer.policy_optimizer.state_dict(), "head": trainer.head_optimizer.state_dict()}
    torch.save({"steps_done": trainer.steps_done, **optimizers}, aside / "trainer.pt")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    publish(folder, out)
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)
    return folder


def publish(folder: Path, out: Path) -> None:
    """Let `out` itself open with from_pretrained: hard links to the checkpoint's files, which cost no space."""
    for file in folder.iterdir():
        if file.name == "trainer.pt":
            continue
        link = out / (file.name + ".new")
        link.unlink(missing_ok=True)
        try:
            os.link(file, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, link)
        link.replace(out / file.name)


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("step-*") if f.is_dir() and f.suffix != ".writing")


def resume(trainer: CLIPO, folder: Path) -> None:
    """Bring a freshly made trainer (of the run's first model and settings) to the state in `folder`."""
    device = trainer.policy.device
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    trainer.policy.load_state_dict(weights)
    trainer.head.load_state_dict(load_file(folder / "head.safetensors", device=str(device)))
    state = torch.load(folder / "trainer.pt", map_location=device, weights_only=True)
    trainer.policy_optimizer.load_state_dict(state["policy"])
    trainer.head_optimizer.load_state_dict(state["head"])
    trainer.steps_done = state["steps_done"]


def append_line(file: Path, row: dict) -> None:
    """Add one line of JSON."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(file: Path) -> list[dict]:
    """All whole lines of a JSONL file ([] where there is none); one that a kill cut short is skipped."""
    whole = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in whole]


def write_lines(file: Path, rows: list[dict]) -> None:
    """Put these rows in place of a JSONL file, at once."""
    aside = file.with_name(file.name + ".new")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.replace(file)


def keep_until(file: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run will write again."""
    write_lines(file, [row for row in read_lines(file) if row["step"] <= step])
