"""On a GPU the same comes out as on a CPU. What needs one skips where there is none."""

import copy
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, PROMPTS, make_model
from test_batch import assert_same, roll_out
from test_compiled import FAMILIES
from test_safety import TINY_RUN
from test_step import ANSWERS, SMALL, TOKENIZER, even, step

import engine.compiled as compiled
import engine.forward as forward
import engine.graphs as graphs
import engine.rollouts as fast
import eval as evaluation
import train
import tsne
from config import CLIPOConfig
from engine.guard import Trainer
from run import folder as run_folder
from run import models as run_models
from run import warm_start as run_warm_start
from tasks import toy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_cpu(rollouts):
    return type(rollouts)(*(values.cpu() for values in rollouts))


@needs_gpu
def test_rollouts_by_replayed_graphs_equal_the_cpus(model):
    expected = roll_out(model, max_new_tokens=40)
    assert_same(on_cpu(roll_out(copy.deepcopy(model).cuda(), max_new_tokens=40, max_batch=7)), expected)


@needs_gpu
@pytest.mark.parametrize("max_batch, temperature", [(3, 1.0), (None, 0)])
def test_waves_and_greedy_rollouts_equal_the_cpus(qwen2, max_batch, temperature):
    chosen = dict(max_new_tokens=40, max_batch=max_batch, temperature=temperature)
    expected = roll_out(qwen2, **chosen)
    for cuda_graphs in (True, False):
        got = roll_out(copy.deepcopy(qwen2).cuda(), **chosen, cuda_graphs=cuda_graphs)
        assert_same(on_cpu(got), expected)


@pytest.fixture
def captures(monkeypatch):
    """The kinds that are captured, as they come up. An emulated device has no compiler: the function is the same."""
    if torch.version.cuda is None:
        monkeypatch.setattr(compiled, "compiled_layer", lambda: compiled.layer)
    kinds, capture = [], graphs.CapturedSteps.capture
    monkeypatch.setattr(
        graphs.CapturedSteps, "capture", lambda self, step, kind: kinds.append(kind) or capture(self, step, kind)
    )
    return kinds


@needs_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_steps_equal_the_cpus_and_are_captured(captures, name):
    model = make_model(FAMILIES[name])
    expected = roll_out(model, max_new_tokens=40)
    got = roll_out(copy.deepcopy(model).cuda(), max_new_tokens=40, max_batch=7, compiled=True, cuda_graphs=True)
    assert_same(on_cpu(got), expected)
    assert captures and all(rows > 1 for rows, _ in captures)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_graphs_serve_a_policy_that_has_learned(qwen2, captures, dtype):
    """Captured once; replayed after an update, in an autocast of its own, they read the weights as they are now."""
    model, kept, kinds, logprobs = copy.deepcopy(qwen2).cuda(), [], [], []
    chosen = dict(max_new_tokens=40, max_batch=7, compiled=True, cuda_graphs=True)
    for _ in range(3):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            captures.clear()
            got = roll_out(model, **chosen, kept=kept)
            kinds += captures
            assert_same(on_cpu(got), on_cpu(roll_out(model, **chosen)))
        logprobs.append(got.logprobs[:, :, 0])
        with torch.no_grad():
            for parameter in model.parameters():  # what an optimiser does
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert kinds and len(kinds) == len(set(kinds))
    assert not any(torch.equal(one, next_one) for one, next_one in itertools.pairwise(logprobs))


@pytest.mark.parametrize("keys", [1, 15, 16, 40])
def test_rows_of_a_mask_begin_where_a_gpus_attention_wants_them(keys):
    mask = forward.attention_mask(torch.arange(5)[None], torch.arange(keys)[None], None, torch.float32)
    assert mask.shape == (1, 1, 5, keys) and all(step % 16 == 0 for step in mask.stride()[:-1]) and mask.stride(-1) == 1


def test_a_gpus_cache_and_its_used_part_are_multiples_of_16(qwen2, monkeypatch):
    expected, seen, reach = roll_out(qwen2), [], fast.Batch.reach

    def watched(batch):
        seen.append((batch.slots, reach(batch)))
        return seen[-1][1]

    monkeypatch.setattr(fast.Batch, "reach", watched)
    monkeypatch.setitem(fast.PACE, "cpu", fast.PACE["cuda"])
    assert_same(roll_out(qwen2), expected)
    assert seen and all(number % 16 == 0 for numbers in seen for number in numbers)
    assert {slots for slots, _ in seen} == {forward.round_up(max(map(len, PROMPTS)) + 24, 16)}  # no more than it takes


def test_cudnn_does_not_attend(qwen2):
    """Its backward pass can give NaN with a mask (pytorch #196678)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with forward.our_attention(qwen2):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# ----------------------------------------------------------------------------------------------------
# Graphs
# ----------------------------------------------------------------------------------------------------


def trainer_on_gpu(engine="fast", **settings):
    model = make_model(CONFIGS["qwen2"]).cuda()
    chosen = {**SMALL, "max_new_tokens": 24, "compute_dtype": "float32", **settings}
    return Trainer(model, TOKENIZER, even, CLIPOConfig(**chosen), engine)


def while_capturing(monkeypatch, what):
    """`what` happens in each decode step that is captured, and in no other."""
    sample = fast.sample

    def sample_or(*arguments):
        if torch.cuda.is_current_stream_capturing():
            what()
        return sample(*arguments)

    monkeypatch.setattr(fast, "sample", sample_or)


def wait():
    torch.ones(1, device="cuda").item()


def complain_at_length():
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it in the manual")


def run_out():
    raise RuntimeError("CUDA error: out of memory")


@needs_gpu
@pytest.mark.parametrize("what", [wait, complain_at_length])
def test_a_capture_that_fails_is_said_once_in_one_line_and_the_run_goes_on(qwen2, monkeypatch, what):
    model, expected = copy.deepcopy(qwen2).cuda(), roll_out(qwen2)
    while_capturing(monkeypatch, what)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph .* rollouts go on without"):
        got = roll_out(model)
    assert_same(on_cpu(got), expected)
    with warnings.catch_warnings(action="error"):
        assert_same(on_cpu(roll_out(model)), expected)
    assert "cannot be captured" in graphs.captures_failed[model]


@needs_gpu
def test_nor_does_it_under_the_plain_engine():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        trainer_on_gpu(engine="plain")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@needs_gpu
def test_graphs_asked_for_by_name_fail_loudly(qwen2, monkeypatch):
    while_capturing(monkeypatch, wait)
    with pytest.raises(graphs.CaptureFailed, match="cannot be captured as a CUDA graph"):
        roll_out(copy.deepcopy(qwen2).cuda(), cuda_graphs=True)


@needs_gpu
def test_memory_that_runs_out_in_a_capture_halves_the_batch(monkeypatch):
    t, failures = trainer_on_gpu(), []
    sample = fast.sample

    def on_a_small_gpu(logits, *more):
        if torch.cuda.is_current_stream_capturing() and len(logits) > 4:
            failures.append(len(logits))
            run_out()
        return sample(logits, *more)

    monkeypatch.setattr(fast, "sample", on_a_small_gpu)
    assert step(t, PROMPTS, ANSWERS)["skipped"] is None
    assert failures and t.sizes["max_batch"] <= 4 and t.policy not in graphs.captures_failed


@needs_gpu
def test_a_trainer_keeps_its_captures_until_memory_runs_out(captures, monkeypatch):
    t = trainer_on_gpu(compile=True, keep_captures=True)
    for _ in range(3):
        assert step(t, PROMPTS, ANSWERS)["skipped"] is None
    before = len(captures)
    assert 0 < before == len(set(captures)) and len(t.kept) == 1
    gradient, failed = t.unguarded.policy_gradient, []

    def fails_once(*arguments, **named):
        if not failed:
            failed.append(run_out)
            run_out()
        return gradient(*arguments, **named)

    monkeypatch.setattr(t, "unguarded", replace(t.unguarded, policy_gradient=fails_once))
    sizes = dict(t.sizes)
    assert step(t, PROMPTS, ANSWERS)["skipped"] is None and t.kept is None and t.sizes == sizes
    assert step(t, PROMPTS, ANSWERS)["skipped"] is None and len(captures) > before


@needs_gpu
def test_all_but_the_first_step_is_captured_each_kind_once(qwen2, captures):
    roll_out(copy.deepcopy(qwen2).cuda(), max_new_tokens=1)
    assert not captures
    roll_out(copy.deepcopy(qwen2).cuda(), max_new_tokens=40)
    assert 1 <= len(captures) == len(set(captures)) <= 5


# ----------------------------------------------------------------------------------------------------
# The commands
# ----------------------------------------------------------------------------------------------------


@needs_gpu
def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    """Graphs are captured on the current device: one captured on another stays empty, and decoding never ends."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert run_models.device_from("cuda:0") == chosen[0] == torch.device("cuda:0")


def trained_on(device, engine, out):
    """train.py and --resume: the folder, and the texts that it sampled in each step."""
    options = [*TINY_RUN, "--engine", engine, "--max-new-tokens", "24", "--log-groups", "9", "--steps", "2"]
    assert train.main([*options, "--device", device, "--out", str(out)]) == 0
    assert train.main(["--resume", "--steps", "3", "--test-stories", "0", "--device", device, "--out", str(out)]) == 0
    rows = run_folder.read_lines(out / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]  # two groups a step
    return [rollout["text"] for row in rows for rollout in row["rollouts"]]


@needs_gpu
def test_the_plain_engine_trains_and_goes_on_as_on_a_cpu(tmp_path):
    assert trained_on("cuda", "plain", tmp_path / "gpu") == trained_on("cpu", "plain", tmp_path / "cpu")


@needs_gpu
def test_every_command_runs_and_writes_what_a_cpu_writes(tmp_path):
    texts = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}-run"
        texts[device] = trained_on(device, "fast", out)
        assert (
            evaluation.main([str(out), "--limit", "3", "--device", device, "--save-rollouts", "--dtype", "float32"])
            == 0
        )
        small = ["--questions", "3", "--samples", "4", "--perplexity", "3"]
        assert tsne.main([str(out), *small, "--device", device]) == 0
        rows = run_folder.read_lines(out / "eval" / "rollouts.jsonl")
        texts[device] += [text for row in rows for text in row["texts"]]
    assert texts["cuda"] == texts["cpu"]


@needs_gpu
def test_a_run_whose_captures_fail_says_so_in_its_log(tmp_path, monkeypatch, capsys):
    while_capturing(monkeypatch, wait)
    out = tmp_path / "run"
    options = [*TINY_RUN, "--engine", "fast", "--max-new-tokens", "24", "--device", "cuda", "--steps", "2"]
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert train.main([*options, "--out", str(out)]) == 0
    rows = run_folder.read_lines(out / "metrics.jsonl")
    assert all("cannot be captured" in row["without_cuda_graphs"] for row in rows)
    assert train.main([*options, "--out", str(tmp_path / "other"), "--cuda-graphs"]) == 2
    assert "error: --cuda-graphs: a decode step cannot be captured" in capsys.readouterr().err


@needs_gpu
def test_a_warm_start_batch_on_a_gpu_is_one_forward_pass(monkeypatch):
    tokenizer = toy.make_tokenizer()
    model, passes = run_warm_start.make_model("tiny", tokenizer, 0).cuda(), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    run_warm_start.warm_start(model, tokenizer, 0, batches=2)
    assert len(passes) == 2
