"""A client of the control tree: reads a file, or writes to one, over 9P2000."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from ninepd.errors import UsageError

_HEADER: Final = struct.Struct("<IBH")
_MSIZE: Final = 64 << 10
_NOTAG, _NOFID = 0xFFFF, 0xFFFF_FFFF
_RERROR: Final = 107
_TVERSION, _TATTACH, _TWALK, _TOPEN, _TREAD, _TWRITE, _TCLUNK = 100, 104, 110, 112, 116, 118, 120
_READ, _WRITE = 0, 1
_ROOT, _FILE = 0, 1
_SECONDS: Final = 10.0


class ControlError(UsageError):
    """What kept a file from being read or written, as a sentence."""


class Client:
    """One connection; everything is a ControlError that does not work."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_SECONDS)
        try:
            try:
                self._socket.connect(path)
            except OSError as error:
                words = error.strerror or str(error)
                raise ControlError(
                    f"--control-path: {path}: {words}; is a daemon running that was given it?"
                ) from None
            self._call(_TVERSION, struct.pack("<I", _MSIZE) + _string("9P2000"), _NOTAG)
            attach = struct.pack("<II", _ROOT, _NOFID)
            self._call(_TATTACH, attach + _string("ninepd") + _string(""))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def read(self, *names: str) -> bytes:
        """All that a file holds."""
        data = bytearray()
        with self._opened(_READ, names):
            while True:
                reply = self._call(_TREAD, struct.pack("<IQI", _FILE, len(data), _MSIZE))
                if len(reply) <= 4:
                    return bytes(data)
                data += reply[4:]

    def follow(self, *names: str) -> Iterator[bytes]:
        """Lines of a file that has no end, as they come."""
        self._walk(names)
        self._open(_READ)
        self._socket.settimeout(None)
        rest = b""
        while True:
            reply = self._call(_TREAD, struct.pack("<IQI", _FILE, 0, _MSIZE))
            *lines, rest = (rest + reply[4:]).split(b"\n")
            yield from lines

    def write(self, data: bytes, *names: str) -> None:
        with self._opened(_WRITE, names):
            self._call(_TWRITE, struct.pack("<IQI", _FILE, 0, len(data)) + data)

    def names(self, *folder: str) -> list[str]:
        """What is in a directory, in the order in which it is told."""
        data = self.read(*folder)
        found, at = [], 0
        while at < len(data):
            [size] = struct.unpack_from("<H", data, at)
            [length] = struct.unpack_from("<H", data, at + 41)
            found.append(data[at + 43 : at + 43 + length].decode())
            at += 2 + size
        return found

    @contextlib.contextmanager
    def _opened(self, mode: int, names: tuple[str, ...]) -> Iterator[None]:
        self._walk(names)
        try:
            self._open(mode)
            yield
        finally:
            self._call(_TCLUNK, struct.pack("<I", _FILE))

    def _walk(self, names: tuple[str, ...]) -> None:
        walk = struct.pack("<IIH", _ROOT, _FILE, len(names)) + b"".join(map(_string, names))
        [steps] = struct.unpack_from("<H", self._call(_TWALK, walk))
        if steps < len(names):
            raise ControlError(f"{self._path}: there is no {'/'.join(names)}")

    def _open(self, mode: int) -> None:
        self._call(_TOPEN, struct.pack("<IB", _FILE, mode))

    def _call(self, kind: int, body: bytes, tag: int = 0) -> bytes:
        """The body of the reply."""
        try:
            self._socket.sendall(_HEADER.pack(_HEADER.size + len(body), kind, tag) + body)
            size, answer, _ = _HEADER.unpack(self._receive(_HEADER.size))
            if not _HEADER.size <= size <= _MSIZE:
                raise ControlError(f"{self._path}: whoever answers there speaks no 9P2000")
            reply = self._receive(size - _HEADER.size)
        except OSError as error:
            words = error.strerror or str(error)
            raise ControlError(f"{self._path}: the daemon does not answer: {words}") from None
        if answer == _RERROR:
            raise ControlError(f"{self._path}: {reply[2:].decode(errors='backslashreplace')}")
        if answer != kind + 1:
            raise ControlError(f"{self._path}: whoever answers there speaks no 9P2000")
        return reply

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            some = self._socket.recv(size - len(data))
            if not some:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            data += some
        return bytes(data)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<H", len(data)) + data
