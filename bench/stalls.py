"""Stalls: storage on which some files hang. Eight streams on another file must not notice.

On a FUSE file system one file hangs, which is known beforehand to be possible. On a local disk that
is frozen (fsfreeze(8), as snapshots do it) more writes hang than there are workers, beside a tmpfs.
"""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator

from .figures import Sample, Samples, Section, Target, middle, per_second, ratio, table
from .ring import drive
from .setting import MIB, Server, Setting, export, program, ring_tree

STREAMS = 8
CALM, STALLED = "calm", "stalled"
FUSE, FROZEN = "FUSE", "frozen disk"
WRITES = 40
"""More than there may be workers (jobs.py)."""
_P99_MS = 50


@contextlib.contextmanager
def _slow_storage(folder: str, delay_ms: int) -> Iterator[str]:
    process = subprocess.Popen(
        [program("slowfs"), folder, str(delay_ms)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None  # noqa: S101 - Popen was told so
        if process.stdout.readline() != "ready\n":
            raise OSError("the slow file system could not be mounted")
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def _mounted(*arguments: str) -> Iterator[str]:
    """The last argument is where."""
    target = arguments[-1]
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


@contextlib.contextmanager
def _disk(folder: str) -> Iterator[str]:
    """An ext4 file system of its own, with the file ``slow``."""
    image, target = os.path.join(folder, "disk.img"), os.path.join(folder, "disk")
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    os.mkdir(target)
    with _mounted("-o", "loop", image, target):
        with open(os.path.join(target, "slow"), "wb") as file:
            file.write(bytes(MIB))
        yield target


@contextlib.contextmanager
def _frozen(disk: str, ms: int) -> Iterator[None]:
    """It thaws after this time."""
    thaw = ["fsfreeze", "--unfreeze", disk]
    subprocess.run(["fsfreeze", "--freeze", disk], check=True)
    timer = threading.Timer(ms / 1000, subprocess.run, (thaw,), {"check": True})
    timer.start()
    try:
        yield
    finally:
        timer.join()


def measure(setting: Setting) -> list[Sample]:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        setting.skip("stalls were not measured: that needs root and /dev/fuse")
        return []
    return _measure_fuse(setting) + _measure_frozen(setting)


def _measure_fuse(setting: Setting) -> list[Sample]:
    plan = setting.plan
    folder = os.path.join(setting.memory, "slow")
    os.mkdir(folder)
    with (
        _slow_storage(folder, plan.stall_ms),
        export(folder, os.path.join(setting.memory, "slow.sock")) as server,
    ):
        return [
            _sample(setting, server, FUSE, turn, who, "read-4k", *options)
            for turn in range((plan.rounds + 1) // 2)
            for who, options in ((CALM, []), (STALLED, ["--stall", "slow"]))
        ]


def _measure_frozen(setting: Setting) -> list[Sample]:
    plan, samples = setting.plan, []
    folder = os.path.join(setting.memory, "frozen")
    os.mkdir(folder)
    tree = ring_tree(os.path.join(folder, "tree"))
    slow = os.path.join(tree, "slow")
    with open(slow, "wb"):
        pass  # a place for the mount
    with (
        _disk(folder) as disk,
        _mounted("--bind", os.path.join(disk, "slow"), slow),
        export(tree, os.path.join(setting.memory, "frozen.sock")) as server,
    ):
        for turn in range((plan.rounds + 1) // 2):
            samples.append(_sample(setting, server, FROZEN, turn, CALM, "write-4k"))
            with _frozen(disk, plan.stall_ms):
                stalls = ("--stall", "slow", "--stalls", str(WRITES))
                samples.append(_sample(setting, server, FROZEN, turn, STALLED, "write-4k", *stalls))
    return samples


def _sample(
    setting: Setting, server: Server, where: str, turn: int, who: str, what: str, *options: str
) -> Sample:
    # A round lasts as long as the stall, so that all of it lies within.
    ms = setting.plan.stall_ms * 4 // 5
    sample = drive(server, what, STREAMS, ms, "--indirect", *options)
    return {"where": where, "what": what, "who": who, "round": turn, **sample}


def _p99(sample: Sample) -> float:
    return float(sample["p99_ns"]) / 1000


def report(all_samples: list[Sample]) -> list[Section]:
    samples = Samples(all_samples)
    if not samples.all:
        return []
    section = Section("Stalls")
    section.text.append(
        f"{STREAMS} streams read or write one file in pieces of 4 KiB. *{STALLED}*: meanwhile one "
        f"read of another file hangs ({FUSE}), or {WRITES} writes to a disk ({FROZEN}). "
        "Microseconds."
    )
    rows = []
    for where in (FUSE, FROZEN):
        here = Samples(samples.where(where=where).all)
        for who in (CALM, STALLED):
            found = here.where(who=who)
            rows.append(
                [where, who, found.spread(per_second), found.spread(_p99),
                 found.spread(lambda sample: float(sample["max_ns"]) / 1000)]
            )  # fmt: skip
    section.text.append(table(["", "", "per second", "p99", "longest"], rows))
    fuse, frozen = samples.where(where=FUSE), samples.where(where=FROZEN)
    growth = ratio(fuse.where(who=STALLED), fuse.where(who=CALM), _p99)
    section.targets += [
        Target.at_most("p99 of the others during a stall (FUSE), x calm", 2, middle(growth)),
        Target.at_most(
            "p99 of the others while a disk is frozen, ms", _P99_MS,
            middle(frozen.where(who=STALLED).spread(lambda sample: _p99(sample) / 1000)),
        ),
    ]  # fmt: skip
    return [section]
