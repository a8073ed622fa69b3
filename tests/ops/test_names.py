"""Tmkdir, Tmknod, Tsymlink, Treadlink, Tlink, Trename(at), Tunlinkat, Tremove: names."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    Tgetattr,
    Tlink,
    Tmkdir,
    Tmknod,
    Treadlink,
    Tremove,
    Trename,
    Trenameat,
    Tsymlink,
    Tunlinkat,
)
from tests.conftest import Mount
from tests.support.client import ROOT, Client

RMDIR = 0x200
MAKERS: dict[str, Callable[[bytes], Any]] = {
    "Tmkdir": lambda name: Tmkdir(ROOT, name, 0o755, 0),
    "Tmknod": lambda name: Tmknod(ROOT, name, stat.S_IFREG | 0o644, 0, 0, 0),
    "Tsymlink": lambda name: Tsymlink(ROOT, name, b"target", 0),
    "Tlink": lambda name: Tlink(ROOT, 1, name),
}


# Making


@pytest.mark.threat("t_slash", "t_dot", "t_empty", "t_string", "t_long")
@pytest.mark.parametrize("maker", MAKERS)
def test_bad_names_make_nothing(client: Client, export: Path, maker: str) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    expected = {
        b"": "ENOENT",
        b"a/b": "ENOENT",
        b"/x": "ENOENT",
        b"../x": "ENOENT",
        b"a\0b": "EINVAL",
        b".": "EEXIST",
        b"..": "EEXIST",
        b"f": "EEXIST",
        b"x" * 256: "ENAMETOOLONG",
    }
    assert {name: client.error(MAKERS[maker](name)) for name in expected} == expected
    assert os.listdir(export) == ["f"]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", [b"x" * 255, b"\xff\xfe\x80", b"a b\n"])
def test_odd_names(client: Client, export: Path, maker: str, name: bytes) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    client.rpc(MAKERS[maker](name))
    assert name in os.listdir(os.fsencode(export))
    client.walk(ROOT, 2, name)


@pytest.mark.parametrize("maker", MAKERS)
def test_making_in_what_is_no_directory(client: Client, export: Path, maker: str) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    message = MAKERS[maker](b"new")
    assert client.error(message._replace(dfid=1)) == "ENOTDIR"


def test_mkdir(client: Client, export: Path) -> None:
    qid = client.rpc(Tmkdir(ROOT, b"d", stat.S_IFDIR | 0o1751, 0)).qid
    assert qid.type == 0x80
    assert client.walk(ROOT, 1, b"d") == (qid,)
    assert stat.S_IMODE((export / "d").stat().st_mode) == 0o1751


# There is no --mknod: root of a guest may, as with QEMU. On the host nobody else reaches these
# nodes (t_unsafe_export).
@pytest.mark.threat("t_mknod")
@pytest.mark.parametrize(
    ("mode", "major", "minor"),
    [
        (stat.S_IFREG | 0o4755, 0, 0),
        (0o644, 0, 0),
        (stat.S_IFIFO | 0o600, 0, 0),
        (stat.S_IFSOCK | 0o777, 0, 0),
        (stat.S_IFCHR | 0o666, 1, 3),
        (stat.S_IFBLK | 0o660, 259, 70_000),
    ],
)
@pytest.mark.usefixtures("as_root")
def test_mknod(client: Client, export: Path, mode: int, major: int, minor: int) -> None:
    qid = client.rpc(Tmknod(ROOT, b"node", mode, major, minor, 0)).qid
    assert client.walk(ROOT, 1, b"node") == (qid,)
    info = (export / "node").lstat()
    assert info.st_mode == (mode if stat.S_IFMT(mode) else mode | stat.S_IFREG)
    assert (os.major(info.st_rdev), os.minor(info.st_rdev)) == (major, minor)
    attributes = client.getattr(1)
    assert attributes.mode == info.st_mode
    # The encoding of Linux for dev_t in 32 bits (new_encode_dev).
    assert attributes.rdev == (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


@pytest.mark.threat("t_mknod")
@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFLNK, 0o150000])
def test_mknod_of_other_types(client: Client, export: Path, kind: int) -> None:
    assert client.error(Tmknod(ROOT, b"node", kind | 0o644, 0, 0, 0)) in {"EINVAL", "EPERM"}
    assert os.listdir(export) == []


def test_symlink(client: Client, export: Path) -> None:
    target = b"/etc/../\xff some where"
    qid = client.rpc(Tsymlink(ROOT, b"link", target, 0)).qid
    assert qid.type == 0x02
    assert client.walk(ROOT, 1, b"link") == (qid,)
    assert client.rpc(Treadlink(1)).target == target
    assert os.readlink(os.fsencode(export / "link")) == target


@pytest.mark.parametrize("target", [b"x" * 4095, b"."])
def test_symlink_targets(client: Client, target: bytes) -> None:
    client.rpc(Tsymlink(ROOT, b"link", target, 0))
    client.walk(ROOT, 1, b"link")
    assert client.rpc(Treadlink(1), room=8192).target == target


def test_symlink_targets_that_cannot_be(client: Client, export: Path) -> None:
    assert client.error(Tsymlink(ROOT, b"link", b"", 0)) == "ENOENT"
    assert client.error(Tsymlink(ROOT, b"link", b"a\0b", 0)) == "EINVAL"
    assert client.error(Tsymlink(ROOT, b"link", b"x" * 5000, 0)) == "ENAMETOOLONG"
    assert os.listdir(export) == []


def test_readlink_of_other_things(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    assert client.error(Treadlink(1)) == "EINVAL"
    assert client.error(Treadlink(ROOT)) == "EINVAL"


def test_readlink_that_does_not_fit(client: Client, export: Path) -> None:
    (export / "link").symlink_to("x" * 200)
    client.walk(ROOT, 1, b"link")
    assert client.error(Treadlink(1), room=100) == "EMSGSIZE"


# Links


def test_link(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    (export / "d").mkdir()
    (qid,) = client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"d")
    client.rpc(Tlink(2, 1, b"g"))
    assert client.walk(2, 3, b"g")[0].path == qid.path
    assert client.getattr(1).nlink == 2


@pytest.mark.threat("t_symlink_abs")
def test_link_of_a_symlink_links_the_link(client: Client, export: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (export / "link").symlink_to(tmp_path / "target")
    client.walk(ROOT, 1, b"link")
    client.rpc(Tlink(ROOT, 1, b"twin"))
    assert (export / "twin").is_symlink()
    assert (export / "twin").lstat().st_ino == (export / "link").lstat().st_ino
    assert (tmp_path / "target").stat().st_nlink == 1


@pytest.mark.threat("t_link")
def test_link_errors(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    (export / "d").mkdir()
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"d")
    assert client.error(Tlink(ROOT, 1, b"d")) == "EEXIST"
    assert client.error(Tlink(ROOT, 2, b"dir")) == "EPERM"
    assert client.error(Tlink(ROOT, 77, b"new")) == "ENOENT"
    (export / "f").unlink()
    assert client.error(Tlink(ROOT, 1, b"new")) == "ENOENT"


@pytest.mark.threat("t_link")
def test_link_across_mounts(client: Client, export: Path, mount: Mount) -> None:
    mount(export / "m", "-t", "tmpfs", "none")
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"m")
    assert client.error(Tlink(2, 1, b"f")) == "EXDEV"
    assert client.error(Trenameat(ROOT, b"f", 2, b"f")) == "EXDEV"


# Renames


def test_renameat(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "f").write_text("text")
    (qid,) = client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"d")
    client.rpc(Trenameat(ROOT, b"f", 2, b"g"))
    assert client.walk(2, 3, b"g")[0].path == qid.path
    assert client.getattr(1).size == 4
    assert not (export / "f").exists()


def test_renameat_over_a_file(client: Client, export: Path) -> None:
    (export / "a").write_text("a")
    (export / "b").write_text("b")
    client.walk(ROOT, 1, b"b")
    client.rpc(Trenameat(ROOT, b"a", ROOT, b"b"))
    assert (export / "b").read_text() == "a"
    assert client.getattr(1).nlink == 0


@pytest.mark.threat("t_slash", "t_dot", "t_empty", "t_long")
def test_renameat_errors(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    (export / "d/e").mkdir(parents=True)
    (export / "full/x").mkdir(parents=True)
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"d")
    expected = {
        (ROOT, b"missing", ROOT, b"x"): "ENOENT",
        (ROOT, b"f", ROOT, b"d"): "EISDIR",
        (ROOT, b"d", ROOT, b"f"): "ENOTDIR",
        (ROOT, b"d", ROOT, b"full"): "ENOTEMPTY",
        (ROOT, b"d", 2, b"inside"): "EINVAL",
        (1, b"x", ROOT, b"y"): "ENOTDIR",
        (ROOT, b"f", 1, b"y"): "ENOTDIR",
        (77, b"f", ROOT, b"y"): "ENOENT",
        (ROOT, b"f", 77, b"y"): "ENOENT",
    }
    for dots in (b".", b".."):
        expected[ROOT, dots, ROOT, b"x"] = "EISDIR"
        expected[ROOT, b"f", ROOT, dots] = "EISDIR"
    for name, code in {b"": "ENOENT", b"a/b": "ENOENT", b"a\0": "EINVAL"}.items():
        expected[ROOT, name, ROOT, b"x"] = code
        expected[ROOT, b"f", ROOT, name] = code
    expected[ROOT, b"f", ROOT, b"x" * 256] = "ENAMETOOLONG"
    assert {place: client.error(Trenameat(*place)) for place in expected} == expected
    assert sorted(os.listdir(export)) == ["d", "f", "full"]


def test_rename_by_fid(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "f").write_text("text")
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"d")
    client.rpc(Trename(1, 2, b"g"))
    assert (export / "d/g").read_text() == "text"
    client.rpc(Trename(1, ROOT, b"h"))  # the fid knows its new place
    assert (export / "h").read_text() == "text"
    client.rpc(Tremove(1))
    assert os.listdir(export) == ["d"]


@pytest.mark.threat("t_slash", "t_dot", "t_empty", "t_root_remove")
def test_rename_by_fid_errors(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    client.walk(ROOT, 1, b"f")
    expected = {b".": "EISDIR", b"..": "EISDIR", b"": "ENOENT", b"a/b": "ENOENT", b"\0": "EINVAL"}
    assert {name: client.error(Trename(1, ROOT, name)) for name in expected} == expected
    assert client.error(Trename(ROOT, ROOT, b"x")) == "EBUSY"
    client.walk(ROOT, 2)
    assert client.error(Trename(2, ROOT, b"x")) == "EBUSY"
    assert client.error(Trename(1, 1, b"x")) == "ENOTDIR"
    assert os.listdir(export) == ["f"]


# Removing


def test_unlinkat(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    (export / "d").mkdir()
    (export / "link").symlink_to("d")
    client.rpc(Tunlinkat(ROOT, b"f", 0))
    client.rpc(Tunlinkat(ROOT, b"link", 0))
    client.rpc(Tunlinkat(ROOT, b"d", RMDIR))
    assert os.listdir(export) == []


@pytest.mark.threat("t_slash", "t_dot", "t_empty", "t_long")
def test_unlinkat_errors(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    (export / "d/e").mkdir(parents=True)
    client.walk(ROOT, 1, b"f")
    expected = {
        (ROOT, b"missing", 0): "ENOENT",
        (ROOT, b"d", 0): "EISDIR",
        (ROOT, b"d", RMDIR): "ENOTEMPTY",
        (ROOT, b"f", RMDIR): "ENOTDIR",
        (ROOT, b".", 0): "EINVAL",
        (ROOT, b".", RMDIR): "EINVAL",
        (ROOT, b"..", 0): "ENOTEMPTY",
        (ROOT, b"..", RMDIR): "ENOTEMPTY",
        (ROOT, b"", 0): "ENOENT",
        (ROOT, b"d/e", RMDIR): "ENOENT",
        (ROOT, b"a\0b", 0): "EINVAL",
        (ROOT, b"x" * 256, 0): "ENAMETOOLONG",
        (ROOT, b"f", 1): "EINVAL",
        (ROOT, b"f", 0xFFFFFFFF): "EINVAL",
        (1, b"f", 0): "ENOTDIR",
        (77, b"f", 0): "ENOENT",
    }
    assert {place: client.error(Tunlinkat(*place)) for place in expected} == expected
    assert (export / "d/e").exists()
    assert (export / "f").exists()


def test_unlink_through_a_symlink_to_a_directory(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "d/f").write_text("")
    (export / "link").symlink_to("d")
    client.walk(ROOT, 1, b"link")
    assert client.error(Tunlinkat(1, b"f", 0)) == "ENOTDIR"
    assert (export / "d/f").exists()


def test_mount_points_are_busy(client: Client, export: Path, mount: Mount) -> None:
    mount(export / "m", "-t", "tmpfs", "none")
    assert client.error(Tunlinkat(ROOT, b"m", RMDIR)) == "EBUSY"
    assert client.error(Trenameat(ROOT, b"m", ROOT, b"n")) == "EBUSY"


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_remove_by_fid(client: Client, export: Path, kind: str) -> None:
    path = export / "x"
    match kind:
        case "file":
            path.write_text("")
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to("/")
    client.walk(ROOT, 1, b"x")
    client.rpc(Tremove(1))
    assert os.listdir(export) == []
    assert client.error(Tgetattr(1, 0)) == "ENOENT"


def test_remove_clunks_even_if_it_fails(client: Client, export: Path) -> None:
    (export / "d/e").mkdir(parents=True)
    client.walk(ROOT, 1, b"d")
    assert client.error(Tremove(1)) == "ENOTEMPTY"
    assert client.error(Tgetattr(1, 0)) == "ENOENT"


@pytest.mark.threat("t_root_remove")
def test_root_is_not_removed(client: Client, export: Path) -> None:
    client.walk(ROOT, 1)
    assert client.error(Tremove(1)) == "EBUSY"
    assert export.is_dir()


@pytest.mark.threat("t_host_replace")
@pytest.mark.parametrize(
    "message", [lambda fid: Tremove(fid), lambda fid: Trename(fid, ROOT, b"new")]
)
def test_hint_that_is_no_longer_true(client: Client, export: Path, message: Any) -> None:
    """The host has put another file where the guest's was: that one is not touched."""
    (export / "a/b/c").mkdir(parents=True)
    path = export / "a/b/c/f"
    path.write_text("old")
    client.walk(ROOT, 1, b"a", b"b", b"c", b"f")
    path.rename(export / "kept")
    path.write_text("new")
    client.rpc(message(1))
    assert path.read_text() == "new"
    assert not (export / "kept").exists()
    renamed = export / "new"
    assert not renamed.exists() or renamed.read_text() == "old"


@pytest.mark.parametrize(
    "message", [lambda fid: Tremove(fid), lambda fid: Trename(fid, ROOT, b"new")]
)
def test_hint_whose_name_is_gone(
    client: Client, export: Path, tmp_path: Path, message: Any
) -> None:
    """Moved out of the export, or removed: there is no name here to act on."""
    for name in ("f", "g"):
        (export / name).write_text("")
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"g")
    (export / "f").rename(tmp_path / "outside")
    (export / "g").unlink()
    assert client.error(message(1)) == "ESTALE"
    assert client.error(message(2)) == "ESTALE"
    assert (tmp_path / "outside").exists()
    assert os.listdir(export) == []


def test_removal_of_a_file_that_the_host_has_moved(client: Client, export: Path) -> None:
    (export / "a/b").mkdir(parents=True)
    (export / "d").mkdir()
    client.walk(ROOT, 1, b"d")
    (export / "d").rename(export / "a/b/moved")
    client.rpc(Tremove(1))
    assert os.listdir(export / "a/b") == []


def test_two_fids_of_one_file_remember_their_own_names(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "first").write_text("")
    (export / "second").hardlink_to(export / "first")
    (export / "d/third").hardlink_to(export / "first")
    for fid, path in enumerate([(b"first",), (b"second",), (b"d", b"third"), (b"first",)], 1):
        client.walk(ROOT, fid, *path)
    client.rpc(Tremove(2))
    assert sorted(os.listdir(export)) == ["d", "first"]
    client.walk(ROOT, 5, b"d")
    client.rpc(Trenameat(ROOT, b"first", 5, b"renamed"))
    client.rpc(Tremove(3))
    assert os.listdir(export / "d") == ["renamed"]
    client.walk(4, 6)  # a clone of a fid whose name has gone
    client.rpc(Tremove(6))
    assert os.listdir(export / "d") == []


def test_hint_follows_the_parent(client: Client, export: Path) -> None:
    """The parent is held as well, so its own renames do not matter."""
    (export / "a/b").mkdir(parents=True)
    (export / "a/b/f").write_text("")
    client.walk(ROOT, 1, b"a", b"b", b"f")
    (export / "a").rename(export / "z")
    client.rpc(Tremove(1))
    assert os.listdir(export / "z/b") == []


@pytest.mark.parametrize("names", [(b"d", b"."), (b"d", b"e", b"..")])
def test_remove_of_a_fid_walked_to_by_dots(
    client: Client, export: Path, names: tuple[bytes, ...]
) -> None:
    """Whatever the answer is, only what the fid holds may vanish."""
    (export / "d/e").mkdir(parents=True)
    (export / "other").mkdir()
    client.walk(ROOT, 1, *names)
    assert client.error(Tremove(1)) in {"ESTALE", "EINVAL", "ENOTEMPTY"}
    assert sorted(os.listdir(export)) == ["d", "other"]
    assert (export / "d/e").exists()


@pytest.mark.threat("t_deep")
def test_deep_path(client: Client, export: Path) -> None:
    """More than 64 KiB of path, which no path string could hold."""
    name = b"x" * 200
    client.walk(ROOT, 1)
    for _ in range(350):
        client.rpc(Tmkdir(1, name, 0o755, 0))
        client.walk(1, 1, name)
    client.create(1, 2, b"f")
    client.write(2, 0, b"text")
    client.clunk(2)
    client.open(1, 2, b"f")
    assert client.read(2, 0, 10) == b"text"
    client.rpc(Tunlinkat(1, b"f", 0))
    for _ in range(350):
        client.walk(1, 1, b"..")
        client.rpc(Tunlinkat(1, name, RMDIR))
    assert os.listdir(export) == []
