"""9P2000.u and 9P2000: what old clients say, on a live daemon."""

import errno
import os
import stat
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    NO_NUMERIC_ID,
    NOFID,
    Rerror,
    RerrorPlain,
    Tattach,
    Tclunk,
    Tcreate,
    Tgetattr,
    Topen,
    Tread,
    Tremove,
    Tstat,
    Tversion,
    Twstat,
    decode,
    encode,
)
from ninepd.p9.stat import Mode, decode_stat, encode_stat
from tests.support.client import ROOT, Client, Daemon, P9Error
from tests.support.legacy import DIALECTS, NOTHING, attach, stat_of


@pytest.fixture
def old(daemon: Daemon):  # type: ignore[no-untyped-def]
    with Client(daemon.socket) as client:
        attach(client, b"9P2000.u")
        yield client


def error_of(client: Client, message: object) -> Rerror:
    with pytest.raises(P9Error) as caught:
        client.rpc(message)
    assert isinstance(caught.value.reply, Rerror)
    return caught.value.reply


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (b"9P2000.L", b"9P2000.L"),
        (b"9P2000.u", b"9P2000.u"),
        (b"9P2000", b"9P2000"),
        (b"9P2000.e", b"9P2000"),
        (b"9P1999", b"unknown"),
        (b"", b"unknown"),
    ],
)
def test_version(daemon: Daemon, asked: bytes, answered: bytes) -> None:
    with Client(daemon.socket) as client:
        assert client.rpc(Tversion(8192, asked)).version == answered


@pytest.mark.parametrize("version", DIALECTS)
def test_read_and_write(daemon: Daemon, export: Path, version: bytes) -> None:
    with Client(daemon.socket) as client:
        attach(client, version)
        client.walk(ROOT, 1)
        created = client.rpc(Tcreate(1, b"f", 0o640, 2))
        assert client.write(1, 0, b"hello") == 5
        assert client.read(1, 0, 100) == b"hello"
        client.rpc(Tclunk(1))
        assert (export / "f").read_bytes() == b"hello"
        assert stat.S_IMODE((export / "f").stat().st_mode) == 0o640
        (qid,) = client.walk(ROOT, 1, b"f")
        assert qid.path == created.qid.path
        client.rpc(Topen(1, 0x11))  # write, truncate
        assert (export / "f").read_bytes() == b""
        client.rpc(Tremove(1))
        assert not (export / "f").exists()


def test_append(old: Client, export: Path) -> None:
    (export / "f").write_bytes(b"abc")
    old.walk(ROOT, 1, b"f")
    old.rpc(Topen(1, 0x81))
    old.write(1, 0, b"def")
    assert (export / "f").read_bytes() == b"abcdef"


def test_stat(old: Client, export: Path) -> None:
    (export / "f").write_bytes(b"12345")
    os.chmod(export / "f", 0o4751)
    os.utime(export / "f", (1000, 2000))
    old.walk(ROOT, 1, b"f")
    found = stat_of(old, 1)
    assert found.mode == 0o751 | Mode.SETUID
    assert (found.atime, found.mtime, found.length) == (1000, 2000, 5)
    assert (found.name, found.n_uid, found.n_gid) == (b"f", os.getuid(), os.getgid())
    assert found.uid == str(os.getuid()).encode()
    root = stat_of(old, ROOT)
    assert root.mode & Mode.DIR
    assert root.name == b"/"
    assert root.length == 0


def test_stat_is_shorter_in_the_plain_dialect(daemon: Daemon, export: Path) -> None:
    with Client(daemon.socket) as client:
        attach(client, b"9P2000")
        (export / "f").write_bytes(b"12345")
        client.walk(ROOT, 1, b"f")
        raw = client.rpc(Tstat(1)).stat
        assert int.from_bytes(raw[:2], "little") == len(raw) - 2
        found = decode_stat(raw, extended=False)
        assert (found.name, found.length, found.uid) == (b"f", 5, str(os.getuid()).encode())
        assert encode_stat(found, extended=False) == raw


def test_objects_of_every_kind(old: Client, export: Path) -> None:
    (export / "f").write_bytes(b"")
    old.walk(ROOT, 50, b"f")
    wanted = [
        (b"dir", Mode.DIR | 0o750, b"", stat.S_ISDIR),
        (b"link", Mode.SYMLINK | 0o777, b"/some/where", stat.S_ISLNK),
        (b"fifo", Mode.PIPE | 0o600, b"", stat.S_ISFIFO),
        (b"sock", Mode.SOCKET | 0o600, b"", stat.S_ISSOCK),
        (b"hard", Mode.LINK, b"50", stat.S_ISREG),
    ]
    for name, perm, extension, is_kind in wanted:
        old.walk(ROOT, 1)
        qid = old.rpc(Tcreate(1, name, perm, 0, extension)).qid
        found = stat_of(old, 1)
        assert is_kind((export / os.fsdecode(name)).lstat().st_mode)
        assert found.name == name
        assert found.qid.path == qid.path
        assert found.mode & 0xFFF00000 == perm & 0xFFF00000 & ~Mode.LINK
        old.rpc(Tclunk(1))
    assert os.readlink(export / "link") == "/some/where"
    assert (export / "f").stat().st_nlink == 2
    old.walk(ROOT, 1, b"link")
    assert stat_of(old, 1).extension == b"/some/where"
    assert stat_of(old, 50).extension == b"HARDLINKCOUNT 2"


@pytest.mark.skipif(os.getuid() != 0, reason="device nodes need root")
def test_device_nodes(old: Client, export: Path) -> None:
    old.walk(ROOT, 1)
    old.rpc(Tcreate(1, b"null", Mode.DEVICE | 0o600, 0, b"c 1 3"))
    found = (export / "null").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == os.makedev(1, 3)
    assert stat_of(old, 1).extension == b"c 1 3"
    assert error_of(old, Topen(1, 0)).errno == errno.ENXIO
    old.walk(ROOT, 2)
    assert error_of(old, Tcreate(2, b"bad", Mode.DEVICE, 0, b"c one 3")).errno == errno.EINVAL


@pytest.mark.threat("t_dot", "t_slash")
def test_wstat(old: Client, export: Path) -> None:
    (export / "f").write_bytes(b"12345")
    (export / "other").write_bytes(b"untouched")
    old.walk(ROOT, 1, b"f")
    change = NOTHING._replace(mode=0o604, mtime=3000, length=2, name=b"g")
    old.rpc(Twstat(1, encode_stat(change, extended=True)))
    found = (export / "g").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime, found.st_size) == (0o604, 3000, 2)
    assert not (export / "f").exists()
    old.rpc(Twstat(1, encode_stat(NOTHING, extended=True)))
    assert stat_of(old, 1).name == b"g"
    for bad in (NOTHING._replace(mode=Mode.DIR | 0o700), NOTHING._replace(name=b"a/b")):
        assert error_of(old, Twstat(1, encode_stat(bad, extended=True))).errno in {
            errno.EIO,
            errno.ENOENT,
        }
    assert error_of(old, Twstat(1, b"\0" * 10)).errno == errno.EINVAL
    assert (export / "other").read_bytes() == b"untouched"


def test_wstat_without_changes_flushes_an_open_file(old: Client, export: Path) -> None:
    old.walk(ROOT, 1)
    old.rpc(Tcreate(1, b"f", 0o600, 1))
    old.write(1, 0, b"data")
    old.rpc(Twstat(1, encode_stat(NOTHING, extended=True)))
    assert (export / "f").read_bytes() == b"data"


@pytest.mark.skipif(os.getuid() != 0, reason="other owners need root")
@pytest.mark.parametrize("version", DIALECTS)
def test_owners(daemon: Daemon, export: Path, version: bytes) -> None:
    with Client(daemon.socket) as client:
        attach(client, version, uname=b"1234", uid=1234)
        os.chmod(export, 0o777)
        client.walk(ROOT, 1)
        client.rpc(Tcreate(1, b"f", 0o600, 1))
        assert (export / "f").stat().st_uid == 1234
        extended = version == b"9P2000.u"
        change = NOTHING._replace(n_gid=77) if extended else NOTHING._replace(gid=b"77")
        client.rpc(Twstat(1, encode_stat(change, extended)))
        found = (export / "f").stat()
        assert (found.st_uid, found.st_gid) == (1234, 77)


@pytest.mark.parametrize("version", DIALECTS)
@pytest.mark.parametrize("count", [200, 1000, 8000])
def test_directories_are_read_in_whole_entries(
    daemon: Daemon, export: Path, version: bytes, count: int
) -> None:
    wanted = {b"file-%d" % number for number in range(300)}
    for name in wanted:
        (export / os.fsdecode(name)).touch()
    with Client(daemon.socket) as client:
        attach(client, version)
        client.walk(ROOT, 1)
        client.rpc(Topen(1, 0))
        for _ in range(2):  # offset 0 starts again
            offset, names = 0, []
            while data := client.read(1, offset, count):
                offset += len(data)
                while data:
                    size = 2 + int.from_bytes(data[:2], "little")
                    names.append(decode_stat(data[:size], version == b"9P2000.u").name)
                    data = data[size:]
            assert sorted(names) == sorted(wanted)
        for bad in (Tread(1, 5, count), Tread(1, 0, 20)):
            assert error_of(client, bad).ename == os.strerror(errno.EINVAL).encode()


def test_errors_come_in_words(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        attach(client, b"9P2000.u")
        error = error_of(client, Tstat(99))
        assert error == Rerror(os.strerror(errno.ENOENT).encode(), errno.ENOENT)
        attach(client, b"9P2000")
        raw = client.exchange(encode(1, Tstat(99)))
        assert raw == encode(1, RerrorPlain(os.strerror(errno.ENOENT).encode()))
        # One that does not fit is cut; one without any room is dropped.
        assert decode(client.exchange(encode(1, Tstat(99)), room=15))[1] == Rerror(b"No suc")
        attach(client, b"9P2000.u")
        assert client.exchange(encode(1, Tstat(99)), room=12) == b""


@pytest.mark.parametrize("version", DIALECTS)
def test_the_dialects_do_not_mix(daemon: Daemon, version: bytes) -> None:
    with Client(daemon.socket) as client:
        attach(client, version)
        with pytest.raises(P9Error):
            client.rpc(Tgetattr(ROOT, 0x7FF))
        client.attach()
        for message in (Topen(ROOT, 0), Tstat(ROOT), Tcreate(ROOT, b"f", 0, 0), Twstat(ROOT, b"")):
            with pytest.raises(P9Error) as caught:
                client.rpc(message)
            assert caught.value.errno == errno.EOPNOTSUPP


def test_attach_without_a_user_is_nobody_in_particular(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        assert client.rpc(Tversion(8192, b"9P2000")).version == b"9P2000"
        client.exchange(encode(1, Tattach(ROOT, NOFID, b"glenda", b"", NO_NUMERIC_ID))[:-4])
