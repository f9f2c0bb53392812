"""README.md and docs/: short enough, and everything that they name is there."""

import importlib
import importlib.util
import re
from pkgutil import resolve_name

import pytest
from conftest import ROOT
from test_safety import TINY_RUN

import eval as evaluation
import train
import tsne
from run import settings as run_settings

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FOR_CLASSES = [ROOT / "exercises" / name for name in ("README.md", "teacher.md")]
OURS = "border|clipo|config|variants|tasks|run|engine|lab"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def paper_to_code():
    """The table that leads from the paper to the code."""
    return README.read_text().split("## From the paper to the code")[1].split("\n\n")[1]


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1400


def test_there_are_six_pages():
    assert [page.stem for page in PAGES[1:]] == ["extend", "promises", "real-models", "results", "speed", "worlds"]


@pytest.mark.parametrize("page", [*PAGES, *FOR_CLASSES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link for link in links if not link.startswith("http")]
    assert inside
    for link in inside:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", [*PAGES, *FOR_CLASSES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands_and_files_exist(page):
    text = page.read_text()
    for module in re.findall(r"(?:python3?|launch)\s+-m\s+([a-z_][\w.]*)", text):
        if module != "pytest":
            assert importlib.util.find_spec(module), module
    files = re.findall(r"`([\w./]+\.py)`", text) + re.findall(r"python\s+([\w./]+\.py)", text)
    folders = [ROOT, ROOT / "exercises", ROOT / "exercises" / "01_group_advantage"] if page in FOR_CLASSES else [ROOT]
    for file in {*files, *re.findall(r"pytest ([\w/]+\.py)", text)}:
        assert any((folder / file).exists() for folder in folders), file


@each_page
def test_commands_have_options_that_exist(page):
    parsers = {"train": run_settings.parser(), "eval": evaluation.parser(), "tsne": tsne.parser()}
    for program, line in re.findall(r"python (train|eval|tsne)\.py([^`\n#]*)", page.read_text()):
        options = set(re.findall(r"--[a-z][\w-]*", line))
        assert options <= set(parsers[program]._option_string_actions), line


@each_page
def test_names_in_the_code_exist(page):
    text = page.read_text()
    names = re.findall(rf"`((?:{OURS})\.[\w.]+)`", text)
    names += [f"{module.replace('/', '.')}.{name}" for module, name in re.findall(r"`([\w/]+)\.py`, `(\w+)`", text)]
    for name in names:
        assert name.endswith(".py") or resolve_name(name) is not None, name


def test_the_map_names_functions_and_options_of_train():
    names = [name for name in re.findall(r"`([\w.]+)`", paper_to_code()) if not name.startswith("-")]
    assert len(names) > 20
    for name in names:
        assert resolve_name(name) is not None, name
    options = re.findall(r"--[a-z][\w-]*", paper_to_code())
    assert len(options) > 5 and set(options) <= set(run_settings.parser()._option_string_actions)


@pytest.mark.parametrize("option, value", re.findall(r"(--[a-z-]+) ([\w.]+)", paper_to_code()))
def test_what_the_map_gives_to_options_is_accepted(option, value):
    assert run_settings.parser().parse_args([option, value])


# ----------------------------------------------------------------------------------------------------
# What the pages tell to type, typed: what takes seconds
# ----------------------------------------------------------------------------------------------------


def told(*words):
    """The lines of README and docs/ to be typed that hold these words, without their comments."""
    text = "\n".join(page.read_text() for page in PAGES)
    lines = {line.strip().partition("  #")[0].strip() for line in text.splitlines()}
    lines |= {" ".join(command.split()) for command in re.findall(r"`(python [^`]+)`", text)}
    found = sorted(line for line in lines if line.startswith("python ") and all(word in line for word in words))
    assert found, words
    return found


def typed(line):
    """Its status, run here: `python x.py ...` or `python -m x.y ...`."""
    program, *arguments = line.removeprefix("python ").removeprefix("-m ").split()
    return importlib.import_module(program.removesuffix(".py")).main(arguments)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A folder with runs/toy and runs/toy-grpo of two steps, evaluated on some stories."""
    folder = tmp_path_factory.mktemp("typed")
    for name, weight in (("toy-grpo", ["--weight", "0"]), ("toy", [])):
        out = str(folder / "runs" / name)
        assert train.main([*TINY_RUN, *weight, "--steps", "2", "--device", "cpu", "--out", out]) == 0
        assert evaluation.main([out, "--limit", "5", "--device", "cpu"]) == 0
    return folder


@pytest.mark.parametrize(
    "words", [("run.page", "runs/toy "), ("eval.py", "--compare"), ("engine.memory",), ("lab.gpu", "--plan")]
)
def test_what_is_told_to_type_works(words, two_runs, monkeypatch, capsys):
    monkeypatch.chdir(two_runs)
    for line in told(*words):
        assert typed(line) == 0, line
        said = capsys.readouterr()
        assert said.out.strip() and "error" not in said.err
