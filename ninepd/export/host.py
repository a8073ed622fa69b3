"""The seam to the host: every system call on an export is a method here, and made nowhere else.

Files are descriptors, and names single components relative to one. Data is read and written by
``Payload`` (ops/replies.py), through descriptors that ``open`` and ``create`` have made.
"""

import os
from abc import abstractmethod
from typing import Any, Final

from ninepd.listing import Cookies, LookUp
from ninepd.syscalls import QidDevices, Stat, Statfs

ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")
Time = tuple[int, int]
"""Seconds and nanoseconds; the latter may be UTIME_NOW or UTIME_OMIT."""


class Host:
    """What an export is served from. Safe to use from several threads.

    A native class with abstract methods, not a ``Protocol``: mypyc calls these through a table, and
    those of a protocol by their names, as the interpreter does.

    uid and gid of what is created are the guest's; so are modes. Whether, and how, the host shows
    them is up to the class.
    """

    __slots__ = ("readonly", "watches_writes", "writes_out")

    def __init__(self, readonly: bool, watches_writes: bool = False) -> None:
        self.readonly = readonly
        """Is every change refused?"""
        self.watches_writes = watches_writes
        """Does ``before_write`` want to be called? Not where the host's kernel does its work."""
        self.writes_out = False
        """Is ``write_out`` wanted behind each write?"""

    # Looking

    @abstractmethod
    def walk(self, directory: int, name: bytes) -> tuple[int, Stat] | None:
        """An O_PATH descriptor of a name, links not followed, and its attributes; None if none."""

    @abstractmethod
    def stat(self, fd: int) -> Stat:
        """Attributes of what a descriptor holds, its generation included."""

    @abstractmethod
    def stat_at(self, directory: int, name: bytes) -> Stat:
        """Attributes of a name, or of ``directory`` itself if that is empty; no generation."""

    @abstractmethod
    def attributes(self, fd: int) -> os.stat_result:
        """All attributes, for old clients."""

    @abstractmethod
    def getattr_body(self, fd: int, devices: QidDevices, generation: int, body: Any) -> bool:
        """Write the body of an Rgetattr; False if ``devices`` has no qid.path for the file."""

    @abstractmethod
    def getattr_body_as(self, fd: int, path: int, generation: int, body: Any) -> None:
        """The same with a given qid.path."""

    @abstractmethod
    def statfs(self, fd: int) -> Statfs:
        """Statistics of the file system that ``fd`` lies on."""

    @abstractmethod
    def mount_type(self, mnt_id: int) -> str | None:
        """The name of the file system of a mount, without a subtype, if the mount is listed.

        Unlike statfs(2) this does not ask the file system itself, which may hang.
        """

    @abstractmethod
    def readlink(self, fd: int) -> bytes:
        """The target of the symbolic link that a descriptor holds."""

    @abstractmethod
    def name_of(self, fd: int) -> bytes:
        """The path by which the kernel knows what a descriptor holds (proc(5))."""

    @abstractmethod
    def readdir(
        self,
        fd: int,
        offset: int,
        at_root: bool,
        look_up: LookUp,
        covered: bytes,
        devices: QidDevices,
        cookies: Cookies,
        size: int,
    ) -> bytes:
        """A run of Rreaddir entries behind a position; see ``listing.readdir``."""

    @abstractmethod
    def getdents(self, fd: int, offset: int) -> list[tuple[int, bytes]]:
        """(position behind it, name) of directory entries behind a position."""

    # Descriptors

    @abstractmethod
    def hold(self, fd: int) -> int:
        """An O_PATH descriptor of what an open one holds."""

    @abstractmethod
    def parent(self, directory: int) -> int:
        """An O_PATH descriptor of ``..``, wherever that is: the caller checks if it may be used."""

    @abstractmethod
    def open_below(self, directory: int, path: bytes, flags: int) -> int:
        """Open where a path leads that neither leaves the directory nor follows any link."""

    @abstractmethod
    def open(self, fd: int, flags: int, wait: bool) -> int:
        """Open the file that an O_PATH descriptor holds, for I/O.

        BlockingIOError if a host process holds a lease on it, unless told to ``wait``.
        """

    @abstractmethod
    def open_by_handle(self, mount: int, handle: bytes) -> int:
        """An O_PATH descriptor of what a file handle names; ESTALE if it is gone."""

    @abstractmethod
    def file_handle(self, fd: int) -> bytes:
        """The kernel's name for an inode, its generation included; EOPNOTSUPP if it has none."""

    @abstractmethod
    def duplicate(self, fd: int) -> int:
        """Another descriptor of the same."""

    @abstractmethod
    def close(self, fd: int) -> None:
        """OSError says what became of late writes; the descriptor is closed all the same."""

    # Names

    @abstractmethod
    def create(self, directory: int, name: bytes, flags: int, mode: int, uid: int, gid: int) -> int:
        """Create and open a regular file that does not exist yet (EEXIST)."""

    @abstractmethod
    def mkdir(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> None:
        """Make a directory."""

    @abstractmethod
    def symlink(self, target: bytes, directory: int, name: bytes, uid: int, gid: int) -> None:
        """Make a symbolic link."""

    @abstractmethod
    def mknod(
        self, directory: int, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> None:
        """Make a file of any kind but directory and symbolic link."""

    @abstractmethod
    def link(self, fd: int, directory: int, name: bytes) -> None:
        """Another name for what a descriptor holds, a symbolic link itself included."""

    @abstractmethod
    def rename(self, old: int, old_name: bytes, new: int, new_name: bytes) -> None:
        """Move a name from one directory to another."""

    @abstractmethod
    def unlink(self, directory: int, name: bytes) -> None:
        """Remove a name that is no directory's."""

    @abstractmethod
    def rmdir(self, directory: int, name: bytes) -> None:
        """Remove an empty directory."""

    # Attributes and data

    @abstractmethod
    def act_for(self, uid: int) -> None:
        """This thread writes for a user from now on: set-ID bits go, unless he is root."""

    @abstractmethod
    def before_write(self, fd: int) -> None:
        """An open file is about to be written for a user who is not root: set-ID bits go."""

    @abstractmethod
    def write_out(self, fd: int, offset: int, count: int) -> None:
        """Have the disk begin with what was written there; an error may be that of an earlier one.

        Waits for what of it the disk is at already.
        """

    @abstractmethod
    def chmod(self, fd: int, mode: int) -> None:
        """Change the mode of what a descriptor holds."""

    @abstractmethod
    def chown(self, fd: int, uid: int, gid: int) -> None:
        """Change the owner of what a descriptor holds, a link itself included; NO_ID keeps one."""

    @abstractmethod
    def utimens(self, fd: int, atime: Time, mtime: Time) -> None:
        """Set the times of what a descriptor holds, a link itself included."""

    @abstractmethod
    def truncate(self, fd: int, size: int) -> None:
        """Of what an O_PATH descriptor holds; waits for leases."""

    @abstractmethod
    def ftruncate(self, fd: int, size: int) -> None:
        """Of a file that is open for writing."""

    @abstractmethod
    def fsync(self, fd: int) -> None:
        """Of an open file or directory."""

    @abstractmethod
    def fdatasync(self, fd: int) -> None:
        """Of an open file or directory."""

    # Locks

    @abstractmethod
    def lock(self, fd: int, kind: int, start: int, length: int) -> None:
        """Lock (F_RDLCK, F_WRLCK) or unlock (F_UNLCK) bytes for an open file, without waiting.

        ``length`` 0 reaches to the end of the largest file. EAGAIN if others are in the way.
        """

    @abstractmethod
    def find_lock(self, fd: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
        """(kind, start, length, pid) of a lock that is in the way of such a one, or F_UNLCK.

        The pid is -1 for the lock of an open file.
        """

    # Extended attributes

    @abstractmethod
    def check_xattr(self, name: bytes) -> None:
        """EOPNOTSUPP if the guest may not see and change extended attributes of this name."""

    @abstractmethod
    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        """The value of an extended attribute; None if there is none of that name."""

    @abstractmethod
    def listxattr(self, fd: int) -> list[bytes]:
        """Names of the extended attributes that the guest may see."""

    @abstractmethod
    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute of what a descriptor holds."""

    @abstractmethod
    def removexattr(self, fd: int, name: bytes) -> None:
        """Remove an extended attribute of what a descriptor holds."""
