"""Tgetattr, Tsetattr, Tstatfs: metadata of every kind of file, by path fids and open fids."""

import itertools
import os
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from ninepd.p9.messages import (
    Rgetattr,
    Rsetattr,
    SetattrValid,
    Tgetattr,
    Tsetattr,
    Tstatfs,
    Tunlinkat,
)
from tests.conftest import Mount
from tests.support.client import ROOT, Client

MODE, UID, GID, SIZE = SetattrValid.MODE, SetattrValid.UID, SetattrValid.GID, SetattrValid.SIZE
ATIME, MTIME, CTIME = SetattrValid.ATIME, SetattrValid.MTIME, SetattrValid.CTIME
ATIME_SET, MTIME_SET = SetattrValid.ATIME_SET, SetattrValid.MTIME_SET
NO_ID: Final = 0xFFFFFFFF
SECOND: Final = 1_000_000_000
PAST: Final = 1_000_000_000  # seconds: 2001
BASIC: Final = 0x7FF  # of Rgetattr.valid: all that stat(2) shows


def change(
    fid: int,
    valid: int,
    *,
    mode: int = 0,
    uid: int = NO_ID,
    gid: int = NO_ID,
    size: int = 0,
    atime: int = 0,
    mtime: int = 0,
) -> Tsetattr:
    """A Tsetattr; times are nanoseconds since 1970."""
    times = [part & (1 << 64) - 1 for t in (atime, mtime) for part in divmod(t, SECOND)]
    return Tsetattr(fid, int(valid), mode, uid, gid, size, *times)


def times_of(attributes: Rgetattr) -> tuple[int, int]:
    def signed(value: int) -> int:
        return value - (1 << 64) if value >> 63 else value

    return (
        signed(attributes.atime_sec) * SECOND + attributes.atime_nsec,
        signed(attributes.mtime_sec) * SECOND + attributes.mtime_nsec,
    )


@pytest.fixture
def file(client: Client, export: Path) -> Path:
    """A file on fid 1 (a path fid) and 2 (open for reading and writing)."""
    path = export / "f"
    path.write_bytes(b"0123456789")
    path.chmod(0o640)
    client.walk(ROOT, 1, b"f")
    client.open(ROOT, 2, b"f", flags=2)
    return path


# Tgetattr


def test_attributes_are_those_of_the_host(client: Client, file: Path) -> None:
    os.utime(file, ns=(PAST * SECOND + 1, PAST * SECOND + 999_999_999))
    info = file.stat()
    for fid in (1, 2):
        found = client.getattr(fid)
        assert found.valid & BASIC == BASIC
        assert (found.mode, found.uid, found.gid, found.nlink) == (
            info.st_mode,
            info.st_uid,
            info.st_gid,
            info.st_nlink,
        )
        assert (found.size, found.blocks, found.blksize) == (
            info.st_size,
            info.st_blocks,
            info.st_blksize,
        )
        assert times_of(found) == (info.st_atime_ns, info.st_mtime_ns)
        assert found.ctime_sec * SECOND + found.ctime_nsec == info.st_ctime_ns


@pytest.mark.parametrize("mask", [0, 1, 0x7FF, 0x17FF, 0x3FFF, (1 << 64) - 1])
def test_basic_attributes_come_whatever_is_asked_for(client: Client, file: Path, mask: int) -> None:
    found = client.rpc(Tgetattr(1, mask))
    assert found.valid & BASIC == BASIC
    assert found.size == 10


def test_qid_version_changes_with_the_content(client: Client, file: Path) -> None:
    seen = {client.getattr(1).qid.version}
    for round_number in range(3):
        client.write(2, round_number, b"x")
        # Two changes within one tick of the file system's clock may look alike: make a new time.
        client.rpc(change(1, MTIME | MTIME_SET, mtime=(PAST + round_number) * SECOND))
        seen.add(client.getattr(1).qid.version)
    assert len(seen) == 4
    assert 0 not in seen


def test_generation_is_stable(client: Client, file: Path) -> None:
    before = client.getattr(1)
    client.write(2, 0, b"changed")
    client.rpc(change(1, MODE, mode=0o600))
    after = client.getattr(2)
    assert (after.gen, after.qid.path) == (before.gen, before.qid.path)


def test_odd_files_have_attributes(client: Client, export: Path) -> None:
    os.mkfifo(export / "fifo")
    (export / "link").symlink_to("nowhere")
    (export / "d").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(export / "socket"))
    for fid, name in enumerate(("fifo", "link", "d", "socket"), 1):
        client.walk(ROOT, fid, name.encode())
        found = client.getattr(fid)
        info = (export / name).lstat()
        assert (found.mode, found.size, found.nlink) == (info.st_mode, info.st_size, info.st_nlink)
        kind = {"link": 0x02, "d": 0x80}.get(name, 0)
        assert found.qid.type == kind


# Tsetattr


@pytest.mark.parametrize("fid", [1, 2])
@pytest.mark.parametrize("size", [0, 3, 10, 1 << 20, 1 << 33])
def test_size(client: Client, file: Path, fid: int, size: int) -> None:
    assert client.rpc(change(fid, SIZE | MTIME | CTIME, size=size)) == Rsetattr()
    assert file.stat().st_size == size
    with file.open("rb") as opened:
        assert opened.read(3) == b"0123456789"[: min(size, 3)]


def test_size_by_an_open_fid_that_the_mode_no_longer_allows(client: Client, file: Path) -> None:
    file.chmod(0o400)
    client.rpc(change(2, SIZE, size=4))
    assert file.stat().st_size == 4


def test_size_that_cannot_be(client: Client, file: Path) -> None:
    assert client.error(change(1, SIZE, size=1 << 63)) == "EINVAL"
    assert client.error(change(2, SIZE, size=(1 << 64) - 1)) == "EINVAL"
    assert client.error(change(2, SIZE, size=(1 << 63) - 1)) == "EFBIG"
    assert file.stat().st_size == 10


@pytest.mark.threat("t_symlink_abs")
def test_size_of_other_things(client: Client, export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (export / "link").symlink_to(tmp_path / "secret")
    (export / "d").mkdir()
    os.mkfifo(export / "fifo")
    found = {}
    for fid, name in enumerate((b"link", b"d", b"fifo"), 1):
        client.walk(ROOT, fid, name)
        found[name] = client.error(change(fid, SIZE, size=0))
    assert found.pop(b"d") == "EISDIR"
    assert found.pop(b"fifo") == "EINVAL"
    assert found.pop(b"link") in {"EINVAL", "ELOOP"}
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("fid", [1, 2])
@pytest.mark.parametrize("mode", [0, 0o7777, 0o4755, 0o100644, 0o040755, 0o177777])
def test_mode(client: Client, file: Path, fid: int, mode: int) -> None:
    client.rpc(change(fid, MODE, mode=mode))
    assert file.stat().st_mode == stat.S_IFREG | (mode & 0o7777)


@pytest.mark.parametrize("kind", ["d", "fifo", "socket"])
def test_mode_of_odd_files(client: Client, export: Path, kind: str) -> None:
    path = export / kind
    match kind:
        case "d":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
    client.walk(ROOT, 1, kind.encode())
    client.rpc(change(1, MODE, mode=0o1703))
    assert stat.S_IMODE(path.lstat().st_mode) == 0o1703


@pytest.mark.threat("t_symlink_abs", "t_xattr_link")
def test_symlinks_have_no_mode(client: Client, export: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    target.chmod(0o600)
    (export / "link").symlink_to(target)
    client.walk(ROOT, 1, b"link")
    assert client.error(change(1, MODE, mode=0o777)) == "EOPNOTSUPP"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.usefixtures("as_root")
def test_owner(client: Client, file: Path) -> None:
    client.rpc(change(1, UID, uid=1234))
    client.rpc(change(2, GID, gid=5678))
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 5678)
    client.rpc(change(1, UID | GID, uid=1, gid=2))
    assert (file.stat().st_uid, file.stat().st_gid) == (1, 2)


@pytest.mark.usefixtures("as_root")
def test_owner_that_is_not_valid_is_left_alone(client: Client, file: Path) -> None:
    client.rpc(change(1, UID, uid=1234, gid=99))
    client.rpc(change(1, GID, uid=88, gid=5678))
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 5678)


@pytest.mark.threat("t_symlink_abs", "t_xattr_link")
@pytest.mark.usefixtures("as_root")
def test_owner_and_times_of_a_symlink_are_its_own(
    client: Client, export: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("")
    (export / "link").symlink_to(target)
    before = target.stat()
    client.walk(ROOT, 1, b"link")
    client.rpc(change(1, UID | GID, uid=11, gid=12))
    client.rpc(change(1, MTIME | MTIME_SET, mtime=PAST * SECOND))
    info = (export / "link").lstat()
    assert (info.st_uid, info.st_gid, info.st_mtime_ns) == (11, 12, PAST * SECOND)
    after = target.stat()
    assert (after.st_uid, after.st_mtime_ns) == (before.st_uid, before.st_mtime_ns)


@pytest.mark.threat("t_setattr_order")
@pytest.mark.usefixtures("as_root")
def test_order_owner_before_mode(client: Client, file: Path) -> None:
    """chown(2) clears the setuid bit: a mode set together with an owner must survive that."""
    client.rpc(change(1, UID | GID | MODE, uid=5, gid=6, mode=0o6755))
    info = file.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (5, 6, 0o6755)


@pytest.mark.threat("t_setattr_order")
@pytest.mark.parametrize("fid", [1, 2])
def test_order_size_before_times(client: Client, file: Path, fid: int) -> None:
    valid = SIZE | MODE | ATIME | ATIME_SET | MTIME | MTIME_SET
    client.rpc(change(fid, valid, size=2, mode=0o4755, atime=7 * SECOND, mtime=8 * SECOND))
    info = file.stat()
    assert (info.st_size, stat.S_IMODE(info.st_mode)) == (2, 0o4755)
    assert (info.st_atime_ns, info.st_mtime_ns) == (7 * SECOND, 8 * SECOND)


@pytest.mark.parametrize(
    "time_ns",
    [0, 1, -1, -SECOND, -SECOND - 1, (1 - (1 << 31)) * SECOND, PAST * SECOND + 123_456_789],
)
def test_times_are_kept_to_the_nanosecond(client: Client, file: Path, time_ns: int) -> None:
    valid = ATIME | ATIME_SET | MTIME | MTIME_SET
    client.rpc(change(1, valid, atime=time_ns, mtime=time_ns + 1))
    info = file.stat()
    assert (info.st_atime_ns, info.st_mtime_ns) == (time_ns, time_ns + 1)
    assert times_of(client.getattr(1)) == (time_ns, time_ns + 1)


def test_one_time_leaves_the_other(client: Client, file: Path) -> None:
    os.utime(file, ns=(PAST * SECOND, PAST * SECOND))
    client.rpc(change(1, MTIME | MTIME_SET, mtime=5 * SECOND))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (PAST * SECOND, 5 * SECOND)
    client.rpc(change(1, ATIME | ATIME_SET, atime=6 * SECOND))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (6 * SECOND, 5 * SECOND)


def test_now_is_the_time_of_the_server(client: Client, file: Path) -> None:
    os.utime(file, ns=(PAST * SECOND, PAST * SECOND))
    started = time.time()
    client.rpc(change(1, MTIME, mtime=5 * SECOND))
    assert file.stat().st_atime_ns == PAST * SECOND
    assert file.stat().st_mtime >= started - 1  # the kernel's clock for files is coarse
    client.rpc(change(1, ATIME))
    assert file.stat().st_atime >= started - 1


@pytest.mark.parametrize("nsec", [SECOND, (1 << 30) - 1, (1 << 30) - 2, (1 << 64) - 1])
def test_nanoseconds_that_are_none(client: Client, file: Path, nsec: int) -> None:
    """UTIME_NOW and UTIME_OMIT are the host's numbers; a guest must not reach them."""
    before = file.stat()
    message = change(1, MTIME | MTIME_SET | MODE, mode=0o777)._replace(mtime_nsec=nsec)
    assert client.error(message) == "EINVAL"
    assert file.stat().st_mode == before.st_mode


def test_ctime_alone(client: Client, file: Path) -> None:
    before = file.stat()
    deadline = time.monotonic() + 5
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        assert time.monotonic() < deadline
        client.rpc(change(1, CTIME))
    after = file.stat()
    assert (after.st_mtime_ns, after.st_atime_ns, after.st_mode) == (
        before.st_mtime_ns,
        before.st_atime_ns,
        before.st_mode,
    )


def test_nothing_at_all(client: Client, file: Path) -> None:
    before = file.stat()
    client.rpc(change(1, 0, mode=0o7777, uid=5, gid=5, size=1, mtime=5))
    assert file.stat() == before


@pytest.mark.usefixtures("as_root")
def test_every_combination_of_fields(client: Client, file: Path) -> None:
    """Each field arrives if its bit is set, and stays if it is not."""
    fields = [MODE, UID, GID, SIZE, ATIME | ATIME_SET, MTIME | MTIME_SET]
    names = ("mode", "uid", "gid", "size", "atime", "mtime")
    base = dict(zip(names, (0o640, 1, 2, 100, PAST * SECOND, PAST * SECOND), strict=True))
    wish = dict(zip(names, (0o7751, 3, 4, 50, 7 * SECOND, 8 * SECOND), strict=True))
    everything = sum(fields)
    for fid in (1, 2):
        for chosen in itertools.product((0, 1), repeat=len(fields)):
            client.rpc(change(1, everything, **base))
            valid = sum(bit for bit, used in zip(fields, chosen, strict=True) if used)
            client.rpc(change(fid, valid, **wish))
            info = file.stat()
            found = [stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_size]
            found += [info.st_atime_ns, info.st_mtime_ns]
            expected = [
                (wish if used else base)[name] for name, used in zip(base, chosen, strict=True)
            ]
            # A truncation touches mtime, if that was not set as well.
            if chosen[3] and not chosen[5]:
                expected[5] = found[5]
            assert found == expected, valid


@pytest.mark.parametrize("valid", [0x200, 0x80000000, 0xFFFFFE00])
def test_unknown_bits(client: Client, file: Path, valid: int) -> None:
    """They must neither be taken for something else nor do harm."""
    before = file.stat()
    assert client.error(change(1, valid, mode=0o777)) in {"", "EINVAL"}
    assert (file.stat().st_mode, file.stat().st_size) == (before.st_mode, before.st_size)


def test_attributes_of_the_root(client: Client, export: Path) -> None:
    """Attributes of the root fid are those of the export's directory."""
    client.rpc(change(ROOT, MODE, mode=0o701))
    client.rpc(change(ROOT, MTIME | MTIME_SET, mtime=PAST * SECOND))
    assert stat.S_IMODE(export.stat().st_mode) == 0o701
    assert export.stat().st_mtime == PAST


@pytest.mark.threat("t_unlinked_fid")
def test_everything_works_on_an_unlinked_file(client: Client, file: Path) -> None:
    client.rpc(Tunlinkat(ROOT, b"f", 0))
    for fid in (1, 2):
        client.rpc(change(fid, SIZE, size=5))
        client.rpc(change(fid, MODE, mode=0o4711))
        client.rpc(change(fid, MTIME | MTIME_SET, mtime=PAST * SECOND))
        if not os.geteuid():
            client.rpc(change(fid, UID, uid=77))
        found = client.getattr(fid)
        assert (found.nlink, found.size, found.mtime_sec) == (0, 5, PAST)


# Tstatfs


def test_statfs(client: Client, export: Path) -> None:
    info = os.statvfs(export)
    found = client.rpc(Tstatfs(ROOT))
    assert (found.bsize, found.blocks, found.files, found.namelen) == (
        info.f_bsize,
        info.f_blocks,
        info.f_files,
        info.f_namemax,
    )


def test_statfs_below_a_mount(client: Client, export: Path, mount: Mount) -> None:
    mount(export / "m", "-t", "tmpfs", "-o", "size=1m", "none")
    client.walk(ROOT, 1, b"m")
    client.create(1, 2, b"f")
    for fid in (1, 2):
        found = client.rpc(Tstatfs(fid))
        assert found.blocks * found.bsize == 1 << 20


def test_statfs_type_is_one_that_coreutils_poll(client: Client, export: Path, mount: Mount) -> None:
    """``tail -f`` would rely on inotify, if it saw the host's type, or that of 9P."""
    mount(export / "m", "-t", "tmpfs", "none")
    client.walk(ROOT, 1, b"m")
    for fid in (ROOT, 1):
        assert client.rpc(Tstatfs(fid)).type == 0x65735546


@pytest.mark.parametrize(("kind", "watches"), [(0x65735546, False), (0x01021997, True)])
def test_tail_polls_what_has_our_type(tmp_path: Path, kind: int, watches: bool) -> None:
    """With the tail(1) of this system, to which a file's type is told by a library of ours."""
    source = tmp_path / "told.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <sys/vfs.h>\n"
        "int fstatfs(int fd, struct statfs *s) {"
        ' int (*next)(int, struct statfs *) = dlsym(RTLD_NEXT, "fstatfs");'
        f" int result = next(fd, s); s->f_type = {kind}; return result; }}\n"
    )
    library = tmp_path / "told.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    file = tmp_path / "log"
    file.write_text("first\n")
    with subprocess.Popen(
        ["tail", "-f", file], stdout=subprocess.PIPE, env={**os.environ, "LD_PRELOAD": str(library)}
    ) as tail:
        assert tail.stdout is not None
        try:
            assert tail.stdout.readline() == b"first\n"
            with file.open("a") as log:
                log.write("second\n")
            assert tail.stdout.readline() == b"second\n"  # by then it has chosen its way
            descriptors = Path(f"/proc/{tail.pid}/fd").iterdir()
            assert any("inotify" in str(fd.readlink()) for fd in descriptors) == watches
        finally:
            tail.kill()


def test_statfs_of_odd_files(client: Client, export: Path) -> None:
    os.mkfifo(export / "fifo")
    (export / "link").symlink_to("nowhere")
    (export / "closed").write_text("")
    (export / "closed").chmod(0)
    wanted = client.rpc(Tstatfs(ROOT)).fsid
    for fid, name in enumerate((b"fifo", b"link", b"closed"), 1):
        client.walk(ROOT, fid, name)
        assert client.rpc(Tstatfs(fid)).fsid == wanted


def test_clearing_setuid_is_left_to_the_kernel(client: Client, file: Path) -> None:
    """A change of ctime alone is a chown(2), which takes the setuid bit of a regular file."""
    client.rpc(change(1, MODE, mode=0o4755))
    twin = file.with_name("twin")
    twin.write_text("")
    twin.chmod(0o4755)
    os.chown(twin, -1, -1)
    client.rpc(change(1, CTIME))
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(twin.stat().st_mode)
