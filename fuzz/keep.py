"""Puts inputs that were found into the tree: ``python -m fuzz.keep NAME [FOLDER]``

The fewest that reach all that those of the tree and of the folder do. The folder is what ``make
fuzz`` left, if it is not named. Nothing that is in the tree is taken out.
"""

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from . import build
from .harnesses import BUILD, HARNESSES, Harness, Kind

Arc = tuple[str, int, int]


class _Arcs:
    """What of ninepd an input passes through: pairs of lines, one after the other."""

    def __init__(self) -> None:
        self.passed: set[Arc] = set()

    def __call__(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "/ninepd/" not in name:
            return None
        last = 0

        def line(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal last
            if event == "line":
                self.passed.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line


def arcs_of(harness: Harness, path: Path) -> set[Arc]:
    one_input = import_module(f"fuzz.{harness.name}").one_input
    arcs = _Arcs()
    sys.settrace(arcs)
    try:
        one_input(path.read_bytes())
    finally:
        sys.settrace(None)
    return arcs.passed


def keep_python(harness: Harness, folder: Path) -> None:
    kept: set[Arc] = set()
    for path in harness.corpus.iterdir():
        kept |= arcs_of(harness, path)
    found = sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    arcs = {path: arcs_of(harness, path) - kept for path in found}
    while arcs:
        best = max(arcs, key=lambda path: len(arcs[path]))
        if not arcs[best]:
            break
        shutil.copy(best, harness.corpus)
        kept |= arcs.pop(best)
        arcs = {path: passed - kept for path, passed in arcs.items()}


def main() -> None:
    harness = HARNESSES[sys.argv[1]]
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else harness.found
    before = len(list(harness.corpus.iterdir()))
    if harness.kind is Kind.C:
        program = build.program(harness.name, build.Purpose.FUZZ, BUILD / "c")
        # By edges: with the counts of how often each was passed ten times as many would be kept.
        merge = ["-set_cover_merge=1", "-use_counters=0", f"-max_len={harness.max_len}"]
        subprocess.run([program, *merge, harness.corpus, folder], check=True)
    elif harness.kind is Kind.PYTHON:
        keep_python(harness, folder)
    else:
        sys.exit("what live finds is kept by: python -m fuzz.keep engine FOLDER")
    print(f"{len(list(harness.corpus.iterdir())) - before} inputs kept")


if __name__ == "__main__":
    main()
