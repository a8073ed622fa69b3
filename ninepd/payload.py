"""The data part of a request: in guest memory, or in memory of our own."""

import os
import threading
from typing import Final

from ninepd.ops.replies import Payload
from ninepd.p9.messages import HEADER_SIZE, IO_HEADER, WRITE_HEADER
from ninepd.syscalls import GETATTR_BODY, copy, keep_set_ids, view
from ninepd.vring import Vring

_SMALL: Final = 1 << 16
"""Up to here fresh memory costs no more than finding some to use again."""
_SPARE_MAX: Final = 4


class Buffers:
    """Large buffers, used again: filling pages that are fresh takes ten times as long as the copy.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._spare: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> bytearray:
        """At least ``size`` bytes, of any content."""
        if size > _SMALL:
            with self._lock:
                for at, buffer in enumerate(self._spare):
                    if len(buffer) >= size:
                        return self._spare.pop(at)
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """It is not used any more."""
        if len(buffer) > _SMALL:
            with self._lock:
                if len(self._spare) < _SPARE_MAX:
                    self._spare.append(buffer)


class ChainPayload(Payload):
    """Data moves between a file and the guest's pages. One for each slot, used again and again."""

    __slots__ = ("head", "vring")

    def __init__(self, vring: Vring, head: int) -> None:
        """``room`` and ``available`` are set by whoever takes the next request of the slot."""
        start = head * vring.reply_stride
        body = view(vring.replies[start + HEADER_SIZE : start + vring.reply_stride])
        super().__init__(0, 0, body)
        self.vring = vring
        self.head = head

    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        return self.vring.readv(self.head, IO_HEADER + skip, fd, count, offset, flags)

    def write(self, fd: int, skip: int, count: int, offset: int, uid: int) -> int:
        return self.vring.writev(self.head, WRITE_HEADER + skip, fd, count, offset, uid == 0)

    def put(self, data: bytes, skip: int = 0) -> None:
        if data:
            self.vring.scatter(self.head, IO_HEADER + skip, data)

    def take(self, count: int) -> bytes:
        return self.vring.gather(self.head, WRITE_HEADER, count)


class PrivatePayload(Payload):
    """For requests that may wait for storage: guest memory may be gone when it answers.

    The request's data is copied before, the reply's after the work; nothing else is.
    """

    __slots__ = ("_buffer", "_buffers", "_end", "_start")

    def __init__(self, room: int, buffers: Buffers) -> None:
        super().__init__(0, room, view(bytearray(GETATTR_BODY)))
        self._buffers = buffers
        self._buffer: bytearray | None = None
        self._start = self._end = 0
        """Of the reply's data: what comes before the start stands in guest memory already."""

    def fill(self, slot: ChainPayload, nbytes: int) -> None:
        """Copy the data of a request. EFAULT if the guest's memory is gone."""
        self._buffer = self._buffers.take(nbytes)
        with memoryview(self._buffer) as whole, whole[:nbytes] as target:
            slot.vring.gather_into(slot.head, WRITE_HEADER, target)
        self.available = nbytes

    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        if self._buffer is None:
            self._buffer = self._buffers.take(count)
            self._start = skip
        at = skip - self._start
        with memoryview(self._buffer) as whole, whole[at : at + count] as target:
            got = os.preadv(fd, [target], offset, flags)
        self._end = skip + got
        return got

    def write(self, fd: int, skip: int, count: int, offset: int, uid: int) -> int:
        keep_set_ids(uid == 0)
        assert self._buffer is not None  # noqa: S101 - there is nothing to write without data
        with memoryview(self._buffer) as whole, whole[skip : skip + count] as source:
            return os.pwrite(fd, source, offset)

    def put(self, data: bytes, skip: int = 0) -> None:
        self._buffer, self._start, self._end = bytearray(data), skip, skip + len(data)

    def take(self, count: int) -> bytes:
        return b"" if self._buffer is None else bytes(self._buffer[:count])

    def deliver(self, slot: ChainPayload) -> None:
        """Copy what the reply consists of into guest memory and the slot's buffer.

        EFAULT if the guest's memory is gone.
        """
        size = self._end - self._start
        if size and self._buffer is not None:
            with memoryview(self._buffer) as whole, whole[:size] as data:
                slot.vring.scatter(slot.head, IO_HEADER + self._start, data)
        copy(self.body, slot.body, GETATTR_BODY)

    def close(self) -> None:
        """Nobody will ask for its data any more."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._buffers.give(buffer)
