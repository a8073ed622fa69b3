"""Requests that are out on local storage: what they own, in which order they end, who waits."""

import fcntl
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    LockType,
    Rlerror,
    Rwrite,
    SetattrValid,
    Tfsync,
    Tlock,
    Tlopen,
    Tmkdir,
    Tsetattr,
    Twrite,
    decode,
    encode,
)
from ninepd.vhostuser.messages import Request
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, TAG, Client, Daemon, children, receive, send
from tests.support.driver import NEXT
from tests.support.storage import frozen, waits_for_storage
from tests.support.waiting import eventually, promptly

O_CREAT, O_APPEND, O_DSYNC, O_LARGEFILE = 0x40, 0x400, 0x1000, 0x8000


def has_guest_memory(pid: int) -> bool:
    return "memfd:guest" in Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture
def fault() -> Iterator[int]:
    """What the daemon signals when a ring is broken, for SET_VRING_ERR."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def break_ring(client: Client, fault: int) -> None:
    """A chain without an end, behind what was submitted; the daemon has seen it."""
    driver = client.driver
    last = driver.num - 1
    driver.write_desc(last, driver.gpa(0), 64, NEXT, last)
    driver.publish(last)
    driver.force_kick()
    assert select.select([fault], [], [], 5)[0]
    os.eventfd_read(fault)


# Guests that go while a request is out


@pytest.mark.parametrize("broken", [True, False])
def test_guest_memory_goes_while_a_worker_writes(
    start_daemon: StartDaemon, export: Path, mount_ext4: Mount, fault: int, broken: bool
) -> None:
    """It is unmapped at once; what is written is what the first guest sent."""
    file = mount_ext4(export) / "f"
    file.touch()
    daemon = start_daemon()
    data = b"A" * (1 << 16)
    first = Client(daemon.socket)
    first.attach()
    first.open(ROOT, 1, b"f", flags=os.O_RDWR | O_DSYNC)
    first.front_end.set_vring_fd(Request.SET_VRING_ERR, fault)
    with frozen(export):
        send(first, Twrite(1, 0, len(data)), data)
        at = first.driver.ram.find(data)
        eventually(lambda: waits_for_storage(daemon.pid), "the write reaches the kernel")
        if broken:
            break_ring(first, fault)
        first.close()
        eventually(lambda: not has_guest_memory(daemon.pid), "guest memory goes")
        second = Client(daemon.socket)
        second.driver.bytes[at : at + len(data)] = b"B" * len(data)
    with second:
        second.attach()
        eventually(lambda: file.stat().st_size == len(data), "the write ends")
        assert file.read_bytes() == data


def test_ring_breaks_behind_a_request_that_is_out(daemon: Daemon, export: Path, fault: int) -> None:
    """Nothing leaks, and the guest's locks go."""
    path = export / "f"
    path.write_text("x")
    before = daemon.idle_descriptors()
    for _ in range(20):
        with Client(daemon.socket) as client:
            client.attach()
            client.open(ROOT, 1, b"f", flags=os.O_RDWR)
            client.rpc(Tlock(1, LockType.WRLCK, 0, 0, 0, 7, b"guest"))
            client.front_end.set_vring_fd(Request.SET_VRING_ERR, fault)
            client.driver.submit([encode(TAG, Tfsync(1, 0))], [64])
            break_ring(client, fault)
    eventually(lambda: daemon.idle_descriptors() == before, "all descriptors come back")
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_request_hangs_and_its_front_end_leaves(
    start_daemon: StartDaemon, export: Path, mount_ext4: Mount, tmp_path: Path
) -> None:
    """The other export does not notice."""
    folders = {"one": mount_ext4(export), "two": tmp_path / "other"}
    folders["two"].mkdir()
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{folder}"\ntag = "{tag}"\nsocket-path = "{tmp_path / tag}"\n'
            for tag, folder in folders.items()
        )
    )
    daemon = start_daemon(config=str(config))
    one, two = Client(str(tmp_path / "one")), Client(str(tmp_path / "two"))
    with one, two:
        one.attach()
        two.attach()
        with frozen(export):
            send(one, Tmkdir(ROOT, b"d", 0o755, 0))
            processes = children(daemon.pid)
            eventually(lambda: any(map(waits_for_storage, processes)), "the mkdir is in the kernel")
            one.front_end.close()
            with promptly():
                two.front_end.get(Request.GET_FEATURES)
                two.create(ROOT, 1, b"f")
                two.front_end.set_vring_fd(Request.SET_VRING_CALL, two.driver.call_fd)
                two.getattr(ROOT)
        eventually((export / "d").exists, "the mkdir ends")
        two.getattr(ROOT)


# Order


def test_appending_writes_keep_their_order(client: Client, export: Path) -> None:
    """Synchronous ones, which leave the device thread, in batches of 40."""
    size, count = 2048, 40
    flags = O_LARGEFILE | os.O_WRONLY | O_CREAT | O_APPEND | O_DSYNC
    for name in (b"log%d" % number for number in range(12)):
        client.create(ROOT, 1, name, flags=flags)
        heads = []
        for number in range(count):
            data = b"%04d" % number * (size // 4)
            request = encode(TAG + number, Twrite(1, number * size, size))
            request = (len(request) + size).to_bytes(4, "little") + request[4:]
            heads.append(client.driver.submit([request, data], [64]))
        client.driver.kick()
        done = client.driver.wait_used(20, count)
        assert sorted(head for head, _ in done) == sorted(heads)
        for entry in done:
            assert decode(client.driver.reply(*entry))[1] == Rwrite(size)
        written = (export / os.fsdecode(name)).read_bytes()
        order = [int(written[at : at + 4]) for at in range(0, len(written), size)]
        assert order == list(range(count))
        client.clunk(1)


# Leases


@pytest.fixture
def end_lease(export: Path) -> Iterator[Callable[[], object]]:
    """A host process has a lease on the file "leased" (fcntl(2)); calling this gives it back."""
    path = export / "leased"
    path.write_text("0123456789")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    with path.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        yield lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    signal.signal(signal.SIGIO, before)


def threads(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/task"))


@pytest.mark.parametrize(("most", "on_one_file_system"), [(2, 1), (8, 4)])
def test_workers_are_as_many_as_was_said(
    start_daemon: StartDaemon,
    end_lease: Callable[[], object],
    most: int,
    on_one_file_system: int,
) -> None:
    """Half of them wait, for the one file system that there is; what is left comes afterwards."""
    daemon = start_daemon("--workers-max", str(most))
    with Client(daemon.socket) as client:
        client.attach()
        fids = range(1, 13)
        for fid in fids:
            client.walk(ROOT, fid, b"leased")
        before = threads(daemon)  # one of them is there to take the ring over
        heads = [send(client, Tlopen(fid, os.O_WRONLY), tag=TAG + fid) for fid in fids]
        client.getattr(ROOT)  # all of them have been taken
        assert threads(daemon) == before + on_one_file_system - 1
        end_lease()
        done = client.driver.wait_used(20, len(heads))
        assert sorted(head for head, _ in done) == sorted(heads)
        assert not any(
            isinstance(decode(client.driver.reply(*entry))[1], Rlerror) for entry in done
        )


BREAKS_LEASES = {
    "open": Tlopen(1, os.O_WRONLY),
    "truncate": Tsetattr(1, int(SetattrValid.SIZE), 0, 0, 0, 5, 0, 0, 0, 0),
    "open and truncate": Tlopen(1, os.O_WRONLY | os.O_TRUNC),
}


@pytest.mark.parametrize("what", BREAKS_LEASES)
def test_lease_of_a_host_process(
    client: Client, export: Path, end_lease: Callable[[], object], what: str
) -> None:
    """It is called back, which takes its time; whatever else there is goes on."""
    message: Any = BREAKS_LEASES[what]
    client.walk(ROOT, 1, b"leased")
    client.walk(1, 2)
    head = send(client, message)
    with promptly():
        assert client.getattr(2).size == 10
        client.open(2, 3)
        assert client.read(3, 0, 100) == b"0123456789"
    end_lease()
    assert not isinstance(receive(client, head), Rlerror)
    size = {"open": 10, "truncate": 5, "open and truncate": 0}[what]
    assert (export / "leased").stat().st_size == client.getattr(1).size == size
