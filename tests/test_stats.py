"""What an export counts: where the ring counts it, and what another process sees of it."""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.limits import Limits
from ninepd.ops.guest import Service
from ninepd.stats import BOUNDS, SIZE, Messages, Reader, Stats, reader, shared
from tests.support.vring_rig import RREAD, TREAD, TWRITE, Rig, answered, message

RLERROR, RERROR = 7, 107


@pytest.fixture
def watched() -> Iterator[tuple[Rig, Reader]]:
    stats, fd = shared()
    seen = reader(fd)
    os.close(fd)
    with closing(Rig(stats=stats)) as rig:
        yield rig, seen


def only(seen: Reader) -> Messages:
    [found] = seen.messages()
    return found


def test_a_request_is_counted_with_its_bytes(watched: tuple[Rig, Reader]) -> None:
    rig, seen = watched
    answered(rig, message(b"x" * 16), RREAD, bytes(4), 500)
    found = only(seen)
    assert found[:4] == (TREAD, 1, 23, 511)
    assert found.errors == {}
    assert sum(found.buckets) == 1
    numbers = seen.numbers
    assert (numbers.taken, numbers.batches, numbers.in_flight) == (1, 1, 0)
    assert (numbers.calls, numbers.calls_saved) == (1, 0)


def test_bytes_are_those_of_the_message(watched: tuple[Rig, Reader]) -> None:
    """A guest can make a chain of any length, and so have it count what was never sent."""
    rig, seen = watched
    request = message(b"x" * 16)
    answered(rig, request + b"y" * 1000, RREAD, bytes(4))
    assert only(seen).bytes_in == len(request)


@pytest.mark.parametrize(
    ("kind", "body", "number"),
    [
        (RLERROR, errno.ENOENT.to_bytes(4, "little"), errno.ENOENT),
        (RLERROR, (0xFFFF_FFFF).to_bytes(4, "little"), 0),
        (RERROR, b"\2\0no" + errno.EACCES.to_bytes(4, "little"), errno.EACCES),
        (RERROR, b"\4\0none", 0),
        (RERROR, b"\0\0", 0),
        (RERROR, b"", 0),
    ],
    ids=["L", "no errno", "u", "words", "no words", "cut"],
)
def test_an_error_is_counted_by_its_errno(
    watched: tuple[Rig, Reader], kind: int, body: bytes, number: int
) -> None:
    rig, seen = watched
    answered(rig, message(), kind, body)
    assert only(seen).errors == {number: 1}


@pytest.mark.parametrize("kind", [0, 7, TREAD + 1, 128, 255])
def test_what_is_no_known_kind_is_counted_together(watched: tuple[Rig, Reader], kind: int) -> None:
    rig, seen = watched
    answered(rig, message(message_type=kind), RLERROR, bytes(4))
    assert only(seen)[:2] == (0, 1)


def test_what_is_in_flight_and_what_is_dropped(watched: tuple[Rig, Reader]) -> None:
    rig, seen = watched
    heads = [rig.driver.submit([message(message_type=TWRITE)], [11]) for _ in range(3)]
    rig.take()
    assert seen.numbers.in_flight == 3
    rig.push(*((head, 0, 0, 0) for head in heads))
    assert (seen.numbers.in_flight, seen.numbers.dropped) == (0, 3)
    assert list(seen.messages()) == []


def test_a_reply_is_timed_from_when_its_request_was_taken(watched: tuple[Rig, Reader]) -> None:
    rig, seen = watched
    head = rig.driver.submit([message()], [11])
    rig.take()
    with open("/proc/self/stat") as file:  # some time, however short
        file.read()
    rig.push((head, RREAD, 7, 7))
    found = only(seen)
    assert found.seconds > 0
    at = found.buckets.index(1)
    assert ((0, *BOUNDS)[at]) < found.seconds <= BOUNDS[at]


def test_whoever_reads_cannot_write() -> None:
    _, fd = shared()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_another_process_goes_on_with_the_same_numbers() -> None:
    stats, fd = shared()
    seen = reader(fd)
    os.close(fd)
    for number in (1, 2):
        pid = os.fork()
        if not pid:
            stats.numbers.restarts += 1
            stats.numbers.fids = number
            os._exit(0)
        os.waitpid(pid, 0)
    assert (seen.numbers.restarts, seen.numbers.fids) == (2, 2)
    stats.forget_gauges()
    assert (seen.numbers.restarts, seen.numbers.fids) == (2, 0)


def test_what_nobody_shall_see_is_counted_all_the_same() -> None:
    stats = Stats()
    with closing(Rig(stats=stats)) as rig:
        answered(rig, message(), RREAD, bytes(4))
    assert stats.numbers.taken == 1


def test_what_a_guest_holds(tmp_path: Path) -> None:
    """Totals go on with the next guest; what there is now is what the last has said."""
    stats = Stats()
    tree = Tree(os.open(tmp_path, os.O_PATH), LocalHost(), budget=100)
    budget = tree.handles.budget
    first, second = (Service(tree, Limits(), "test", stats=stats) for _ in range(2))
    first.guest.add(1, tree.handles.share(tree.root), 0)
    budget.reclaims = 3
    first.take_stock()
    assert (stats.numbers.fids, stats.numbers.reclaims) == (1, 3)
    second.guest.add(1, tree.handles.share(tree.root), 0)
    second.guest.add(2, tree.handles.share(tree.root), 0)
    budget.reclaims = 2
    second.take_stock()
    first.take_stock()
    second.take_stock()
    assert (stats.numbers.fids, stats.numbers.reclaims, stats.numbers.descriptors) == (2, 5, 1)
    for service in (first, second):
        service.guest.end()
    tree.close()
