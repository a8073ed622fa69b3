"""What the tests of the virtqueue share: a driver with a started ring, and a thread to serve it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from ninepd.errors import RingBroken
from ninepd.stats import Stats
from ninepd.vring import REQUEST, GuestMemory, Vring, done_entry
from tests.support.driver import Driver, Segment

TWRITE, TREAD, RREAD = 118, 116, 117
UA = 0x7F00_0000_0000
MIB = 1 << 20
NOWHERE = 1 << 50


class ByHead:
    """A ring whose requests are named by the heads that the driver gave them, not by slots."""

    def __init__(self, ring: Vring, driver: Driver) -> None:
        self.vring = ring
        self._driver = driver
        self._slots: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vring, name)

    def take(self, spin: int) -> list[tuple[int, ...]]:
        first = self.vring.counters.last_avail
        count = self.vring.wait(spin)
        requests = list(REQUEST.iter_unpack(self.vring.batch[: count * REQUEST.size]))
        heads = [self._driver.avail_head(first + i) for i in range(count)]
        self._slots.update(zip(heads, [request[0] for request in requests], strict=True))
        return [(head, *request[1:]) for head, request in zip(heads, requests, strict=True)]

    def slot(self, head: int) -> int:
        """Any number that is no slot, for a head that was never taken."""
        return self._slots.get(head, head | 1 << 30)

    def readv(self, head: int, *rest: int) -> int:
        return self.vring.readv(self.slot(head), *rest)

    def writev(self, head: int, skip: int, fd: int, count: int, offset: int) -> int:
        return self.vring.writev(self.slot(head), skip, fd, count, offset)

    def scatter(self, head: int, skip: int, data: bytes | bytearray | memoryview) -> None:
        self.vring.scatter(self.slot(head), skip, data)

    def gather(self, head: int, skip: int, count: int) -> bytes:
        return self.vring.gather(self.slot(head), skip, count)


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
        stats: Stats | None = None,
    ) -> None:
        self.driver = d = driver or Driver(num, event_idx=event_idx, base=base)
        self.memory = GuestMemory()
        for region in d.regions:
            self.memory.add(*region, d.fd)
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        ring = Vring(
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
            stats=stats,
        )
        self.ring = ByHead(ring, d)

    def close(self) -> None:
        self.ring.close()
        self.memory.close()
        self.driver.close()
        os.close(self.wake)

    def take(self, spin: int = 0) -> list[tuple[int, ...]]:
        return [entry[:5] for entry in self.take_whole(spin)]

    def take_whole(self, spin: int = 0) -> list[tuple[int, ...]]:
        return self.ring.take(spin)

    def header(self, head: int, length: int) -> bytes:
        start = self.ring.slot(head) * self.ring.header_stride
        return bytes(self.ring.headers[start : start + length])

    def answer(self, head: int, reply: bytes) -> None:
        self.put(head, reply)
        self.push((head, 0, len(reply), len(reply)))

    def put(self, head: int, reply: bytes) -> None:
        """Into the slot's reply buffer."""
        start = self.ring.slot(head) * self.ring.reply_stride
        self.ring.replies[start : start + len(reply)] = reply

    def push(self, *entries: tuple[int, int, int, int]) -> None:
        self.ring.push([done_entry(self.ring.slot(head), *rest) for head, *rest in entries])


def started_rig() -> Iterator[Rig]:
    """Each file that wants it as a fixture says ``rig = pytest.fixture(started_rig)``."""
    with closing(Rig()) as it:
        yield it


def message(body: bytes = b"", message_type: int = TREAD, tag: int = 1) -> bytes:
    return (
        (7 + len(body)).to_bytes(4, "little")
        + bytes([message_type])
        + tag.to_bytes(2, "little")
        + body
    )


def answered(rig: Rig, request: bytes, kind: int, body: bytes = b"", more: int = 0) -> None:
    """A request and its reply, of which ``more`` bytes stand in the guest's memory already."""
    head = rig.driver.submit([request], [4096])
    rig.take()
    rig.put(head, bytes(7) + body)
    rig.push((head, kind, 7 + len(body), 7 + len(body) + more))
    rig.driver.wait_used()
    rig.driver.reply(head)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def hole(rig: Rig, *segments: tuple[int, int, bool]) -> tuple[int, int, int, int]:
    head = rig.driver.submit_segments([Segment(*s) for s in segments])
    [(taken, readable, writable, header_len, fault)] = rig.take()
    assert taken == head
    return readable, writable, header_len, fault


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


def echo(rig: Rig) -> None:
    rig.driver.submit([message()])
    rig.driver.kick()
    [(head, _)] = rig.driver.wait_used()
    rig.driver.reply(head)
