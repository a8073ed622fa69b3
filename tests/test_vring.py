"""The virtqueue against an honest, a broken and a hostile driver."""

import contextlib
import errno
import fcntl
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ninepd import vring as vring_module
from ninepd.errors import RingBroken
from ninepd.vring import DONE, REQUEST, GuestMemory, Vring, signal_err
from tests.driver import (
    INDIRECT,
    NEXT,
    WRITE,
    Driver,
    Region,
    Segment,
    encode_desc,
)

TWRITE, TREAD = 118, 116
UA = 0x7F00_0000_0000
MIB = 1 << 20
NOWHERE = 1 << 50


class Rig:
    """A driver, its memory as the device sees it, and a started ring."""

    def __init__(
        self,
        driver: Driver | None = None,
        *,
        num: int = 128,
        event_idx: bool = True,
        indirect: bool = True,
        base: int = 0,
        batch: int = 64,
        call: bool = True,
    ) -> None:
        self.driver = d = driver or Driver(num, event_idx=event_idx, base=base)
        self.memory = GuestMemory()
        for region in d.regions:
            self.memory.add(*region, d.fd)
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.ring = Vring(
            self.memory,
            num=d.num,
            desc=d.user_addr(d.desc),
            used=d.user_addr(d.used),
            avail=d.user_addr(d.avail),
            base=d.avail_idx,
            event_idx=d.event_idx,
            indirect=indirect,
            kick=d.kick_fd,
            call=d.call_fd if call else -1,
            wake=self.wake,
            header_limits={TWRITE: 23},
            batch=batch,
        )

    def close(self) -> None:
        self.ring.close()
        self.memory.close()
        self.driver.close()
        os.close(self.wake)

    def take(self, spin: int = 0) -> list[tuple[int, ...]]:
        return [entry[:5] for entry in self.take_whole(spin)]

    def take_whole(self, spin: int = 0) -> list[tuple[int, ...]]:
        n = self.ring.wait(spin)
        return list(REQUEST.iter_unpack(self.ring.batch[: n * REQUEST.size]))

    def header(self, head: int, length: int) -> bytes:
        start = head * self.ring.header_stride
        return bytes(self.ring.headers[start : start + length])

    def answer(self, head: int, reply: bytes) -> None:
        start = head * self.ring.reply_stride
        self.ring.replies[start : start + len(reply)] = reply
        self.push((head, 0, len(reply), len(reply)))

    def push(self, *entries: tuple[int, int, int, int]) -> None:
        for i, entry in enumerate(entries):
            DONE.pack_into(self.ring.done, i * DONE.size, *entry)
        self.ring.push(len(entries))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with closing(Rig()) as it:
        yield it


def message(body: bytes = b"", message_type: int = TREAD, tag: int = 1) -> bytes:
    return (
        (7 + len(body)).to_bytes(4, "little")
        + bytes([message_type])
        + tag.to_bytes(2, "little")
        + body
    )


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


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
    assert rig.ring.counters.calls == 1


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
    for wrong in [(head, 0, 11, 10), (head, 0, 10, 11), (head, 0, 257, 10), (head, 7, 6, 10)]:
        with pytest.raises(ValueError, match="push"):
            rig.push(wrong)
    assert rig.driver.used_idx == 0
    rig.push((head, 0, 10, 10))
    assert rig.driver.used_idx == 1
    assert rig.driver.guards_intact(head)
    with pytest.raises(ValueError, match="push"):
        rig.push((head, 0, 10, 10))
    with pytest.raises(ValueError, match="push"):
        rig.ring.push(129)


def test_push_writes_the_header_of_a_reply(rig: Rig) -> None:
    """Size and type as told, tag of the request, in front of what the reply buffer holds."""
    heads = [rig.driver.submit([message(tag=tag)], [20]) for tag in (0x1234, 0xFFFF)]
    rig.take()
    for head in heads:
        at = head * rig.ring.reply_stride
        rig.ring.replies[at : at + 10] = b"headers" + b"abc"
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


def hole(rig: Rig, *segments: tuple[int, int, bool]) -> tuple[int, int, int, int]:
    head = rig.driver.submit_segments([Segment(*s) for s in segments])
    [(taken, readable, writable, header_len, fault)] = rig.take()
    assert taken == head
    return readable, writable, header_len, fault


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


def test_indirect_without_the_feature() -> None:
    with closing(Rig(indirect=False)) as rig:
        rig.driver.submit([message()], indirect=True)
        with pytest.raises(RingBroken, match="not negotiated"):
            rig.take()


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


# ---- a driver that rewrites under our eyes ----


def test_rewriting_driver_sees_one_consistent_snapshot() -> None:
    """Whatever is raced, lengths and header belong together and only the two variants appear."""
    with closing(Rig(Driver(num=16, size=4 * MIB))) as rig:
        d = rig.driver
        at, reply = d.allocate(4096), d.allocate(4096)
        short, long = message(b"s" * 13, TREAD), message(b"L" * 193, TWRITE)
        stop = threading.Event()

        def rewrite() -> None:
            flip = 0
            while not stop.is_set():
                flip += 1
                d.bytes[d.offset(at) : d.offset(at) + 7] = (short, long)[flip & 1][:7]
                d.write_desc(0, (at, at, NOWHERE)[flip % 3], (20, 0xFFFF_FF00)[flip & 1], NEXT, 1)
                d.write_desc(1, reply, (11, 4096)[flip & 1], WRITE, 0)

        d.write_desc(0, at, 20, NEXT, 1)
        d.write_desc(1, reply, 11, WRITE, 0)
        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            seen = set()
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                d.publish(0)
                for head, readable, writable, header_len, fault in rig.take():
                    header = rig.header(head, header_len)
                    seen.add((readable, fault))
                    limit = 23 if header[4:5] == bytes([TWRITE]) else 8704
                    assert header_len == min(readable, limit)
                    assert writable in (11, 4096)
                    assert fault in (0, errno.EFAULT)
                    if header:
                        assert rig.ring.gather(head, 0, 0) == b""
                    rig.push((head, 0, 0, 0))
        finally:
            stop.set()
            thread.join()
        assert len(seen) > 1


# ---- notification suppression ----


def test_event_idx_kicks_only_an_idle_device(rig: Rig) -> None:
    d = rig.driver
    assert not kicked_while_busy(rig)
    idle = threading.Thread(target=rig.take)
    idle.start()
    wait_for(lambda: d.avail_event == d.avail_idx)
    d.submit([message()])
    assert d.kick()
    idle.join()
    assert not kicked_while_busy(rig)


def kicked_while_busy(rig: Rig) -> bool:
    """Requests that arrive while the device works need no kick, except maybe the very first."""
    rig.driver.submit([message()])
    rig.driver.kick()
    rig.take()
    rig.driver.submit([message()])
    kicked = rig.driver.kick()
    rig.take()
    return kicked


def test_flags_kick_only_an_idle_device() -> None:
    with closing(Rig(event_idx=False)) as rig:
        d = rig.driver
        idle = threading.Thread(target=rig.take)
        idle.start()
        wait_for(lambda: rig.ring.counters.sleeps == 1)
        d.submit([message()])
        assert d.kick()
        idle.join()
        assert d.used_flags == 1
        d.submit([message()])
        assert not d.kick()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_event_idx_calls_only_when_asked(rig: Rig) -> None:
    d = rig.driver
    heads = [d.submit([message()]) for _ in range(6)]
    rig.take()
    d.used_event = 40
    rig.push((heads[0], 0, 0, 0))
    assert d.called()  # the first decision after a start always notifies
    rig.push((heads[1], 0, 0, 0))
    assert not d.called()
    d.used_event = 3
    rig.push((heads[2], 0, 0, 0))  # used index 3: not past it yet
    assert not d.called()
    rig.push((heads[3], 0, 0, 0), (heads[4], 0, 0, 0))
    assert d.called()
    rig.push((heads[5], 0, 0, 0))
    assert not d.called()
    assert rig.ring.counters.calls == 2


def test_flags_call_only_when_asked() -> None:
    with closing(Rig(event_idx=False)) as rig:
        d = rig.driver
        heads = [d.submit([message()]) for _ in range(2)]
        rig.take()
        d.avail_flags = 1
        rig.push((heads[0], 0, 0, 0))
        assert not d.called()
        d.avail_flags = 0
        rig.push((heads[1], 0, 0, 0))
        assert d.called()


def test_call_socket_full_and_hung_up() -> None:
    """User-Mode Linux's call descriptor: EAGAIN is a pending signal, EPIPE a peer that left."""
    with closing(Rig(Driver(call_socket=True))) as rig:
        d = rig.driver
        for i in range(2000):
            head = d.submit([message()])
            d.used_event = d.used_idx
            rig.take()
            if i == 1000:
                d._call_end.shutdown(2)
            rig.push((head, 0, 0, 0))
            d.reply(head)
        assert rig.ring.counters.calls == 2000


def test_no_call_descriptor_and_a_late_one() -> None:
    with closing(Rig(call=False)) as rig:
        d = rig.driver
        heads = [d.submit([message()]) for _ in range(2)]
        rig.take()
        rig.push((heads[0], 0, 0, 0))
        rig.ring.set_call(d.call_fd)
        d.used_event = 1
        rig.push((heads[1], 0, 0, 0))
        assert d.called()
        rig.ring.set_call(-1)


def test_a_blocking_call_descriptor_that_is_full(rig: Rig) -> None:
    """An eventfd at its limit would block a write for ever; the driver only hurts itself."""
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, (1 << 64) - 2)
    rig.ring.set_call(full)
    head = rig.driver.submit([message()])
    rig.take()
    rig.push((head, 0, 0, 0))
    assert rig.driver.used_idx == 1
    signal_err(full)
    signal_err(-1)
    os.close(full)


def test_signal_err() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    signal_err(fd)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


# ---- waiting ----


def test_kick_is_drained_even_when_others_read_it(rig: Rig) -> None:
    """The kick descriptor blocks; losing the race for its count must not hang the device."""
    d = rig.driver
    assert not fcntl.fcntl(d.kick_fd, fcntl.F_GETFL) & os.O_NONBLOCK
    script = f"""
import os
while True:
    try:
        os.preadv({d.kick_fd}, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
"""
    thief = subprocess.Popen([sys.executable, "-c", script], pass_fds=[d.kick_fd])
    try:
        with Device(rig):
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                head = d.submit([message()])
                d.force_kick()
                try:
                    done = d.wait_used(timeout=0.001)
                except TimeoutError:  # stolen before we looked; but a wake must get through
                    rig.ring.wake()
                    done = d.wait_used(timeout=2)
                assert done == [(head, 0)]
                d.reply(head)
    finally:
        thief.kill()
        thief.wait()
    assert not fcntl.fcntl(d.kick_fd, fcntl.F_GETFL) & os.O_NONBLOCK


class Device(threading.Thread):
    """Answers everything with nothing, until stopped by a wake."""

    def __init__(self, rig: Rig, spin: int = 0) -> None:
        super().__init__(daemon=True)
        self.rig = rig
        self.spin = spin
        self.stopping = False
        self.error: Exception | None = None
        self.tid = 0
        self.start()

    def run(self) -> None:
        self.tid = threading.get_native_id()
        try:
            while not self.stopping:
                taken = self.rig.take(self.spin)
                self.rig.push(*((request[0], 0, 0, 0) for request in taken))
        except RingBroken as e:
            self.error = e

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.rig.ring.wake()
        self.join(5)
        assert not self.is_alive()

    def cpu(self) -> float:
        assert self.ident
        return time.clock_gettime(time.pthread_getcpuclockid(self.ident))

    def switches(self) -> int:
        status = Path(f"/proc/self/task/{self.tid}/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)


@pytest.mark.parametrize("spin", [0, 1000])
@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_is_lost_between_busy_and_idle(spin: int, event_idx: bool) -> None:
    """Ping-pong: each request needs the device to notice it, asleep, spinning or in between."""
    with closing(Rig(event_idx=event_idx)) as rig:
        with Device(rig, spin):
            for i in range(3000):
                head = rig.driver.submit([message()])
                if i % 7 == 0:
                    time.sleep(0.0001)
                rig.driver.kick()
                assert rig.driver.wait_used() == [(head, 0)]
                rig.driver.reply(head)
        counters = rig.ring.counters
        assert counters.requests == 3000
        assert counters.kicks <= rig.driver.kicks
        if spin:
            assert counters.spin_hits > 100
            assert rig.driver.kicks < 2900


def echo(rig: Rig) -> None:
    rig.driver.submit([message()])
    rig.driver.kick()
    [(head, _)] = rig.driver.wait_used()
    rig.driver.reply(head)


def test_idle_means_asleep(rig: Rig) -> None:
    with Device(rig, spin=100) as device:
        for _ in range(200):
            echo(rig)
        time.sleep(0.05)
        before = device.switches(), rig.ring.counters.sleeps
        time.sleep(0.5)
        assert (device.switches(), rig.ring.counters.sleeps) == before


def test_spinning_stops_when_it_catches_nothing(rig: Rig) -> None:
    with Device(rig, spin=4000) as device:
        for _ in range(20):
            time.sleep(0.0005)
            echo(rig)
        assert rig.ring.counters.spin_hits > 5
        before = device.cpu()
        for _ in range(20):
            time.sleep(0.03)
            echo(rig)
        assert device.cpu() - before < 0.04  # 4 + 2 + 1 ... ms, not twenty times four


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """This thread, and those that it starts, may use one CPU only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_cpu")
def test_no_spinning_on_the_guest_s_own_cpu(rig: Rig) -> None:
    """There it would only stand in the guest's way; now and then it is tried."""
    with Device(rig, spin=4000):
        for _ in range(20):
            echo(rig)
        before = rig.ring.counters.spin_hits
        for _ in range(160):
            echo(rig)
        assert rig.ring.counters.spin_hits - before < 40


def test_wake_by_call_and_by_descriptor(rig: Rig) -> None:
    rig.ring.wake()
    assert rig.take() == []
    os.eventfd_write(rig.wake, 1)
    assert rig.take() == []
    assert not select.select([rig.wake], [], [], 0)[0]
    head = rig.driver.submit([message()])
    rig.ring.wake()
    assert [r[0] for r in rig.take()] == [head]  # the wake is consumed with it...
    timer = threading.Timer(0.1, rig.ring.wake)
    timer.start()
    began = time.monotonic()
    assert rig.take() == []  # ...so this one waits for the next
    assert time.monotonic() - began > 0.05
    timer.join()


def test_kicks_for_nothing_do_not_spin(rig: Rig) -> None:
    """A kick descriptor that is always readable: the device looks, but does not burn a CPU."""
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            os.eventfd_write(rig.driver.kick_fd, 1)

    thread = threading.Thread(target=storm)
    thread.start()
    with Device(rig):
        time.sleep(0.3)
        sleeps = rig.ring.counters.sleeps
        head = rig.driver.submit([message()])
        assert rig.driver.wait_used() == [(head, 0)]
    stop.set()
    thread.join()
    assert 64 < sleeps < 1000


def test_dead_kick_descriptor_breaks_the_ring(rig: Rig) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    os.dup2(reader, rig.driver.kick_fd)
    os.close(reader)
    with pytest.raises(RingBroken, match="kick descriptor fails: end of file"):
        rig.take()


def test_no_kick_descriptor_means_looking(rig: Rig) -> None:
    d = rig.driver
    ring = Vring(
        rig.memory,
        num=d.num,
        desc=d.user_addr(d.desc),
        used=d.user_addr(d.used),
        avail=d.user_addr(d.avail),
        base=0,
        event_idx=True,
        indirect=True,
        kick=-1,
        call=-1,
        wake=rig.wake,
    )
    timer = threading.Timer(0.05, lambda: d.submit([message()]))
    timer.start()
    assert ring.wait(0) == 1
    timer.join()


# ---- bulk data ----


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as f:
        yield f.fileno()


def pattern(n: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n)


@pytest.mark.parametrize("align", [1, 4096])
def test_zero_copy_read_and_write(rig: Rig, file: int, align: int) -> None:
    """As net/9p/trans_virtio.c lays them out: a header buffer, then pages, here one in two."""
    data = pattern(125 * 4096)
    pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    request = message(bytes(16), TWRITE)
    head = rig.driver.submit([request, *pages], [4096], indirect=True, align=align)
    assert rig.take() == [(head, 23 + len(data), 4096, 23, 0)]
    assert rig.ring.writev(head, 23, file, len(data), 100) == len(data)
    assert os.pread(file, len(data) + 1, 100) == data
    rig.answer(head, bytes(11))
    rig.driver.wait_used()
    rig.driver.reply(head)

    head = rig.driver.submit([message(bytes(16))], [11] + [4096] * 125, indirect=True, align=align)
    assert rig.take() == [(head, 23, 11 + len(data), 23, 0)]
    assert rig.ring.readv(head, 11, file, 1 << 32, 100) == len(data)
    rig.ring.scatter(head, 0, b"rread-head!")
    rig.push((head, 0, 0, 11 + len(data)))
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"rread-head!" + data


def test_partial_moves(rig: Rig, file: int) -> None:
    os.write(file, b"0123456789")
    head = rig.driver.submit([message(b"abcdef")], [4, 4, 4], align=16)
    rig.take()
    ring = rig.ring
    assert ring.readv(head, 3, file, 6, 2) == 6  # inside
    assert ring.readv(head, 11, file, 6, 9) == 1  # to the end of both
    assert ring.readv(head, 12, file, 6, 0) == 0  # beyond the stream
    assert ring.readv(head, 1 << 63, file, 6, 0) == 0
    assert ring.readv(head, 0, file, 0, 0) == 0
    assert ring.readv(head, 0, file, 6, 10) == 0  # end of file
    os.lseek(file, 8, os.SEEK_SET)
    assert ring.readv(head, 0, file, 2, -1) == 2  # the file's own position
    assert ring.writev(head, 9, file, 100, 0) == 4
    assert os.pread(file, 20, 0) == b"cdef456789"
    rig.push((head, 0, 0, 12))
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"89\x00234567\x00\x009"


def test_moves_report_errors(rig: Rig, file: int) -> None:
    head = rig.driver.submit([message()])
    rig.take()
    for wrong_head in (head ^ 1, 1 << 31):
        with pytest.raises(OSError, match="Invalid argument"):
            rig.ring.readv(wrong_head, 0, file, 1, 0)
        with pytest.raises(OSError, match="Invalid argument"):
            rig.ring.scatter(wrong_head, 0, b"x")
        with pytest.raises(OSError, match="Invalid argument"):
            rig.ring.gather(wrong_head, 0, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.ring.readv(head, 0, -1, 10, 0)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        rig.ring.readv(head, 0, reader, 10, 0)
    with pytest.raises(BlockingIOError):
        rig.ring.readv(head, 0, reader, 10, -1, os.RWF_NOWAIT)
    assert rig.ring.writev(head, 0, writer, 10, -1) == 7
    assert rig.ring.readv(head, 0, reader, 10, -1) == 7
    os.close(reader)
    os.close(writer)


def test_a_signal_interrupts_a_blocked_move(rig: Rig) -> None:
    head = rig.driver.submit([message()])
    rig.take()
    reader, writer = os.pipe()
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(InterruptedError):
            rig.ring.readv(head, 0, reader, 10, -1)
    finally:
        signal.signal(signal.SIGALRM, old)
        os.close(reader)
        os.close(writer)


def test_more_segments_than_one_system_call_takes(file: int) -> None:
    """A ring of 4096 allows chains beyond IOV_MAX; single bytes, two apart."""
    with closing(Rig(Driver(num=4096, size=16 * MIB))) as rig:
        data = pattern(3000)
        os.write(file, data)
        out = [bytes([b]) for b in message(b"") + data[:1000]]
        head = rig.driver.submit(out, [1] * 3000)
        assert rig.take() == [(head, 1007, 3000, 1007, 0)]
        assert rig.ring.readv(head, 5, file, 3000, 5) == 2995
        assert rig.ring.writev(head, 7, file, 1000, 0) == 1000
        assert rig.ring.gather(head, 7, 1000) == data[:1000]
        rig.push((head, 0, 0, 3000))
        assert rig.driver.guards_intact(head)
        assert rig.driver.reply(head)[5:] == data[5:]


def test_scatter_and_gather(rig: Rig) -> None:
    head = rig.driver.submit([message(b"attribute value")], [3, 5, 7], align=16)
    rig.take()
    ring = rig.ring
    assert ring.gather(head, 7, 15) == b"attribute value"
    assert ring.gather(head, 17, 5) == b"value"
    with pytest.raises(OSError, match="Message too long"):
        ring.gather(head, 7, 16)
    with pytest.raises(OSError, match="Message too long"):
        ring.gather(head, 1 << 60, 1)
    with pytest.raises(OSError, match="Message too long"):
        ring.scatter(head, 1, bytes(15))
    ring.scatter(head, 0, bytearray(b"abcd"))
    ring.scatter(head, 4, memoryview(b"efghijklmno"))
    ring.scatter(head, 15, b"")
    rig.push((head, 0, 0, 15))
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"abcdefghijklmno"


def test_workers_use_their_slots_beside_the_device_thread(rig: Rig, file: int) -> None:
    d, ring = rig.driver, rig.ring
    data = pattern(60_000)
    os.write(file, data)
    heads = [d.submit([message()], [11] + [1000] * 60, indirect=True) for _ in range(8)]
    rig.take()

    def work(head: int) -> None:
        for skip in range(0, 60_000, 997):
            assert ring.readv(head, 11 + skip, file, 997, skip) == min(997, 60_000 - skip)

    threads = [threading.Thread(target=work, args=(head,)) for head in heads]
    for thread in threads:
        thread.start()
    for _ in range(500):
        head = d.submit([message()])
        assert [r[0] for r in rig.take()] == [head]
        rig.push((head, 0, 0, 0))
        d.reply(head)
    for thread in threads:
        thread.join()
    rig.push(*((head, 0, 0, 60_011) for head in heads))
    for head in heads:
        assert d.guards_intact(head)
        assert d.reply(head)[11:] == data


# ---- guest memory ----

QUARTERS = [  # the first three are adjacent to the guest alone
    Region(0x1_0000_0000, 2 * MIB, UA, 0),
    Region(0x1_0020_0000, 2 * MIB, UA + (1 << 40), 4 * MIB),
    Region(0x1_0040_0000, 2 * MIB, UA + (2 << 40), 2 * MIB),
    Region(0xFFFF_FF00_0000_0000, 2 * MIB, UA + (3 << 40), 6 * MIB),
]


def test_buffers_and_tables_cross_regions_above_4_gib(file: int) -> None:
    with closing(Rig(Driver(regions=QUARTERS))) as rig:
        d = rig.driver
        data = pattern(65536)
        os.write(file, data)
        message_at, edge, high = QUARTERS[1].gpa - 5, QUARTERS[2].gpa, QUARTERS[3].gpa + 100
        d.write(message_at, message(b"edge"))
        entries = [
            encode_desc(message_at, 11, NEXT, 1),
            encode_desc(edge - 30_000, 60_000, WRITE | NEXT, 2),
            encode_desc(high, 5536, WRITE, 0),
        ]
        d.write(edge - 24, b"".join(entries))  # an entry straddles the edge
        d.write_desc(0, edge - 24, 48, INDIRECT, 0)
        d.publish(0)
        assert rig.take() == [(0, 11, 65536, 11, 0)]
        assert rig.header(0, 11) == message(b"edge")
        # The data goes over the table, which was copied.
        assert rig.ring.readv(0, 0, file, 65536, 0) == 65536
        assert d.read(edge - 30_000, 60_000) + d.read(high, 5536) == data


def test_509_regions() -> None:
    page = 4096
    scattered = list(range(509))
    random.Random(9).shuffle(scattered)
    # The ring needs contiguous pages: the first region is big, the others hold a page each.
    first = Region(1 << 40, 64 * page, UA, 0)
    regions = [first] + [
        Region((i + 200) << 33, page, UA + ((i + 1) << 33), (64 + i) * page)
        for i in scattered[:508]
    ]
    with closing(Rig(Driver(size=(64 + 509) * page, regions=regions))) as rig:
        with pytest.raises(OSError, match="No space left"):
            rig.memory.add(1 << 50, page, 1 << 50, 0, rig.driver.fd)
        d = rig.driver
        d.write(regions[1].gpa, message())
        for region in regions[1:]:
            assert hole(rig, (regions[1].gpa, 7, False), (region.gpa + 8, page - 8, True)) == (
                7,
                page - 8,
                7,
                0,
            )
            assert hole(rig, (regions[1].gpa, 7, False), (region.gpa + page, 1, True))[3] == 14
            rig.push(*((head, 0, 0, 0) for head in list(d._chains)))
            for head in list(d._chains):
                d.free(head)
        for region in regions[1:]:
            rig.memory.remove(region.gpa, region.size, region.user_addr)
        assert hole(rig, (regions[5].gpa, 7, False))[3] == errno.EFAULT


def test_regions_are_refused_or_found() -> None:
    with closing(Driver(size=MIB)) as d, closing(GuestMemory()) as memory:
        memory.add(MIB, MIB, UA, 0, d.fd)
        for gpa, ua in [
            (MIB, UA),
            (MIB, 0),
            (0x17_F000, 0),
            (0x80001, 0),
            (1 << 40, UA - MIB + 1),
            (1 << 40, UA + MIB - 1),
        ]:
            with pytest.raises(FileExistsError):
                memory.add(gpa, MIB, ua, 0, d.fd)
        top = 1 << 64
        for gpa, size, ua, offset in [
            (1 << 40, 0, 0, 0),
            (top - 4096, 8192, 0, 0),
            (1 << 40, 8192, top - 4096, 0),
            (1 << 40, 4096, 0, top - 4096),
            (1 << 40, 1 << 63, 0, 0),
        ]:
            with pytest.raises(OSError, match="Invalid argument"):
                memory.add(gpa, size, ua, offset, d.fd)
        for size, offset in [(MIB + 1, 0), (MIB, 1), (1, MIB)]:
            with pytest.raises(OSError, match="No such device or address"):
                memory.add(1 << 40, size, 0, offset, d.fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            memory.add(1 << 40, MIB, 0, 0, -1)
        for gpa, size, ua in [(0, MIB, UA), (MIB + 1, MIB, UA), (MIB, MIB - 1, UA), (MIB, MIB, 0)]:
            with pytest.raises(FileNotFoundError):
                memory.remove(gpa, size, ua)
        memory.add(2 * MIB, 4096, UA + MIB, 100, d.fd)  # adjacent; any offset will do
        memory.remove(MIB, MIB, UA)
        memory.add(MIB, MIB, UA, 0, d.fd)
        memory.close()
        memory.add(MIB, MIB, UA, 0, d.fd)


def test_unaligned_offsets_read_the_right_bytes() -> None:
    regions = [Region(0, 4 * MIB, UA, 0), Region(1 << 32, 8096, UA * 2, 4 * MIB + 777)]
    with closing(Rig(Driver(regions=regions))) as rig:
        at = (1 << 32) + 8096 - 20
        rig.driver.write(at, message(b"seven hundred"))
        rig.driver.submit_segments([Segment(at, 20, writable=False)])
        [(head, *_)] = rig.take()
        assert rig.header(head, 20) == message(b"seven hundred")


def test_hugetlb_regions() -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as e:
        pytest.skip(f"no hugetlb memfd: {e}")
    os.ftruncate(fd, 4 * MIB)
    with closing(GuestMemory()) as memory:
        try:
            memory.add(0, MIB, UA, 3 * MIB, fd)
        except OSError as e:
            pytest.skip(f"no huge pages: {e}")
        finally:
            os.close(fd)
        memory.remove(0, MIB, UA)


# ---- truncated guest memory ----


def test_truncated_ring_memory(rig: Rig) -> None:
    device = Device(rig)
    echo(rig)
    os.ftruncate(rig.driver.fd, 0)
    rig.driver.force_kick()
    device.join(5)
    assert "vanished" in str(device.error)


@pytest.mark.parametrize("victim", ["header", "table", "scatter", "gather", "readv", "push"])
def test_truncated_buffers(rig: Rig, file: int, victim: str) -> None:
    """Our own loads and stores hit the hole: the ring breaks, the process lives."""
    d = rig.driver
    at = d.gpa(d.size - 4096)
    here = d.allocate(4096, 16)
    out = at if victim in ("header", "gather") else here
    d.write(out, message(b"value"))
    if victim == "table":
        d.write_desc(0, at, 16, INDIRECT, 0)
        d.publish(0)
    else:
        d.submit_segments([Segment(out, 12, False), Segment(at, 100, True)])
    if victim not in ("header", "table"):
        [(head, *_)] = rig.take()
    os.ftruncate(d.fd, d.size - 4096)
    if victim == "scatter":
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.scatter(head, 0, b"reply")
    elif victim == "gather":
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.gather(head, 7, 5)
    elif victim == "readv":  # here the kernel touches it, and says so
        os.write(file, b"data")
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.readv(head, 0, file, 4, 0)
        return
    elif victim == "push":
        rig.push((head, 0, 50, 50))
    rig.ring.wake()
    for _ in range(2):
        with pytest.raises(RingBroken, match="vanished"):
            rig.take()


def test_a_bus_error_elsewhere_still_kills() -> None:
    """Only guest memory is patched; another mapping's SIGBUS keeps its meaning."""
    script = """
import mmap, os
from ninepd.vring import GuestMemory
fd = os.memfd_create("guest")
os.ftruncate(fd, 8192)
GuestMemory().add(0, 8192, 0, 0, fd)
other = mmap.mmap(fd, 8192)
os.ftruncate(fd, 0)
other[0]
"""
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:handle_sigbus=0")
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert result.returncode == -signal.SIGBUS


# ---- resources ----


def test_no_descriptor_or_mapping_is_left_behind() -> None:
    def once() -> None:
        with closing(Rig()) as rig:
            head = rig.driver.submit([message()])
            rig.take()
            rig.answer(head, b"x")
            with contextlib.suppress(OSError):
                rig.memory.add(0, MIB, 0, 1 << 40, rig.driver.fd)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:guest")

    once()
    before = open_fds(), mappings()
    for _ in range(20):
        once()
    assert (open_fds(), mappings()) == before


# ---- the hostile driver ----

NASTY = [0, 1, 7, 15, 16, 17, 4095, 4096, 0x7FFF_FFFF, 0xFFFF_FFF0, 0xFFFF_FFFF]


class Fuzzer:
    """Writes rings that are nearly right, so that the parser gets past its first check."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        half = 2 * MIB
        self.driver = Driver(
            num=self.random.choice([1, 4, 16, 64]),
            size=2 * half,
            regions=[Region(MIB, half, UA, 0), Region(MIB + half, half, UA * 2, half)],
            event_idx=self.random.random() < 0.5,
        )
        self.edge = MIB + half

    def addr(self) -> int:
        r = self.random
        near = r.choice(
            [
                MIB,
                self.edge,
                self.edge + 2 * MIB,
                self.driver.gpa(self.driver.desc),
                0,
                (1 << 64) - 1,
            ]
        )
        return (near + r.randrange(-64, 8192)) % (1 << 64)

    def entry(self, size: int, flags: tuple[int, ...]) -> tuple[int, int, int, int]:
        r = self.random
        length = r.choice(NASTY) if r.random() < 0.2 else r.randrange(200)
        following = r.randrange(size) if r.random() < 0.97 else r.randrange(65536)
        return self.addr(), length, r.choice(flags), following

    def step(self) -> None:
        d, r = self.driver, self.random
        for i in range(d.num):
            addr, length, flags, following = self.entry(
                d.num, (0, NEXT, NEXT, WRITE, WRITE | NEXT, 4)
            )
            if flags == INDIRECT:
                entries = r.choice([1, 2, 8, 64])
                at = self.edge - r.randrange(0, 16 * entries + 32)
                table_flags = (NEXT, NEXT, WRITE, WRITE | NEXT, 0)
                d.write(
                    at,
                    b"".join(
                        encode_desc(*self.entry(entries, table_flags)) for _ in range(entries)
                    ),
                )
                addr, length = at, 16 * entries if r.random() < 0.95 else r.choice(NASTY)
            d.write_desc(i, addr, length, flags, following)
        for _ in range(r.randrange(1, d.num + 1)):
            d.publish(r.randrange(d.num) if r.random() < 0.99 else r.randrange(65536))
        if r.random() < 0.02:
            d.avail_idx += r.randrange(65536)


def test_fuzzed_rings_only_break() -> None:
    outcomes = {"served": 0, "broken": 0}
    reasons = set()
    deadline = time.monotonic() + 4
    seed = 0
    zero = os.open("/dev/zero", os.O_RDWR)
    while time.monotonic() < deadline:
        seed += 1
        fuzzer = Fuzzer(seed)
        with closing(Rig(fuzzer.driver, batch=16)) as rig:
            try:
                for _ in range(20):
                    fuzzer.step()
                    taken = rig.take()
                    for head, readable, writable, header_len, fault in taken:
                        assert header_len <= min(readable, rig.ring.header_stride)
                        assert fault or header_len >= 7
                        skip = fuzzer.random.randrange(0, 300)
                        with contextlib.suppress(OSError):
                            rig.ring.readv(head, skip, zero, 3000, -1)
                        with contextlib.suppress(OSError):
                            rig.ring.writev(head, skip, zero, 3000, -1)
                        rig.ring.gather(head, readable // 2, min(readable // 2, 5000))
                        rig.ring.scatter(head, writable // 2, bytes(min(writable // 2, 5000)))
                        n = min(writable, rig.ring.reply_stride)
                        rig.push((head, 0, n, n))
                        outcomes["served"] += 1
            except RingBroken as e:
                outcomes["broken"] += 1
                reasons.add(str(e).split()[0:3][-1])
    os.close(zero)
    assert outcomes["served"] > 100
    assert outcomes["broken"] > 20
    assert len(reasons) > 3
