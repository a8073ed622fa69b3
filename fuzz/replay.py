"""Runs inputs again, one after the other: ``python -m fuzz.replay FILE...``

Which harness they are for is told by their folder in the corpora, by their name (that of a crash
begins with it), or by --as.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import build
from .harnesses import HARNESSES, Harness, Kind


def harness_of(path: Path) -> Harness:
    for name in (path.name.partition("-")[0], path.resolve().parent.name):
        for harness in HARNESSES.values():
            if name in {harness.name, harness.corpus_name}:
                return harness
    sys.exit(f"{path}: its name tells no harness; use --as")


def replay(harness: Harness, paths: Sequence[Path]) -> None:
    """Ends with whatever an input ends with."""
    if harness.kind is Kind.C:
        with tempfile.TemporaryDirectory() as folder:
            program = build.program(harness.name, build.Purpose.REPLAY, Path(folder))
            if subprocess.run([program, *paths], check=False).returncode:
                sys.exit(1)
    elif harness.kind is Kind.PYTHON:
        one_input = import_module(f"fuzz.{harness.name}").one_input
        for path in paths:
            print(path, flush=True)
            one_input(path.read_bytes())
    else:
        _replay_live(paths)


def _replay_live(paths: Sequence[Path]) -> None:
    from .live import Live
    from .traffic import describe, parse

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Live(Path(folder)) as live:
        for path in paths:
            print(path, flush=True)
            records = parse(path.read_bytes())
            if len(paths) == 1:
                print("\n".join(map(describe, records)), flush=True)
            live.run(records)
        live.inspect()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz.replay", description=__doc__)
    parser.add_argument("--as", dest="harness", choices=HARNESSES, help="the harness")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    by_harness: dict[str, list[Path]] = {}
    for path in chosen.files:
        by_harness.setdefault(chosen.harness or harness_of(path).name, []).append(path)
    for name, paths in by_harness.items():
        replay(HARNESSES[name], paths)


if __name__ == "__main__":
    main()
