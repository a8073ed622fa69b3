"""Guest memory that changes below a parked ring: what is in flight is found again, or is not."""

import errno
import os
import tempfile
from contextlib import closing

import pytest

from ninepd.errors import RingBroken
from ninepd.vring import GuestMemory
from tests.support.driver import Driver, Region, Segment
from tests.support.vring_rig import MIB, UA, Rig, message

RING = Region(MIB, 2 * MIB, UA, 0)
DATA = Region(1 << 32, 2 * MIB, UA * 2, 2 * MIB)
OTHER = Region(1 << 33, MIB, UA * 3, 4 * MIB)


def two_regions() -> Rig:
    return Rig(Driver(size=8 * MIB, regions=[RING, DATA]))


def in_data(rig: Rig, tag: int = 1) -> int:
    """A taken request whose buffers lie in the second region."""
    d = rig.driver
    d.write(DATA.gpa, message(b"value", tag=tag))
    head = d.submit_segments([Segment(DATA.gpa, 12, False), Segment(DATA.gpa + 5000, 9000, True)])
    [(taken, *rest)] = rig.take()
    assert (taken, rest) == (head, [12, 9000, 12, 0])
    return head


def answered(rig: Rig, head: int) -> None:
    rig.ring.scatter(head, 4000, b"far")
    assert rig.ring.gather(head, 7, 5) == b"value"
    rig.answer(head, b"near")
    assert rig.driver.wait_used() == [(head, 4)]
    reply = rig.driver.reply(head)
    assert (reply[:4], reply[4000:4003]) == (b"near", b"far")


def test_unrelated_regions_come_and_go() -> None:
    with closing(two_regions()) as rig:
        head = in_data(rig)
        for _ in range(2):
            rig.memory.add(*OTHER, rig.driver.fd)
            rig.ring.relocate(rig.memory)
            rig.memory.remove(*OTHER[:3])
            rig.ring.relocate(rig.memory)
        assert rig.ring.continues()
        answered(rig, head)
        answered(rig, in_data(rig, 2))


@pytest.mark.parametrize("lost", [RING, DATA])
def test_a_region_returns(lost: Region) -> None:
    """QEMU removes and adds regions under a running ring; the new mapping lies elsewhere."""
    with closing(two_regions()) as rig:
        head = in_data(rig)
        rig.memory.remove(*lost[:3])
        if lost is RING:
            with pytest.raises(RingBroken, match="not inside one of the 1 memory regions"):
                rig.ring.relocate(rig.memory)
            assert not rig.ring.continues()
            with pytest.raises(RingBroken, match="not inside"):
                rig.take()
            with pytest.raises(RingBroken, match="not inside"):
                rig.push((head, 0, 0, 0))
        else:
            rig.ring.relocate(rig.memory)
        rig.memory.add(*OTHER, rig.driver.fd)  # takes the place of the old mapping, perhaps
        rig.memory.add(*lost, rig.driver.fd)
        rig.ring.relocate(rig.memory)
        answered(rig, head)


def test_another_memory_in_the_place_of_the_old() -> None:
    with closing(two_regions()) as rig, closing(GuestMemory()) as other:
        head = in_data(rig)
        for region in (DATA, OTHER, RING):
            other.add(*region, rig.driver.fd)
        rig.ring.relocate(other)
        rig.memory.close()
        answered(rig, head)
        answered(rig, in_data(rig, 2))


def test_a_broken_ring_is_not_looked_for_in_memory_that_has_gone() -> None:
    """A batch is delivered up to a malformed request; then the front end changes the memory."""
    with closing(two_regions()) as rig, closing(GuestMemory()) as other:
        head = in_data(rig)
        rig.driver.submit([message()])
        rig.driver.publish(rig.driver.num)
        assert len(rig.take()) == 1
        for region in (RING, DATA):
            other.add(*region, rig.driver.fd)
        with pytest.raises(RingBroken, match="head 128 is available"):
            rig.ring.relocate(other)
        assert not rig.ring.continues()
        with pytest.raises(RingBroken, match="head 128 is available"):
            rig.push((head, 0, 0, 0))
        assert rig.driver.take_used() == []


def test_an_equal_region_is_replaced_at_once_or_not_at_all() -> None:
    with closing(two_regions()) as rig, tempfile.TemporaryFile() as file:
        head = in_data(rig)
        with pytest.raises(OSError, match="No such device or address"):
            rig.memory.add(*DATA, file.fileno())  # too short
        rig.ring.relocate(rig.memory)
        file.truncate(8 * MIB)
        file.seek(DATA.offset)
        file.write(message(b"other"))
        file.flush()
        assert rig.ring.gather(head, 7, 5) == b"value"
        rig.memory.add(*DATA, file.fileno())
        rig.ring.relocate(rig.memory)
        assert rig.ring.gather(head, 7, 5) == b"other"


def test_a_request_whose_memory_is_gone_gets_no_reply() -> None:
    with closing(two_regions()) as rig, tempfile.TemporaryFile() as file:
        head = in_data(rig)
        before = rig.driver.read(DATA.gpa, 20000)
        rig.memory.remove(*DATA[:3])
        rig.ring.relocate(rig.memory)
        for attempt in (
            lambda: rig.ring.scatter(head, 0, b"x"),
            lambda: rig.ring.gather(head, 0, 1),
            lambda: rig.ring.readv(head, 0, file.fileno(), 1, 0),
            lambda: rig.ring.writev(head, 0, file.fileno(), 1, 0),
        ):
            with pytest.raises(OSError, match="Bad address") as caught:
                attempt()
            assert caught.value.errno == errno.EFAULT
        rig.answer(head, b"reply")
        assert rig.driver.wait_used() == [(head, 0)]
        assert rig.driver.read(DATA.gpa, 20000) == before
        assert rig.ring.counters.in_flight == 0
        # The ring goes on, with requests elsewhere.
        other = rig.driver.submit([message()])
        rig.take()
        rig.answer(other, b"reply")
        assert rig.driver.wait_used() == [(other, 5)]


def test_a_buffer_is_found_in_parts() -> None:
    """What was one region returns as two."""
    with closing(two_regions()) as rig:
        head = in_data(rig)
        rig.memory.remove(*DATA[:3])
        middle = 8192
        rest = DATA.size - middle
        rig.memory.add(DATA.gpa + middle, rest, UA * 4, DATA.offset + middle, rig.driver.fd)
        rig.ring.relocate(rig.memory)
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.gather(head, 7, 5)
        rig.memory.add(DATA.gpa, middle, UA * 5, DATA.offset, rig.driver.fd)
        rig.ring.relocate(rig.memory)
        answered(rig, head)


def test_a_broken_ring_stays_broken() -> None:
    with closing(two_regions()) as rig:
        rig.driver.publish(rig.driver.num)
        for _ in range(2):
            with pytest.raises(RingBroken, match="head 128"):
                rig.take()
            with pytest.raises(RingBroken, match="head 128"):
                rig.ring.relocate(rig.memory)


def test_a_ring_that_was_begun_anew_is_noticed() -> None:
    with closing(two_regions()) as rig:
        head = rig.driver.submit([message()])
        rig.take()
        assert rig.ring.continues()
        rig.answer(head, b"reply")
        assert rig.ring.continues()
        rig.driver.used_idx = 0
        assert not rig.ring.continues()


def test_slots_are_few_however_large_the_ring() -> None:
    """What a request needs lies where the last one's was: memory is used as requests are out."""
    with closing(Rig(Driver(num=32768, size=32 * MIB))) as rig:
        for _ in range(1000):
            heads = [rig.driver.submit([message()]) for _ in range(3)]
            assert [taken[0] for taken in rig.take()] == heads
            assert {rig.ring.slot(head) for head in heads} == {0, 1, 2}
            rig.push(*((head, 0, 0, 0) for head in heads))
            rig.driver.take_used()
            rig.driver._free = rig.driver._free[-3:] + rig.driver._free[:-3]
            for head in heads:
                rig.driver.free(head)


def test_a_large_ring_is_set_up_in_little_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    driver = Driver(num=32768, size=8 * MIB)
    before = resident()
    with closing(Rig(driver)):
        assert resident() - before < 8 * MIB
