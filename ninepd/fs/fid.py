"""A fid: a handle on an inode and, once opened, what it was opened as."""

import os
from dataclasses import dataclass, field

from ninepd.fs.tree import Handle


@dataclass(slots=True)
class OpenFile:
    """A regular file open for I/O."""

    fd: int
    flags: int
    """Host flags it was opened with."""

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def synchronous(self) -> bool:
        return bool(self.flags & (os.O_SYNC | os.O_DSYNC))


@dataclass(slots=True)
class OpenDirectory:
    """A directory open for reading entries."""

    fd: int


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


class Fid:
    """State of one fid. ``parent`` and ``name`` are only a hint at where the file was found.

    ``users`` counts requests that run outside the device thread and use this fid: as long as there
    are any, a clunk leaves the descriptors open and marks the fid ``doomed``.
    """

    __slots__ = ("doomed", "handle", "name", "opened", "parent", "uid", "users")

    def __init__(self, handle: Handle, uid: int, parent: Handle | None, name: bytes) -> None:
        """Takes over one reference to ``handle`` and, if given, one to ``parent``."""
        self.handle = handle
        self.uid = uid
        """n_uname of the attach it descends from: the owner of what is created through it."""
        self.parent = parent
        self.name = name
        self.opened: OpenFile | OpenDirectory | XattrValue | XattrWriter | None = None
        self.users = 0
        self.doomed = False
