"""A live table of what exports do: what has happened since the last look, the busiest first."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ninepd.control.client import Client
from ninepd.control.metrics import DURATION, ERRORS, RECEIVED, SENT
from ninepd.control.report import quantile

_HEADS: Final = ("req/s", "err/s", "p50", "p99", "in/s", "out/s")
_AROUND: Final = 6
"""Lines beside the rows: the summary, heads with what is around them, and what is left out."""
_TIMES: Final = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
_SIZES: Final = (("G", 1e9), ("M", 1e6), ("k", 1e3))


@dataclass
class Totals:
    """Of one kind of messages on one export."""

    requests: float = 0
    errors: float = 0
    received: float = 0
    sent: float = 0
    bounds: list[float] = field(default_factory=list)
    """How many took no longer than each bound: sums, as Prometheus has them."""


Sample = dict[tuple[str, str], Totals]
"""By export and message."""


class Row(NamedTuple):
    """What happened in a second."""

    export: str
    message: str
    requests: float
    errors: float
    p50: float
    p99: float
    received: float
    sent: float


def sample(text: str) -> Sample:
    """What the file ``metrics`` says."""
    found: Sample = defaultdict(Totals)
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if "message" not in labels:
                continue
            totals = found[labels["export"], labels["message"]]
            if name == f"{DURATION}_bucket":
                totals.bounds.append(value)
            elif name == f"{DURATION}_count":
                totals.requests = value
            elif name == f"{ERRORS}_total":
                totals.errors += value
            elif name == f"{RECEIVED}_total":
                totals.received = value
            elif name == f"{SENT}_total":
                totals.sent = value
    return found


def rows(before: Sample, after: Sample, seconds: float) -> list[Row]:
    """Those with requests in between. A daemon that was started anew counts from 0."""
    found = []
    for key, now in after.items():
        then = before.get(key, Totals())
        if now.requests < then.requests:
            then = Totals()
        if now.requests == then.requests:
            continue
        counts = _counts(then.bounds or [0.0] * len(now.bounds), now.bounds)
        row = Row(
            *key,
            (now.requests - then.requests) / seconds,
            (now.errors - then.errors) / seconds,
            quantile(counts, 0.5),
            quantile(counts, 0.99),
            (now.received - then.received) / seconds,
            (now.sent - then.sent) / seconds,
        )
        found.append(row)
    return sorted(found, key=lambda row: row.requests, reverse=True)


def _counts(then: list[float], now: list[float]) -> list[int]:
    """In each bucket alone."""
    sums = [int(b - a) for a, b in zip(then, now, strict=True)]
    return [after - before for before, after in zip([0, *sums], sums, strict=False)]


def short(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """Three digits and a unit."""
    for unit, size in units:
        if value >= size:
            number = value / size
            return f"{number:.3g}{unit}" if number < 1000 else f"{number:.0f}{unit}"
    return f"{value:.0f}"


def screen(found: list[Row], exports: int, lines: int) -> Group:
    """As many rows as there is room for."""
    room = max(lines - _AROUND, 1)
    requests = sum(row.requests for row in found)
    errors = sum(row.errors for row in found)
    received, sent = sum(row.received for row in found), sum(row.sent for row in found)
    summary = (
        f"ninepd: {exports} export{'' if exports == 1 else 's'}, {short(requests, _SIZES)} req/s, "
        f"{short(errors, _SIZES)} err/s, {short(received, _SIZES)}B/s in, "
        f"{short(sent, _SIZES)}B/s out"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=True)
    table.add_column("export", no_wrap=True, ratio=1)
    table.add_column("message", no_wrap=True, min_width=12)
    for head in _HEADS:
        table.add_column(head, justify="right", no_wrap=True, min_width=6)
    for row in found[:room]:
        table.add_row(
            Text(row.export),
            row.message,
            short(row.requests, _SIZES),
            short(row.errors, _SIZES),
            short(row.p50, _TIMES),
            short(row.p99, _TIMES),
            short(row.received, _SIZES),
            short(row.sent, _SIZES),
        )
    left = len(found) - room
    more = f"and {left} more" if left > 0 else "" if found else "no requests"
    return Group(Text(summary, no_wrap=True), table, Text(more))


def looks(client: Client, seconds: float) -> Iterator[tuple[list[Row], int]]:
    """What has happened from one look to the next, and how many exports there are."""
    before, at = sample(client.read("metrics").decode()), time.monotonic()
    while True:
        time.sleep(seconds)
        after, now = sample(client.read("metrics").decode()), time.monotonic()
        yield rows(before, after, now - at), len(client.names("exports"))
        before, at = after, now


def show(path: str, seconds: float, count: int | None) -> None:
    """Until it is interrupted, or ``count`` times."""
    console = Console()
    with Client(path) as client, Live(console=console, screen=count is None) as live:
        for found, exports in islice(looks(client, seconds), count):
            live.update(screen(found, exports, console.height), refresh=True)
