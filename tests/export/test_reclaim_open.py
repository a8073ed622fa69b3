"""What is reclaimed while the same file is open: it stays the same file, and is not lost."""

import fcntl
from pathlib import Path

import pytest

from ninepd.p9.messages import LockStatus, LockType, Tlock, Tunlinkat
from tests.support import reclaim
from tests.support.client import ROOT, Client
from tests.support.reclaim import O_RDWR, Start, make_files, walk_all

start = reclaim.start

FIRST = 1000
"""Fids from here on are for nothing but pressure."""


def press(client: Client, names: list[bytes], busy: int | None = None) -> None:
    """Use more fids than there are descriptors, and the file that is open as ``busy`` all along."""
    for fid, name in enumerate(names, FIRST):
        client.walk(ROOT, fid, *name.split(b"/"))
        if busy is not None:
            client.read(busy, 0, 4)


@pytest.mark.parametrize("how", ["names", "handles"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "walked again"])
def test_path_fid_outlives_the_open_file_beside_it(
    start: Start, export: Path, how: str, again: bool
) -> None:
    names = make_files(export, 400)
    (export / "victim").write_text("v")
    _, client = start("--reclaim", how)
    client.walk(ROOT, 1, b"victim")
    client.open(1, 2)
    press(client, names, busy=2)
    if again:
        client.walk(ROOT, 3, b"victim")
    client.clunk(2)
    assert client.getattr(1).size == 1
    client.walk(ROOT, 4, b"victim")
    assert client.getattr(4).size == 1


def test_walking_again_finds_the_same_locks(start: Start, export: Path) -> None:
    names = make_files(export, 400)
    path = export / "victim"
    path.write_text("v")
    _, client = start()

    def lock(fid: int, kind: LockType) -> int:
        status: int = client.rpc(Tlock(fid, kind, 0, 0, 0, 7, b"guest")).status
        return status

    client.walk(ROOT, 1, b"victim")
    client.open(1, 2, flags=O_RDWR)
    assert lock(2, LockType.WRLCK) == LockStatus.SUCCESS
    press(client, names, busy=2)
    client.open(ROOT, 3, b"victim", flags=O_RDWR)
    assert lock(3, LockType.WRLCK) == LockStatus.SUCCESS  # it is its own
    assert lock(3, LockType.UNLCK) == LockStatus.SUCCESS
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_by_handle_an_open_file_outlives_its_name(start: Start, export: Path) -> None:
    """Without a name it cannot be opened again, so one of its descriptors stays."""
    names = make_files(export, 400)
    fids = range(FIRST, FIRST + len(names))
    (export / "victim").write_text("precious")
    _, client = start("--reclaim", "handles")
    client.walk(ROOT, 1, b"victim")
    walk_all(client, names, FIRST)  # puts fid 1 aside
    client.open(1, 2, flags=O_RDWR)
    client.clunk(*fids)
    press(client, names, busy=2)  # and again, beside the open file
    client.rpc(Tunlinkat(ROOT, b"victim", 0))
    client.clunk(*fids)
    press(client, names, busy=2)
    client.clunk(*fids)
    press(client, names)  # would put the open file aside
    assert client.read(2, 0, 100) == b"precious"
    assert client.getattr(1).nlink == 0
