"""The data part of a request: in guest memory, or in memory of our own."""

import os

from ninepd.ops.replies import Payload
from ninepd.p9.messages import HEADER_SIZE, IO_HEADER, WRITE_HEADER
from ninepd.syscalls import GETATTR_BODY, copy, view
from ninepd.vring import Vring


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

    def write(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        return self.vring.writev(self.head, WRITE_HEADER + skip, fd, count, offset, flags)

    def put(self, data: bytes, skip: int = 0) -> None:
        if data:
            self.vring.scatter(self.head, IO_HEADER + skip, data)

    def take(self, count: int) -> bytes:
        return self.vring.gather(self.head, WRITE_HEADER, count)


class PrivatePayload(Payload):
    """For requests that may wait for storage: guest memory may be gone when it answers.

    ``data`` is the request's data, copied before; the reply's is copied after, by ``deliver``.
    """

    __slots__ = ("_reply", "_start", "data")

    def __init__(self, data: bytes, room: int) -> None:
        super().__init__(len(data), room, view(bytearray(GETATTR_BODY)))
        self.data = data
        self._reply = bytearray()
        self._start = 0
        """Where the reply's data begins: before that it stands in guest memory already."""

    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        buffer = bytearray(count)
        got = os.preadv(fd, [buffer], offset, flags)
        if not self._reply:
            self._start = skip
        del self._reply[skip - self._start :]
        self._reply += memoryview(buffer)[:got]
        return got

    def write(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        return os.pwritev(fd, [memoryview(self.data)[skip : skip + count]], offset, flags)

    def put(self, data: bytes, skip: int = 0) -> None:
        self._reply, self._start = bytearray(data), skip

    def deliver(self, slot: ChainPayload) -> None:
        """Copy what the reply consists of into guest memory and the slot's buffer."""
        slot.put(bytes(self._reply), self._start)
        copy(self.body, slot.body, GETATTR_BODY)

    def take(self, count: int) -> bytes:
        return self.data[:count]
