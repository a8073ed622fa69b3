"""Metrics: those that are documented, those that rules and dashboard use, and their numbers."""

import json
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from ninepd.control import metrics
from ninepd.control.report import quantile
from ninepd.stats import BOUNDS, reader, shared

ROOT = Path(__file__).parent.parent.parent
CONTRIB = ROOT / "contrib/prometheus"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "info": ("_info",)}
HISTOGRAM = ("_bucket", "_sum", "_count")


def exported() -> dict[str, str]:
    """Kind by name, as Prometheus has them; a histogram by the name that it has in common."""
    return {
        family.name + SUFFIXES.get(family.type, ("",))[0]: family.type
        for family in metrics.Exports({}).collect()
    }


def documented() -> dict[str, str]:
    table = (ROOT / "docs/metrics.md").read_text().partition("## Metrics")[2]
    return dict(re.findall(r"^\| `(ninepd\w+)` \| (\w+) \|", table, re.MULTILINE))


def test_all_metrics_are_documented_and_no_others() -> None:
    assert exported() == documented()


@pytest.mark.parametrize("name", ["ninepd.rules.yml", "ninepd.grafana.json"])
def test_what_is_made_of_them_names_those_that_there_are(name: str) -> None:
    used = set(re.findall(r"\bninepd_\w+", (CONTRIB / name).read_text()))
    known = exported()
    histograms = {
        name + end for name, kind in known.items() if kind == "histogram" for end in HISTOGRAM
    }
    assert used
    assert used <= set(known) | histograms


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((CONTRIB / "ninepd.grafana.json").read_text())
    assert dashboard["title"] == "ninepd"
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))


def test_buckets_are_sums() -> None:
    stats, fd = shared()
    with closing(reader(fd)) as seen:
        os.close(fd)
        message: Any = cast("Any", stats.address).messages[12]
        message.requests = 6
        message.ns = 1_500_000_000
        message.buckets[0], message.buckets[1], message.buckets[len(BOUNDS)] = 1, 2, 3
        message.errors[0], message.errors[5], message.errors[135] = 1, 2, 3
        text = metrics.text(metrics.registry({'a"b': seen})).decode()
    label = 'export="a\\"b",message="Tgetattr"'
    bucket = r'^ninepd_request_duration_seconds_bucket\{.*le="(.*?)".*\} (.*)$'
    lines = re.findall(bucket, text, re.MULTILINE)
    assert lines[:3] == [("1.024e-06", "1.0"), ("2.048e-06", "3.0"), ("4.096e-06", "3.0")]
    assert lines[-2:] == [(str(BOUNDS[-1]), "3.0"), ("+Inf", "6.0")]
    assert f"ninepd_request_duration_seconds_sum{{{label}}} 1.5\n" in text
    error = r'^ninepd_request_errors_total\{errno="(\w+)",.*\} (.*)$'
    found = re.findall(error, text, re.MULTILINE)
    assert found == [("other", "4.0"), ("EIO", "2.0")]


@pytest.mark.parametrize(
    ("counts", "share", "bound"),
    [
        ((0, 0, 0), 0.5, 0.0),
        ((1, 0, 0), 0.5, BOUNDS[0]),
        ((50, 49, 1), 0.5, BOUNDS[0]),
        ((50, 49, 1), 0.99, BOUNDS[1]),
        ((50, 49, 1), 0.999, BOUNDS[2]),
    ],
)
def test_quantiles(counts: tuple[int, ...], share: float, bound: float) -> None:
    buckets = [*counts, *[0] * (len(BOUNDS) + 1 - len(counts))]
    assert quantile(buckets, share) == bound
