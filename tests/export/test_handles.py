"""The handle table under threads: whatever they do, files are not confused, and nothing leaks."""

import contextlib
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ninepd.config import Reclaim
from ninepd.export.descriptors import Holder
from ninepd.export.handles import Handle, Opened
from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.limits import Limits
from ninepd.ops import names
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.p9.messages import Trenameat, Tunlinkat
from ninepd.payload import Buffers, PrivatePayload

SECONDS = 3.0
BUDGET = 24
DIRECTORIES = (b"a", b"b", b"c")
FILES = (b"x", b"y", b"z")
_contents = itertools.count()


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make_file(path: Path) -> None:
    """No two ever have the same content."""
    fresh = path.with_name(f"fresh-{next(_contents)}")
    fresh.write_text(fresh.name)
    fresh.rename(path)


class Worker(threading.Thread):
    """Finds, opens, uses, renames, removes, makes room and lets go, at random.

    All pin what they use, so each of them may make room.
    """

    def __init__(self, guest: Guest, export: Path, number: int) -> None:
        super().__init__()
        self.guest = guest
        self.tree = guest.tree
        self.budget = guest.tree.handles.budget
        self.export = export
        self.random = random.Random(number)
        self.held: list[Handle] = []
        self.files: list[tuple[Opened, bytes]] = []
        self.fids = range(10 * number, 10 * number + 2)
        self.wrong: list[str] = []
        self.used = 0

    def run(self) -> None:
        actions = [self.find, self.find, self.open, self.use, self.use, self.use, self.read]
        actions += [self.read, self.let_go, self.close, self.rename, self.remove]
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end:
                if self.budget.crowded:
                    self.budget.make_room()
                with contextlib.suppress(OSError):
                    self.random.choice(actions)()
                if len(self.held) > 6:
                    self.let_go()
                if len(self.files) > 2:
                    self.close()
        except Exception as error:
            self.wrong.append(repr(error))
        while self.files:
            self.close()
        while self.held:
            self.let_go()

    @contextmanager
    def request(self, *used: Holder) -> Iterator[PrivatePayload]:
        payload = PrivatePayload(4096, Buffers())
        self.budget.pin(list(used), payload.pins)
        try:
            yield payload
        finally:
            self.budget.unpin(payload.pins)

    def check(self, handle: Handle) -> None:
        fd = handle.fd
        time.sleep(0)
        if os.fstat(fd).st_ino != handle.ino:
            self.wrong.append("a handle shows another file")
        self.used += 1

    def find(self) -> None:
        with self.request() as payload:
            self.held.append(self._existing(payload))
            self.check(self.held[-1])

    def _existing(self, payload: PrivatePayload) -> Handle:
        tree, pins = self.tree, payload.pins
        directory, _ = tree.existing(tree.root, self.random.choice(DIRECTORIES), pins)
        try:
            return tree.existing(directory, self.random.choice(FILES), pins)[0]
        finally:
            tree.handles.release(directory)

    def use(self) -> None:
        if self.held:
            handle = self.random.choice(self.held)
            with self.request(handle):
                self.check(handle)

    def open(self) -> None:
        if self.held:
            handle = self.random.choice(self.held)
            with self.request(handle):
                file = self.tree.open(handle, os.O_RDONLY)
                self.tree.handles.share(handle)
                self.files.append((file, b""))
            with contextlib.suppress(OSError), self.request(file, handle):
                self.files[-1] = file, os.pread(file.fd, 100, 0)

    def read(self) -> None:
        if self.files:
            file, content = self.random.choice(self.files)
            with self.request(file, file.handle):
                fd = file.fd
                time.sleep(0)
                if content and os.pread(fd, 100, 0) != content:
                    self.wrong.append("an open file shows another one's data")
                self.used += 1

    def close(self) -> None:
        if self.files:
            file, _ = self.files.pop(self.random.randrange(len(self.files)))
            handle = file.handle
            file.close()
            # Whoever has it open holds a reference to it, as a fid does.
            self.tree.handles.release(handle)

    def let_go(self) -> None:
        if self.held:
            handle = self.held.pop(self.random.randrange(len(self.held)))
            self.tree.handles.release(handle)

    def _directory_fid(self, number: int, payload: PrivatePayload) -> Fid:
        handle, _ = self.tree.existing(
            self.tree.root, self.random.choice(DIRECTORIES), payload.pins
        )
        return self.guest.add(number, handle, 0)

    def _clunk(self, number: int, fid: Fid) -> None:
        self.guest.retire(self.guest.remove(number, fid))

    def rename(self) -> None:
        fids: list[Fid] = []
        with self.request() as payload:
            try:
                # What there was before an error stays.
                fids.extend(self._directory_fid(fid, payload) for fid in self.fids)
                old, new = (self.random.choice(FILES) for _ in range(2))
                message = Trenameat(self.fids[0], old, self.fids[1], new)
                names.renameat(self.guest, message, payload, *fids)
            finally:
                for number, fid in zip(self.fids, fids, strict=False):
                    self._clunk(number, fid)

    def remove(self) -> None:
        with self.request() as payload:
            number = self.fids[0]
            fid = self._directory_fid(number, payload)
            name = self.random.choice(FILES)
            try:
                names.unlinkat(self.guest, Tunlinkat(number, name, 0), payload, fid)
            finally:
                self._clunk(number, fid)
                directory = self.export / os.fsdecode(self.random.choice(DIRECTORIES))
                make_file(directory / os.fsdecode(name))


@pytest.mark.threat("t_reclaim_storm")
@pytest.mark.usefixtures("hasty_threads", "as_root")
@pytest.mark.parametrize("reclaim", [Reclaim.NAMES, Reclaim.HANDLES])
def test_threads_that_share_few_descriptors(tmp_path: Path, reclaim: Reclaim) -> None:
    for directory in DIRECTORIES:
        (tmp_path / os.fsdecode(directory)).mkdir()
        for file in FILES:
            make_file(tmp_path / os.fsdecode(directory + b"/" + file))
    before = os.listdir("/proc/self/fd")
    root = os.open(tmp_path, os.O_PATH)
    tree = Tree(root, LocalHost(strict=False), budget=BUDGET, reclaim=reclaim)
    guest = Guest(tree, Limits())
    workers = [Worker(guest, tmp_path, number) for number in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [wrong for worker in workers for wrong in worker.wrong] == []
    assert all(worker.used for worker in workers)
    budget = tree.handles.budget
    assert (budget.used, budget.reclaimed) == (1, 0)
    tree.close()
    assert (budget.used, budget.reclaimed) == (0, 0)
    assert os.listdir("/proc/self/fd") == before
