"""A FUSE server that says what no library would: it speaks the kernel's protocol itself.

Its root has one file, and directory entries as a test wants them (include/uapi/linux/fuse.h).
"""

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<IIQQIIII")
_ANSWER: Final = struct.Struct("<IiQ")
_LOOKUP, _FORGET, _GETATTR, _STATFS, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = (
    1, 2, 3, 17, 26, 27, 28, 29,
)  # fmt: skip
_INTERRUPT, _BATCH_FORGET = 36, 42
_ROOT, _FILE = 1, 2
_REQUEST_MAX: Final = 1 << 17
_FORCE, _DETACH = 1, 2  # MNT_FORCE: requests that are out fail; MNT_DETACH
_libc: Final = ctypes.CDLL(None, use_errno=True)


def _attributes(node: int) -> bytes:
    mode = 0o40755 if node == _ROOT else 0o100644
    return struct.pack("<6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class RawFuse:
    """Mounted while it is entered; a thread answers."""

    def __init__(self, target: Path, entries: Sequence[bytes], file: bytes) -> None:
        """``file`` is the name of the one that can be looked up."""
        self._target = os.fsencode(target)
        self._entries = entries
        self._file = file
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> "RawFuse":
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"raw", self._target, b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "cannot mount")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _libc.umount2(self._target, _FORCE | _DETACH)
        self._thread.join()
        os.close(self._fd)

    def _serve(self) -> None:
        while request := self._next():
            _, kind, unique, node, *_ = _HEADER.unpack_from(request)
            if kind in {_FORGET, _BATCH_FORGET, _INTERRUPT}:
                continue
            body = self._answer(kind, node, request[_HEADER.size :])
            error = 0 if isinstance(body, bytes) else -body
            data = body if isinstance(body, bytes) else b""
            with contextlib.suppress(FileNotFoundError):  # who asked does not wait any more
                os.write(self._fd, _ANSWER.pack(_ANSWER.size + len(data), error, unique) + data)

    def _next(self) -> bytes:
        try:
            return os.read(self._fd, _REQUEST_MAX)
        except OSError as failure:
            if failure.errno != errno.ENODEV:  # it is unmounted
                raise
            return b""

    def _answer(self, kind: int, node: int, body: bytes) -> bytes | int:
        """What comes behind the header, or an errno."""
        if kind == _INIT:
            return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 12, 9, 4096, 1, 1, 0, *[0] * 8)
        if kind == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + _attributes(node)
        if kind == _LOOKUP:
            if body.rstrip(b"\0") != self._file:
                return errno.ENOENT
            return struct.pack("<4Q2I", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
        if kind in {_OPENDIR, _RELEASEDIR}:
            return bytes(16) if kind == _OPENDIR else b""
        if kind == _STATFS:
            return struct.pack("<5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
        if kind == _READDIR:
            return self._listed(*struct.unpack_from("<QQI", body)[1:])
        return errno.ENOSYS

    def _listed(self, offset: int, size: int) -> bytes:
        out = b""
        for number, name in enumerate(self._entries[offset:], offset + 1):
            entry = struct.pack("<QQII", _FILE, number, len(name), 8) + name
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out
