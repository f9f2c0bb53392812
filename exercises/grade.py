"""Grade students' answers: a table of marks, then what each is told. Nothing in the students' folders is changed.

python -m exercises.grade FOLDER                   a student's folder, or a folder of students' folders
python -m exercises.grade FOLDER --csv marks.csv   the marks for a spreadsheet too

A student's folder has 01_group_advantage/answer.py and so on, as in exercises/, or an `exercises` folder that has. A
mark is the number of checks that pass. Every answer runs in a process of its own, with a time limit, in a student's
copy: there clipo.py has no function that a task asks for. It is a program of somebody else, and has your rights: if you
do not know whose it is, grade in a container or as another user.

A mark can be forged. An answer is imported where its checks run, because they look at its tensors and gradients; so it
can change the checks, or write the results itself. Where a mark counts, read the answer too.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from border import OptionParser, UserError, one_line_for_ctrl_c, status_of
from exercises.checking import EXERCISES
from exercises.student import exercises_in, make

LONGEST = 800  # characters of a message that are shown


class Mark(NamedTuple):
    """What one answer gets."""

    passed: int
    checks: int
    messages: list[str]  # of the checks that fail
    missing: bool = False


# ----------------------------------------------------------------------------------------------------
# One answer
# ----------------------------------------------------------------------------------------------------


def checks_of(copy: Path, exercise: str) -> list[str]:
    """The names of an exercise's checks."""
    (file,) = (copy / "exercises" / exercise).glob("test_*.py")
    return re.findall(r"^def (test_\w+)\(answer\)", file.read_text(encoding="utf-8"), re.M)


def mark(copy: Path, exercise: str, answer: Path, limit: float) -> Mark:
    """Check one answer, in the copy and in a process of its own."""
    names = checks_of(copy, exercise)
    if not answer.is_file():
        return Mark(0, len(names), [f"{exercise}/answer.py is missing"], missing=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        mine, results = Path(place) / "answer.py", Path(place) / "results"
        try:
            shutil.copyfile(answer, mine)
        except OSError as reason:
            return Mark(0, len(names), [f"{exercise}/answer.py cannot be read: {reason.strerror}"])
        ended = run([exercise, str(mine), str(results)], copy, place, limit)
        said = dict(read(results))
    messages = [f"{name.removeprefix('test_')}: {said.get(name, ended)}" for name in names if said.get(name, ended)]
    passed = sum(name in said and said[name] is None for name in names)
    if len(messages) > 1 and len({message.partition(": ")[2] for message in messages}) == 1:  # the same for all
        messages = [messages[0].partition(": ")[2]]
    return Mark(passed, len(names), [readable(message) for message in messages])


def run(arguments: list[str], copy: Path, place: str, limit: float) -> str:
    """The child: `exercises.checking`, in the copy. What to say of the checks that it leaves out."""
    environment = {k: v for k, v in os.environ.items() if k != "CLIPO_ANSWERS" and not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        [sys.executable, "-B", "-m", "exercises.checking", *arguments],
        cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        status = child.wait(limit)
        return (
            f"the process ended before this check was over (status {status}): does the answer end it, or change torch?"
        )
    except subprocess.TimeoutExpired:
        return f"no result after {limit:g} seconds: does a loop of the answer never end?"
    finally:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # and what the answer started
        child.kill()
        child.wait()


def read(results: Path) -> Iterable[tuple[str, str | None]]:
    """The lines that the child wrote, as far as it came."""
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines() if results.is_file() else ():
        with suppress(ValueError, TypeError):
            name, message = json.loads(line)
            yield str(name), None if message is None else str(message)


def readable(message: str) -> str:
    """A message for a terminal: not too long, and without characters that a terminal obeys."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in message)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


# ----------------------------------------------------------------------------------------------------
# All of them
# ----------------------------------------------------------------------------------------------------


def students_in(folder: Path) -> dict[str, Path]:
    """Each student's name and the folder that holds the exercises' folders. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected a student's folder, or a folder of them")
    if own := exercises_in(folder):
        return {folder.resolve().name: own[0].parent}
    folders = sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] not in "._")
    found = {each.name: exercises_in(each) for each in folders}
    if not any(found.values()):
        raise UserError(f"{folder} has no answers; expected {EXERCISES[0]}/answer.py in it, or in folders of it")
    # (Of a student who handed in nothing that looks like an exercise, all is missing.)
    return {each.name: found[each.name][0].parent if found[each.name] else each for each in folders}


def grade(students: dict[str, Path], limit: float, jobs: int) -> dict[str, list[Mark]]:
    """The marks of each student, an exercise each."""
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as pool:
        make(copy := Path(place) / "copy")
        waiting = {
            name: [pool.submit(mark, copy, each, root / each / "answer.py", limit) for each in EXERCISES]
            for name, root in students.items()
        }
        marks = {}
        try:
            for name, each in waiting.items():
                marks[name] = [one.result() for one in each]
                print(f"graded: {name}, {len(marks)} of {len(students)}", file=sys.stderr)
        except BaseException:  # Ctrl-C, say: those under way end by their limit
            pool.shutdown(cancel_futures=True)
            raise
    return marks


def table(marks: dict[str, list[Mark]]) -> str:
    """Students by exercises: checks that pass, of how many; a dash where the file is missing."""
    head = ["", *(str(int(name[:2])) for name in EXERCISES), "sum"]
    rows = [
        [student, *("-" if one.missing else f"{one.passed}/{one.checks}" for one in each), total(each)]
        for student, each in marks.items()
    ]
    wide = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        [row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))]
        for row in [head, *rows]
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def total(each: list[Mark]) -> str:
    return f"{sum(one.passed for one in each)}/{sum(one.checks for one in each)}"


def messages(marks: dict[str, list[Mark]]) -> str:
    """What each student is told, an exercise after the other."""
    lines = []
    for student, each in marks.items():
        wrong = [(name, one) for name, one in zip(EXERCISES, each, strict=True) if one.messages]
        lines += ["", student] if wrong else []
        for name, one in wrong:
            said = [message.replace("\n", "\n      ") for message in one.messages]
            lines += [f"  {said[0]}"] if one.missing else [f"  {name}", *(f"    {message}" for message in said)]
    return "\n".join(lines)


def write_csv(file: Path, marks: dict[str, list[Mark]]) -> None:
    """A row for each student: how many checks pass. ("3/4" would be a date to many a spreadsheet.)"""
    counts = [one.checks for one in next(iter(marks.values()))]
    head = [f"{name} (of {count})" for name, count in zip(EXERCISES, counts, strict=True)]
    with open(file, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["student", *head, f"sum (of {sum(counts)})"])
        for student, each in marks.items():
            passed = [one.passed for one in each]
            rows.writerow([student, *passed, sum(passed)])


def main(arguments: list[str]) -> int:
    parser = OptionParser(prog="python -m exercises.grade", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a student's folder, or a folder of them")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the marks there too")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="time of an answer (default: 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="answers at once (default: a core each)")
    given = parser.parse_args(arguments)

    def command() -> None:
        if not 0 < given.limit < 1e6:
            raise UserError(f"--limit is {given.limit:g}; expected a number of seconds above 0")
        if given.jobs < 1:
            raise UserError(f"--jobs is {given.jobs}; expected 1 or more")
        students = students_in(given.folder)
        if given.csv:
            with open(given.csv, "a", encoding="utf-8"):
                pass  # said now if it cannot be written, not after all is graded
        marks = grade(students, given.limit, given.jobs)
        print(table(marks))
        if told := messages(marks):
            print(told)
        if given.csv:
            write_csv(given.csv, marks)

    return status_of(command)


if __name__ == "__main__":
    one_line_for_ctrl_c()
    sys.exit(main(sys.argv[1:]))
