"""mapped-file: the files beside the files, their format, and that guests do not get at them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.export.metadata import compose, is_metadata, parse
from ninepd.owners import Owner
from ninepd.p9.messages import (
    SetattrValid,
    Tattach,
    Tlcreate,
    Tlink,
    Tmkdir,
    Tmknod,
    Topen,
    Trename,
    Trenameat,
    Tsetattr,
    Tsymlink,
    Tunlinkat,
    Tversion,
    Twalk,
)
from tests.conftest import OTHER_USER, Mount, StartDaemon
from tests.support.client import ROOT, Client
from tests.support.mapped import META, META_ROOT, kept_in_files, make

HIDDEN = [b".virtfs_metadata", b".virtfs_metadata_root", b".VirtFS_Metadata"]


@pytest.fixture
def top(export: Path) -> Path:
    os.chown(export, OTHER_USER, OTHER_USER)
    return export


@pytest.fixture
def client(start_daemon: StartDaemon, top: Path, other_user: tuple[str, ...]) -> Iterator[Client]:
    """Of a daemon without privileges; fid 1 is a directory, 2 a file in it."""
    daemon = start_daemon("--security-model", "mapped-file", launcher=other_user)
    with Client(daemon.socket) as client:
        client.attach()
        client.rpc(Tmkdir(ROOT, b"d", 0o750, 5))
        client.walk(ROOT, 1, b"d")
        make(client, 1, "file", b"f", 0o640, 6)
        client.walk(1, 2, b"f")
        yield client


def chmod(fid: int, mode: int) -> Tsetattr:
    return Tsetattr(fid, SetattrValid.MODE, mode, 0, 0, 0, 0, 0, 0, 0)


def test_links_that_fail_keep_nothing_open(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--security-model", "mapped-file")
    with Client(daemon.socket) as client:
        client.attach()
        make(client, ROOT, "file", b"f", 0o640, 6)
        client.walk(ROOT, 1, b"f")
        assert client.error(Tlink(ROOT, 1, b"f")) == "EEXIST"
        before = daemon.descriptors()
        for _ in range(20):
            assert client.error(Tlink(ROOT, 1, b"f")) == "EEXIST"
        assert daemon.descriptors() == before


def test_format(client: Client, top: Path) -> None:
    text = (top / "d" / META / "f").read_bytes()
    assert text == b"virtfs.uid=0\nvirtfs.gid=6\nvirtfs.mode=33184\n"
    assert (top / META / "d").read_bytes() == b"virtfs.uid=0\nvirtfs.gid=5\nvirtfs.mode=16872\n"
    assert stat.S_IMODE((top / META).stat().st_mode) == 0o700
    assert stat.S_IMODE((top / META / "d").stat().st_mode) == 0o600
    client.rpc(Tmknod(ROOT, b"node", stat.S_IFCHR | 0o600, 4, 64, 0))
    assert (top / META / "node").read_bytes().endswith(b"virtfs.mode=8576\nvirtfs.rdev=1088\n")
    client.rpc(chmod(ROOT, 0o777))
    assert (top / META_ROOT).read_bytes() == b"virtfs.mode=16895\n"


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        (b"", Owner()),
        (b"virtfs.uid=7\n", Owner(uid=7)),
        (b"virtfs.gid=-2\nvirtfs.uid=0\n", Owner(0, (1 << 32) - 2)),
        (b"virtfs.mode=33188", Owner(mode=33188)),
        (b"\n\nvirtfs.mode=33188\n\n\n", Owner(mode=33188)),
        (b"virtfs.rdev=-5\n", Owner(rdev=(1 << 32) - 5)),
        (b"virtfs.uid=12x\nvirtfs.gid= 3\nother=5\n=\nvirtfs.mode\n", Owner(12, 3)),
        (b"virtfs.uid=x\n", Owner(uid=0)),
        (b"\xff\x00\n" * 100, Owner()),
    ],
)
def test_parsing(text: bytes, owner: Owner) -> None:
    assert parse(text) == owner
    assert parse(compose(owner)) == owner


# EINVAL even where nothing would be found: the answer tells nothing of what is there.
@pytest.mark.threat("t_meta")
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_names(client: Client, top: Path, name: bytes) -> None:
    for message in (
        Twalk(ROOT, 9, (name,)),
        Tlcreate(1, name, 0x8042, 0o600, 0),
        Tmkdir(1, name, 0o700, 0),
        Tmkdir(ROOT, name, 0o700, 0),
        Tsymlink(1, name, b"x", 0),
        Tmknod(1, name, 0o100600, 0, 0, 0),
        Tlink(1, 2, name),
        Tunlinkat(ROOT, name, 0),
        Tunlinkat(ROOT, name, 0x200),
        Trenameat(ROOT, name, ROOT, b"x"),
        Trenameat(1, b"f", 1, name),
        Trename(2, 1, name),
        Tattach(9, 0xFFFFFFFF, b"", name, 0),
        Tattach(9, 0xFFFFFFFF, b"", b"d/" + name, 0),
    ):
        assert client.error(message) == "EINVAL", message
    assert len(client.rpc(Twalk(ROOT, 9, (b"d", name))).qids) == 1
    assert client.names(ROOT) == {b"d"}
    assert client.names(1) == {b"f"}
    assert set(os.listdir(top)) == {"d", META}
    assert os.listdir(top / META) == ["d"]


@pytest.mark.threat("t_meta")
def test_hidden_from_old_clients(client: Client) -> None:
    client.rpc(Tversion(8192, b"9P2000.u"))
    client.rpc(Tattach(ROOT, 0xFFFFFFFF, b"", b"", 0))
    client.walk(ROOT, 1)
    client.rpc(Topen(1, 0))
    data = client.read(1, 0, 8000)
    assert b"d" in data
    assert META.encode() not in data


@pytest.mark.threat("t_meta_casefold")
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        (b".virtfs_metadata", True),
        (".virt\u017fs_metadata".encode(), False),
        (".virtf\u017f_metadata".encode(), True),
        (".virtf\u00ads_metadata".encode(), True),
        (b".virtfs_metadata\xff", False),
        (b".virtfs_metadat", False),
        (b"virtfs_metadata", False),
        (".v\u00efrtfs".encode(), False),
    ],
)
def test_names_that_fold_to_them(name: bytes, hidden: bool) -> None:
    assert is_metadata(name) == hidden


@pytest.mark.threat("t_meta_casefold")
def test_their_directory_is_hidden_by_any_name(client: Client, top: Path, mount: Mount) -> None:
    """In case that a file system folds names in a way that is not known here."""
    mount(top / "other", "--bind", top / META)
    assert client.error(Twalk(ROOT, 9, (b"other",))) == "EINVAL"
    assert client.error(Twalk(ROOT, 9, (b"other", b"d"))) == "EINVAL"


def test_a_directory_of_many_hidden_names(client: Client, top: Path) -> None:
    """An empty piece of a listing is not its end."""
    for number in range(300):
        (top / f"{number:0200}").write_text("")
    client.open(ROOT, 3)
    names = [entry.name for entry in client.listing(3, 600)]
    assert len(names) == len(set(names)) == 303


def test_a_link_has_the_same_lines(client: Client, top: Path) -> None:
    client.rpc(Tlink(ROOT, 2, b"l"))
    assert (top / META / "l").samefile(top / "d" / META / "f")
    client.rpc(chmod(2, 0o4711))
    assert kept_in_files(top / "l", top)["mode"] == stat.S_IFREG | 0o4711
    client.rpc(Trenameat(ROOT, b"l", 1, b"f"))  # does nothing, as they are one file
    assert (top / META / "l").samefile(top / "d" / META / "f")


def test_a_link_of_what_was_removed_by_its_other_name(client: Client, top: Path) -> None:
    client.rpc(Tlink(ROOT, 2, b"l"))
    client.rpc(Tunlinkat(1, b"f", 0))
    assert client.getattr(2).mode == stat.S_IFREG | 0o640
    client.clunk(2)
    client.walk(ROOT, 2, b"l")
    client.rpc(chmod(2, 0o600))
    assert kept_in_files(top / "l", top)["mode"] == stat.S_IFREG | 0o600


def test_stale_lines_are_not_inherited(client: Client, top: Path) -> None:
    (top / "d/f").unlink()
    assert (top / "d" / META / "f").exists()
    client.rpc(Tmknod(1, b"f", stat.S_IFIFO | 0o600, 0, 0, 9))
    assert kept_in_files(top / "d/f", top)["gid"] == 9
    for name in ("g", "h"):
        (top / "d" / name).write_text("")
    make(client, 1, "socket", b"s", 0o700, 1)
    client.rpc(Trenameat(1, b"g", 1, b"s"))
    client.walk(1, 3, b"s")
    assert client.getattr(3).mode == (top / "d/s").stat().st_mode
    assert not (top / "d" / META / "s").exists()


def test_removing_directories(client: Client, top: Path) -> None:
    assert client.error(Tunlinkat(ROOT, b"d", 0x200)) == "ENOTEMPTY"
    assert (top / "d" / META).is_dir()
    client.rpc(Tunlinkat(1, b"f", 0))
    assert os.listdir(top / "d") == [META]
    (top / "d/by_host").write_text("")
    assert client.error(Tunlinkat(ROOT, b"d", 0x200)) == "ENOTEMPTY"
    assert os.listdir(top / "d" / META) == []
    (top / "d/by_host").unlink()
    client.rpc(Tunlinkat(ROOT, b"d", 0x200))
    assert os.listdir(top / META) == []
    assert client.getattr(1).mode == stat.S_IFDIR | 0o750


def test_replacing_directories(client: Client, top: Path) -> None:
    client.rpc(Tmkdir(ROOT, b"e", 0o711, 5))
    assert client.error(Trenameat(ROOT, b"e", ROOT, b"d")) == "ENOTEMPTY"
    assert (top / "d" / META / "f").exists()
    client.rpc(Tunlinkat(1, b"f", 0))
    (top / "d/by_host").write_text("")
    assert client.error(Trenameat(ROOT, b"e", ROOT, b"d")) == "ENOTEMPTY"
    assert os.listdir(top / "d" / META) == []
    (top / "d/by_host").unlink()
    client.rpc(Trenameat(ROOT, b"e", ROOT, b"d"))
    assert kept_in_files(top / "d", top)["mode"] == stat.S_IFDIR | 0o711
    assert os.listdir(top / META) == ["d"]
    assert client.getattr(1).mode == stat.S_IFDIR | 0o750


@pytest.mark.parametrize("name", [b"f", b"nothing"])
def test_rmdir_of_what_is_no_directory(client: Client, top: Path, name: bytes) -> None:
    wanted = "ENOTDIR" if name == b"f" else "ENOENT"
    assert client.error(Tunlinkat(1, name, 0x200)) == wanted
    assert client.error(Tunlinkat(ROOT, b"d", 0)) == "EISDIR"
    assert (top / "d" / META / "f").exists()
    assert (top / META / "d").exists()


def test_moved_by_the_host(client: Client, top: Path) -> None:
    """Its lines stay behind; but those of what is in a moved directory go with it."""
    (top / "d").rename(top / "e")
    assert client.getattr(2).mode == stat.S_IFREG | 0o640
    host = (top / "e").stat()
    assert client.getattr(1).mode == host.st_mode
    client.rpc(chmod(1, 0o711))
    assert kept_in_files(top / "e", top) == {"mode": stat.S_IFDIR | 0o711}
    (top / "e/f").rename(top / "g")
    assert client.getattr(2).mode == stat.S_IFREG | 0o600


def test_lines_that_are_no_file(client: Client, top: Path) -> None:
    """A link there leads nowhere, and nothing waits for a FIFO."""
    secret = top.parent / "secret"
    secret.write_text("virtfs.uid=77\n")
    kept = top / "d" / META / "f"
    kept.unlink()
    kept.symlink_to(secret)
    assert client.getattr(2).uid == OTHER_USER
    assert client.error(chmod(2, 0o600)) == "ELOOP"
    assert secret.read_text() == "virtfs.uid=77\n"
    kept.unlink()
    os.mkfifo(kept)
    os.chown(kept, OTHER_USER, OTHER_USER)
    assert client.getattr(2).uid == OTHER_USER
    kept.unlink()
    kept.mkdir()
    assert client.getattr(2).uid == OTHER_USER
