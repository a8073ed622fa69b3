"""The virtqueue against an honest and a broken driver: what is served, and what cannot be."""

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from ninepd import vring as vring_module
from ninepd.errors import RingBroken
from ninepd.vring import GuestMemory, Vring
from tests.support.driver import INDIRECT, NEXT, WRITE, Driver, Region, Segment, encode_desc
from tests.support.vring_rig import MIB, NOWHERE, TWRITE, UA, Rig, hole, message, started_rig

rig = pytest.fixture(started_rig)


def test_this_is_the_build_under_test() -> None:
    """The sanitizer run says which tree it means; being somewhere else would prove nothing."""
    tree = os.environ.get("NINEPD_SANITIZED_TREE")
    if tree is None:
        pytest.skip("an ordinary run")
    assert Path(vring_module.__file__).is_relative_to(tree)
    assert Path(vring_module._module.__file__ or "").is_relative_to(tree)
    assert b"__asan_init" in Path(vring_module._module.__file__ or "").read_bytes()
    assert "libasan" in Path("/proc/self/maps").read_text()


# ---- the ordinary way of a request ----


@pytest.mark.parametrize("indirect", [False, True])
def test_round_trip(rig: Rig, indirect: bool) -> None:
    request = message(b"x" * 16)
    head = rig.driver.submit([request], [11, 100], indirect=indirect)
    assert rig.take() == [(head, 23, 111, 23, 0)]
    assert rig.header(head, 23) == request
    assert rig.ring.counters.in_flight == 1
    rig.answer(head, b"r" * 20)
    assert rig.driver.wait_used() == [(head, 20)]
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"r" * 20 + bytes(91)
    assert rig.ring.counters.in_flight == 0


@pytest.mark.parametrize("indirect", [False, True])
def test_header_straddles_descriptors_byte_by_byte(rig: Rig, indirect: bool) -> None:
    request = message(b"0123456789abcdef", TWRITE) + b"payload"
    head = rig.driver.submit([bytes([b]) for b in request], [1] * 11, indirect=indirect, align=16)
    assert rig.take() == [(head, 30, 11, 23, 0)]
    assert rig.header(head, 23) == request[:23]
    assert rig.ring.gather(head, 23, 7) == b"payload"
    rig.answer(head, b"rlerror-011")
    assert rig.driver.wait_used() == [(head, 11)]
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"rlerror-011"


def test_header_limits_by_type(rig: Rig) -> None:
    long = message(bytes(20000))
    heads = [
        rig.driver.submit([message(bytes(5000), TWRITE)]),
        rig.driver.submit([long]),
        rig.driver.submit([message()]),
    ]
    lengths = {head: header for head, _, _, header, _ in rig.take()}
    assert lengths == {heads[0]: 23, heads[1]: rig.ring.header_stride, heads[2]: 7}
    assert rig.header(heads[1], rig.ring.header_stride) == long[: rig.ring.header_stride]


def test_indices_wrap_and_a_ring_resumes_at_its_base() -> None:
    with closing(Rig(num=8, base=65530)) as rig:
        for i in range(40):
            head = rig.driver.submit([message(tag=i)])
            rig.driver.kick()
            assert [r[0] for r in rig.take()] == [head]
            rig.answer(head, bytes([i]))
            assert rig.driver.wait_used() == [(head, 1)]
            assert rig.driver.reply(head, 1) == bytes([i])
        assert rig.ring.counters.last_avail == rig.ring.counters.used_index == (65530 + 40) % 65536
        assert rig.driver.used_idx == rig.ring.counters.used_index


def test_batches(rig: Rig) -> None:
    heads = [rig.driver.submit([message(tag=i)]) for i in range(60)]
    assert [r[0] for r in rig.take()] == heads
    rig.push(*((head, 0, 0, 0) for head in reversed(heads)))
    assert rig.driver.wait_used(count=60) == [(head, 0) for head in reversed(heads)]
    assert rig.driver.called()
    assert rig.ring.stats.numbers.calls == 1


def test_a_batch_is_bounded() -> None:
    with closing(Rig(batch=4)) as rig:
        heads = [rig.driver.submit([message()]) for _ in range(10)]
        assert [[r[0] for r in rig.take()] for _ in range(3)] == [heads[:4], heads[4:8], heads[8:]]


def test_push_refuses_what_does_not_fit(rig: Rig) -> None:
    head = rig.driver.submit([message()], [10])
    for wrong in [(head, 0, 0, 0), (127, 0, 0, 0), (1 << 31, 0, 0, 0)]:
        with pytest.raises(ValueError, match="push"):
            rig.push(wrong)  # nothing is taken yet
    rig.take()
    for wrong in [
        (head, 0, 11, 10),
        (head, 0, 10, 11),
        (head, 0, 257, 10),
        (head, 7, 6, 10),
        (head, 0, 10, 1 << 28),
        (head, 0, 1 << 12, 10),
        (head, 1 << 8, 10, 10),
        (head, 0, 10, -1),
    ]:
        with pytest.raises(ValueError, match="push"):
            rig.push(wrong)
    with pytest.raises(ValueError, match="push"):
        rig.ring.push([32767 << 48])
    assert rig.driver.used_idx == 0
    rig.push((head, 0, 10, 10))
    assert rig.driver.used_idx == 1
    assert rig.driver.guards_intact(head)
    with pytest.raises(ValueError, match="push"):
        rig.push((head, 0, 10, 10))
    with pytest.raises(ValueError, match="push"):
        rig.ring.push(129 * [0])


def test_push_writes_the_header_of_a_reply(rig: Rig) -> None:
    """Size and type as told, tag of the request, in front of what the reply buffer holds."""
    heads = [rig.driver.submit([message(tag=tag)], [20]) for tag in (0x1234, 0xFFFF)]
    rig.take()
    for head in heads:
        rig.put(head, b"headers" + b"abc")
    rig.push((heads[0], 25, 10, 10), (heads[1], 117, 7, 15))
    assert rig.driver.take_used() == [(heads[0], 10), (heads[1], 15)]
    assert rig.driver.reply(heads[0], 10) == b"\x0a\0\0\0\x19\x34\x12" + b"abc"
    assert rig.driver.reply(heads[1], 15)[:7] == b"\x0f\0\0\0\x75\xff\xff"


def test_closed_ring_is_a_type_error(rig: Rig) -> None:
    rig.ring.close()
    rig.ring.close()
    with pytest.raises(TypeError):
        rig.ring.wait(0)
    assert rig.ring.counters.last_avail == 0


# ---- chains that can be answered (reaction R) ----


def test_zero_length_segments_are_skipped(rig: Rig) -> None:
    head = rig.driver.submit([b"", message(), b""], [0, 11, 0])
    assert rig.take() == [(head, 7, 11, 7, 0)]


def test_header_is_reported_as_it_came(rig: Rig) -> None:
    head = rig.driver.submit([b"\x78\x56\x34\x12", b"\xfe\xcd\xab", b"more"], [11])
    assert rig.take_whole() == [(head, 11, 11, 11, 0, 0x12345678, 0xFE, 0xABCD)]
    head = rig.driver.submit([b"\x07\0\0\0\x7f\x01"], [11])
    assert rig.take_whole() == [(head, 6, 11, 6, errno.EBADMSG, 0, 0, 0)]


@pytest.mark.threat("t_desc_oob")
def test_holes_end_a_stream_and_are_reported(rig: Rig) -> None:
    d = rig.driver
    good, end = d.allocate(4096), d.gpa(d.size - 1) + 1
    d.write(good, message())
    wrap = (1 << 64) - 1
    assert hole(rig, (NOWHERE, 7, False), (good, 11, True)) == (0, 11, 0, errno.EFAULT)
    assert hole(rig, (good, 7, False), (NOWHERE, 11, True)) == (7, 0, 7, errno.EFAULT)
    assert hole(rig, (good, 7, False), (end - 5, 11, True)) == (7, 5, 7, errno.EFAULT)
    assert hole(rig, (good, 7, False), (wrap, 11, True)) == (7, 0, 7, errno.EFAULT)
    assert hole(rig, (good, 7, False), (good, 7, True), (NOWHERE, 9, True), (good, 9, True)) == (
        (7, 7, 7, errno.EFAULT)
    )
    assert hole(rig, (end, 1, False), (good, 7, False), (good, 9, True)) == (0, 9, 0, errno.EFAULT)
    assert hole(rig, (good, 0xFFFF_FFFF, False), (good, 9, True))[1:] == (9, 8704, errno.EFAULT)


def test_short_and_lopsided_requests(rig: Rig) -> None:
    d = rig.driver
    at = d.allocate(4096)
    assert hole(rig, (at, 100, True)) == (0, 100, 0, errno.EBADMSG)
    assert hole(rig, (at, 6, False), (at, 1, True)) == (6, 1, 6, errno.EBADMSG)
    d.write(at, message())
    assert hole(rig, (at, 7, False)) == (7, 0, 7, 0)


def test_totals_beyond_32_bits_saturate(rig: Rig) -> None:
    d = Driver(size=2 * MIB)
    with closing(Rig(d)) as big:
        at = d.allocate(MIB)
        d.write(at, message(message_type=TWRITE))
        table = [Segment(at, MIB, writable=False)] * 1024
        # A table on the heap, beside the data: 1024 times the same mebibyte is a gibibyte...
        head = d.submit_segments(table, indirect=True)
        assert big.take() == [(head, 1 << 30, 0, 23, 0)]
    # ...and five of them in one chain need more entries than one table holds.
    size = 8 * MIB
    d = Driver(size=size)
    with closing(Rig(d)) as big:
        room = 5 * MIB
        at = d.allocate(room)
        d.write(at, message(message_type=TWRITE))
        head = d.submit_segments([Segment(at, room, writable=False)] * 1000, indirect=True)
        assert big.take() == [(head, 0xFFFF_FFFF, 0, 23, 0)]


@pytest.mark.parametrize(("stride", "result"), [(2, (1023, errno.E2BIG)), (1, (1024, 0))])
def test_too_many_segments_are_a_fault(rig: Rig, stride: int, result: tuple[int, int]) -> None:
    """A direct chain may continue into a table: together more than the 1024 segments we keep.

    Contiguous buffers become one segment.
    """
    d = rig.driver
    at = d.allocate(2048)
    d.write(at, message())
    table = d.allocate(16 * 1024, 16)
    for i in range(1024):
        flags = WRITE | (NEXT if i < 1023 else 0)
        d.write(table + 16 * i, encode_desc(at + stride * i, 1, flags, (i + 1) % 1024))
    d.write_desc(0, at, 7, NEXT, 1)
    d.write_desc(1, table, 16 * 1024, INDIRECT, 0)
    d.publish(0)
    writable, fault = result
    assert rig.take() == [(0, 7, writable, 7, fault)]


def test_direct_descriptors_followed_by_a_table(rig: Rig) -> None:
    d = rig.driver
    out, reply, table = d.allocate(7), d.allocate(50), d.allocate(32, 16)
    d.write(out, message())
    d.write(table, encode_desc(reply, 20, WRITE | NEXT, 1) + encode_desc(reply + 20, 30, WRITE, 0))
    d.write_desc(5, out, 7, NEXT, 9)
    d.write_desc(9, table, 32, INDIRECT, 0)
    d.publish(5)
    assert rig.take() == [(5, 7, 50, 7, 0)]


def test_long_tables_on_a_short_ring() -> None:
    """Linux puts 128 entries on a 64-entry ring; the segments here are not contiguous."""
    with closing(Rig(num=64)) as rig:
        head = rig.driver.submit([message()] + [b"ab"] * 60, [2] * 67, indirect=True, align=32)
        assert rig.take() == [(head, 127, 134, 127, 0)]
        rig.ring.scatter(head, 0, bytes(range(134)))
        rig.push((head, 0, 0, 134))
        assert rig.driver.guards_intact(head)
        assert rig.driver.reply(head) == bytes(range(134))


# ---- rings that cannot be served (reaction B) ----


@pytest.mark.threat("t_desc_loop", "t_indirect")
def test_every_malformed_chain_breaks_the_ring_and_only_it() -> None:
    for name, (craft, reason) in MALFORMED.items():
        with closing(Rig()) as rig:
            d = rig.driver
            first = d.submit([message()])
            craft(d)
            # What came before is served; then the ring is broken, and stays so.
            assert [r[0] for r in rig.take()] == [first], name
            for _ in range(2):
                with pytest.raises(RingBroken, match=reason):
                    rig.take()
            rig.answer(first, b"still works")
            assert d.wait_used() == [(first, 11)]


def head_out_of_range(d: Driver) -> None:
    d.publish(d.num)


def same_head_twice(d: Driver) -> None:
    d.publish(next(iter(d._chains)))


def self_loop(d: Driver) -> None:
    d.write_desc(3, d.gpa(d.heap), 1, NEXT, 3)
    d.publish(3)


def two_cycle(d: Driver) -> None:
    d.write_desc(3, d.gpa(d.heap), 1, NEXT, 4)
    d.write_desc(4, d.gpa(d.heap), 1, NEXT, 3)
    d.publish(3)


def long_loop(d: Driver) -> None:
    for i in range(3, d.num):
        d.write_desc(i, d.gpa(d.heap), 1, NEXT, i + 1 if i + 1 < d.num else 3)
    d.publish(3)


def next_out_of_range(d: Driver) -> None:
    d.write_desc(3, d.gpa(d.heap), 1, NEXT, d.num)
    d.publish(3)


def readable_after_writable(d: Driver) -> None:
    d.write_desc(3, d.gpa(d.heap), 8, WRITE | NEXT, 4)
    d.write_desc(4, d.gpa(d.heap), 8, 0, 0)
    d.publish(3)


def table(*entries: bytes, length: int | None = None, flags: int = 0) -> Callable[[Driver], None]:
    def craft(d: Driver) -> None:
        at = d.gpa(d.heap + MIB)
        d.write(at, b"".join(entries))
        size = 16 * len(entries) if length is None else length
        d.write_desc(3, at, size, INDIRECT | flags, 4)
        d.publish(3)

    return craft


def unmapped_table(d: Driver) -> None:
    d.write_desc(3, NOWHERE, 16, INDIRECT, 0)
    d.publish(3)


def table_beyond_the_end(d: Driver) -> None:
    d.write_desc(3, d.gpa(d.size - 16), 32, INDIRECT, 0)
    d.publish(3)


SOME = encode_desc(0x20_0000, 16, 0, 0)
MALFORMED: dict[str, tuple[Callable[[Driver], None], str]] = {
    "head": (head_out_of_range, "head 128 is available on a ring of 128"),
    "twice": (same_head_twice, "while in flight"),
    "self loop": (self_loop, "loops"),
    "two-cycle": (two_cycle, "loops"),
    "long loop": (long_loop, "loops"),
    "next": (next_out_of_range, "descriptor 128 is chained in a table of 128"),
    "order": (readable_after_writable, "readable descriptor after a writable"),
    "table of nothing": (table(length=0), "table of 0 bytes"),
    "table of half": (table(SOME, length=8), "table of 8 bytes"),
    "table of one and a bit": (table(SOME, SOME, length=17), "table of 17 bytes"),
    "table of 1025": (table(SOME, length=1025 * 16), "table of 16400 bytes"),
    "huge table": (table(SOME, length=0xFFFF_FFF0), "table of 4294967280 bytes"),
    "table and next": (table(SOME, flags=NEXT), "both INDIRECT and NEXT"),
    "table in table": (table(encode_desc(0, 16, INDIRECT, 0)), "inside an indirect table"),
    "next in table": (table(encode_desc(0, 16, NEXT, 1)), "loops"),
    "far in table": (table(encode_desc(0, 0, NEXT, 2), SOME), "descriptor 2 is chained"),
    "loop in table": (table(*[encode_desc(0, 0, NEXT, 0)] * 2), "loops"),
    "table unmapped": (unmapped_table, "outside guest memory, at 0x4000000000000"),
    "table beyond": (table_beyond_the_end, "outside guest memory"),
}


@pytest.mark.threat("t_indirect")
def test_indirect_without_the_feature() -> None:
    with closing(Rig(indirect=False)) as rig:
        rig.driver.submit([message()], indirect=True)
        with pytest.raises(RingBroken, match="not negotiated"):
            rig.take()


@pytest.mark.threat("t_avail_jump")
@pytest.mark.parametrize("jump", [129, -1, 32768])
def test_available_index_jumps(rig: Rig, jump: int) -> None:
    rig.driver.avail_idx += jump
    with pytest.raises(RingBroken, match="entries ahead on a ring of 128"):
        rig.take()


def start(
    d: Driver,
    *,
    num: int | None = None,
    desc: int | None = None,
    used: int | None = None,
    avail: int | None = None,
) -> None:
    with closing(GuestMemory()) as memory:
        for region in d.regions:
            memory.add(*region, d.fd)
        Vring(
            memory,
            num=d.num if num is None else num,
            desc=d.user_addr(d.desc) if desc is None else desc,
            used=d.user_addr(d.used) if used is None else used,
            avail=d.user_addr(d.avail) if avail is None else avail,
            base=0,
            event_idx=True,
            indirect=True,
            kick=d.kick_fd,
            call=-1,
            wake=-1,
        ).close()


def test_ring_set_up() -> None:
    with closing(Driver(num=256)) as d:
        start(d)
        start(d, num=1)
        end = d.user_addr(d.size - 1) + 1
        for num in (0, 3, 65536, 0x8000_0001):
            with pytest.raises(RingBroken, match="not a power of two"):
                start(d, num=num)
        for part, size in (("desc", 4096), ("avail", 518), ("used", 2054)):
            with pytest.raises(RingBroken, match="not aligned"):
                start(d, **{part: d.user_addr(d.heap) + 1})
            with pytest.raises(RingBroken, match="not inside one of the 1 memory"):
                start(d, **{part: 0})
            with pytest.raises(RingBroken, match="not inside one of the 1 memory"):
                start(d, **{part: (1 << 64) - 16})
            fits = (end - size) // 16 * 16
            start(d, **{part: fits})
            with pytest.raises(RingBroken, match="not inside one of the 1 memory"):
                start(d, **{part: fits + 16})
        with pytest.raises(RingBroken, match="overlap"):
            start(d, used=d.user_addr(d.desc) + 16)


def test_a_part_must_lie_in_one_region() -> None:
    """Adjacent is not enough: the ring is used through one pointer."""
    regions = [Region(0, 2048, UA, 0), Region(2048, 8 * MIB - 2048, UA + 2048, 2048)]
    with closing(Driver(num=256, regions=regions)) as d, pytest.raises(RingBroken, match="desc"):
        start(d)
