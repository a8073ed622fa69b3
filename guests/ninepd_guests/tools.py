"""QEMU, busybox and the guest agent. ``python -m ninepd_guests.tools`` fills the cache ahead."""

import argparse
import functools
import glob
import hashlib
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .cache import artefact
from .errors import GuestError
from .image import initramfs
from .kernels import SERIES, kernel
from .packages import Archive, command, unpack
from .uml import uml_kernel

OLDEST_QEMU = (10, 2)
QEMU_DEVICE = "vhost-user-test-device-pci"
AGENT_SOURCES = ("agent.c", "agent_remote.c", "agent_setup.c", "agent_wire.c")


@dataclass(frozen=True)
class Qemu:
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


@functools.cache
def qemu() -> Qemu:
    """The system's QEMU if it has the generic vhost-user device, else Debian's newest."""
    path = shutil.which("qemu-system-x86_64")
    if path:
        version = re.search(r"version (\d+)\.(\d+)", command([path, "--version"]))
        new = version and (int(version[1]), int(version[2])) >= OLDEST_QEMU
        if new and QEMU_DEVICE in command([path, "-device", "help"]):
            return Qemu((path,))
    return qemu_in(debian_qemu(), "qemu-system-x86_64")


@functools.cache
def qemu_aarch64() -> Qemu:
    """Debian's newest, for guests of that processor."""
    what = "fetching Debian's QEMU for aarch64"
    tree = artefact("qemu-aarch64", what, functools.partial(_make_qemu, "arm"))
    return qemu_in(tree, "qemu-system-aarch64")


def debian_qemu() -> str:
    """A folder with Debian's newest QEMU and all that it needs."""
    return artefact("qemu", "fetching Debian's QEMU", functools.partial(_make_qemu, "x86"))


def qemu_in(tree: str, program: str) -> Qemu:
    """One of such a folder, which is seen as ``tree``."""
    lib = f"{tree}/usr/lib/x86_64-linux-gnu"
    return Qemu(
        (f"{tree}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", lib,
         f"{tree}/usr/bin/{program}",
         "-L", f"{tree}/usr/share/qemu", "-L", f"{tree}/usr/share/seabios"),
        {"QEMU_MODULE_DIR": f"{lib}/qemu"},
    )  # fmt: skip


def qemu_command() -> list[str]:
    return list(qemu().command)


def _make_qemu(processor: str, result: str, folder: str) -> None:
    debs = Archive().download_closure(f"qemu-system-{processor}", os.path.join(folder, "debs"))
    unpack(debs, result)
    for unused in ("doc", "locale", "man"):
        shutil.rmtree(f"{result}/usr/share/{unused}", ignore_errors=True)


def busybox(architecture: str = "amd64") -> str:
    def make(result: str, folder: str) -> None:
        archive = Archive(architecture=architecture)
        unpack(archive.download(["busybox-static"], f"{folder}/debs"), f"{folder}/tree")
        found = glob.glob(f"{folder}/tree/**/bin/busybox", recursive=True)
        os.rename(found[0], result)

    name = "busybox" if architecture == "amd64" else f"busybox-{architecture}"
    return artefact(name, f"fetching {name}", make)


def agent() -> str:
    """The guest's init program, compiled again when its source has changed."""
    here = os.path.dirname(os.path.abspath(__file__))
    digest = hashlib.sha256()
    for name in AGENT_SOURCES:
        with open(os.path.join(here, name), "rb") as source:
            digest.update(source.read())

    def make(result: str, _: str) -> None:
        if not shutil.which("gcc"):
            raise GuestError("gcc is missing: install the packages gcc and libc6-dev")
        command(["gcc", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror",
                 "-o", result, os.path.join(here, AGENT_SOURCES[0])])  # fmt: skip

    return artefact(f"agent-{digest.hexdigest()[:16]}", "compiling the guest agent", make)


def prepare(what: str) -> None:
    if what == "demo":
        _prepare_demo()
    if what in ("qemu", "all"):
        qemu()
    if what in ("kernels", "all"):
        for series in SERIES:
            initramfs(agent(), busybox(), kernel(series).modules)
    if what in ("aarch64", "all"):
        qemu_aarch64()
        busybox("arm64")
        kernel(SERIES[-1], "arm64")
    if what in ("uml", "all"):
        uml_kernel()
        initramfs(agent(), busybox())


def _prepare_demo() -> None:
    """One QEMU guest with the newest kernel: while one part downloads, another is unpacked."""
    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(qemu)
        linux = pool.submit(kernel, SERIES[-1])
        initramfs(agent(), busybox(), linux.result().modules)
        fetched.result()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ninepd_guests.tools", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=("demo", "qemu", "kernels", "aarch64", "uml", "all"),
    )
    try:
        prepare(parser.parse_args().what)
    except GuestError as error:
        sys.stderr.write(f"ninepd: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
