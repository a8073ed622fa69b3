"""How much of ninepd the corpora reach, by lines: ``python -m fuzz.coverage``

Of C by gcov, over all harnesses together; of Python by coverage.py, in a tree that is interpreted.
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import build
from .harnesses import BUILD, HARNESSES, ROOT, Harness, Kind

FOLDER: Final = BUILD / "coverage"
PYTHON: Final = (
    "ninepd/p9/*",
    "ninepd/vhostuser/*",
    "ninepd/ops/*",
    "ninepd/export/*",
    "ninepd/answers.py",
    "ninepd/framing.py",
    "ninepd/frontend.py",
    "ninepd/pipeline.py",
)
"""What is reported: where outside bytes go."""


def inputs(harness: Harness) -> list[Path]:
    """Those of the tree, and what was found on this machine."""
    return [p for folder in (harness.corpus, harness.found) for p in sorted(folder.glob("*"))]


def _run(command: Sequence[str | Path], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def lines_of_c() -> dict[str, dict[int, bool]]:
    """By file and line of code: was it reached?"""
    reached: dict[str, dict[int, bool]] = defaultdict(dict)
    for harness in HARNESSES.values():
        if harness.kind is not Kind.C:
            continue
        folder = FOLDER / harness.name
        program = build.program(harness.name, build.Purpose.COVERAGE, folder)
        _run([program, *inputs(harness)], folder)
        _run(["gcov", *folder.glob("*.gcda")], folder)
        for report in folder.glob("_*.c.gcov"):
            for line in report.read_text().splitlines():
                count, number, _ = line.split(":", 2)
                if count.strip() != "-" and number.strip() != "0":
                    lines = reached[report.name.removesuffix(".gcov")]
                    hit = not count.strip().startswith(("#", "="))
                    lines[int(number)] = lines.get(int(number), False) or hit
    return reached


def report_c() -> None:
    print(f"{'C':28}{'lines':>7}{'reached':>9}")
    for name, lines in sorted(lines_of_c().items()):
        hit = sum(lines.values())
        print(f"{'ninepd/' + name:28}{len(lines):>7}{hit:>9}  {100 * hit / len(lines):.0f}%")


def report_python() -> None:
    tree = build.interpreted_tree(FOLDER / "tree")
    environment = os.environ | {"PYTHONPATH": str(tree), "COVERAGE_FILE": str(FOLDER / "data")}
    tool = [sys.executable, "-m", "coverage"]
    for harness in HARNESSES.values():
        if harness.kind is Kind.PYTHON:
            replay = ["-m", "fuzz.replay", "--as", harness.name, *map(str, inputs(harness))]
            subprocess.run(
                [*tool, "run", "--append", "--include=ninepd/*", *replay],
                cwd=tree,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )
    report = [*tool, "report", f"--include={','.join(PYTHON)}"]
    subprocess.run(report, cwd=tree, env=environment, check=True)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "data").unlink(missing_ok=True)
    os.chdir(ROOT)
    report_c()
    report_python()


if __name__ == "__main__":
    main()
