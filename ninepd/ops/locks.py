"""Byte-range locks of guests, made real as open-file-description locks on the host.

The guest kernel settles conflicts between its own processes before it asks us, so what matters here
is the guest as a whole against other guests and host processes. Per inode there is one lock
descriptor, with the union of what the guest's owners hold; conflicts between two owners of one
guest that reach us all the same (old clients) are answered from the table.

The descriptor is separate from the fids' own: closing any of those must not drop a lock, and a
write lock on a read-only fid (flock(2) allows it) needs a descriptor that is open for writing.
"""

import errno
import fcntl
import os
import struct
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from ninepd.export.handles import Handle, Opened
from ninepd.export.tree import Tree
from ninepd.p9.messages import LockType

if TYPE_CHECKING:
    from ninepd.ops.fid import Fid

_FLOCK: Final = struct.Struct("hhqqi4x")
_TO_HOST: Final = {
    LockType.RDLCK: fcntl.F_RDLCK,
    LockType.WRLCK: fcntl.F_WRLCK,
    LockType.UNLCK: fcntl.F_UNLCK,
}
_FROM_HOST: Final = {host: guest for guest, host in _TO_HOST.items()}
_READ_ONLY: Final = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ETXTBSY}
TO_END: Final = 1 << 63
"""First offset that no range can contain; a length of 0 reaches up to it."""
MAX_RANGES: Final = 4096


class Owner(NamedTuple):
    """Who a client says holds a lock."""

    proc_id: int
    client_id: bytes


class Range(NamedTuple):
    """Bytes [start, end) locked by an owner through a fid."""

    start: int
    end: int
    type: LockType
    owner: Owner
    fid: "Fid"


class _Inode:
    """The locks on one file."""

    def __init__(self, handle: Handle, file: Opened) -> None:
        self.handle = handle
        self.file = file
        self.fd = file.fd
        self.ranges: list[Range] = []


def span(start: int, length: int) -> tuple[int, int]:
    """[start, end) of a request; EINVAL if it cannot be a range of a file."""
    end = TO_END if length == 0 else start + length
    if start >= TO_END or end > TO_END:
        raise OSError(errno.EINVAL, "the range lies beyond the largest file")
    return start, end


class LockTable:
    """All locks of one session. Safe to use from several threads."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._inodes: dict[Handle, _Inode] = {}
        self._count = 0
        self._lock = threading.Lock()

    def lock(self, fid: "Fid", kind: LockType, start: int, length: int, owner: Owner) -> bool:
        """Take or release a range for ``owner``; False if somebody else's lock is in the way.

        Raises ENOLCK if there are too many ranges, EINVAL for an impossible one.
        """
        start, end = span(start, length)
        with self._lock:
            inode = self._inodes.get(fid.handle)
            if inode is None:
                if kind == LockType.UNLCK:
                    return True
                inode = self._open(fid.handle)
            try:
                return self._set(inode, Range(start, end, kind, owner, fid))
            finally:
                self._close_if_idle(inode)

    def conflict(
        self, fid: "Fid", kind: LockType, start: int, length: int, owner: Owner
    ) -> tuple[LockType, int, int, Owner] | None:
        """(type, start, length, owner) of a lock that bars ``owner`` from taking the range.

        A holder outside this session has proc_id as the host tells it and no client_id. Linux
        always asks with the type UNLCK (fs/9p/vfs_file.c, v9fs_file_getlock), so that is taken
        for a write lock: whatever could be in the way.
        """
        if kind == LockType.UNLCK:
            kind = LockType.WRLCK
        start, end = span(start, length)
        with self._lock:
            inode = self._inodes.get(fid.handle) or self._open(fid.handle)
            try:
                for held in inode.ranges:
                    if _bars(held, start, end, kind, owner):
                        length = 0 if held.end == TO_END else held.end - held.start
                        return held.type, held.start, length, held.owner
                return self._foreign(inode.fd, kind, start, end)
            finally:
                self._close_if_idle(inode)

    def drop(self, fid: "Fid") -> None:
        """Release every range that was taken through a fid, which is being closed."""
        with self._lock:
            inode = self._inodes.get(fid.handle)
            if inode is None:
                return
            gone = [held for held in inode.ranges if held.fid is fid]
            self._replace(inode, [held for held in inode.ranges if held.fid is not fid])
            for held in gone:
                self._apply(inode, held.start, held.end)
            self._close_if_idle(inode)

    def _open(self, handle: Handle) -> _Inode:
        try:
            file = self._tree.open(handle, os.O_RDWR)
        except OSError as error:
            # Without the right to write, read locks still work.
            if error.errno not in _READ_ONLY:
                raise
            file = self._tree.open(handle, os.O_RDONLY)
        file.pins = 1  # closing it would drop the locks
        inode = _Inode(self._tree.handles.share(handle), file)
        self._inodes[handle] = inode
        return inode

    def _close_if_idle(self, inode: _Inode) -> None:
        if not inode.ranges:
            del self._inodes[inode.handle]
            try:
                inode.file.close()
            finally:
                self._tree.handles.release(inode.handle)

    def _replace(self, inode: _Inode, ranges: list[Range]) -> None:
        self._count += len(ranges) - len(inode.ranges)
        inode.ranges = ranges

    def _set(self, inode: _Inode, new: Range) -> bool:
        before = inode.ranges
        if new.type != LockType.UNLCK and any(
            _bars(held, new.start, new.end, new.type, new.owner) for held in before
        ):
            return False
        after = []
        for held in before:
            if held.start < new.end and new.start < held.end and held.owner == new.owner:
                after += _without(held, new)
            else:
                after.append(held)
        if new.type != LockType.UNLCK:
            after.append(new)
        # Releasing the middle of a range makes two of it.
        if self._count + len(after) - len(before) > MAX_RANGES and len(after) > len(before):
            raise OSError(errno.ENOLCK, f"{MAX_RANGES} ranges are locked")
        self._replace(inode, after)
        try:
            self._apply(inode, new.start, new.end)
        except OSError as error:
            self._replace(inode, before)
            self._apply(inode, new.start, new.end)
            if error.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise
        return True

    def _apply(self, inode: _Inode, start: int, end: int) -> None:
        """Make the host's lock on [start, end) the strongest of what the owners hold there."""
        near = [held for held in inode.ranges if held.start < end and start < held.end]
        cuts = {start, end}
        for held in near:
            cuts.update(at for at in (held.start, held.end) if start < at < end)
        wanted = [(low, high, _strongest(near, low, high)) for low, high in pairwise(sorted(cuts))]
        # What may fail comes first, so that a refusal leaves as little as possible to take back.
        wanted.sort(key=lambda part: part[2] != LockType.WRLCK)
        for low, high, kind in wanted:
            length = 0 if high == TO_END else high - low
            request = _FLOCK.pack(_TO_HOST[kind], os.SEEK_SET, low, length, 0)
            fcntl.fcntl(inode.fd, fcntl.F_OFD_SETLK, request)

    @staticmethod
    def _foreign(
        fd: int, kind: LockType, start: int, end: int
    ) -> tuple[LockType, int, int, Owner] | None:
        length = 0 if end == TO_END else end - start
        request = _FLOCK.pack(_TO_HOST[kind], os.SEEK_SET, start, length, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
        found, _, at, size, pid = _FLOCK.unpack(answer)
        if found == fcntl.F_UNLCK:
            return None
        return _FROM_HOST[found], at, size, Owner(max(pid, 0), b"")


def _bars(held: Range, start: int, end: int, kind: LockType, owner: Owner) -> bool:
    overlaps = held.start < end and start < held.end
    return overlaps and held.owner != owner and LockType.WRLCK in {held.type, kind}


def _without(held: Range, new: Range) -> list[Range]:
    """What is left of a range when its owner gets ``new`` (POSIX: the new lock replaces)."""
    parts = []
    if held.start < new.start:
        parts.append(held._replace(end=new.start))
    if new.end < held.end:
        parts.append(held._replace(start=new.end))
    return parts


def _strongest(ranges: list[Range], start: int, end: int) -> LockType:
    kinds = {held.type for held in ranges if held.start < end and start < held.end}
    if LockType.WRLCK in kinds:
        return LockType.WRLCK
    return LockType.RDLCK if kinds else LockType.UNLCK
