"""Locks of files whose storage hangs keep nobody else waiting."""

import fcntl
import os
from pathlib import Path

from ninepd.p9.messages import Rclunk, Rlock, Tclunk, Tlock
from tests.support import storage
from tests.support.client import ROOT, TAG, Client, Daemon, receive, send
from tests.support.locking import READ, SUCCESS, UNLOCK, WRITE, getlock, host_may, lock
from tests.support.storage import Fuse
from tests.support.waiting import eventually, promptly

fuses = storage.fuses
start_fuse = storage.start_fuse
start_daemon = storage.start_daemon
fuse = storage.fuse


def hang_lock(client: Client, fuse: Fuse) -> int:
    """The head of a Tlock that waits while its file is opened; fid 1 is open on that file."""
    client.open(ROOT, 1, b"m", b"slow")
    fuse.hold("open", "/slow")
    head = send(client, Tlock(1, READ, 0, 0, 0, 7, b"guest"), tag=TAG)
    fuse.wait_held("open", "/slow")
    return head


def test_others_lock_and_close(fuse: Fuse, client: Client) -> None:
    client.open(ROOT, 2, b"m", b"quick", flags=os.O_RDWR)
    client.open(ROOT, 3, b"m", b"quick", flags=os.O_RDWR)
    assert lock(client, 2, WRITE, 0, 10) == SUCCESS
    head = hang_lock(client, fuse)
    try:
        with promptly():
            assert client.rpc(Tclunk(2)) == Rclunk()
            assert lock(client, 3, WRITE) == SUCCESS
            assert getlock(client, 3, UNLOCK).type == UNLOCK
            assert client.rpc(Tclunk(3)) == Rclunk()
    finally:
        fuse.release()
    assert receive(client, head) == Rlock(SUCCESS)


def test_a_clunk_behind_a_lock_waits_for_the_inode(
    fuse: Fuse, client: Client, export: Path
) -> None:
    """When it comes its fid has no lock yet. When it may start, it has one to give up."""
    for fid in (1, 2):
        client.open(ROOT, fid, b"m", b"slow", flags=os.O_RDWR)
    fuse.hold("open", "/slow")
    reading = send(client, Tlock(2, READ, 0, 100, 1, 8, b"guest"), tag=1)
    fuse.wait_held("open", "/slow")
    writing = send(client, Tlock(1, WRITE, 0, 0, 10, 7, b"guest"), tag=2)
    clunk = send(client, Tclunk(2), tag=3)
    client.getattr(ROOT)  # all were taken
    fuse.hold("open", "/slow")  # the first goes on
    assert receive(client, reading) == Rlock(SUCCESS)
    fuse.wait_held("open", "/slow")
    fuse.release()
    assert receive(client, writing) == Rlock(SUCCESS)
    assert receive(client, clunk) == Rclunk()
    assert host_may(export / "m" / "slow", fcntl.F_WRLCK, 100, 1)


def test_the_front_end_leaves(fuse: Fuse, daemon: Daemon, export: Path) -> None:
    """All other locks go with it at once, and what hangs leaves nothing behind."""
    before = daemon.idle_descriptors()
    quick = export / "m" / "quick"
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 2, b"m", b"quick", flags=os.O_RDWR)
        assert lock(client, 2, WRITE) == SUCCESS
        assert not host_may(quick, fcntl.F_RDLCK)
        hang_lock(client, fuse)
    eventually(lambda: host_may(quick, fcntl.F_WRLCK), "the lock goes")
    fuse.release()
    eventually(lambda: daemon.idle_descriptors() == before, "all descriptors come back")
    assert host_may(export / "m" / "slow", fcntl.F_WRLCK)
