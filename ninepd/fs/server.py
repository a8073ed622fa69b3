"""The 9P server of one device: an export and the session that a guest has with it.

The operation modules beside this one hold one function per T-message, each
``(server, message, payload) -> reply``. A function runs to its end and returns the reply, or, when
something may have to wait for a disk, returns a ``Later`` with the rest of the work. Whoever calls
it (pipeline.py) decides on which thread that runs.

Threads: the device thread runs everything on local file systems, workers run ``Later`` work and
everything on remote ones (jobs.py).
"""

import errno
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from ninepd.fs.descriptors import Holder, on_worker
from ninepd.fs.fid import Fid, XattrValue, XattrWriter
from ninepd.fs.handles import Handle, Opened, Place
from ninepd.fs.locks import LockTable
from ninepd.fs.security import SecurityModel
from ninepd.fs.tree import Tree
from ninepd.p9.messages import IO_HEADER, Rversion, Tversion
from ninepd.p9.session import Session

log = logging.getLogger(__name__)

MAX_XATTR_FIDS: Final = 1024


class Payload:
    """The data part of one request, in guest memory: behind the message or behind its reply."""

    __slots__ = ("available", "body", "room")

    def __init__(self, available: int, room: int, body: Any) -> None:
        self.available = available
        """Bytes of data behind the 23 bytes of a Twrite."""
        self.room = room
        """Bytes of data that fit behind the 11 bytes of an Rread or Rreaddir."""
        self.body = body
        """C's view of the buffer for a small reply, behind its header: for ``Encoded``."""

    @abstractmethod
    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        """preadv2 into the reply's data after ``skip`` bytes; returns bytes, raises OSError."""

    @abstractmethod
    def write(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        """pwritev2 from the request's data after ``skip`` bytes; returns bytes, raises OSError."""

    @abstractmethod
    def put(self, data: bytes, skip: int = 0) -> None:
        """Copy ``data`` into the reply's data after ``skip`` bytes."""

    @abstractmethod
    def take(self, count: int) -> bytes:
        """Copy the first ``count`` bytes of the request's data."""


class Encoded:
    """A reply whose body, ``size`` bytes, C has encoded into ``payload.body``."""

    __slots__ = ("number", "size")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size

    def __repr__(self) -> str:
        return f"message {self.number}, {self.size} bytes"


class Later:
    """The rest of a request, which may block; ``work`` returns the reply or raises OSError.

    It is given a payload of its own: guest memory may be gone by the time it runs.
    """

    __slots__ = ("work",)

    def __init__(self, work: Callable[[Payload], Any]) -> None:
        self.work = work


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
        self._lock = threading.Lock()
        self._ended = False

    # Session

    def version(self, request: Tversion, msize_limit: int) -> Rversion:
        """Begin the session; EMSGSIZE for an impossible msize."""
        return self.session.negotiate(request, min(self.policy.msize_max, msize_limit))

    def end(self) -> None:
        """Drop the session as if the client had clunked everything, without committing xattrs."""
        with self._lock:
            self._ended = True
            fids = self.session.clear()
        for fid in fids:
            self.retire(fid)

    def pin(self, fids: list[Fid], holders: list[Holder]) -> None:
        """Work on another thread begins: fids and descriptors stay until ``unpin``."""
        with self._lock, self.tree.handles.budget.lock:
            for fid in fids:
                fid.users += 1
            for holder in holders:
                holder.pins += 1

    def unpin(self, fids: list[Fid], holders: list[Holder]) -> None:
        """The work has ended. A fid that was clunked meanwhile goes with its last user."""
        with self._lock, self.tree.handles.budget.lock:
            for holder in holders:
                holder.pins -= 1
            for fid in fids:
                fid.users -= 1
            done = [fid for fid in fids if fid.doomed and not fid.users]
        for fid in done:
            self._release(fid)

    def _release(self, fid: Fid) -> None:
        opened, fid.opened = fid.opened, None
        if isinstance(opened, Opened):
            for close in (partial(self.locks.drop, fid), opened.close):
                try:
                    close()
                except OSError as error:  # of a late write
                    log.warning("closing a file: %s", error)
        elif opened is not None:
            self.xattr_fids -= 1
        self.tree.handles.release(fid.handle)
        if fid.elsewhere is not None:
            self.tree.handles.release(fid.elsewhere[0])

    def retire(self, fid: Fid) -> None:
        """Close what a fid holds, whose number is free: now, or when its last user is done."""
        with self._lock:
            if fid.users:
                fid.doomed = True
                return
        self._release(fid)

    def close_file(self, fid: Fid) -> None:
        """Close the file of a fid that is being clunked, if no other work uses it.

        OSError is the result of the guest's close(2). It is closed all the same.
        """
        with self._lock:
            # A request that runs on a worker is one of the users itself.
            if fid.users > on_worker() or not isinstance(fid.opened, Opened):
                return
            opened, fid.opened = fid.opened, None
        try:
            self.locks.drop(fid)
        finally:
            opened.close()

    # Fids

    def fid(self, number: int) -> Fid:
        """ENOENT if the client has no such fid."""
        return self.session.get(number)

    def add(self, number: int, handle: Handle, uid: int, elsewhere: Place | None = None) -> Fid:
        """A new fid; takes over its references, see ``Fid``."""
        fid = Fid(handle, uid, elsewhere)
        try:
            with self._lock:
                if self._ended:
                    raise FileNotFoundError(errno.ENOENT, "the session has ended")
                self.session.add(number, fid)
        except OSError:
            self._release(fid)
            raise
        return fid

    def remove(self, number: int) -> Fid:
        """Take a number back; ENOENT if it is not in use, also if another thread was faster."""
        with self._lock:
            return self.session.remove(number)

    def move(self, fid: Fid, handle: Handle, directory: Handle, name: bytes) -> None:
        """A fid becomes one of what is at this place. Takes over the reference to ``handle``."""
        elsewhere = self.tree.handles.note(handle, directory, name)
        self.replace(fid, handle, elsewhere)
        fid.attached = False

    def replace(self, fid: Fid, handle: Handle, elsewhere: Place | None) -> None:
        """A fid becomes another; takes over the references, as a new one would."""
        handle, fid.handle = fid.handle, handle
        elsewhere, fid.elsewhere = fid.elsewhere, elsewhere
        self.tree.handles.release(handle)
        if elsewhere is not None:
            self.tree.handles.release(elsewhere[0])

    def directory(self, number: int) -> Fid:
        """A fid that holds a directory; ENOTDIR if it holds something else."""
        fid = self.session.get(number)
        if not fid.handle.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, f"fid {number} is no directory")
        if isinstance(fid.opened, (XattrValue, XattrWriter)):
            raise OSError(errno.EINVAL, f"fid {number} is an extended attribute")
        return fid

    def file(self, number: int) -> Fid:
        """A fid that holds a file-system object, not an extended attribute (EINVAL)."""
        fid = self.session.get(number)
        if isinstance(fid.opened, (XattrValue, XattrWriter)):
            raise OSError(errno.EINVAL, f"fid {number} is an extended attribute")
        return fid

    def unopened(self, number: int) -> Fid:
        """A fid that may be opened, or moved to another file: EINVAL if it is open already."""
        fid = self.session.get(number)
        if fid.opened is not None:
            raise OSError(errno.EINVAL, f"fid {number} is open already")
        return fid

    def check_xattr_room(self) -> None:
        """ENOSPC, as QEMU's max_xattr, when too many extended attributes are open."""
        if self.xattr_fids >= MAX_XATTR_FIDS:
            raise OSError(errno.ENOSPC, f"{MAX_XATTR_FIDS} extended attributes are open")

    def refuse_if_readonly(self) -> None:
        if self.policy.readonly:
            raise OSError(errno.EROFS, "the export is read-only")

    # Answers

    def iounit(self) -> int:
        """Largest I/O size in whole pages, so that big transfers stay aligned; 0 if below one."""
        return (self.session.msize - IO_HEADER - 13) & ~4095


class Service:
    """An export, and whatever session a guest has with it now."""

    def __init__(self, tree: Tree, policy: Policy) -> None:
        self._tree = tree
        self._policy = policy
        self.server = Server(tree, policy)

    def restart(self) -> None:
        """The session is over, and a new one may begin."""
        old, self.server = self.server, Server(self._tree, self._policy)
        if self._tree.handles.volumes.remote:
            # Closing files may take as long as their storage takes.
            threading.Thread(target=old.end, name="ninepd farewell", daemon=True).start()
        else:
            old.end()

    def abandon(self) -> None:
        """As restart, but a thread that will not come back may be using anything of the old one."""
        self._tree.handles.budget.freeze()
        self.server = Server(self._tree, self._policy)
