"""The rooms: arrows run one way, scripts are thin, and what is read is what runs."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import ROOT

import clipo

ROOMS = [  # lowest first; a file may import from lower rooms, and from its own
    {"border"},
    {"config"},
    {"clipo"},
    {"variants", "tasks"},
    {"engine"},
    {"run"},
    {"train", "eval", "tsne", "lab", "exercises"},
]
SCRIPTS = {"train", "eval", "tsne"}
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
LINES = {"train.py": 160, "eval.py": 220, "tsne.py": 200, "clipo.py": 620}
FILES = sorted(
    file
    for name in RANK
    for file in ([ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).rglob("*.py"))
    if "unwritten" not in file.parts
)


def room_of(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file):
    """(module, name) of all that a file imports; name None for a whole module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_arrow_runs_up_and_a_file_is_short(file):
    mine = room_of(file)
    for module, name in imports(file):
        other = module.split(".")[0]
        if other in RANK and other != mine:
            allowed = RANK[other] < RANK[mine] or (mine in ("lab", "exercises") and other in SCRIPTS)
            assert allowed, f"{file.name} imports {module}"
            assert other not in SCRIPTS or name is None, f"{file.name} takes {name} from {other}.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LINES.get(file.name, 500)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_but_main_is_taken_from_a_script(file):
    names = {"train": "train", "eval": "evaluation", "tsne": "tsne"}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in names.values() and node.value.id in imported:
                assert node.attr in ("main", "__name__"), f"{file.name}, line {node.lineno}"


def test_no_imports_go_round_in_a_circle():
    def name_of(file):
        return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    files = {name_of(file): file for file in FILES}
    wanted = {
        name: {
            target
            for module, part in imports(file)
            for target in (module, f"{module}.{part}")
            if target in files and target != name
        }
        for name, file in files.items()
    }
    for name in wanted:  # a package's page of words is no arrow
        wanted[name] -= {room for room in ("tasks", "run", "engine", "lab", "lab.attack", "exercises") if room != name}
    done = set()
    while ready := [name for name, needs in wanted.items() if name not in done and needs <= done]:
        done.update(ready)
    assert done == set(files), f"in a circle: {sorted(set(files) - done)}"


def test_the_plain_text_is_plain():
    """Its head comes early, and each of its functions fits on a screen."""
    text = (ROOT / "clipo.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("class ContrastiveHead")) <= 230
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - docstring <= 45, node.name


def test_the_training_loop_stands_on_train_pys_first_hundred_lines():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    assert any("log.step(scored)" in line for line in lines[:100])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


WATCHED = """
import json, sys
import clipo, train
from pathlib import Path

entered, deepest = set(), {}

def watch(frame, event, _):
    if event != "call":
        return
    code = frame.f_code
    if code.co_filename == clipo.__file__:
        entered.add(code.co_qualname)
        for inner, outer in (("CLIPO.step", "main"), ("generate", "CLIPO.roll_out")):
            if code.co_qualname == inner and inner not in deepest:
                names, at = [], frame.f_back
                while at and at.f_code.co_qualname != outer:
                    names.append(at.f_code.co_qualname)
                    at = at.f_back
                deepest[inner] = names if at else None

sys.setprofile(watch)
status = train.main(sys.argv[1:])
sys.setprofile(None)
Path("found.json").write_text(json.dumps([status, sorted(entered), deepest]))
"""


def test_the_papers_settings_run_the_papers_lines(tmp_path):
    """Two steps of `train.py --paper` enter every function of clipo.py, and few others lie on the way there."""
    import json

    options = (
        "--paper --engine plain --steps 2 --warm-start-batches 5 --head-warmup-steps 0 --prompts-per-step 4 "
        "--mini-batch-prompts 4 --test-stories 0 --device cpu --out run"
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *options.split()], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status, entered, deepest = json.loads((tmp_path / "found.json").read_text())
    assert status == 0
    functions = {
        function.__qualname__
        for holder in (clipo, *(c for c in vars(clipo).values() if inspect.isclass(c) and c.__module__ == "clipo"))
        for part in vars(holder).values()
        for function in [inspect.unwrap(part.fget if isinstance(part, property) else part)]
        if inspect.isfunction(function) and function.__code__.co_filename == clipo.__file__
    }
    assert len(functions) > 30
    assert functions - set(entered) == set()
    assert len(deepest["CLIPO.step"]) <= 4 and len(deepest["generate"]) <= 2, deepest


def test_a_virtual_environment_in_the_repository_is_not_ours():
    """README puts it there; a test's forked command must find its packages."""
    packages = ROOT / ".venv" / "lib" / "python3.11" / "site-packages"
    assert [processes.is_ours(place) for place in (ROOT, ROOT / "tests", packages, Path("/usr/lib"))] == [1, 1, 0, 0]
