"""What a benchmark needs around it: how much to do, C programs, servers, things to serve."""

import contextlib
import glob
import hashlib
import json
import lzma
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ninepd_guests import kernels
from ninepd_guests.cache import artefact, say
from ninepd_guests.errors import GuestError
from ninepd_guests.packages import Archive, command, unpack

HERE: Final = os.path.dirname(os.path.abspath(__file__))
MIB: Final = 1 << 20
RING_FILE: Final = 64 * MIB
"""As FILE_SPAN in measure.h."""
_START_SECONDS: Final = 20.0
_VIRTIOFS_MODULES: Final = ("fuse", "virtiofs")


@dataclass(frozen=True)
class Plan:
    """How much to do. ``rounds`` interleaves: all sides once, then all again."""

    name: str
    rounds: int
    ms: int
    """Of one measurement at the ring."""
    depths: tuple[int, ...]
    ring_only: tuple[str, ...]
    """Ring workloads; empty: all."""
    uml_rounds: int
    qemu_rounds: int
    guest_ms: int
    files: int
    guest_mib: int
    """Of the large file that a guest reads and writes."""
    fids: int
    exports: int
    """Of one daemon; a guest works at one of them."""
    idle_seconds: float
    stall_ms: int
    build: bool
    """Also compile a C program in the guest."""


PLANS: Final = {
    plan.name: plan
    for plan in (
        Plan("tiny", 1, 5, (1, 8), ("getattr", "read-4k", "readdir"), 1, 1, 20, 32, 1, 2000, 2, 0.2,
             100, False),
        Plan("quick", 5, 60, (1, 8, 64), (), 3, 2, 100, 500, 32, 100_000, 100, 3, 2000, True),
        Plan("full", 15, 200, (1, 8, 64), (), 7, 5, 400, 2000, 256, 1_000_000, 100, 5, 5000, True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A plan, and folders to do it in: one on tmpfs, one on a disk."""

    plan: Plan
    memory: str
    disk: str
    notes: list[str] = field(default_factory=list)
    """Why something was left out."""

    def skip(self, what: str) -> None:
        say(f"bench: {what}")
        self.notes.append(what)


@contextlib.contextmanager
def setting(plan: Plan) -> Iterator[Setting]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
    with (
        tempfile.TemporaryDirectory(prefix="ninepd-bench-", dir=memory) as in_memory,
        tempfile.TemporaryDirectory(prefix="ninepd-bench-", dir="/var/tmp") as on_disk,
    ):
        yield Setting(plan, in_memory, on_disk)


def host() -> dict[str, Any]:
    """What the figures depend on."""
    model = ""
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "load": os.getloadavg(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


# Programs


def program(name: str, *flags: str) -> str:
    """A C program of this folder, compiled again when its source has changed."""
    source = os.path.join(HERE, f"{name}.c")
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (source, os.path.join(HERE, "measure.h")):
        with open(path, "rb") as file:
            digest.update(file.read())

    def make(result: str, _: str) -> None:
        warnings = ["-Wall", "-Wextra", "-Werror"]
        command(["gcc", "-std=gnu11", "-O2", *warnings, *flags, "-o", result, source])

    return artefact(f"bench-{name}-{digest.hexdigest()[:16]}", f"compiling bench/{name}.c", make)


def guest_program() -> str:
    """The load that runs in guests."""
    return program("guestload", "-static", "-s")


def run_json(arguments: Sequence[str], timeout: float = 120) -> dict[str, Any]:
    """The JSON object that a program prints."""
    result: dict[str, Any] = json.loads(command(list(arguments), timeout=timeout))
    return result


# Servers


@dataclass(frozen=True)
class Server:
    pid: int
    socket: str
    ready_seconds: float
    """From its start until it listened."""


@contextlib.contextmanager
def ninepd(*options: str, ready: str) -> Iterator[Server]:
    """A daemon; ``ready`` is the socket of a front end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind("")  # a free abstract name
        address = "@" + os.fsdecode(notices.getsockname()[1:])
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "ninepd", "serve", *options],
            cwd=os.path.dirname(HERE),
            env={**os.environ, "NOTIFY_SOCKET": address},
        )
        try:
            end = os.pidfd_open(process.pid)
            try:
                answer, _, _ = select.select([notices.fileno(), end], [], [], _START_SECONDS)
            finally:
                os.close(end)
            if notices.fileno() not in answer:
                raise GuestError("ninepd did not start; its message is above")
            yield Server(process.pid, ready, time.monotonic() - start)
        finally:
            _end(process)


@contextlib.contextmanager
def export(folder: str, socket_path: str, *options: str, tag: str = "bench") -> Iterator[Server]:
    """A daemon that serves one folder."""
    model = "passthrough" if os.geteuid() == 0 else "none"
    chosen = ["--socket-path", socket_path, "--export", folder, "--tag", tag]
    with ninepd(*chosen, "--security-model", model, *options, ready=socket_path) as server:
        yield server


@contextlib.contextmanager
def virtiofsd(folder: str, socket_path: str, tag: str, cache: str) -> Iterator[int]:
    """Debian's; the result is its process."""

    def make(result: str, scratch: str) -> None:
        unpack(Archive().download_closure("virtiofsd", os.path.join(scratch, "debs")), result)

    tree = artefact("bench-virtiofsd", "fetching Debian's virtiofsd", make)
    process = subprocess.Popen(
        [f"{tree}/usr/lib64/ld-linux-x86-64.so.2",
         "--library-path", f"{tree}/usr/lib/x86_64-linux-gnu", f"{tree}/usr/libexec/virtiofsd",
         "--shared-dir", folder, "--socket-path", socket_path, "--tag", tag, "--cache", cache,
         "--sandbox", "none", "--seccomp", "none", "--log-level", "error"],
    )  # fmt: skip
    try:
        limit = time.monotonic() + _START_SECONDS
        while not os.path.exists(socket_path):
            if process.poll() is not None or time.monotonic() > limit:
                raise GuestError("virtiofsd did not start; its message is above")
            time.sleep(0.01)
        yield process.pid
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def virtiofs_modules(series: str) -> list[str]:
    """The modules that a guest of Debian's kernel needs for virtiofs, in the order to load them."""

    def make(result: str, scratch: str) -> None:
        archive = Archive(kernels.RELEASE.get(series, "trixie"))
        name = archive.series(series, r"linux-image-(\d+\.\d+)\.[0-9.]+(?:[+-]\w+)?-amd64")[-1]
        parts = [
            d for d in archive.depends(name) if d.startswith(("linux-binary", "linux-modules"))
        ]
        tree = os.path.join(scratch, "tree")
        unpack(archive.download([name, *parts], os.path.join(scratch, "debs")), tree)
        os.mkdir(result)
        for module in _VIRTIOFS_MODULES:
            found = glob.glob(f"{tree}/**/{module}.ko*", recursive=True)
            if found:
                opener = lzma.open if found[0].endswith(".xz") else open
                with opener(found[0], "rb") as file, open(f"{result}/{module}.ko", "wb") as copy:
                    copy.write(file.read())

    folder = artefact(f"bench-virtiofs-{series}", f"fetching virtiofs for Linux {series}", make)
    paths = [os.path.join(folder, f"{module}.ko") for module in _VIRTIOFS_MODULES]
    return [path for path in paths if os.path.exists(path)]


# Things to serve


def _fill(path: str, size: int) -> None:
    block = os.urandom(MIB)
    with open(path, "wb") as file:
        for at in range(0, size, MIB):
            file.write(block[: min(MIB, size - at)])


def ring_tree(folder: str) -> str:
    """What the ring's workloads use."""
    os.makedirs(f"{folder}/a/b/c/d/e")
    os.mkdir(f"{folder}/dir1000")
    for i in range(1000):
        _fill(f"{folder}/dir1000/entry{i:04}", 0)
    _fill(f"{folder}/small", 8192)
    _fill(f"{folder}/file", RING_FILE)
    return folder


def many_files(folder: str, count: int) -> None:
    """Files named by their number."""
    os.makedirs(f"{folder}/many", exist_ok=True)
    for i in range(count):
        os.close(os.open(f"{folder}/many/{i}", os.O_CREAT | os.O_WRONLY, 0o644))


def guest_tree(folder: str, files: int, mib: int) -> str:
    """What guestload.c uses; an archive to unpack; C to compile; a repository, if there is git."""
    os.makedirs(f"{folder}/many")
    for i in range(files):
        _fill(f"{folder}/many/{i}", 1000)
    _fill(f"{folder}/file", mib * MIB)
    with tarfile.open(f"{folder}/archive.tar", "w") as archive:
        archive.add(f"{folder}/many", "unpacked")
    if shutil.which("git"):
        shutil.copytree(f"{folder}/many", f"{folder}/repository/many")
        git = ["git", "-C", f"{folder}/repository", "-c", "user.name=bench", "-c", "user.email=-"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            command([*git, *words])
    shutil.copy(guest_program(), f"{folder}/guestload")
    os.mkdir(f"{folder}/build")
    for name in ("bare.c", "guestload.c", "ringdriver.c", "slowfs.c", "measure.h"):
        shutil.copy(os.path.join(HERE, name), f"{folder}/build/{name}")
    return folder
