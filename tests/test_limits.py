"""What happens at limits: full and read-only file systems, the largest files, names and trees."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    NOFID,
    Qid,
    Rversion,
    SetattrValid,
    Tattach,
    Tclunk,
    Tcreate,
    Tfsync,
    Tgetattr,
    Tlcreate,
    Tlink,
    Tlock,
    Tlopen,
    Tmkdir,
    Tmknod,
    Topen,
    Tremove,
    Trename,
    Trenameat,
    Tsetattr,
    Tstat,
    Tstatfs,
    Tsymlink,
    Tunlinkat,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
    Txattrcreate,
)
from ninepd.p9.stat import UNTOUCHED_32, UNTOUCHED_64, LegacyStat, Mode, encode_stat
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client, Daemon, P9Error

CREATE = 0x8042
TRUNC = 0x200


def size(fid: int, length: int) -> Tsetattr:
    return Tsetattr(fid, int(SetattrValid.SIZE), 0, 0, 0, length, 0, 0, 0, 0)


def mode(fid: int, value: int) -> Tsetattr:
    return Tsetattr(fid, int(SetattrValid.MODE), value, 0, 0, 0, 0, 0, 0, 0)


# Full


@pytest.fixture(params=["tmpfs", "ext4"])
def full(
    request: pytest.FixtureRequest, client: Client, export: Path, mount: Mount, mount_ext4: Mount
) -> Path:
    """A file system without a free block; fid 1 is its root, fid 2 the file that fills it."""
    if request.param == "tmpfs":
        path = mount(export / "m", "-t", "tmpfs", "-o", "size=256k,nr_inodes=100", "none")
    else:
        path = mount_ext4(export / "m", "-N", "64", "-m", "0")
    client.walk(ROOT, 1, b"m")
    client.create(1, 2, b"filler")
    offset = 0
    for piece in (65536, 1, 1):  # once it is on disk, ext4 may have a block to spare
        while not (code := client.error(Twrite(2, offset, piece), b"x" * piece)):
            offset = client.getattr(2).size
        assert code == "ENOSPC"
        client.rpc(Tfsync(2, 0))
    assert path.joinpath("filler").stat().st_size == offset
    return path


@pytest.mark.threat("t_errno")
def test_full_device(full: Path, client: Client) -> None:
    """What fits is written, the rest is refused, and after a removal there is room again."""
    end = client.getattr(2).size
    assert client.error(Twrite(2, end, 1), b"x") == "ENOSPC"
    assert client.write(2, 0, b"over") == 4  # what has its blocks can be written
    assert client.getattr(2).size == end
    found = client.rpc(Tstatfs(2))
    assert found.bavail == os.statvfs(full).f_bavail
    client.rpc(size(2, end // 2))
    client.rpc(Tfsync(2, 0))
    assert client.write(2, end // 2, b"more") == 4


def test_a_write_that_fits_in_part(client: Client, export: Path, mount: Mount) -> None:
    """As write(2): the bytes that fit are told, and the next attempt has the error."""
    mount(export / "m", "-t", "tmpfs", "-o", "size=64k", "none")
    client.walk(ROOT, 1, b"m")
    client.create(1, 2, b"f")
    assert client.write(2, 0, b"a" * 40_000) == 40_000
    assert client.write(2, 40_000, b"b" * 40_000) == 65536 - 40_000
    assert client.error(Twrite(2, 65536, 10), b"c" * 10) == "ENOSPC"
    assert (export / "m/f").read_bytes() == b"a" * 40_000 + b"b" * 25_536


def test_no_inode_left(client: Client, export: Path, mount: Mount) -> None:
    """No creation leaves half an object, or a fid that is neither directory nor file."""
    path = mount(export / "m", "-t", "tmpfs", "-o", "nr_inodes=10,size=1m", "none")
    client.walk(ROOT, 1, b"m")
    number = 0
    while True:
        client.walk(1, 2)
        code = client.error(Tlcreate(2, b"f%d" % number, CREATE, 0o600, 0))
        if code:
            break
        client.clunk(2)
        number += 1
    assert code == "ENOSPC"
    before = sorted(os.listdir(path))
    assert len(client.names(2)) == number  # the fid still is the directory
    attempts = (
        Tlcreate(2, b"new", CREATE, 0o600, 0),
        Tmkdir(1, b"new", 0o700, 0),
        Tsymlink(1, b"new", b"target", 0),
        Tmknod(1, b"new", stat.S_IFIFO | 0o600, 0, 0, 0),
    )
    for attempt in attempts:
        assert client.error(attempt) == "ENOSPC"
    assert sorted(os.listdir(path)) == before
    client.rpc(Tunlinkat(1, b"f0", 0))
    client.rpc(attempts[0])
    client.write(2, 0, b"text")


def test_a_directory_that_cannot_grow(full: Path, client: Client) -> None:
    """On ext4 long names run out of directory blocks."""
    code = ""
    made = []
    for number in range(200):
        name = b"%0240d" % number
        code = client.error(Tsymlink(1, name, b"t", 0))
        if code:
            break
        made.append(os.fsdecode(name))
    assert code == "ENOSPC"
    assert set(os.listdir(full)) - {"lost+found", "filler"} == set(made)


@pytest.mark.parametrize("full", ["ext4"], indirect=True)
def test_xattr_that_does_not_fit(full: Path, client: Client) -> None:
    refused = ""
    for number in range(10):
        try:
            client.set_xattr(2, b"user.a%d" % number, b"x" * 3500)
        except P9Error as error:
            refused = errno.errorcode[error.errno or 0]
            break
    assert refused == "ENOSPC"
    assert f"user.a{number}" not in os.listxattr(full / "filler")


# Quota


@pytest.fixture
def quota(client: Client, export: Path, mount: Mount, tmp_path: Path) -> Path:
    """An ext4 on which user 1000 may have 64 KiB and ten files; fid 1 is its root, as that user."""
    image = tmp_path / "quota.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    make = ["mkfs.ext4", "-q", "-F", "-O", "quota", "-E", "quotatype=usrquota", str(image)]
    subprocess.run(make, check=True)
    try:
        path = mount(export / "m", "-o", "loop,usrquota", image)
    except subprocess.CalledProcessError:
        pytest.skip("this kernel has no quota")
    try:
        limits = ["setquota", "-u", "1000", "0", "64", "0", "10"]
        result = subprocess.run([*limits, str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no setquota")
    if result.returncode:
        pytest.skip(f"no quota here: {result.stderr.strip()}")
    path.chmod(0o777)
    client.rpc(Tattach(10, NOFID, b"", b"", 1000))
    client.walk(10, 1, b"m")
    return path


@pytest.mark.threat("t_errno")
def test_quota_of_blocks(quota: Path, client: Client) -> None:
    client.create(1, 2, b"f", gid=1000)
    written = 0
    code = ""
    while not code:
        code = client.error(Twrite(2, written, 4096), b"x" * 4096)
        written += 0 if code else 4096
        assert written <= 1 << 20, "the daemon is not bound by the user's quota"
    assert code == "EDQUOT"
    assert client.getattr(2).size == written
    assert client.read(2, 0, 4096) == b"x" * 4096


def test_quota_of_files(quota: Path, client: Client) -> None:
    code = ""
    for number in range(20):
        code = client.error(Tmkdir(1, b"d%d" % number, 0o755, 1000))
        if code:
            break
    assert code == "EDQUOT"
    assert not (quota / f"d{number}").exists()


# Read-only


WRITES: dict[str, Any] = {
    "lcreate": Tlcreate(3, b"new", CREATE, 0o600, 0),
    "lcreate existing": Tlcreate(3, b"file", 0x42, 0o600, 0),
    "mkdir": Tmkdir(1, b"new", 0o700, 0),
    "symlink": Tsymlink(1, b"new", b"target", 0),
    "mknod": Tmknod(1, b"new", stat.S_IFIFO | 0o600, 0, 0, 0),
    "link": Tlink(1, 2, b"new"),
    "rename": Trename(2, 1, b"new"),
    "renameat": Trenameat(1, b"file", 1, b"new"),
    "unlinkat": Tunlinkat(1, b"file", 0),
    "rmdir": Tunlinkat(1, b"dir", 0x200),
    "remove": Tremove(4),
    "open for writing": Tlopen(2, 1),
    "open for both": Tlopen(2, 2),
    "open with trunc": Tlopen(2, TRUNC | 1),
    "size": size(2, 0),
    "mode": mode(2, 0o600),
    "owner": Tsetattr(2, int(SetattrValid.UID), 0, 1, 0, 0, 0, 0, 0, 0),
    "times": Tsetattr(2, int(SetattrValid.MTIME | SetattrValid.ATIME), 0, 0, 0, 0, 0, 0, 0, 0),
    "ctime": Tsetattr(2, int(SetattrValid.CTIME), 0, 0, 0, 0, 0, 0, 0, 0),
}


@pytest.fixture(params=["read-only mount", "--readonly"])
def readonly(
    request: pytest.FixtureRequest,
    start_daemon: StartDaemon,
    export: Path,
    mount: Mount,
    tmp_path: Path,
) -> Iterator[Client]:
    """fid 1: a directory that may not be changed; 2 and 4: ``file`` in it; 3: fid 1 again."""
    folder = tmp_path / "folder"
    (folder / "dir").mkdir(parents=True)
    (folder / "file").write_text("text")
    os.utime(folder / "file", ns=(1_000_000_000, 1_000_000_000))
    (folder / "link").symlink_to("file")
    if request.param == "--readonly":
        folder.rename(export / "m")
        daemon = start_daemon("--readonly")
    else:
        mount(export / "m", "--bind", folder)
        subprocess.run(["mount", "-o", "remount,bind,ro", export / "m"], check=True)
        daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"m")
        client.walk(1, 2, b"file")
        client.walk(1, 3)
        client.walk(1, 4, b"file")
        yield client


def picture(folder: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in sorted([folder, *folder.rglob("*")]):
        info = path.lstat()
        key = (info.st_mode, info.st_uid, info.st_nlink, info.st_size)
        found.append((path.name, *key, info.st_mtime_ns, info.st_atime_ns, info.st_ctime_ns))
    return found


@pytest.mark.threat("t_readonly")
def test_every_change_is_refused(readonly: Client, export: Path) -> None:
    before = picture(export / "m")
    refused = {what: readonly.error(message) for what, message in WRITES.items()}
    # Linux says so for what exists already before it looks at the mount.
    assert {what: code for what, code in refused.items() if code != "EROFS"} == {}
    for name in (b"user.x", b"security.capability"):
        with pytest.raises(OSError, match="Read-only"):
            readonly.set_xattr(2, name, b"value")
    assert picture(export / "m") == before


@pytest.mark.threat("t_readonly")
def test_reading_leaves_no_trace(readonly: Client, export: Path) -> None:
    """Not even in the access time."""
    before = picture(export / "m")
    readonly.open(1, 5, b"file")
    assert readonly.read(5, 0, 100) == b"text"
    assert readonly.names(1) == {b"file", b"dir", b"link"}
    readonly.walk(1, 6, b"link")
    readonly.getattr(6)
    readonly.rpc(Tlock(5, 0, 0, 0, 0, 1, b"guest"))
    readonly.rpc(Tfsync(5, 0))
    assert picture(export / "m") == before


@pytest.mark.threat("t_readonly")
def test_trunc_without_writing(readonly: Client, export: Path) -> None:
    """O_RDONLY|O_TRUNC truncates on Linux, so it is a change."""
    assert readonly.error(Tlopen(2, TRUNC)) == "EROFS"
    assert (export / "m/file").read_text() == "text"


UNTOUCHED = LegacyStat(
    Qid(0xFF, UNTOUCHED_32, UNTOUCHED_64), UNTOUCHED_32, UNTOUCHED_32, UNTOUCHED_32,
    UNTOUCHED_64, b"", b"", b"", b"",
)  # fmt: skip


@pytest.mark.threat("t_readonly")
@pytest.mark.parametrize("dialect", [b"9P2000.u", b"9P2000"])
def test_every_change_of_old_clients_is_refused(
    readonly: Client, export: Path, dialect: bytes
) -> None:
    extended = dialect == b"9P2000.u"
    version = readonly.rpc(Tversion(8192, dialect))
    assert isinstance(version, Rversion)
    assert version.version == dialect
    readonly.rpc(Tattach(ROOT, NOFID, b"0", b"", 0))
    readonly.walk(ROOT, 1, b"m")
    for fid in (2, 4):
        readonly.walk(1, fid, b"file")
    readonly.walk(1, 3)
    before = picture(export / "m")

    def wstat(**changes: Any) -> Twstat:
        return Twstat(2, encode_stat(UNTOUCHED._replace(**changes), extended))

    attempts = {
        "create": Tcreate(3, b"new", 0o600, 2, b""),
        "mkdir": Tcreate(3, b"new", int(Mode.DIR) | 0o700, 0, b""),
        "open for writing": Topen(2, 1),
        "open with trunc": Topen(2, 0x10),
        "open for both": Topen(2, 2),
        "rename": wstat(name=b"new"),
        "mode": wstat(mode=0o600),
        "length": wstat(length=0),
        "mtime": wstat(mtime=1),
        "remove": Tremove(4),
    }
    if extended:
        attempts |= {
            "symlink": Tcreate(3, b"new", int(Mode.SYMLINK) | 0o777, 0, b"target"),
            "link": Tcreate(3, b"new", int(Mode.LINK), 0, b"2"),
            "fifo": Tcreate(3, b"new", int(Mode.PIPE) | 0o600, 0, b""),
            "owner": wstat(n_uid=1),
        }
    refused = {}
    for what, message in attempts.items():
        try:
            readonly.rpc(message)
        except P9Error as error:
            refused[what] = getattr(error.reply, "ename", b"")
        else:
            refused[what] = b""
    assert set(refused.values()) == {b"Read-only file system"}, refused
    readonly.rpc(Topen(2, 0))
    assert readonly.read(2, 0, 100) == b"text"
    readonly.rpc(Tstat(2))
    assert picture(export / "m") == before


def test_xattrcreate_on_a_readonly_export_is_refused_at_once(
    start_daemon: StartDaemon, export: Path
) -> None:
    with Client(start_daemon("--readonly").socket) as client:
        client.attach()
        assert client.error(Txattrcreate(ROOT, b"user.x", 1, 0)) == "EROFS"


# Sizes of files


@pytest.fixture
def limited(start_daemon: StartDaemon) -> Iterator[Callable[..., Client]]:
    """A client of a daemon under limits that prlimit(1) sets."""
    with ExitStack() as stack:

        def run(*limits: str, options: Sequence[str] = ()) -> Client:
            daemon = start_daemon(*options, launcher=("prlimit", *limits))
            client = stack.enter_context(Client(daemon.socket))
            client.attach()
            return client

        yield run


def test_file_size_limit(limited: Callable[..., Client], export: Path) -> None:
    """The signal that comes with EFBIG does not end the daemon."""
    client = limited("--fsize=10000")
    client.create(ROOT, 1, b"f")
    assert client.write(1, 0, b"x" * 9000) == 9000
    assert client.write(1, 9000, b"x" * 9000) == 1000
    assert client.error(Twrite(1, 10_000, 1), b"x") == "EFBIG"
    assert client.error(size(1, 20_000)) == "EFBIG"
    client.open(ROOT, 2, b"f", flags=2 | 0x101000)  # written by a worker
    assert client.error(Twrite(2, 10_000, 1), b"x") == "EFBIG"
    assert (export / "f").stat().st_size == 10_000


def test_largest_file_of_the_file_system(client: Client, export: Path, mount_ext4: Mount) -> None:
    """Beyond 16 TiB ext4 has no blocks: the answers are those of a local program."""
    mount_ext4(export / "m")
    client.walk(ROOT, 1, b"m")
    client.create(1, 2, b"f")
    fd = os.open(export / "m/g", os.O_CREAT | os.O_RDWR)
    try:
        for end in (1 << 44, (1 << 44) - 4096, 1 << 45, (1 << 63) - 1):
            expected = ""
            try:
                os.ftruncate(fd, end)
            except OSError as error:
                expected = errno.errorcode[error.errno or 0]
            assert client.error(size(2, end)) == expected
            try:
                os.pwrite(fd, b"x", end - 1)
                expected = ""
            except OSError as error:
                expected = errno.errorcode[error.errno or 0]
            assert client.error(Twrite(2, end - 1, 1), b"x") == expected
            assert client.getattr(2).size == os.fstat(fd).st_size
    finally:
        os.close(fd)


# Descriptors


def fill_up(client: Client, export: Path) -> list[int]:
    """Open files until no more can be; whether each of the attempts worked."""
    opened = []
    for number in range(300):
        (export / f"f{number}").write_text(str(number))
        if not client.error(Twalk(ROOT, number + 1, (b"f%d" % number,))):
            if client.error(Tlopen(number + 1, 0)):
                client.clunk(number + 1)
            else:
                opened.append(number)
    return opened


# EMFILE rather than ENFILE: it is the limit of this process, not of the host.
@pytest.mark.threat("t_open_flood")
def test_no_descriptor_left(limited: Callable[..., Client], export: Path) -> None:
    """EMFILE for opens, while everything that is held goes on; clunks make room."""
    client = limited("--nofile=256", options=["--reclaim", "names"])
    opened = fill_up(client, export)
    assert 100 < len(opened) < 256
    client.walk(ROOT, 1000)
    assert client.error(Tlcreate(1000, b"new", CREATE, 0o600, 0)) == "EMFILE"
    assert not (export / "new").exists(), "a creation that failed has left its file"
    for number in opened:
        assert client.read(number + 1, 0, 10) == b"%d" % number
    client.clunk(*(number + 1 for number in opened[:50]))
    client.open(ROOT, 999, b"f299")
    client.rpc(Tlcreate(1000, b"new", CREATE, 0o600, 0))


def test_emfile_is_not_told_too_early(limited: Callable[..., Client], export: Path) -> None:
    """Only when nothing idle is left: then no later attempt works either."""
    opened = fill_up(limited("--nofile=256", options=["--reclaim", "names"]), export)
    assert opened == list(range(len(opened)))


# Names and trees


# 100,000 rather than a million: what memory they take would show with these.
@pytest.mark.threat("t_readdir_big")
def test_a_hundred_thousand_entries(client: Client, daemon: Daemon, export: Path) -> None:
    """Each comes once, with small cookies, and the daemon does not grow with it."""
    count = 100_000
    (export / "d").mkdir()
    folder = os.open(export / "d", os.O_DIRECTORY)
    for number in range(count):
        os.close(os.open(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    client.open(ROOT, 1, b"d")
    names = set()
    total = cookie = 0
    while entries := client.readdir(1, cookie, 65_536):
        for entry in entries:
            names.add(entry.name)
            cookie = entry.offset
        total += len(entries)
        assert cookie < 1 << 31
    assert total == len(names) == count + 2
    fields = Path(f"/proc/{daemon.pid}/status").read_text().split("VmHWM:")[1].split()
    assert int(fields[0]) < 150_000  # KiB


@pytest.mark.threat("t_long")
@pytest.mark.parametrize("kind", ["ascii", "bytes", "utf-8"])
def test_names_of_255_bytes(client: Client, export: Path, kind: str) -> None:
    """In every operation that takes a name; one byte more is too long in all of them."""
    name = {"ascii": b"n" * 255, "bytes": b"\xff\x01" * 127 + b"\xfe", "utf-8": b"\xc3\xa9" * 127}[
        kind
    ].ljust(255, b"x")
    other, third = name[:-1] + b"1", name[:-1] + b"2"
    client.create(ROOT, 1, name)
    assert client.names(ROOT) == {name}
    client.walk(ROOT, 2, name)
    client.rpc(Tlink(ROOT, 2, other))
    client.rpc(Trenameat(ROOT, other, ROOT, third))
    client.rpc(Tunlinkat(ROOT, third, 0))
    client.rpc(Tmkdir(ROOT, other, 0o755, 0))
    client.rpc(Tsymlink(ROOT, third, name, 0))
    assert client.names(ROOT) == {name, other, third} == set(os.listdir(os.fsencode(export)))
    long = name + b"x"
    client.walk(ROOT, 3)
    for message in (
        Twalk(ROOT, 4, (long,)),
        Tlcreate(3, long, CREATE, 0o600, 0),
        Tlink(ROOT, 2, long),
        Tmkdir(ROOT, long, 0o755, 0),
        Tsymlink(ROOT, long, b"t", 0),
        Tmknod(ROOT, long, stat.S_IFIFO | 0o600, 0, 0, 0),
        Trenameat(ROOT, name, ROOT, long),
        Trenameat(ROOT, long, ROOT, name),
        Trename(2, ROOT, long),
        Tunlinkat(ROOT, long, 0),
    ):
        assert client.error(message) == "ENAMETOOLONG", message


@pytest.mark.threat("t_deep")
@pytest.mark.parametrize("how", ["names", "handles"])
def test_a_path_far_longer_than_path_max(
    start_daemon: StartDaemon, export: Path, how: str, as_root: None
) -> None:
    """Everything works 75,000 bytes deep, and ``..`` leads all the way back."""
    depth, name = 300, b"d" * 250
    with Client(start_daemon("--reclaim", how).socket) as client:
        client.attach()
        client.walk(ROOT, 1)
        for _ in range(depth):
            client.rpc(Tmkdir(1, name, 0o755, 0))
            client.walk(1, 1, name)
        client.create(1, 2, b"f")
        client.write(2, 0, b"text")
        client.walk(1, 3, b"f")
        client.rpc(mode(3, 0o600))
        client.rpc(size(3, 2))
        client.set_xattr(3, b"user.x", b"value")
        client.rpc(Tlink(1, 3, b"g"))
        client.rpc(Trenameat(1, b"g", ROOT, b"g"))
        client.rpc(Trename(3, 1, b"h"))
        assert client.names(1) == {b"h"}
        assert (export / "g").read_bytes() == b"te"
        (qid,) = client.walk(1, 4, b"..")
        assert qid.type == 0x80
        client.rpc(Tremove(3))
        assert client.names(1) == set()
        for _ in range(depth):
            client.walk(1, 1, b"..")
            client.rpc(Tunlinkat(1, name, 0x200))
        assert client.getattr(1).qid.path == client.getattr(ROOT).qid.path
        assert client.error(Tgetattr(4, 0)) == ""
        client.rpc(Tclunk(2))
    assert os.listdir(export) == ["g"]
