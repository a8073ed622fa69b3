"""What is bounded stays within its bounds: messages, descriptors, locks, memory."""

import os
import socket
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    NOFID,
    LockType,
    Tattach,
    Tlcreate,
    Tlock,
    Tread,
    Treaddir,
    Twalk,
    Twrite,
    Txattrwalk,
)
from tests.conftest import Mount, StartDaemon
from tests.support import reclaim
from tests.support.client import ROOT, Client, Daemon
from tests.support.reclaim import BY_NAME, LIMIT, Start

start = reclaim.start


# msize


@pytest.mark.threat("t_counts")
def test_write_of_more_than_msize(daemon: Daemon, export: Path) -> None:
    """Whole messages count, and it is refused as a whole."""
    msize, header = 4096, 23
    with Client(daemon.socket) as client:
        client.attach(msize=msize)
        client.create(ROOT, 1, b"f")
        for length in (msize - header + 1, 100_000):
            assert client.error(Twrite(1, 0, length), bytes(length)) == "EMSGSIZE"
            assert (export / "f").stat().st_size == 0
        assert client.write(1, 0, bytes(msize - header)) == msize - header


@pytest.mark.threat("t_counts")
def test_read_of_more_than_msize(daemon: Daemon, export: Path) -> None:
    msize, header = 4096, 11
    (export / "f").write_bytes(os.urandom(20_000))
    with Client(daemon.socket) as client:
        client.attach(msize=msize)
        client.open(ROOT, 1, b"f")
        for count in (msize, 10_000, 0xFFFF_FFFF):
            _, data = client.rpc_with_data(Tread(1, 0, count), room=16_384)
            assert data == (export / "f").read_bytes()[: msize - header]


# Fids


@pytest.mark.threat("t_fid_flood")
def test_fids_are_as_many_as_was_said(start_daemon: StartDaemon, export: Path) -> None:
    """Each message that makes one is refused then, and does nothing; a clunk makes room."""
    most = 100
    (export / "f").write_text("text")
    with Client(start_daemon("--fids-max", str(most)).socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        for fid in range(2, most):
            client.walk(ROOT, fid)
        refused = (
            Twalk(ROOT, most, (b"f",)),
            Tattach(most, NOFID, b"", b"", 0),
            Txattrwalk(1, most, b""),
        )
        for message in refused:
            assert client.error(message) == "ENFILE"
        assert client.read(1, 0, 9) == b"text"
        client.walk(2, 2, b"f")  # takes no other number
        client.clunk(2)
        client.walk(ROOT, most, b"f")
        assert client.error(Twalk(ROOT, 2, ())) == "ENFILE"
        client.attach()  # a Tversion takes them all back
        client.walk(ROOT, 2)


# Descriptors


@pytest.mark.threat("t_open_flood")
def test_create_without_descriptors_leaves_no_file(start: Start, export: Path) -> None:
    _, client = start(*BY_NAME)
    created = 0
    while True:
        fid = created + 1
        client.walk(ROOT, fid)
        if refusal := client.error(Tlcreate(fid, b"f%d" % created, 0x8042, 0o644, 0)):
            break
        created += 1
    assert refusal == "EMFILE"
    assert LIMIT / 2 < created < LIMIT
    assert {path.name for path in export.iterdir()} == {f"f{n}" for n in range(created)}
    client.clunk(1)
    client.rpc(Tlcreate(fid, b"now", 0x8042, 0o644, 0))


@pytest.mark.threat("t_open_flood")
def test_locks_take_descriptors_of_the_guest_only(start: Start, export: Path) -> None:
    daemon, client = start(*BY_NAME)
    for fid in range(1, LIMIT):
        client.walk(ROOT, fid)
        refusal = client.error(Tlcreate(fid, b"f%d" % fid, 0x8042, 0o644, 0))
        refusal = refusal or client.error(Tlock(fid, LockType.WRLCK, 0, 0, 0, fid, b"guest"))
        if refusal:
            break
    assert refusal in {"EMFILE", "ENOLCK"}
    client.getattr(ROOT)
    # There is one front end already; to say so, the daemon has to accept.
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(5)
        other.connect(daemon.socket)
        assert other.recv(1) == b""
    client.front_end.close()
    with Client(daemon.socket) as following:
        following.attach()


# Locks


def lock(kind: LockType, start: int, length: int) -> Tlock:
    return Tlock(1, kind, 0, start, length, 7, b"guest")


@pytest.mark.parametrize(("options", "most"), [((), 4096), (("--locks-max", "3"), 3)])
def test_ranges_that_are_split(
    start_daemon: StartDaemon, export: Path, options: tuple[str, ...], most: int
) -> None:
    """Giving back the middle of a range makes two of it: that is limited, too."""
    (export / "f").touch()
    with Client(start_daemon(*options).socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=os.O_RDWR)
        client.rpc(lock(LockType.WRLCK, 0, 3 * most))
        splits = 0
        while not (refusal := client.error(lock(LockType.UNLCK, 2 * splits + 1, 1))):
            splits += 1
            assert splits < most
        assert refusal == "ENOLCK"
        assert splits == most - 1
        assert client.error(lock(LockType.WRLCK, 4 * most, 1)) == "ENOLCK"
        # What does not split is still done.
        client.rpc(lock(LockType.UNLCK, 0, 1))
        client.rpc(lock(LockType.WRLCK, 4 * most, 1))
        client.rpc(lock(LockType.UNLCK, 0, 0))


# Directories


@pytest.mark.parametrize(("options", "forgotten"), [((), False), (("--cookies-max", "8192"), True)])
def test_a_long_way_back_in_a_directory(
    start_daemon: StartDaemon,
    export: Path,
    mount_ext4: Mount,
    options: tuple[str, ...],
    forgotten: bool,
) -> None:
    """A listing comes to its end, whatever is remembered of it."""
    folder = mount_ext4(export / "m") / "d"
    folder.mkdir()
    (folder / "0").touch()
    names = {b"%d" % number for number in range(9000)}
    for name in names - {b"0"}:
        os.link(folder / "0", folder / os.fsdecode(name))
    with Client(start_daemon(*options).socket) as client:
        client.attach()
        client.open(ROOT, 1, b"m", b"d")
        listed = client.listing(1)
        assert len(listed) == len(names) + 2
        assert {entry.name for entry in listed} == names | {b".", b".."}
        first = next(entry.offset for entry in listed if entry.offset >= 1 << 30)
        assert client.error(Treaddir(1, first, 1000)) == ("EINVAL" if forgotten else "")
        client.readdir(1)


# Memory


def test_cookies_go_with_the_last_open_fid(
    start_daemon: StartDaemon, export: Path, mount_ext4: Mount
) -> None:
    """A directory that is held for ever, whose entries come and go, takes no more and more."""
    count = 500
    folder = mount_ext4(export / "m") / "d"
    folder.mkdir()
    with Client(start_daemon().socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"m", b"d")
        for turn in range(3):
            files = [folder / f"{turn}-{number}" for number in range(count)]
            for file in files:
                file.touch()
            client.open(1, 2)
            client.open(1, 3)
            listed = client.listing(2)
            assert len(listed) == count + 2
            # One number for each, where the file system's own are too long.
            assert max(entry.offset for entry in listed) <= (1 << 30) + count + 2
            client.clunk(2)
            # The other one goes by the same numbers.
            assert client.readdir(3, listed[0].offset)[0] == listed[1]
            client.clunk(3)
            for file in files:
                file.unlink()
