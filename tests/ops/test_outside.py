"""What names, links and special files lead to outside the export: nothing comes of it."""

import errno
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd import syscalls
from ninepd.p9 import messages as p9
from ninepd.p9.messages import SetattrValid
from ninepd.p9.stat import UNTOUCHED_32, UNTOUCHED_64, LegacyStat, encode_stat
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, P9Error
from tests.support.watching import OPEN, Watch

PATHS = (b"a/b", b"/etc", b"../x", b"a/", b"/", b"")
MODELS = ("none", "mapped-xattr", "mapped-file")
FILE, DIRECTORY = 1, 2


# Names that are paths


@pytest.fixture
def calls(daemon: Daemon, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """The lines of strace about system calls of the daemon that take names."""
    log = tmp_path / "strace.log"
    command = ["strace", "-f", "-e", "trace=%file,openat2,name_to_handle_at", "-o", str(log)]
    try:
        tracer = subprocess.Popen(
            [*command, "-p", str(daemon.pid)], stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        pytest.skip("no strace")
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if "attached" not in first:
        tracer.communicate()
        pytest.skip(f"strace: {first.strip()}")

    def so_far() -> list[str]:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=20)
        return [line for line in log.read_text().splitlines() if "(" in line]

    yield so_far
    tracer.kill()
    tracer.communicate()


def with_name(name: bytes) -> list[Any]:
    """Every message that bears a name, with this one in each place."""
    return [
        p9.Twalk(ROOT, 9, (name,)),
        p9.Twalk(ROOT, 9, (b".", name)),
        p9.Tlcreate(DIRECTORY, name, 0x42, 0o600, 0),
        p9.Tmkdir(ROOT, name, 0o700, 0),
        p9.Tsymlink(ROOT, name, b"target", 0),
        p9.Tmknod(ROOT, name, stat.S_IFIFO | 0o600, 0, 0, 0),
        p9.Tlink(ROOT, FILE, name),
        p9.Tunlinkat(ROOT, name, 0),
        p9.Tunlinkat(ROOT, name, 0x200),
        p9.Trenameat(ROOT, name, ROOT, b"new"),
        p9.Trenameat(ROOT, b"file", ROOT, name),
        p9.Trename(FILE, ROOT, name),
    ]


def legacy_with_name(name: bytes) -> list[Any]:
    renamed = LegacyStat(
        p9.Qid(0xFF, UNTOUCHED_32, UNTOUCHED_64), UNTOUCHED_32, UNTOUCHED_32, UNTOUCHED_32,
        UNTOUCHED_64, name, b"", b"", b"",
    )  # fmt: skip
    wstat = [p9.Twstat(FILE, encode_stat(renamed, True))] if name else []  # else: leave it
    return [p9.Tcreate(DIRECTORY, name, 0o600, 2), *wstat]


def errno_name(client: Client, message: Any) -> str:
    try:
        reply = client.rpc(message)
    except P9Error as error:
        return {2: "ENOENT"}.get(error.errno or 0, str(error.errno))
    return "ENOENT" if len(getattr(reply, "qids", (0, 0))) == 1 else ""  # the rest of a walk


@pytest.mark.threat("t_slash", "t_empty")
def test_a_name_that_is_a_path_reaches_no_system_call(
    client: Client, export: Path, calls: Callable[[], list[str]]
) -> None:
    """The first of three walls: were it not there, the scoped look-up would still refuse it."""
    (export / "file").write_text("")
    for dialect, messages in ((b"9P2000.L", with_name), (b"9P2000.u", legacy_with_name)):
        client.rpc(p9.Tversion(8192, dialect))
        client.rpc(p9.Tattach(ROOT, p9.NOFID, b"", b"", 0))
        client.walk(ROOT, FILE, b"file")
        client.walk(ROOT, DIRECTORY)
        for name in PATHS:
            refused = {message: errno_name(client, message) for message in messages(name)}
            assert refused == dict.fromkeys(refused, "ENOENT")
    lines = calls()
    assert any('"file"' in line for line in lines), "nothing was traced"
    # What a walk looks at, and the look for the file of a rename, name one component or none.
    named = [name for line in lines for name in re.findall(r'"([^"]*)"', line)]
    assert {
        name for name in named if "/" in name and not name.startswith("/proc/self/fd/")
    } == set()
    assert os.listdir(export) == ["file"]


@pytest.mark.threat("t_slash", "t_dotdot_root", "t_symlink_mid")
@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"..", errno.EXDEV),
        (b"d/../..", errno.EXDEV),
        (b"/etc", errno.EXDEV),
        (b"link/f", errno.ELOOP),
        (b"link/", errno.ELOOP),
    ],
)
def test_the_scoped_look_up_does_not_rely_on_names(export: Path, name: bytes, code: int) -> None:
    """The second wall: it would hold if such names came to it."""
    (export / "d").mkdir()
    (export / "link").symlink_to(export.parent)
    top = os.open(export, os.O_PATH)
    try:
        for call in (lambda: syscalls.walk(top, name), lambda: syscalls.open_scoped(top, name, 0)):
            with pytest.raises(OSError, match=os.strerror(code)):
                call()
    finally:
        os.close(top)


# Links


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file outside the export, which is never to be touched."""
    path = tmp_path / "outside" / "canary"
    path.parent.mkdir()
    path.write_text("canary")
    path.chmod(0o600)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def setattr_(fid: int, valid: int, value: int = 0o777) -> p9.Tsetattr:
    return p9.Tsetattr(fid, valid, value, value, value, 0, 0, 0, 0, 0)


@pytest.mark.threat("t_symlink_abs")
@pytest.mark.parametrize("model", MODELS)
def test_nothing_of_a_links_target_is_touched(
    start_daemon: StartDaemon, export: Path, canary: Path, model: str
) -> None:
    """Whatever is done to the link, and the file system tells of no access to its target."""
    (export / "link").symlink_to(canary)
    os.mkdir(export / "d")
    before = os.stat(canary), os.listdir(canary.parent)
    with (
        Client(start_daemon("--security-model", model).socket) as client,
        Watch(canary) as watch,
    ):
        client.attach()
        client.walk(ROOT, 1, b"link")
        client.walk(ROOT, 3, b"d")
        assert stat.S_ISLNK(client.getattr(1).mode)
        assert client.rpc(p9.Treadlink(1)).target == os.fsencode(canary)
        for flags in (0, 1, 2, 0x200, 0x400):
            assert client.error(p9.Tlopen(1, flags)) == "ELOOP"
        client.walk(ROOT, 2)
        for flags in (0x42, 0x242, 0x41):
            assert client.error(p9.Tlcreate(2, b"link", flags, 0o777, 0)) in {"ELOOP", "EEXIST"}
        assert client.error(p9.Twalk(1, 9, (b"x",))) == "ENOTDIR"
        assert client.error(setattr_(1, SetattrValid.MODE)) == "EOPNOTSUPP"
        assert client.error(setattr_(1, SetattrValid.SIZE)) in {"EINVAL", "ELOOP"}
        client.error(setattr_(1, SetattrValid.UID | SetattrValid.GID, 4242))
        client.rpc(setattr_(1, SetattrValid.ATIME | SetattrValid.MTIME))
        client.error(p9.Txattrwalk(1, 9, b"user.x"))
        client.error(p9.Txattrwalk(1, 8, b""))
        with pytest.raises(P9Error):
            client.set_xattr(1, b"user.x", b"value")
        client.rpc(p9.Tlink(3, 1, b"twin"))
        client.rpc(p9.Trenameat(3, b"twin", ROOT, b"moved"))
        client.rpc(p9.Tunlinkat(ROOT, b"moved", 0))
        client.rpc(p9.Tremove(1))
        assert watch.events() == []
    assert (os.stat(canary), os.listdir(canary.parent)) == before
    assert os.listxattr(canary) == []


def owners_of(*paths: Path) -> list[tuple[object, ...]]:
    found = [(path, path.stat(), os.listxattr(path)) for path in paths]
    return [(path, info.st_mode, info.st_uid, info.st_gid, names) for path, info, names in found]


@pytest.mark.threat("t_root_attr")
@pytest.mark.parametrize("model", ["passthrough", *MODELS])
def test_attributes_of_the_root_are_not_those_of_the_hosts_root(
    start_daemon: StartDaemon, export: Path, model: str, as_root: None
) -> None:
    """QEMU's server once held the root of an export as "/", and acted there (CVE-2017-7471)."""
    above = owners_of(*export.parents)
    with Client(start_daemon("--security-model", model).socket) as client:
        client.attach()
        client.rpc(setattr_(ROOT, SetattrValid.MODE, 0o751))
        client.rpc(p9.Tsetattr(ROOT, 0x06, 0, 1234, 1235, 0, 0, 0, 0, 0))
        client.rpc(p9.Tsetattr(ROOT, 0x1B0, 0, 0, 0, 0, 7, 0, 8, 0))
        client.set_xattr(ROOT, b"user.x", b"value")
        found = client.getattr(ROOT)
        assert (found.mode & 0o7777, found.mtime_sec) == (0o751, 8)
        assert (found.uid, found.gid) == (1234, 1235)
        assert client.rpc(p9.Tstatfs(ROOT)).blocks == os.statvfs(export).f_blocks
    assert os.getxattr(export, "user.x") == b"value"
    assert owners_of(*export.parents) == above
    assert os.stat("/").st_mtime != 8


# Special files


@pytest.mark.threat("t_fifo", "t_device")
@pytest.mark.parametrize("model", MODELS)
def test_the_host_hears_of_no_special_file_being_opened(
    start_daemon: StartDaemon, export: Path, model: str
) -> None:
    """Not for an instant, whatever is asked: a driver that acts when it is opened would not."""
    os.mkfifo(export / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(export / "socket"))
    if not os.geteuid():
        os.mknod(export / "char", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(export / "block", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    names = os.listdir(export)
    with (
        Client(start_daemon("--security-model", model).socket) as client,
        Watch(*(export / name for name in names), mask=OPEN) as watch,
    ):
        client.attach()
        client.walk(ROOT, DIRECTORY)
        for fid, name in enumerate(map(os.fsencode, names), 10):
            client.walk(ROOT, fid, name)
            client.getattr(fid)
            for flags in (0, 1, 2, 0x800, 0x200, 0x4000):
                assert client.error(p9.Tlopen(fid, flags)) == "ENXIO"
            assert client.error(p9.Tlcreate(DIRECTORY, name, 0x42, 0o666, 0)) == "ENXIO"
            assert client.error(setattr_(fid, SetattrValid.SIZE)) == "EINVAL"
            client.error(setattr_(fid, SetattrValid.MODE, 0o640))
            client.error(p9.Txattrwalk(fid, 99, b"user.x"))
            client.rpc(p9.Tlink(ROOT, fid, name + b"2"))
            client.rpc(p9.Tstatfs(fid))
        assert client.names(ROOT) >= set(map(os.fsencode, names))
        assert watch.events() == []
        os.close(os.open(export / "fifo", os.O_RDONLY | os.O_NONBLOCK))
        assert [event.mask for event in watch.events()] == [OPEN], "the watch shows nothing"
