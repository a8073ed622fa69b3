"""A fid is an inode: what the host or the guest renames, replaces or removes changes nothing.

The scenarios that servers with path strings get wrong, each by a path fid and an open fid, at
depth. A guest shows the same in tests/guest; here every step is one message.
"""

import os
import stat
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    Qid,
    SetattrValid,
    Tfsync,
    Tgetattr,
    Tlcreate,
    Tlock,
    Tlopen,
    Tmkdir,
    Tread,
    Trenameat,
    Tsetattr,
    Tunlinkat,
    Tversion,
    Twalk,
    encode,
)
from tests.conftest import Mount
from tests.support.client import ROOT, Client, Daemon

HOME = 1  # the fid of the directory at depth 3 in which it all happens


def setattr_(fid: int, valid: int, mode: int = 0, size: int = 0) -> Tsetattr:
    return Tsetattr(fid, int(valid), mode, 0, 0, size, 7, 8, 9, 10)


@pytest.fixture
def home(client: Client, export: Path) -> Path:
    """A directory at depth 3, held as fid 1."""
    path = export / "a/b/home"
    path.mkdir(parents=True)
    client.walk(ROOT, HOME, b"a", b"b", b"home")
    return path


@pytest.mark.threat("t_host_rename")
def test_row_1_directory_renamed_under_a_cwd(client: Client, home: Path) -> None:
    (home / "dir1").mkdir()
    (home / "dir1/file").write_text("")
    (qid,) = client.walk(HOME, 2, b"dir1")
    before = client.getattr(2)
    (home / "dir1").rename(home / "dir2")
    after = client.getattr(2)
    assert (after.qid.path, after.gen) == (qid.path, before.gen)
    client.walk(2, 3)
    assert client.rpc(Tlopen(3, 0x800)).iounit == 0
    found = client.listing(3)
    assert {entry.name for entry in found} == {b".", b"..", b"file"}
    assert client.readdir(3, found[-1].offset) == []
    client.clunk(3)


@pytest.mark.parametrize("target", ["g", "sub/g"])
def test_row_2_file_renamed(client: Client, home: Path, target: str) -> None:
    (home / "sub").mkdir()
    (home / "f").write_text("content")
    client.walk(HOME, 4, b"f")
    client.open(HOME, 6, b"f", flags=2)
    (home / "f").rename(home / target)
    for fid in (4, 6):
        assert (client.getattr(fid).size, client.getattr(fid).nlink) == (7, 1)
        client.open(fid, 5)
        assert client.read(5, 0, 100) == b"content"
        client.clunk(5)
    client.write(6, 0, b"changed")
    assert (home / target).read_text() == "changed"


@pytest.mark.parametrize("flags", [0, 2])
def test_row_3_reopen_of_a_moved_file(client: Client, home: Path, flags: int) -> None:
    (home / "f").write_text("content")
    client.walk(HOME, 6, b"f")
    client.getattr(6)
    (home / "f").rename(home.parent / "moved")
    client.open(6, 7, flags=flags)
    assert client.read(7, 0, 100) == b"content"
    if flags:
        client.write(7, 0, b"written")
        assert (home.parent / "moved").read_text() == "written"


@pytest.mark.threat("t_host_rename")
@pytest.mark.parametrize("opened", [False, True])
def test_row_4_child_of_a_moved_directory(client: Client, home: Path, opened: bool) -> None:
    (home / "dir1").mkdir()
    (home / "dir1/child").write_text("content")
    client.walk(HOME, 2, b"dir1")
    if opened:
        client.rpc(Tlopen(2, 0))
    (home / "dir1").rename(home.parent / "dir2")
    client.walk(2, 8, b"child")
    client.getattr(8)
    client.open(8, 9)
    assert client.read(9, 0, 100) == b"content"


@pytest.mark.threat("t_host_rename")
def test_row_5_creation_in_a_moved_directory(client: Client, home: Path) -> None:
    (home / "dir1").mkdir()
    client.walk(HOME, 2, b"dir1")
    (home / "dir1").rename(home / "dir2")
    assert client.error(Twalk(2, 10, (b"new",))) == "ENOENT"
    client.walk(2, 11)
    client.rpc(Tlcreate(11, b"new", 0x8041, 0o644, 0))
    client.walk(2, 12, b"new")
    assert stat.S_ISREG(client.getattr(12).mode)
    assert (home / "dir2/new").exists()


@pytest.mark.threat("t_host_rename")
def test_row_6_names_in_a_moved_directory(client: Client, home: Path) -> None:
    (home / "dir1").mkdir()
    (home / "dir1/f").write_text("")
    (home / "dir1/a").write_text("content")
    client.walk(HOME, 2, b"dir1")
    (home / "dir1").rename(home / "dir2")
    client.rpc(Tmkdir(2, b"sub", 0o755, 0))
    client.rpc(Tunlinkat(2, b"f", 0))
    client.rpc(Trenameat(2, b"a", HOME, b"b"))
    assert os.listdir(home / "dir2") == ["sub"]
    assert (home / "b").read_text() == "content"


def test_row_7_guest_renames_a_directory_with_fids_below(client: Client, home: Path) -> None:
    (home / "d/e").mkdir(parents=True)
    (home / "d/e/f").write_text("content")
    client.walk(HOME, 2, b"d")
    client.walk(HOME, 3, b"d", b"e", b"f")
    client.rpc(Trenameat(HOME, b"d", HOME, b"d2"))
    client.getattr(2)
    client.getattr(3)
    client.rpc(Tlopen(3, 0))
    assert client.read(3, 0, 100) == b"content"


def test_row_8_guest_renames_over_a_held_file(client: Client, home: Path) -> None:
    (home / "a").write_text("content of a")
    (home / "a").chmod(0o644)
    (home / "b").write_text("content of b")
    (a,) = client.walk(HOME, 3, b"a")
    client.walk(HOME, 4, b"b")
    client.open(4, 5, flags=2)
    client.rpc(Trenameat(HOME, b"a", HOME, b"b"))
    client.rpc(setattr_(5, SetattrValid.SIZE))
    client.rpc(setattr_(4, SetattrValid.MODE, mode=0))
    client.rpc(setattr_(4, SetattrValid.MTIME | SetattrValid.MTIME_SET))
    held = client.getattr(4)
    assert (held.nlink, held.size, stat.S_IMODE(held.mode)) == (0, 0, 0)
    assert client.read(5, 0, 100) == b""
    assert (home / "b").read_text() == "content of a"
    assert stat.S_IMODE((home / "b").stat().st_mode) == 0o644
    assert (home / "b").stat().st_mtime != 9
    assert client.walk(HOME, 6, b"b")[0].path == a.path


@pytest.mark.threat("t_host_replace")
def test_row_9_host_replaces_an_open_file(client: Client, home: Path) -> None:
    """What editors call an atomic save."""
    (home / "f").write_text("old")
    (home / "tmp").write_text("new content")
    client.open(HOME, 5, b"f", flags=2)
    (home / "tmp").rename(home / "f")
    assert client.read(5, 0, 100) == b"old"
    assert client.getattr(5).nlink == 0
    client.rpc(setattr_(5, SetattrValid.SIZE | SetattrValid.MODE, mode=0))
    client.write(5, 0, b"scribble")
    assert (home / "f").read_text() == "new content"
    assert stat.S_IMODE((home / "f").stat().st_mode) != 0


@pytest.mark.threat("t_unlinked_fid")
def test_row_10_guest_unlinks_an_open_file(client: Client, home: Path) -> None:
    client.create(HOME, 5, b"f")
    client.write(5, 0, b"content")
    client.rpc(Tunlinkat(HOME, b"f", 0))
    assert client.getattr(5).nlink == 0
    assert client.read(5, 0, 100) == b"content"
    client.write(5, 7, b" more")
    client.rpc(setattr_(5, SetattrValid.SIZE, size=9))
    client.rpc(setattr_(5, SetattrValid.MODE, mode=0o600))
    client.rpc(setattr_(5, SetattrValid.MTIME | SetattrValid.MTIME_SET))
    client.rpc(Tfsync(5, 0))
    client.set_xattr(5, b"user.a", b"v")
    assert client.get_xattr(5, b"user.a") == b"v"
    client.open(5, 7)
    assert client.read(7, 0, 100) == b"content m"


def test_row_11_host_unlinks_a_held_file(client: Client, home: Path) -> None:
    (home / "f").write_text("content")
    client.walk(HOME, 4, b"f")
    (home / "f").unlink()
    assert client.getattr(4).nlink == 0
    client.open(4, 5)
    assert client.read(5, 0, 100) == b"content"
    assert client.error(Twalk(HOME, 6, (b"f",))) == "ENOENT"


@pytest.mark.parametrize("by_guest", [False, True])
def test_row_12_removed_directory(client: Client, home: Path, by_guest: bool) -> None:
    (home / "d").mkdir()
    client.walk(HOME, 2, b"d")
    if by_guest:
        client.rpc(Tunlinkat(HOME, b"d", 0x200))
    else:
        (home / "d").rmdir()
    assert client.getattr(2).nlink == 0
    client.open(2, 3)
    assert client.readdir(3) == []
    assert client.error(Twalk(2, 4, (b"x",))) == "ENOENT"
    assert client.error(Tmkdir(2, b"x", 0o755, 0)) == "ENOENT"
    client.walk(2, 5)
    assert client.error(Tlcreate(5, b"x", 2, 0o644, 0)) == "ENOENT"


@pytest.mark.threat("t_inode_recycle")
def test_row_13_and_14_inode_numbers(client: Client, home: Path, mount_ext4: Mount) -> None:
    """Held: the number stays taken. Released: number and generation never both come again."""
    mount_ext4(home / "m")
    client.walk(HOME, 2, b"m")
    (home / "m/f").write_text("")
    client.walk(2, 4, b"f")
    held = client.getattr(4)
    (home / "m/f").unlink()
    seen: set[tuple[int, int]] = {(held.qid.path, held.gen)}
    for count in range(20):
        (home / "m/g").write_text("")
        client.walk(2, 6, b"g")
        found = client.getattr(6)
        assert count >= 10 or found.qid.path != held.qid.path
        assert (found.qid.path, found.gen) not in seen
        seen.add((found.qid.path, found.gen))
        client.clunk(6)
        (home / "m/g").unlink()
        if count == 9:
            client.clunk(4)


@pytest.mark.threat("t_moved_out")
@pytest.mark.parametrize("opened", [False, True])
def test_row_19_directory_moved_out(
    client: Client, home: Path, tmp_path: Path, opened: bool
) -> None:
    """Its children stay in reach, as by an open descriptor; its surroundings do not come in."""
    (home / "d/child").mkdir(parents=True)
    (tmp_path / "secret").write_text("")
    client.walk(HOME, 2, b"d")
    if opened:
        client.rpc(Tlopen(2, 0))
    (home / "d").rename(tmp_path / "outside")
    client.getattr(2)
    assert client.error(Twalk(2, 3, (b"..",))) == "ENOENT"
    assert client.error(Twalk(2, 3, (b"..", b"secret"))) == "ENOENT"
    client.walk(2, 4, b"child")
    assert client.error(Twalk(4, 5, (b"..", b"..", b"secret"))) in {"ENOENT", ""}
    assert client.error(Tgetattr(5, 0)) == "ENOENT"


@pytest.mark.threat("t_version_mid")
def test_row_20_reset_with_everything_open(daemon: Daemon, client: Client, home: Path) -> None:
    client.attach()
    before = daemon.descriptors()
    for number in range(100):
        client.create(ROOT, 100 + number, b"f%d" % number)
        client.rpc(Tlock(100 + number, 1, 0, 0, 0, number, b"guest"))
    client.open(ROOT, 50)
    driver = client.driver
    heads = [driver.submit([encode(tag, Tfsync(100 + tag, 0))], [4096]) for tag in range(40)]
    heads.append(driver.submit([encode(0xFFFF, Tversion(8192, b"9P2000.L"))], [4096]))
    driver.kick()
    done = driver.wait_used(count=41)
    assert sorted(head for head, _ in done) == sorted(heads)
    assert done[-1][0] == heads[-1]
    for head, _ in done:
        driver.reply(head)
    assert daemon.descriptors() == before
    client.attach()
    assert daemon.descriptors() == before


def test_replaced_name_is_found_by_a_new_walk(client: Client, home: Path) -> None:
    (home / "f").write_text("old")
    first: tuple[Qid, ...] = client.walk(HOME, 4, b"f")
    (home / "tmp").write_text("new")
    (home / "tmp").rename(home / "f")
    second = client.walk(HOME, 5, b"f")
    assert first[0].path != second[0].path
    client.open(4, 6)
    client.open(5, 7)
    assert (client.read(6, 0, 9), client.read(7, 0, 9)) == (b"old", b"new")


@pytest.mark.threat("t_rename_storm")
def test_ancestors_renamed_during_io(client: Client, home: Path, export: Path) -> None:
    client.create(HOME, 5, b"f")
    for number in range(10):
        (export / ("a" if number % 2 == 0 else "z")).rename(
            export / ("z" if number % 2 == 0 else "a")
        )
        client.write(5, number, b"%d" % number)
        assert client.rpc(Tread(5, 0, 100), room=200).nbytes == number + 1
    assert (home / "f").read_text() == "0123456789"
