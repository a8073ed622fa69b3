"""The export: what is found and opened below one directory of the host."""

import errno
import os
import stat as st
import sys
from typing import Final

from ninepd.config import Multidevs, Reclaim
from ninepd.export.descriptors import Budget, Holder
from ninepd.export.handles import Handle, HandleTable, Hint, Opened, is_same_inode
from ninepd.export.host import Host
from ninepd.export.qid import QidMap
from ninepd.export.volumes import Volumes
from ninepd.listing import LookUp
from ninepd.mounts import Mounts
from ninepd.p9.messages import Qid
from ninepd.syscalls import Stat

NAME_MAX: Final = 255
_SLASH: Final = 0x2F
_EXISTS: Final = errno.EEXIST
"""A name of its own, because what mypyc compiles works defaults out at each call."""


def check_name(name: bytes, dots: int = _EXISTS) -> None:
    """The one gate for names from the guest: a single component that can name a new object.

    ``dots`` is the errno for "." and "..", which depends on the operation. Errnos are those of
    QEMU's server, so guests see no difference.
    """
    if not name or _SLASH in name:
        raise OSError(errno.ENOENT, "a name must not be empty or contain '/'")
    if 0 in name:
        raise OSError(errno.EINVAL, "a name must not contain a NUL byte")
    if name == b"." or name == b"..":
        raise OSError(dots, f"{name.decode()} cannot be used here")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, f"a name has at most {NAME_MAX} bytes")


class Tree:
    """A directory of the host and everything below it. Safe to use from several threads."""

    def __init__(
        self,
        root: int,
        host: Host,
        *,
        budget: int = sys.maxsize,
        reclaim: Reclaim = Reclaim.AUTO,
        multidevs: Multidevs = Multidevs.REMAP,
        kernel_filesystems: bool = False,
    ) -> None:
        """Take over ``root``, an O_PATH descriptor of a directory.

        ``budget`` is how many descriptors may be open for fids. ``reclaim``: how what is put
        aside is found again. ``kernel_filesystems``: procfs and the like may be served.
        """
        self.host = host
        stat = host.stat(root)
        volumes: Volumes[Handle] = Volumes(
            host, reclaim is not Reclaim.NAMES, multidevs, kernel_filesystems
        )
        by_name = reclaim is not Reclaim.HANDLES
        self.handles = HandleTable(host, Budget(budget, host.close), volumes, by_name, self.find_by)
        self.qids = QidMap(stat, one_device=multidevs is not Multidevs.REMAP)
        self._forbids = multidevs is Multidevs.FORBID
        self._pins: list[Holder] = []
        self.root = self.handles.adopt(root, stat, self._pins)  # pinned for good
        self.mounts = Mounts()

    def close(self) -> None:
        """Let the root go; handles still held by fids must have been released."""
        self.handles.release(self.root)
        self.mounts.close()

    # Looking

    def walk(
        self, directory: Handle, name: bytes, pins: list[Holder]
    ) -> tuple[Handle, Stat] | None:
        """Look one name up, None if it is not there; a symbolic link is found as itself.

        ``..`` stays in the export. What is found stays open until the pins are given back.
        """
        if name == b"..":
            return self._parent(directory, pins)
        if name == b".":
            if not directory.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory")
            return self._itself(directory)
        check_name(name)
        found = self.host.walk(directory.fd, name)
        if found is None:
            return None
        fd, stat = found
        return self.handles.adopt(fd, stat, pins, (directory, name)), stat

    def existing(self, directory: Handle, name: bytes, pins: list[Holder]) -> tuple[Handle, Stat]:
        """As ``walk``; ENOENT if it is not there."""
        found = self.walk(directory, name, pins)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        return found

    def awaits_mount(self, handle: Handle, stat: Stat) -> bool:
        """Would entering this directory, which a walk has found, mount something on it?

        autofs does not say so of single directories.
        """
        return handle.is_directory and bool(stat.automount or handle.volume.automounts)

    def mounted(
        self, directory: Handle, name: bytes, found: Handle, pins: list[Holder]
    ) -> tuple[Handle, Stat]:
        """Enter ``found``, which is given back: what is there now. It may take any time."""
        self.handles.release(found)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
        fd = self.host.open_below(directory.fd, name, flags)
        try:
            stat = self.host.stat(fd)
        except OSError:
            self.host.close(fd)
            raise
        return self.handles.adopt(fd, stat, pins, (directory, name)), stat

    def _parent(self, directory: Handle, pins: list[Holder]) -> tuple[Handle, Stat]:
        """The parent, if the export's root is among the ancestors of ``directory``: else ENOENT.

        The host may have moved the directory out of the export while the guest holds it.
        """
        if directory is self.root:
            return self._itself(directory)
        parent = self._adopt_below_root(self.host.parent(directory.fd), pins)
        try:
            return self._itself(parent)
        finally:
            self.handles.release(parent)

    def _itself(self, directory: Handle) -> tuple[Handle, Stat]:
        stat = self.host.stat(directory.fd)
        return self.handles.share(directory), stat

    def _adopt_below_root(self, fd: int, pins: list[Holder]) -> Handle:
        """A handle on a directory that was not found by a scoped look-up; ENOENT if outside."""
        try:
            stat = self.host.stat(fd)
            if not self._below_root(fd, stat):
                raise FileNotFoundError(errno.ENOENT, "the directory is not in the export")
        except OSError:
            self.host.close(fd)
            raise
        return self.handles.adopt(fd, stat, pins)

    def _below_root(self, fd: int, stat: Stat) -> bool:
        climber = self.host.duplicate(fd)
        try:
            while not self.root.holds(stat):
                above = self.host.parent(climber)
                self.host.close(climber)
                climber = above
                up = self.host.stat(climber)
                if is_same_inode(up, stat):  # "/" is its own parent
                    return False
                stat = up
            return True
        finally:
            self.host.close(climber)

    def stat(self, handle: Handle) -> Stat:
        """Attributes of what a handle holds, as they are now."""
        return self.host.stat(handle.fd)

    def qid(self, handle: Handle) -> Qid:
        """The qid of what a handle holds, as it is now."""
        return self.qids.qid(self.host.stat_at(handle.fd, b""))

    def shows(self, stat: Stat) -> bool:
        """May a directory list this file? With multidevs=forbid only what a walk would find."""
        return not self._forbids or stat.dev == self.root.volume.dev

    def covered(self, directory: Handle) -> tuple[LookUp, bytes]:
        """Which entries of a directory have to be looked up, as ``listing.readdir`` takes it."""
        names = self.mounts.covered(directory.volume.mount.mnt_id)
        return (LookUp.ALL, b"") if names is None else (directory.volume.look_up, names)

    def find(self, handle: Handle, pins: list[Holder]) -> Hint:
        """Directory and name of a file that is no longer where it was found; ESTALE if unknown."""
        return self.find_by(handle, handle.fd, pins)

    def find_by(self, handle: Handle, held: int, pins: list[Holder]) -> Hint:
        """The same by a descriptor of the file.

        The kernel knows the name that a descriptor was opened by, through all renames (proc(5)).
        It is used only if it leads, inside the export, to the file itself. The directory's
        reference is the caller's.
        """
        root = self.host.name_of(self.root.fd).rstrip(b"/") + b"/"
        directory, _, name = self.host.name_of(held).rpartition(b"/")
        directory += b"/"
        if not directory.startswith(root):
            raise OSError(errno.ESTALE, "the file has no name in the export")
        try:
            parent = self._directory_below(directory[len(root) :], pins)
        except OSError:
            raise OSError(errno.ESTALE, "the file has no name in the export") from None
        if not self._shows(parent, name, handle):
            self.handles.release(parent)
            raise OSError(errno.ESTALE, "the file no longer has the name it was found by")
        return parent, name

    def _directory_below(self, path: bytes, pins: list[Holder]) -> Handle:
        flags = os.O_PATH | os.O_DIRECTORY
        fd = self.host.open_below(self.root.fd, path or b".", flags)
        try:
            stat = self.host.stat(fd)
        except OSError:
            self.host.close(fd)
            raise
        return self.handles.adopt(fd, stat, pins)

    def _shows(self, parent: Handle, name: bytes, handle: Handle) -> bool:
        try:
            return self.handles.shows(parent, name, handle)
        except OSError:
            return False

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
        return self.host.open(handle.fd, flags, wait or handle.is_directory)

    def adopt_created(
        self, fd: int, flags: int, directory: Handle, name: bytes, pins: list[Holder]
    ) -> tuple[Handle, Stat, Opened]:
        """The handle of a file that was just created and is open as ``fd``, which is taken over."""
        try:
            stat = self.host.stat(fd)
            handle = self.handles.adopt(self.host.hold(fd), stat, pins, (directory, name))
        except OSError:
            self.host.close(fd)
            raise
        return handle, stat, Opened(handle, fd, flags, self.reopen)
