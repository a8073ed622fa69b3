"""Descriptors are a budget: what is reclaimed comes back as the same file, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    SetattrValid,
    Tclunk,
    Tgetattr,
    Tlopen,
    Tremove,
    Trenameat,
    Tsetattr,
    Tunlinkat,
    Twalk,
)
from tests.conftest import StartDaemon
from tests.support import reclaim
from tests.support.client import ROOT, Client, Daemon, P9Error
from tests.support.reclaim import (
    BY_NAME,
    FILES,
    LIMIT,
    O_RDWR,
    PRLIMIT,
    Start,
    make_files,
    walk_all,
)

start = reclaim.start


def content(client: Client, fid: int, scratch: int = 999_999) -> bytes:
    """What a clone of the fid reads."""
    client.walk(fid, scratch)
    client.rpc(Tlopen(scratch, 0))
    data = client.read(scratch, 0, 4096)
    client.rpc(Tclunk(scratch))
    return data


def error_of(client: Client, message: object) -> int | None:
    try:
        client.rpc(message)
    except P9Error as error:
        return error.errno
    return None


@pytest.mark.parametrize("how", ["auto", "names"])
def test_more_fids_than_descriptors(start: Start, export: Path, how: str) -> None:
    names = make_files(export)
    daemon, client = start("--reclaim", how)
    walk_all(client, names)
    assert daemon.descriptors() <= LIMIT
    for fid, name in enumerate(names, 1):
        assert content(client, fid) == name
    for fid in range(1, FILES + 1):
        client.rpc(Tclunk(fid))
    assert daemon.descriptors() < 40


@pytest.mark.threat("t_reclaim_storm")
def test_by_name_a_replaced_file_is_stale_and_never_another(start: Start, export: Path) -> None:
    names = make_files(export)
    _, client = start(*BY_NAME)
    walk_all(client, names)
    renamed, replaced = set(names[:50]), set(names[50:100])
    for name in renamed:
        (export / os.fsdecode(name)).rename(export / (os.fsdecode(name) + ".moved"))
    for name in replaced:
        other = export / "other"
        other.write_text("another file")
        other.rename(export / os.fsdecode(name))
    for fid, name in enumerate(names, 1):
        if name in renamed | replaced:
            assert error_of(client, Tgetattr(fid, 0x7FF)) == errno.ESTALE
        else:
            assert content(client, fid) == name


@pytest.mark.parametrize("how", ["auto", "names"])
def test_host_renames_of_a_directory_that_is_open_do_no_harm(
    start: Start, export: Path, how: str
) -> None:
    """A path fid below is found again through the directory, wherever that has gone."""
    names = make_files(export)
    _, client = start("--reclaim", how)
    client.walk(ROOT, 90_000, b"d3")
    client.rpc(Tlopen(90_000, 0))
    walk_all(client, names)
    (export / "d3").rename(export / "elsewhere")
    for fid, name in enumerate(names, 1):
        if name.startswith(b"d3/"):
            assert content(client, fid) == name


@pytest.mark.threat("t_reclaim_storm")
def test_by_handle_host_renames_and_removals_never_confuse(start: Start, export: Path) -> None:
    names = make_files(export)
    daemon, client = start("--reclaim", "handles")
    walk_all(client, names)
    for number in range(10):
        (export / f"d{number}").rename(export / f"moved{number}")
    for name in names[:100]:
        path = export / os.fsdecode(name.replace(b"d", b"moved", 1))
        path.rename(export / f"renamed-{path.name}")
    gone = names[100:150]
    for name in gone:
        (export / os.fsdecode(name.replace(b"d", b"moved", 1))).unlink()
    for number in range(200):  # inode numbers come back
        (export / f"new{number}").write_text("new")
    for fid, name in enumerate(names, 1):
        if name in gone:
            assert error_of(client, Tgetattr(fid, 0x7FF)) in {None, errno.ESTALE}
            if error_of(client, Tgetattr(fid, 0x7FF)) is None:
                assert client.rpc(Tgetattr(fid, 0x7FF)).nlink == 0
        else:
            assert content(client, fid) == name
    assert daemon.descriptors() <= LIMIT


@pytest.mark.parametrize("place", ["ext4", "tmpfs"])
def test_by_handle_open_files_outnumber_descriptors(
    start: Start, export: Path, place: str, memory_dir: Path
) -> None:
    root = export if place == "ext4" else memory_dir
    names = make_files(root, 1000)
    daemon, client = start("--reclaim", "handles", export=str(root))
    walk_all(client, names)
    for fid in range(1, 1001):
        client.rpc(Tlopen(fid, O_RDWR))
    for number in range(10):
        (root / f"d{number}").rename(root / f"moved{number}")
    for fid, name in enumerate(names, 1):
        assert client.read(fid, 0, 100) == name
        client.write(fid, len(name), b"!")
    assert daemon.descriptors() <= LIMIT
    for name in names:
        path = root / os.fsdecode(name.replace(b"d", b"moved", 1))
        assert path.read_bytes() == name + b"!"


@pytest.mark.parametrize("how", ["auto", "names"])
def test_what_the_guest_unlinks_stays(start: Start, export: Path, how: str) -> None:
    names = make_files(export, 600)
    _, client = start("--reclaim", how)
    walk_all(client, names)
    for number in range(10):
        client.walk(ROOT, 10_000 + number, b"d%d" % number)
    # The first ones are reclaimed by now.
    for name in names[:40]:
        directory, leaf = name.split(b"/")
        client.rpc(Tunlinkat(10_000 + int(directory[1:]), leaf, 0))
    walk_all(client, names[40:], 20_000)
    for fid, name in enumerate(names[:40], 1):
        assert client.rpc(Tgetattr(fid, 0x7FF)).nlink == 0
        assert content(client, fid) == name


@pytest.mark.parametrize("how", ["auto", "names"])
def test_guest_renames_are_followed(start: Start, export: Path, how: str) -> None:
    names = make_files(export, 600)
    _, client = start("--reclaim", how)
    walk_all(client, names)
    for number in range(10):
        client.rpc(Trenameat(ROOT, b"d%d" % number, ROOT, b"moved%d" % number))
    client.walk(ROOT, 10_000, b"moved1")
    client.rpc(Trenameat(10_000, b"f1", ROOT, b"renamed"))
    for fid, name in enumerate(names, 1):
        assert content(client, fid) == name


@pytest.mark.parametrize("how", ["auto", "names"])
def test_a_guest_rename_over_a_reclaimed_file_keeps_it(
    start: Start, export: Path, how: str
) -> None:
    names = make_files(export, 600)
    _, client = start("--reclaim", how)
    walk_all(client, names)
    client.walk(ROOT, 10_000, b"d0")
    client.walk(ROOT, 10_001, b"d1")
    client.rpc(Trenameat(10_001, b"f1", 10_000, b"f0"))
    walk_all(client, names[2:], 20_000)
    client.rpc(Tsetattr(1, SetattrValid.SIZE, 0, 0, 0, 0, 0, 0, 0, 0))
    assert content(client, 1) == b""
    assert (export / "d0" / "f0").read_bytes() == names[1]


@pytest.mark.parametrize("how", ["auto", "names"])
def test_removal_by_a_reclaimed_fid(start: Start, export: Path, how: str) -> None:
    names = make_files(export, 600)
    _, client = start("--reclaim", how)
    walk_all(client, names)
    client.rpc(Tremove(1))
    assert not (export / os.fsdecode(names[0])).exists()
    assert (export / os.fsdecode(names[1])).exists()


def test_emfile_only_when_nothing_is_idle(start: Start, export: Path) -> None:
    names = make_files(export, 600)
    daemon, client = start(*BY_NAME)
    walk_all(client, names)
    opened = 0
    while (code := error_of(client, Tlopen(opened + 1, 0))) is None:
        opened += 1
    assert code == errno.EMFILE
    assert opened >= 150
    # Path fids still work, and so does everything after a few clunks.
    for fid, name in enumerate(names[opened:], opened + 1):
        assert client.rpc(Tgetattr(fid, 0x7FF)).size == len(name)
    for fid in range(1, 21):
        client.rpc(Tclunk(fid))
    assert error_of(client, Tlopen(opened + 1, 0)) is None
    assert error_of(client, Twalk(ROOT, 1, (b"d1",))) is None
    assert daemon.descriptors() <= LIMIT


@pytest.mark.threat("t_inode_recycle")
@pytest.mark.parametrize("how", ["auto", "names"])
def test_a_recycled_inode_does_not_join_a_reclaimed_fid(
    start: Start, export: Path, how: str
) -> None:
    names = make_files(export, 600)
    _, client = start("--reclaim", how)
    walk_all(client, names)
    first = client.rpc(Tgetattr(1, 0x3FFF))
    walk_all(client, names[1:], 20_000)
    victim = export / os.fsdecode(names[0])
    victim.unlink()
    for number in range(300):
        (export / f"new{number}").write_text("new")
        client.walk(ROOT, 50_000 + number, b"new%d" % number)
        found = client.rpc(Tgetattr(50_000 + number, 0x3FFF))
        assert (found.qid.path, found.gen) != (first.qid.path, first.gen)
    assert error_of(client, Tgetattr(1, 0x7FF)) == errno.ESTALE


@pytest.mark.parametrize("how", ["auto", "names"])
def test_removal_by_a_fid_whose_inode_was_recycled(start: Start, export: Path, how: str) -> None:
    """A new file of the same name, in the same inode, is still another file."""
    names = make_files(export, 600)
    _, client = start("--reclaim", how)
    walk_all(client, names)
    victims = 0
    for fid, name in enumerate(names[:20], 1):
        path = export / os.fsdecode(name)
        inode = path.stat().st_ino
        path.unlink()
        path.write_text("new")
        victims += path.stat().st_ino == inode
        assert error_of(client, Tremove(fid)) == errno.ESTALE
        assert path.read_text() == "new"
    assert victims, "this file system has recycled none: the test shows nothing"


def test_places_that_form_a_ring_are_let_go(daemon: Daemon, client: Client, export: Path) -> None:
    """By what was found first, each of two directories lies in the other."""
    (export / "b/a").mkdir(parents=True)
    idle = daemon.descriptors()
    client.walk(ROOT, 1, b"b")
    client.walk(1, 2, b"a")
    (export / "b/a").rename(export / "a")
    client.rpc(Trenameat(ROOT, b"b", 2, b"b"))
    assert (export / "a/b").is_dir()
    assert daemon.descriptors() == idle + 2
    for fid in (1, 2):
        client.rpc(Tclunk(fid))
    assert daemon.descriptors() == idle


def test_by_name_files_that_the_host_moves_are_followed(start: Start, export: Path) -> None:
    """As a mail server moves what a guest holds from ``new`` to ``cur``."""
    (export / "new").mkdir()
    (export / "cur").mkdir()
    for number in range(600):
        (export / f"new/{number}").write_text(str(number))
    _, client = start(*BY_NAME)
    for number in range(100):  # these are open when they move
        client.walk(ROOT, 1 + number, b"new", b"%d" % number)
    for number in range(600):
        (export / f"new/{number}").rename(export / f"cur/{number}")
    for number in range(100, 600):
        client.walk(ROOT, 1 + number, b"cur", b"%d" % number)
    for number in range(100):
        (export / f"more{number}").touch()
        client.walk(ROOT, 1000 + number, b"more%d" % number)
    assert len(client.names(ROOT)) == 102
    for number in range(600):
        assert content(client, 1 + number) == str(number).encode()


def test_by_name_every_file_moves_each_time_it_was_found(start: Start, export: Path) -> None:
    """None of them is where the guest has found it, whenever it was reclaimed."""
    for folder in ("a", "b"):
        (export / folder).mkdir()
    for number in range(600):
        (export / f"a/{number}").touch()
    _, client = start(*BY_NAME)
    for number in range(600):
        client.walk(ROOT, 1 + number, b"a", b"%d" % number)
        (export / f"a/{number}").rename(export / f"b/{number}")
    assert len(client.names(ROOT)) == 2
    for number in range(600):
        assert content(client, 1 + number) == b""


@pytest.mark.usefixtures("as_root")
def test_by_default_twenty_thousand_files_are_open(start: Start, export: Path) -> None:
    names = make_files(export, 20_000)
    daemon, client = start()
    for number, name in enumerate(names, 1):
        client.open(ROOT, number, *name.split(b"/"))
    assert daemon.descriptors() <= LIMIT
    for number in range(1, 20_000, 37):
        assert client.read(number, 0, 100) == names[number - 1]


def test_by_default_names_do_where_handles_may_not_be_used(
    start_daemon: StartDaemon, export: Path, other_user: tuple[str, ...]
) -> None:
    names = make_files(export, 600)
    daemon = start_daemon(launcher=(*PRLIMIT, *other_user))
    with Client(daemon.socket) as client:
        client.attach()
        walk_all(client, names)
        for fid, name in enumerate(names, 1):
            assert content(client, fid) == name
        assert daemon.descriptors() <= LIMIT
