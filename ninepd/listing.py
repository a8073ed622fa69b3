"""Typed face of ``_listing.c``: runs of directory entries, and cookies for positions in them."""

import sys
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol, cast

import ninepd._libvring as _libvring
from ninepd.syscalls import QidDevices, checked


class LookUp(IntEnum):
    """Which entries of a directory have to be looked up, because getdents64(2) says too little."""

    COVERED = 0
    """Only names that something is mounted on."""
    DIRECTORIES = 1
    """Directories too: a subvolume's entry does not show its device."""
    ALL = 2


class _Lib(Protocol):
    def nd_cookies_new(self, most: int) -> Any: ...
    def nd_cookies_free(self, cookies: Any) -> None: ...
    def nd_cookies_dump(self, cookies: Any, positions: Any, room: int, base: Any) -> int: ...
    def nd_cookies_load(self, cookies: Any, positions: Any, count: int, base: int) -> int: ...
    def nd_position(self, cookies: Any, cookie: int, position: Any) -> int: ...
    def nd_shorten(self, cookies: Any, entries: Any, size: int) -> int: ...
    def nd_readdir(
        self,
        fd: int,
        offset: int,
        at_root: bool,
        look_up: int,
        covered: bytes,
        mapped: bool,
        table: Any,
        cookies: Any,
        out: Any,
        size: int,
    ) -> int: ...
    def nd_entries_behind(self, run: Any, size: int, cookie: int, room: int, start: Any) -> int: ...
    def nd_getdents(self, fd: int, offset: int, out: Any, size: int) -> int: ...


_ffi: Final[Any] = _libvring.ffi
_lib: Final = cast("_Lib", _libvring.lib)
_new: Final = _ffi.new
_buffer: Final = _ffi.buffer
_unpack: Final = _ffi.unpack

RUN_MAX: Final = 65536
"""Longest run of directory entries in one reply: enough to amortise a round trip."""
_spare: Final[list[Any]] = []
"""Room for a run for each thread that was in a call."""


class Cookies:
    """Small numbers for the positions of one directory, which may be 64-bit hashes.

    A 32-bit guest fails with EOVERFLOW on a cookie above 2^31 - 1 (glibc's readdir). A position
    below 2^30 is its own cookie. Any other gets a number when it is first shown, 16 bytes each, and
    keeps it as long as the directory is open: a number means the same position to all fids, after
    rewinding, and after entries have gone. When there are too many the older half is forgotten.
    Safe to use from several threads.
    """

    __slots__ = ("table",)

    def __init__(self, most: int) -> None:
        """``most`` are known at once: see ``Limits``."""
        table = _lib.nd_cookies_new(most)
        if not table:
            raise MemoryError
        self.table = _ffi.gc(table, _lib.nd_cookies_free)

    def dump(self) -> tuple[int, list[int]]:
        """The number of the first position that has one, and all those positions."""
        base = _new("uint32_t *")
        room = _lib.nd_cookies_dump(self.table, _ffi.NULL, 0, base)
        positions = _new("uint64_t[]", room)
        count = _lib.nd_cookies_dump(self.table, positions, room, base)
        # Not a slice: that does not keep the array, which a compiled method lets go after its last
        # use.
        return base[0], _unpack(positions, min(room, count))

    def load(self, base: int, positions: list[int]) -> None:
        """Become what was dumped; only when fresh."""
        given = _new("uint64_t[]", positions)
        checked(_lib.nd_cookies_load(self.table, given, len(positions), base))

    def position(self, cookie: int) -> int:
        """What the file system calls the position; EINVAL for a number that is not known."""
        position = _new("uint64_t *")
        checked(_lib.nd_position(self.table, cookie, position))
        return cast("int", position[0])

    def shorten(self, entries: bytes) -> bytes:
        """Replace the positions in Rreaddir entries by their cookies."""
        out = bytearray(entries)
        checked(_lib.nd_shorten(self.table, _ffi.from_buffer(out), len(out)))
        return bytes(out)


class Run(NamedTuple):
    """What one Treaddir was answered with, for a client that seeks in it."""

    cookies: Cookies
    """Those of the directory."""
    version: int
    """qid.version of the directory then."""
    covered: bytes
    data: bytes

    def behind(self, cookie: int, size: int) -> bytes:
        """The entries behind the one with this cookie, at most ``size`` bytes; or nothing."""
        start = _new("uint32_t *")
        run = _ffi.from_buffer(self.data)
        length = _lib.nd_entries_behind(run, len(self.data), cookie, size, start)
        return self.data[start[0] : start[0] + length]


def readdir(
    fd: int,
    offset: int,
    at_root: bool,
    look_up: LookUp,
    covered: bytes,
    devices: QidDevices,
    cookies: Cookies,
    size: int,
    mapped: bool = False,
) -> bytes:
    """A run of Rreaddir entries after position ``offset``, at most ``size`` bytes, or RUN_MAX.

    ``covered``: names that something is mounted on, each ended by a NUL byte. ``mapped``: types are
    those that ``owners`` finds. Empty at the end.
    EINVAL if not one entry fits, EDOM if the table has no number for the first. Moves the position
    of ``fd``: one caller at a time.
    """
    try:
        out = _spare.pop()
    except IndexError:
        out = _new("uint8_t[]", RUN_MAX)
    try:
        got = checked(
            _lib.nd_readdir(
                fd,
                offset,
                at_root,
                look_up,
                covered,
                mapped,
                devices.table,
                cookies.table,
                out,
                min(size, RUN_MAX),
            )
        )
        return cast("bytes", _buffer(out)[0:got])
    finally:
        _spare.append(out)


def getdents(fd: int, offset: int, size: int = 32768) -> list[tuple[int, bytes]]:
    """(position behind it, name) of directory entries after position ``offset``; none at the end.

    Without those that have no name: see identify() in _listing.c.
    """
    out = _new("uint8_t[]", size)
    entries: list[tuple[int, bytes]] = []
    while not entries and (got := checked(_lib.nd_getdents(fd, offset, out, size))):
        data = bytes(_buffer(out)[0:got])
        at = 0
        while at < got:
            offset = int.from_bytes(data[at + 8 : at + 16], sys.byteorder)
            length = int.from_bytes(data[at + 16 : at + 18], sys.byteorder)
            name = data[at + 19 : data.index(0, at + 19)]
            if name:
                entries.append((offset, name))
            at += length
    return entries
