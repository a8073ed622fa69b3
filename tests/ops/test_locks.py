"""Tlock and Tgetlock: real locks between guests, and between a guest and the host."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.p9.messages import Rgetlock, Tclunk, Tgetlock, Tlock, Tversion
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon
from tests.support.locking import (
    BLOCK,
    BLOCKED,
    FLOCK,
    READ,
    SUCCESS,
    UNLOCK,
    WRITE,
    getlock,
    host_holds,
    host_may,
    lock,
)


@pytest.fixture
def path(export: Path) -> Path:
    path = export / "f"
    path.write_bytes(bytes(1000))
    return path


@pytest.fixture
def first(client: Client, path: Path) -> Client:
    """A guest with the file open as fid 1."""
    client.open(ROOT, 1, b"f", flags=2)
    return client


@pytest.fixture
def second(start_daemon: StartDaemon, path: Path) -> Iterator[Client]:
    """Another guest, served by another process."""
    with Client(start_daemon().socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=2)
        yield client


# One guest


def test_lock_and_unlock(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK)
    assert lock(first, 1, UNLOCK) == SUCCESS
    assert host_may(path, fcntl.F_WRLCK)


def test_shared_lock(first: Client, path: Path) -> None:
    assert lock(first, 1, READ) == SUCCESS
    assert host_may(path, fcntl.F_RDLCK)
    assert not host_may(path, fcntl.F_WRLCK)


def test_unlocking_a_part(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE, 0, 100) == SUCCESS
    assert lock(first, 1, UNLOCK, 40, 20) == SUCCESS
    taken = [host_may(path, fcntl.F_WRLCK, at, 10) for at in (0, 30, 40, 50, 60, 90, 100)]
    assert taken == [False, False, True, True, False, False, True]


def test_changing_a_part(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE, 0, 100) == SUCCESS
    assert lock(first, 1, READ, 50, 10) == SUCCESS
    assert host_may(path, fcntl.F_RDLCK, 50, 10)
    assert not host_may(path, fcntl.F_WRLCK, 50, 10)
    assert not host_may(path, fcntl.F_RDLCK, 40, 10)


def test_length_zero_reaches_beyond_every_end(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE, 10, 0) == SUCCESS
    assert host_may(path, fcntl.F_WRLCK, 0, 10)
    assert not host_may(path, fcntl.F_WRLCK, 1 << 62, 1)


def test_write_lock_by_a_read_only_fid(first: Client, path: Path) -> None:
    """flock(2) gives LOCK_EX to whoever has the file open for reading."""
    first.open(ROOT, 2, b"f", flags=0)
    assert lock(first, 2, WRITE) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK)


def test_lock_of_a_file_that_nobody_may_write(first: Client, path: Path) -> None:
    path.chmod(0o444)
    assert lock(first, 1, WRITE) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK)


def test_two_owners_of_one_guest_that_share(first: Client, path: Path) -> None:
    first.open(ROOT, 2, b"f", flags=2)
    assert lock(first, 1, READ, owner=1) == SUCCESS
    assert lock(first, 2, READ, owner=2) == SUCCESS
    assert lock(first, 1, UNLOCK, owner=1) == SUCCESS
    assert not host_may(path, fcntl.F_WRLCK)
    assert lock(first, 2, UNLOCK, owner=2) == SUCCESS
    assert host_may(path, fcntl.F_WRLCK)


def test_two_fids_of_one_owner_do_not_conflict(first: Client) -> None:
    first.open(ROOT, 2, b"f", flags=2)
    assert lock(first, 1, WRITE) == SUCCESS
    assert lock(first, 2, WRITE) == SUCCESS


def test_upgrade_and_downgrade(first: Client, path: Path) -> None:
    assert lock(first, 1, READ) == SUCCESS
    assert lock(first, 1, WRITE) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK)
    assert lock(first, 1, READ) == SUCCESS
    assert host_may(path, fcntl.F_RDLCK)


def test_failed_upgrade_keeps_what_there_was(first: Client, path: Path) -> None:
    assert lock(first, 1, READ, 0, 100) == SUCCESS
    with host_holds(path, fcntl.F_RDLCK, 50, 10):
        assert lock(first, 1, WRITE, 0, 100) == BLOCKED
        assert not host_may(path, fcntl.F_WRLCK, 0, 10)
        assert host_may(path, fcntl.F_RDLCK, 0, 100)


def test_bad_requests(first: Client) -> None:
    assert first.error(Tlock(1, 3, 0, 0, 0, 1, b"")) == "EINVAL"
    assert first.error(Tlock(1, 255, 0, 0, 0, 1, b"")) == "EINVAL"
    assert first.error(Tlock(1, WRITE, 4, 0, 0, 1, b"")) == "EINVAL"
    assert first.error(Tlock(1, WRITE, 0, 1 << 63, 1, 1, b"")) == "EINVAL"
    assert first.error(Tlock(1, WRITE, 0, (1 << 63) - 1, 2, 1, b"")) == "EINVAL"
    assert first.error(Tgetlock(1, 3, 0, 0, 1, b"")) == "EINVAL"
    assert first.error(Tgetlock(1, WRITE, (1 << 64) - 1, 0, 1, b"")) == "EINVAL"
    first.walk(ROOT, 2, b"f")
    assert first.error(Tlock(2, WRITE, 0, 0, 0, 1, b"")) == "EBADF"
    assert first.error(Tgetlock(2, WRITE, 0, 0, 1, b"")) == "EBADF"


def test_last_byte(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE, (1 << 63) - 2, 1) == SUCCESS
    assert not host_may(path, fcntl.F_WRLCK, (1 << 63) - 2, 1)


def test_too_many_ranges(first: Client) -> None:
    for number in range(4096):
        assert lock(first, 1, READ, 2 * number, 1) == SUCCESS
    assert first.error(Tlock(1, READ, 0, 10_000, 1, 1, b"guest")) == "ENOLCK"
    assert lock(first, 1, UNLOCK) == SUCCESS
    assert lock(first, 1, READ, 10_000, 1) == SUCCESS


# Getlock


def test_getlock_of_a_free_range(first: Client) -> None:
    assert getlock(first, 1, WRITE, 5, 10) == Rgetlock(UNLOCK, 5, 10, 1, b"guest")


def test_getlock_of_ones_own(first: Client) -> None:
    assert lock(first, 1, WRITE) == SUCCESS
    assert getlock(first, 1, WRITE).type == UNLOCK


def test_getlock_of_another_owner(first: Client) -> None:
    assert lock(first, 1, WRITE, 10, 20, owner=7) == SUCCESS
    assert getlock(first, 1, READ, 0, 0, owner=8) == Rgetlock(WRITE, 10, 20, 7, b"guest")
    assert getlock(first, 1, READ, 30, 0, owner=8).type == UNLOCK


def test_getlock_of_a_host_process(first: Client, path: Path) -> None:
    with host_holds(path, fcntl.F_WRLCK, 10, 20) as pid:
        found = getlock(first, 1, READ)
        assert (found.type, found.start, found.length, found.proc_id) == (WRITE, 10, 20, pid)


def test_getlock_leaves_nothing_behind(daemon: Daemon, first: Client, path: Path) -> None:
    before = daemon.descriptors()
    for _ in range(20):
        getlock(first, 1, WRITE)
    assert daemon.descriptors() == before
    assert host_may(path, fcntl.F_WRLCK)


# The host


@pytest.mark.parametrize("flags", [0, BLOCK])
def test_host_process_bars_the_guest(first: Client, path: Path, flags: int) -> None:
    with host_holds(path, fcntl.F_WRLCK, 100, 100):
        assert lock(first, 1, READ, flags=flags) == BLOCKED
        assert lock(first, 1, WRITE, 0, 100, flags=flags) == SUCCESS
        assert lock(first, 1, WRITE, 200, 0, flags=flags) == SUCCESS
    assert lock(first, 1, WRITE) == SUCCESS


def test_host_reader_lets_guest_readers_in(first: Client, path: Path) -> None:
    with host_holds(path, fcntl.F_RDLCK):
        assert lock(first, 1, READ) == SUCCESS
        assert lock(first, 1, WRITE) == BLOCKED
        assert getlock(first, 1, READ).type == UNLOCK
        assert getlock(first, 1, WRITE).type == READ


def test_host_open_file_description(first: Client, path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    request = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 10, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    assert lock(first, 1, WRITE, 5, 10) == BLOCKED
    os.close(fd)
    assert lock(first, 1, WRITE, 5, 10) == SUCCESS


def test_lock_follows_the_inode(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE) == SUCCESS
    path.rename(path.with_name("moved"))
    path.write_text("another")
    assert host_may(path, fcntl.F_WRLCK)
    assert not host_may(path.with_name("moved"), fcntl.F_WRLCK)


# Two guests


def test_two_guests(first: Client, second: Client) -> None:
    assert lock(first, 1, WRITE, 0, 100) == SUCCESS
    assert lock(second, 1, READ, 50, 10) == BLOCKED
    assert lock(second, 1, WRITE, 100, 10) == SUCCESS
    assert getlock(second, 1, WRITE, 0, 100).type == WRITE
    assert lock(first, 1, UNLOCK) == SUCCESS
    assert lock(second, 1, WRITE) == SUCCESS
    assert lock(first, 1, READ) == BLOCKED


def test_two_guests_share(first: Client, second: Client) -> None:
    assert lock(first, 1, READ) == SUCCESS
    assert lock(second, 1, READ) == SUCCESS
    assert lock(second, 1, WRITE) == BLOCKED


def test_same_owner_in_two_guests_is_not_the_same(first: Client, second: Client) -> None:
    """proc_id and client_id are the guest's word; clones of one image say the same."""
    assert lock(first, 1, WRITE, owner=5) == SUCCESS
    assert lock(second, 1, WRITE, owner=5) == BLOCKED


# Release


def test_released_by_clunk(daemon: Daemon, first: Client, path: Path) -> None:
    before = daemon.descriptors()
    assert lock(first, 1, WRITE, 0, 10) == SUCCESS
    first.open(ROOT, 2, b"f", flags=2)
    first.clunk(2)  # not the one that holds it
    assert not host_may(path, fcntl.F_WRLCK)
    first.rpc(Tclunk(1))
    assert host_may(path, fcntl.F_WRLCK)
    assert daemon.descriptors() < before


def test_released_by_version(first: Client, path: Path) -> None:
    assert lock(first, 1, WRITE) == SUCCESS
    first.rpc(Tversion(8192, b"9P2000.L"))
    assert host_may(path, fcntl.F_WRLCK)


def test_released_when_the_front_end_leaves(start_daemon: StartDaemon, path: Path) -> None:
    daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=2)
        assert lock(client, 1, WRITE) == SUCCESS
    with Client(daemon.socket) as client:  # served only when the former is gone
        client.attach()
        assert host_may(path, fcntl.F_WRLCK)


def test_released_when_the_daemon_ends(start_daemon: StartDaemon, path: Path) -> None:
    daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=2)
        assert lock(client, 1, WRITE) == SUCCESS
        assert daemon.stop() == 0
        assert host_may(path, fcntl.F_WRLCK)


@pytest.mark.usefixtures("as_root")
def test_locks_do_not_leak(daemon: Daemon, first: Client) -> None:
    before = daemon.descriptors()
    for _ in range(100):
        assert lock(first, 1, WRITE, 0, 10) == SUCCESS
        assert lock(first, 1, UNLOCK, 0, 10) == SUCCESS
    assert daemon.descriptors() == before


def test_write_lock_where_nothing_may_be_written(
    start_daemon: StartDaemon, path: Path, export: Path
) -> None:
    """As flock(2) allows it: it keeps writers of the host out."""
    with Client(start_daemon("--readonly").socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        assert lock(client, 1, WRITE) == SUCCESS
        assert not host_may(path, fcntl.F_WRLCK)
        assert host_may(path, fcntl.F_RDLCK)
        assert lock(client, 1, UNLOCK) == SUCCESS
        with host_holds(path, fcntl.F_WRLCK):
            assert lock(client, 1, WRITE) == BLOCKED
        assert host_may(path, fcntl.F_WRLCK)
