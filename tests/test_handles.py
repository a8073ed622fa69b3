"""The handle table under threads: whatever they do, no reference and no descriptor leaks."""

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.export.descriptors import mark_worker
from ninepd.export.handles import Handle
from ninepd.export.local import UnmappedHost
from ninepd.export.tree import Tree
from ninepd.ops import names
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.p9.messages import Trenameat, Tunlinkat
from ninepd.payload import Buffers, PrivatePayload

SECONDS = 3.0
DIRECTORIES = (b"a", b"b", b"c")
FILES = (b"x", b"y", b"z")
PAYLOAD = PrivatePayload(4096, Buffers())


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Worker(threading.Thread):
    """Finds, keeps, renames, removes, restores and lets go, at random."""

    def __init__(self, guest: Guest, export: Path, number: int) -> None:
        super().__init__()
        self.guest = guest
        self.export = export
        self.number = number
        self.random = random.Random(number)
        self.held: list[Handle] = []
        self.fids = range(10 * number, 10 * number + 2)

    def run(self) -> None:
        tree = self.guest.tree
        if self.number:
            mark_worker()  # number 0 is the device thread, which alone makes room
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if not self.number and tree.handles.budget.crowded:
                tree.handles.budget.make_room()
            with contextlib.suppress(OSError):
                self.random.choice([self.find, self.find, self.let_go, self.rename, self.remove])()
            if len(self.held) > (2 if self.number else 6):
                self.let_go()
        while self.held:
            self.let_go()

    def find(self) -> None:
        tree = self.guest.tree
        directory, _ = tree.existing(tree.root, self.random.choice(DIRECTORIES))
        try:
            self.held.append(tree.existing(directory, self.random.choice(FILES))[0])
        finally:
            tree.handles.release(directory)

    def let_go(self) -> None:
        if self.held:
            handle = self.held.pop(self.random.randrange(len(self.held)))
            self.guest.tree.handles.release(handle)

    def _directory_fid(self, number: int) -> Fid:
        handle, _ = self.guest.tree.existing(self.guest.tree.root, self.random.choice(DIRECTORIES))
        return self.guest.add(number, handle, 0)

    def _clunk(self, number: int, fid: Fid) -> None:
        self.guest.retire(self.guest.remove(number, fid))

    def rename(self) -> None:
        fids: list[Fid] = []
        try:
            fids.extend(map(self._directory_fid, self.fids))  # what there was before an error stays
            old, new = (self.random.choice(FILES) for _ in range(2))
            message = Trenameat(self.fids[0], old, self.fids[1], new)
            names.renameat(self.guest, message, PAYLOAD, *fids)
        finally:
            for number, fid in zip(self.fids, fids, strict=False):
                self._clunk(number, fid)

    def remove(self) -> None:
        number = self.fids[0]
        fid = self._directory_fid(number)
        name = self.random.choice(FILES)
        try:
            names.unlinkat(self.guest, Tunlinkat(number, name, 0), PAYLOAD, fid)
        finally:
            self._clunk(number, fid)
            directory = self.export / os.fsdecode(self.random.choice(DIRECTORIES))
            (directory / os.fsdecode(name)).touch()


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("by_handle", [False, True])
def test_threads_that_share_few_descriptors(tmp_path: Path, by_handle: bool) -> None:
    if by_handle and os.geteuid():
        pytest.skip("opening by handle needs root")
    for directory in DIRECTORIES:
        (tmp_path / os.fsdecode(directory)).mkdir()
        for file in FILES:
            (tmp_path / os.fsdecode(directory + b"/" + file)).touch()
    before = os.listdir("/proc/self/fd")
    tree = Tree(os.open(tmp_path, os.O_PATH), UnmappedHost(), budget=14, by_handle=by_handle)
    guest = Guest(tree, 1 << 20)
    workers = [Worker(guest, tmp_path, number) for number in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    budget = tree.handles.budget
    assert (budget.used, budget.resting) == (1, 0)
    tree.close()
    assert (budget.used, budget.resting) == (0, 0)
    assert os.listdir("/proc/self/fd") == before
