"""Samples in, figures out: medians with their spread, tables in Markdown, bars in SVG."""

import html
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Sample = dict[str, Any]
"""One measurement, as it goes to the JSON file: ``what`` was done by ``who``, and numbers."""


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        if not self.median:
            return "0"
        wide = max(self.high - self.median, self.median - self.low) / self.median
        if wide > 0.5:
            return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"
        return f"{number(self.median)} ±{wide:.0%}"


def spread(values: Iterable[float]) -> Spread | None:
    """None if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    if len(ordered) == 1:
        return Spread(ordered[0], ordered[0], ordered[0])
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(low, median, high)


def middle(found: Spread | None) -> float | None:
    return found.median if found else None


def number(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value < 10 else 1}f}"


def per_second(sample: Sample) -> float:
    """Operations a second."""
    return float(sample["operations"]) * 1e9 / float(sample["ns"])


def microseconds(sample: Sample) -> float:
    """Of one operation, on average."""
    return 1e6 / per_second(sample)


class Samples:
    """Measurements of one kind, found by what they have in common."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.all = list(samples)

    def where(self, **wanted: object) -> "Samples":
        return Samples(s for s in self.all if all(s.get(k) == v for k, v in wanted.items()))

    def names(self, key: str) -> list[Any]:
        """Values of a key, in the order in which they came."""
        return list(dict.fromkeys(sample[key] for sample in self.all if key in sample))

    def spread(self, measure: Callable[[Sample], float]) -> Spread | None:
        return spread(map(measure, self.all))

    def median(self, measure: Callable[[Sample], float]) -> float | None:
        return middle(self.spread(measure))


def ratio(
    ours: Samples, theirs: Samples, measure: Callable[[Sample], float] = per_second
) -> Spread | None:
    """Of medians; its spread is that of the ratios within each round, taken side by side."""
    pairs = {sample.get("round"): measure(sample) for sample in theirs.all}
    return spread(
        measure(sample) / pairs[sample.get("round")]
        for sample in ours.all
        if pairs.get(sample.get("round"))
    )


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown; None becomes a dash."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [
        "| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Target:
    """A figure that the project wants to reach."""

    what: str
    wanted: str
    measured: str
    met: bool | None
    """None: it could not be measured here."""

    @classmethod
    def at_least(cls, what: str, limit: float, value: float | None, unit: str = "") -> "Target":
        return cls._of(what, "≥", limit, value, unit, value is not None and value >= limit)

    @classmethod
    def at_most(cls, what: str, limit: float, value: float | None, unit: str = "") -> "Target":
        return cls._of(what, "≤", limit, value, unit, value is not None and value <= limit)

    @classmethod
    def _of(
        cls, what: str, sign: str, limit: float, value: float | None, unit: str, met: bool
    ) -> "Target":
        measured = "not measured" if value is None else f"{number(value)}{unit}"
        return cls(what, f"{sign} {limit:,g}{unit}", measured, None if value is None else met)

    @property
    def row(self) -> tuple[str, str, str, str]:
        verdict = {True: "yes", False: "**no**", None: "-"}[self.met]
        return self.what, self.wanted, self.measured, verdict


@dataclass
class Section:
    """One kind of benchmark in the report."""

    title: str
    text: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    charts: dict[str, str] = field(default_factory=dict)
    """SVG by file name."""

    def chart(self, name: str, title: str, bars: Sequence["Bar"], unit: str) -> None:
        if bars:
            self.charts[name] = bar_chart(title, bars, unit)
            self.text.append(f"![{title}]({name})")


@dataclass(frozen=True)
class Bar:
    label: str
    series: str
    value: Spread


COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#718096", "#c53030")
_LEFT, _WIDTH, _BAR, _GAP, _TOP = 190, 820, 15, 8, 62


def bar_chart(title: str, bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars on a logarithmic axis, grouped by label, whiskers at the quartiles."""
    series = list(dict.fromkeys(bar.series for bar in bars))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    labels = list(dict.fromkeys(bar.label for bar in bars))
    values = [v for bar in bars for v in (bar.value.low, bar.value.median, bar.value.high) if v > 0]
    first = math.floor(math.log10(min(values)))
    last = max(math.ceil(math.log10(max(values))), first + 1)
    scale = (_WIDTH - _LEFT - 90) / (last - first)

    def at(value: float) -> float:
        return _LEFT + scale * (math.log10(max(value, 10**first)) - first)

    body = []
    y = _TOP
    for label in labels:
        group = [bar for bar in bars if bar.label == label]
        middle = y + len(group) * _BAR / 2 + 4
        body.append(_text(_LEFT - 8, middle, label, "end"))
        for bar in group:
            end = at(bar.value.median)
            body.append(
                f'<rect x="{_LEFT}" y="{y}" width="{max(end - _LEFT, 1):.1f}" height="{_BAR - 3}" '
                f'fill="{colours[bar.series]}"/>'
            )
            line = y + (_BAR - 3) / 2
            low, high = at(bar.value.low), at(bar.value.high)
            body.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{line}" y2="{line}" stroke="#1a202c"/>'
            )
            body.append(_text(max(end, high) + 5, y + _BAR - 5, number(bar.value.median), "start"))
            y += _BAR
        y += _GAP
    grid = []
    for power in range(first, last + 1):
        x = at(10**power)
        grid.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{y}" stroke="#e2e8f0"/>'
            + _text(x, y + 12, f"{10**power:,g}", "middle")
        )
    legend, x = [], float(_LEFT)
    for name in series:
        legend.append(
            f'<rect x="{x}" y="34" width="10" height="10" fill="{colours[name]}"/>'
            + _text(x + 14, 43, name, "start")
        )
        x += 24 + 7 * len(name)
    heading = _text(10, 20, f"{title} ({unit})", "start", "bold")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 22}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{heading}\n'
        + "\n".join([*legend, *grid, *body])
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{html.escape(words)}</text>"
    )
