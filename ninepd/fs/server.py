"""The 9P server of one device: an export and the session that a guest has with it.

The operation modules beside this one hold one function per T-message, each
``(server, message, payload) -> reply``. A function runs to its end and returns the reply, or, when
something may have to wait for a disk, returns a ``Later`` with the rest of the work. Whoever calls
it (device.py) decides on which thread that runs.

Threads: the device thread runs everything on local file systems, workers run ``Later`` work and
everything on remote ones. Fids are looked up and pinned (``users``) on the device thread.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from ninepd.fs.fid import Fid, XattrValue, XattrWriter
from ninepd.fs.handles import Handle, Opened, Storage
from ninepd.fs.locks import LockTable
from ninepd.fs.security import SecurityModel
from ninepd.fs.tree import Tree
from ninepd.p9.messages import IO_HEADER, Rversion, Tversion
from ninepd.p9.session import Session

MAX_XATTR_FIDS: Final = 1024


class Payload(Protocol):
    """The data part of one request, in guest memory: behind the message or behind its reply."""

    room: int
    """Bytes of data that fit behind the 11 bytes of an Rread or Rreaddir."""
    available: int
    """Bytes of data behind the 23 bytes of a Twrite."""

    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        """preadv2 into the reply's data after ``skip`` bytes; returns bytes, raises OSError."""

    def write(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        """pwritev2 from the request's data after ``skip`` bytes; returns bytes, raises OSError."""

    body: Any
    """C's view of the buffer for a small reply, behind its header: for ``Encoded``."""

    def put(self, data: bytes) -> None:
        """Copy ``data`` to the start of the reply's data."""

    def take(self, count: int) -> bytes:
        """Copy the first ``count`` bytes of the request's data."""


class Encoded(NamedTuple):
    """A reply whose body C has encoded into ``payload.body``."""

    number: int
    size: int


class Later(NamedTuple):
    """The rest of a request, which may block; ``work`` returns the reply or raises OSError."""

    work: Callable[[], Any]
    in_guest_memory: bool
    """Does it move data between a file and guest memory?"""


Reply: TypeAlias = Any
"""An R-message, ``Encoded`` or ``Later``."""


@dataclass(frozen=True)
class Policy:
    """What the user chose for an export."""

    model: SecurityModel
    readonly: bool
    msize_max: int


class Server:
    """An export, and one session on it."""

    def __init__(self, tree: Tree, policy: Policy) -> None:
        self.tree = tree
        self.policy = policy
        self.model = policy.model
        self.session: Session[Fid] = Session()
        self.locks = LockTable(tree)
        self.xattr_fids = 0

    # Session

    def version(self, request: Tversion, msize_limit: int) -> Rversion:
        """Start a session; every fid of the one before is gone, and every lock."""
        self.reset()
        return self.session.negotiate(request, min(self.policy.msize_max, msize_limit))

    def reset(self) -> None:
        """Drop the session as if the client had clunked everything, without committing xattrs."""
        for fid in self.session.clear():
            if fid.users:
                fid.doomed = True
            else:
                self.release(fid)

    def release(self, fid: Fid) -> None:
        """Close what a fid holds. Its number must be free already."""
        opened, fid.opened = fid.opened, None
        if isinstance(opened, Opened):
            self.locks.drop(fid)
            opened.close()
        elif opened is not None:
            self.xattr_fids -= 1
        self.tree.handles.release(fid.handle)
        if fid.place is not None:
            self.tree.handles.release(fid.place[0])

    def retire(self, fid: Fid) -> None:
        """Release a fid whose number is free, now or when its last user is done."""
        if fid.users:
            fid.doomed = True
        else:
            self.release(fid)

    # Fids

    def fid(self, number: int) -> Fid:
        """ENOENT if the client has no such fid."""
        return self.session.get(number)

    def add(
        self, number: int, handle: Handle, uid: int, place: tuple[Handle, bytes] | None = None
    ) -> Fid:
        """A new fid; takes over a reference to ``handle`` and one to the directory in ``place``."""
        fid = Fid(handle, uid, place)
        try:
            self.session.add(number, fid)
        except OSError:
            self.release(fid)
            raise
        return fid

    def directory(self, number: int) -> Fid:
        """A fid that holds a directory; ENOTDIR if it holds something else."""
        fid = self.session.get(number)
        if not fid.handle.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, f"fid {number} is no directory")
        if isinstance(fid.opened, XattrValue | XattrWriter):
            raise OSError(errno.EINVAL, f"fid {number} is an extended attribute")
        return fid

    def file(self, number: int) -> Fid:
        """A fid that holds a file-system object, not an extended attribute (EINVAL)."""
        fid = self.session.get(number)
        if isinstance(fid.opened, XattrValue | XattrWriter):
            raise OSError(errno.EINVAL, f"fid {number} is an extended attribute")
        return fid

    def unopened(self, number: int) -> Fid:
        """A fid that may be opened, or moved to another file: EINVAL if it is open already."""
        fid = self.session.get(number)
        if fid.opened is not None:
            raise OSError(errno.EINVAL, f"fid {number} is open already")
        return fid

    def count_xattr_fid(self) -> None:
        """ENOSPC, as QEMU's max_xattr, when too many extended attributes are open."""
        if self.xattr_fids >= MAX_XATTR_FIDS:
            raise OSError(errno.ENOSPC, f"{MAX_XATTR_FIDS} extended attributes are open")
        self.xattr_fids += 1

    def refuse_if_readonly(self) -> None:
        if self.policy.readonly:
            raise OSError(errno.EROFS, "the export is read-only")

    # Answers

    def iounit(self) -> int:
        """Largest I/O size in whole pages, so that big transfers stay aligned; 0 if below one."""
        return (self.session.msize - IO_HEADER - 13) & ~4095


def waits(fid: Fid) -> bool:
    """Must a request on this fid leave the device thread from the start?"""
    return fid.handle.storage is Storage.REMOTE
