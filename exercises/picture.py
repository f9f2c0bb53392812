"""The picture of the playground for README.md and the slides, taken in a real browser.

    python -m exercises.picture            writes docs/playground.png
    python -m exercises.picture FILE       or another file

Needs playwright (pip) and a Chromium (Debian: apt install chromium).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from border import UserError, status_of

HERE = Path(__file__).parent


def chromium() -> str | None:
    """The browser of this machine, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def take(file: Path) -> None:
    """Open the playground at its first preset and write what it shows. Raises UserError."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as reason:
        raise UserError("playwright is missing, which opens the page; pip install playwright") from reason
    if not (found := chromium()):
        raise UserError("no Chromium here, to open the page in; Debian: apt install chromium")
    file.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 600}, color_scheme="light")
        page.goto((HERE / "playground.html").as_uri())
        page.get_by_role("button", name="1 Agreement").click()
        page.add_style_tag(content="main p.soft { display: none }")  # the explanations are for readers of the page
        file.write_bytes(page.screenshot(full_page=True))
        browser.close()
    print(file)


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(f"error: {' '.join(arguments)} given; expected one file to write, or nothing", file=sys.stderr)
        return 2
    return status_of(lambda: take(Path(arguments[0]) if arguments else HERE.parent / "docs" / "playground.png"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
