"""Notices what happens to files of the host: inotify(7), which Python has not."""

import ctypes
import os
import struct
from pathlib import Path
from typing import NamedTuple, Self

OPEN = 0x20
EVERYTHING = 0xFFF
CHANGES = 0xFC6
"""All but reading and opening."""
_DONT_FOLLOW = 0x02000000
_EVENT = struct.Struct("=iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    mask: int
    path: Path
    """What was watched."""
    name: bytes
    """Of what it happened to, if that lies in a directory that is watched."""


class Watch:
    """Events of files, from its creation on. A link itself is watched, never its target."""

    def __init__(self, *paths: Path, mask: int = EVERYTHING) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._paths: dict[int, Path] = {}
        self.add(*paths, mask=mask)

    def add(self, *paths: Path, mask: int) -> None:
        for path in paths:
            number = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask | _DONT_FOLLOW)
            if number < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")
            self._paths[number] = path

    def events(self) -> list[Event]:
        """What has happened since the last call."""
        found = []
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        while data:
            number, mask, _, size = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
            found.append(Event(mask, self._paths[number], name))
            data = data[_EVENT.size + size :]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
