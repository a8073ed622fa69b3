"""The picture of the README: what ``ninepd demo`` says, as a terminal shows it.

``python contrib/demo_picture.py [--uml]`` runs it, and writes docs/demo.svg.
"""

import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Final

PICTURE: Final = Path(__file__).parent.parent / "docs/demo.svg"
_COLOURS: Final = {
    "$": "#ffffff",
    "guest#": "#8ae234",
    "host#": "#fcaf3e",
    "ok:": "#34e2e2",
    "FAILED:": "#ef2929",
}
"""By the first word of a line."""
_USUAL: Final = "#d3d7cf"
_ROW, _COLUMN, _EDGE = 18, 7.9, 16
"""Pixels: of a line, of a character, around all of it."""


def main() -> int:
    """Exit status 1 if the demo has failed; then there is no new picture."""
    command = [sys.executable, "-m", "ninepd", "demo", *sys.argv[1:]]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return 1
    PICTURE.write_text(drawn(["$ ninepd demo", *result.stdout.splitlines()]))
    return 0


def drawn(lines: list[str]) -> str:
    """An SVG of these lines."""
    width = round(max(map(len, lines)) * _COLUMN + 2 * _EDGE)
    height = len(lines) * _ROW + 2 * _EDGE
    texts = "".join(
        f'<text x="{_EDGE}" y="{_EDGE + row * _ROW - 4}" fill="{_colour(line)}">'
        f"{escape(line, quote=False)}</text>\n"
        for row, line in enumerate(lines, 1)
        if line
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'xml:space="preserve" font-family="monospace" font-size="13">\n'
        "<title>A guest works on a directory of the host</title>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="#2e3436"/>\n{texts}</svg>\n'
    )


def _colour(line: str) -> str:
    words = line.split()
    return _COLOURS.get(words[0], _USUAL) if words else _USUAL


if __name__ == "__main__":
    sys.exit(main())
