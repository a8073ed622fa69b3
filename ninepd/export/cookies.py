"""Small directory cookies, where the file system's own are 64-bit hashes.

A 32-bit guest fails with EOVERFLOW on a cookie above 2^31 - 1 (glibc's readdir). So each position
of a directory gets a number when it is first shown, and keeps it as long as the directory is held:
a number means the same position to all fids, after rewinding, and after entries have gone.
"""

import errno
import threading
from array import array
from struct import Struct
from typing import Final

_AT: Final = 13
_REST: Final = Struct("<QBH")
"""Behind the qid of an entry, which is qid[13] offset[8] type[1] name[s]."""
_COOKIE: Final = Struct("<Q")


class Cookies:
    """The numbers of one directory. Safe to use from several threads."""

    __slots__ = ("_lock", "_numbers", "_positions")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._positions = array("Q", [0])
        self._numbers = {0: 0}

    def position(self, cookie: int) -> int:
        """What the file system calls the position; EINVAL for a number that was never given."""
        try:
            return self._positions[cookie]
        except IndexError:
            raise OSError(errno.EINVAL, f"cookie {cookie} was not given out") from None

    def shorten(self, entries: bytes) -> bytes:
        """Replace the positions in Rreaddir entries by their numbers."""
        out = bytearray(entries)
        numbers, positions = self._numbers, self._positions
        at, end = _AT, len(entries)
        with self._lock:
            while at < end:
                position, _, length = _REST.unpack_from(entries, at)
                number = numbers.get(position)
                if number is None:
                    number = numbers[position] = len(positions)
                    positions.append(position)
                _COOKIE.pack_into(out, at, number)
                at += _REST.size + length + _AT
        return bytes(out)
