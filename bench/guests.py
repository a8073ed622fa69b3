"""What the benchmarks in guests share: sides that take turns in one guest, and their report."""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ninepd_guests.machine import Guest

from .figures import (
    Bar,
    Sample,
    Samples,
    Section,
    Spread,
    Target,
    geometric_mean,
    per_second,
    ratio,
    table,
)
from .setting import Setting

MSIZE: Final = 512_000
PLACE: Final = "/bench"
PROGRAM: Final = "/tmp/guestload"  # noqa: S108 - in the guest
WORKLOADS: Final = (
    "pread-4k", "pwrite-4k", "stat", "open-read-close", "files", "readdir", "seekdir", "read",
    "write",
    "fsync",
)  # fmt: skip
UNPACK: Final = "untar=tar x -f archive.tar -C /bench && rm -r unpacked"
_LIMIT: Final = 300.0  # seconds for all workloads of one side


@dataclass(frozen=True)
class Side:
    """One way to the same directory."""

    name: str
    mount: Callable[[Guest], None]


def mount_9p(
    tag: str, cache: str, msize: int = MSIZE, options: str = ""
) -> Callable[[Guest], None]:
    return lambda guest: guest.mount(tag, PLACE, cache=cache, msize=msize, options=options)


def mount_other(kind: str, source: str, options: str = "") -> Callable[[Guest], None]:
    chosen = f"-o {shlex.quote(options)}" if options else ""

    def mount(guest: Guest) -> None:
        guest.run(f"mkdir -p {PLACE} && mount -t {kind} {chosen} {shlex.quote(source)} {PLACE}")

    return mount


def take_turns(
    setting: Setting,
    guest: Guest,
    sides: Sequence[Side],
    turn: int,
    extra: Sequence[str] = (),
    works: Sequence[str] = (*WORKLOADS, UNPACK),
) -> list[Sample]:
    """Each side once. The order changes from round to round."""
    plan, samples = setting.plan, []
    shift = turn % len(sides)
    for side in [*sides[shift:], *sides[:shift]]:
        side.mount(guest)
        guest.run(f"test -x {PROGRAM} || cp {PLACE}/guestload {PROGRAM}")
        # Once in small, unmeasured: QEMU translates code when it first comes to it, and git writes
        # its index anew when a file has other numbers than on the side before.
        small = [work for work in works if work != UNPACK]
        guest.run(shlex.join([PROGRAM, PLACE, "5", "16", "1", *small, *extra]), timeout=_LIMIT)
        words = [PROGRAM, PLACE, str(plan.guest_ms), str(plan.files), str(plan.guest_mib)]
        words += [*works, *extra]
        output = guest.run(shlex.join(words), timeout=_LIMIT).text
        guest.umount(PLACE)
        measured = map(json.loads, output.splitlines())
        samples += [{"who": side.name, "round": turn, **sample} for sample in measured]
    return samples


def socket_path(setting: Setting, name: str) -> str:
    return os.path.join(setting.memory, f"{name}.sock")


def describe(section: Section, samples: Samples, chart: str) -> None:
    """Rates of all sides, workload by workload."""
    sides = samples.names("who")
    works = samples.names("what")
    rows = []
    bars = []
    for what in works:
        rates = [samples.where(who=who, what=what).spread(per_second) for who in sides]
        rows.append([what, *rates])
        bars += [
            Bar(what, who, rate) for who, rate in zip(sides, rates, strict=True) if rate is not None
        ]
    section.text.append(table(["per second", *sides], rows))
    section.chart(chart, section.title, bars, "1/s, logarithmic")


def compare(
    section: Section, samples: Samples, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[float]]:
    """Ratios of pairs of sides, with their geometric means; the medians are returned."""
    pairs = [p for p in pairs if all(samples.where(who=who).all for who in p)]
    result: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    if not pairs:
        return result
    rows: list[list[object]] = []
    for what in samples.names("what"):
        row: list[Spread | None] = []
        for ours, theirs in pairs:
            found = ratio(samples.where(who=ours, what=what), samples.where(who=theirs, what=what))
            row.append(found)
            if found:
                result[ours, theirs].append(found.median)
        rows.append([what, *row])
    means = [geometric_mean(result[pair]) for pair in pairs]
    rows.append(["**geometric mean**", *(mean and f"{mean:.2f}" for mean in means)])
    section.text += [
        "Rates of the first against the second (above 1: the first is faster).",
        table(["", *(f"{ours} / {theirs}" for ours, theirs in pairs)], rows),
    ]
    return result


def mean_target(name: str, limit: float, ratios: Sequence[float]) -> Target:
    return Target.at_least(f"{name}: geometric mean", limit, geometric_mean(ratios))


def least_target(name: str, limit: float, ratios: Sequence[float]) -> Target:
    return Target.at_least(f"{name}: least", limit, min(ratios, default=None))
