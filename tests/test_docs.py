"""README.md and docs/: short enough, and everything that they name is there."""

import importlib.util
import re
from pkgutil import resolve_name

import pytest
from conftest import ROOT

import eval as evaluation
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
    assert len(README.read_text().split()) <= 1500


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
