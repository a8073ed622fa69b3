"""Requests that are out on storage that may hang: sessions, flushes and opens meanwhile."""

import errno
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    NOFID,
    NOTAG,
    LockType,
    Rattach,
    Rclunk,
    Rflush,
    Rlerror,
    Rlopen,
    Rread,
    Rversion,
    Tattach,
    Tclunk,
    Tflush,
    Tlock,
    Tlopen,
    Tread,
    Tversion,
    Twalk,
    decode,
)
from tests.conftest import StartDaemon
from tests.support import storage
from tests.support.client import MSIZE, ROOT, TAG, Client, Daemon, receive, send
from tests.support.storage import Fuse, StartFuse, hang
from tests.support.waiting import eventually, promptly

fuses = storage.fuses
start_fuse = storage.start_fuse
start_daemon = storage.start_daemon
fuse = storage.fuse


# Sessions


def test_many_hang_when_the_front_end_leaves(fuse: Fuse, daemon: Daemon) -> None:
    """More than there are workers: those that never began let go of what they hold, too."""
    before = daemon.idle_descriptors()
    fids = range(1, 81)
    with Client(daemon.socket, num=256) as client:
        client.attach()
        for fid in fids:
            client.open(ROOT, fid, b"m", b"slow")
        fuse.hold("read", "/slow")
        for fid in fids:
            send(client, Tread(fid, 0, 100), tag=TAG + fid)
        fuse.wait_held("read", "/slow")
        client.getattr(ROOT)  # all of them have been taken
    assert daemon.idle_descriptors() > before
    fuse.release()
    eventually(lambda: daemon.idle_descriptors() == before, "all descriptors come back")


def test_walk_that_hung_over_a_reboot(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    """Its fid is one of the old session."""
    before = daemon.descriptors()
    client.walk(ROOT, 1, b"m")
    fuse.hold("getattr", "/slow")
    send(client, Twalk(1, 5, (b"slow",)))
    fuse.wait_held("getattr", "/slow")
    client.reboot()
    client.attach()
    fuse.release()
    eventually(lambda: daemon.descriptors() == before, "the old session goes")
    client.walk(ROOT, 5)


def test_attach_that_hangs(start_fuse: StartFuse, start_daemon: StartDaemon, export: Path) -> None:
    """The whole export is a file system that may hang, and its root does."""
    fuse = start_fuse(export)
    with Client(start_daemon().socket) as client:
        client.attach()
        client.open(ROOT, 1, b"quick")
        fuse.hold("getattr", "/")
        head = send(client, Tattach(5, NOFID, b"", b"", 0))
        fuse.wait_held("getattr", "/")
        try:
            with promptly():
                client.rpc(Tflush(TAG + 1))
                assert client.read(1, 0, 100) == b"quick text"
        finally:
            fuse.release()
        assert isinstance(receive(client, head), Rattach)
        client.getattr(5)


# Closing


def test_close_that_hangs(fuse: Fuse, client: Client) -> None:
    client.open(ROOT, 1, b"m", b"slow", flags=2)
    client.open(ROOT, 2, b"m", b"quick")
    fuse.hold("flush", "/slow")
    head = send(client, Tclunk(1))
    fuse.wait_held("flush", "/slow")
    try:
        with promptly():
            assert client.read(2, 0, 100) == b"quick text"
            client.walk(ROOT, 1)
    finally:
        fuse.release()
    assert receive(client, head) == Rclunk()


def test_close_that_hangs_at_the_end_of_a_session(fuse: Fuse, client: Client) -> None:
    client.open(ROOT, 1, b"m", b"slow", flags=2)
    fuse.hold("flush", "/slow")
    try:
        with promptly():
            client.attach()
            fuse.wait_held("flush", "/slow")
            client.open(ROOT, 1, b"m", b"quick")
            assert client.read(1, 0, 100) == b"quick text"
    finally:
        fuse.release()


def test_close_that_fails_while_a_read_hangs(fuse: Fuse, client: Client) -> None:
    """The file is closed by the worker that used it last."""
    head = hang(client, fuse)
    fuse.fail("flush", "/slow", errno.EIO)
    clunk = send(client, Tclunk(1), tag=TAG + 1)
    fuse.release()
    done = dict(client.driver.wait_used(10, 2))
    assert decode(client.driver.reply(head, done[head]))[1] == Rread(9)
    client.driver.reply(clunk, done[clunk])
    client.open(ROOT, 1, b"m", b"quick")
    assert client.read(1, 0, 100) == b"quick text"


def test_letting_go_of_a_lock_fails(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    """The descriptor that holds the locks of a file is closed, and may bring a late error, too."""
    before = daemon.descriptors()
    client.open(ROOT, 1, b"m", b"quick", flags=2)
    client.rpc(Tlock(1, LockType.WRLCK, 0, 0, 0, 7, b"host"))
    fuse.fail("flush", "/quick", errno.EIO)
    assert client.error(Tclunk(1)) == "EIO"
    assert daemon.descriptors() == before
    fuse.fail("flush", "/quick", 0)
    client.open(ROOT, 1, b"m", b"quick")
    assert client.read(1, 0, 100) == b"quick text"


def test_letting_go_of_a_lock_fails_behind_a_session(
    fuse: Fuse, client: Client, daemon: Daemon
) -> None:
    before = daemon.descriptors()
    client.open(ROOT, 1, b"m", b"slow", flags=2)
    client.rpc(Tlock(1, LockType.WRLCK, 0, 0, 0, 7, b"host"))
    fuse.hold("read", "/slow")
    read = send(client, Tread(1, 0, 100), tag=TAG)
    fuse.wait_held("read", "/slow")
    fuse.fail("flush", "/slow", errno.EIO)
    version = send(client, Tversion(MSIZE, b"9P2000.L"), tag=NOTAG)
    fuse.release()
    done = client.driver.wait_used(10, 2)
    assert [head for head, _ in done] == [read, version]
    client.driver.reply(*done[0])
    assert isinstance(decode(client.driver.reply(*done[1]))[1], Rversion)
    client.attach()
    eventually(lambda: daemon.descriptors() == before, "all descriptors come back")


# Tflush


@pytest.mark.threat("t_flush", "t_version_mid")
def test_flush_of_a_version_that_waits(fuse: Fuse, client: Client) -> None:
    read = hang(client, fuse)
    version = send(client, Tversion(MSIZE, b"9P2000.L"), tag=NOTAG)
    flush = send(client, Tflush(NOTAG), tag=TAG + 1)
    client.getattr(ROOT)  # the only reply
    fuse.release()
    done = client.driver.wait_used(10, 3)
    assert [head for head, _ in done] == [read, version, flush]
    replies = [decode(client.driver.reply(*entry))[1] for entry in done]
    assert [type(reply) for reply in replies] == [Rread, Rversion, Rflush]


@pytest.mark.threat("t_flush")
def test_flush_of_a_flush_that_waits(fuse: Fuse, client: Client) -> None:
    read = hang(client, fuse)
    flushes = [send(client, Tflush(TAG + number), tag=TAG + number + 1) for number in range(3)]
    client.getattr(ROOT)  # the only reply
    fuse.release()
    done = client.driver.wait_used(10, 4)
    assert [head for head, _ in done] == [read, *flushes]


# One fid


def test_opens_of_one_fid_at_once(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    """One wins; the others find it open."""
    before = daemon.descriptors()
    client.walk(ROOT, 1, b"m", b"slow")
    fuse.hold("open", "/slow")
    for number in range(10):
        send(client, Tlopen(1, 0), tag=TAG + number)
    fuse.wait_held("open", "/slow")
    client.getattr(ROOT)  # all of them have been taken
    fuse.release()
    done = client.driver.wait_used(20, 10)
    replies = [decode(client.driver.reply(*entry))[1] for entry in done]
    assert sum(isinstance(reply, Rlopen) for reply in replies) == 1
    assert replies.count(Rlerror(errno.EINVAL)) == 9
    assert client.read(1, 0, 100) == b"slow text"
    client.clunk(1)
    eventually(lambda: daemon.descriptors() == before, "all descriptors come back")
