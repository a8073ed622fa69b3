"""The counters, and what exports answer, as text for people: words in columns."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from ninepd.control.metrics import COUNTERS, GAUGES, errors_of, message_name
from ninepd.control.questions import Row
from ninepd.stats import BOUNDS, Messages, Reader

_MICRO: Final = 1e6
_CELL_MAX: Final = 4096
_PREFIX: Final = "ninepd_"


def quantile(buckets: Sequence[int], share: float) -> float:
    """Seconds within which that share was answered: the bound of a bucket. 0 if there is none."""
    wanted = share * sum(buckets)
    total = 0
    for bound, count in zip((*BOUNDS, BOUNDS[-1]), buckets, strict=True):
        total += count
        if total >= wanted and total:
            return float(bound)
    return 0.0


def stats(seen: Reader) -> str:
    """A line for each number; then a table of messages, and one of errors."""
    numbers = seen.numbers
    lines = [f"process {numbers.pid}"]  # 0: there is none
    lines += [
        f"{number.name.removeprefix(_PREFIX)} {getattr(numbers, number.field)}"
        for number in (*GAUGES, *COUNTERS)
    ]
    messages = list(seen.messages())
    if messages:
        heads = ["message", "requests", "errors", "bytes_in", "bytes_out"]
        lines += ["", *table([[*heads, "mean_us", "p50_us", "p99_us"], *map(_message, messages)])]
    errors = [
        [message_name(message.type), name, str(count)]
        for message in messages
        for name, count in errors_of(message).items()
    ]
    if errors:
        lines += ["", *table([["message", "errno", "errors"], *errors])]
    return _joined(lines)


def _message(message: Messages) -> list[str]:
    times = [
        message.seconds / message.requests,
        quantile(message.buckets, 0.5),
        quantile(message.buckets, 0.99),
    ]
    numbers = [sum(message.errors.values()), message.bytes_in, message.bytes_out]
    return [
        message_name(message.type),
        str(message.requests),
        *map(str, numbers),
        *(f"{seconds * _MICRO:.0f}" for seconds in times),
    ]


def fids(rows: Sequence[Row]) -> str:
    return _columns(
        ["fid", "kind", "open", "uid", "reclaimed", "path"],
        rows,
        {"reclaimed": lambda value: "yes" if value else ""},
    )


def locks(rows: Sequence[Row]) -> str:
    return _columns(
        ["type", "start", "end", "process", "client", "path"],
        rows,
        {"end": lambda value: "EOF" if value is None else str(value)},
    )


def clients(rows: Sequence[Row]) -> str:
    return _columns(
        ["pid", "uid", "since", "dialect", "msize", "fids"],
        rows,
        {"since": lambda value: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(value))},
    )


def _columns(
    names: list[str], rows: Sequence[Row], special: dict[str, Callable[[Any], str]]
) -> str:
    """With a dash where there is nothing, so that a line has as many words as the first."""
    cells = [[_cell(special.get(name, str)(row.get(name, ""))) for name in names] for row in rows]
    return _joined(table([names, *cells]))


def _cell(text: str) -> str:
    """Whoever answers may have been taken over by a guest: it shall not speak to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:_CELL_MAX]) or "-"


def table(rows: list[list[str]]) -> Iterator[str]:
    """In columns, the last as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _joined(lines: Iterator[str] | list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
