"""The slides: made of slides.md, with what results/ holds; turned by keys in a real browser."""

import json
import re

import pytest
from conftest import ROOT

from exercises import deck

SLIDES = (ROOT / "exercises" / "slides.md").read_text(encoding="utf-8")


@pytest.fixture
def written(tmp_path, capsys):
    file = tmp_path / "new" / "deck.html"
    assert deck.main([str(file)]) == 0 and capsys.readouterr().out == f"{file}\n"
    return file


def test_every_slide_has_its_title_and_its_notes(written):
    sections = re.findall(r"<section>(.*?)</section>", written.read_text(encoding="utf-8"), re.S)
    assert len(sections) == SLIDES.count("\n---\n") + 1 == 12
    assert all(part.count("<h1>") == 1 and part.count("<aside>") == 1 for part in sections)


def test_a_figure_is_in_the_file_or_is_named(written):
    text = written.read_text(encoding="utf-8")
    figures = re.findall(r"^!\[.+\]\((.+)\)$", SLIDES, re.M)
    drawn = [figure for figure in figures if (ROOT / "exercises" / figure).exists()]
    assert len(figures) == 5 and text.count("data:image/png;base64,") == len(drawn)
    assert text.count("class=missing") == len(figures) - len(drawn)
    assert "{measured}" not in text and not re.search(r'(src|href)="(?!data:|https://arxiv)', text)


def test_the_numbers_are_those_of_track1(tmp_path, monkeypatch):
    monkeypatch.setattr(deck, "TRACK1", tmp_path / "track1.json")
    assert "Not measured yet" in deck.measured()
    lied = {"start": 0.78, "grpo": 0.011, "clipo": 0.816, "shuffled": 0.02, "oracle": 0.85, "diff": 0.805}
    lied |= {"low": 0.7, "high": 0.91, "seeds": 3, "held": {"GRPO": 0, "CLIPO": 3}}
    deck.TRACK1.write_text(json.dumps({"liar": lied}))
    said = deck.measured()
    assert "60 steps, mean of 3 seeds: start 78%, GRPO 1%, CLIPO 82%." in said
    assert (
        "Difference +80 points, 95% interval 70 to 91." in said and "GRPO from 0 of 3 starts, CLIPO from 3 of 3" in said
    )
    assert "dealt out at random: 2%. An oracle that sees every step: 85%." in said


@pytest.mark.parametrize("width, height", [(1280, 720), (1280, 800), (1366, 768), (1920, 1080)])
def test_every_slide_fits_on_a_projector_with_its_notes_and_without(written, open_page, width, height):
    page = open_page(written)
    page.set_viewport_size({"width": width, "height": height})
    for notes in (False, True):
        for number in range(1, 13):
            page.goto(f"file://{written}#{number}")
            page.reload()
            if notes:
                page.keyboard.press("n")
            boxes = page.evaluate(
                "[...document.querySelector('section.now').children].map(child => [child.tagName, "
                "child.getBoundingClientRect().bottom, child.getBoundingClientRect().height])"
            )
            assert max(bottom for _, bottom, _ in boxes) <= height, (number, notes)
            assert notes or all(tall > 0.3 * height for tag, _, tall in boxes if tag == "IMG"), number


def test_a_mistake_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments in (["a", "b"], ["--help-me"], [str(tmp_path / "file" / "deck.html")]):
        assert deck.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_keys_turn_the_slides(written, open_page):
    page = open_page(written)
    title = page.locator("section.now h1")
    first = title.inner_text()
    page.keyboard.press("ArrowRight")
    assert title.inner_text() != first and page.locator("#where").inner_text() == "2 of 12"
    assert not page.locator("section.now aside").is_visible()
    page.keyboard.press("n")
    assert page.locator("section.now aside").is_visible()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.locator("#where").inner_text() == "12 of 12"
