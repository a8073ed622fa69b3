"""Files behave as on a local file system, also where the host's processes take part."""

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    NOFID,
    Rlerror,
    Rlopen,
    SetattrValid,
    Tattach,
    Tclunk,
    Tfsync,
    Tgetattr,
    Tlcreate,
    Tlink,
    Tlopen,
    Tmkdir,
    Tmknod,
    Trenameat,
    Tsetattr,
    Tsymlink,
    Tunlinkat,
    Twalk,
    decode,
    encode,
)
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, P9Error
from tests.support.tracing import traced

RDWR, APPEND, TRUNC, EXCL = 2, 0x400, 0x200, 0x80
DSYNC, SYNC = 0x1000, 0x101000
USER = 1000
PATIENCE = 40.0  # less than /proc/sys/fs/lease-break-time, after which the kernel takes it


def setattr_(fid: int, valid: int, mode: int = 0, size: int = 0) -> Tsetattr:
    return Tsetattr(fid, valid, mode, 0, 0, size, 0, 0, 0, 0)


# Data


def test_append_by_two_fids_and_the_host(client: Client, export: Path) -> None:
    """Whatever offset they name, each goes behind what is there."""
    client.create(ROOT, 1, b"f")
    client.open(ROOT, 2, b"f", flags=RDWR | APPEND)
    client.open(ROOT, 3, b"f", flags=1 | APPEND)
    expected = b""
    for number in range(30):
        for fid in (2, 3):
            piece = b"%d by %d;" % (number, fid)
            client.write(fid, 0, piece)
            expected += piece
        with (export / "f").open("ab") as file:
            file.write(b"host;")
        expected += b"host;"
    assert (export / "f").read_bytes() == expected
    assert client.read(2, 0, 9999) == expected


def test_created_for_appending(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f", flags=0x8042 | APPEND)
    (export / "f").write_bytes(b"host;")
    client.write(1, 0, b"guest")
    assert (export / "f").read_bytes() == b"host;guest"


def test_holes_take_no_space(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    client.rpc(setattr_(1, SetattrValid.SIZE, size=1 << 40))
    client.write(1, 1 << 30, b"x" * 4096)
    client.write(1, 3 << 30, b"y" * 4096)
    client.rpc(Tfsync(1, 0))
    found, host = client.getattr(1), (export / "f").stat()
    assert (found.size, found.blocks) == (1 << 40, host.st_blocks)
    assert host.st_blocks <= 64
    assert client.read(1, (1 << 30) - 10, 20) == bytes(10) + b"x" * 10
    assert client.read(1, (1 << 40) - 5, 100) == bytes(5)


@pytest.mark.parametrize("offset", [(1 << 32) - 3, (1 << 32), 5 << 30, (1 << 43) + 1])
def test_beyond_4_gib(client: Client, export: Path, offset: int) -> None:
    client.create(ROOT, 1, b"f")
    assert client.write(1, offset, b"across") == 6
    assert client.read(1, offset, 100) == b"across"
    assert client.getattr(1).size == offset + 6
    with (export / "f").open("rb") as file:
        assert os.pread(file.fileno(), 10, offset) == b"across"
    client.rpc(setattr_(1, SetattrValid.SIZE, size=offset + 1))
    assert client.read(1, offset, 100) == b"a"


def flags_of(daemon: Daemon, path: Path) -> list[int]:
    """Of the daemon's descriptors on a file, those for I/O."""
    found = []
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(link.stat(), path.stat()):
                info = Path(f"/proc/{daemon.pid}/fdinfo/{link.name}").read_text()
                found.append(int(info.split("flags:")[1].split()[0], 8))
    return [flags for flags in found if not flags & os.O_PATH]


@pytest.mark.parametrize("guest", [0, DSYNC, SYNC, APPEND, APPEND | SYNC])
@pytest.mark.parametrize("how", ["open", "create", "create existing"])
def test_flags_are_the_hosts(
    client: Client, daemon: Daemon, export: Path, guest: int, how: str
) -> None:
    if how != "create":
        (export / "f").write_text("")
    if how == "open":
        client.open(ROOT, 1, b"f", flags=RDWR | guest)
    else:
        client.create(ROOT, 1, b"f", flags=0x8042 | guest)
    client.write(1, 0, b"text")
    (flags,) = flags_of(daemon, export / "f")
    mask = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_NONBLOCK | os.O_CLOEXEC
    assert flags & mask == os.O_RDWR | guest | os.O_CLOEXEC


@pytest.fixture
def calls(daemon: Daemon, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """The names of the daemon's flushing system calls so far."""
    flushes = "trace=fsync,fdatasync,sync_file_range,syncfs"
    with traced(daemon.pid, tmp_path / "strace.log", "-e", flushes) as tracer:
        yield lambda: [call.split("(")[0] for call in tracer.calls()]


def test_fsync_and_fdatasync(client: Client, calls: Callable[[], list[str]]) -> None:
    """Each is what the guest asked for, once; a written file without either is not flushed."""
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"text")
    for datasync in (0, 1, 1, 0):
        client.rpc(Tfsync(1, datasync))
    client.open(ROOT, 2)
    client.rpc(Tfsync(2, 0))
    client.clunk(1, 2)
    assert calls() == ["fsync", "fdatasync", "fdatasync", "fsync", "fsync"]


def test_trunc_only_when_the_open_succeeds(client: Client, export: Path) -> None:
    (export / "program").write_bytes(Path("/bin/sleep").read_bytes())
    (export / "program").chmod(0o755)
    size = (export / "program").stat().st_size
    with subprocess.Popen([export / "program", "100"]) as process:
        client.walk(ROOT, 1, b"program")
        assert client.error(Tlopen(1, RDWR | TRUNC)) == "ETXTBSY"
        client.walk(ROOT, 2)
        assert client.error(Tlcreate(2, b"program", 0x8042 | TRUNC, 0o600, 0)) == "ETXTBSY"
        assert client.error(Tlcreate(2, b"program", 0x8042 | TRUNC | EXCL, 0o600, 0)) == "EEXIST"
        assert (export / "program").stat().st_size == size
        process.kill()
    client.rpc(Tlcreate(2, b"program", 0x8042 | TRUNC, 0o600, 0))
    assert (export / "program").stat().st_size == 0
    assert stat.S_IMODE((export / "program").stat().st_mode) == 0o755


# Leases of host processes

HOLDER = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGIO, lambda *_: os.write(1, b"asked\\n"))  # not amid another print()
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.readline()
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
print("given up", flush=True)
sys.stdin.readline()
"""


class Holder:
    """A process of the host that holds a lease and gives it up when it is told to."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.wait("held")

    def wait(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == word

    def give_up(self) -> None:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        self.wait("given up")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def holder(export: Path) -> Iterator[Holder]:
    (export / "f").write_text("text")
    holder = Holder(export / "f")
    yield holder
    holder.close()


LEASED: dict[str, Any] = {
    "open": Tlopen(1, RDWR),
    "truncate": setattr_(1, SetattrValid.SIZE, size=1),
}


@pytest.mark.threat("t_lease")
@pytest.mark.parametrize("what", LEASED)
def test_a_lease_delays_nobody_else(client: Client, holder: Holder, what: str) -> None:
    """Who opens the file waits until the holder gives it up, as on the host; all others go on."""
    client.walk(ROOT, 1, b"f")
    head = client.submit(encode(2000, LEASED[what]))
    holder.wait("asked")
    other = client.submit(encode(2001, Tgetattr(ROOT, 0)))
    try:
        done = client.driver.wait_used(PATIENCE)
    finally:
        holder.give_up()
    assert [entry[0] for entry in done] == [other], "the leased file's own answer came too early"
    reply = decode(client.finish(head))[1]
    assert not isinstance(reply, Rlerror), os.strerror(reply.ecode)
    assert what != "open" or isinstance(reply, Rlopen)


# Names


def test_link_counts(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"f")
    for number in range(20):
        client.rpc(Tlink(ROOT, 2, b"l%d" % number))
        assert client.getattr(1).nlink == client.getattr(2).nlink == number + 2
    client.rpc(Trenameat(ROOT, b"l0", ROOT, b"l1"))  # of one file onto itself: nothing
    assert client.getattr(1).nlink == 21
    assert (export / "l0").exists()
    for number in range(20):
        client.rpc(Tunlinkat(ROOT, b"l%d" % number, 0))
    client.rpc(Tunlinkat(ROOT, b"f", 0))
    assert client.getattr(1).nlink == 0
    assert client.error(Tlink(ROOT, 2, b"again")) == "ENOENT"


def test_link_counts_of_directories(client: Client, export: Path, memory_dir: Path) -> None:
    client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
    client.walk(ROOT, 1, b"d")
    for number in range(5):
        client.rpc(Tmkdir(1, b"%d" % number, 0o755, 0))
        assert client.getattr(1).nlink == number + 3 == (export / "d").stat().st_nlink
    client.rpc(Trenameat(1, b"0", ROOT, b"moved"))
    assert client.getattr(1).nlink == 6


def test_a_file_may_have_no_more_links(client: Client, export: Path) -> None:
    """EMLINK comes through: ext4 allows 65,000."""
    (export / "f").write_text("")
    count = 1
    with contextlib.suppress(OSError):
        for count in range(2, 66_000):
            os.link(export / "f", export / f"l{count}")
    if (export / "f").stat().st_nlink != 65_000:
        pytest.skip("this file system has another limit")
    client.walk(ROOT, 1, b"f")
    assert client.error(Tlink(ROOT, 1, b"more")) == "EMLINK"


RENAMES = {
    ("dir", "empty"): "",
    ("dir", "full"): "ENOTEMPTY",
    ("dir", "file"): "ENOTDIR",
    ("file", "empty"): "EISDIR",
    ("file", "link"): "",
    ("link", "file"): "",
    ("dir", "dir/below"): "EINVAL",
    ("dir/below", "dir"): "ENOTEMPTY",
    ("missing", "file"): "ENOENT",
    ("fifo", "file"): "",
}


@pytest.mark.parametrize(("old", "new"), RENAMES)
def test_rename_over_what_is_held_open(client: Client, export: Path, old: str, new: str) -> None:
    """As on the host; whatever is replaced stays usable by who has it open."""
    for name in ("dir/below", "empty", "full/x"):
        (export / name).mkdir(parents=True)
    (export / "file").write_text("text")
    (export / "link").symlink_to("nowhere")
    os.mkfifo(export / "fifo")
    places = {}
    for number, name in enumerate((old, new)):
        *above, last = name.encode().split(b"/")
        client.walk(ROOT, 10 + number, *above)
        places[name] = 10 + number, last
        with contextlib.suppress(P9Error):
            client.rpc(Twalk(ROOT, 20 + number, tuple(name.encode().split(b"/"))))
        if (export / name).is_dir():
            client.open(20 + number, 30 + number)
    before = (export / new).lstat().st_ino
    expected = RENAMES[old, new]
    assert client.error(Trenameat(*places[old], *places[new])) == expected
    if expected == "":
        assert client.getattr(21).nlink == 0
        assert not os.path.lexists(export / old)
        (entry,) = client.walk(places[new][0], 40, places[new][1])
        assert entry == client.getattr(20).qid
        if new == "empty":
            assert {entry.name for entry in client.listing(31)} <= {b".", b".."}
            assert client.error(Tmkdir(21, b"x", 0o755, 0)) == "ENOENT"
            assert {entry.name for entry in client.listing(30)} == {b".", b"..", b"below"}
    else:
        assert (export / new).lstat().st_ino == before


RIVAL = """
import os, sys
os.chdir(sys.argv[1])
os.umask(0)
while word := sys.stdin.buffer.raw.read(4):
    try:
        fd = os.open(f"n{int(word)}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o604)
    except FileExistsError:
        continue
    os.write(fd, b"host")
    os.close(fd)
"""


@pytest.mark.parametrize("exclusive", [True, False])
def test_create_in_a_race_with_the_host(
    client: Client, export: Path, as_root: None, exclusive: bool
) -> None:
    """Each file is wholly the host's or wholly the guest's: owner, mode and who has won."""
    count = 2000
    export.chmod(0o777)
    client.rpc(Tattach(1, NOFID, b"", b"", USER))
    flags = 0x8042 | (EXCL if exclusive else 0)
    codes = {}
    command = [sys.executable, "-c", RIVAL, str(export)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0) as rival:
        assert rival.stdin is not None
        for number in range(count):
            client.walk(1, 2)
            word = b"%4d" % number
            if number % 2:  # each of them is the first to hear of it half the time
                rival.stdin.write(word)
            head = client.submit(encode(2000, Tlcreate(2, b"n%d" % number, flags, 0o640, USER)))
            if not number % 2:
                rival.stdin.write(word)
            reply = decode(client.finish(head))[1]
            codes[number] = reply.ecode if isinstance(reply, Rlerror) else 0
            client.rpc(Tclunk(2))
    assert set(codes.values()) <= ({0, errno.EEXIST} if exclusive else {0})
    owners = set()
    for number, code in codes.items():
        info = (export / f"n{number}").stat()
        owner = (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode))
        assert owner in {(0, 0, 0o604), (USER, USER, 0o640)}
        assert info.st_size == (4 if info.st_uid == 0 else 0)
        if exclusive:
            assert (code == 0) == (info.st_uid == USER)
        owners.add(owner)
    assert len(owners) == 2, "only one of them ever won: the test shows nothing"


# ACLs: what the host's own calls give in a twin directory is the measure

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, USER_, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32


def acl(*entries: tuple[int, int, int]) -> bytes:
    """(tag, permissions, id) as the kernel's xattr."""
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, ident & 0xFFFF_FFFF)
        for tag, permissions, ident in entries
    )


def acl_of(path: Path) -> tuple[object, ...]:
    values = []
    for name in (ACCESS, DEFAULT):
        try:
            values.append(os.getxattr(path, name, follow_symlinks=False))
        except OSError as error:
            values.append(b"%d" % (error.errno or 0))
    info = path.lstat()
    return oct(info.st_mode), info.st_uid, info.st_gid, *values


DEFAULTS = {
    "minimal": acl((USER_OBJ, 7, -1), (GROUP_OBJ, 5, -1), (OTHER, 0, -1)),
    "narrow": acl((USER_OBJ, 6, -1), (GROUP_OBJ, 0, -1), (OTHER, 0, -1)),
    "named": acl(
        (USER_OBJ, 7, -1), (USER_, 6, 1234), (GROUP_OBJ, 5, -1), (GROUP, 7, 4321),
        (MASK, 7, -1), (OTHER, 1, -1),
    ),
    "masked": acl(
        (USER_OBJ, 7, -1), (USER_, 7, 1234), (GROUP_OBJ, 7, -1), (MASK, 4, -1), (OTHER, 7, -1)
    ),
}  # fmt: skip
MODES = (0o000, 0o400, 0o600, 0o640, 0o644, 0o666, 0o700, 0o755, 0o777, 0o4755, 0o2770)


@pytest.mark.threat("t_acl_default")
@pytest.mark.parametrize("above", DEFAULTS)
def test_default_acl(client: Client, export: Path, as_root: None, above: str) -> None:
    for side in ("guest", "host"):
        (export / side).mkdir()
        try:
            os.setxattr(export / side, DEFAULT, DEFAULTS[above])
        except OSError:
            pytest.skip("no ACLs on this file system")
    client.walk(ROOT, 1, b"guest")
    host = export / "host"
    umask = os.umask(0)
    try:
        for mode in MODES:
            text = f"{mode:o}"
            name = text.encode()
            client.create(1, 2, b"file" + name, mode=mode)
            client.clunk(2)
            client.rpc(Tmkdir(1, b"dir" + name, mode, 0))
            client.rpc(Tmknod(1, b"fifo" + name, stat.S_IFIFO | mode, 0, 0, 0))
            client.rpc(Tmknod(1, b"node" + name, stat.S_IFREG | mode, 0, 0, 0))
            os.close(os.open(host / f"file{text}", os.O_CREAT | os.O_RDWR, mode))
            (host / f"dir{text}").mkdir(mode)
            os.mkfifo(host / f"fifo{text}", mode)
            os.mknod(host / f"node{text}", stat.S_IFREG | mode)
            client.rpc(Tsymlink(1, b"link" + name, b"target", 0))
            (host / f"link{text}").symlink_to("target")
    finally:
        os.umask(umask)
    for path in sorted(host.iterdir()):
        if not path.is_symlink():
            assert acl_of(export / "guest" / path.name) == acl_of(path), path.name


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_chmod_of_a_file_with_an_acl(
    client: Client, export: Path, as_root: None, kind: str
) -> None:
    """The group bits are the mask; and the other way round when the ACL is set."""
    names = ("guest", "host")
    for name in names:
        (export / name).touch() if kind == "file" else (export / name).mkdir()
    client.walk(ROOT, 1, b"guest")
    for value in DEFAULTS.values():
        client.set_xattr(1, ACCESS.encode(), value)
        os.setxattr(export / "host", ACCESS, value)
        assert acl_of(export / "guest") == acl_of(export / "host")
        for mode in MODES:
            client.rpc(setattr_(1, SetattrValid.MODE, mode=mode))
            (export / "host").chmod(mode)
            assert acl_of(export / "guest") == acl_of(export / "host")
            found = client.getattr(1)
            assert stat.S_IMODE(found.mode) == stat.S_IMODE((export / "host").stat().st_mode)
            with contextlib.suppress(OSError):
                expected = os.getxattr(export / "host", ACCESS)
                assert client.get_xattr(1, ACCESS.encode()) == expected


# Extended attributes


def test_many_names(client: Client, export: Path, mount_ext4: Callable[..., Path]) -> None:
    """As many as the file system takes; then its own errno, and the list is exact."""
    path = mount_ext4(export / "m", "-I", "256") / "f"
    path.write_text("")
    client.walk(ROOT, 1, b"m", b"f")
    code = 0
    names = []
    for number in range(2000):
        name = b"user.%d" % number
        try:
            client.set_xattr(1, name, b"%d" % number)
        except P9Error as error:
            code = error.errno or 0
            break
        names.append(name)
    assert code == errno.ENOSPC
    assert len(names) > 20
    listed = client.get_xattr(1, b"").split(b"\0")[:-1]
    assert sorted(listed) == sorted(names) == sorted(map(os.fsencode, os.listxattr(path)))
    for number, name in enumerate(names):
        assert client.get_xattr(1, name) == b"%d" % number


def test_the_longest_list(
    start_daemon: StartDaemon, export: Path, mount: Callable[..., Path]
) -> None:
    """64 KiB of names are listed; of more the kernel says E2BIG, here as on the host."""
    path = mount(export / "m", "-t", "tmpfs", "none") / "f"
    path.write_text("")
    for number in range(255):
        os.setxattr(path, f"trusted.{number:0247}", b"")
    with Client(start_daemon("--trusted-xattrs").socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"m", b"f")
        expected = b"".join(os.fsencode(name) + b"\0" for name in os.listxattr(path))
        assert len(expected) == 255 * 256
        assert client.get_xattr(1, b"") == expected
        for number in range(255, 260):
            os.setxattr(path, f"trusted.{number:0247}", b"")
        with pytest.raises(OSError, match="too long"):
            os.listxattr(path)
        with pytest.raises(P9Error, match="too long"):
            client.get_xattr(1, b"")


def test_getattr_of_a_file_that_is_replaced_again_and_again(client: Client, export: Path) -> None:
    """A fid keeps its file through any number of atomic saves by the host."""
    (export / "f").write_text("first")
    client.open(ROOT, 1, b"f")
    first = client.getattr(1).qid.path
    for number in range(50):
        (export / "new").write_text(str(number))
        (export / "new").rename(export / "f")
        client.open(ROOT, 2, b"f")
        assert client.read(2, 0, 10) == b"%d" % number
        assert client.getattr(2).qid.path != first
        client.clunk(2)
    assert client.read(1, 0, 10) == b"first"
    assert client.error(Tgetattr(1, 0x3FFF)) == ""
