"""A student's copy of the exercises, without the answers; and an exercise put back to its beginning.

python -m exercises.student OUT                               makes the copy and tries it
python -m exercises.student --reset exercises/06_infonce      answer.py as it was at first; yours stays as answer.py.bak
python -m exercises.student --reset FOLDER                    the same for all exercises of a folder

The copy holds what the exercises need and no more. Where a task asks for a function of clipo.py or variants.py, its
body is not there. So the copy cannot train, and has no train.py: for that, and for the notebook, students need the
repository.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from border import OptionParser, UserError, status_of
from exercises.checking import EXERCISES, HERE

UNWRITTEN = HERE / "unwritten"
ROOMS = [f"{name}.py" for name in ("border", "clipo", "config", "variants")]
TASKS = [f"tasks/{file.name}" for file in sorted((HERE.parent / "tasks").glob("*.py"))]
SHARED = ["__init__.py", "checking.py", "conftest.py", "playground.html", "plots.py", "requirements.txt", "student.py"]
ASKED = {  # the functions whose bodies are not in the copy, and the exercise that asks for each
    "clipo.py": {
        "group_advantages": "01_group_advantage",
        "kl_k3": "02_kl",
        "clipped_surrogate": "03_clipped_ratio",
        "infonce": "06_infonce",
        "contrastive_reward": "07_reward_cap",
    },
    "variants.py": {"reward": "11_two_changes"},
}
CENTRING = "hidden = hidden - hidden.mean(1, keepdim=True)"  # a line of clipo.py; exercise 11 asks for it too
README = """# Exercises

The exercises of a readable implementation of CLIPO ([arXiv:2603.10101](https://arxiv.org/abs/2603.10101)).
[`exercises/README.md`](exercises/README.md) says in which order. In this folder:

    python3 -m venv .venv && .venv/bin/pip install -r exercises/requirements.txt && source .venv/bin/activate
    python -m pytest exercises/01_group_advantage      # fails, and says what to write where

You write `exercises/*/answer.py`, and hand in these files in their folders. `clipo.py` is the method, to read beside
the paper; where a task asks for one of its functions, its body is not here. What the texts name and this folder has
not (the notebook, `train.py`, `lab/`, `docs/`) is in the repository. To begin an exercise again:

    python -m exercises.student --reset exercises/01_group_advantage      # yours stays beside it, as answer.py.bak
"""


# ----------------------------------------------------------------------------------------------------
# The copy
# ----------------------------------------------------------------------------------------------------


def make(out: Path) -> None:
    """Write the copy into a new or empty folder. Raises UserError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; expected a new folder, or an empty one")
    root = HERE.parent
    for name in ["LICENSE", *ROOMS, *TASKS]:
        text = (root / name).read_text(encoding="utf-8")
        text = text.replace(CENTRING, 'raise NotImplementedError("centring is what exercises/11_two_changes asks for")')
        write(out / name, without_bodies(text, ASKED[name]) if name in ASKED else text)
    write(out / "README.md", README)
    for name in SHARED:
        write(out / "exercises" / name, (HERE / name).read_text(encoding="utf-8"))
    for exercise in EXERCISES:
        (out / "exercises" / exercise).mkdir(parents=True)
        for file in (
            *HERE.glob(f"{exercise}/test_*.py"),
            HERE / exercise / "hints.md",
            HERE / exercise / "expected.png",
        ):
            if file.exists():
                shutil.copyfile(file, out / "exercises" / exercise / file.name)
        for place in (f"{exercise}/answer.py", f"unwritten/{exercise}.py"):
            write(out / "exercises" / place, (UNWRITTEN / f"{exercise}.py").read_text(encoding="utf-8"))
    plan = (HERE / "README.md").read_text(encoding="utf-8").split("## For the teacher")[0]
    plan = plan.replace("-r requirements.txt", "-r exercises/requirements.txt")
    write(out / "exercises" / "README.md", without_dead_links(plan, out / "exercises"))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def without_bodies(source: str, asked: dict[str, str]) -> str:
    """A module's text in which these functions keep their first lines and docstrings only.

    >>> print(without_bodies("def f(x):\\n    'twice'\\n    return 2 * x\\n", {"f": "00_twice"}))
    def f(x):
        'twice'
        raise NotImplementedError("f is what exercises/00_twice asks for")
    """
    lines = source.splitlines()
    functions = [part for part in ast.parse(source).body if isinstance(part, ast.FunctionDef) and part.name in asked]
    for function in reversed(functions):
        said = f'    raise NotImplementedError("{function.name} is what exercises/{asked[function.name]} asks for")'
        lines[function.body[0].end_lineno : function.end_lineno] = [said]
    return "\n".join([*lines, ""])


def without_dead_links(text: str, folder: Path) -> str:
    """Links to what the copy does not have become plain text."""

    def kept(link: re.Match) -> str:
        there = link[2].startswith("http") or (folder / link[2].partition("#")[0]).exists()
        return link[0] if there else link[1]

    return re.sub(r"\[([^]]+)\]\(([^)\s]+)\)", kept, text)


def try_out(out: Path) -> int:
    """Run the copy's checks as a student would: each must ask for its answer. How many there are; raises UserError."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CLIPO_ANSWERS", "PYTHONPATH")}
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "exercises"]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    counted = re.search(r"^(\d+) failed in", done.stdout, re.M)
    silent = [name for name in EXERCISES if f"in exercises/{name}/answer.py; hints.md helps" not in done.stdout]
    if not counted or silent or "Error" in done.stdout:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise UserError(
            f"the copy in {out} does not work: {', '.join(silent) or 'a check'} does not ask for its answer "
            f"({' '.join(last)}); look at python -m pytest exercises there"
        )
    return int(counted[1])


# ----------------------------------------------------------------------------------------------------
# Back to the beginning
# ----------------------------------------------------------------------------------------------------


def reset(folder: Path) -> list[str]:
    """Put the answers of an exercise's folder, or of all in a folder, back. What was done, a line each; UserError."""
    places = [folder] if folder.resolve().name in EXERCISES else exercises_in(folder)
    if not folder.is_dir() or not places:
        raise UserError(f"{folder} is no exercise and holds none; expected a folder like exercises/{EXERCISES[0]}")
    said = []
    for place in places:
        answer, text = place / "answer.py", (UNWRITTEN / f"{place.resolve().name}.py").read_text(encoding="utf-8")
        if answer.exists() and answer.read_bytes() == text.encode():
            said.append(f"{answer} is unwritten already")
            continue
        kept = f"{answer} is unwritten again"
        if answer.exists():
            answer.rename(beside := unused(answer))
            kept += f"; what was in it is in {beside.name}"
        answer.write_bytes(text.encode())
        said.append(kept)
    return said


def exercises_in(folder: Path) -> list[Path]:
    """The exercises' folders that a folder holds, or its folder `exercises`."""
    for root in (folder, folder / "exercises"):
        if found := [root / name for name in EXERCISES if (root / name).is_dir()]:
            return found
    return []


def unused(answer: Path) -> Path:
    """answer.py.bak, or answer.py.bak2, ... if that is there already."""
    beside, count = answer.with_name("answer.py.bak"), 1
    while beside.exists():
        count += 1
        beside = answer.with_name(f"answer.py.bak{count}")
    return beside


def main(arguments: list[str]) -> int:
    parser = OptionParser(prog="python -m exercises.student", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="OUT", help="where to write the copy; or what to put back")
    parser.add_argument("--reset", action="store_true", help="put the answers of an exercise, or of a folder, back")
    given = parser.parse_args(arguments)

    def command() -> None:
        if given.reset:
            print("\n".join(reset(given.folder)))
            return
        make(given.folder)
        print(f"{given.folder}: {len(EXERCISES)} exercises, {try_out(given.folder)} checks, each asks for its answer")

    return status_of(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
