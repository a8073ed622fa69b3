"""Measures, keeps the raw data, and writes the report. ``python -m bench.run --help``."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from ninepd_guests.cache import say
from ninepd_guests.errors import GuestError

from . import footprint, qemu, ring, stalls, uml
from .figures import Sample, Section, table
from .setting import HERE, PLANS, Setting, host, setting

KINDS: Final[dict[str, ModuleType]] = {
    "ring": ring,
    "stalls": stalls,
    "footprint": footprint,
    "uml": uml,
    "qemu": qemu,
}
RESULTS: Final = os.path.join(os.path.dirname(HERE), "build", "bench")
Data = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, default="quick", help="how much to do")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind; may be repeated")
    parser.add_argument("--output", metavar="FOLDER", help="default: build/bench/TIME")
    parser.add_argument(
        "--report", metavar="FOLDER", help="measure nothing: write the report of this data again"
    )
    chosen = parser.parse_args()
    if chosen.report:
        with open(os.path.join(chosen.report, "data.json")) as file:
            data = json.load(file)
        folder = chosen.report
    else:
        folder = chosen.output or os.path.join(RESULTS, time.strftime("%Y%m%d-%H%M%S"))
        os.makedirs(folder, exist_ok=True)
        data = measure(chosen.plan, chosen.only or list(KINDS), folder)
    write_report(data, folder)
    sys.stdout.write(f"{os.path.join(folder, 'report.md')}\n")
    return 0


def measure(plan: str, kinds: list[str], folder: str) -> Data:
    """Raw data is written after each kind, so that what was measured is kept."""
    data: Data = {"plan": plan, "host": host(), "samples": {}, "notes": [], "seconds": {}}
    for kind in kinds:
        say(f"bench: {kind}")
        start = time.monotonic()
        with setting(PLANS[plan]) as place:
            data["samples"][kind] = _samples(kind, place)
            data["notes"] += place.notes
        data["seconds"][kind] = round(time.monotonic() - start, 1)
        with open(os.path.join(folder, "data.json"), "w") as file:
            json.dump(data, file, indent=1)
    return data


def _samples(kind: str, place: Setting) -> list[Sample]:
    measure_kind: Callable[[Setting], list[Sample]] = KINDS[kind].measure
    try:
        return measure_kind(place)
    except GuestError as error:
        # The other kinds may still work on this host.
        place.skip(f"{kind} was not measured: {error}")
        return []


def write_report(data: Data, folder: str) -> None:
    sections: list[Section] = []
    for kind, samples in data["samples"].items():
        report: Callable[[list[Sample]], list[Section]] = KINDS[kind].report
        sections += report(samples) if samples else []
    for section in sections:
        for name, image in section.charts.items():
            with open(os.path.join(folder, name), "w") as file:
                file.write(image)
    with open(os.path.join(folder, "report.md"), "w") as file:
        file.write(_markdown(data, sections))


def _markdown(data: Data, sections: list[Section]) -> str:
    about = data["host"]
    load = ", ".join(f"{value:.2f}" for value in about["load"])
    parts = [
        f"# Benchmarks of ninepd ({data['plan']})",
        (
            f"{about['time']}; {about['cpus']} x {about['cpu']}; Linux {about['kernel']}; Python "
            f"{about['python']}; load average at the start: {load}."
        ),
        "Medians; ± is the wider quartile. Ratios are taken within each round, side by side.",
        "## Targets",
        table(
            ["what", "wanted", "measured", "met"],
            [target.row for section in sections for target in section.targets],
        ),
    ]
    if data["notes"]:
        parts += ["Left out:", "\n".join(f"- {note}" for note in dict.fromkeys(data["notes"]))]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
    took = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in data["seconds"].items())
    parts.append(f"Time taken: {took}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
