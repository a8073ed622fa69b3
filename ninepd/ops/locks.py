"""Byte-range locks of guests, made real as open-file-description locks on the host.

What matters here is the guest as a whole against other guests and host processes: per inode there
is one lock descriptor, with the union of what the guest's owners hold. It is separate from the
fids' own: closing any of those must not drop a lock, and a write lock on a read-only fid (flock(2)
allows it) needs a descriptor that is open for writing. Only while something is locked for writing
it is: a file that is open for writing cannot be executed, nor get a read lease, on the host. Where
the daemon may not write, the host gets a read lock in place of a write lock. That keeps out whoever
writes, and the guest's own kernel all others of the guest; it does not keep out another's readers.

Linux settles conflicts between its own processes before it asks (fs/9p/vfs_file.c,
v9fs_file_do_lock), and tells us neither whether a lock is one of fcntl(2), which belongs to a
process, or of flock(2), which belongs to an open file, that is to a fid. So a lock that is asked
for proves that what stands in its way here is its own earlier form, or about to be given back:
see ``_settled``. flock(fd, LOCK_UN) comes with the flag BLOCK, the release by which a process
closes a descriptor, shared or not, without (fs/locks.c, locks_remove_posix): see ``_given_back``.

Threads: requests on the locks of one inode come one at a time (pipeline.py); the table's own lock
is never held across a call on the host.
"""

import errno
import fcntl
import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from ninepd.export.handles import Handle, Opened
from ninepd.export.host import Host
from ninepd.export.tree import Tree
from ninepd.ops.ranges import TO_END, Owner, Range, Ranges, clipped, is_whole, without
from ninepd.p9.messages import LockType

if TYPE_CHECKING:
    from ninepd.ops.fid import Fid

log = logging.getLogger(__name__)

_TO_HOST: Final = {
    LockType.RDLCK: fcntl.F_RDLCK,
    LockType.WRLCK: fcntl.F_WRLCK,
    LockType.UNLCK: fcntl.F_UNLCK,
}
_FROM_HOST: Final = {host: guest for guest, host in _TO_HOST.items()}
_NO_WRITE_ACCESS: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY})


class _Inode:
    """The locks on one file, and the descriptor that holds them on the host."""

    def __init__(self, handle: Handle, host: Host) -> None:
        self.handle = handle
        self._host = host
        self.ranges = Ranges()
        self.file: Opened | None = None
        self.requests = 0
        """Since the descriptor was opened, with the one that opened it."""
        self.busy = False

    def take(self, kind: LockType, start: int, end: int) -> bool:
        """Lock a range on the host, at once or not at all; False if others are in the way."""
        assert self.file is not None  # noqa: S101 - opened by whoever calls
        if not self.file.writable:  # it takes no more than a read lock then
            kind = LockType.RDLCK
        try:
            self.apply(self.file, kind, start, end)
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise
        return True

    def apply(self, file: Opened, kind: LockType, start: int, end: int) -> None:
        self._host.lock(file.fd, _TO_HOST[kind], start, _length(start, end))

    def give_back(self, gone: list[Range], come: list[Range], start: int, end: int) -> None:
        """Forget ranges, and unlock on the host what nobody holds any more."""
        self.ranges.change(gone, come, start, end)
        if not self.ranges or self.file is None:
            return  # the descriptor is about to be closed, which unlocks all
        for low, high in self.ranges.cover.free(clipped(gone, start, end)):
            self.apply(self.file, LockType.UNLCK, low, high)


class LockTable:
    """All locks of one session. Safe to use from several threads."""

    def __init__(self, tree: Tree, ranges_max: int) -> None:
        self._tree = tree
        self._ranges_max = ranges_max
        self._inodes: dict[Handle, _Inode] = {}
        self._count = 0
        self._ended = False
        self._lock = threading.Lock()

    def lock(
        self,
        fid: "Fid",
        kind: LockType,
        start: int,
        length: int,
        owner: Owner,
        *,
        block: bool = False,
        wait: bool = False,
    ) -> bool:
        """Take or release a range for ``owner``; False if somebody else's lock is in the way.

        ``block`` is the flag of that name. Raises ENOLCK if there are too many ranges, EINVAL for
        an impossible one, and as ``Tree.open`` BlockingIOError unless told to ``wait``.
        """
        start, end = span(start, length)
        new = Range(start, end, kind, owner, fid)
        inode = self._enter(fid.handle, create=kind != LockType.UNLCK)
        if inode is None:
            return True
        try:
            if kind == LockType.UNLCK:
                self._release(inode, new, block)
                return True
            return self._take(inode, new, wait)
        finally:
            self._leave(inode)

    def conflict(
        self, fid: "Fid", file: Opened, kind: LockType, start: int, length: int, owner: Owner
    ) -> tuple[LockType, int, int, Owner] | None:
        """(type, start, length, owner) of a lock that bars ``owner`` from taking the range.

        ``file`` is what the fid is open as. A holder outside this session has proc_id as the host
        tells it and no client_id.
        """
        start, end = span(start, length)
        inode = self._enter(fid.handle, create=False)
        try:
            others = [] if inode is None else inode.ranges.others(owner, start, end)
            if kind == LockType.UNLCK:
                kind = _guessed(fid, others)
                others = [held for held in others if not _settled(held, fid)]
            for held in others:
                if LockType.WRLCK in {held.type, kind}:
                    return held.type, held.start, _length(held.start, held.end), held.owner
            if inode is not None and inode.file is not None:
                file = inode.file  # its locks are no others' to itself
            return self._foreign(file, kind, start, end)
        finally:
            if inode is not None:
                self._leave(inode)

    def _foreign(
        self, file: Opened, kind: LockType, start: int, end: int
    ) -> tuple[LockType, int, int, Owner] | None:
        length = _length(start, end)
        held, at, length, pid = self._tree.host.find_lock(file.fd, _TO_HOST[kind], start, length)
        if held == fcntl.F_UNLCK:
            return None
        return _FROM_HOST[held], at, length, Owner(max(pid, 0), b"")

    def drop(self, fid: "Fid") -> None:
        """Release every range that was taken through a fid, which is being closed."""
        if not fid.locks:
            return
        inode = self._enter(fid.handle, create=False)
        if inode is None:
            return
        try:
            gone = inode.ranges.through(fid)
            self._reserve(-len(gone))
            inode.give_back(gone, [], 0, TO_END)
            self._relax(inode)
        finally:
            self._leave(inode)

    def end(self) -> None:
        """Release everything; what a request is still busy with, at the end of that request."""
        with self._lock:
            self._ended = True
            idle = [inode for inode in self._inodes.values() if not inode.busy]
            self._inodes.clear()
        for inode in idle:
            try:
                self._close(inode)
            except OSError as error:  # of a late write
                log.warning("closing a file: %s", error)

    def dump(self) -> list[tuple[Opened, list[Range]]]:
        """What is locked on each file, and the descriptor that holds it on the host."""
        with self._lock:
            inodes = list(self._inodes.values())
        return [(inode.file, inode.ranges.all()) for inode in inodes if inode.file is not None]

    def some(self, start: int, count: int) -> tuple[list[tuple[Handle, Range]], int | None]:
        """Up to so many ranges behind the first ``start``, and where to go on; None if all are out.

        While requests may change them.
        """
        with self._lock:
            inodes = list(self._inodes.values())
        ranges = [(inode.handle, held) for inode in inodes for held in inode.ranges.all()]
        end = start + count
        return ranges[start:end], end if end < len(ranges) else None

    def load(self, file: Opened, ranges: list[Range]) -> None:
        """Take over a descriptor that holds these on the host."""
        self._tree.handles.pin([file], [])
        inode = _Inode(self._tree.handles.share(file.handle), self._tree.host)
        inode.file = file
        inode.requests = 1
        inode.ranges.change([], ranges, 0, TO_END)
        with self._lock:
            self._inodes[file.handle] = inode
            self._count += len(ranges)

    # One request on one inode

    def _enter(self, handle: Handle, *, create: bool) -> _Inode | None:
        with self._lock:
            if self._ended and create:
                raise OSError(errno.ENOLCK, "the session has ended")
            inode = self._inodes.get(handle)
            if inode is None:
                if not create:
                    return None
                inode = self._inodes[handle] = _Inode(handle, self._tree.host)
            assert not inode.busy, "two requests on one inode's locks"  # noqa: S101
            inode.busy = True
            inode.requests += 1
            return inode

    def _leave(self, inode: _Inode) -> None:
        with self._lock:
            inode.busy = False
            if inode.ranges and not self._ended:
                return
            self._inodes.pop(inode.handle, None)
        self._close(inode)

    def _close(self, inode: _Inode) -> None:
        if inode.file is not None:
            try:
                inode.file.close()
            finally:
                self._tree.handles.release(inode.handle)

    def _reserve(self, count: int) -> None:
        with self._lock:
            if count > 0 and self._count + count > self._ranges_max:
                raise OSError(errno.ENOLCK, f"{self._count} ranges are locked")
            self._count += count

    def _take(self, inode: _Inode, new: Range, wait: bool) -> bool:
        ranges = inode.ranges
        rivals = ranges.rivals(new)
        if not all(_settled(held, new.fid) for held in rivals):
            return False
        gone, come = ranges.replaced(new)
        for held in rivals:
            gone.append(held)
            come += without(held, new.start, new.end)
        growth = len(come) - len(gone)
        room = max(growth, 0)
        self._reserve(room)
        taken = False
        try:
            self._prepare(inode, new.type, wait)
            taken = inode.take(new.type, new.start, new.end)
        finally:
            self._reserve((growth if taken else 0) - room)
        if taken:
            ranges.change(gone, come, new.start, new.end)
        self._relax(inode)
        return taken

    def _release(self, inode: _Inode, new: Range, block: bool) -> None:
        gone, come = inode.ranges.replaced(new)
        if block and is_whole(new):
            gone += _given_back(inode.ranges, new)
        # Releasing the middle of a range makes two of it.
        self._reserve(len(come) - len(gone))
        inode.give_back(gone, come, new.start, new.end)
        self._relax(inode)

    # The descriptor

    def _prepare(self, inode: _Inode, kind: LockType, wait: bool) -> None:
        """Have a descriptor that may take a lock of this type."""
        if inode.file is None:
            self._tree.handles.share(inode.handle)
            try:
                self._reopen(inode, _flags(kind), wait)
            except OSError:
                self._tree.handles.release(inode.handle)
                raise
        elif kind == LockType.WRLCK and not inode.file.writable:
            self._reopen(inode, os.O_RDWR, wait)

    def _relax(self, inode: _Inode) -> None:
        """Stop having the file open for writing when nothing needs it."""
        ranges, file = inode.ranges, inode.file
        if not ranges or ranges.written or file is None or not file.writable:
            return
        if inode.requests < len(ranges.cover):
            return  # moving all those locks is worth it once in so many requests
        try:
            self._reopen(inode, os.O_RDONLY, wait=False)
        except OSError as error:
            log.debug("a lock keeps its file open for writing: %s", error)

    def _reopen(self, inode: _Inode, flags: int, wait: bool) -> None:
        """Move to another descriptor. All there is to move are read locks, which can be doubled,
        so that the file is never without them.
        """
        file = self._open(inode.handle, flags, wait)
        self._tree.handles.pin([file], [])  # closing it would drop the locks
        try:
            for start, end in inode.ranges.cover.held():
                inode.apply(file, LockType.RDLCK, start, end)
        except OSError:
            file.close()
            raise
        old, inode.file = inode.file, file
        inode.requests = 1
        if old is not None:
            try:
                old.close()
            except OSError as error:  # nothing was written by it
                log.warning("closing a file: %s", error)

    def _open(self, handle: Handle, flags: int, wait: bool) -> Opened:
        try:
            return self._tree.open(handle, flags, wait)
        except OSError as error:
            if flags != os.O_RDWR or error.errno not in _NO_WRITE_ACCESS:
                raise
        return self._tree.open(handle, os.O_RDONLY, wait)


def span(start: int, length: int) -> tuple[int, int]:
    """[start, end) of a request; EINVAL if it cannot be a range of a file."""
    end = TO_END if length == 0 else start + length
    if start >= TO_END or end > TO_END:
        raise OSError(errno.EINVAL, "the range lies beyond the largest file")
    return start, end


def _length(start: int, end: int) -> int:
    return 0 if end == TO_END else end - start


def _flags(kind: LockType) -> int:
    return os.O_RDWR if kind == LockType.WRLCK else os.O_RDONLY


def _settled(held: Range, fid: "Fid") -> bool:
    """Does the guest's kernel know of this lock when it asks for another through ``fid``?

    It does if both fids come from one name: then they are one inode for it. Two hard links, or two
    names that the host gave a file one after the other, are two inodes without ``cache=loose``
    (fs/9p/vfs_inode_dotl.c, v9fs_get_new_inode_from_fid), and nobody but us excludes their users.
    """
    return held.fid is fid or held.fid.own_hint == fid.own_hint


def _given_back(ranges: Ranges, new: Range) -> list[Range]:
    """What flock(fd, LOCK_UN) releases although another process took it: it is the open file's."""
    return [held for held in ranges.through(new.fid) if held.owner != new.owner and is_whole(held)]


def _guessed(fid: "Fid", others: list[Range]) -> LockType:
    """The type of lock that a Tgetlock with the type UNLCK is about.

    Linux always says UNLCK (fs/9p/vfs_file.c, v9fs_file_getlock), and answers itself whatever its
    own table can answer. So with a reader there that it knows of, it was asked for a read lock.
    Else it may have been either: then all is told that could be in the way, with its type.
    """
    for held in others:
        if held.type == LockType.RDLCK and held.fid is not fid and _settled(held, fid):
            return LockType.RDLCK
    return LockType.WRLCK
