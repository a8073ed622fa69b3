"""Control messages below a live guest: what is out stays out, and a dirty log is exact."""

import contextlib
import mmap
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import Rread
from ninepd.vhostuser.messages import (
    LOG_AREA,
    LOG_USED,
    UINT64,
    VRING_ADDR,
    LogArea,
    Request,
    VirtioFeature,
    VringAddr,
)
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, receive
from tests.support.frontend import ALL_FEATURES, SharedRegion
from tests.support.storage import Fuse, hang

MIB = 1 << 20
OTHER = 1 << 40


@pytest.fixture
def fuse(tmp_path: Path, export: Path, as_root: None) -> Iterator[Fuse]:
    tree: dict[str, dict[str, Any]] = {
        "/": {"ino": 1, "text": None},
        "/slow": {"ino": 2, "text": "slow text"},
    }
    with closing(Fuse(export / "m", tree, tmp_path)) as it:
        yield it


@pytest.fixture
def slow(fuse: Fuse, client: Client) -> Iterator[Fuse]:
    """Nothing hangs any more when the daemon is asked to end."""
    yield fuse
    fuse.release()


def own_region(client: Client) -> SharedRegion:
    [region] = client.driver.regions
    return SharedRegion(*region, client.driver.fd)


@pytest.mark.parametrize("own", [False, True])
def test_a_request_survives_changes_of_memory(slow: Fuse, client: Client, own: bool) -> None:
    """QEMU removes and adds regions under a running ring, a DIMM or the one that holds it."""
    head = hang(client, slow)
    memory = os.memfd_create("dimm", os.MFD_CLOEXEC)
    os.ftruncate(memory, MIB)
    region = own_region(client) if own else SharedRegion(OTHER, MIB, OTHER, 0, memory)
    front = client.front_end
    if own:
        assert front.remove_region(region) == 0
        assert front.add_region(region) == 0
    else:
        assert front.add_region(region) == 0
        assert front.remove_region(region) == 0
        assert front.set_mem_table([own_region(client), region]) == 0
    os.close(memory)
    client.walk(ROOT, 7)
    slow.release()
    assert receive(client, head) == Rread(9)


def page(address: int) -> int:
    return address // 4096


class Log:
    def __init__(self) -> None:
        self.size = MIB
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self.bits = mmap.mmap(self.fd, self.size)

    def pages(self) -> set[int]:
        data = bytes(self.bits)
        return {8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}

    def install(self, client: Client) -> None:
        area = LOG_AREA.pack(LogArea(self.size, 0))
        assert client.front_end.request(Request.SET_LOG_BASE, area, [self.fd]) == area

    def close(self) -> None:
        self.bits.close()
        os.close(self.fd)


def set_logging(client: Client, on: bool) -> None:
    """As QEMU's vhost_dev_set_log does."""
    features = ALL_FEATURES if on else ALL_FEATURES & ~VirtioFeature.LOG_ALL
    client.front_end.done(Request.SET_FEATURES, UINT64.pack(features))
    d = client.driver
    address = VringAddr(
        queue=0,
        flags=LOG_USED if on else 0,
        desc=d.user_addr(d.desc),
        used=d.user_addr(d.used),
        avail=d.user_addr(d.avail),
        log=d.gpa(d.used),
    )
    client.front_end.done(Request.SET_VRING_ADDR, VRING_ADDR.pack(address))


def test_what_requests_write_is_logged(client: Client, export: Path) -> None:
    (export / "f").write_bytes(os.urandom(1 << 17))
    client.open(ROOT, 1, b"f")
    first, second = Log(), Log()
    with closing(first), closing(second):
        first.install(client)
        set_logging(client, True)
        seen: set[int] = set()
        differing: set[int] = set()
        for turn in range(20):
            log = (first, second)[turn & 1]
            log.bits[:] = bytes(log.size)
            log.install(client)
            before = client.driver.pages()
            client.read(1, 4096 * turn, 9000 * (turn % 4))
            after = client.driver.pages()
            changed = {n for n, data in after.items() if data != before[n]}
            written_by_driver = {page(client.driver.gpa(client.driver.heap))}
            # The driver writes the rings and its requests; the device all of the rest.
            ours = changed - driver_pages(client) - written_by_driver
            assert ours <= log.pages()
            seen |= log.pages() - written_by_driver
            differing |= ours
        assert seen - driver_pages(client) == differing - driver_pages(client)
        set_logging(client, False)
        log.bits[:] = bytes(log.size)
        client.read(1, 0, 9000)
        assert log.pages() == set()


def driver_pages(client: Client) -> set[int]:
    d = client.driver
    return set(range(page(d.gpa(d.desc)), page(d.gpa(d.used))))


def test_logging_ends_no_session(slow: Fuse, client: Client) -> None:
    """Nor does it drop what is out; and without a log the feature does nothing."""
    head = hang(client, slow)
    with closing(Log()) as log:
        set_logging(client, True)
        client.walk(ROOT, 7)
        log.install(client)
        client.walk(ROOT, 8)
        set_logging(client, False)
        client.walk(ROOT, 9)
        slow.release()
        assert receive(client, head) == Rread(9)


@pytest.mark.parametrize("request_name", ["SET_VRING_CALL", "SET_VRING_ERR"])
def test_signals_are_replaced_beside_a_slow_request(
    slow: Fuse, client: Client, request_name: str
) -> None:
    hang(client, slow)
    for _ in range(100):
        client.front_end.set_vring_fd(Request[request_name], client.driver.call_fd)
    client.walk(ROOT, 7)
    client.front_end.set_vring_fd(Request[request_name], None)
    client.front_end.set_vring_fd(Request[request_name], client.driver.call_fd)
    client.walk(ROOT, 8)


def test_memory_that_cannot_be_replaced_stays(client: Client, export: Path) -> None:
    """The front end and we agree on what is mapped, whatever failed."""
    region = own_region(client)
    short = os.memfd_create("short", os.MFD_CLOEXEC)
    assert client.front_end.add_region(region._replace(fd=short)) == 1
    assert client.front_end.set_mem_table([region._replace(fd=short)]) == 1
    os.close(short)
    client.walk(ROOT, 1)
    assert client.front_end.remove_region(region) == 0


def test_a_reply_into_memory_that_was_cut(start_daemon: StartDaemon, export: Path) -> None:
    """One line in the log, no traceback (the fixture looks), and the next guest is served."""
    daemon = start_daemon()
    os.symlink("x" * 3000, export / "long")
    client = Client(daemon.socket)
    with contextlib.suppress(OSError, TimeoutError, AssertionError):
        client.attach()
        client.walk(ROOT, 1, b"long")
        os.ftruncate(client.driver.fd, client.driver.heap + 4096)
    client.front_end.stop()
    client.front_end.close()
    with Client(daemon.socket) as other:
        other.attach()
