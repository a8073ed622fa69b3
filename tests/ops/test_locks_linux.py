"""What Linux means by its lock requests, which say less than the system calls behind them."""

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    LockStatus,
    Rlcreate,
    Rlerror,
    Rlock,
    Tlcreate,
    Tlock,
    Tlopen,
    Trenameat,
)
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, receive, send
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
    host_leases,
    host_may,
    lock,
)
from tests.support.waiting import promptly

PARENT, CHILD, OTHER = 1, 2, 3
"""Processes of the guest."""
SHARED, OWN = 1, 2
"""Open files of the guest: one that the parent has passed on to the child, and another's."""


@pytest.fixture
def path(export: Path) -> Path:
    path = export / "f"
    path.write_bytes(bytes(1000))
    return path


@pytest.fixture
def guest(client: Client, path: Path) -> Client:
    client.open(ROOT, SHARED, b"f", flags=os.O_RDWR)
    client.open(ROOT, OWN, b"f", flags=os.O_RDWR)
    return client


# flock(2): the lock belongs to the open file, whichever process took it


def flock(client: Client, fid: int, kind: int, owner: int) -> LockStatus:
    """As flock(2) without LOCK_NB."""
    return lock(client, fid, kind, owner=owner, flags=BLOCK)


def close(client: Client, fid: int, owner: int) -> None:
    """As close(2) while anything is locked (fs/locks.c, locks_remove_posix)."""
    assert lock(client, fid, UNLOCK, owner=owner) == SUCCESS


def test_a_child_converts_the_lock_of_its_parent(guest: Client, path: Path) -> None:
    assert flock(guest, SHARED, WRITE, PARENT) == SUCCESS
    assert flock(guest, SHARED, READ, CHILD) == SUCCESS
    assert host_may(path, fcntl.F_RDLCK)
    assert not host_may(path, fcntl.F_WRLCK)
    assert flock(guest, SHARED, WRITE, CHILD) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK)


def test_a_child_releases_the_lock_of_its_parent(guest: Client, path: Path) -> None:
    assert flock(guest, SHARED, WRITE, PARENT) == SUCCESS
    assert flock(guest, SHARED, UNLOCK, CHILD) == SUCCESS
    assert host_may(path, fcntl.F_WRLCK)
    assert flock(guest, OWN, WRITE, OTHER) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK)


def test_a_parent_releases_what_its_child_converted(guest: Client, path: Path) -> None:
    assert flock(guest, SHARED, READ, PARENT) == SUCCESS
    assert flock(guest, SHARED, READ, CHILD) == SUCCESS
    assert flock(guest, SHARED, UNLOCK, PARENT) == SUCCESS
    assert host_may(path, fcntl.F_WRLCK)


def test_a_child_that_closes_its_copy_releases_nothing(guest: Client, path: Path) -> None:
    assert flock(guest, SHARED, WRITE, PARENT) == SUCCESS
    close(guest, SHARED, CHILD)
    assert not host_may(path, fcntl.F_RDLCK)


def test_a_parent_that_closes_its_copy_leaves_what_its_child_took(
    guest: Client, path: Path
) -> None:
    assert flock(guest, SHARED, WRITE, PARENT) == SUCCESS
    assert flock(guest, SHARED, WRITE, CHILD) == SUCCESS
    close(guest, SHARED, PARENT)
    assert not host_may(path, fcntl.F_RDLCK)


def test_releasing_one_open_file_leaves_the_others(guest: Client, path: Path) -> None:
    assert flock(guest, SHARED, READ, PARENT) == SUCCESS
    assert flock(guest, OWN, READ, OTHER) == SUCCESS
    assert flock(guest, SHARED, UNLOCK, CHILD) == SUCCESS
    assert host_may(path, fcntl.F_RDLCK)
    assert not host_may(path, fcntl.F_WRLCK)


# fcntl(2): the lock belongs to the process


def test_a_process_releases_through_any_of_its_descriptors(guest: Client, path: Path) -> None:
    assert lock(guest, SHARED, WRITE, 0, 10, PARENT) == SUCCESS
    assert lock(guest, OWN, WRITE, 20, 10, PARENT) == SUCCESS
    close(guest, OWN, PARENT)
    assert host_may(path, fcntl.F_WRLCK)


def test_a_child_that_waits_to_release_a_part_releases_nothing(guest: Client, path: Path) -> None:
    """F_SETLKW with F_UNLCK has the flag of LOCK_UN, which however is about whole files."""
    assert lock(guest, SHARED, WRITE, 0, 10, PARENT) == SUCCESS
    assert lock(guest, SHARED, UNLOCK, 0, 10, CHILD, BLOCK) == SUCCESS
    assert lock(guest, SHARED, UNLOCK, 0, 0, CHILD, BLOCK) == SUCCESS
    assert not host_may(path, fcntl.F_RDLCK, 0, 10)


def test_readers_of_one_open_file(guest: Client, path: Path) -> None:
    assert lock(guest, SHARED, READ, owner=PARENT) == SUCCESS
    assert lock(guest, SHARED, READ, owner=CHILD) == SUCCESS
    close(guest, SHARED, PARENT)
    assert not host_may(path, fcntl.F_WRLCK)
    close(guest, SHARED, CHILD)
    assert host_may(path, fcntl.F_WRLCK)


# What the guest's kernel has settled


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_a_lock_overtakes_the_release_before_it(guest: Client, path: Path, kind: int) -> None:
    """The guest's kernel gives a lock to the next one before it sends the former's release."""
    assert lock(guest, SHARED, WRITE, 0, 100, PARENT) == SUCCESS
    assert lock(guest, OWN, kind, 40, 20, OTHER) == SUCCESS
    assert lock(guest, SHARED, UNLOCK, 0, 100, PARENT) == SUCCESS
    assert [host_may(path, fcntl.F_WRLCK, at, 10) for at in (0, 40, 50, 60)] == [
        True,
        False,
        False,
        True,
    ]
    assert host_may(path, fcntl.F_RDLCK, 40, 20) == (kind == READ)


def link(path: Path) -> None:
    os.link(path, path.with_name("other"))


def rename(path: Path) -> None:
    path.rename(path.with_name("other"))


@pytest.mark.parametrize("change", [link, rename])
def test_two_names_of_one_file(guest: Client, path: Path, change: Callable[[Path], None]) -> None:
    """Two inodes for the guest's kernel, which has settled nothing."""
    change(path)
    guest.open(ROOT, 3, b"other", flags=os.O_RDWR)
    assert lock(guest, SHARED, WRITE, 0, 10, owner=PARENT) == SUCCESS
    assert lock(guest, 3, READ, 5, 10, owner=OTHER) == BLOCKED
    assert getlock(guest, 3, UNLOCK, 0, 0, owner=OTHER).type == WRITE
    assert lock(guest, 3, READ, 10, 10, owner=OTHER) == SUCCESS
    assert lock(guest, SHARED, WRITE, 10, 1, owner=PARENT) == BLOCKED
    assert getlock(guest, SHARED, UNLOCK, 0, 0, owner=PARENT).type == READ
    assert lock(guest, 3, UNLOCK, 0, 10, owner=OTHER) == SUCCESS  # not its own: nothing happens
    assert lock(guest, 3, READ, 5, 10, owner=OTHER) == BLOCKED
    close(guest, SHARED, PARENT)
    assert lock(guest, 3, WRITE, 5, 10, owner=OTHER) == SUCCESS


def test_a_rename_onto_another_name_of_the_file(guest: Client, path: Path) -> None:
    """It does nothing (rename(2)), so there are two names still."""
    link(path)
    guest.open(ROOT, 3, b"other", flags=os.O_RDWR)
    assert lock(guest, SHARED, WRITE, 0, 10, owner=PARENT) == SUCCESS
    guest.rpc(Trenameat(ROOT, os.fsencode(path.name), ROOT, b"other"))
    assert path.exists()
    assert lock(guest, 3, WRITE, 0, 10, owner=OTHER) == BLOCKED


# F_GETLK, which comes with the type UNLCK when the guest's own table has no answer


def test_a_reader_asks_beside_another(guest: Client) -> None:
    assert lock(guest, SHARED, READ, owner=PARENT) == SUCCESS
    assert getlock(guest, OWN, UNLOCK, owner=OTHER).type == UNLOCK


def test_a_reader_asks_beside_another_and_a_host_reader(guest: Client, path: Path) -> None:
    assert lock(guest, SHARED, READ, owner=PARENT) == SUCCESS
    with host_holds(path, fcntl.F_RDLCK):
        assert getlock(guest, OWN, UNLOCK, owner=OTHER).type == UNLOCK


def test_a_child_asks_about_the_lock_of_its_parent(guest: Client) -> None:
    assert flock(guest, SHARED, WRITE, PARENT) == SUCCESS
    assert getlock(guest, SHARED, UNLOCK, owner=CHILD).type == UNLOCK


@pytest.mark.parametrize("reader", [False, True])
def test_a_host_writer_is_told(guest: Client, path: Path, reader: bool) -> None:
    if reader:
        assert lock(guest, SHARED, READ, 0, 10, owner=PARENT) == SUCCESS
    with host_holds(path, fcntl.F_WRLCK, 10, 20) as pid:
        found = getlock(guest, OWN, UNLOCK, owner=OTHER)
        assert (found.type, found.start, found.length, found.proc_id) == (WRITE, 10, 20, pid)


def test_a_host_reader_is_told(guest: Client, path: Path) -> None:
    """The question may be about a write lock."""
    with host_holds(path, fcntl.F_RDLCK, 10, 20):
        assert getlock(guest, OWN, UNLOCK, owner=OTHER).type == READ
        assert getlock(guest, OWN, READ, owner=OTHER).type == UNLOCK


def test_another_guest_is_told(guest: Client, start_daemon: StartDaemon) -> None:
    with Client(start_daemon().socket) as second:
        second.attach()
        second.open(ROOT, 1, b"f", flags=os.O_RDWR)
        assert lock(second, 1, WRITE, 10, 20) == SUCCESS
        found = getlock(guest, OWN, UNLOCK, owner=OTHER)
        assert (found.type, found.start, found.length) == (WRITE, 10, 20)


# Open for writing on the host only while something is locked for writing


@pytest.fixture
def program(path: Path, client: Client) -> Path:
    """The file is a program, and a guest has it open for reading, twice."""
    shutil.copy("/bin/true", path)
    path.chmod(0o755)
    client.open(ROOT, SHARED, b"f", flags=os.O_RDONLY)
    client.open(ROOT, OWN, b"f", flags=os.O_RDONLY)
    return path


def runs(program: Path) -> bool:
    try:
        subprocess.run([program], check=True)
    except OSError as error:
        if error.errno != errno.ETXTBSY:
            raise
        return False
    return True


def test_the_host_runs_what_is_locked_for_reading(program: Path, client: Client) -> None:
    assert lock(client, SHARED, READ, owner=PARENT) == SUCCESS
    assert runs(program)
    assert lock(client, SHARED, WRITE, owner=PARENT) == SUCCESS
    assert not runs(program)
    assert lock(client, SHARED, READ, owner=PARENT) == SUCCESS
    assert runs(program)
    assert not host_may(program, fcntl.F_WRLCK)


def test_read_locks_beside_write_locks(program: Path, client: Client) -> None:
    """They move from one descriptor to another, and to yet another."""
    reads = [(at, 5) for at in range(0, 100, 10)]
    for number, (start, length) in enumerate(reads):
        assert lock(client, SHARED, READ, start, length, owner=number) == SUCCESS
    for _ in range(10):
        assert lock(client, OWN, WRITE, 200, 10, owner=99) == SUCCESS
        assert not host_may(program, fcntl.F_RDLCK, 200, 10)
        assert not any(host_may(program, fcntl.F_WRLCK, *held) for held in reads)
        assert all(host_may(program, fcntl.F_WRLCK, start + 5, 5) for start, _ in reads)
        assert lock(client, OWN, UNLOCK, 200, 10, owner=99) == SUCCESS
        assert host_may(program, fcntl.F_WRLCK, 200, 10)
        assert not any(host_may(program, fcntl.F_WRLCK, *held) for held in reads)
    for _ in range(2 * len(reads)):  # moving many is put off for as many requests
        assert lock(client, OWN, READ, 200, 10, owner=99) == SUCCESS
        assert lock(client, OWN, UNLOCK, 200, 10, owner=99) == SUCCESS
    assert runs(program)


def test_refused_write_lock_leaves_the_file_to_be_run(program: Path, client: Client) -> None:
    assert lock(client, SHARED, READ, owner=PARENT) == SUCCESS
    with host_holds(program, fcntl.F_RDLCK):
        assert lock(client, SHARED, WRITE, owner=PARENT) == BLOCKED
    assert runs(program)
    assert not host_may(program, fcntl.F_WRLCK)


def test_write_lock_of_a_program_that_runs(path: Path, client: Client) -> None:
    shutil.copy("/bin/sleep", path)
    path.chmod(0o755)
    client.open(ROOT, SHARED, b"f", flags=os.O_RDONLY)
    assert lock(client, SHARED, READ, owner=PARENT) == SUCCESS
    with subprocess.Popen([path, "60"]) as process:
        try:
            assert lock(client, SHARED, WRITE, owner=PARENT) == SUCCESS
            assert not host_may_not_write(path)
        finally:
            process.kill()
    assert not host_may(path, fcntl.F_WRLCK)


def host_may_not_write(path: Path) -> bool:
    """Is the read lock gone? (It cannot be asked for by opening for writing.)"""
    with path.open("rb") as file:
        fd = file.fileno()
        request = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind: int = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))[0]
        return kind == fcntl.F_UNLCK


# Leases


@pytest.fixture
def lease(path: Path) -> Iterator[int]:
    with host_leases(path) as fd:
        yield fd


def end(lease: int) -> None:
    fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def test_read_lock_beside_a_read_lease(client: Client, lease: int) -> None:
    client.open(ROOT, SHARED, b"f", flags=os.O_RDONLY)
    assert lock(client, SHARED, READ) == SUCCESS
    assert fcntl.fcntl(lease, fcntl.F_GETLEASE) == fcntl.F_RDLCK


@pytest.mark.parametrize("held", [False, True], ids=["new", "upgrade"])
def test_write_lock_waits_for_a_lease(client: Client, path: Path, lease: int, held: bool) -> None:
    client.open(ROOT, SHARED, b"f", flags=os.O_RDONLY)
    if held:
        assert lock(client, SHARED, READ, owner=PARENT) == SUCCESS
    head = send(client, Tlock(SHARED, WRITE, 0, 0, 0, PARENT, b"guest"))
    with promptly():
        assert client.read(SHARED, 0, 10) == bytes(10)
    end(lease)
    assert receive(client, head) == Rlock(SUCCESS)
    assert not host_may(path, fcntl.F_RDLCK)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_create_waits_for_a_lease_on_what_exists(
    client: Client, path: Path, lease: int, flags: int
) -> None:
    client.walk(ROOT, 3)
    message: Any = Tlcreate(3, b"f", flags | 0x8000, 0o644, 0)
    head = send(client, message)
    with promptly():
        client.getattr(ROOT)
    end(lease)
    assert isinstance(receive(client, head), Rlcreate)
    assert path.stat().st_size == client.getattr(3).size == (0 if flags & os.O_TRUNC else 1000)
    assert client.error(Tlopen(3, 0)) == "EINVAL"  # it is open


def test_create_that_fails_behind_a_lease(client: Client, path: Path, lease: int) -> None:
    client.walk(ROOT, 3)
    head = send(client, Tlcreate(3, b"f", os.O_RDWR | 0x8000, 0o644, 0))
    with promptly():
        client.getattr(ROOT)
    path.rename(path.with_name("moved"))
    path.mkdir()
    end(lease)
    assert isinstance(receive(client, head), Rlcreate | Rlerror)
    client.clunk(3)
