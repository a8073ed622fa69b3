"""The dirty log: exactly the pages that the device wrote to, and marked after that."""

import mmap
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from ninepd.vring import LOG_PAGE, DirtyLog
from tests.support.driver import Driver, Region, Segment
from tests.support.vring_rig import MIB, TWRITE, UA, Rig, message, started_rig

rig = pytest.fixture(started_rig)
SCATTERED = [Region(MIB, 4 * MIB, UA, 0), Region(1 << 32, 4 * MIB, UA * 2, 4 * MIB)]


class Log:
    """The front end's end of a log."""

    def __init__(self, rig: Rig, size: int = (1 << 32) // LOG_PAGE // 8 + MIB) -> None:
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 4096 + size)
        self.bits = mmap.mmap(self.fd, 4096 + size)
        self.log = DirtyLog(size, 4096, self.fd)
        d = rig.driver
        rig.ring.set_log(self.log, d.gpa(d.used))

    def take(self) -> set[int]:
        """The pages that are marked; none is any more."""
        data = bytes(self.bits[4096:])
        self.bits[4096:] = bytes(len(data))
        marked = [at for at, byte in enumerate(data) if byte]
        return {8 * at + bit for at in marked for bit in range(8) if data[at] >> bit & 1}

    def close(self) -> None:
        os.close(self.fd)
        self.bits.close()


@pytest.fixture
def log(rig: Rig) -> Iterator[Log]:
    with closing(Log(rig)) as it:
        yield it


def page(address: int) -> int:
    return address // LOG_PAGE


def changed(before: dict[int, bytes], after: dict[int, bytes]) -> set[int]:
    return {number for number, data in after.items() if data != before[number]}


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_log_is_what_a_comparison_finds(event_idx: bool, seed: int) -> None:
    """Random requests, each way of writing, in two regions: what differs is marked, and no more."""
    chance = random.Random(seed)
    driver = Driver(size=8 * MIB, regions=SCATTERED, event_idx=event_idx)
    with (
        closing(Rig(driver)) as rig,
        closing(Log(rig)) as log,
        tempfile.TemporaryFile() as file,
    ):
        file.write(chance.randbytes(MIB))
        file.flush()
        rig.ring.wake()
        rig.take()
        log.take()
        marked, differing = set(), set()
        for turn in range(60):
            places = [
                Segment(chance.choice(SCATTERED).gpa + MIB + chance.randrange(2 * MIB), n, True)
                for n in (chance.randrange(1, 9000) for _ in range(chance.randrange(1, 6)))
            ]
            request = driver.allocate(4096)
            driver.write(request, message(tag=turn))
            head = driver.submit_segments([Segment(request, 7, False), *places], indirect=True)
            before = driver.pages()
            assert [taken[0] for taken in rig.take()] == [head]
            room = sum(place.length for place in places)
            start = chance.randrange(room)
            match turn % 3:
                case 0:
                    count = chance.randrange(20000)
                    at = chance.randrange(MIB)
                    rig.ring.readv(head, start, file.fileno(), count, at)
                case 1:
                    data = chance.randbytes(chance.randrange(room - start + 1))
                    rig.ring.scatter(head, start, data)
                case 2:
                    size = min(room, rig.ring.reply_stride)
                    rig.put(head, chance.randbytes(size))
                    rig.push((head, 0, size, room))
            if turn % 3 != 2:
                rig.push((head, 0, 0, room))
            driver.take_used()
            driver.free(head)
            pages = log.take()
            difference = changed(before, driver.pages())
            assert difference <= pages
            # A byte may have been overwritten by an equal one.
            marked |= pages
            differing |= difference
        assert marked == differing


def test_no_more_than_what_a_move_wrote(rig: Rig, log: Log) -> None:
    d = rig.driver
    request, reply = d.allocate(4096), d.allocate(16 * LOG_PAGE, LOG_PAGE)
    d.write(request, message())
    head = d.submit_segments([Segment(request, 7, False), Segment(reply, 16 * LOG_PAGE, True)])
    rig.take()
    log.take()
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 5000)
        file.flush()
        assert rig.ring.readv(head, LOG_PAGE, file.fileno(), 15 * LOG_PAGE, 0) == 5000
        first = page(reply)
        assert log.take() == {first + 1, first + 2}
        assert rig.ring.readv(head, 0, file.fileno(), 100, 6000) == 0
        assert log.take() == set()
        assert rig.ring.writev(head, 0, file.fileno(), 7, 0) == 7
        assert rig.ring.gather(head, 0, 7) == message()
        assert log.take() == set()
        rig.ring.scatter(head, 2 * LOG_PAGE - 1, b"ab")
        assert log.take() == {first + 1, first + 2}
        with pytest.raises(OSError, match="Bad file descriptor"):
            rig.ring.readv(head, 0, -1, 100, 0)
    log.take()  # of a read that failed who knows what it wrote
    rig.push((head, 0, 0, 0))
    assert log.take() == {page(d.gpa(d.used))}


def test_each_part_of_the_used_ring_is_marked() -> None:
    """A ring of 4096 has its elements on nine pages, and avail_event on the last."""
    with closing(Rig(Driver(num=4096, size=16 * MIB))) as rig, closing(Log(rig)) as log:
        d = rig.driver
        heads = [d.submit([message()]) for _ in range(1000)]
        while heads:
            taken = [request[0] for request in rig.take()]
            log.take()
            before = d.pages()
            # Of no length zero, which is there already.
            rig.push(*((head, 0, 0, 1) for head in taken))
            assert log.take() == changed(before, d.pages())
            heads = heads[len(taken) :]
        before = d.pages()
        waiter = threading.Thread(target=rig.take)
        waiter.start()
        while d.avail_event != d.next_avail & 0xFFFF:
            os.sched_yield()
        rig.ring.wake()
        waiter.join()
        assert log.take() == changed(before, d.pages()) == {page(d.gpa(d.used) + 4 + 8 * 4096)}


def test_the_used_ring_is_logged_only_if_asked(rig: Rig, log: Log) -> None:
    rig.ring.set_log(log.log, None)
    head = rig.driver.submit([message()])
    rig.take()
    rig.answer(head, b"reply")
    address = next(s.addr for s in rig.driver._chains[head][1] if s.writable)
    assert log.take() == {page(address)}
    rig.ring.set_log(None)
    head = rig.driver.submit([message()])
    rig.take()
    rig.answer(head, b"reply")
    assert log.take() == set()


def test_a_page_beyond_the_log_is_counted(rig: Rig) -> None:
    """QEMU takes any size; a log that is too small must not end anything."""
    with closing(Log(rig, size=1)) as log:
        head = rig.driver.submit([message()])
        rig.take()
        rig.answer(head, b"reply")
        assert rig.driver.take_used() == [(head, 5)]
        assert log.take() == set()
        assert log.log.skipped > 0
        rig.ring.set_log(log.log, (1 << 64) - 6)  # the used ring's place wraps around
        head = rig.driver.submit([message()])
        rig.take()
        rig.answer(head, b"reply")


def test_a_log_that_vanishes_harms_nobody(rig: Rig, log: Log) -> None:
    os.ftruncate(log.fd, 0)
    head = rig.driver.submit([message()])
    rig.take()
    rig.answer(head, b"reply")
    assert rig.driver.take_used() == [(head, 5)]
    rig.ring.wake()
    assert rig.take() == []


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (1 << 63, 0), (4096, 1 << 63), (4097, 4096)])
def test_logs_that_cannot_be_mapped(size: int, offset: int) -> None:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8192)
    with pytest.raises((OSError, OverflowError)):
        DirtyLog(size, offset, fd)
    os.close(fd)


def test_new_marks_are_told(rig: Rig, log: Log) -> None:
    signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    log.log.set_signal(signal)
    for _ in range(3):
        head = rig.driver.submit([message(bytes(16), TWRITE)])
        rig.take()
        rig.answer(head, b"reply")
        rig.driver.reply(head)
        assert os.eventfd_read(signal) == 1
    log.log.set_signal(-1)
    os.close(signal)
