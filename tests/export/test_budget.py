"""Descriptors as a budget, counted: how much is done in one step, and who may reclaim."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ninepd.config import Reclaim
from ninepd.export.descriptors import GLANCES, SLICE, Holder
from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.jobs import Job, Jobs
from ninepd.limits import Limits
from ninepd.ops import files
from ninepd.ops.guest import END_SLICE, Guest
from ninepd.ops.replies import Later
from ninepd.p9.messages import Rread, Tread
from ninepd.payload import Buffers, PrivatePayload
from ninepd.statelock import DESCRIPTORS, GUEST, CheckedLock, assert_unlocked
from ninepd.workers import Workers
from tests.support.interpreted import interpreted

if TYPE_CHECKING:
    from ninepd.export.descriptors import Budget
    from ninepd.export.descriptors import Holder as Base
else:  # nothing can be derived from what is compiled
    descriptors = interpreted("ninepd.export.descriptors")
    Base, Budget = descriptors.Holder, descriptors.Budget


class Counted(Base):
    """Counts how often the host would be asked."""

    def __init__(self, budget: Budget, number: int, may_reclaim: Callable[[], bool]) -> None:
        super().__init__(number)
        self._budget = budget
        self._may_rest = may_reclaim
        with budget.lock:
            budget.add(self)

    @property
    def budget(self) -> Budget:
        return self._budget

    def _restore(self) -> int:
        return 0

    def may_reclaim(self) -> bool:
        return self._may_rest()


def crowd(count: int, may_reclaim: Callable[[], bool]) -> tuple[Budget, list[int]]:
    """A budget that is full of idle holders; and the numbers that it has closed."""
    closed: list[int] = []
    budget = Budget(count, closed.append)
    for number in range(count):
        Counted(budget, number, may_reclaim).recent = False
    return budget, closed


def test_one_step_asks_the_host_a_slice_of_questions() -> None:
    budget, closed = crowd(10_000, lambda: True)
    budget.make_room()
    assert len(closed) == SLICE
    steps = 1
    while budget.crowded:
        steps += 1
        budget.make_room()
    assert steps <= 10_000 // 8 // SLICE + 1
    assert sorted(closed) == sorted(set(closed))


@pytest.mark.parametrize("what", ["recent", "pinned", "refused"])
def test_one_step_looks_at_a_slice_of_the_busy(what: str) -> None:
    asked = 0

    def refuse() -> bool:
        nonlocal asked
        asked += 1
        return False

    budget, closed = crowd(10_000, refuse)
    for holder in budget._open:
        holder.recent = what == "recent"
        holder.pins = what == "pinned"
    budget.make_room()
    passed = sum(not holder.recent for holder in budget._open) if what == "recent" else 0
    assert asked == (SLICE if what == "refused" else 0)
    assert passed <= GLANCES
    assert closed == []


def test_what_is_used_while_the_host_is_asked_stays() -> None:
    budget, closed = crowd(100, lambda: bool(budget._open[0].fd) or True)
    for holder in budget._open[1:]:
        holder.pins = 1
    budget.make_room()
    assert closed == []


def test_whoever_has_lost_the_ring_puts_nothing_aside() -> None:
    """Its question took so long that another thread serves the ring now."""

    def lose() -> bool:
        budget.take_over()
        return True

    budget, closed = crowd(1000, lose)
    budget.make_room()
    assert closed == []
    assert all(not holder.pins for holder in budget._open)


def test_nothing_is_put_aside_beside_another_ring() -> None:
    """An old connection is at its last batch: what it uses is not pinned."""
    budget, _ = crowd(1000, lambda: True)
    budget.begin_serving()
    assert budget.crowded
    budget.begin_serving()
    assert not budget.crowded
    budget.end_serving()
    assert budget.crowded


def test_files_without_a_way_back_are_not_asked_again_at_once() -> None:
    asked = 0

    def refuse() -> bool:
        nonlocal asked
        asked += 1
        return False

    budget, _ = crowd(1000, refuse)
    with budget.lock:  # so that it is crowded, but something is left
        for holder in budget._open[900:]:
            holder.forget()
    for _ in range(100):
        budget.make_room()
    assert asked < 100 * SLICE


@pytest.fixture
def tree(export: Path) -> Iterator[Tree]:
    for number in range(60):
        (export / f"f{number}").write_text(f"f{number}")
    tree = Tree(
        os.open(export, os.O_PATH), LocalHost(strict=False), budget=32, reclaim=Reclaim.HANDLES
    )
    yield tree
    tree.close()
    assert (tree.handles.budget.used, tree.handles.budget.reclaimed) == (0, 0)


def test_a_session_ends_in_slices(tree: Tree) -> None:
    guest = Guest(tree, Limits())
    for number in range(3 * END_SLICE):
        guest.add(number, tree.handles.share(tree.root), 0)
    assert not guest.end_some()
    assert len(guest.session.fids) == 2 * END_SLICE
    with pytest.raises(FileNotFoundError):
        guest.add(9999, tree.handles.share(tree.root), 0)
    guest.end()
    assert len(guest.session.fids) == 0
    assert tree.root.refs == 1


def private() -> PrivatePayload:
    return PrivatePayload(4096, Buffers())


@pytest.mark.usefixtures("as_root")
def test_a_job_that_waited_for_an_open_keeps_what_that_opened(tree: Tree) -> None:
    """It was held when the fid was no open file yet; its descriptor is its own all the same."""
    guest = Guest(tree, Limits())
    pins: list[Holder] = []
    handle, _ = tree.existing(tree.root, b"f0", pins)
    fid = guest.add(1, handle, 0)
    tree.handles.unpin(pins)
    begun = threading.Event()
    message = Tread(1, 0, 100)
    workers = Workers("test")
    jobs = Jobs("test", workers, lambda: None, 2)
    read = private()
    started, go = threading.Event(), threading.Event()

    def add(tag: int, work: Callable[[Any], Any], payload: PrivatePayload, exclusive: bool) -> None:
        jobs.add(Job(tag, tag, guest, message, [fid], payload, work, exclusive))

    def open_it(_payload: Any) -> None:
        begun.wait(10)
        fid.opened = tree.open(fid.handle, os.O_RDONLY)

    def read_it(payload: Any) -> Any:
        started.set()
        assert go.wait(10)
        return files.read(guest, message, payload, fid)

    add(1, open_it, private(), True)
    add(2, read_it, read, False)
    begun.set()
    assert [job.tag for job in jobs.completed(10)] == [1]
    assert started.wait(10)
    opened = []
    for number in range(1, 60):  # many more than there is room for
        tree.handles.budget.make_room()
        other, _ = tree.existing(tree.root, b"f%d" % number, pins)
        opened.append(tree.open(other, os.O_RDONLY))
        tree.handles.unpin(pins)
    assert fid.open_file().is_open
    go.set()
    (done,) = jobs.completed(10)
    assert isinstance(done.reply, Rread), done.reply
    assert read.take(2) == b"f0"
    assert not fid.handle.pins
    assert not fid.open_file().pins
    jobs.close()
    workers.close()
    for file in opened:
        file.close()
        tree.handles.release(file.handle)
    guest.end()


def test_the_rest_of_a_request_takes_a_holder(tree: Tree) -> None:
    """Not the number that its descriptor had when the request came."""
    guest = Guest(tree, Limits())
    pins: list[Holder] = []
    handle, _ = tree.existing(tree.root, b"f0", pins)
    fid = guest.add(1, handle, 0)
    tree.handles.unpin(pins)
    fid.opened = file = tree.open(handle, os.O_RDONLY)
    payload = private()
    rest = Later(lambda payload: files._read_rest(file, 0, 100, 0, payload))
    with tree.handles.budget.lock:
        number = file.reclaim()
    os.close(number)
    stranger = os.open(__file__, os.O_RDONLY)
    try:
        rest.work(payload)
        assert payload.take(2) == b"f0"
    finally:
        os.close(stranger)
    guest.end()


# Locks


def test_locks_are_taken_in_their_order() -> None:
    first, second = CheckedLock(GUEST), CheckedLock(DESCRIPTORS)
    with first, second:
        pass
    with pytest.raises(AssertionError, match="behind"), second, first:
        pass
    with pytest.raises(AssertionError, match="behind"), first, first:
        pass
    assert_unlocked()


def test_the_host_is_not_asked_under_a_lock(tree: Tree) -> None:
    with tree.handles.budget.lock, pytest.raises(AssertionError, match="held"):
        tree.host.stat(tree.root.fd)
