"""The data part of a request: in guest memory, or in memory of our own."""

import os

from ninepd.p9.messages import IO_HEADER, WRITE_HEADER
from ninepd.vring import Vring


class ChainPayload:
    """Data moves between a file and the guest's pages. One for each slot, used again and again."""

    __slots__ = ("available", "head", "room", "vring")

    def __init__(self, vring: Vring, head: int) -> None:
        self.vring = vring
        self.head = head
        self.room = 0
        self.available = 0

    def expect(self, readable: int, writable: int) -> None:
        """The slot holds a new request with so many bytes to read and to write."""
        self.room = max(writable - IO_HEADER, 0)
        self.available = max(readable - WRITE_HEADER, 0)

    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        return self.vring.readv(self.head, IO_HEADER + skip, fd, count, offset, flags)

    def write(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        return self.vring.writev(self.head, WRITE_HEADER + skip, fd, count, offset, flags)

    def put(self, data: bytes) -> None:
        if data:
            self.vring.scatter(self.head, IO_HEADER, data)

    def take(self, count: int) -> bytes:
        return self.vring.gather(self.head, WRITE_HEADER, count)


class PrivatePayload:
    """For requests on storage that may hang: guest memory may be gone when it answers.

    ``data`` is the request's data, copied before; ``reply`` is the reply's, to be copied after.
    """

    __slots__ = ("available", "data", "reply", "room")

    def __init__(self, data: bytes, room: int) -> None:
        self.data = data
        self.available = len(data)
        self.room = room
        self.reply = b""

    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        buffer = bytearray(count)
        got = os.preadv(fd, [buffer], offset, flags)
        self.reply = self.reply[:skip] + buffer[:got]
        return got

    def write(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        return os.pwritev(fd, [memoryview(self.data)[skip : skip + count]], offset, flags)

    def put(self, data: bytes) -> None:
        self.reply = data

    def take(self, count: int) -> bytes:
        return self.data[:count]
