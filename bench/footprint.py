"""Footprint and scale: start-up, memory, many fids, many exports, and an idle daemon."""

import contextlib
import glob
import os
import re
import subprocess
import time
from collections.abc import Iterator

from .figures import Sample, Samples, Section, Target, microseconds, middle, table
from .ring import bare, drive
from .setting import Server, Setting, export, many_files, ninepd, program, ring_tree

_STARTS = 5
_FIRST_FIDS = 1000
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
    variants: dict[str, list[str]] = {"names": []}
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
    samples = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ninepd("--config", config, ready=sockets[0]))
        for path in sockets:
            one = Server(server.pid, path, server.ready_seconds)
            stack.enter_context(_idle_guest(one))
        together = {"rss_kib": _kib(server.pid, "Rss"), "pss_kib": _kib(server.pid, "Pss")}
        samples.append(
            {"what": "exports", "who": "one process", "exports": count,
             "ms": server.ready_seconds * 1000, **together}
        )  # fmt: skip
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(export(tree, path)) for path in sockets]
        for one in servers:
            stack.enter_context(_idle_guest(one))
        rss, pss = (sum(_kib(one.pid, name) for one in servers) for name in ("Rss", "Pss"))
        apart = {"rss_kib": rss, "pss_kib": pss}
        samples.append({"what": "exports", "who": "a process each", "exports": count, **apart})
    return samples


def report(all_samples: list[Sample]) -> list[Section]:
    samples = Samples(all_samples)
    start = samples.where(what="start").spread(lambda sample: float(sample["ms"]))
    idle = samples.where(what="idle").all[0]
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
        "Exports, each with an idle guest connected.",
        table(
            ["exports", "", "RSS", "PSS"],
            [
                [s["exports"], s["who"], _mb(s["rss_kib"]), _mb(s["pss_kib"])]
                for s in samples.where(what="exports").all
            ],
        ),
    ]  # fmt: skip
    largest = [_further(fids, s) for s in fids.all if s["who"] == "names"][-1]
    section.targets += [
        Target.at_most("exec to listening", 250, middle(start), " ms"),
        Target.at_most("RSS idle", 45, idle["rss_kib"] / 1024, " MiB"),
        Target.at_most("wake-ups per second, idle", 0, idle["wake_ups_per_second"]),
        Target.at_most("a fid beyond the first 1,000", 400, largest, " bytes"),
    ]
    return [section]


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
