"""The locks of one session: as plain data, at the end, and their one rule for threads."""

import fcntl
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.export.handles import Opened
from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.ops.fid import Fid
from ninepd.ops.locks import LockTable
from ninepd.ops.ranges import Owner
from ninepd.p9.messages import LockType
from tests.support.locking import READ, UNLOCK, WRITE, host_leases, host_may
from tests.support.waiting import eventually

FILES = (b"a", b"b")


@pytest.fixture
def tree(export: Path) -> Iterator[Tree]:
    for name in FILES:
        (export / os.fsdecode(name)).touch()
    before = set(os.listdir("/proc/self/fd"))
    tree = Tree(os.open(export, os.O_PATH | os.O_DIRECTORY), LocalHost())
    yield tree
    tree.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def fids(tree: Tree) -> Iterator[list[Fid]]:
    """Two on each file."""
    fids = [Fid(tree.existing(tree.root, name, [])[0], 0) for name in FILES for _ in range(2)]
    yield fids
    for fid in fids:
        tree.handles.release(fid.handle)


def test_dumped_and_loaded(tree: Tree, fids: list[Fid]) -> None:
    chance = random.Random(9)
    table = LockTable(tree, 4096)
    for _ in range(300):
        kind = chance.choice(list(LockType))
        owner = Owner(chance.randrange(4), b"guest")
        table.lock(chance.choice(fids), kind, chance.randrange(100), chance.randrange(1, 30), owner)
    held = table.dump()
    assert {one.fid for _, ranges in held for one in ranges} == set(fids)
    counts = [fid.locks for fid in fids]
    for fid in fids:
        fid.locks = 0
    again = LockTable(tree, 4096)
    for file, ranges in held:
        again.load(Opened(file.handle, os.dup(file.fd), file.flags, tree.reopen), ranges)
    assert [sorted(ranges, key=str) for _, ranges in again.dump()] == [
        sorted(ranges, key=str) for _, ranges in held
    ]
    assert [fid.locks for fid in fids] == counts
    table.end()
    assert table.dump() == []
    again.end()


def test_end(tree: Tree, fids: list[Fid], export: Path) -> None:
    table = LockTable(tree, 4096)
    owner = Owner(1, b"guest")
    assert table.lock(fids[0], WRITE, 0, 0, owner)
    table.end()
    assert host_may(export / "a", fcntl.F_WRLCK)
    table.drop(fids[0])  # nothing is left
    assert table.lock(fids[0], UNLOCK, 0, 0, owner)
    with pytest.raises(OSError, match="the session has ended"):
        table.lock(fids[0], READ, 0, 0, owner)


def test_two_requests_on_one_inode_at_once(tree: Tree, fids: list[Fid], export: Path) -> None:
    """Whoever calls keeps them apart; the rule is checked. Other inodes are free meanwhile."""
    table = LockTable(tree, 4096)
    owner = Owner(1, b"guest")
    leased = export / "leased"
    leased.touch()
    slow = Fid(tree.existing(tree.root, b"leased", [])[0], 0)
    opened = tree.open(slow.handle, os.O_RDONLY)
    with host_leases(leased) as lease:
        waits = threading.Thread(
            target=lambda: table.lock(slow, WRITE, 0, 0, owner, wait=True), daemon=True
        )
        waits.start()
        eventually(
            lambda: fcntl.fcntl(lease, fcntl.F_GETLEASE) != fcntl.F_RDLCK, "it is called back"
        )
        with pytest.raises(AssertionError, match="two requests"):
            table.lock(slow, READ, 0, 0, owner)
        assert table.lock(fids[0], WRITE, 0, 0, owner)
        table.drop(slow)  # has no locks: touches nothing
        table.end()
        assert host_may(export / "a", fcntl.F_WRLCK)
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    waits.join(10)
    assert host_may(leased, fcntl.F_WRLCK)  # it let go by itself
    opened.close()
    tree.handles.release(slow.handle)


def test_a_name_that_the_host_gave_a_file_is_another_inode_of_the_guest(
    tree: Tree, fids: list[Fid], export: Path
) -> None:
    """Its kernel excludes nobody there, even where the fids' handle has followed the file."""
    table = LockTable(tree, 4096)
    old, same = fids[:2]
    assert table.lock(old, WRITE, 0, 0, Owner(1, b"guest"))
    (export / "a").rename(export / "c")
    tree.handles.found_at(old.handle, (tree.handles.share(tree.root), b"c"))
    handle = tree.existing(tree.root, b"c", [])[0]
    assert handle is old.handle
    new = Fid(handle, 0, tree.handles.hint_for(handle, tree.root, b"c"))
    assert not table.lock(new, WRITE, 0, 0, Owner(2, b"guest"))
    assert table.lock(same, WRITE, 0, 0, Owner(3, b"guest"))
    table.end()
    assert new.own_hint is not None
    for reference in (handle, new.own_hint[0]):
        tree.handles.release(reference)


def test_closing_the_fid_of_a_write_lock_leaves_the_file_open_for_reading_only(
    tree: Tree, fids: list[Fid], export: Path
) -> None:
    table = LockTable(tree, 4096)
    writer, reader = fids[:2]
    assert table.lock(writer, WRITE, 0, 10, Owner(1, b"guest"))
    assert table.lock(reader, READ, 20, 10, Owner(2, b"guest"))
    table.drop(writer)
    with host_leases(export / "a"):  # which nobody gets on a file that is open for writing
        pass
    table.end()
