"""The virtqueue against a hostile driver, which rewrites what is being read and writes nonsense."""

import contextlib
import errno
import os
import random
import threading
import time
from contextlib import closing

import pytest

from ninepd.errors import RingBroken
from tests.support.driver import INDIRECT, NEXT, WRITE, Driver, Region, encode_desc
from tests.support.vring_rig import MIB, NOWHERE, TREAD, TWRITE, UA, Rig, message

# ---- a driver that rewrites under our eyes ----


@pytest.mark.threat("t_double_fetch")
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


@pytest.mark.threat("t_desc_oob", "t_indirect")
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
