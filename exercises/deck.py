"""The slides of the two-hour class as one HTML file: exercises/slides.md with the figures and numbers of results/.

    python -m exercises.deck            writes runs/deck.html
    python -m exercises.deck FILE       or another file

Arrow keys turn the slides, N shows the speaker's notes (what stands behind > in slides.md). A print-out has them all.
"""

from __future__ import annotations

import base64
import html
import json
import re
import sys
import textwrap
from pathlib import Path

from border import status_of

HERE = Path(__file__).parent
TRACK1 = HERE.parent / "results" / "track1.json"


def measured() -> str:
    """What the result's slide says: paragraphs of slides.md, from results/track1.json."""
    if not TRACK1.exists():
        return "Not measured yet: `python -m lab.paper track1`"
    lied = json.loads(TRACK1.read_text(encoding="utf-8"))["liar"]
    arm = {name: f"{100 * lied[name]:.0f}%" for name in ("start", "grpo", "clipo", "shuffled", "oracle")}
    held = {name: f"{lied['held'][name]} of {lied['seeds']}" for name in ("GRPO", "CLIPO")}
    return (
        f"Right answers where the friend is wrong, 60 steps, mean of {lied['seeds']} seeds: start {arm['start']}, GRPO "
        f"{arm['grpo']}, CLIPO {arm['clipo']}. Difference {100 * lied['diff']:+.0f} points, 95% interval "
        f"{100 * lied['low']:.0f} to {100 * lied['high']:.0f}. No worse than ten points below the start: GRPO from "
        f"{held['GRPO']} starts, CLIPO from {held['CLIPO']}.\n\n"
        f"The same rewards, dealt out at random: {arm['shuffled']}. An oracle that sees every step: {arm['oracle']}."
    )


def inline(text: str) -> str:
    """Links, *emphasis* and `code`.

    >>> inline("*who* is `a < b`?")
    '<em>who</em> is <code>a &lt; b</code>?'
    """
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"(?<!!)\[(.+?)\]\((https?:.+?)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text))


def picture(alt: str, path: str) -> str:
    file = (HERE / path).resolve()
    if not file.exists():
        return f"<p class=missing>Not drawn yet: {html.escape(path.removeprefix('../'))} ({html.escape(alt)})</p>"
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def block(text: str) -> str:
    """One paragraph of slides.md: a title, code, a picture, notes or text."""
    if text.startswith("    "):
        return f"<pre>{html.escape(textwrap.dedent(text))}</pre>"
    if shown := re.fullmatch(r"!\[(.*)\]\((.*)\)", text):
        return picture(*shown.groups())
    words = " ".join(line.removeprefix(">").strip() for line in text.splitlines())
    if text.startswith("# "):
        return f"<h1>{inline(words[2:])}</h1>"
    return f"<aside>{inline(words)}</aside>" if text.startswith(">") else f"<p>{inline(words)}</p>"


def page() -> str:
    text = (HERE / "slides.md").read_text(encoding="utf-8").replace("{measured}", measured())
    slides = ["".join(map(block, re.split(r"\n\n+", slide.strip("\n")))) for slide in text.split("\n---\n")]
    sections = "\n".join(f"<section>{slide}</section>" for slide in slides)
    return (HERE / "deck.html").read_text(encoding="utf-8").replace("<!-- SLIDES -->", sections)


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(), encoding="utf-8")
    print(file)


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(f"error: {' '.join(arguments)} given; expected one file to write, or nothing", file=sys.stderr)
        return 2
    return status_of(lambda: write(Path(arguments[0]) if arguments else HERE.parent / "runs" / "deck.html"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
