"""What the checks share: whose answer is checked, and how a wrong one is told what is wrong with it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent


def answer_of(exercise: str) -> ModuleType:
    """The answer to check: the exercise's answer.py, or exercises/solutions/ if CLIPO_ANSWERS names that folder."""
    elsewhere = os.environ.get("CLIPO_ANSWERS")
    return load(Path(elsewhere) / f"{exercise}.py" if elsewhere else HERE / exercise / "answer.py")


def load(file: Path) -> ModuleType:
    """A Python file as a module; its folder's name starts with a digit, so that `import` cannot."""
    spec = importlib.util.spec_from_file_location(f"answer_{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_model():
    """A Qwen2 with random weights, of 30 tokens. They are large: its logits are far from uniform."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # here, so that the other checks need not wait for it

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=None, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def agree(got, expected: Tensor, given: str, mistakes: dict[str, Tensor] | None = None, atol: float = 1e-5) -> None:
    """Fail, with a line that helps, unless `got` equals `expected`. mistakes: {what is wrong: what one then gets}."""
    if not isinstance(got, Tensor):
        pytest.fail(f"{given}: got {got!r}; expected a tensor of shape {tuple(expected.shape)}", pytrace=False)
    if got.shape != expected.shape:
        shapes = f"got a tensor of shape {tuple(got.shape)}; expected {tuple(expected.shape)}"
        pytest.fail(f"{given}: {shapes}", pytrace=False)
    if same(got, expected, atol):
        return
    for why, wrong in (mistakes or {}).items():
        if wrong.shape == got.shape and same(got, wrong, atol):
            pytest.fail(f"{given}: {why}\n  got      {short(got)}\n  expected {short(expected)}", pytrace=False)
    pytest.fail(f"{given}:\n  got      {short(got)}\n  expected {short(expected)}", pytrace=False)


def same(a: Tensor, b: Tensor, atol: float) -> bool:
    return torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4, equal_nan=True)


def short(tensor: Tensor) -> str:
    """The first values of a tensor."""
    values = [round(value, 4) for value in tensor.flatten()[:8].tolist()]
    return f"{values}{' ...' if tensor.numel() > 8 else ''}"


def explains(given: str, right: str, choices: dict[str, str]) -> None:
    """Fail unless EXPLANATION is the right letter; a wrong one is told why not. choices: {wrong letter: why not}."""
    if given != right:
        letters = ", ".join(sorted([right, *choices]))
        why = choices.get(given, f"it is {given!r}; expected one of: {letters}")
        pytest.fail(f"EXPLANATION: {why}", pytrace=False)
