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

WRONG = {  # exercise: (what is typical, part of what it is told)
    "01_group_advantage": [
        ("def group_advantages(r, eps=1e-6):\n"
         "    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True, unbiased=False) + eps)",
         "Bessel's correction divides by G - 1"),
        ("def group_advantages(r, eps=1e-6):\n    return (r - r.mean()) / (r.std() + eps)",
         "each prompt's group has its own"),
        ("def group_advantages(r, eps=1e-6):\n    return (r - r.mean(-1, keepdim=True)) / r.std(-1, keepdim=True)",
         "eps is missing: 0 / 0"),
    ],
    "02_kl": [
        ("SMALLEST = SMALLEST_AT = 0.0\ndef kl_k3(p, q):\n    return (p - q).exp() - (p - q) - 1", "upside down"),
        ("SMALLEST = SMALLEST_AT = 0.0\ndef kl_k3(p, q):\n    return p - q", "this is k1"),
        ("SMALLEST, SMALLEST_AT = 0.0, 1.0\ndef kl_k3(p, q):\n    return (q - p).exp() - (q - p) - 1",
         "SMALLEST_AT is 1.0; set the derivative"),
    ],
    "03_clipped_ratio": [
        ("def surrogate(rho, A, low, high):\n    return rho.clamp(1 - low, 1 + high) * A\n"
         "def gradient_is_zero(rho, A, low, high):\n"
         "    return ((rho > 1 + high) & (A > 0)) | ((rho < 1 - low) & (A < 0))",
         "min keeps the other one"),
        ("def surrogate(rho, A, low, high):\n    return torch.maximum(rho * A, rho.clamp(1 - low, 1 + high) * A)\n"
         "def gradient_is_zero(rho, A, low, high):\n"
         "    return ((rho > 1 + high) & (A > 0)) | ((rho < 1 - low) & (A < 0))",
         "max instead of min"),
        ("def surrogate(rho, A, low, high):\n    return torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)\n"
         "def gradient_is_zero(rho, A, low, high):\n    return (rho > 1 + high) | (rho < 1 - low)",
         "a bad answer that became likelier must still be pushed back"),
    ],
    "04_decode_step": [
        ("def decode_step(q, k, v, keys, values, length):\n    row = torch.arange(len(length))\n"
         "    keys[row, :, length], values[row, :, length] = k, v\n"
         "    w = (torch.einsum('bhw,bhsw->bhs', q, keys) / q.shape[-1] ** 0.5).softmax(-1)\n"
         "    return torch.einsum('bhs,bhsw->bhw', w, values)",
         "slots that no token of the row is in"),
        ("def decode_step(q, k, v, keys, values, length):\n    row = torch.arange(len(length))\n"
         "    keys[row, :, length], values[row, :, length] = k, v\n"
         "    hidden = torch.arange(keys.shape[2]) > length[:, None]\n"
         "    s = torch.einsum('bhw,bhsw->bhs', q, keys).masked_fill(hidden[:, None], -torch.inf)\n"
         "    return torch.einsum('bhs,bhsw->bhw', s.softmax(-1), values)",
         "not divided by sqrt(W)"),
        ("def decode_step(q, k, v, keys, values, length):\n    row = torch.arange(len(length))\n"
         "    new = keys.clone(), values.clone()\n    new[0][row, :, length], new[1][row, :, length] = k, v\n"
         "    hidden = torch.arange(keys.shape[2]) > length[:, None]\n"
         "    s = torch.einsum('bhw,bhsw->bhs', q, new[0]) / q.shape[-1] ** 0.5\n"
         "    return torch.einsum('bhs,bhsw->bhw', s.masked_fill(hidden[:, None], -torch.inf).softmax(-1), new[1])",
         "are not in the cache"),
    ],
    "05_mean_pooling": [
        ("def pool(states, mask):\n    return (states * mask[..., None]).mean(1)", "it is divided by T"),
        ("def pool(states, mask):\n    return states.mean(1)", "the padding is in the mean"),
        ("def pool(states, mask):\n    return (states * mask[..., None]).sum(1) / mask.sum(-1, keepdim=True)",
         "0 times infinity is not 0"),
    ],
    "06_infonce": [
        ("def infonce(z, i, j, tau=0.05):\n    s = z @ z[i] / tau\n    return s.logsumexp(0) - s[j]\n"
         "chance_level = lambda G: math.log(G - 1)\nfloor = lambda n: math.log(n - 1)",
         "the anchor itself is in the denominator"),
        ("def infonce(z, i, j, tau=0.05):\n    s = z @ z[i] / tau\n"
         "    return s[torch.arange(len(z)) != i].exp().sum().log() - s[j]\n"
         "chance_level = lambda G: math.log(G - 1)\nfloor = lambda n: math.log(n - 1)",
         "exp overflows"),
        ("def infonce(z, i, j, tau=0.05):\n    s = z @ z[i] / tau\n"
         "    return s[torch.arange(len(z)) != i].logsumexp(0) - s[j]\n"
         "chance_level = lambda G: math.log(G - 1)\nfloor = lambda n: 0.0",
         "not 0: the other right answers are in the denominator too"),
    ],
    "07_reward_cap": [
        ("EXPLANATION = 'b'\ndef contrastive_reward(L, anchors, weight=0.2, floor=-0.5):\n"
         "    return torch.where(anchors, (-weight * L).clamp(max=floor), 0.0)\n"
         "largest_group = lambda weight, floor: math.ceil(math.exp(-floor / weight))",
         "the cap is the wrong way round"),
        ("EXPLANATION = 'b'\ndef contrastive_reward(L, anchors, weight=0.2, floor=-0.5):\n"
         "    return (-weight * L).clamp(min=floor)\n"
         "largest_group = lambda weight, floor: math.ceil(math.exp(-floor / weight))",
         "no anchors get 0"),
        ("EXPLANATION = 'a'\ndef contrastive_reward(L, anchors, weight=0.2, floor=-0.5):\n"
         "    return torch.where(anchors, (-weight * L).clamp(min=floor), 0.0)\n"
         "largest_group = lambda weight, floor: int(math.exp(-floor / weight))",
         "largest_group(0.2, -0.5) is 12; expected 13"),
    ],
    "08_equal_rewards": [
        ("EXPLANATION = 'b'\ndef mean_size(size, scale_by_std):\n"
         "    R = 1 + size * torch.randn(16, generator=torch.Generator().manual_seed(0))\n"
         "    return clipo.group_advantages(R, torch.zeros(16).long(), scale_by_std=scale_by_std).mean().item()",
         "this is the mean of A, which is always 0"),
        ("EXPLANATION = 'b'\ndef mean_size(size, scale_by_std):\n"
         "    R = 1 + size * torch.randn(16, generator=torch.Generator().manual_seed(0))\n"
         "    return clipo.group_advantages(R, torch.zeros(16).long()).abs().mean().item()",
         "scale_by_std does not reach group_advantages"),
        ("EXPLANATION = 'a'\ndef mean_size(size, scale_by_std):\n"
         "    R = 1 + size * torch.randn(16, generator=torch.Generator().manual_seed(0))\n"
         "    return clipo.group_advantages(R, torch.zeros(16).long(), scale_by_std=scale_by_std).abs().mean().item()",
         "EXPLANATION: without the std they do"),
    ],
    "09_lenient_checker": [
        ("EXPLANATION = 'b'\nfarmed_response = lambda q: '#### ' + q.split()[-1]", "with them this is a guess"),
        ("EXPLANATION = 'b'\nfarmed_response = lambda q: '3 + 4 = 7'", "calculates; a farmer does not work"),
        ("EXPLANATION = 'b'\nfarmed_response = lambda q: 'I do not know'", "who in the story says a number"),
    ],
    "10_own_loss": [
        ("def my_loss(s, target, positive, negative):\n    return -(s * target).sum(-1) / target.sum(-1)",
         "does not rise when a wrong answer comes closer"),
        ("def my_loss(s, target, positive, negative):\n"
         "    return ((s.exp() * negative).sum(-1) / (s.exp() * target).sum(-1)).log()",
         "exp(200) is infinite"),
        ("import clipo\ndef my_loss(s, target, positive, negative):\n"
         "    return 2 + clipo.soft_nn(s, target, positive, negative)",
         "(or it and a constant); invent another"),
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


@pytest.mark.parametrize("exercise, number", [(name, i) for name in NAMES for i in range(3)])
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
    assert "write surrogate in exercises/03_clipped_ratio/answer.py; hints.md helps" in stub.stdout
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
