"""The export: every host system call on it, relative to descriptors under one root.

Three things can be done with the O_PATH descriptor of a handle: stat it, look names up in it, and
go through ``/proc/self/fd/N`` for the calls that want a path (xattrs, chmod, truncate, link,
reopening). That magic link ends at the held object itself, even if it is a symbolic link (proc(5)).
"""

import errno
import os
import stat as st
import sys
from typing import Final

from ninepd import syscalls
from ninepd.config import Multidevs
from ninepd.export.descriptors import Budget
from ninepd.export.handles import Handle, HandleTable, Opened, Place, is_same_inode
from ninepd.export.qid import QidMap
from ninepd.p9.messages import Qid
from ninepd.syscalls import Stat

NAME_MAX: Final = 255
_SLASH: Final = 0x2F


def check_name(name: bytes, dots: int = errno.EEXIST) -> None:
    """The one gate for names from the guest: a single component that can name a new object.

    ``dots`` is the errno for "." and "..", which depends on the operation. Errnos are those of
    QEMU's server, so guests see no difference.
    """
    if not name or _SLASH in name:
        raise OSError(errno.ENOENT, "a name must not be empty or contain '/'")
    if 0 in name:
        raise OSError(errno.EINVAL, "a name must not contain a NUL byte")
    if name in {b".", b".."}:
        raise OSError(dots, f"{name.decode()} cannot be used here")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, f"a name has at most {NAME_MAX} bytes")


class Tree:
    """A directory of the host and everything below it. Safe to use from several threads."""

    def __init__(
        self,
        root: str,
        *,
        budget: int = sys.maxsize,
        by_handle: bool = False,
        multidevs: Multidevs = Multidevs.REMAP,
    ) -> None:
        """Hold ``root``; raises OSError if it is missing, no directory, or may not be searched.

        ``budget`` is how many descriptors may be open for fids. ``by_handle``: what is put aside
        is found again by file handle, which needs CAP_DAC_READ_SEARCH.
        """
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stat = syscalls.stat(fd)
        self.handles = HandleTable(Budget(budget), by_handle, multidevs)
        self.qids = QidMap(stat, one_device=multidevs is not Multidevs.REMAP)
        self._forbids = multidevs is Multidevs.FORBID
        self.root = self.handles.adopt(fd, stat)
        self.root.pins = 1

    def close(self) -> None:
        """Let the root go; handles still held by fids must have been released."""
        self.handles.release(self.root)

    # Looking

    def walk(self, directory: Handle, name: bytes) -> tuple[Handle, Stat] | None:
        """Look one name up, None if it is not there; a symbolic link is found as itself.

        ``..`` stays in the export.
        """
        if name == b"..":
            return self._parent(directory)
        if name == b".":
            if not directory.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory")
            return self._itself(directory)
        check_name(name)
        found = syscalls.walk(directory.fd, name)
        if found is None:
            return None
        fd, stat = found
        return self.handles.adopt(fd, stat, (directory, name)), stat

    def existing(self, directory: Handle, name: bytes) -> tuple[Handle, Stat]:
        """As ``walk``; ENOENT if it is not there."""
        found = self.walk(directory, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        return found

    def _parent(self, directory: Handle) -> tuple[Handle, Stat]:
        """The parent, if the export's root is among the ancestors of ``directory``: else ENOENT.

        The host may have moved the directory out of the export while the guest holds it.
        """
        if directory is self.root:
            return self._itself(directory)
        parent = self._adopt_below_root(syscalls.open_parent(directory.fd))
        try:
            return self._itself(parent)
        finally:
            self.handles.release(parent)

    def _itself(self, directory: Handle) -> tuple[Handle, Stat]:
        stat = syscalls.stat(directory.fd)
        return self.handles.share(directory), stat

    def _adopt_below_root(self, fd: int) -> Handle:
        """A handle on a directory that was not found by a scoped look-up; ENOENT if outside."""
        try:
            stat = syscalls.stat(fd)
            if not self._below_root(fd, stat):
                raise FileNotFoundError(errno.ENOENT, "the directory is not in the export")
        except OSError:
            os.close(fd)
            raise
        return self.handles.adopt(fd, stat)

    def _below_root(self, fd: int, stat: Stat) -> bool:
        climber = os.dup(fd)
        try:
            while not self.root.holds(stat):
                above = syscalls.open_parent(climber)
                os.close(climber)
                climber = above
                up = syscalls.stat(climber)
                if is_same_inode(up, stat):  # "/" is its own parent
                    return False
                stat = up
            return True
        finally:
            os.close(climber)

    @staticmethod
    def stat(handle: Handle) -> Stat:
        """Attributes of what a handle holds, as they are now."""
        return syscalls.stat(handle.fd)

    def qid(self, handle: Handle) -> Qid:
        """The qid of what a handle holds, as it is now."""
        return self.qids.qid(syscalls.stat_at(handle.fd, b""))

    def shows(self, stat: Stat) -> bool:
        """May a directory list this file? With multidevs=forbid only what a walk would find."""
        return not self._forbids or stat.dev == self.root.volume.dev

    def find(self, handle: Handle) -> Place:
        """Directory and name of a file that is no longer where it was found; ESTALE if unknown.

        The kernel knows the name that a descriptor was opened by, through all renames (proc(5)).
        It is used only if it leads, inside the export, to the file itself. The directory's
        reference is the caller's.
        """
        directory, _, name = os.readlink(os.fsencode(handle.path)).rpartition(b"/")
        try:
            fd = os.open(directory or b"/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            parent = self._adopt_below_root(fd)
        except OSError:
            raise OSError(errno.ESTALE, "the file has no name in the export") from None
        if not self.handles.is_at(handle, parent, name):
            self.handles.release(parent)
            raise OSError(errno.ESTALE, "the file no longer has the name it was found by")
        return parent, name

    # Opening

    def open(self, handle: Handle, flags: int, wait: bool = False) -> Opened:
        """Open the held file or directory for I/O; EMFILE if no descriptor can be spared.

        BlockingIOError if a host process holds a lease on it, unless told to ``wait``.
        """
        self.handles.budget.check()
        return Opened(handle, self.reopen(handle, flags, wait), flags, self.reopen)

    def reopen(self, handle: Handle, flags: int, wait: bool = False) -> int:
        """Open the held file or directory; the caller owns the descriptor.

        FIFOs, sockets and devices are refused with ENXIO before anything is opened: the guest's
        kernel serves those itself, and opening one here could block or act on the host.
        """
        if handle.is_symlink:
            raise OSError(errno.ELOOP, "a symbolic link cannot be opened")
        if handle.kind not in {st.S_IFREG, st.S_IFDIR}:
            raise OSError(errno.ENXIO, "special files are not opened on the host")
        flags |= os.O_CLOEXEC | os.O_NOCTTY
        try:
            return self._open_held(handle, flags, wait)
        except PermissionError:
            if not flags & os.O_NOATIME:
                raise
            # O_NOATIME is for owners only (open(2)); QEMU drops it too where it is not allowed.
            return self._open_held(handle, flags & ~os.O_NOATIME, wait)

    @staticmethod
    def _open_held(handle: Handle, flags: int, wait: bool) -> int:
        if handle.is_directory:
            return syscalls.open_scoped(handle.fd, b".", flags | os.O_DIRECTORY)
        if wait:
            return os.open(handle.path, flags)
        # A lease would keep us waiting without O_NONBLOCK; afterwards the flag must not linger,
        # because FUSE servers see it.
        fd = os.open(handle.path, flags | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        return fd

    def adopt_created(
        self, fd: int, flags: int, directory: Handle, name: bytes
    ) -> tuple[Handle, Stat, Opened]:
        """The handle of a file that was just created and is open as ``fd``, which is taken over."""
        try:
            stat = syscalls.stat(fd)
            path_fd = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
            handle = self.handles.adopt(path_fd, stat, (directory, name))
        except OSError:
            os.close(fd)
            raise
        return handle, stat, Opened(handle, fd, flags, self.reopen)
