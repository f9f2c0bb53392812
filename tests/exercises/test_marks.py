"""Grading students' folders, a student's copy, and an exercise put back to its beginning."""

import csv
import os
import shutil
import time

import processes
import pytest
from conftest import ROOT

from exercises import grade, student
from exercises.checking import EXERCISES

FOLDER = ROOT / "exercises"
RIGHT = {name: (FOLDER / "solutions" / f"{name}.py").read_text() for name in EXERCISES}
CHECKS = {name: len(grade.checks_of(ROOT, name)) for name in EXERCISES}


def hand_in(folder, answers):
    for name, text in answers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "answer.py").write_text(text)
    return folder


def tree(folder):
    """Every file and what it holds."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    student.make(out := tmp_path_factory.mktemp("copy") / "out")
    return out


# ----------------------------------------------------------------------------------------------------
# Grading
# ----------------------------------------------------------------------------------------------------


def test_a_class_is_graded(tmp_path, capsys):
    """A good student, a partly wrong one, one with missing files. (Three exercises each: they take seconds.)"""
    few = ("01_group_advantage", "02_kl", "05_mean_pooling")
    hand_in(tmp_path / "class" / "ann", {name: RIGHT[name] for name in few})
    wrong = {
        "01_group_advantage": RIGHT["01_group_advantage"].replace("(rewards.std", "(rewards.var"),
        "02_kl": "from clipo import kl_k3\n",
    }
    hand_in(tmp_path / "class" / "bob" / "exercises", {**{name: RIGHT[name] for name in few}, **wrong})
    (tmp_path / "class" / "eve").mkdir()
    before = tree(tmp_path)
    assert grade.main([str(tmp_path / "class"), "--csv", str(tmp_path / "marks.csv")]) == 0
    assert {file: text for file, text in tree(tmp_path).items() if file.name != "marks.csv"} == before
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:4]}
    full = [f"{CHECKS[name]}/{CHECKS[name]}" if name in few else "-" for name in EXERCISES]
    every = sum(CHECKS.values())
    assert rows["ann"] == [*full, f"{sum(CHECKS[name] for name in few)}/{every}"]
    assert rows["bob"][:2] == ["2/5", "0/5"] and rows["bob"][4] == full[4]  # equal rewards, and no std, are right
    assert rows["eve"] == ["-"] * len(EXERCISES) + [f"0/{every}"]
    assert "divides by the variance" in out and "  06_infonce/answer.py is missing" in out
    assert "  02_kl\n    kl_k3 is what exercises/02_kl asks for" in out  # nobody passes by calling clipo.py
    table = list(csv.reader((tmp_path / "marks.csv").open()))
    assert table[0][:2] == ["student", "01_group_advantage (of 5)"] and table[1][:3] == ["ann", "5", "5"]
    assert [row[-1] for row in table[1:]] == [str(sum(CHECKS[name] for name in few)), "6", "0"]


@pytest.mark.parametrize(
    "answer, passed, said",
    [
        ("def kl_k3(p, q):\n    while True:\n        pass\n", 0, "no result after 4 seconds"),
        ("def kl_k3(p, q:\n", 0, "answer.py, line 1: def kl_k3(p, q:\nSyntaxError"),
        ("import sys\nsys.exit(0)\n", 0, "the answer ends the program"),
        ("import os\nos._exit(0)\n", 0, "the process ended before this check was over (status 0)"),
        ("import ctypes\nctypes.string_at(0)\n", 0, "the process ended before this check was over (status -"),
        ("raise KeyboardInterrupt\n", 0, "answer.py, line 1, in <module>: raise KeyboardInterrupt"),
        ("input()\n" + RIGHT["02_kl"], 0, "EOFError"),
        ("def kl_k3(p, q):\n    raise ValueError('\\x1b[2J' + 'x' * 10**6)\n", 0, "ValueError: ?[2Jxxx"),
        (
            "print('x' * 10**7)\nimport torch\ntorch.set_grad_enabled(False)\n" + RIGHT["02_kl"],
            4,
            "no gradient reaches",
        ),
        ("import subprocess\nsubprocess.Popen(['sleep', '600'])\n" + RIGHT["02_kl"], 5, None),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()\n" + RIGHT["02_kl"], 5, None),
        ("open('answer.py', 'a').write('broken')\n" + RIGHT["02_kl"], None, None),
    ],
    ids="hangs syntax exit _exit crashes interrupt input much prints process thread writes".split(),
)
def test_an_answer_may_do_anything(answer, passed, said, copy, tmp_path):
    """It gets its mark and its message, in time, and its file stays as it was."""
    hand_in(tmp_path, {"02_kl": answer})
    start = time.monotonic()
    mark = grade.mark(copy, "02_kl", tmp_path / "02_kl" / "answer.py", limit=4 if "while" in answer else 120)
    assert time.monotonic() - start < 60
    assert mark.checks == 5 and passed in (None, mark.passed)
    assert said is None or any(said in text for text in mark.messages), mark.messages
    assert all(len(text) < 1000 and "\x1b" not in text for text in mark.messages)
    assert (tmp_path / "02_kl" / "answer.py").read_text() == answer
    assert [file.name for file in (tmp_path / "02_kl").iterdir()] == ["answer.py"]


def test_one_answer_does_not_spoil_the_next(copy, tmp_path):
    hand_in(
        tmp_path, {"01_group_advantage": "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.mean = None\n"}
    )
    hand_in(tmp_path, {"02_kl": RIGHT["02_kl"]})
    first, second = (grade.mark(copy, name, tmp_path / name / "answer.py", 120) for name in EXERCISES[:2])
    assert first.passed == 0 and "has no group_advantages" in first.messages[0] and len(first.messages) == 1
    assert second.passed == second.checks


def test_one_student_or_many(tmp_path):
    hand_in(tmp_path / "class" / "ann", {"02_kl": ""})
    hand_in(tmp_path / "class" / "class" / "exercises", {"02_kl": ""})
    (tmp_path / "class" / ".git").mkdir()
    (tmp_path / "class" / "notes.txt").touch()
    many = grade.students_in(tmp_path / "class")
    assert {name: root.relative_to(tmp_path).as_posix() for name, root in many.items()} == {
        "ann": "class/ann",
        "class": "class/class/exercises",
    }
    assert list(grade.students_in(tmp_path / "class" / "ann")) == ["ann"]
    assert grade.students_in(ROOT) == {ROOT.name: FOLDER}


def test_a_teachers_mistakes_get_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    ann = str(hand_in(tmp_path / "ann", {"02_kl": ""}))
    for arguments, said in (
        ([tmp_path / "none"], "is no folder; expected a student's folder"),
        ([tmp_path / "file"], "is no folder; expected a student's folder"),
        ([tmp_path / "empty"], "has no answers; expected 01_group_advantage/answer.py in it"),
        ([ann, "--limit", "0"], "--limit is 0; expected a number of seconds above 0"),
        ([ann, "--jobs", "0"], "--jobs is 0; expected 1 or more"),
        ([ann, "--csv", tmp_path / "no" / "marks.csv"], "No such file or directory"),
    ):
        assert grade.main([str(each) for each in arguments]) == 2
        out, err = capsys.readouterr()
        assert said in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    for arguments in ([], ["--limit", "long", ann]):
        with pytest.raises(SystemExit) as ended:
            grade.main(arguments)
        assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


# ----------------------------------------------------------------------------------------------------
# The copy
# ----------------------------------------------------------------------------------------------------


def python(folder, *arguments, **more):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return processes.run("-B", *arguments, cwd=folder, env={**environment, **more})


def test_the_copy_is_made_and_tried(tmp_path):
    out = tmp_path / "new" / "copy"
    done = python(ROOT, "-m", "exercises.student", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == f"{out}: {len(EXERCISES)} exercises, {sum(CHECKS.values())} checks, each asks for its answer\n"
    )
    assert not list(out.rglob("__pycache__"))


def test_the_copy_has_no_answer(copy):
    text = "\n".join(file.read_text() for file in copy.rglob("*.py") if "test_" not in file.name)
    for name, functions in student.ASKED.items():
        for function, exercise in functions.items():
            assert text.count(f"{function} is what exercises/{exercise} asks for") == 1
        assert compile((copy / name).read_text(), name, "exec")
    assert (
        "centring is what exercises/11_two_changes asks for" in text
        and student.CENTRING in (ROOT / "clipo.py").read_text()
    )
    for name, solution in RIGHT.items():
        body = {line.strip() for line in solution.splitlines() if line.startswith("    ") and len(line.strip()) > 30}
        unwritten = (copy / "exercises" / name / "answer.py").read_text()
        stays = {
            line
            for line in body
            if line in unwritten or line.startswith(("loss: Tensor", '"""', "return torch.where(pairs.anchor, loss"))
        }
        assert not [line for line in body - stays if line in text], name
        assert unwritten == (FOLDER / name / "answer.py").read_text()
    names = {file.name for file in copy.rglob("*")}
    assert not names & {"solutions", "grade.py", "teacher.md", "slides.md", "one_step.ipynb", "tests", "train.py"}


def test_the_solutions_pass_in_the_copy(copy, tmp_path):
    """So the checks do not need what was taken out, nor do the plots."""
    done = python(copy, "-m", "pytest", "-p", "no:cacheprovider", "exercises", CLIPO_ANSWERS=str(FOLDER / "solutions"))
    assert done.returncode == 0, done.stdout
    mine = tmp_path / "copy"
    shutil.copytree(copy, mine)
    for number in ("7", "10"):
        done = python(mine, "-m", "exercises.plots", number, CLIPO_ANSWERS=str(FOLDER / "solutions"))
        assert done.returncode == 0 and "plot.png" in done.stdout, done.stderr


def test_the_copys_links_lead_somewhere(copy):
    import re

    for page in copy.rglob("*.md"):
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        assert all(link.startswith("http") or (page.parent / link).exists() for link in links), page
    plan = (copy / "exercises" / "README.md").read_text()
    assert "-r exercises/requirements.txt" in plan and (copy / "exercises" / "requirements.txt").is_file()
    assert "11_two_changes" in plan and "solutions" not in plan and "exercises.grade" not in plan


def test_a_copy_that_does_not_work_is_not_handed_out(copy, tmp_path):
    broken = tmp_path / "copy"
    shutil.copytree(copy, broken)
    (broken / "exercises" / "02_kl" / "answer.py").write_text(RIGHT["02_kl"])
    with pytest.raises(student.UserError, match="02_kl does not ask for its answer"):
        student.try_out(broken)


def test_mistakes_with_the_copy_get_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.txt").touch()
    (tmp_path / "file").touch()
    for arguments, said in (
        ([tmp_path / "full"], "is there already; expected a new folder, or an empty one"),
        ([tmp_path / "file"], "is there already"),
        ([tmp_path / "file" / "copy"], "expected a folder that can be written"),
        (["--reset", tmp_path / "none"], "is no exercise and holds none; expected a folder like exercises/01"),
        (["--reset", tmp_path / "full"], "is no exercise and holds none"),
        (["--reset", tmp_path / "01_group_advantage"], "is no exercise and holds none"),
    ):
        assert student.main([str(each) for each in arguments]) == 2
        out, err = capsys.readouterr()
        assert said in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["work.txt"]


# ----------------------------------------------------------------------------------------------------
# Back to the beginning
# ----------------------------------------------------------------------------------------------------


def test_reset_never_loses_a_students_work(tmp_path, capsys):
    folder = hand_in(
        tmp_path, {"01_group_advantage": "first", "02_kl": (FOLDER / "unwritten" / "02_kl.py").read_text()}
    )
    answer = folder / "01_group_advantage" / "answer.py"
    stub = (FOLDER / "unwritten" / "01_group_advantage.py").read_text()
    assert student.main(["--reset", str(answer.parent)]) == 0
    assert capsys.readouterr().out == f"{answer} is unwritten again; what was in it is in answer.py.bak\n"
    assert answer.read_text() == stub and answer.with_name("answer.py.bak").read_text() == "first"
    answer.write_text("second")
    assert student.main(["--reset", str(folder)]) == 0  # all that are there
    assert (
        "answer.py.bak2\n" in (said := capsys.readouterr().out)
        and f"{folder / '02_kl' / 'answer.py'} is unwritten already\n" in said
    )
    assert [answer.with_name(f"answer.py.{name}").read_text() for name in ("bak", "bak2")] == ["first", "second"]
    answer.unlink()
    assert student.main(["--reset", str(answer.parent)]) == 0 and answer.read_text() == stub
    assert sorted(file.name for file in answer.parent.iterdir()) == ["answer.py", "answer.py.bak", "answer.py.bak2"]


def test_reset_works_in_a_copy(copy, tmp_path):
    mine = tmp_path / "copy"
    shutil.copytree(copy, mine)
    (mine / "exercises" / "06_infonce" / "answer.py").write_text("mine")
    done = python(mine, "-m", "exercises.student", "--reset", "exercises/06_infonce")
    assert done.returncode == 0 and "answer.py.bak" in done.stdout, done.stderr
    assert python(mine, "-m", "exercises.student", "--reset", ".").stdout.count("is unwritten already\n") == len(
        EXERCISES
    )
