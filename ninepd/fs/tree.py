"""The export: every host system call on it, relative to descriptors under one root.

A ``Handle`` is what a fid names: an inode, held by an O_PATH descriptor, so that it stays the same
file whatever is renamed, replaced or removed on the host. All fids on one inode share one Handle.
Three things can be done with an O_PATH descriptor: stat it, look names up in it, and go through
``/proc/self/fd/N`` for the calls that want a path (xattrs, chmod, truncate, link, reopening). That
magic link ends at the held object itself, even if it is a symbolic link (proc(5); security.md 3).
"""

import errno
import os
import stat as st
import threading
from enum import Enum, auto
from typing import Final

from ninepd import syscalls
from ninepd.fs.qid import QidMap
from ninepd.syscalls import Stat

NAME_MAX: Final = 255

_MEMORY_TYPES: Final = frozenset({0x01021994, 0x858458F6, 0x958458F6})
_REMOTE_TYPES: Final = frozenset(
    {
        0x65735546,  # FUSE
        0x6969,  # NFS
        0xFF534D42,  # CIFS
        0xFE534D42,  # SMB2
        0x00C36400,  # Ceph
        0x01021997,  # 9P
        0x5346414F,  # AFS
        0x47504653,  # GPFS
        0x0BD00BD0,  # Lustre
    }
)


class Storage(Enum):
    """How long a file system may keep a system call waiting (f_type of statfs(2))."""

    MEMORY = auto()
    """Never: tmpfs, ramfs, hugetlbfs."""
    LOCAL = auto()
    """As long as a disk takes, and only for data that is not cached."""
    REMOTE = auto()
    """Any time, in any call: network and user-space file systems."""


def check_name(name: bytes, dots: int = errno.EEXIST) -> None:
    """The one gate for names from the guest: a single component that can name a new object.

    ``dots`` is the errno for "." and "..", which depends on the operation. Errnos are those of
    QEMU's server, so guests see no difference.
    """
    if not name or b"/" in name:
        raise OSError(errno.ENOENT, "a name must not be empty or contain '/'")
    if b"\0" in name:
        raise OSError(errno.EINVAL, "a name must not contain a NUL byte")
    if name in {b".", b".."}:
        raise OSError(dots, f"{name.decode()} cannot be used here")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, f"a name has at most {NAME_MAX} bytes")


class Handle:
    """One inode of the export, pinned. Reference-counted by ``Tree``; not made elsewhere."""

    __slots__ = ("fd", "key", "kind", "refs", "storage")

    def __init__(self, fd: int, key: tuple[int, int, int], kind: int, storage: Storage) -> None:
        self.fd = fd
        self.key = key
        self.kind = kind
        """S_IFMT bits; an inode never changes them."""
        self.storage = storage
        self.refs = 1

    @property
    def path(self) -> str:
        """Names the held object in calls that take a path and follow links."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def is_directory(self) -> bool:
        return self.kind == st.S_IFDIR

    @property
    def is_symlink(self) -> bool:
        return self.kind == st.S_IFLNK


def _key(stat: Stat) -> tuple[int, int, int]:
    # The mount belongs to it: one inode may be seen through a writable and a read-only mount.
    return stat.mnt_id, stat.dev, stat.ino


class Tree:
    """A directory of the host and everything below it. Safe to use from several threads."""

    def __init__(self, root: str) -> None:
        """Hold ``root``; raises OSError if it is missing, no directory, or may not be searched."""
        self._lock = threading.Lock()
        self._handles: dict[tuple[int, int, int], Handle] = {}
        self._storage: dict[int, Storage] = {}
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stat = syscalls.stat(fd)
        self.qids = QidMap(stat)
        self.root = self._adopt(fd, stat)

    def close(self) -> None:
        """Let the root go; handles still held by fids must have been released."""
        self.release(self.root)

    # Handles

    def _adopt(self, fd: int, stat: Stat) -> Handle:
        """The Handle of a fresh O_PATH descriptor: the one there is, or a new one."""
        key = _key(stat)
        with self._lock:
            handle = self._handles.get(key)
            if handle is not None:
                handle.refs += 1
            else:
                storage = self._storage.get(stat.dev) or self._learn_storage(fd, stat.dev)
                handle = Handle(fd, key, st.S_IFMT(stat.mode), storage)
                self._handles[key] = handle
                return handle
        os.close(fd)
        return handle

    def _learn_storage(self, fd: int, dev: int) -> Storage:
        kind = syscalls.fstatfs(fd).type
        storage = Storage.LOCAL
        if kind in _MEMORY_TYPES:
            storage = Storage.MEMORY
        elif kind in _REMOTE_TYPES:
            storage = Storage.REMOTE
        self._storage[dev] = storage
        return storage

    def share(self, handle: Handle) -> Handle:
        """Another reference to the same handle."""
        with self._lock:
            handle.refs += 1
        return handle

    def release(self, handle: Handle) -> None:
        """Give a reference back; the last one closes the descriptor."""
        with self._lock:
            handle.refs -= 1
            if handle.refs:
                return
            del self._handles[handle.key]
        os.close(handle.fd)

    @property
    def handles(self) -> int:
        """How many inodes are pinned, the root included."""
        return len(self._handles)

    # Looking up

    def walk(self, directory: Handle, name: bytes) -> tuple[Handle, Stat]:
        """Look one name up; a symbolic link is found as itself. ``..`` stays in the export."""
        if name == b"..":
            return self._parent(directory)
        if name == b".":
            if not directory.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory")
            return self.share(directory), syscalls.stat(directory.fd)
        check_name(name)
        fd, stat = syscalls.walk(directory.fd, name)
        return self._adopt(fd, stat), stat

    def _is_root(self, stat: Stat) -> bool:
        return _key(stat) == self.root.key

    def _parent(self, directory: Handle) -> tuple[Handle, Stat]:
        """The parent, if the export's root is among the ancestors of ``directory``: else ENOENT.

        The host may have moved the directory out of the export while the guest holds it.
        """
        if directory is self.root:
            return self.share(directory), syscalls.stat(directory.fd)
        parent = syscalls.open_parent(directory.fd)
        try:
            found = syscalls.stat(parent)
            if not self._below_root(parent, found):
                raise FileNotFoundError(errno.ENOENT, "the directory has left the export")
        except BaseException:
            os.close(parent)
            raise
        return self._adopt(parent, found), found

    def _below_root(self, fd: int, stat: Stat) -> bool:
        climber = os.dup(fd)
        try:
            while not self._is_root(stat):
                above = syscalls.open_parent(climber)
                os.close(climber)
                climber = above
                up = syscalls.stat(climber)
                if _key(up) == _key(stat):  # "/" is its own parent
                    return False
                stat = up
            return True
        finally:
            os.close(climber)

    @staticmethod
    def stat(handle: Handle) -> Stat:
        """Attributes of what a handle holds, as they are now."""
        return syscalls.stat(handle.fd)

    def names(self, directory: Handle, name: bytes, handle: Handle) -> bool:
        """Does ``name`` in ``directory`` still name what ``handle`` holds?"""
        try:
            return _key(syscalls.stat_at(directory.fd, name)) == handle.key
        except FileNotFoundError:
            return False

    # Opening

    def reopen(self, handle: Handle, flags: int) -> int:
        """Open the held file or directory for reading or writing; the caller owns the descriptor.

        FIFOs, sockets and devices are refused with ENXIO before anything is opened: the guest's
        kernel serves those itself, and opening one here could block or act on the host.
        """
        if handle.is_symlink:
            raise OSError(errno.ELOOP, "a symbolic link cannot be opened")
        if handle.kind not in {st.S_IFREG, st.S_IFDIR}:
            raise OSError(errno.ENXIO, "special files are not opened on the host")
        flags |= os.O_CLOEXEC | os.O_NOCTTY
        if handle.is_directory:
            return syscalls.open_scoped(handle.fd, b".", flags | os.O_DIRECTORY)

        try:
            fd = self._open_file(handle, flags)
        except PermissionError:
            if not flags & os.O_NOATIME:
                raise
            # O_NOATIME is for owners only (open(2)); QEMU drops it too where it is not allowed.
            fd = self._open_file(handle, flags & ~os.O_NOATIME)
        return fd

    @staticmethod
    def _open_file(handle: Handle, flags: int) -> int:
        # A lease that a host process holds would keep us waiting without O_NONBLOCK (fcntl(2));
        # afterwards the flag must not linger, because FUSE servers see it.
        fd = os.open(handle.path, flags | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        return fd

    def adopt_open(self, fd: int) -> tuple[Handle, Stat]:
        """The Handle of a file that was just created and is open as ``fd``, which stays open."""
        path_fd = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
        try:
            stat = syscalls.stat(path_fd)
        except OSError:
            os.close(path_fd)
            raise
        return self._adopt(path_fd, stat), stat
