"""The compiled decode step: the plain text's tokens, for every family it serves, as a function and truly compiled."""

import copy
import inspect
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, LIVELY, PROMPTS, SIZE, make_model
from test_safety import TINY_RUN
from transformers import MistralConfig

import clipo
import train
from config import CLIPOConfig
from engine import check, compiled, memory
from engine import rollouts as fast
from run import folder as run_folder

FAMILIES = {
    **{name: CONFIGS[name] for name in ("qwen2", "qwen2-untied", "qwen3", "llama", "llama-3-rope")},
    "mistral": MistralConfig(**SIZE, **LIVELY, num_key_value_heads=2, sliding_window=None),
}


@pytest.fixture
def as_written(monkeypatch):
    """The layer as Python runs it: exactness is the function's, speed the compiler's, who takes half a minute."""
    monkeypatch.setattr(compiled, "compiled_layer", lambda: compiled.layer)


def roll_out(generate, model, samples=5, **chosen):
    given = dict(max_new_tokens=24, eos_token_id=[1, 2, 3], generator=torch.Generator().manual_seed(3)) | chosen
    return generate(model, PROMPTS, samples_per_prompt=samples, **given)


def assert_equal(got, expected):
    assert torch.equal(got.mask, expected.mask) and torch.equal(got.tokens[got.mask], expected.tokens[got.mask])
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.hidden, expected.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_each_family_writes_the_plain_texts_tokens(as_written, name, temperature):
    model = make_model(FAMILIES[name])
    with warnings.catch_warnings(action="error"):
        got = roll_out(fast.generate, model, temperature=temperature, compiled=True, max_batch=7)
    assert check.not_compiled[model] == ""
    assert_equal(got, roll_out(clipo.generate, model, temperature=temperature))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_once_it_serves_all_numbers_of_rows_and_slots_and_a_policy_that_has_learned():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = make_model(FAMILIES["qwen2"])
    for samples in (4, 2, 7):
        got = roll_out(fast.generate, model, samples, temperature=0, compiled=True, max_batch=8)
        assert_equal(got, roll_out(clipo.generate, model, samples, temperature=0))
        with torch.no_grad():
            for parameter in model.parameters():  # what an optimiser does
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert check.not_compiled[model] == ""
    assert counters["stats"]["unique_graphs"] == 1


def test_in_bfloat16_products_it_is_as_near_as_they_are(as_written):
    model = make_model(FAMILIES["qwen3"])
    exact = roll_out(fast.generate, model, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = roll_out(fast.generate, model, temperature=0, compiled=True)
    same = got.mask[..., :1] & exact.mask[..., :1] & (got.tokens[..., :1] == exact.tokens[..., :1])
    assert check.not_compiled[model] == "" and same.float().mean() > 0.7
    assert (got.logprobs - exact.logprobs)[..., :1][same].abs().max() < 0.3


def test_what_is_kept_serves_the_next_rollouts_and_no_others(as_written):
    """Other weights, prompts, sizes; rollouts that were handed out stay as they were."""
    model, other, kept, before = make_model(FAMILIES["qwen2"]), make_model(FAMILIES["qwen2"]), [], []
    loads = [(model, 5, 24), (model, 5, 24), (model, 3, 24), (model, 3, 9), (other, 3, 9), (model, 3, 9)]
    for one, samples, tokens in loads:
        chosen = dict(samples=samples, max_new_tokens=tokens)
        got = roll_out(fast.generate, one, **chosen, compiled=True, max_batch=7, kept=kept)
        assert_equal(got, roll_out(clipo.generate, one, **chosen))
        (workspace,) = kept
        before.append((workspace, got, type(got)(*(values.clone() for values in got))))
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    workspaces = [workspace for workspace, *_ in before]
    assert workspaces[0] is workspaces[1] and len({id(workspace) for workspace in workspaces}) == 5
    assert all(map(torch.equal, got, copied) for _, got, copied in before)


def test_tensors_that_were_replaced_are_read_anew_and_none_is_written_to(as_written):
    """Averaged weights put in for a while, say; and a graph of the model's own, of which it is a part."""
    model, kept = make_model(FAMILIES["qwen2-untied"]), []
    loss = model(torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum()
    assert_equal(roll_out(fast.generate, model, compiled=True, kept=kept), roll_out(clipo.generate, model))
    loss.backward()  # nothing that it saved has changed
    places = [(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]
    before = [getattr(module, name) for module, name in places]
    values = [parameter.detach().clone() for parameter in before]
    for module, name in places:
        setattr(module, name, torch.nn.Parameter(1.1 * getattr(module, name).detach()))
    model.base_model.norm = copy.deepcopy(model.base_model.norm)
    model.base_model.norm.weight.data.mul_(0.5)
    assert_equal(roll_out(fast.generate, model, compiled=True, kept=kept), roll_out(clipo.generate, model))
    assert all(map(torch.equal, before, values))


def test_inference_mode_may_begin_and_end_between_calls(as_written):
    model, kept = make_model(FAMILIES["qwen2"]), []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            got = roll_out(fast.generate, model, compiled=True, kept=kept)
            assert_equal(got, roll_out(clipo.generate, model))


def test_a_number_that_was_none_is_not_kept(as_written):
    model, kept = make_model(FAMILIES["qwen2"]), []
    roll_out(fast.generate, model, compiled=True, kept=kept)
    for keys_and_values in kept[0].batch.cache.layers:
        for store in keys_and_values:
            store.fill_(torch.nan)
    assert_equal(roll_out(fast.generate, model, compiled=True, kept=kept), roll_out(clipo.generate, model))


def test_steps_that_are_not_compiled_leave_nothing(as_written):
    model, kept = make_model(CONFIGS["gpt2"]), []
    with pytest.warns(UserWarning, match="gpt2 is none of"):
        roll_out(fast.generate, model, compiled=True, kept=kept)
    roll_out(fast.generate, model, kept=kept)
    assert kept == []


LINES = [  # of the layer and its attention, and what makes it wrong
    ("states, before_attention", "2 * states + 1, before_attention"),
    ("norm(q, q_norm)", "q"),
    ("rotated(norm(k, k_norm), cos, sin)", "norm(k, k_norm)"),
    ("keys[row, :, position]", "keys[row, :, 0 * position]"),
    ("v.to(values.dtype)", "k.to(values.dtype)"),
    ("<= position", "< position"),
    ("q.shape[3] ** -0.5", "q.shape[3] ** -0.4"),
    (".softmax(-1)", ".sigmoid()"),
    ("@ values", "@ keys"),
    ("states = states + F.linear(mixed", "states = F.linear(mixed"),
    ("norm(states, before_mlp)", "states"),
    ("F.silu(gate) * up", "F.silu(up) * gate"),
    ("return states + F", "return F"),
]


@pytest.mark.parametrize("right, wrong", LINES)
def test_a_layer_with_a_wrong_line_is_refused_and_the_tokens_stay_right(monkeypatch, right, wrong):
    source = inspect.getsource(compiled.attend) + inspect.getsource(compiled.layer)
    assert source.count(right) == 1
    names = dict(vars(compiled))
    exec(source.replace(right, wrong), names)
    monkeypatch.setattr(compiled, "compiled_layer", lambda: names["layer"])
    model = make_model(FAMILIES["qwen3"])
    with pytest.warns(UserWarning, match="decode steps are not compiled: its logits are off by .*; rollouts go on"):
        got = roll_out(fast.generate, model, temperature=0, compiled=True)
    assert_equal(got, roll_out(clipo.generate, model, temperature=0))


@pytest.mark.parametrize(
    "name, why",
    [
        ("gpt2", "gpt2 is none of qwen2"),
        ("gemma2", "gemma2 is none of"),
        ("mistral-sliding", "its attention has a window"),
        ("qwen2-some-sliding", "its attention has a window"),
    ],
)
def test_another_model_decodes_as_before_and_that_is_said_once(as_written, name, why):
    model = make_model(CONFIGS[name])
    with pytest.warns(UserWarning, match=why):
        got = roll_out(fast.generate, model, compiled=True)
    with warnings.catch_warnings(action="error"):
        assert_equal(roll_out(fast.generate, model, compiled=True), got)
    assert_equal(got, roll_out(fast.generate, model))


def test_a_model_of_the_family_with_other_parts_is_another(as_written):
    for change, why in (
        (lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Sequential(layer.mlp.up_proj)), "no plain nn.Linear"),
        (
            lambda layer: setattr(layer.self_attn.o_proj, "bias", torch.nn.Parameter(torch.ones(32))),
            "a product has a bias",
        ),
        (lambda layer: layer.mlp.down_proj.register_forward_hook(lambda *_: None), "was changed"),
    ):
        model = make_model(FAMILIES["llama"])
        change(model.model.layers[1])
        with pytest.warns(UserWarning, match=why):
            assert not check.may_compile(model)


def test_words_by_blocks_are_those_of_one_running_sum():
    draws = torch.Generator().manual_seed(0)
    for words in (1, 5, 128, 129, 1000):
        probs = torch.rand(64, words, generator=draws) ** 8
        probs[:, words // 2 : words // 2 + 60] = 0  # whole stretches have none
        probs[:, :1] += 1e-3
        share = torch.rand(64, generator=draws)
        got = fast.by_blocks(probs, share)
        sums = probs.double().cumsum(-1)
        below = (sums - probs.double()).gather(1, got[:, None])[:, 0] / sums[:, -1]
        above = sums.gather(1, got[:, None])[:, 0] / sums[:, -1]
        assert (probs.gather(1, got[:, None]) > 0).all()
        assert (below <= share + 1e-6).all() and (share <= above + 1e-6).all()


def test_a_share_next_to_one_takes_a_word_that_has_a_probability():
    probs = torch.zeros(1, 300)
    probs[0, [7, 130]] = torch.tensor([0.1, 0.7])
    for share in (0.0, 0.124, 0.126, 1 - 2**-24):
        assert fast.by_blocks(probs, torch.tensor([share])).item() == (7 if share < 0.125 else 130)


def test_when_it_is_compiled():
    small, large = CLIPOConfig.for_track("toy"), CLIPOConfig.for_track("math")
    assert [config.compiles(device) for config in (small, large) for device in ("cpu", "cuda")] == [0, 0, 0, 1]
    assert CLIPOConfig.for_track("toy", compile=True).compiles("cpu")
    assert not CLIPOConfig.for_track("math", compile=False).compiles("cuda")


@pytest.mark.parametrize("bfloat16", [False, True])
def test_its_copy_of_the_weights_is_in_the_plan(as_written, bfloat16):
    model, kept = make_model(FAMILIES["qwen2"]), []
    plans = {
        (compile, keep): memory.memory_plan(
            model, CLIPOConfig.for_track("toy", compile=compile, keep_captures=keep), 64, bfloat16
        )
        for compile in (False, True)
        for keep in (False, True)
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        roll_out(fast.generate, model, compiled=True, kept=kept)
    steps = kept[0].compiled
    copied = [steps.output, *(w for weights in steps.layers for w in weights)]
    copied = [w for w in copied if w is not None and not isinstance(w, torch.nn.Parameter) and w.dim() == 2]
    name = "copy for compiled steps"
    assert plans[True, False].rollouts[name] == plans[True, True].lasting[name] == sum(w.nbytes for w in copied) > 0
    assert plans[False, False].rollouts[name] == 0 and plans[False, True] == plans[False, False]
    assert name not in plans[True, True].rollouts and plans[True, True].lasting["cache"] > 0
    config = CLIPOConfig.for_track("toy", compile=True, keep_captures=True)
    other = memory.memory_plan(make_model(CONFIGS["gpt2"]), config, 64, bfloat16)  # whose steps cannot be compiled
    assert other == memory.memory_plan(make_model(CONFIGS["gpt2"]), replace(config, compile=False), 64, bfloat16)


def test_train_compiles_by_name_and_samples_the_same(as_written, tmp_path):
    texts = []
    for name, option in (("with", "--compile"), ("without", "--no-compile")):
        options = [*TINY_RUN, "--engine", "fast", "--steps", "2", "--log-groups", "9", option]
        assert train.main([*options, "--device", "cpu", "--out", str(tmp_path / name)]) == 0
        rows = run_folder.read_lines(tmp_path / name / "rollouts.jsonl")
        texts.append([rollout["text"] for row in rows for rollout in row["rollouts"]])
    assert texts[0] == texts[1]


def test_with_the_plain_engine_it_is_said_that_nothing_is_compiled(tmp_path, capsys):
    options = [*TINY_RUN, *"--engine plain --steps 2 --device cpu --compile --out".split(), str(tmp_path / "run")]
    assert train.main(options) == 0
    said = "--compile, --keep-captures: the plain engine compiles and keeps nothing; --engine fast does\n"
    assert capsys.readouterr().out.count(said) == 1
