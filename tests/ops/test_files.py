"""Tlopen, Tlcreate, Tread, Twrite, Tfsync: regular files."""

import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from ninepd.p9 import messages as p9
from ninepd.p9.messages import (
    NUMBERS,
    OpenFlag,
    Rfsync,
    Rlerror,
    SetattrValid,
    Tclunk,
    Tfsync,
    Tlcreate,
    Tlopen,
    Tmkdir,
    Tread,
    Tremove,
    Tsetattr,
    Tunlinkat,
    Twrite,
    decode,
    encode,
)
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client

RDONLY, WRONLY, RDWR = 0, 1, 2
MIB = 1 << 20


@pytest.fixture
def special(export: Path) -> Path:
    """A directory with one of everything that must not be opened on the host."""
    os.mkfifo(export / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(export / "socket"))
    if not os.geteuid():
        os.mknod(export / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(export / "block", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    return export


# Opening


def test_open_tells_a_useful_iounit(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    (export / "d").mkdir()
    client.walk(ROOT, 1, b"f")
    opened = client.rpc(Tlopen(1, RDONLY))
    assert opened.iounit % 4096 == 0
    assert 0 < opened.iounit <= (1 << 17) - 24
    assert opened.qid == client.getattr(1).qid
    client.walk(ROOT, 2, b"d")
    assert client.rpc(Tlopen(2, RDONLY)).iounit == 0


def test_special_files_are_never_opened(client: Client, special: Path) -> None:
    names = [os.fsencode(entry.name) for entry in special.iterdir()]
    found = {}
    for fid, name in enumerate(names, 1):
        client.walk(ROOT, fid, name)
        found[name] = {client.error(Tlopen(fid, flags)) for flags in (RDONLY, WRONLY, 0x800)}
    assert found == {name: {"ENXIO"} for name in names}


@pytest.mark.threat("t_symlink_abs")
def test_symlinks_are_never_followed(client: Client, export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (export / "link").symlink_to(tmp_path / "secret")
    client.walk(ROOT, 1, b"link")
    assert client.error(Tlopen(1, RDONLY)) == "ELOOP"
    assert client.error(Tlopen(1, RDWR | OpenFlag.TRUNC)) == "ELOOP"
    assert (tmp_path / "secret").read_text() == "secret"


def test_directories_are_opened_for_reading_only(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    client.walk(ROOT, 1, b"d")
    for flags in (WRONLY, RDWR, OpenFlag.TRUNC, OpenFlag.APPEND):
        assert client.error(Tlopen(1, flags)) == "EISDIR"
    client.rpc(Tlopen(1, OpenFlag.NONBLOCK | OpenFlag.DIRECTORY))


def test_failed_open_leaves_the_fid_usable(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.walk(ROOT, 1, b"f")
    assert client.error(Tlopen(1, OpenFlag.NOACCESS)) == "EINVAL"
    client.rpc(Tlopen(1, RDONLY))
    assert client.read(1, 0, 10) == b"text"


def test_flags_that_mean_nothing_to_the_host(client: Client, export: Path) -> None:
    """CREATE and EXCL still stand in the f_flags of a guest that reopens a file it made."""
    (export / "f").write_text("text")
    flags = (
        OpenFlag.CREATE
        | OpenFlag.EXCL
        | OpenFlag.NOCTTY
        | OpenFlag.FASYNC
        | OpenFlag.DIRECT
        | OpenFlag.LARGEFILE
        | OpenFlag.NONBLOCK
        | OpenFlag.NOFOLLOW
        | OpenFlag.CLOEXEC
        | OpenFlag.NOATIME
        | 0xFFE00000
    )
    client.open(ROOT, 1, b"f", flags=flags)
    assert client.read(1, 0, 10) == b"text"


def test_directory_flag_on_a_file_is_decided_by_the_inode(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.open(ROOT, 1, b"f", flags=OpenFlag.DIRECTORY)
    assert client.read(1, 0, 10) == b"text"


def test_open_with_trunc(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.open(ROOT, 1, b"f", flags=RDWR | OpenFlag.TRUNC)
    assert (export / "f").read_text() == ""


def test_append_ignores_the_offset(client: Client, export: Path) -> None:
    (export / "f").write_text("one ")
    client.open(ROOT, 1, b"f", flags=WRONLY | OpenFlag.APPEND)
    client.write(1, 0, b"two ")
    client.write(1, 0, b"three")
    assert (export / "f").read_text() == "one two three"


def test_access_mode_is_that_of_the_open(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.open(ROOT, 1, b"f", flags=RDONLY)
    client.open(ROOT, 2, b"f", flags=WRONLY)
    assert client.error(Twrite(1, 0, 1), b"x") == "EBADF"
    assert client.error(Tread(2, 0, 1)) == "EBADF"


def test_running_program_is_not_written(client: Client, export: Path) -> None:
    program = export / "sleep"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    process = subprocess.Popen([program, "60"])
    try:
        client.walk(ROOT, 1, b"sleep")
        assert client.error(Tlopen(1, WRONLY)) == "ETXTBSY"
    finally:
        process.kill()
        process.wait()


# Creating


def test_create(client: Client, export: Path) -> None:
    qid = client.create(ROOT, 1, b"f", mode=0o640)
    assert client.write(1, 0, b"text") == 4
    assert client.walk(ROOT, 2, b"f")[0].path == qid.path
    info = (export / "f").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_size) == (0o640, 4)


def test_create_moves_the_fid_from_the_directory_to_the_file(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    assert stat.S_ISREG(client.getattr(1).mode)
    assert client.error(Tlcreate(1, b"g", RDWR, 0o644, 0)) == "EINVAL"


@pytest.mark.parametrize("mode", [0o444, 0o400, 0o000, 0o200])
def test_create_without_permissions_of_its_own(client: Client, export: Path, mode: int) -> None:
    """git makes its objects with O_WRONLY and mode 0444."""
    client.create(ROOT, 1, b"f", mode=mode, flags=0x40 | 0x80 | WRONLY)
    client.write(1, 0, b"text")
    assert stat.S_IMODE((export / "f").stat().st_mode) == mode
    assert (export / "f").stat().st_size == 4


@pytest.mark.parametrize("mode", [0o7777, 0o4755, 0o2755, 0o1777])
def test_create_takes_all_mode_bits(client: Client, export: Path, mode: int) -> None:
    client.create(ROOT, 1, b"f", mode=mode)
    assert stat.S_IMODE((export / "f").stat().st_mode) == mode


@pytest.mark.threat("t_create_existing")
def test_create_over_an_existing_file_opens_it_untouched(client: Client, export: Path) -> None:
    """The guest's cache was behind: owner, mode and content stay."""
    path = export / "f"
    path.write_text("text")
    path.chmod(0o600)
    before = path.stat()
    client.walk(ROOT, 1)
    reply = client.rpc(Tlcreate(1, b"f", 0x40 | RDWR, 0o777, 4242))
    assert reply.qid.path == client.walk(ROOT, 2, b"f")[0].path
    assert client.read(1, 0, 10) == b"text"
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_ino, after.st_ctime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
        before.st_ino,
        before.st_ctime_ns,
    )


def test_create_with_excl_over_an_existing_file(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.walk(ROOT, 1)
    assert client.error(Tlcreate(1, b"f", 0x40 | 0x80 | RDWR, 0o777, 0)) == "EEXIST"
    assert stat.S_ISDIR(client.getattr(1).mode)
    client.rpc(Tlcreate(1, b"g", 0x40 | 0x80 | RDWR, 0o644, 0))


@pytest.mark.threat("t_create_over")
def test_create_over_something_that_is_no_file(
    client: Client, special: Path, tmp_path: Path
) -> None:
    (special / "d").mkdir()
    (tmp_path / "target").write_text("secret")
    (special / "link").symlink_to(tmp_path / "target")
    (special / "dangling").symlink_to(tmp_path / "nothing")
    expected = {b"d": "EISDIR", b"link": "ELOOP", b"dangling": "ELOOP"}
    expected |= {
        os.fsencode(entry.name): "ENXIO"
        for entry in special.iterdir()
        if not entry.is_symlink() and not entry.is_dir()
    }
    found = {}
    for fid, name in enumerate(expected, 1):
        client.walk(ROOT, fid)
        found[name] = client.error(Tlcreate(fid, name, 0x40 | 0x200 | RDWR, 0o777, 0))
        assert stat.S_ISDIR(client.getattr(fid).mode)
    assert found == expected
    assert (tmp_path / "target").read_text() == "secret"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.threat("t_slash", "t_dot", "t_empty", "t_string", "t_long")
def test_create_with_bad_names(client: Client, export: Path) -> None:
    expected = {
        b"": "ENOENT",
        b"a/b": "ENOENT",
        b"/x": "ENOENT",
        b"../x": "ENOENT",
        b"a\0b": "EINVAL",
        b".": "EEXIST",
        b"..": "EEXIST",
        b"x" * 256: "ENAMETOOLONG",
    }
    client.walk(ROOT, 1)
    found = {name: client.error(Tlcreate(1, name, RDWR, 0o644, 0)) for name in expected}
    assert found == expected
    assert list(export.iterdir()) == []


def test_create_in_a_file(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    assert client.error(Tlcreate(1, b"g", RDWR, 0o644, 0)) == "ENOTDIR"


def test_file_made_by_create_has_a_hint(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    client.rpc(Tremove(1))
    assert not (export / "f").exists()


# Reading and writing


def test_read_ranges(client: Client, export: Path) -> None:
    (export / "f").write_bytes(bytes(range(256)) * 64)
    data = (export / "f").read_bytes()
    client.open(ROOT, 1, b"f")
    for offset, count in [(0, 1), (1, 4095), (4095, 2), (16000, 10_000), (16384, 10), (1 << 40, 5)]:
        assert client.read(1, offset, count) == data[offset : offset + count]


@pytest.mark.threat("t_counts")
def test_read_is_clipped_to_the_room_for_it(client: Client, export: Path) -> None:
    (export / "f").write_bytes(b"x" * 100_000)
    client.open(ROOT, 1, b"f")
    _, data = client.rpc_with_data(Tread(1, 0, 2**32 - 1), room=4096)
    assert data == b"x" * (4096 - 11)
    _, data = client.rpc_with_data(Tread(1, 0, 100), room=11)
    assert data == b""


def test_read_into_scattered_buffers(client: Client, export: Path) -> None:
    content = os.urandom(20_000)
    (export / "f").write_bytes(content)
    client.open(ROOT, 1, b"f")
    raw = client.exchange(encode(3, Tread(1, 0, 20_000)), room=[7, 4, 1, 4095, 4096, 1, 11807])
    assert raw[11:] == content
    assert int.from_bytes(raw[7:11], "little") == 20_000


@pytest.mark.threat("t_counts")
@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, (1 << 63) - 1])
def test_offsets_past_the_largest_file(client: Client, offset: int) -> None:
    client.create(ROOT, 1, b"f")
    assert client.error(Tread(1, offset, 1)) == "EINVAL"
    assert client.error(Twrite(1, offset, 1), b"x") in {"EINVAL", "EFBIG"}


def test_write_ranges(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    assert client.write(1, 5, b"hello") == 5
    assert client.write(1, 0, b"") == 0
    assert client.write(1, 100_000, b"x" * 60_000) == 60_000
    assert (export / "f").read_bytes() == bytes(5) + b"hello" + bytes(99_990) + b"x" * 60_000


def test_write_from_scattered_buffers(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    content = os.urandom(10_000)
    request = bytearray(encode(3, Twrite(1, 0, len(content))) + content)
    request[:4] = len(request).to_bytes(4, "little")
    pieces = [request[:3], request[3:20], request[20:30], request[30:4126], request[4126:]]
    raw = client.exchange(*map(bytes, pieces))
    assert decode(raw)[1].nbytes == len(content)
    assert (export / "f").read_bytes() == content


@pytest.mark.threat("t_counts")
@pytest.mark.parametrize("count", [5, 1000, 2**32 - 1])
def test_write_that_announces_more_than_came(client: Client, export: Path, count: int) -> None:
    client.create(ROOT, 1, b"f")
    assert client.error(Twrite(1, 0, count), b"four") == "EINVAL"
    assert (export / "f").stat().st_size == 0


def test_write_of_less_than_came(client: Client, export: Path) -> None:
    client.create(ROOT, 1, b"f")
    assert client.rpc(Twrite(1, 0, 4), b"four and more").nbytes == 4
    assert (export / "f").read_bytes() == b"four"


@pytest.mark.parametrize("flag", [0, OpenFlag.DSYNC, OpenFlag.SYNC])
def test_large_transfer(client: Client, export: Path, flag: int) -> None:
    client.create(ROOT, 1, b"f", flags=0x40 | RDWR | flag)
    content = os.urandom(MIB)
    for at in range(0, MIB, 1 << 16):
        assert client.write(1, at, content[at : at + (1 << 16)]) == 1 << 16
    assert (export / "f").read_bytes() == content
    read = b"".join(client.read(1, at, 1 << 16) for at in range(0, MIB, 1 << 16))
    assert read == content


def test_read_of_data_that_is_not_cached(client: Client, export: Path) -> None:
    """What must come from the disk is answered by a worker, the rest meanwhile by the thread."""
    content = os.urandom(MIB)
    path = export / "f"
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    client.open(ROOT, 1, b"f")
    read = b"".join(client.read(1, at, 1 << 16) for at in range(0, MIB, 1 << 16))
    assert read == content


def test_full_file_system(client: Client, export: Path, mount: Mount) -> None:
    mount(export / "small", "-t", "tmpfs", "-o", "size=64k", "none")
    client.walk(ROOT, 1, b"small")
    client.create(1, 2, b"f")
    written = client.write(2, 0, b"x" * 100_000)
    assert written == 65536  # what fits; the rest fails, as write(2) does
    assert client.error(Twrite(2, 65536, 1), b"x") == "ENOSPC"
    assert (export / "small/f").stat().st_size == 65536


def test_descriptor_stays_usable_after_its_permissions_are_gone(
    client: Client, export: Path
) -> None:
    client.create(ROOT, 1, b"f")
    (export / "f").chmod(0)
    client.write(1, 0, b"text")
    assert client.read(1, 0, 4) == b"text"


# Fsync


@pytest.mark.parametrize("datasync", [0, 1])
def test_fsync(client: Client, export: Path, datasync: int) -> None:
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"text")
    assert client.rpc(Tfsync(1, datasync)) == Rfsync()
    client.open(ROOT, 2)
    assert client.rpc(Tfsync(2, datasync)) == Rfsync()


def test_fsync_of_old_clients(client: Client) -> None:
    client.create(ROOT, 1, b"f")
    raw = encode(5, Tfsync(1, 0))[:-4]
    raw = len(raw).to_bytes(4, "little") + raw[4:]
    assert decode(client.exchange(raw)) == (5, Rfsync())


def test_fsync_of_a_fid_that_is_clunked_meanwhile(client: Client, export: Path) -> None:
    driver = client.driver
    for number in range(50):
        client.create(ROOT, 1, b"%d" % number)
        client.write(1, 0, b"x" * 4096)
        heads = [
            driver.submit([encode(1, Tfsync(1, 0))], [4096]),
            driver.submit([encode(2, Tclunk(1))], [4096]),
        ]
        driver.kick()
        done = dict(driver.wait_used(count=2))
        answers = [decode(driver.reply(head, done[head]))[1] for head in heads]
        assert not any(isinstance(answer, Rlerror) for answer in answers)


# Read-only exports


@pytest.mark.threat("t_readonly")
def test_readonly_export(start_daemon: StartDaemon, export: Path) -> None:
    (export / "f").write_text("text")
    (export / "d").mkdir()
    before = (export / "f").stat()
    with Client(start_daemon("--readonly").socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        assert client.read(1, 0, 10) == b"text"
        client.walk(ROOT, 2, b"f")
        client.walk(ROOT, 3)
        refused = [
            Tlopen(2, WRONLY),
            Tlopen(2, RDWR),
            Tlopen(2, RDONLY | OpenFlag.TRUNC),
            Tlopen(2, RDONLY | OpenFlag.APPEND),
            Tlcreate(3, b"new", RDWR, 0o644, 0),
            Tlcreate(3, b"f", RDONLY, 0o644, 0),
            Tsetattr(2, SetattrValid.MODE, 0o777, 0, 0, 0, 0, 0, 0, 0),
            Tsetattr(1, SetattrValid.SIZE, 0, 0, 0, 0, 0, 0, 0, 0),
            p9.Tmkdir(ROOT, b"new", 0o755, 0),
            p9.Tsymlink(ROOT, b"new", b"target", 0),
            p9.Tmknod(ROOT, b"new", 0o100644, 0, 0, 0),
            p9.Tlink(ROOT, 2, b"new"),
            p9.Trename(2, ROOT, b"new"),
            p9.Trenameat(ROOT, b"f", ROOT, b"new"),
            p9.Tunlinkat(ROOT, b"f", 0),
            p9.Tunlinkat(ROOT, b"d", 0x200),
            p9.Txattrcreate(2, b"user.x", 1, 0),
            p9.Tremove(2),
        ]
        found = {str(message): client.error(message) for message in refused}
        assert found == dict.fromkeys(found, "EROFS")
        assert client.error(p9.Tgetattr(2, 0)) == "ENOENT"  # Tremove clunks all the same
        client.names(ROOT)
    assert sorted(os.listdir(export)) == ["d", "f"]
    after = (export / "f").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_size,
    )


# Room for replies


@pytest.mark.threat("t_reply_fit")
def test_reply_that_does_not_fit_means_nothing_is_done(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1)
    assert client.error(Tlcreate(1, b"new", RDWR, 0o644, 0), room=23) == "EMSGSIZE"
    assert client.error(Tmkdir(ROOT, b"new", 0o755, 0), room=19) == "EMSGSIZE"
    # Rlerror is the larger of the two possible answers here.
    head = client.submit(encode(1, Tunlinkat(ROOT, b"f", 0)), room=10)
    assert client.driver.wait_used() == [(head, 0)]
    client.driver.free(head)
    assert os.listdir(export) == ["f"]
    client.rpc(Tunlinkat(ROOT, b"f", 0), room=11)


def test_readers_and_a_writer_at_once(client: Client, export: Path) -> None:
    """A full ring of reads beside a writer on the host: each reads the old or the new byte."""
    path = export / "f"
    path.write_bytes(b"a" * 4096)
    client.open(ROOT, 1, b"f")
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for byte in (b"b", b"a"):
                with path.open("r+b") as file:
                    file.write(byte * 4096)

    writer = threading.Thread(target=flip)
    writer.start()
    try:
        for _ in range(20):
            heads = [
                client.driver.submit([encode(tag, Tread(1, 0, 1000))], [1011]) for tag in range(60)
            ]
            client.driver.kick()
            done = dict(client.driver.wait_used(count=60))
            for head in heads:
                raw = client.driver.reply(head, done[head])
                assert raw[4] == NUMBERS[Tread] + 1
                assert set(raw[11:]) <= set(b"ab")
                assert len(raw) == 1011
    finally:
        stop.set()
        writer.join()
