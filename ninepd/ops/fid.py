"""A fid: a handle on an inode and, once opened, what it was opened as."""

import errno
from dataclasses import dataclass, field
from typing import Final

from mypy_extensions import i16, i32, mypyc_attr, u8

from ninepd.export.descriptors import Holder
from ninepd.export.handles import Handle, Hint, Opened

LIVES: Final = 0
DOOMED: Final = 1
"""Clunked, but a request still uses it."""
RELEASED: Final = 2
"""Somebody has taken it on to close what it holds."""


@dataclass(slots=True)
class XattrValue:
    """The value, or the list of names, that a Txattrwalk read."""

    data: bytes


@dataclass(slots=True)
class XattrWriter:
    """A value that a Txattrcreate announced; it is set when the fid is clunked."""

    name: bytes
    size: int
    flags: int
    data: bytearray = field(default_factory=bytearray)


@mypyc_attr(acyclic=True)
class Fid:
    """State of one fid.

    ``users`` counts requests that are out (jobs.py) and use this fid: as long as there are any, a
    clunk leaves the descriptors open. It marks the fid ``doomed`` in any case. There may be a
    million, so each attribute counts.
    """

    __slots__ = (
        "attached",
        "fate",
        "handle",
        "locks",
        "opened",
        "own_hint",
        "uid",
        "users",
    )

    def __init__(self, handle: Handle, uid: int, own_hint: Hint | None = None) -> None:
        """Takes over one reference to ``handle`` and one to the directory in ``own_hint``."""
        self.handle = handle
        self.uid = uid
        """n_uname of the attach it descends from: the owner of what is created through it."""
        self.own_hint = own_hint
        """Where it was found, if its handle was first found at another place."""
        self.opened: Opened | XattrValue | XattrWriter | None = None
        self.users: i32 = 0
        self.locks: i16 = 0
        """How many ranges are locked through it."""
        self.fate: u8 = LIVES
        self.attached = False
        """Is it the root of what was attached, which has no name (stat(5))?"""

    @property
    def doomed(self) -> bool:
        """Was it clunked?"""
        return self.fate != LIVES

    # What a request may ask of it

    def held(self) -> Handle:
        """The file-system object, of any kind; EINVAL if the fid is an extended attribute."""
        if isinstance(self.opened, (XattrValue, XattrWriter)):
            raise OSError(errno.EINVAL, "the fid is an extended attribute")
        return self.handle

    def directory(self) -> Handle:
        """The directory; ENOTDIR if it is something else."""
        if not self.handle.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "the fid is no directory")
        return self.held()

    def check_unopened(self) -> None:
        """EINVAL if it is open already, so may neither be opened nor moved to another file."""
        if self.opened is not None:
            raise OSError(errno.EINVAL, "the fid is open already")

    def open_object(self) -> Opened:
        """The open file or directory; EBADF if it is not open, or is an extended attribute."""
        if not isinstance(self.opened, Opened):
            raise OSError(errno.EBADF, "the fid is not open")
        return self.opened

    def open_file(self) -> Opened:
        """As ``open_object``; EISDIR for a directory."""
        if self.handle.is_directory and self.opened is not None:
            raise IsADirectoryError(errno.EISDIR, "the fid is a directory")
        return self.open_object()

    # What others need to know of it

    @property
    def hint(self) -> Hint | None:
        """Directory and name it was found at: a hint, which may no longer be true."""
        return self.own_hint or self.handle.hint

    def holders(self) -> list[Holder]:
        """What keeps the descriptors that a request on this fid may use."""
        holders: list[Holder] = [self.handle]
        opened = self.opened  # another thread may be closing it
        if isinstance(opened, Opened):
            holders.append(opened)
        hint = self.hint
        if hint is not None:
            holders.append(hint[0])
        return holders
