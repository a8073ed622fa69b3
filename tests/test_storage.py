"""Storage that hangs, fails or lies: one file's trouble is that file's alone."""

import contextlib
import errno
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.ops.table import ROWS
from ninepd.p9.messages import (
    NOFID,
    LockType,
    Qid,
    Rfsync,
    Rlerror,
    Rread,
    SetattrValid,
    Tattach,
    Tauth,
    Tclunk,
    Tflush,
    Tfsync,
    Tgetattr,
    Tgetlock,
    Tlcreate,
    Tlink,
    Tlock,
    Tlopen,
    Tmkdir,
    Tmknod,
    Tread,
    Treaddir,
    Treadlink,
    Tremove,
    Trename,
    Trenameat,
    Tsetattr,
    Tstatfs,
    Tsymlink,
    Tunlinkat,
    Tversion,
    Twalk,
    Twrite,
    Txattrcreate,
    Txattrwalk,
    decode,
)
from ninepd.p9.session import Dialect
from ninepd.vhostuser.messages import Request
from tests.conftest import StartDaemon
from tests.support import storage
from tests.support.client import MSIZE, ROOT, TAG, Client, Daemon, receive, send
from tests.support.storage import TREE, Fuse, StartFuse, hang
from tests.support.waiting import eventually, promptly

fuses = storage.fuses
start_fuse = storage.start_fuse
start_daemon = storage.start_daemon
fuse = storage.fuse


# What hangs


@pytest.fixture
def two_exports(
    fuse: Fuse, start_daemon: StartDaemon, tmp_path: Path, export: Path
) -> Iterator[tuple[Client, Client]]:
    """Clients of two exports of one daemon; the FUSE file system is below the first."""
    other = tmp_path / "other"
    other.mkdir()
    config = tmp_path / "config.toml"
    paths = [tmp_path / "one.sock", tmp_path / "two.sock"]
    config.write_text(
        f'[[export]]\nexport = "{export}"\ntag = "one"\nsocket-path = "{paths[0]}"\n'
        f'[[export]]\nexport = "{other}"\ntag = "two"\nsocket-path = "{paths[1]}"\n'
    )
    start_daemon(config=str(config))
    with Client(str(paths[0])) as one, Client(str(paths[1])) as two:
        one.attach()
        two.attach()
        yield one, two


@pytest.mark.threat("t_slow_fs")
def test_everything_else_goes_on(fuse: Fuse, two_exports: tuple[Client, Client]) -> None:
    one, two = two_exports
    head = hang(one, fuse)
    with promptly():
        for client in (one, two):
            client.create(ROOT, 2, b"local")
            client.write(2, 0, b"text")
            client.rpc(Tfsync(2, 0))
            assert client.read(2, 0, 10) == b"text"
            client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
            assert b"local" in client.names(ROOT)
        one.open(ROOT, 3, b"m", b"quick")
        assert one.read(3, 0, 100) == b"quick text"
        assert one.getattr(1).size == len("slow text")  # of the very file
    fuse.release()
    assert receive(one, head) == Rread(9)


def change(fid: int, valid: int, mode: int = 0, size: int = 0) -> Tsetattr:
    return Tsetattr(fid, valid, mode, 0, 0, size, 0, 0, 0, 0)


# Operation and path that wait there, the request, and what it is answered with in the end. Fids:
# 1 the mount's root, 2 its file "slow", 3 the same open, 4 its directory "dir", 5 the same open,
# 6 the file in it, 7 a symbolic link, 8 an attribute of "slow" that is to be set.
HANGS: dict[str, tuple[str, str, Any, bytes]] = {
    "walk": ("getattr", "/slow", Twalk(1, 9, (b"slow",)), b""),
    "walk from outside": ("getattr", "/slow", Twalk(ROOT, 9, (b"m", b"slow")), b""),
    "getattr": ("getattr", "/slow", Tgetattr(2, 0x3FFF), b""),
    "open": ("open", "/slow", Tlopen(2, 2), b""),
    "read": ("read", "/slow", Tread(3, 0, 100), b""),
    "write": ("write", "/slow", Twrite(3, 0, 4), b"data"),
    "fsync": ("fsync", "/slow", Tfsync(3, 0), b""),
    "statfs": ("statfs", "/slow", Tstatfs(2), b""),
    "chmod": ("chmod", "/slow", change(2, SetattrValid.MODE, mode=0o600), b""),
    "truncate": ("truncate", "/slow", change(3, SetattrValid.SIZE, size=4), b""),
    "create": ("create", "/dir/new", Tlcreate(4, b"new", 0x42, 0o600, 0), b""),
    "mkdir": ("mkdir", "/dir/new", Tmkdir(4, b"new", 0o700, 0), b""),
    "unlink": ("unlink", "/dir/file", Tunlinkat(4, b"file", 0), b""),
    "rename": ("rename", "/dir/file", Trenameat(4, b"file", 1, b"moved"), b""),
    "readdir": ("readdir", "/dir", Treaddir(5, 0, 1000), b""),
    "clunk": ("flush", "/slow", Tclunk(3), b""),
    "attach": ("getattr", "/dir", Tattach(9, NOFID, b"", b"m/dir", 0), b""),
    "link": ("link", "/dir/new", Tlink(4, 2, b"new"), b""),
    "symlink": ("symlink", "/dir/new", Tsymlink(4, b"new", b"target", 0), b""),
    "mknod": ("mknod", "/dir/new", Tmknod(4, b"new", stat.S_IFIFO | 0o600, 0, 0, 0), b""),
    "readlink": ("readlink", "/dir/link", Treadlink(7), b""),
    "rename of a fid": ("rename", "/dir/file", Trename(6, 1, b"moved"), b""),
    "remove": ("unlink", "/dir/file", Tremove(6), b""),
    "lock": ("lock", "/slow", Tlock(3, LockType.WRLCK, 0, 0, 100, 1, b"guest"), b""),
    "getlock": ("lock", "/slow", Tgetlock(3, LockType.WRLCK, 0, 100, 1, b"guest"), b""),
    "xattr": ("getxattr", "/slow", Txattrwalk(2, 9, b"user.x"), b""),
    "names of xattrs": ("listxattr", "/slow", Txattrwalk(2, 9, b""), b""),
    "setting an xattr": ("setxattr", "/slow", Tclunk(8), b""),
}
NEVER_WAITS = {Tauth, Tflush, Tversion, Txattrcreate}
"""They do not touch the export."""


def test_every_message_is_in_hangs() -> None:
    served = {row.message for row in ROWS[Dialect.L].values()}
    assert {type(message) for _, _, message, _ in HANGS.values()} == served - NEVER_WAITS


@pytest.mark.parametrize("what", HANGS)
def test_any_operation_may_hang(
    start_fuse: StartFuse, client: Client, export: Path, what: str
) -> None:
    op, path, message, data = HANGS[what]
    fuse = start_fuse(export / "m", TREE, "locks")
    client.walk(ROOT, 1, b"m")
    client.walk(1, 2, b"slow")
    client.open(2, 3, flags=2)
    client.walk(1, 4, b"dir")
    client.open(4, 5)
    client.walk(4, 6, b"file")
    client.rpc(Tsymlink(4, b"link", b"target", 0))
    client.walk(4, 7, b"link")
    client.set_xattr(2, b"user.x", b"value")
    client.walk(2, 8)
    client.rpc(Txattrcreate(8, b"user.x", 0, 0))
    fuse.hold(op, path)
    head = send(client, message, data)
    fuse.wait_held(op, path)
    try:
        with promptly():
            client.walk(ROOT, 10)
            client.getattr(10)
            client.clunk(10)
    finally:
        fuse.release()
    assert not isinstance(receive(client, head), Rlerror)


def test_the_mount_that_hangs_is_not_asked_from_outside(fuse: Fuse, client: Client) -> None:
    """The directory that it is mounted in is local, and what is known of its root is enough."""
    client.open(ROOT, 1)
    fuse.hold("getattr", "/")
    try:
        with promptly():
            assert b"m" in {entry.name for entry in client.listing(1)}
            client.walk(ROOT, 2, b"m")
    finally:
        fuse.release()


def test_many_requests_hang(fuse: Fuse, client: Client) -> None:
    count = 40
    fuse.hold("read", "/slow")
    client.open(ROOT, 1, b"m", b"slow")
    heads = [send(client, Tread(1, 0, 100), tag=TAG + number) for number in range(count)]
    fuse.wait_held("read", "/slow")
    try:
        with promptly():
            client.create(ROOT, 2, b"local")
            assert client.rpc(Tfsync(2, 0)) == Rfsync()
    finally:
        fuse.release()
    done = client.driver.wait_used(20, count)
    assert sorted(head for head, _ in done) == sorted(heads)


def test_clunk_of_a_fid_that_hangs(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    """The number is free at once; the file is closed when the read is done."""
    before = daemon.descriptors()
    head = hang(client, fuse)
    with promptly():
        client.walk(ROOT, 2)
    clunk = send(client, Tclunk(1), tag=TAG + 1)
    fuse.release()
    done = client.driver.wait_used(10, 2)
    assert {entry[0] for entry in done} == {head, clunk}
    client.clunk(2)
    assert daemon.descriptors() == before


# Tflush, the ring and the end while something hangs


@pytest.mark.threat("t_slow_fs", "t_flush")
def test_flush_is_answered_behind_what_it_flushes(fuse: Fuse, client: Client) -> None:
    head = hang(client, fuse)
    flushes = [send(client, Tflush(TAG), tag=TAG + number) for number in (1, 2)]
    client.getattr(ROOT)
    assert client.driver.take_used() == []
    fuse.release()
    done = client.driver.wait_used(10, 3)
    assert [entry[0] for entry in done] == [head, *flushes]
    assert decode(client.driver.reply(*done[0]))[1] == Rread(9)


def test_front_end_leaves(fuse: Fuse, daemon: Daemon) -> None:
    idle = daemon.idle_descriptors()
    client = Client(daemon.socket)
    client.attach()
    hang(client, fuse)
    with promptly():
        client.close()
        with Client(daemon.socket) as other:
            other.attach()
            assert other.getattr(ROOT).nlink
    fuse.release()
    eventually(lambda: daemon.idle_descriptors() == idle, "all descriptors come back")


@pytest.mark.parametrize("released", ["while stopped", "when resumed"])
def test_pause_and_resume(fuse: Fuse, client: Client, released: str) -> None:
    """The reply is parked and comes exactly once."""
    head = hang(client, fuse)
    with promptly():
        base = client.front_end.stop()
    assert base == client.driver.next_avail
    if released == "while stopped":
        fuse.release()
        assert client.driver.take_used() == []
    client.start(base)
    if released == "when resumed":
        client.getattr(ROOT)
        fuse.release()
    assert receive(client, head) == Rread(9)
    assert client.read(1, 0, 100) == b"slow text"
    assert client.driver.take_used() == []


def test_resuming_does_not_wait(fuse: Fuse, client: Client) -> None:
    """Only stopping waits for what is out, and no longer than a second."""
    head = hang(client, fuse)
    for _ in range(2):
        with promptly():
            base = client.front_end.stop()
        with promptly(0.9):
            client.start(base)
        client.getattr(ROOT)
    fuse.release()
    assert receive(client, head) == Rread(9)


def test_fresh_ring_never_gets_the_old_reply(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    hang(client, fuse)
    with promptly():
        client.reboot()
        client.attach()
    fuse.release()
    client.open(ROOT, 1, b"m", b"slow")
    for _ in range(20):
        assert client.read(1, 0, 100) == b"slow text"
        client.getattr(ROOT)
    assert client.driver.take_used() == []


def test_new_session_waits_for_what_hangs(fuse: Fuse, client: Client) -> None:
    """Old replies must not reach the new session, so Rversion comes behind them."""
    head = hang(client, fuse)
    version = send(client, Tversion(MSIZE, b"9P2000.L"), tag=0xFFFF)
    fuse.release()
    done = client.driver.wait_used(10, 2)
    assert [entry[0] for entry in done] == [head, version]


PREADV = (295, 327)
"""System calls preadv and preadv2 of x86-64."""


def in_read(pid: int) -> bool:
    """Is one of the threads in the middle of reading a file?"""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((task / "syscall").read_text().split()[0]) in PREADV:
                return True
    return False


def test_termination(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    """While a thread is in a call that only the storage can end: the kernel keeps the process until
    then, but everybody else is free of it at once.
    """
    client.open(ROOT, 1, b"m", b"slow")
    fuse.freeze()
    send(client, Tread(1, 0, 100))
    eventually(lambda: in_read(daemon.pid), "the read reaches the kernel")
    daemon.process.terminate()
    eventually(lambda: not Path(daemon.socket).exists(), "the socket is removed")
    assert client.front_end.socket.recv(1) == b""
    fuse.release()
    assert daemon.process.wait(10) == 0


def test_front_end_leaves_and_the_close_hangs(
    fuse: Fuse, two_exports: tuple[Client, Client]
) -> None:
    """The other export does not wait for the close."""
    one, two = two_exports
    one.open(ROOT, 1, b"m", b"slow", flags=2)
    fuse.hold("flush", "/slow")
    one.front_end.stop()
    one.front_end.close()
    fuse.wait_held("flush", "/slow")
    try:
        with promptly():
            two.getattr(ROOT)
            two.walk(ROOT, 1)
            two.front_end.get(Request.GET_FEATURES)
    finally:
        fuse.release()


def test_the_file_system_dies(fuse: Fuse, client: Client, export: Path) -> None:
    head = hang(client, fuse)
    fuse.kill()
    reply = receive(client, head)
    assert isinstance(reply, Rlerror)
    assert reply.ecode in {errno.ECONNABORTED, errno.ENOTCONN, errno.EIO}
    assert client.error(Tgetattr(1, 0x3FFF)) == "ENOTCONN"
    assert client.error(Tclunk(1)) in {"", "ENOTCONN"}  # as close(2) on the host
    client.create(ROOT, 2, b"local")


# What fails

CODES = ("EIO", "ENOSPC", "EDQUOT", "ESTALE")
# Fids: 1 the mount's root, 2 its file "quick", 3 the same open, 4 "dir", 5 the same open.
FAILURES: dict[str, tuple[str, str, Any, bytes]] = {
    "walk": ("getattr", "/quick", Twalk(1, 9, (b"quick",)), b""),
    "getattr": ("getattr", "/quick", Tgetattr(2, 0x3FFF), b""),
    "open": ("open", "/quick", Tlopen(2, 2), b""),
    "read": ("read", "/quick", Tread(3, 0, 100), b""),
    "write": ("write", "/quick", Twrite(3, 0, 4), b"data"),
    "fsync": ("fsync", "/quick", Tfsync(3, 0), b""),
    "datasync": ("fsync", "/quick", Tfsync(3, 1), b""),
    "statfs": ("statfs", "/quick", Tstatfs(2), b""),
    "chmod": ("chmod", "/quick", change(2, SetattrValid.MODE, mode=0o600), b""),
    "chown": ("chown", "/quick", change(2, SetattrValid.UID), b""),
    "truncate": ("truncate", "/quick", change(3, SetattrValid.SIZE, size=4), b""),
    "times": ("utimens", "/quick", change(2, SetattrValid.MTIME), b""),
    "create": ("create", "/dir/new", Tlcreate(4, b"new", 0x42, 0o600, 0), b""),
    "mkdir": ("mkdir", "/dir/new", Tmkdir(4, b"new", 0o700, 0), b""),
    "unlink": ("unlink", "/dir/file", Tunlinkat(4, b"file", 0), b""),
    "rename": ("rename", "/dir/file", Trenameat(4, b"file", 1, b"moved"), b""),
    "readdir": ("readdir", "/dir", Treaddir(5, 0, 1000), b""),
}


@pytest.mark.threat("t_errno")
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("what", FAILURES)
def test_errors_come_as_they_are(
    fuse: Fuse, client: Client, daemon: Daemon, what: str, code: str
) -> None:
    """The guest gets that errno, nothing is lost or half done, and the next attempt works."""
    op, path, message, data = FAILURES[what]
    client.walk(ROOT, 1, b"m")
    client.walk(1, 2, b"quick")
    client.open(2, 3, flags=2)
    client.walk(1, 4, b"dir")
    client.open(4, 5)
    before = daemon.descriptors()
    fuse.fail(op, path, getattr(errno, code))
    for _ in range(3):
        assert client.error(message, data) == code
    assert daemon.descriptors() == before
    fuse.fail(op, path, 0)
    assert client.error(message, data) == ""


@pytest.mark.parametrize("code", CODES)
def test_error_of_a_close_is_the_clunks(
    fuse: Fuse, client: Client, daemon: Daemon, code: str
) -> None:
    """As close(2): the error is told, and the file is closed all the same."""
    before = daemon.descriptors()
    client.open(ROOT, 1, b"m", b"quick", flags=2)
    fuse.fail("flush", "/quick", getattr(errno, code))
    assert client.error(Tclunk(1)) == code
    assert client.error(Tgetattr(1, 0)) == "ENOENT"
    assert daemon.descriptors() == before


def test_errors_of_closes_do_not_disturb_a_new_session(
    fuse: Fuse, client: Client, daemon: Daemon
) -> None:
    before = daemon.descriptors()
    for fid in range(1, 6):
        client.open(ROOT, fid, b"m", b"quick", flags=2)
    fuse.fail("flush", "/quick", errno.EIO)
    client.attach()
    eventually(lambda: daemon.descriptors() <= before, "the old files are closed")
    client.walk(ROOT, 1, b"m", b"quick")


def test_errors_of_closes_do_not_disturb_the_next_front_end(fuse: Fuse, daemon: Daemon) -> None:
    idle = daemon.idle_descriptors()
    fuse.fail("flush", "/quick", errno.EIO)
    for _ in range(3):
        with Client(daemon.socket) as client:
            client.attach()
            for fid in range(1, 6):
                client.open(ROOT, fid, b"m", b"quick", flags=2)
    eventually(lambda: daemon.idle_descriptors() == idle, "the old files are closed")


def test_half_a_write(fuse: Fuse, client: Client) -> None:
    """What was written before the error counts; the error comes with the rest."""
    client.create(ROOT, 1, b"local")
    client.open(ROOT, 2, b"m", b"quick", flags=2)
    assert client.write(2, 0, b"QUICK") == 5
    fuse.fail("write", "/quick", errno.ENOSPC)
    assert client.error(Twrite(2, 5, 5), b"-----") == "ENOSPC"
    assert client.read(2, 0, 100) == b"QUICK text"


def test_failed_open_leaves_the_fid_unopened(fuse: Fuse, client: Client, daemon: Daemon) -> None:
    """Also where the file was opened, and only the qid for the answer could not be had."""
    client.walk(ROOT, 1, b"m", b"quick")
    before = daemon.descriptors()
    fuse.fail("getattr", "/quick", errno.EIO)
    assert client.error(Tlopen(1, 0)) == "EIO"
    assert daemon.descriptors() == before
    fuse.fail("getattr", "/quick", 0)
    client.rpc(Tlopen(1, 0))
    assert client.read(1, 0, 100) == b"quick text"


def test_failed_create_leaves_the_fid_a_directory(fuse: Fuse, client: Client) -> None:
    client.walk(ROOT, 1, b"m", b"dir")
    fuse.fail("create", "/dir/new", errno.ENOSPC)
    assert client.error(Tlcreate(1, b"new", 0x42, 0o600, 0)) == "ENOSPC"
    assert client.names(1) == {b"file"}
    client.walk(1, 2, b"file")


# Inode numbers

HIGH = 0x8000_0000_0000_0005
NUMBERED: dict[str, dict[str, Any]] = {
    "/a": {"ino": HIGH, "text": ""},
    "/b": {"ino": 0xA000_0000_0000_0005, "text": ""},
    "/c": {"ino": 5, "text": ""},
    "/d": {"ino": (1 << 48) + 5, "text": ""},
    "/e": {"ino": (1 << 48) - 1, "text": ""},
    "/f": {"ino": (1 << 64) - 1, "text": ""},
    "/g": {"ino": HIGH | 1 << 48, "text": ""},
}


def numbers(client: Client, *mounts: bytes) -> dict[tuple[bytes, bytes], Qid]:
    """The qid of every file by a walk, which a listing and Tgetattr must confirm."""
    found = {}
    for mount in mounts:
        client.walk(ROOT, 1, mount)
        for name in sorted(client.names(1)):
            (found[mount, name],) = client.walk(1, 2, name)
            assert client.getattr(2).qid == found[mount, name]
            client.clunk(2)
        client.open(1, 2)
        listed = {(mount, entry.name): entry.qid for entry in client.listing(2)}
        assert {**listed, **{k: v for k, v in found.items() if k[0] == mount}} == listed
        client.clunk(1, 2)
    return found


def test_high_inode_numbers(start_fuse: StartFuse, start_daemon: StartDaemon, export: Path) -> None:
    """Two devices with the same large numbers: all differ, and are the same after a restart."""
    start_fuse(export / "m", NUMBERED)
    start_fuse(export / "n", NUMBERED)
    seen = []
    for order in ((b"m", b"n"), (b"n", b"m")):
        with Client(start_daemon().socket) as client:
            client.attach()
            seen.append(numbers(client, *order))
    paths = {qid.path for qid in seen[0].values()}
    assert len(paths) == 2 * len(NUMBERED)
    assert seen[0] == seen[1]


def test_export_with_high_inode_numbers(
    start_fuse: StartFuse, start_daemon: StartDaemon, export: Path
) -> None:
    start_fuse(export, NUMBERED)
    seen = []
    for reverse in (False, True):
        with Client(start_daemon().socket) as client:
            client.attach()
            seen.append(
                {
                    name: client.walk(ROOT, 10 + at, name)[0].path
                    for at, name in enumerate(sorted(client.names(ROOT), reverse=reverse))
                }
            )
    assert len(set(seen[0].values())) == len(NUMBERED)
    assert seen[0] == seen[1]
    assert seen[0][b"c"] == 5


# Listings that lie


@pytest.mark.threat("t_bad_dirent")
def test_hostile_listing(fuse: Fuse, client: Client) -> None:
    """Types and numbers come from the files themselves; what no walk finds is not listed."""
    regular, link = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
    fuse.dirents(
        "/",
        [
            ("..", stat.S_IFDIR, 1),
            ("quick", stat.S_IFDIR, 12),
            ("quick", link, 99),
            ("missing", regular, 12),
            ("x" * 300, regular, 12),
            ("x" * 255, regular, 12),
            ("dir", regular, 14),
            ("tab\there\x1b[2J", regular, 15),
            ("slow", stat.S_IFCHR, 0),
        ],
    )
    client.open(ROOT, 1, b"m")
    found = [entry for entry in client.listing(1) if entry.name not in {b".", b".."}]
    assert {entry.name for entry in found} == {b"quick", b"dir", b"slow"}
    for entry in found:
        (qid,) = client.walk(1, 2, entry.name)
        assert entry.shows(qid)
        assert entry.type == (4 if entry.name == b"dir" else 8)
        client.clunk(2)


# The kernel refuses the whole listing: EIO is its word.
@pytest.mark.threat("t_bad_dirent")
def test_listing_of_names_that_are_paths(fuse: Fuse, client: Client) -> None:
    """The kernel refuses such an answer, and so do we."""
    fuse.dirents("/dir", [("../slow", stat.S_IFREG, 11), ("file", stat.S_IFREG, 14)])
    client.open(ROOT, 1, b"m", b"dir")
    assert client.error(Treaddir(1, 0, 1000)) == "EIO"
    client.getattr(1)
