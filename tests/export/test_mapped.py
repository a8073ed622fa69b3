"""The mapped security models: guests see what they have set, whoever the host's owner is."""

import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    NOFID,
    SetattrValid,
    Tattach,
    Tlcreate,
    Tlink,
    Tlopen,
    Tmkdir,
    Tmknod,
    Topen,
    Treadlink,
    Tremove,
    Trenameat,
    Tsetattr,
    Tstat,
    Tsymlink,
    Tunlinkat,
    Tversion,
    Twalk,
)
from ninepd.p9.stat import LegacyStat, decode_stat
from tests.conftest import OTHER_USER, StartDaemon
from tests.support.client import ROOT, Client, Daemon, P9Error
from tests.support.mapped import DEVICE, KEEP, KEPT, KINDS, TARGET, Kept, kept_in_xattrs, make

UID, GID = 1000, 2000
USER = 50
"""The fid of that user's attach."""
NO_ID = 0xFFFFFFFF
MODES = (0o640, 0o4755, 0o2770, 0o1777, 0o000, 0o7777)
RDWR, TRUNC = 2, 0x200


@dataclass
class Share:
    """An export under a mapped model, and a client of its daemon."""

    model: str
    top: Path
    client: Client
    daemon: Daemon

    def kept(self, name: str = "") -> Kept:
        return KEPT[self.model](self.top / name, self.top)

    def keep(self, name: str = "", **fields: int) -> None:
        KEEP[self.model](self.top / name, self.top, **fields)

    def look(self, name: str = "") -> Any:
        """Attributes by a walk from the root."""
        client = self.client
        client.walk(ROOT, 997, *filter(None, name.encode().split(b"/")))
        found = client.getattr(997)
        client.clunk(997)
        return found

    def put(self, name: str) -> Path:
        """A file of the daemon's user, made on the host."""
        path = self.top / name
        path.write_text("text")
        os.chown(path, *[self.top.stat().st_uid] * 2)
        return path

    def names(self) -> set[str]:
        """On the host."""
        return {name for name in os.listdir(self.top) if not name.startswith(".virtfs")}


Start = Callable[..., Share]


@pytest.fixture(params=["mapped-xattr", "mapped-file"])
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["user", "root on tmpfs"])
def start(
    request: pytest.FixtureRequest,
    model: str,
    start_daemon: StartDaemon,
    export: Path,
    memory_dir: Path,
    other_user: tuple[str, ...],
) -> Iterator[Start]:
    """Starts a daemon, by default as root on tmpfs, or as another user on its own directory."""
    clients: list[Client] = []
    top = export
    if "tmpfs" in request.param:
        memory_dir.chmod(0o755)
        top = memory_dir / "export"
        top.mkdir(mode=0o755)
    launcher: tuple[str, ...] = ()
    if "user" in request.param:
        os.chown(top, OTHER_USER, OTHER_USER)
        launcher = other_user

    def do(*arguments: str, uid: int = 0) -> Share:
        daemon = start_daemon(
            "--security-model", model, *arguments, export=str(top), launcher=launcher
        )
        client = Client(daemon.socket)
        clients.append(client)
        client.attach(uid)
        client.rpc(Tattach(USER, NOFID, b"", b"", UID))
        return Share(model, top, client, daemon)

    yield do
    for client in clients:
        client.close()


@pytest.fixture
def share(start: Start) -> Share:
    return start()


def setattr_(
    fid: int, valid: int, mode: int = 0, uid: int = 0, gid: int = 0, size: int = 0
) -> Tsetattr:
    return Tsetattr(fid, valid, mode, uid, gid, size, 0, 0, 0, 0)


# Making


def test_made(share: Share) -> None:
    for number, (kind, mode) in enumerate(itertools.product(KINDS, MODES)):
        check_made(share, kind, mode, str(number))


def check_made(share: Share, kind: str, mode: int, name: str) -> None:
    qid = make(share.client, USER, kind, name.encode(), mode, GID)
    host = (share.top / name).lstat()
    wanted = KINDS[kind] | (0o777 if kind == "symlink" else mode)
    kept = share.kept(name)
    assert (kept["uid"], kept["gid"], kept["mode"]) == (UID, GID, wanted)
    if kind == "directory":
        assert host.st_mode == stat.S_IFDIR | 0o700
    else:
        assert host.st_mode == stat.S_IFREG | 0o600
        assert (share.top / name).read_bytes() == (TARGET if kind == "symlink" else b"")
    device = os.makedev(*DEVICE.get(kind, (0, 0)))
    assert kept.get("rdev", 0) == device
    assert host.st_uid == share.top.stat().st_uid
    found = share.look(name)
    assert (found.uid, found.gid, found.mode) == (UID, GID, wanted)
    assert found.rdev == device  # Linux's encoding is that of glibc for small numbers
    assert found.qid.path == qid.path
    assert found.qid.type == qid.type == {"directory": 0x80, "symlink": 2}.get(kind, 0)
    assert found.nlink == (2 if kind == "directory" else 1)
    assert found.size == host.st_size


def test_what_exists_is_not_touched(share: Share) -> None:
    client = share.client
    share.put("x")
    share.keep("x", uid=7, mode=stat.S_IFREG | 0o644)
    before = share.kept("x")
    for kind in KINDS:
        with pytest.raises(P9Error, match="File exists"):
            make(client, USER, kind, b"x", 0o600, GID, flags=0x80C2)
    client.create(USER, 1, b"x", mode=0o600, gid=GID)
    assert client.read(1, 0, 99) == b"text"
    assert share.kept("x") == before
    assert (share.top / "x").read_text() == "text"
    assert share.names() == {"x"}


def test_a_removed_directory_takes_nothing(share: Share) -> None:
    client = share.client
    client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
    client.walk(ROOT, 1, b"d")
    client.rpc(Tunlinkat(ROOT, b"d", 0x200))
    for kind in KINDS:
        with pytest.raises(P9Error, match="No such file"):
            make(client, 1, kind, b"x", 0o600, GID)


def test_access_of_what_is_created(share: Share) -> None:
    """Created without any permission, and used all the same by who created it."""
    client = share.client
    for flags in (0, 1, 2, 0x400, 0x401, 0x402):
        name = f"{flags:o}"
        client.create(USER, 1, name.encode(), mode=0, flags=0x8040 | flags, gid=GID)
        if flags & 3:
            client.write(1, 0, b"text")
            assert (share.top / name).read_bytes() == b"text"
        if not flags & 1:
            assert client.read(1, 0, 9) == (b"text" if flags & 3 else b"")
        client.clunk(1)


@pytest.mark.parametrize("mode", ["0640", "755", "000777"])
def test_modes_on_the_host(start: Start, mode: str) -> None:
    share = start("--fmode", mode, "--dmode", mode)
    for kind in KINDS:
        if kind == "symlink":
            continue
        make(share.client, USER, kind, kind.encode(), 0o751, GID)
        host = (share.top / kind).stat().st_mode
        assert stat.S_IMODE(host) == int(mode, 8) & 0o777
        assert share.look(kind).mode == KINDS[kind] | 0o751


def test_nodes_of_impossible_kinds(share: Share) -> None:
    client = share.client
    for kind, name in ((stat.S_IFDIR, "EPERM"), (stat.S_IFLNK, "EINVAL"), (0o170000, "EINVAL")):
        assert client.error(Tmknod(ROOT, b"x", kind | 0o600, 0, 0, 0)) == name
    client.rpc(Tmknod(ROOT, b"x", 0o600, 0, 0, 0))
    assert share.look("x").mode == stat.S_IFREG | 0o600


def test_targets_of_impossible_length(share: Share) -> None:
    client = share.client
    assert client.error(Tsymlink(ROOT, b"x", b"", 0)) == "ENOENT"
    assert client.error(Tsymlink(ROOT, b"x", b"y" * 4096, 0)) == "ENAMETOOLONG"
    assert share.names() == set()
    client.rpc(Tsymlink(ROOT, b"x", b"y" * 4095, 0))
    client.walk(ROOT, 1, b"x")
    assert client.rpc(Treadlink(1), room=8192).target == b"y" * 4095


@pytest.mark.threat("t_create_atomic")
@pytest.mark.parametrize("model", ["mapped-xattr"], indirect=True)
def test_nobody_sees_a_file_half_made(share: Share) -> None:
    """A host process that looks all the time, and knows the format."""
    seen: list[Kept] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                fd = os.open(share.top / "x", os.O_PATH)
            except OSError:
                continue
            seen.append(kept_in_xattrs(Path(f"/proc/self/fd/{fd}"), share.top))
            os.close(fd)

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(200):
        make(share.client, USER, "fifo", b"x", 0o640, GID)
        share.client.rpc(Tunlinkat(ROOT, b"x", 0))
    done.set()
    thread.join()
    whole = {"uid": UID, "gid": GID, "mode": stat.S_IFIFO | 0o640, "rdev": 0}
    assert seen
    assert all(kept == whole for kept in seen)


# Using


def test_each_kind_is_what_it_shows(share: Share) -> None:
    for kind in KINDS:
        check_kind(share, kind)
        share.client.clunk(1, 3, 4)
        make(share.client, ROOT, "file", b"plain", 0o777, GID)
        share.client.rpc(Trenameat(ROOT, b"x", ROOT, kind.encode()))
        share.client.rpc(Tunlinkat(ROOT, b"plain", 0))


def check_kind(share: Share, kind: str) -> None:
    client = share.client
    make(client, USER, kind, b"x", 0o777, GID)
    client.walk(ROOT, 1, b"x")
    is_link, is_directory = kind == "symlink", kind == "directory"
    if is_link:
        assert client.rpc(Treadlink(1)).target == TARGET
    else:
        assert client.error(Treadlink(1)) == "EINVAL"
    if not is_directory:
        assert client.error(Twalk(1, 2, (b"y",))) == "ENOTDIR"
        assert client.error(Tmkdir(1, b"y", 0o700, 0)) == "ENOTDIR"
    plain = kind in {"file", "node"}
    refused = "ELOOP" if is_link else "" if plain or is_directory else "ENXIO"
    client.walk(1, 3)
    assert client.error(Tlopen(3, 0)) == refused
    size = setattr_(1, SetattrValid.SIZE, size=5)
    assert client.error(size) == ("" if plain else "EISDIR" if is_directory else "EINVAL")
    mode = setattr_(1, SetattrValid.MODE, mode=0o600)
    assert client.error(mode) == ("EOPNOTSUPP" if is_link else "")
    client.open(ROOT, 4)
    (entry,) = [entry for entry in client.listing(4) if entry.name == b"x"]
    assert entry.type == KINDS[kind] >> 12
    assert entry.shows(client.getattr(1).qid)


def test_old_clients(share: Share) -> None:
    client = share.client
    for kind in KINDS:
        make(client, USER, kind, kind.encode(), 0o751, GID)
    client.rpc(Tversion(8192, b"9P2000.u"))
    client.rpc(Tattach(ROOT, NOFID, b"", b"", 0))
    client.walk(ROOT, 1)
    client.rpc(Topen(1, 0))
    extensions = {"symlink": TARGET, "char": b"c 291 284280", "block": b"b 8 1"}
    listed = stats(client.read(1, 0, 8000))
    assert {found.name.decode() for found in listed} == set(KINDS)
    for number, found in enumerate(listed):
        kind = found.name.decode()
        client.walk(ROOT, 2 + number, found.name)
        again = decode_stat(client.rpc(Tstat(2 + number)).stat, True)
        # Its target has been read for the listing.
        assert again == found._replace(atime=again.atime)
        assert (found.n_uid, found.n_gid) == (UID, GID)
        assert found.extension == extensions.get(kind, b"")
        assert found.mode & 0o777 == (0o777 if kind == "symlink" else 0o751)


def stats(data: bytes) -> list[LegacyStat]:
    found = []
    while data:
        size = 2 + int.from_bytes(data[:2], "little")
        found.append(decode_stat(data[:size], True))
        data = data[size:]
    return found


def test_chmod_and_chown(share: Share) -> None:
    for kind in KINDS:
        check_chmod_and_chown(share, kind)
        flags = 0x200 if (share.top / "x").is_dir() else 0
        share.client.rpc(Tunlinkat(ROOT, b"x", flags))


def check_chmod_and_chown(share: Share, kind: str) -> None:
    client = share.client
    make(client, USER, kind, b"x", 0o640, GID)
    host = (share.top / "x").lstat()
    client.walk(ROOT, 1, b"x")
    client.rpc(setattr_(1, SetattrValid.UID, uid=77))
    client.rpc(setattr_(1, SetattrValid.GID, gid=(1 << 32) - 2))
    for mode in MODES if kind != "symlink" else ():
        client.rpc(setattr_(1, SetattrValid.MODE, mode=KINDS[kind] | mode))
        assert share.kept("x")["mode"] == KINDS[kind] | mode
        assert client.getattr(1).mode == KINDS[kind] | mode
    found = client.getattr(1)
    assert (found.uid, found.gid) == (77, (1 << 32) - 2)
    after = (share.top / "x").lstat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (host.st_mode, host.st_uid, host.st_gid)
    ctime = found.ctime_nsec
    client.rpc(setattr_(1, SetattrValid.CTIME))
    assert client.getattr(1).ctime_nsec != ctime
    client.clunk(1)


def test_owner_and_mode_at_once(share: Share) -> None:
    client = share.client
    make(client, USER, "file", b"x", 0o755, GID)
    client.walk(ROOT, 1, b"x")
    valid = SetattrValid.UID | SetattrValid.GID | SetattrValid.MODE | SetattrValid.SIZE
    client.rpc(setattr_(1, valid, mode=0o6755, uid=5, gid=6, size=10))
    found = client.getattr(1)
    assert (found.uid, found.gid, found.mode, found.size) == (5, 6, stat.S_IFREG | 0o6755, 10)


def test_the_root(share: Share) -> None:
    client = share.client
    host = share.top.stat()
    found = client.getattr(ROOT)
    assert (found.uid, found.mode) == (host.st_uid, host.st_mode)
    client.rpc(setattr_(ROOT, SetattrValid.MODE, mode=0o1777))
    client.rpc(setattr_(ROOT, SetattrValid.UID | SetattrValid.GID, uid=UID, gid=GID))
    assert share.kept() == {"uid": UID, "gid": GID, "mode": stat.S_IFDIR | 0o1777}
    found = client.getattr(ROOT)
    assert (found.uid, found.gid, found.mode) == (UID, GID, stat.S_IFDIR | 0o1777)
    assert share.top.stat().st_mode == host.st_mode
    assert client.names(ROOT) == set()


# What the host makes


def test_what_nobody_has_set_is_the_hosts(share: Share) -> None:
    (share.top / "f").write_text("text")
    (share.top / "f").chmod(0o4751)
    os.chown(share.top / "f", 5, 6)
    (share.top / "f").chmod(0o4751)
    found = share.look("f")
    assert (found.uid, found.gid, found.mode) == (5, 6, stat.S_IFREG | 0o4751)
    for field, value in {"uid": 55, "gid": 66, "mode": stat.S_IFREG | 0o600}.items():
        (share.top / field).write_text("text")
        (share.top / field).chmod(0o644)
        os.chown(share.top / field, 5, 6)
        share.keep(field, **{field: value})
        found = share.look(field)
        wanted = {"uid": 5, "gid": 6, "mode": stat.S_IFREG | 0o644} | {field: value}
        assert (found.uid, found.gid, found.mode) == tuple(wanted.values())


def test_symlinks_of_the_host(share: Share) -> None:
    client = share.client
    (share.top / "target").write_text("text")
    (share.top / "l").symlink_to("target")
    os.chown(share.top / "l", *[share.top.stat().st_uid] * 2, follow_symlinks=False)
    client.walk(ROOT, 1, b"l")
    assert stat.S_ISLNK(client.getattr(1).mode)
    assert client.rpc(Treadlink(1)).target == b"target"
    assert client.error(Tlopen(1, 0)) == "ELOOP"
    client.open(ROOT, 2)
    types = {entry.name: entry.type for entry in client.listing(2)}
    assert types[b"l"] == stat.S_IFLNK >> 12
    client.rpc(Trenameat(ROOT, b"l", ROOT, b"m"))
    client.rpc(Tlink(ROOT, 1, b"n"))
    client.rpc(Tunlinkat(ROOT, b"m", 0))
    assert os.readlink(share.top / "n") == "target"


def test_special_files_of_the_host(share: Share) -> None:
    client = share.client
    os.mkfifo(share.top / "fifo")
    client.walk(ROOT, 1, b"fifo")
    assert stat.S_ISFIFO(client.getattr(1).mode)
    assert client.error(Tlopen(1, 0)) == "ENXIO"


def test_a_directory_stays_one(share: Share) -> None:
    """Whatever is kept beside it, by whomever; and nothing else becomes one."""
    (share.top / "d/sub").mkdir(parents=True)
    (share.top / "f").write_text("text")
    share.keep("f", mode=stat.S_IFDIR | 0o750)
    for kind in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFBLK, 0, stat.S_IFIFO):
        share.keep("d", mode=kind | 0o750)
        assert share.look("d").mode == stat.S_IFDIR | 0o750
    assert share.look("d").mode == stat.S_IFDIR | 0o750
    assert share.look("d/sub").mode & stat.S_IFDIR
    assert share.look("f").mode == stat.S_IFREG | 0o750
    share.client.open(ROOT, 1)
    types = {entry.name: entry.type for entry in share.client.listing(1)}
    assert (types[b"d"], types[b"f"]) == (4, 8)


# Names


def test_names_come_and_go(share: Share) -> None:
    for kind in KINDS:
        check_names_come_and_go(share, kind)
        flags = 0x200 if (share.top / "x").is_dir() else 0
        share.client.rpc(Tunlinkat(ROOT, b"x", flags))


def check_names_come_and_go(share: Share, kind: str) -> None:
    client = share.client
    make(client, USER, kind, b"x", 0o751, GID)
    client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
    client.walk(ROOT, 1, b"d")
    wanted = share.look("x")

    def look(name: str) -> None:
        found = share.look(name)
        assert found[2:5] == wanted[2:5]
        assert found.qid.path == wanted.qid.path
        assert found.rdev == wanted.rdev

    client.rpc(Trenameat(ROOT, b"x", ROOT, b"y"))
    look("y")
    client.rpc(Trenameat(ROOT, b"y", 1, b"z"))
    look("d/z")
    assert share.kept("d/z")["mode"] == wanted.mode
    if kind != "directory":
        client.walk(1, 2, b"z")
        client.rpc(Tlink(ROOT, 2, b"other"))
        look("other")
        client.rpc(Tunlinkat(1, b"z", 0))
        look("other")
        client.clunk(2)
        client.walk(ROOT, 2, b"other")
        if kind != "symlink":
            client.rpc(setattr_(2, SetattrValid.MODE, mode=0o600))
            assert share.look("other").mode == KINDS[kind] | 0o600
        client.rpc(Tremove(2))
    else:
        client.rpc(Tunlinkat(1, b"z", 0x200))
    client.rpc(Tunlinkat(ROOT, b"d", 0x200))
    client.clunk(1)
    assert share.names() == set()
    # A new file of an old name has nothing of the old one.
    (share.top / "x").write_text("")
    (share.top / "x").chmod(0o644)
    assert share.look("x").mode == stat.S_IFREG | 0o644


def test_replacing_by_a_rename(share: Share) -> None:
    client = share.client
    make(client, USER, "file", b"new", 0o751, GID)
    make(client, ROOT, "symlink", b"old", 0, 0)
    client.rpc(Trenameat(ROOT, b"new", ROOT, b"old"))
    found = share.look("old")
    assert (found.uid, found.gid, found.mode) == (UID, GID, stat.S_IFREG | 0o751)


def test_unlinked_and_still_open(share: Share) -> None:
    client = share.client
    client.create(USER, 1, b"x", mode=0o640, gid=GID)
    client.rpc(Tunlinkat(ROOT, b"x", 0))
    found = client.getattr(1)
    assert (found.uid, found.gid, found.mode) == (UID, GID, stat.S_IFREG | 0o640)
    client.rpc(setattr_(1, SetattrValid.MODE, mode=0o600))
    client.rpc(setattr_(1, SetattrValid.UID, uid=9))
    found = client.getattr(1)
    assert (found.uid, found.gid, found.mode) == (9, GID, stat.S_IFREG | 0o600)


def test_moved_by_the_host(share: Share) -> None:
    client = share.client
    client.create(USER, 1, b"x", mode=0o640, gid=GID)
    if share.model == "mapped-xattr":
        (share.top / "x").rename(share.top / "y")
        client.rpc(setattr_(1, SetattrValid.MODE, mode=0o600))
        assert client.getattr(1).mode == stat.S_IFREG | 0o600
        assert share.look("y").uid == UID
    client.rpc(Tremove(1))
    assert share.names() == set()


# Set-ID bits


def write(share: Share, root: int) -> None:
    share.client.open(root, 1, b"program", flags=1)
    share.client.write(1, 0, b"mine")


def write_through(share: Share, root: int) -> None:
    share.client.open(root, 1, b"program", flags=1 | 0x1000)
    share.client.write(1, 0, b"mine")


def write_after_chmod(share: Share, root: int) -> None:
    client = share.client
    client.open(root, 1, b"program", flags=1)
    client.walk(ROOT, 2, b"program")
    client.write(1, 0, b"mine")
    client.rpc(setattr_(2, SetattrValid.MODE, mode=0o6755))
    client.write(1, 0, b"mine")


def truncate(share: Share, root: int) -> None:
    share.client.walk(root, 1, b"program")
    share.client.rpc(setattr_(1, SetattrValid.SIZE, size=1))


def truncate_open(share: Share, root: int) -> None:
    share.client.open(root, 1, b"program", flags=1)
    share.client.rpc(setattr_(1, SetattrValid.SIZE, size=1))


def open_truncating(share: Share, root: int) -> None:
    share.client.open(root, 1, b"program", flags=1 | TRUNC)


def create_over(share: Share, root: int) -> None:
    share.client.walk(root, 1)
    share.client.rpc(Tlcreate(1, b"program", 0x42 | TRUNC, 0o644, UID))


WAYS = (
    write,
    write_through,
    write_after_chmod,
    truncate,
    truncate_open,
    open_truncating,
    create_over,
)


@pytest.mark.threat("t_suid")
@pytest.mark.parametrize("by_guest", [True, False])
def test_change_of_a_program(share: Share, by_guest: bool) -> None:
    """As passthrough does it: for root they stay, whoever wrote before on that thread."""
    for way in WAYS:
        for root, left in {USER: 0o755, ROOT: 0o6755}.items():
            check_program(share, way, root, left, by_guest)
            share.client.rpc(Tversion(8192, b"9P2000.L"))
            share.client.rpc(Tattach(ROOT, NOFID, b"", b"", 0))
            share.client.rpc(Tattach(USER, NOFID, b"", b"", UID))
            share.client.rpc(Tunlinkat(ROOT, b"program", 0))


def check_program(
    share: Share, way: Callable[[Share, int], None], root: int, left: int, by_guest: bool
) -> None:
    if by_guest:
        make(share.client, ROOT, "file", b"program", 0o6755, 0)
    else:
        share.put("program")
        share.keep("program", mode=stat.S_IFREG | 0o6755)
    way(share, root)
    assert stat.S_IMODE(share.look("program").mode) == left
    share.keep("program", mode=stat.S_IFREG | 0o6755)
    share.client.open(ROOT, 3, b"program", flags=1)
    share.client.write(3, 0, b"root")
    assert stat.S_IMODE(share.look("program").mode) == 0o6755
    share.client.open(USER, 4, b"program", flags=1)
    share.client.write(4, 0, b"mine")
    assert stat.S_IMODE(share.look("program").mode) == 0o755


def test_another_owner(share: Share) -> None:
    client = share.client
    for kind, left in {"file": 0o755, "directory": 0o6755, "fifo": 0o6755}.items():
        make(client, ROOT, kind, kind.encode(), 0o6755, 0)
        client.walk(ROOT, 1, kind.encode())
        client.rpc(setattr_(1, SetattrValid.GID, gid=5))
        assert stat.S_IMODE(client.getattr(1).mode) == left
        client.clunk(1)


@pytest.mark.threat("t_sgid")
def test_created_in_a_setgid_directory(share: Share) -> None:
    client = share.client
    make(client, ROOT, "directory", b"d", 0o2777, 4321)
    for root, left in {USER: 0o775, ROOT: 0o2775}.items():
        client.walk(root, 1, b"d")
        for kind in ("file", "node"):
            name = f"{kind}{root}"
            make(client, 1, kind, name.encode(), 0o2775, 4321)
            found = share.look(f"d/{name}")
            assert (stat.S_IMODE(found.mode), found.gid) == (left, 4321)
        client.clunk(1)


# Extended attributes


@pytest.mark.threat("t_xattr_ns", "t_filecap")
def test_ordinary_attributes(share: Share) -> None:
    client = share.client
    make(client, USER, "file", b"x", 0o640, GID)
    client.walk(ROOT, 1, b"x")
    client.set_xattr(1, b"user.mine", b"value")
    assert client.get_xattr(1, b"user.mine") == b"value"
    assert client.get_xattr(1, b"") == b"user.mine\0"
    assert os.getxattr(share.top / "x", "user.mine") == b"value"
    client.set_xattr(1, b"user.mine", b"", 2)
    assert client.get_xattr(1, b"") == b""
    for name in (b"security.capability", b"trusted.x", b"system.x"):
        with pytest.raises(OSError, match="not supported"):
            client.set_xattr(1, name, b"x")


# Models and options


def test_readonly(start: Start) -> None:
    share = start()
    for kind in KINDS:
        make(share.client, USER, kind, kind.encode(), 0o751, GID)
    share = start("--readonly")
    client = share.client
    for kind in KINDS:
        found = share.look(kind)
        wanted = KINDS[kind] | (0o777 if kind == "symlink" else 0o751)
        assert (found.uid, found.mode) == (UID, wanted)
    client.walk(ROOT, 1, b"symlink")
    assert client.rpc(Treadlink(1)).target == TARGET
    client.walk(ROOT, 2, b"file")
    for valid in (SetattrValid.MODE, SetattrValid.UID, SetattrValid.SIZE):
        assert client.error(setattr_(2, valid)) == "EROFS"
    assert client.error(Tmkdir(ROOT, b"new", 0o700, 0)) == "EROFS"


def test_what_runs_short_is_found_again(start: Start) -> None:
    """With attributes, though descriptors were reclaimed meanwhile."""
    share = start("--reclaim", "names")
    client = share.client
    for number in range(50):
        make(client, USER, "fifo", b"%d" % number, 0o640 + number % 8, GID)
    for number in range(50):
        client.walk(ROOT, 100 + number, b"%d" % number)
        (share.top / str(number)).stat()
    for number in range(50):
        assert client.getattr(100 + number).mode == stat.S_IFIFO | 0o640 + number % 8
