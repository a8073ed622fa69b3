"""A request that turns out to wait: the ring goes on, control messages wait, nothing is lost.

The storage is a frozen ext4 (fsfreeze(8)): whatever changes it waits in the kernel, and nothing can
call it back until the thaw.
"""

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    Rflush,
    Rlerror,
    Rmkdir,
    Rsetattr,
    Rwrite,
    Tflush,
    Tlcreate,
    Tmkdir,
    Tmknod,
    Tread,
    Treaddir,
    Tsetattr,
    Tsymlink,
    Twalk,
    Twrite,
    decode,
)
from ninepd.vhostuser.messages import Request
from tests.conftest import Mount, StartDaemon
from tests.support import storage
from tests.support.client import ROOT, TAG, Client, Daemon, send
from tests.support.driver import Driver
from tests.support.frontend import SharedRegion
from tests.support.storage import Fuse, StartFuse, frozen, waits_for_storage
from tests.support.waiting import eventually, promptly

RDWR = 2

fuses = storage.fuses
start_fuse = storage.start_fuse
start_daemon = storage.start_daemon


@pytest.fixture
def folder(export: Path, mount: Mount, mount_ext4: Mount) -> Path:
    """The export, on ext4, with a file ``f``; below it a tmpfs ``t`` with a file ``g``."""
    mount_ext4(export)
    (export / "f").write_text("on ext4")
    (mount(export / "t", "-t", "tmpfs", "none") / "g").write_text("on tmpfs")
    return export


@pytest.fixture
def daemon(folder: Path, start_daemon: StartDaemon) -> Daemon:
    """It starts when everything is mounted."""
    return start_daemon()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """Fid 1: ``f``, open for writing; fid 2: ``t/g``, open for reading."""
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=RDWR)
        client.open(ROOT, 2, b"t", b"g")
        yield client


def answers(client: Client, heads: list[int]) -> dict[int, Any]:
    """All replies, by head."""
    done = client.driver.wait_used(20, len(heads))
    return {head: decode(client.driver.reply(head, used))[1] for head, used in done}


CHANGES: dict[str, Any] = {
    "write": Twrite(1, 0, 4),
    "mkdir": Tmkdir(ROOT, b"d", 0o755, 0),
    "create": Tlcreate(5, b"new", 0x41, 0o644, 0),
    "truncate": Tsetattr(1, 8, 0, 0, 0, 0, 0, 0, 0, 0),
    "chmod": Tsetattr(1, 1, 0o600, 0, 0, 0, 0, 0, 0, 0),
    "symlink": Tsymlink(ROOT, b"l", b"target", 0),
    "mknod": Tmknod(ROOT, b"p", 0o010644, 0, 0, 0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_file_systems_are_served(client: Client, folder: Path, what: str) -> None:
    message = CHANGES[what]
    client.walk(ROOT, 5)
    with frozen(folder):
        head = send(client, message, b"text" if what == "write" else b"")
        with promptly(5):
            assert client.read(2, 0, 100) == b"on tmpfs"
            client.walk(ROOT, 3, b"t")
            client.getattr(3)
            client.create(3, 4, b"h")
            client.clunk(3, 4)
    assert not isinstance(decode(client.finish(head))[1], Rlerror)


def test_many_stalled_requests(daemon: Daemon, folder: Path) -> None:
    """More than there are workers; each is answered once, and what it did is there."""
    with Client(daemon.socket, num=512) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=RDWR)
        client.open(ROOT, 2, b"t", b"g")
        stall_many(client, folder)


def stall_many(client: Client, folder: Path) -> None:
    with frozen(folder):
        heads = [send(client, Twrite(1, 10 * n, 4), b"%04d" % n, tag=TAG + n) for n in range(60)]
        heads += [
            send(client, Tmkdir(ROOT, b"d%d" % n, 0o755, 0), tag=TAG + 60 + n) for n in range(40)
        ]
        with promptly(10):
            for _ in range(50):
                assert client.read(2, 0, 100) == b"on tmpfs"
    replies = answers(client, heads)
    assert sorted(replies) == sorted(heads)
    assert [type(replies[head]) for head in heads] == [Rwrite] * 60 + [Rmkdir] * 40
    written = (folder / "f").read_bytes()
    assert [written[10 * n : 10 * n + 4] for n in range(60)] == [b"%04d" % n for n in range(60)]
    assert all((folder / f"d{n}").is_dir() for n in range(40))


def test_flush_of_a_stalled_request(client: Client, folder: Path) -> None:
    """Rflush comes behind the reply, never before (9p(5))."""
    with frozen(folder):
        first = send(client, Tmkdir(ROOT, b"d", 0o755, 0))
        client.read(2, 0, 100)
        flush = send(client, Tflush(TAG), tag=TAG + 1)
        client.read(2, 0, 100)
    done = client.driver.wait_used(20, 2)
    assert [head for head, _ in done] == [first, flush]
    assert isinstance(decode(client.driver.reply(*done[0]))[1], Rmkdir)
    assert decode(client.driver.reply(*done[1]))[1] == Rflush()


def test_same_fid_waits_its_turn(client: Client, folder: Path) -> None:
    """A clunk behind a stalled write on the fid: the write ends first."""
    with frozen(folder):
        write = send(client, Tsetattr(1, 8, 0, 0, 0, 3, 0, 0, 0, 0))
        client.read(2, 0, 100)
        client.rpc(Tread(2, 0, 10))
    assert isinstance(decode(client.finish(write))[1], Rsetattr)
    client.clunk(1)
    assert (folder / "f").read_text() == "on "


# Control messages


class Asked:
    """Something that is asked for on a thread of its own, because the answer may take its time."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._answers: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(ask()))
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        return bool(self._answers)

    def answer(self) -> Any:
        self._thread.join(20)
        assert self._answers, "no answer came"
        return self._answers[0]


def stall(client: Client, daemon: Daemon, message: Any, data: bytes = b"") -> int:
    """Send a request; returns its head as soon as it waits in the kernel."""
    head = send(client, message, data)
    eventually(lambda: waits_for_storage(daemon.pid), "the request reaches the kernel")
    return head


@pytest.mark.threat("t_reset_inflight")
def test_pause_waits_for_a_write(client: Client, daemon: Daemon, folder: Path) -> None:
    """Its data lies in guest memory until it has ended. Then the guest goes on."""
    with frozen(folder):
        head = stall(client, daemon, Twrite(1, 0, 4), b"text")
        base = Asked(client.front_end.stop)
    client.start(base.answer())
    assert decode(client.finish(head))[1] == Rwrite(4)
    assert (folder / "f").read_text() == "textxt4"
    assert client.read(2, 0, 100) == b"on tmpfs"
    client.create(ROOT, 6, b"h")


# What touches no guest memory need not be drained: it stays out, and is answered later.
@pytest.mark.threat("t_reset_inflight")
def test_pause_does_not_wait_for_what_needs_no_guest_memory(
    client: Client, daemon: Daemon, folder: Path
) -> None:
    """The request stays out over the pause, and is answered after it."""
    with frozen(folder):
        head = stall(client, daemon, Tmkdir(ROOT, b"d", 0o755, 0))
        client.read(2, 0, 100)
        base = client.front_end.stop()
        client.start(base)
        assert client.read(2, 0, 100) == b"on tmpfs"
    assert isinstance(decode(client.finish(head))[1], Rmkdir)


def test_reset_while_a_request_is_out(client: Client, daemon: Daemon, folder: Path) -> None:
    """The next session begins at once; the old request gets no answer, but its fids go."""
    with frozen(folder):
        stall(client, daemon, Tmkdir(ROOT, b"d", 0o755, 0))
        client.reboot()
        client.attach()
        client.open(ROOT, 2, b"t", b"g")
        assert client.read(2, 0, 100) == b"on tmpfs"
    eventually((folder / "d").is_dir, "the mkdir ends")
    client.create(ROOT, 3, b"h")


@pytest.mark.threat("t_reset_inflight")
def test_reset_while_a_write_is_out(client: Client, daemon: Daemon, folder: Path) -> None:
    """It takes until the thaw; nothing is given up."""
    before = daemon.descriptors()
    with frozen(folder):
        stall(client, daemon, Twrite(1, 0, 4), b"text")
        stopped = Asked(client.reboot)
        assert not stopped.is_answered
    stopped.answer()
    client.attach()
    client.open(ROOT, 1, b"f", flags=RDWR)
    client.open(ROOT, 2, b"t", b"g")
    assert client.read(2, 0, 100) == b"on tmpfs"
    client.write(1, 0, b"more")
    assert (folder / "f").read_text() == "morext4"
    eventually(lambda: daemon.descriptors() == before, "nothing leaks")


def test_the_loop_goes_on_while_a_pause_waits(client: Client, daemon: Daemon, folder: Path) -> None:
    """A second front end is told that the first is still there."""
    with frozen(folder):
        stall(client, daemon, Twrite(1, 0, 4), b"text")
        base = Asked(client.front_end.stop)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second:
            second.settimeout(5)
            second.connect(daemon.socket)
            assert second.recv(1) == b""
        assert not base.is_answered
    base.answer()


def test_front_end_leaves_while_its_pause_waits(
    client: Client, daemon: Daemon, folder: Path
) -> None:
    """The next one is served at once, and the memory of the first goes when the write has ended."""
    with frozen(folder):
        stall(client, daemon, Twrite(1, 0, 4), b"text")
        client.front_end.send(Request.GET_VRING_BASE, bytes(8))
        client.front_end.close()
        with promptly(5), Client(daemon.socket) as second:
            second.attach()
            second.open(ROOT, 2, b"t", b"g")
            assert second.read(2, 0, 100) == b"on tmpfs"
    eventually(lambda: "memfd" not in Path(f"/proc/{daemon.pid}/maps").read_text(), "memory goes")
    assert (folder / "f").read_text() == "textxt4"


def test_unrelated_memory_comes_and_goes(client: Client, daemon: Daemon, folder: Path) -> None:
    """As with a DIMM that is plugged: what is out survives it, and is answered."""
    driver = Driver(8, gpa=1 << 33, user_addr=1 << 45)
    region = driver.regions[0]
    dimm = SharedRegion(region.gpa, region.size, region.user_addr, region.offset, driver.fd)
    with frozen(folder):
        head = stall(client, daemon, Tmkdir(ROOT, b"d", 0o755, 0))
        assert client.front_end.add_region(dimm) == 0
        assert client.read(2, 0, 100) == b"on tmpfs"
        assert client.front_end.remove_region(dimm) == 0
        assert client.read(2, 0, 100) == b"on tmpfs"
    assert isinstance(decode(client.finish(head))[1], Rmkdir)
    driver.close()


def test_end_of_the_process_waits_for_no_storage(
    client: Client, daemon: Daemon, folder: Path
) -> None:
    """It parts from its front end within two seconds; the kernel keeps what is left of it."""
    with frozen(folder):
        stall(client, daemon, Twrite(1, 0, 4), b"text")
        os.kill(daemon.pid, signal.SIGTERM)
        client.front_end.socket.settimeout(5)
        assert client.front_end.socket.recv(1) == b""
        eventually(lambda: not Path(daemon.socket).exists(), "the socket goes")


# A disk that does not read


@pytest.fixture
def backing(start_fuse: StartFuse, tmp_path: Path) -> Fuse:
    """Where the image of a disk lies."""
    return start_fuse(tmp_path / "backing", {})


@pytest.fixture
def disk(export: Path, backing: Fuse, mount: Mount, tmp_path: Path) -> Path:
    """The export, on an ext4 of which nothing is in memory; below it a tmpfs ``t`` with ``g``."""
    content = tmp_path / "content"
    (content / "d" / "e").mkdir(parents=True)
    (content / "t").mkdir()
    (content / "f").write_bytes(b"on disk" + bytes(1 << 20))
    (content / "d" / "e" / "cold").touch()
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", content, image], check=True)
    shutil.copy(image, backing.target / "image")
    mount(export, "-o", "loop,ro,noload", str(backing.target / "image"))
    (mount(export / "t", "-t", "tmpfs", "none") / "g").write_text("on tmpfs")
    return export


READS: dict[str, Any] = {
    "read": Tread(1, 0, 100),
    "walk": Twalk(3, 4, (b"e", b"cold")),
    "readdir": Treaddir(5, 0, 4096),
}


@pytest.mark.parametrize("what", READS)
def test_disk_that_does_not_read(
    disk: Path, backing: Fuse, start_daemon: StartDaemon, what: str
) -> None:
    """As one that dm-suspend has stopped: it is local, and nobody can tell beforehand."""
    daemon = start_daemon("--readonly")
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        client.open(ROOT, 2, b"t", b"g")
        client.walk(ROOT, 3, b"d")
        client.open(ROOT, 5, b"d")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        backing.hold("read", "/image")
        head = send(client, READS[what])
        backing.wait_held("read", "/image")
        with promptly():
            for _ in range(20):
                assert client.read(2, 0, 100) == b"on tmpfs"
                client.getattr(2)
        backing.release()
        assert not isinstance(decode(client.finish(head))[1], Rlerror)
