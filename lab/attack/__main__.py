"""`python -m lab.attack NAME [--quick]`, see lab/attack/__init__.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

NAMES = ("bits", "grader", "signals", "mistakes")


def main(arguments: Sequence[str]) -> int:
    """Runs one attack; its status, or 2 and a line where there is none of that name."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(f"usage: python -m lab.attack {{{','.join(NAMES)}}} [--quick]")
        return 0
    if name not in NAMES:
        print(f"error: {name!r} is no attack; expected {', '.join(NAMES)}", file=sys.stderr)
        return 2
    try:
        attack = importlib.import_module(f"lab.attack.{name}")
    except ModuleNotFoundError as missing:
        print(f"error: lab.attack.{name} cannot be imported: no module {missing.name}", file=sys.stderr)
        return 2
    return attack.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
