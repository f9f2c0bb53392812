"""The exercises' checks: references pass, stubs and typical wrong answers fail with a message that helps."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from exercises import checking

FOLDER = ROOT / "exercises"
NAMES = sorted(folder.name for folder in FOLDER.iterdir() if folder.name[:2].isdigit())

# Answers to exercises 3, 6 and 10, with what is wrong left open.
CLIPPED = (
    "def clipped_surrogate(log_ratio, A, mask, low, high):\n    rho = log_ratio.exp()\n    return {surrogate}, {where}"
)
SURROGATE = "torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)"
WHERE = "((rho > 1 + high) & (A > 0)) | ((rho < 1 - low) & (A < 0))"
INFONCE = (
    "def infonce(z, pairs, tau=0.05):\n    s, me = z @ z.mT / tau, torch.eye(z.shape[1]).bool()\n"
    "    L = ({among}).logsumexp(-1) - (s * pairs.target).sum(-1)\n    return torch.where(pairs.anchor, L, 0.0)\n"
    "chance_level = lambda G: math.log(G - 1)\nfloor = lambda n: {floor}"
)
MINE = (
    "import variants\ndef my_loss(z, pairs, tau=0.05):\n    s = clipo.similarities(z, pairs, tau)\n"
    "    return torch.where(pairs.anchor, {}, 0.0)\n"
    "MINE = variants.ContrastiveLoss(my_loss, lambda positives, negatives: 0 * positives)"
)

WRONG = {  # exercise: (what is typical, part of what it is told)
    "01_group_advantage": [
        ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
         "    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True, unbiased=False) + eps)",
         "Bessel's correction divides by G - 1"),
        ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n    return (r - r.mean()) / (r.std() + eps)",
         "each prompt's group has its own"),
        ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
         "    return (r - r.mean(-1, keepdim=True)) / r.std(-1, keepdim=True)",
         "eps is missing: 0 / 0"),
        ("def group_advantages(r, *, scale_by_std=True, eps=1e-6):\n"
         "    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + eps)",
         "scale_by_std=False must leave the division out"),
    ],
    "02_kl": [
        ("SMALLEST = SMALLEST_AT = 0.0\ndef kl_k3(p, q):\n    return (p - q).exp() - (p - q) - 1", "upside down"),
        ("SMALLEST = SMALLEST_AT = 0.0\ndef kl_k3(p, q):\n    return p - q", "this is k1"),
        ("SMALLEST, SMALLEST_AT = 0.0, 1.0\ndef kl_k3(p, q):\n    return (q - p).exp() - (q - p) - 1",
         "SMALLEST_AT is 1.0; set the derivative"),
    ],
    "03_clipped_ratio": [
        (CLIPPED.format(surrogate="rho.clamp(1 - low, 1 + high) * A", where=WHERE), "min keeps the other one"),
        (CLIPPED.format(surrogate="torch.maximum(rho * A, rho.clamp(1 - low, 1 + high) * A)", where=WHERE),
         "max instead of min"),
        (CLIPPED.format(surrogate=SURROGATE, where="(rho > 1 + high) | (rho < 1 - low)"),
         "a bad answer that became likelier must still be pushed back"),
        (CLIPPED.replace(".exp()", "").format(surrogate=SURROGATE, where=WHERE), "log rho is taken for rho"),
        ("def clipped_surrogate(log_ratio, A, mask, low, high):\n    return log_ratio.exp() * A",
         "expected two tensors"),
    ],
    "04_decode_step": [
        ("def attend(q, k, v, cache):\n    keys, values = cache.update(k, v, 0)\n"
         "    return (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1) @ values",
         "slots that no token of the row is in"),
        ("def attend(q, k, v, cache):\n    keys, values = cache.update(k, v, 0)\n"
         "    hidden = (torch.arange(cache.slots) > cache.positions)[:, None, None]\n"
         "    return (q @ keys.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ values",
         "not divided by sqrt(W)"),
        ("def attend(q, k, v, cache):\n    keys, values = cache.layers[0]\n"
         "    hidden = (torch.arange(cache.slots) >= cache.positions)[:, None, None]\n"
         "    s = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)\n"
         "    return s.softmax(-1) @ values",
         "does not look at itself"),
        ("def attend(q, k, v, cache):\n    row, at = torch.arange(len(q)), cache.positions[:, 0]\n"
         "    keys, values = (store.clone() for store in cache.layers[0])\n"
         "    keys[row, :, at], values[row, :, at] = k[:, :, 0], v[:, :, 0]\n"
         "    hidden = (torch.arange(cache.slots) > cache.positions)[:, None, None]\n"
         "    s = (q @ keys.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)\n"
         "    return s.softmax(-1) @ values",
         "are not in the cache"),
        ("def decode_step(model, token, position, cache):\n"
         "    states = clipo.last_states(model, token[:, None], position[:, None] + 1, cache)\n"
         "    return clipo.output_logits(model, states[:, 0])",
         "position is the number of tokens before it"),
        ("def decode_step(model, token, position, cache):\n"
         "    states = clipo.last_states(model, token[:, None], position[:, None], clipo.KVCache(cache.slots))\n"
         "    return clipo.output_logits(model, states[:, 0])",
         "use the cache that is given"),
    ],
    "05_mean_pooling": [
        ("def pool(states, mask):\n    return (states * mask[..., None]).mean(2)", "it is divided by T"),
        ("def pool(states, mask):\n    return states.mean(2)", "the padding is in the mean"),
        ("def pool(states, mask):\n    return (states * mask[..., None]).sum(2) / mask.sum(-1, keepdim=True)",
         "0 times infinity is not 0"),
    ],
    "06_infonce": [
        (INFONCE.format(among="s", floor="math.log(n - 1)"), "the anchor itself is in the denominator"),
        (INFONCE.format(among="s.masked_fill(pairs.positive & ~pairs.target, -torch.inf).masked_fill(me, -torch.inf)",
                        floor="math.log(n - 1)"),
         "the other right answers are not in the denominator"),
        (INFONCE.replace(".logsumexp(-1)", ".exp().sum(-1).log()").format(
            among="s.masked_fill(me, -torch.inf)", floor="math.log(n - 1)"),
         "exp overflows"),
        (INFONCE.replace("torch.where(pairs.anchor, L, 0.0)", "L").format(
            among="s.masked_fill(me, -torch.inf)", floor="math.log(n - 1)"),
         "no anchors get 0"),
        (INFONCE.format(among="s.masked_fill(me, -torch.inf)", floor="0.0"),
         "not 0: the other right answers are in the denominator too"),
    ],
    "07_reward_cap": [
        ("EXPLANATION = 'b'\ndef contrastive_reward(L, pairs, *, weight=0.2, floor=-0.5):\n"
         "    return torch.where(pairs.anchor, (-weight * L).clamp(max=floor), 0.0)\n"
         "largest_group = lambda weight, floor: math.ceil(math.exp(-floor / weight))",
         "the cap is the wrong way round"),
        ("EXPLANATION = 'b'\ndef contrastive_reward(L, pairs, *, weight=0.2, floor=-0.5):\n"
         "    return (-weight * L).clamp(min=floor)\n"
         "largest_group = lambda weight, floor: math.ceil(math.exp(-floor / weight))",
         "no anchors get 0"),
        ("EXPLANATION = 'a'\ndef contrastive_reward(L, pairs, *, weight=0.2, floor=-0.5):\n"
         "    return torch.where(pairs.anchor, (-weight * L).clamp(min=floor), 0.0)\n"
         "largest_group = lambda weight, floor: int(math.exp(-floor / weight))",
         "largest_group(0.2, -0.5) is 12; expected 13"),
    ],
    "08_equal_rewards": [
        ("EXPLANATION = 'b'\ndef mean_size(size, scale_by_std):\n"
         "    R = 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))\n"
         "    return clipo.group_advantages(R, scale_by_std=scale_by_std).mean().item()",
         "this is the mean of A, which is always 0"),
        ("EXPLANATION = 'b'\ndef mean_size(size, scale_by_std):\n"
         "    R = 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))\n"
         "    return clipo.group_advantages(R).abs().mean().item()",
         "scale_by_std does not reach group_advantages"),
        ("EXPLANATION = 'a'\ndef mean_size(size, scale_by_std):\n"
         "    R = 1 + size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))\n"
         "    return clipo.group_advantages(R, scale_by_std=scale_by_std).abs().mean().item()",
         "EXPLANATION: without the std they do"),
    ],
    "09_lenient_checker": [
        ("EXPLANATION = 'b'\nfarmed_response = lambda q: '#### ' + q.split()[-1]", "with them this is a guess"),
        ("EXPLANATION = 'b'\nfarmed_response = lambda q: '3 + 4 = 7'", "calculates; a farmer does not work"),
        ("EXPLANATION = 'b'\nfarmed_response = lambda q: 'I do not know'", "who in the story says a number"),
    ],
    "10_own_loss": [
        (MINE.format("-(s * pairs.positive).sum(-1) / pairs.positive.sum(-1).clamp(min=1)"),
         "does not rise when a wrong answer comes closer"),
        (MINE.format("(s * pairs.negative).sum(-1)"), "does not fall when a positive comes closer"),
        (MINE.format("((s.exp() * pairs.negative).sum(-1) / (s.exp() * pairs.positive).sum(-1)).log()"),
         "exp(200) is infinite"),
        (MINE.format("s.logsumexp(-1) - s.masked_fill(~pairs.positive, -math.inf).logsumexp(-1)"),
         "the anchor's similarity to itself changes the loss"),
        (MINE.format("((s * pairs.negative).sum(-1) - (s * pairs.positive).sum(-1) / pairs.positive.sum(-1))"),
         "in groups without an anchor loss or gradient is not finite: one 0 / 0"),
        (MINE.format("2 + variants.soft_nn(z, pairs, tau)"), "(or it and a constant); invent another"),
        (MINE.format("(s * pairs.negative).sum(-1) - (s * pairs.positive).sum(-1)"), "my_chance, against my_loss of"),
    ],
}  # fmt: skip


def messages(exercise: str, answer: ModuleType) -> list[str]:
    """What its check says to an answer, a text for each test that fails."""
    (file,) = (FOLDER / exercise).glob("test_*.py")
    check, said = checking.load(file), []
    for name, test in inspect.getmembers(check, inspect.isfunction):
        if name.startswith("test_"):
            torch.manual_seed(0)
            try:
                test(answer)
            except (Exception, pytest.fail.Exception) as reason:
                said.append(f"{type(reason).__name__}: {reason}")
    return said


@pytest.mark.parametrize("exercise", NAMES)
def test_the_reference_passes(exercise):
    assert messages(exercise, checking.load(FOLDER / "solutions" / f"{exercise}.py")) == []


@pytest.mark.parametrize("exercise", NAMES)
def test_the_stub_fails_and_says_where_to_write(exercise):
    said = messages(exercise, checking.load(FOLDER / exercise / "answer.py"))
    assert said and any(f"in exercises/{exercise}/answer.py; hints.md helps" in text for text in said)
    assert (FOLDER / exercise / "hints.md").is_file()


@pytest.mark.parametrize("exercise, number", [(name, i) for name in NAMES for i in range(len(WRONG[name]))])
def test_a_typical_wrong_answer_is_told_what_is_wrong(exercise, number, tmp_path):
    source, expected = WRONG[exercise][number]
    (tmp_path / "answer.py").write_text(f"import math\nimport torch\nimport clipo\n{source}\n")
    said = messages(exercise, checking.load(tmp_path / "answer.py"))
    assert any(expected in text for text in said), said


def test_the_commands_of_a_student_and_of_a_teacher():
    def run(*arguments, **more):
        environment = {**os.environ, **more}
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    stub = run("pytest", "exercises/03_clipped_ratio")
    assert stub.returncode == 1
    assert "write clipped_surrogate in exercises/03_clipped_ratio/answer.py; hints.md helps" in stub.stdout
    assert "raise NotImplementedError" not in stub.stdout  # one line, no source code
    everything = run("pytest", "exercises", CLIPO_ANSWERS="exercises/solutions")
    assert everything.returncode == 0, everything.stdout
    plot = run("exercises.plots", "8")
    assert plot.returncode == 2 and plot.stderr.startswith("error: write mean_size in exercises/08")
    plot = run("exercises.plots")
    assert plot.returncode == 2 and plot.stderr == "error: nothing given; expected one of: 7, 8, 9, 10\n"


@pytest.mark.parametrize("number", ["7", "8", "9", "10"])
def test_the_plot_to_expect_is_what_the_reference_draws(number, monkeypatch, tmp_path):
    from exercises import plots

    folder = plots.PLOTS[number][0]
    monkeypatch.setenv("CLIPO_ANSWERS", str(FOLDER / "solutions"))
    monkeypatch.setattr(plots, "HERE", tmp_path)
    (tmp_path / folder).mkdir()
    assert plots.main([number]) == 0
    assert (tmp_path / folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (FOLDER / folder / "expected.png").is_file()


def shown_commands():
    """The commands under the questions of the lesson plan."""
    questions = (FOLDER / "README.md").read_text().split("## Questions that come up")[1]
    return [line.strip() for line in questions.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("command", shown_commands())
def test_every_question_has_a_command_that_works(command):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\bno tests ran\b|\b0 selected\b", done.stdout) and done.stdout.strip()


def test_the_lesson_plan_names_every_exercise_in_order():
    plan = (FOLDER / "README.md").read_text().split("## Words")[0]
    assert re.findall(r"\]\((\d\d_\w+)\)", plan) == NAMES and len(NAMES) == 10
