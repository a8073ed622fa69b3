"""The benchmarks run, in small, and produce data and a report that can be read."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import mount_options, ring, setting
from bench.figures import Bar, Samples, Spread, Target, bar_chart, geometric_mean, ratio, spread

ROOT = Path(__file__).parent.parent


def run(output: Path, *kinds: str) -> dict[str, Any]:
    """Measure as little as possible; the raw data."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    command = [sys.executable, "-m", "bench.run", "--plan", "tiny", "--output", str(output)]
    for kind in kinds:
        command += ["--only", kind]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{output / 'report.md'}\n"
    data: dict[str, Any] = json.loads((output / "data.json").read_text())
    return data


def check_report(output: Path, title: str) -> str:
    report = (output / "report.md").read_text()
    assert title in report
    for image in re.findall(r"!\[.*\]\((.*)\)", report):
        ET.parse(output / image)
    for block in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    return report


def test_ring(tmp_path: Path) -> None:
    data = run(tmp_path, "ring")
    samples = Samples(data["samples"]["ring"])
    for sample in samples.where(who="ring").all:
        assert sample["requests"] >= sample["operations"] > 0
        assert 0 < sample["p50_ns"] <= sample["p99_ns"] <= sample["p999_ns"] <= sample["max_ns"]
        assert sample["cpu_ns"] > 0
    assert samples.where(who="ring, guest asleep", what="getattr").all
    assert samples.where(who="ring, no indirect", what="getattr").all
    assert samples.where(who="bare", what="ping-pong").all
    report = check_report(tmp_path, "## Ring bench (tmpfs)")
    again = [sys.executable, "-m", "bench.run", "--report", str(tmp_path)]
    subprocess.run(again, cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "report.md").read_text() == report


def test_every_workload_of_the_ring(tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    tree = setting.ring_tree(str(tmp_path / "tree"))
    setting.many_files(tree, 3000)
    with setting.export(tree, str(tmp_path / "socket")) as server:
        for workload in (*ring.WORKLOADS, "list"):
            assert ring.bare(workload, tree, 2, 1)["operations"] > 0
            for depth in (1, 64):
                sample = ring.drive(server, workload, depth, 1, "--indirect")
                assert sample["operations"] >= depth, workload
    assert os.listdir(f"{tree}/a") == ["b"]
    assert not [name for name in os.listdir(tree) if name.startswith("new")]


def test_stalls(tmp_path: Path) -> None:
    data = run(tmp_path, "stalls")
    if data["notes"]:
        pytest.skip(data["notes"][0])
    assert {(sample["where"], sample["who"]) for sample in data["samples"]["stalls"]} == {
        (where, who) for where in ("FUSE", "frozen disk") for who in ("calm", "stalled")
    }
    check_report(tmp_path, "## Stalls")


def test_footprint(tmp_path: Path) -> None:
    data = run(tmp_path, "footprint")
    samples = Samples(data["samples"]["footprint"])
    assert samples.where(what="idle").all[0]["wake_ups_per_second"] >= 0
    assert all(sample["ms"] > 0 for sample in samples.where(what="start").all)
    check_report(tmp_path, "## Footprint")


def test_figures() -> None:
    assert spread([]) is None
    assert spread([4]) == Spread(4, 4, 4)
    assert spread([1, 2, 3, 4, 5]) == Spread(2, 3, 4)
    assert str(Spread(90, 100, 105)) == "100 ±10%"
    assert geometric_mean([]) is None
    assert geometric_mean([1, 4]) == pytest.approx(2)


def test_ratios_are_taken_within_rounds() -> None:
    def samples(*operations: int) -> Samples:
        return Samples({"round": i, "operations": n, "ns": 1} for i, n in enumerate(operations))

    assert ratio(samples(10, 200, 30), samples(5, 100)) == Spread(2, 2, 2)


def test_a_target_that_was_not_measured_is_not_met() -> None:
    assert Target.at_least("speed", 10, 10).met is True
    assert Target.at_most("time", 10, 11, " ms").row == ("time", "≤ 10 ms", "11.0 ms", "**no**")
    assert Target.at_most("time", 10, None).met is None


def test_a_chart_is_well_formed() -> None:
    bars = [Bar("<a> & b", "x", Spread(1, 2, 3)), Bar("c", "y", Spread(10_000, 10_000, 10_000))]
    ET.fromstring(bar_chart("t", bars, "1/s"))


def test_mount_options_are_compared_within_a_round() -> None:
    """The second mount did twice as much in each round, the third something else in each."""
    samples = Samples(
        {"who": who, "round": turn, "what": "read", "operations": done, "ns": 10**9}
        for turn in range(3)
        for who, done in (("a", 7 + turn), ("b", 14 + 2 * turn), ("c", 7 * 10**turn))
    )
    table = mount_options.render(samples, ["a", "b", "c"])
    assert table.splitlines()[0] == "|  | `a` | `b` | `c` |"
    assert table.splitlines()[2] == "| read | 1 | 2 | 8.8 (4.9 to 43) |"
