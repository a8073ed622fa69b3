"""QEMU's life-cycle commands while a request hangs in frozen storage: nothing is lost."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ninepd_guests.boot import Share, boot_qemu
from ninepd_guests.errors import GuestError
from ninepd_guests.machine import Guest, Running
from tests.conftest import Mount, StartDaemon
from tests.support.client import Daemon
from tests.support.guest import TAG, check
from tests.support.storage import waits_for_storage
from tests.support.waiting import eventually

SECONDS = 3.0
"""From the freeze to the thaw."""


@pytest.fixture
def folder(export: Path, mount_ext4: Mount) -> Path:
    """The export, on an ext4 of its own."""
    return mount_ext4(export)


@pytest.fixture
def daemon(folder: Path, start_daemon: StartDaemon) -> Daemon:
    return start_daemon()


@contextmanager
def frozen(guest: Guest, daemon: Daemon, folder: Path) -> Iterator[Running]:
    """For some seconds a guest's command hangs, which will write to a file; it is yielded."""
    guest.run("echo before > /mnt/f")
    subprocess.run(["fsfreeze", "--freeze", folder], check=True)
    thaw = threading.Timer(SECONDS, subprocess.run, [["fsfreeze", "--unfreeze", folder]])
    thaw.start()
    try:
        writing = guest.start("echo written > /mnt/f")
        eventually(lambda: waits_for_storage(daemon.pid), "the write reaches the kernel", 2)
        yield writing
    finally:
        thaw.join()


def check_written(writing: Running, folder: Path) -> None:
    assert writing.wait().status == 0
    assert (folder / "f").read_text() == "written\n"


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[Guest]:
    """On a machine that takes and gives devices and memory while it runs."""
    more = ["-m", "slots=2,maxmem=1G"]
    with boot_qemu([Share(TAG, daemon.socket)], machine="pc", extra_args=more) as guest:
        guest.mount(TAG)
        yield guest


def test_stop_and_cont(guest: Guest, daemon: Daemon, folder: Path) -> None:
    with frozen(guest, daemon, folder) as writing:
        guest.qmp("stop")
        guest.qmp("cont")
    check_written(writing, folder)
    check(guest, folder, "after")


def test_system_reset(guest: Guest, daemon: Daemon, folder: Path) -> None:
    with frozen(guest, daemon, folder) as writing:
        guest.reboot(hard=True)
    with pytest.raises(GuestError):
        writing.wait()
    guest.mount(TAG)
    check(guest, folder, "after")


def test_memory_is_plugged(guest: Guest, daemon: Daemon, folder: Path) -> None:
    before = int(guest.run("grep MemTotal /proc/meminfo").text.split()[1])
    with frozen(guest, daemon, folder) as writing:
        backend = {"qom-type": "memory-backend-memfd", "id": "more", "size": 128 << 20}
        guest.qmp("object-add", **backend, share=True)
        guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
    check_written(writing, folder)
    check(guest, folder, "after")
    assert int(guest.run("grep MemTotal /proc/meminfo").text.split()[1]) >= before


def test_device_is_unplugged(guest: Guest, daemon: Daemon, folder: Path) -> None:
    def devices() -> dict[str, str]:
        found = guest.qmp("qom-list", path="/machine/peripheral-anon")
        return {one["type"]: one["name"] for one in found}

    kind = "child<vhost-user-test-device-pci>"
    with frozen(guest, daemon, folder) as writing:
        guest.qmp("device_del", id=f"/machine/peripheral-anon/{devices()[kind]}")
        assert guest.run("echo alive").text == "alive\n"
    check_written(writing, folder)
    guest.umount()
    eventually(lambda: kind not in devices(), "the device goes", 60)
    assert guest.run("echo alive").text == "alive\n"
