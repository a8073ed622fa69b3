"""What one 9P session remembers: dialect, msize, and the fid table.

No I/O here. ``F`` is whatever the file system keeps for a fid.
"""

import errno
from collections.abc import Callable
from enum import Enum
from typing import Final, Generic, TypeVar

from ninepd.p9.fids import FidTable
from ninepd.p9.limits import MIN_MSIZE
from ninepd.p9.messages import NOFID, Rerror, RerrorPlain, Rlerror, Rversion, Tversion
from ninepd.tuples import made

F = TypeVar("F")

_ENAME_MAX: Final = 126
"""Fits the smallest buffer that Linux gives a reply (net/9p/client.c)."""


class Dialect(Enum):
    """The versions of 9P that are spoken."""

    L = b"9P2000.L"
    U = b"9P2000.u"
    PLAIN = b"9P2000"


def _dialect(version: bytes) -> Dialect | None:
    for dialect in Dialect:
        if version == dialect.value:
            return dialect
    # An extension that is not known falls back to the plain protocol (version(5)).
    return Dialect.PLAIN if version.startswith(b"9P2000.") else None


class Session(Generic[F]):
    """Between one Tversion and the next. ``msize`` is 0 until the first."""

    def __init__(self, words: Callable[[int], bytes], fids_max: int) -> None:
        """``words`` says what an errno means, for those dialects that know no numbers."""
        self._words = words
        self._fids_max = fids_max
        self.msize = 0
        self.dialect = Dialect.L
        self.fids: FidTable[F] = FidTable()

    def negotiate(self, request: Tversion, msize_max: int) -> Rversion:
        """Answer a Tversion; the caller has dropped all fids. EMSGSIZE below 4096 bytes.

        A version that is not known is answered "unknown" and leaves no session (version(5)).
        """
        self.msize = 0
        if request.msize < MIN_MSIZE:
            raise OSError(errno.EMSGSIZE, f"msize {request.msize} is below {MIN_MSIZE}")
        msize = min(request.msize, msize_max)
        dialect = _dialect(request.version)
        if dialect is None:
            return Rversion(msize, b"unknown")
        self.msize = msize
        self.dialect = dialect
        return Rversion(msize, dialect.value)

    def error(self, code: int) -> Rlerror | Rerror | RerrorPlain:
        """The message that tells the client of an errno, in its dialect."""
        if self.dialect is Dialect.L:
            return made(Rlerror, (code,))
        words = self._words(code)[:_ENAME_MAX]
        return Rerror(words, code) if self.dialect is Dialect.U else RerrorPlain(words)

    def get(self, number: int) -> F:
        """What the client knows as ``number``; ENOENT, as QEMU's server says, if nothing."""
        fid = self.fids.get(number)
        if fid is None:
            raise FileNotFoundError(errno.ENOENT, f"fid {number} is not in use")
        return fid

    def check_free(self, number: int) -> None:
        """EINVAL if a new fid may not have this number, ENFILE if there are too many."""
        if number == NOFID or self.fids.get(number) is not None:
            raise OSError(errno.EINVAL, f"fid {number} is in use")
        if len(self.fids) >= self._fids_max:
            raise OSError(errno.ENFILE, f"{self._fids_max} fids are in use")

    def add(self, number: int, fid: F) -> None:
        """Give a fid its number; EINVAL if that was given away meanwhile."""
        if self.fids.get(number) is not None:
            raise OSError(errno.EINVAL, f"fid {number} is in use")
        self.fids.add(number, fid)

    def remove(self, number: int) -> F:
        """Take a number back; ENOENT if it is not in use."""
        fid = self.fids.pop(number)
        if fid is None:
            raise FileNotFoundError(errno.ENOENT, f"fid {number} is not in use")
        return fid

    def end_some(self, count: int) -> list[F]:
        """Forget the session; returns up to so many fids, for the caller to release, or none."""
        self.msize = 0
        self.dialect = Dialect.L
        return self.fids.take(count)
