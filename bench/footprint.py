"""Footprint and scale: start-up, memory, many fids, many exports, and an idle daemon."""

import contextlib
import glob
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

from .figures import Sample, Samples, Section, Target, microseconds, middle, table
from .ring import bare, drive
from .setting import Server, Setting, export, many_files, ninepd, program, ring_tree

_STARTS = 5
_FIRST_FIDS = 1000
ALONE, STOPPED, KILLED = "untouched", "stopped", "killed"
_WAKE_UPS = re.compile(r"^voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)


def _kib(pid: int, name: str) -> int:
    """Of /proc/PID/smaps_rollup."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        found = re.search(rf"^{name}:\s*(\d+)", file.read(), re.MULTILINE)
    return int(found[1]) if found else 0


def _wake_ups(pid: int) -> int:
    total = 0
    for path in glob.glob(f"/proc/{pid}/task/*/status"):
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            found = _WAKE_UPS.search(file.read())
            total += int(found[1]) if found else 0
    return total


@contextlib.contextmanager
def _idle_guest(server: Server) -> Iterator[None]:
    """A front end that worked a little and is connected still."""
    process = subprocess.Popen(
        [program("ringdriver"), "--socket", server.socket, "--pid", str(server.pid),
         "--indirect", "--ms", "5", "--linger"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None  # noqa: S101 - Popen was told so
        process.stdout.readline()
        yield
    finally:
        process.communicate()


def measure(setting: Setting) -> list[Sample]:
    plan = setting.plan
    tree = ring_tree(os.path.join(setting.memory, "scale"))
    many_files(tree, plan.fids)
    return [
        *_start_and_idle(setting, tree),
        *_fids(setting, tree),
        *_listing(setting, tree),
        *_exports(setting, tree),
    ]


def _start_and_idle(setting: Setting, tree: str) -> list[Sample]:
    samples = []
    for turn in range(_STARTS):
        with export(tree, os.path.join(setting.memory, "start.sock")) as server:
            ms = server.ready_seconds * 1000
            samples.append({"what": "start", "round": turn, "ms": ms})
            if turn == 0:
                time.sleep(0.2)
                before = _wake_ups(server.pid)
                with _idle_guest(server):
                    time.sleep(0.3)
                    rss, pss = _kib(server.pid, "Rss"), _kib(server.pid, "Pss")
                    before = _wake_ups(server.pid)
                    time.sleep(setting.plan.idle_seconds)
                    rate = (_wake_ups(server.pid) - before) / setting.plan.idle_seconds
                idle = {"rss_kib": rss, "pss_kib": pss, "wake_ups_per_second": rate}
                samples.append({"what": "idle", **idle})
    return samples


def _fids(setting: Setting, tree: str) -> list[Sample]:
    samples = []
    counts = [n for n in (_FIRST_FIDS, 10_000, 100_000, 1_000_000) if n <= setting.plan.fids]
    variants = {"names": ["--reclaim", "names"]}
    if os.geteuid() == 0:
        variants["handles"] = ["--reclaim", "handles"]
    for reclaim, options in variants.items():
        # Once a daemon: memory that was used is not always given back.
        for count in counts:
            with export(tree, os.path.join(setting.memory, "fids.sock"), *options) as server:
                sample = drive(
                    server, "walk1", 1, setting.plan.ms, "--indirect", "--hold", str(count)
                )
            samples.append({"what": "fids", "who": reclaim, "fids": count, **sample})
    return samples


def _listing(setting: Setting, tree: str) -> list[Sample]:
    """Of one directory with as many entries as there are fids above."""
    samples: list[Sample] = []
    with export(tree, os.path.join(setting.memory, "list.sock")) as server:
        for turn in range(3):
            common = {"what": "list", "round": turn, "entries": setting.plan.fids}
            ours = drive(server, "list", 1, setting.plan.ms, "--indirect")
            samples.append({"who": "ring", **common, **ours})
            samples.append({"who": "bare", **common, **bare("list", tree, 1, setting.plan.ms)})
    return samples


def _exports(setting: Setting, tree: str) -> list[Sample]:
    """Many exports that are idle, and what a guest at one of them feels of another's end."""
    count = setting.plan.exports
    sockets = [os.path.join(setting.memory, f"export{i}.sock") for i in range(count)]
    config = os.path.join(setting.memory, "exports.toml")
    model = "passthrough" if os.geteuid() == 0 else "none"
    with open(config, "w") as file:
        for i, path in enumerate(sockets):
            file.write(
                f'[[export]]\nexport = "{tree}"\ntag = "export{i}"\nsocket-path = "{path}"\n'
                f'security-model = "{model}"\n'
            )
    start = time.monotonic()
    with ninepd("--config", config, ready=sockets[0]) as supervisor:
        for path in sockets:
            _until_answered(path)
        ms = (time.monotonic() - start) * 1000
        workers = _children(supervisor.pid)
        pss = [_kib(pid, "Pss") for pid in workers]
        before = sum(map(_wake_ups, [supervisor.pid, *workers]))
        time.sleep(setting.plan.idle_seconds)
        rate = (sum(map(_wake_ups, [supervisor.pid, *workers])) - before) / (
            setting.plan.idle_seconds
        )
        idle = {"exports": count, "ms": ms, "pss_kib": max(pss), "wake_ups_per_second": rate}
        samples: list[Sample] = [{"what": "exports", **idle}]
        one = Server(workers[0], sockets[0], 0)
        for turn in range(setting.plan.rounds):
            for who, number in ((ALONE, 0), (STOPPED, signal.SIGSTOP), (KILLED, signal.SIGKILL)):
                # Another one each time: the wait before a process starts again grows.
                other = workers[1 + turn % (len(workers) - 1)]
                if number:
                    os.kill(other, number)
                sample = drive(one, "getattr", 1, setting.plan.ms, "--indirect")
                samples.append({"what": "neighbour", "who": who, "round": turn, **sample})
                if number == signal.SIGSTOP:
                    os.kill(other, signal.SIGCONT)
            workers = [workers[0], *(pid for pid in _children(supervisor.pid) if pid != workers[0])]
    return samples


def _children(pid: int) -> list[int]:
    """In the order in which they were started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _until_answered(path: str) -> None:
    """Connect as a front end, and wait for an answer: to GET_FEATURES."""
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(path)
        front_end.send((1).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4))
        front_end.recv(20, socket.MSG_WAITALL)


def report(all_samples: list[Sample]) -> list[Section]:
    samples = Samples(all_samples)
    start = samples.where(what="start").spread(lambda sample: float(sample["ms"]))
    idle = samples.where(what="idle").all[0]
    many = samples.where(what="exports").all[0]
    neighbours = samples.where(what="neighbour")
    section = Section("Footprint and scale")
    fids, listing = samples.where(what="fids"), samples.where(what="list")
    section.text += [
        (f"From exec to listening: {start} ms. With an idle guest: RSS {_mb(idle['rss_kib'])}, PSS "
        f"{_mb(idle['pss_kib'])}, {idle['wake_ups_per_second']:g} wake-ups per second."),
        ("A walk and a clunk beside fids that are held, each on a file of its own (`--reclaim` "
        "says how descriptors that run short are found again); microseconds."),
        table(
            ["fids", "reclaim", "p50", "p99", "RSS", "bytes per further fid"],
            [
                [f"{s['fids']:,}", s["who"], f"{s['p50_ns'] / 1000:,.1f}",
                 f"{s['p99_ns'] / 1000:,.1f}", _mb(s["held_rss_kib"]), _further(fids, s)]
                for s in fids.all
            ],
        ),
        (f"A listing of {listing.all[0]['entries']:,} entries, with a statx each: "
        f"{listing.where(who='ring').spread(_ms)} ms at the ring, "
        f"{listing.where(who='bare').spread(_ms)} ms by bare system calls."),
        (f"{many['exports']} idle exports, a process each: all answer {many['ms']:,.0f} ms after "
        f"the start; PSS {_mb(many['pss_kib'])} at most, {many['wake_ups_per_second']:g} wake-ups "
        "per second of all. A getattr at one of them, microseconds, while nothing happens, while "
        "another's process is stopped, and while one is killed and starts again:"),
        table(
            ["another process is", "p50", "p99"],
            [
                [who, neighbours.where(who=who).spread(microseconds),
                 neighbours.where(who=who).spread(_p99)]
                for who in (ALONE, STOPPED, KILLED)
            ],
        ),
    ]  # fmt: skip
    largest = [_further(fids, s) for s in fids.all if s["who"] == "names"][-1]
    section.targets += [
        Target.at_most("exec to listening", 250, middle(start), " ms"),
        Target.at_most("RSS idle", 45, idle["rss_kib"] / 1024, " MiB"),
        Target.at_most("wake-ups per second, idle", 0, idle["wake_ups_per_second"]),
        Target.at_most("start of all exports", 3000, many["ms"], " ms"),
        Target.at_most("PSS of an idle export", 6, many["pss_kib"] / 1024, " MiB"),
        Target.at_most("wake-ups per second, all exports idle", 0, many["wake_ups_per_second"]),
        Target.at_most("a fid beyond the first 1,000", 400, largest, " bytes"),
    ]
    return [section]


def _p99(sample: Sample) -> float:
    return float(sample["p99_ns"]) / 1000


def _ms(sample: Sample) -> float:
    return microseconds(sample) / 1000


def _mb(kib: float) -> str:
    return f"{kib / 1024:,.1f} MiB"


def _further(samples: Samples, sample: Sample) -> float | None:
    """Bytes for each fid more than in the smallest sample of the same daemon options."""
    first = samples.where(who=sample["who"]).all[0]
    more = sample["fids"] - first["fids"]
    grown = (sample["held_rss_kib"] - first["held_rss_kib"]) * 1024
    return round(grown / more) if more else None
