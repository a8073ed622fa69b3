"""Stalls: storage on which one file hangs. Eight streams on another file must not notice."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from .figures import Sample, Samples, Section, Target, middle, per_second, ratio, table
from .ring import drive
from .setting import Setting, export, program

STREAMS = 8
CALM, STALLED = "calm", "stalled"


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


def measure(setting: Setting) -> list[Sample]:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        setting.skip("stalls were not measured: that needs root and /dev/fuse")
        return []
    plan = setting.plan
    folder = os.path.join(setting.memory, "slow")
    os.mkdir(folder)
    samples = []
    with (
        _slow_storage(folder, plan.stall_ms),
        export(folder, os.path.join(setting.memory, "slow.sock")) as server,
    ):
        # A round lasts as long as the stall, so that all of it lies within.
        for turn in range((plan.rounds + 1) // 2):
            for who, options in ((CALM, []), (STALLED, ["--stall", "slow"])):
                sample = drive(
                    server, "read-4k", STREAMS, plan.stall_ms * 4 // 5, "--indirect", *options
                )
                samples.append({"what": "read-4k", "who": who, "round": turn, **sample})
    return samples


def _p99(sample: Sample) -> float:
    return float(sample["p99_ns"]) / 1000


def report(all_samples: list[Sample]) -> list[Section]:
    samples = Samples(all_samples)
    if not samples.all:
        return []
    calm, stalled = samples.where(who=CALM), samples.where(who=STALLED)
    growth = ratio(stalled, calm, _p99)
    rows = [
        [who, found.spread(per_second), found.spread(_p99),
         found.spread(lambda sample: float(sample["max_ns"]) / 1000)]
        for who, found in ((CALM, calm), (STALLED, stalled))
    ]  # fmt: skip
    section = Section("Stalls (FUSE)")
    section.text += [
        (
            f"{STREAMS} streams read one file in pieces of 4 KiB; *{STALLED}*: a read of another "
            "file hangs meanwhile. Microseconds."
        ),
        table(["", "reads/s", "p99", "longest"], rows),
    ]
    section.targets.append(
        Target.at_most("p99 of the others during a stall, x calm", 2, middle(growth))
    )
    return [section]
