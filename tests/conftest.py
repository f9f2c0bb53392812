"""Small models with random weights, made here: nothing is downloaded."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; no test may wait for a network

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
transformers.logging.disable_progress_bar()

SIZE = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
# Weights ten times the usual size: greedy text is lively and log-probs are far from uniform.
LIVELY = dict(initializer_range=0.2)

CONFIGS = {
    "qwen2": Qwen2Config(**SIZE, **LIVELY, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SIZE, **LIVELY, num_key_value_heads=4, tie_word_embeddings=False),
    "qwen2-some-sliding": Qwen2Config(
        **SIZE, **LIVELY, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZE, **LIVELY, num_key_value_heads=2, head_dim=16),
    "llama": LlamaConfig(**SIZE, **LIVELY, num_key_value_heads=1),
    "llama-3-rope": LlamaConfig(
        **SIZE, **LIVELY, num_key_value_heads=2, rope_parameters=dict(
            rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "mistral-sliding": MistralConfig(**SIZE, **LIVELY, num_key_value_heads=2, sliding_window=6),
    "gemma2": Gemma2Config(
        **SIZE, **LIVELY, num_key_value_heads=2, head_dim=8, sliding_window=6, query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "phi3": Phi3Config(**SIZE, **LIVELY, num_key_value_heads=2, sliding_window=6),
    "gpt-neox": GPTNeoXConfig(**SIZE, **LIVELY),
    "gpt2": GPT2Config(**SIZE, **LIVELY),
}  # fmt: skip

PROMPTS = [[5, 9, 13], [7], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29], [11, 4]]


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """A test without a generator of its own draws the same numbers every time (a dead ReLU row failed one once)."""
    torch.manual_seed(0)


def make_model(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def browser():
    from exercises.picture import chromium

    if not (found := chromium()):
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file at a width; at the end of the test: nothing was complained of, nothing asked of a network."""
    complaints, pages = [], []

    def open_at(file, width=1400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append("a dialog"))
        page.on("request", lambda request: request.url.startswith("file://") or complaints.append(request.url))
        page.goto(file.resolve().as_uri())
        return page

    yield open_at
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture(scope="session", params=CONFIGS)
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="session")
def qwen2():
    return make_model(CONFIGS["qwen2"])


def flat(rollouts):
    """Rollouts (P, G, ...) one a row: tokens, mask and logprobs (B, T), hidden (B, D), group (B,): which prompt."""
    P, G, _ = rollouts.tokens.shape
    rows = {name: values.flatten(0, 1) for name, values in rollouts._asdict().items()}
    return SimpleNamespace(**rows, group=torch.arange(P).repeat_interleave(G))
