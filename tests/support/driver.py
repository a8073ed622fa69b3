"""The guest side of a split ring on a memfd: honest by default, with the tools to be hostile.

It knows nothing of ninepd: it hands out what a front end would (regions, user addresses,
descriptors) and plays the driver as Linux does (drivers/virtio/virtio_ring.c).
"""

import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEXT, WRITE, INDIRECT = 1, 2, 4
GUARD = b"\xee" * 64


class Region(NamedTuple):
    gpa: int
    size: int
    user_addr: int
    offset: int  # in the memfd


class Segment(NamedTuple):
    addr: int
    length: int
    writable: bool


class Driver:
    def __init__(
        self,
        num: int = 128,
        *,
        size: int = 8 << 20,
        gpa: int = 0x10_0000,
        user_addr: int = 0x7F00_0000_0000,
        regions: Sequence[Region] | None = None,
        base: int = 0,
        event_idx: bool = True,
        call_socket: bool = False,
        kick_flags: int = 0,
    ) -> None:
        self.num = num
        self.size = size
        self.event_idx = event_idx
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self.ram = mmap.mmap(self.fd, size)
        self.bytes = memoryview(self.ram)
        # Item assignment through these is one machine store, which struct does not promise.
        self._u16 = self.bytes.cast("H")
        self._u32 = self.bytes.cast("I")
        self._u64 = self.bytes.cast("Q")
        self.regions = list(regions or [Region(gpa, size, user_addr, 0)])
        # Offsets in the memfd. Each part starts a page of its own.
        self.desc = 0
        self.avail = _page_up(16 * num)
        self.used = self.avail + _page_up(6 + 2 * num)
        self.heap = self.used + _page_up(6 + 8 * num)
        self._brk = self.heap
        self._free = list(range(num - 1, -1, -1))
        self._chains: dict[int, tuple[list[int], list[Segment]]] = {}
        self.next_avail = self.last_used = self._kicked = base & 0xFFFF
        self._u16[self.avail // 2 + 1] = self._u16[self.used // 2 + 1] = self.next_avail
        self._set_events()
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | kick_flags)
        if call_socket:
            self._call_end, far_end = socket.socketpair()
            self._call_end.setblocking(False)
            self.call_fd = far_end.detach()
            self._call_read = self._call_end.fileno()
        else:
            self.call_fd = self._call_read = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._call_socket = call_socket
        self.kicks = 0
        self.calls = 0
        self._fence = threading.Lock()

    def close(self) -> None:
        for view in (self._u16, self._u32, self._u64, self.bytes):
            view.release()
        self.ram.close()
        os.close(self.fd)
        os.close(self.kick_fd)
        os.close(self.call_fd)
        if self._call_socket:
            self._call_end.close()

    # ---- addresses ----

    def gpa(self, offset: int) -> int:
        region = self._region(offset)
        return region.gpa + offset - region.offset

    def user_addr(self, offset: int) -> int:
        region = self._region(offset)
        return region.user_addr + offset - region.offset

    def _region(self, offset: int) -> Region:
        return next(r for r in self.regions if r.offset <= offset < r.offset + r.size)

    def offset(self, gpa: int) -> int:
        region = next(r for r in self.regions if r.gpa <= gpa < r.gpa + r.size)
        return region.offset + gpa - region.gpa

    def read(self, gpa: int, length: int) -> bytes:
        """Guest memory, across adjacent regions."""
        data = b""
        while length:
            at = self.offset(gpa)
            region = self._region(at)
            n = min(length, region.offset + region.size - at)
            data += self.bytes[at : at + n]
            gpa += n
            length -= n
        return data

    def write(self, gpa: int, data: bytes) -> None:
        while data:
            at = self.offset(gpa)
            region = self._region(at)
            n = min(len(data), region.offset + region.size - at)
            self.bytes[at : at + n] = data[:n]
            gpa += n
            data = data[n:]

    def allocate(self, length: int, align: int = 1) -> int:
        """A guest physical address from a heap that empties when no request is outstanding."""
        start = -(-self._brk // align) * align
        end = start + length + len(GUARD)
        if end > self.size:
            raise MemoryError
        self.bytes[start + length : end] = GUARD
        self._brk = end
        return self.gpa(start)

    def pages(self) -> dict[int, bytes]:
        """All guest memory, by the number of the physical page."""
        return {
            (region.gpa + at) // 4096: bytes(self.bytes[region.offset + at :][:4096])
            for region in self.regions
            for at in range(0, region.size, 4096)
        }

    # ---- the raw ring ----

    def write_desc(self, index: int, addr: int, length: int, flags: int, following: int) -> None:
        at = self.desc + 16 * index
        self._u64[at // 8] = addr
        self._u32[at // 4 + 2] = length
        self._u16[at // 2 + 6] = flags
        self._u16[at // 2 + 7] = following

    def publish(self, head: int) -> None:
        self._u16[self.avail // 2 + 2 + self.next_avail % self.num] = head
        self.avail_idx = self.next_avail + 1

    def avail_head(self, index: int) -> int:
        """What the available ring holds at an index, which may have wrapped."""
        return self._u16[self.avail // 2 + 2 + (index & 0xFFFF) % self.num]

    @property
    def avail_idx(self) -> int:
        return self.next_avail

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self.next_avail = value & 0xFFFF
        self._u16[self.avail // 2 + 1] = self.next_avail

    @property
    def avail_flags(self) -> int:
        return self._u16[self.avail // 2]

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._u16[self.avail // 2] = value

    @property
    def used_flags(self) -> int:
        return self._u16[self.used // 2]

    @property
    def used_idx(self) -> int:
        return self._u16[self.used // 2 + 1]

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._u16[self.used // 2 + 1] = value

    @property
    def avail_event(self) -> int:
        return self._u16[self.used // 2 + 2 + 4 * self.num]

    @property
    def used_event(self) -> int:
        return self._u16[self.avail // 2 + 2 + self.num]

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._u16[self.avail // 2 + 2 + self.num] = value & 0xFFFF

    def _set_events(self) -> None:
        self._u16[self.used // 2 + 2 + 4 * self.num] = self.next_avail
        self.used_event = self.last_used

    # ---- the honest driver ----

    def submit(
        self,
        out_buffers: Iterable[bytes],
        in_sizes: Iterable[int] = (4096,),
        *,
        indirect: bool = False,
        align: int = 1,
    ) -> int:
        """Make one request available; the head says which."""
        segments = []
        for data in out_buffers:
            addr = self.allocate(len(data), align)
            self.write(addr, data)
            segments.append(Segment(addr, len(data), writable=False))
        segments += [Segment(self.allocate(n, align), n, writable=True) for n in in_sizes]
        return self.submit_segments(segments, indirect=indirect)

    def submit_segments(self, segments: Sequence[Segment], *, indirect: bool = False) -> int:
        used = [self._free.pop() for _ in range(1 if indirect else len(segments))]
        if indirect:
            table = self.allocate(16 * len(segments), 16)
            self.write(table, encode_table(segments))
            self.write_desc(used[0], table, 16 * len(segments), INDIRECT, 0)
        else:
            for at, segment, following in zip(used, segments, [*used[1:], -1], strict=True):
                flags = (WRITE if segment.writable else 0) | (NEXT if following >= 0 else 0)
                self.write_desc(at, segment.addr, segment.length, flags, max(following, 0))
        self._chains[used[0]] = used, list(segments)
        self.publish(used[0])
        return used[0]

    def kick(self) -> bool:
        """Notify the device if it wants to be; say whether it did."""
        with self._fence:  # publish before looking
            pass
        if self.event_idx:
            new, old = self.next_avail, self._kicked
            wanted = (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self.used_flags & 1
        self._kicked = self.next_avail
        if wanted:
            self.force_kick()
        return wanted

    def force_kick(self) -> None:
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)

    def wait_used(self, timeout: float = 60, count: int = 1) -> list[tuple[int, int]]:
        """Collect at least count used elements, sleeping on the call descriptor."""
        deadline = time.monotonic() + timeout
        done = self.take_used()
        while len(done) < count:
            self.used_event = self.last_used
            with self._fence:  # our wish before the second look
                pass
            fresh = self.take_used()
            if not fresh and not self.called(deadline - time.monotonic()):
                raise TimeoutError(f"{len(done)} of {count} requests came back")
            done += fresh
        return done

    def take_used(self) -> list[tuple[int, int]]:
        done = []
        while self.last_used != self.used_idx:
            at = self.used // 4 + 1 + 2 * (self.last_used % self.num)
            done.append((self._u32[at], self._u32[at + 1]))
            self.last_used = (self.last_used + 1) & 0xFFFF
        return done

    def called(self, timeout: float = 0) -> bool:
        """Whether the device signalled since the last time."""
        if not select.select([self._call_read], [], [], max(timeout, 0))[0]:
            return False
        if self._call_socket:
            self.calls += len(self._call_end.recv(1 << 16)) // 8
        else:
            self.calls += os.eventfd_read(self._call_read)
        return True

    def reply(self, head: int, length: int | None = None) -> bytes:
        """The writable stream of a finished request, whose chain becomes free."""
        data = b"".join(self.read(s.addr, s.length) for s in self._chains[head][1] if s.writable)
        self.free(head)
        return data if length is None else data[:length]

    def free(self, head: int) -> None:
        self._free += self._chains.pop(head)[0]
        if not self._chains:
            self._brk = self.heap

    def guards_intact(self, head: int) -> bool:
        """For requests made by ``submit``: nothing was written past any of its buffers."""
        return all(self.read(s.addr + s.length, len(GUARD)) == GUARD for s in self._chains[head][1])


def _page_up(n: int) -> int:
    return -(-n // 4096) * 4096


def encode_table(segments: Sequence[Segment]) -> bytes:
    table = b""
    for i, segment in enumerate(segments):
        more = i + 1 < len(segments)
        flags = (WRITE if segment.writable else 0) | (NEXT if more else 0)
        table += encode_desc(segment.addr, segment.length, flags, i + 1 if more else 0)
    return table


def encode_desc(addr: int, length: int, flags: int, following: int) -> bytes:
    return (
        addr.to_bytes(8, "little")
        + length.to_bytes(4, "little")
        + flags.to_bytes(2, "little")
        + following.to_bytes(2, "little")
    )
