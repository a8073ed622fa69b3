"""The connected vhost-user socket: whole messages with their descriptors in, replies out.

The socket is a byte stream, and the kernel hands out descriptors with the byte they were sent
with. So a read never goes past the end of the message at hand: the next one's descriptors would
come along. Transports of asyncio carry no descriptors; register ``fileno`` with ``add_reader``.
"""

import array
import select
import socket
from collections.abc import Iterator

from ninepd import foreign
from ninepd.errors import FramingLost
from ninepd.vhostuser.messages import MESSAGE_HEADER, Message

MAX_PAYLOAD = 4096  # the limit of the rust-vmm vhost crate; QEMU's largest is 2056
MAX_DISCARD = 1 << 20  # what an unknown message may be; beyond it, size is just noise
MAX_FDS = 253  # SCM_MAX_FD, the kernel's limit for one sendmsg

# Messages a turn of the loop, so that one busy front end does not starve other exports.
_BATCH = 64
_SEND_TIMEOUT_MS = 100


class FrontEnd:
    """Owns the socket, and the descriptors of a message until its turn ends."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._fds: list[int] = []
        self._start()

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> Iterator[Message]:
        """The messages that have arrived. Each one's descriptors are closed when its turn ends.

        EOFError: the front end is gone. FramingLost: there is no next message to be found.
        """
        for _ in range(_BATCH):
            try:
                message = self._assemble()
            except BlockingIOError:
                return
            except (EOFError, FramingLost):
                self._close_fds()
                raise
            try:
                yield message
            finally:
                self._close_fds()
                self._start()

    def send(self, reply: bytes) -> None:
        """Front ends wait for replies, so the socket is all but never full. Raises as receive."""
        rest = memoryview(reply)
        while rest:
            try:
                rest = rest[self._socket.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                if not poll.poll(_SEND_TIMEOUT_MS):
                    raise FramingLost("the front end does not read its replies") from None
            except ConnectionError:
                raise EOFError("the front end is gone") from None

    def close(self) -> None:
        self._close_fds()
        foreign.close(self._socket.detach())  # descriptors may be left in it, unread

    def _start(self) -> None:
        self._head = bytearray()
        self._payload = bytearray()
        self._payload_read = 0
        self._fault: str | None = None

    def _assemble(self) -> Message:
        """Go on with the message at hand; BlockingIOError leaves it for another time."""
        while len(self._head) < MESSAGE_HEADER.size:
            self._head += self._read(MESSAGE_HEADER.size - len(self._head))
        header = MESSAGE_HEADER.unpack(bytes(self._head))
        if header.size > MAX_DISCARD:
            raise FramingLost(f"request {header.request} claims {header.size} payload bytes")
        if header.size > MAX_PAYLOAD:
            self._fault = f"{header.size} payload bytes are too many"
        while self._payload_read < header.size:
            piece = self._read(min(header.size - self._payload_read, MAX_PAYLOAD))
            self._payload_read += len(piece)
            if header.size <= MAX_PAYLOAD:
                self._payload += piece
        return Message(header, bytes(self._payload), tuple(self._fds), self._fault)

    def _read(self, limit: int) -> bytes:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                limit, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except (ConnectionError, BrokenPipeError):
            raise EOFError("the front end is gone") from None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array.array("i", content[: len(content) & ~3])
        if flags & socket.MSG_CTRUNC:
            self._fault = "descriptors were lost: the limit of open files is too low"
        elif len(self._fds) > MAX_FDS:
            self._fault = f"more than {MAX_FDS} descriptors"
        if self._fault is not None:  # the bytes still have to be read, descriptors need not pile up
            self._close_fds()
        if not data:
            raise EOFError("the front end is gone")
        return data

    def _close_fds(self) -> None:
        while self._fds:
            foreign.close(self._fds.pop())
