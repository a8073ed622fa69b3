"""Other file systems mounted below an export: which file is which, and mounts that come and go."""

import os
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ninepd.export.qid import QidMap
from ninepd.p9.messages import (
    Qid,
    SetattrValid,
    Tclunk,
    Tgetattr,
    Tlink,
    Tlopen,
    Tmkdir,
    Trename,
    Trenameat,
    Tsetattr,
    Tstatfs,
    Tunlinkat,
    Twalk,
)
from ninepd.syscalls import Stat
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client
from tests.support.waiting import eventually

Connect = Callable[..., Client]


@pytest.fixture
def connect(start_daemon: StartDaemon) -> Iterator[Connect]:
    """A client of a fresh daemon with the given options."""
    with ExitStack() as stack:

        def run(*arguments: str) -> Client:
            client = stack.enter_context(Client(start_daemon(*arguments).socket))
            client.attach()
            return client

        yield run


@pytest.fixture
def devices(export: Path, mount: Mount, mount_ext4: Mount) -> Path:
    """An export with two ext4 file systems, a tmpfs and a bind mount of its own in it."""
    mount_ext4(export / "ext4a")
    mount_ext4(export / "ext4b")
    mount(export / "tmpfs", "-t", "tmpfs", "-o", "size=3m", "none")
    (export / "plain").mkdir()
    mount(export / "bind", "--bind", export / "plain")
    return export


PLACES = (b"ext4a", b"ext4b", b"tmpfs", b"bind", b"plain")


def fill(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"d{number % 10}").mkdir(exist_ok=True)
        (folder / f"d{number % 10}/f{number}").write_text(str(number))


def tree_of(client: Client, fid: int = ROOT) -> dict[bytes, Qid]:
    """Path -> qid of all below a fid, from listings that a walk to each must confirm."""
    found: dict[bytes, Qid] = {}
    client.open(fid, 5000)
    entries = [entry for entry in client.listing(5000) if entry.name not in {b".", b".."}]
    client.clunk(5000)
    for entry in entries:
        (qid,) = client.walk(fid, fid + 1, entry.name)
        assert entry.shows(qid), entry.name
        found[entry.name] = qid
        if entry.type == 4:
            below = tree_of(client, fid + 1)
            found |= {entry.name + b"/" + name: qid for name, qid in below.items()}
        client.clunk(fid + 1)
    return found


# Remap


@pytest.mark.threat("t_submount")
def test_no_two_files_of_three_devices_have_one_number(devices: Path, connect: Connect) -> None:
    """Among the 900 files are pairs with equal inode numbers; after a restart all is the same."""
    for name in ("ext4a", "ext4b", "tmpfs"):
        fill(devices / name, 300)
    inodes = [path.stat().st_ino for path in devices.rglob("f*")]
    assert len(set(inodes)) < len(inodes) == 900
    seen = tree_of(connect())
    assert len(seen) >= 930
    paths = [qid.path for name, qid in seen.items() if not name.startswith((b"bind", b"plain"))]
    assert len(set(paths)) == len(paths)
    assert tree_of(connect()) == seen


@pytest.mark.parametrize("place", PLACES)
def test_every_place_works(devices: Path, connect: Connect, place: bytes) -> None:
    client = connect()
    client.walk(ROOT, 1, place)
    client.create(1, 2, b"f", mode=0o640)
    assert client.write(2, 0, b"text") == 4
    client.rpc(Tmkdir(1, b"d", 0o755, 0))
    client.rpc(Trenameat(1, b"f", 1, b"g"))
    client.walk(1, 3, b"d")
    client.rpc(Trenameat(1, b"g", 3, b"f"))
    client.rpc(Tlink(1, 2, b"linked"))
    assert client.getattr(2).nlink == 2
    client.rpc(Tunlinkat(1, b"linked", 0))
    folder = devices / os.fsdecode(place)
    assert (folder / "d/f").read_text() == "text"
    assert (folder / "d/f").stat().st_mode & 0o777 == 0o640
    assert client.names(1) - {b"lost+found"} == {b"d"}


@pytest.mark.parametrize("place", [b".", *PLACES])
def test_statfs_is_that_of_the_files_own_device(
    devices: Path, connect: Connect, place: bytes
) -> None:
    client = connect()
    client.walk(ROOT, 1, place)
    client.create(1, 2, b"f")
    expected = os.statvfs(devices / os.fsdecode(place))
    for fid in (1, 2):
        found = client.rpc(Tstatfs(fid))
        assert (found.blocks, found.files) == (expected.f_blocks, expected.f_files)
        assert found.bsize == expected.f_bsize
        assert found.namelen == expected.f_namemax


@pytest.mark.parametrize("here", [b".", *PLACES[:-1]])
@pytest.mark.parametrize("there", [b".", *PLACES[:-1]])
def test_links_and_renames_across(
    devices: Path, connect: Connect, here: bytes, there: bytes
) -> None:
    """EXDEV as between any two mounts, a bind mount of the same device included."""
    client = connect()
    client.walk(ROOT, 1, here)
    client.walk(ROOT, 2, there)
    client.create(1, 3, b"f")
    client.walk(1, 4, b"f")
    expected = "" if here == there else "EXDEV"
    assert client.error(Tlink(2, 4, b"linked")) == expected
    assert client.error(Trename(4, 2, b"g")) == expected
    assert client.error(Trenameat(1, b"g" if here == there else b"f", 2, b"h")) == expected
    left = devices / os.fsdecode(there)
    assert (left / "h").exists() == (here == there)
    assert (devices / os.fsdecode(here) / "f").exists() == (here != there)


def test_a_mount_point_stays(devices: Path, connect: Connect) -> None:
    client = connect()
    assert client.error(Tunlinkat(ROOT, b"tmpfs", 0x200)) == "EBUSY"
    assert client.error(Trenameat(ROOT, b"tmpfs", ROOT, b"x")) == "EBUSY"
    client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
    assert client.error(Trenameat(ROOT, b"d", ROOT, b"tmpfs")) == "EBUSY"


def test_a_read_only_bind_mount_of_the_same_files(
    export: Path, mount: Mount, connect: Connect
) -> None:
    """One inode, two mounts: each fid has the rights of the mount that it was found by."""
    (export / "d").mkdir()
    (export / "d/f").write_text("text")
    mount(export / "ro", "--bind", export / "d")
    subprocess.run(["mount", "-o", "remount,bind,ro", export / "ro"], check=True)
    client = connect()
    client.walk(ROOT, 1, b"d", b"f")
    client.walk(ROOT, 2, b"ro", b"f")
    assert client.getattr(1).qid == client.getattr(2).qid
    assert client.error(Tlopen(2, 2)) == "EROFS"
    assert client.error(Tlopen(1, 2)) == ""
    client.open(ROOT, 3, b"ro", b"f")
    assert client.read(3, 0, 10) == b"text"
    valid = int(SetattrValid.MODE)
    assert client.error(Tsetattr(2, valid, 0o600, 0, 0, 0, 0, 0, 0, 0)) == "EROFS"
    assert client.error(Tsetattr(1, valid, 0o600, 0, 0, 0, 0, 0, 0, 0)) == ""


def test_mount_on_a_file(export: Path, mount: Mount, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("mounted")
    (export / "f").write_text("hidden")
    subprocess.run(["mount", "--bind", tmp_path / "source", export / "f"], check=True)
    try:
        client = connect()
        client.open(ROOT, 1, b"f")
        assert client.read(1, 0, 100) == b"mounted"
        client.open(ROOT, 2)
        (entry,) = [entry for entry in client.listing(2) if entry.name == b"f"]
        assert entry.shows(client.getattr(1).qid)
        assert client.error(Tunlinkat(ROOT, b"f", 0)) == "EBUSY"
    finally:
        subprocess.run(["umount", "--lazy", export / "f"], check=True)


def test_mount_upon_mount(export: Path, mount: Mount, connect: Connect) -> None:
    mount(export / "m", "-t", "tmpfs", "none")
    (export / "m/below").write_text("")
    client = connect()
    client.walk(ROOT, 1, b"m")
    mount(export / "m", "-t", "tmpfs", "none")
    (export / "m/above").write_text("")
    assert client.names(1) == {b"below"}
    client.walk(ROOT, 2, b"m")
    assert client.names(2) == {b"above"}
    assert client.getattr(1).qid.path != client.getattr(2).qid.path


def test_many_devices(export: Path, mount: Mount, connect: Connect) -> None:
    """More than fit the first table."""
    for number in range(40):
        mount(export / f"m{number}", "-t", "tmpfs", "none")
        (export / f"m{number}/f").write_text("")
    inodes = {(export / f"m{number}/f").stat().st_ino for number in range(40)}
    assert len(inodes) == 1
    seen = tree_of(connect())
    assert len({qid.path for qid in seen.values()}) == 80
    assert tree_of(connect()) == seen


# Warn and forbid


def test_warn_keeps_the_numbers_of_the_host(devices: Path, start_daemon: StartDaemon) -> None:
    (devices / "ext4a/f").write_text("")
    (devices / "ext4b/f").write_text("")
    daemon = start_daemon("--multidevs", "warn")
    with Client(daemon.socket) as client:
        client.attach()
        for place in (b"ext4a", b"ext4b", b"tmpfs"):
            (qid,) = client.walk(ROOT, 1, place)
            assert qid.path == (devices / os.fsdecode(place)).stat().st_ino
            client.clunk(1)
        (_, a) = client.walk(ROOT, 1, b"ext4a", b"f")
        (_, b) = client.walk(ROOT, 2, b"ext4b", b"f")
        assert a.path == b.path
        client.create(ROOT, 3, b"f")
        client.open(1, 4, flags=2)
        client.write(4, 0, b"only here")
    assert (devices / "ext4a/f").read_text() == "only here"
    assert (devices / "ext4b/f").read_text() == ""
    daemon.stop()
    assert daemon.log.count("another device") == 3


# ENODEV, as QEMU's server says it, rather than EXDEV.
@pytest.mark.threat("t_submount")
def test_forbid(devices: Path, connect: Connect) -> None:
    """Other devices are neither listed nor entered; a bind mount of the same device is."""
    client = connect("--multidevs", "forbid")
    assert client.names(ROOT) == {b"plain", b"bind"}
    for place in (b"ext4a", b"ext4b", b"tmpfs"):
        assert client.error(Twalk(ROOT, 1, (place,))) == "ENODEV"
        assert client.error(Tgetattr(1, 0)) == "ENOENT"
    client.walk(ROOT, 1, b"bind")
    client.create(1, 2, b"f")
    assert (devices / "plain/f").exists()


def test_forbid_when_a_mount_comes_later(export: Path, connect: Connect, mount: Mount) -> None:
    """What was held before the mount stays; behind the mount point nothing is reached."""
    (export / "m").mkdir()
    (export / "m/f").write_text("text")
    client = connect("--multidevs", "forbid")
    client.walk(ROOT, 1, b"m")
    mount(export / "m", "-t", "tmpfs", "none")
    (export / "m/f").write_text("of the other device")
    assert client.error(Twalk(ROOT, 2, (b"m",))) == "ENODEV"
    assert client.error(Tmkdir(ROOT, b"m", 0o755, 0)) == "EEXIST"
    client.open(1, 3, b"f")
    assert client.read(3, 0, 100) == b"text"
    assert client.names(ROOT) == set()


def test_forbid_in_a_directory_of_mounts_only(export: Path, connect: Connect, mount: Mount) -> None:
    """A listing goes on behind entries that are hidden, however many come in a row."""
    (export / "d").mkdir()
    for number in range(30):
        mount(export / f"d/m{number}", "-t", "tmpfs", "none")
    (export / "d/f").write_text("")
    client = connect("--multidevs", "forbid")
    client.open(ROOT, 1, b"d")
    for count in (64, 200, 8192):
        assert {entry.name for entry in client.listing(1, count)} == {b".", b"..", b"f"}


# Mounts that come and go


def test_mounts_appear_and_disappear(export: Path, connect: Connect, mount: Mount) -> None:
    (export / "m").mkdir()
    (export / "m/hidden").write_text("hidden")
    client = connect()
    client.walk(ROOT, 1, b"m")
    for _ in range(3):
        subprocess.run(["mount", "-t", "tmpfs", "none", export / "m"], check=True)
        (export / "m/shown").write_text("shown")
        client.open(ROOT, 2, b"m", b"shown")
        assert client.read(2, 0, 100) == b"shown"
        assert client.names(1) == {b"hidden"}
        client.walk(ROOT, 3, b"m")
        assert client.names(3) == {b"shown"}
        client.clunk(2, 3)
        subprocess.run(["umount", export / "m"], check=True)  # nothing of ours is in the way
        client.walk(ROOT, 3, b"m")
        assert client.names(3) == {b"hidden"}
        client.clunk(3)


OPTIONS = {"names": ("--reclaim", "names"), "handles": ("--reclaim", "handles")}


@pytest.mark.parametrize("how", OPTIONS)
def test_unmounting_when_the_guest_has_let_go(
    export: Path, connect: Connect, mount_ext4: Mount, how: str
) -> None:
    target = mount_ext4(export / "m")
    fill(target, 50)
    client = connect(*OPTIONS[how])
    for fid in range(1, 41):
        client.walk(ROOT, fid, b"m", b"d%d" % (fid % 10), b"f%d" % fid)
    client.open(ROOT, 50, b"m")
    client.create(ROOT, 51, b"outside")
    assert subprocess.run(["umount", target], capture_output=True).returncode != 0
    client.clunk(*range(1, 41), 50)
    subprocess.run(["umount", target], check=True)
    # The fixture unmounts it: another one is there for that.
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    client.walk(ROOT, 1, b"m")
    assert client.names(1) == set()


@pytest.mark.parametrize("how", OPTIONS)
def test_unmounting_when_the_guest_has_gone(
    export: Path, start_daemon: StartDaemon, mount_ext4: Mount, how: str
) -> None:
    target = mount_ext4(export / "m")
    fill(target, 50)
    daemon = start_daemon(*OPTIONS[how])
    with Client(daemon.socket) as client:
        client.attach()
        for fid in range(1, 41):
            client.open(ROOT, fid, b"m", b"d%d" % (fid % 10), b"f%d" % fid)
    eventually(lambda: subprocess.run(["umount", target]).returncode == 0, "it is let go of")
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)


@pytest.mark.parametrize("how", OPTIONS)
def test_held_files_outlive_a_lazy_unmount(
    export: Path, connect: Connect, mount_ext4: Mount, how: str
) -> None:
    target = mount_ext4(export / "m")
    fill(target, 10)
    client = connect(*OPTIONS[how])
    client.walk(ROOT, 1, b"m")
    client.open(ROOT, 2, b"m", b"d1", b"f1", flags=2)
    subprocess.run(["umount", "--lazy", target], check=True)
    assert client.read(2, 0, 10) == b"1"
    assert client.write(2, 1, b"!") == 1
    client.walk(1, 3, b"d2", b"f2")
    assert b"m" in client.names(ROOT)
    client.walk(ROOT, 4, b"m")
    assert client.names(4) == set()
    client.clunk(1, 2, 3, 4)
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)


def test_reclaimed_files_of_two_devices(
    devices: Path, start_daemon: StartDaemon, as_root: None
) -> None:
    """By handle, more fids than descriptors: each comes back from its own device."""
    for name in ("ext4a", "ext4b", "tmpfs"):
        fill(devices / name, 300)
    daemon = start_daemon("--reclaim", "handles", launcher=("prlimit", "--nofile=256"))
    with Client(daemon.socket) as client:
        client.attach()
        names = [
            (name.encode(), b"d%d" % (number % 10), b"f%d" % number)
            for number in range(300)
            for name in ("ext4a", "ext4b", "tmpfs")
        ]
        qids = [client.walk(ROOT, fid, *name)[-1] for fid, name in enumerate(names, 1)]
        for fid, qid in enumerate(qids, 1):
            assert client.getattr(fid).qid == qid
        assert len(set(qids)) == len(qids)
        for fid, (_, _, file) in enumerate(names, 1):
            client.open(fid, 9999)
            assert client.read(9999, 0, 10) == file[1:]
            client.rpc(Tclunk(9999))
        assert daemon.descriptors() <= 256


def test_numbers_of_a_device_that_went_and_came(
    export: Path, connect: Connect, mount_ext4: Mount
) -> None:
    """A file system keeps its numbers over an unmount while the daemon runs."""
    target = mount_ext4(export / "m")
    image = export.parent / "m.img"
    fill(target, 30)
    client = connect()
    seen = tree_of(client)
    subprocess.run(["umount", target], check=True)
    subprocess.run(["mount", "-o", "loop", image, target], check=True)
    assert tree_of(client) == seen


# Big inode numbers


def test_memory_for_big_inode_numbers_is_bounded() -> None:
    """Each has one number for ever, also after a million others."""

    def at(ino: int) -> Stat:
        return Stat(1, ino, 1, 0, 0o100644, 1, 1, 0)

    qids = QidMap(at(2))
    first = {ino: qids.path(at(ino)) for ino in range(1 << 60, (1 << 60) + 1000)}
    assert len(set(first.values())) == 1000
    tracemalloc.start()
    try:
        for ino in range(1 << 50, (1 << 50) + 200_000):
            qids.path(at(ino))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 8 << 20
    assert {ino: qids.path(at(ino)) for ino in first} == first
