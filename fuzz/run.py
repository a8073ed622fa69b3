"""Fuzzes for a time, on two CPUs, and says what came of it: ``python -m fuzz.run --help``."""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from . import build
from .harnesses import BUILD, CRASHES, HARNESSES, ROOT, Harness, Kind

JOBS: Final = 2
_STATISTIC: Final = re.compile(r"^stat::(\w+):\s*(\d+)", re.MULTILINE)
_COVERAGE: Final = re.compile(r"(?:INITED|NEW|DONE) .*?cov: (\d+)")
"""After the corpora, then whenever it grows."""
_NOTE: Final = re.compile(r"^note: (.*)", re.MULTILINE)
_FAST: Final = "quarantine_size_mb=1:malloc_context_size=0:detect_leaks=0"
"""For AddressSanitizer: three times as fast. A replay tells all that this leaves out."""


class Outcome(NamedTuple):
    harness: Harness
    executions: int
    seconds: float
    coverage: int
    new_coverage: int
    kept: int
    crashes: tuple[str, ...]
    note: str

    def __str__(self) -> str:
        rate = self.executions / self.seconds if self.seconds else 0
        line = (
            f"{self.harness.name:9}{self.executions:>11} executions {rate:>9.1f}/s   coverage "
            f"{self.coverage} (+{self.new_coverage})   {self.kept} inputs kept   "
            f"{len(self.crashes)} crashes"
        )
        return f"{line}\n          {self.note}" if self.note else line


def _command(harness: Harness, seconds: int) -> tuple[list[str], dict[str, str]]:
    environment = dict(os.environ)
    if harness.kind is Kind.LIVE:
        return [sys.executable, "-m", "fuzz.soak", str(seconds)], environment
    options = [
        str(harness.found),
        str(harness.corpus),
        f"-max_total_time={seconds}",
        f"-max_len={harness.max_len}",
        f"-artifact_prefix={CRASHES}/{harness.name}-",
        "-print_final_stats=1",
        "-timeout=60",
    ]
    if harness.kind is Kind.C:
        environment["ASAN_OPTIONS"] = _FAST
        return [str(BUILD / "c" / harness.name), *options], environment
    environment["PYTHONPATH"] = str(BUILD / "tree")
    return [sys.executable, "-m", "fuzz.guide", harness.name, *options], environment


def fuzz(harness: Harness, seconds: int) -> Outcome:
    """One harness, until its time is over or it crashes."""
    command, environment = _command(harness, seconds)
    harness.found.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{harness.name}.log"
    where = BUILD / "tree" if harness.kind is Kind.PYTHON else ROOT
    begun, start = time.time(), time.monotonic()
    with log.open("wb") as output:
        status = subprocess.run(
            command, cwd=where, env=environment, stdout=output, stderr=output, check=False
        ).returncode
    text = log.read_text(errors="replace")
    statistics = {name: int(value) for name, value in _STATISTIC.findall(text)}
    coverage = [int(value) for value in _COVERAGE.findall(text)] or [0]
    saved = sorted(CRASHES.glob(f"{harness.name}-*"))
    # Those of earlier runs are left where they are: they may be mended by now.
    crashes = tuple(str(path) for path in saved if path.stat().st_mtime >= begun)
    if status and not crashes:
        crashes = (f"none was saved, see {log}",)
    note = _NOTE.search(text)
    return Outcome(
        harness,
        statistics.get("number_of_executed_units", 0),
        time.monotonic() - start,
        coverage[-1],
        coverage[-1] - coverage[0],
        statistics.get("new_units_added", 0),
        crashes,
        note.group(1) if note else "",
    )


def run(harnesses: Sequence[Harness], seconds: int) -> list[Outcome]:
    """All of them in so many seconds."""
    CRASHES.mkdir(parents=True, exist_ok=True)
    for harness in harnesses:
        if harness.kind is Kind.C:
            build.program(harness.name, build.Purpose.FUZZ, BUILD / "c")
    build.interpreted_tree(BUILD / "tree")
    jobs = min(JOBS, len(harnesses))
    shares = sum(harness.share for harness in harnesses)
    times = [max(seconds * jobs * harness.share // shares, 1) for harness in harnesses]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(fuzz, harnesses, times))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="in all (default: 600)")
    parser.add_argument("--only", choices=HARNESSES, action="append", help="may be repeated")
    chosen = parser.parse_args()
    harnesses = [HARNESSES[name] for name in chosen.only or HARNESSES]
    print(f"fuzzing for {chosen.seconds} s: {', '.join(h.name for h in harnesses)}", flush=True)
    outcomes = run(harnesses, chosen.seconds)
    for outcome in outcomes:
        print(outcome)
    crashes = [path for outcome in outcomes for path in outcome.crashes]
    for path in crashes:
        print(f"crash: {path}\n  replay it with: make fuzz-replay FILE={path}")
    print(f"{sum(outcome.executions for outcome in outcomes)} executions in all")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
