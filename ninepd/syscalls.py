"""Typed face of ``_syscalls.c``: what ``os`` lacks, and what is hot.

Every function raises OSError with the kernel's errno. Descriptors returned are the caller's to
close. The interpreter lock is released during each call.
"""

import errno
import fcntl
import os
from struct import Struct
from typing import Any, Final, NamedTuple, Protocol, cast

import ninepd._libvring as _libvring
from ninepd.statelock import CHECKS, assert_unlocked
from ninepd.tuples import made

NO_ID: Final = 0xFFFFFFFF
"""Leaves a uid or gid as it is."""
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
XATTR_SIZE_MAX: Final = 65536
"""The longest value of an extended attribute (xattr(7))."""

_USUAL_VALUE: Final = 256

_unpack_stat: Final = Struct("=4Q4I").unpack
_STATFS: Final = Struct("=9Q")
_FLOCK: Final = Struct("hhqqi4x")


class Stat(NamedTuple):
    """Attributes of one file; ``version`` is the guest's qid.version."""

    dev: int
    ino: int
    mnt_id: int
    generation: int
    """Tells two files apart that had the same inode number one after the other: for
    ``getattr_body``."""
    mode: int
    nlink: int
    version: int
    automount: int
    """Does the kernel mount something here as soon as it is entered?"""


class Statfs(NamedTuple):
    """statfs(2) in the order of Rstatfs, sizes in units of ``bsize``."""

    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    fsid: int
    namelen: int


class _Lib(Protocol):
    ND_GETATTR_BODY: int
    ND_UNMAPPED: int
    ND_HANDLE_MAX: int

    def nd_walk(self, dirfd: int, name: bytes, out: Any) -> int: ...
    def nd_stat_at(self, dirfd: int, name: bytes, identify: bool, out: Any) -> int: ...
    def nd_open_scoped(self, dirfd: int, name: bytes, flags: int) -> int: ...
    def nd_open_parent(self, dirfd: int) -> int: ...
    def nd_getattr(self, fd: int, table: Any, generation: int, body: Any) -> int: ...
    def nd_getattr_as(self, fd: int, path: int, generation: int, body: Any) -> int: ...
    def nd_create(
        self, dirfd: int, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> int: ...
    def nd_mkdir(self, dirfd: int, name: bytes, mode: int, uid: int, gid: int) -> int: ...
    def nd_symlink(self, target: bytes, dirfd: int, name: bytes, uid: int, gid: int) -> int: ...
    def nd_mknod(
        self, dirfd: int, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> int: ...
    def nd_chown(self, fd: int, uid: int, gid: int) -> int: ...
    def nd_utimens(
        self, fd: int, atime_sec: int, atime_nsec: int, mtime_sec: int, mtime_nsec: int
    ) -> int: ...
    def nd_fstatfs(self, fd: int, out: Any) -> int: ...
    def nd_write_out(self, fd: int, offset: int, count: int) -> int: ...
    def nd_file_handle(self, fd: int, out: Any) -> int: ...
    def nd_open_by_handle(self, mount_fd: int, handle: bytes, size: int, flags: int) -> int: ...
    def nd_getxattr(self, fd: int, name: bytes, out: Any, size: int) -> int: ...
    def nd_keep_set_ids(self, keep: bool) -> int: ...


_CHECKS: Final = CHECKS
_NO_ENTRY: Final = -errno.ENOENT

_ffi: Final[Any] = _libvring.ffi
_lib: Final = cast("_Lib", _libvring.lib)
GETATTR_BODY: Final[int] = _lib.ND_GETATTR_BODY
_UNMAPPED: Final[int] = _lib.ND_UNMAPPED
_HANDLE_MAX: Final[int] = _lib.ND_HANDLE_MAX
_new: Final = _ffi.new
view: Final = _ffi.from_buffer
"""C's view of a writable buffer of Python."""


def fd_path(fd: int) -> str:
    """Names what a descriptor holds, in calls that take a path and follow links."""
    return f"/proc/self/fd/{fd}"


def copy(source: Any, target: Any, size: int) -> None:
    """Copy bytes from one such view to another."""
    _ffi.memmove(target, source, size)


_buffer: Final = _ffi.buffer


def checked(result: int) -> int:
    """A result of C that is not negative; else that is an errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class QidDevices:
    """The table that gives C the path number of an inode below 2^48: ``prefix | inode``."""

    def __init__(self) -> None:
        self._room = 8
        self.table = _new("nd_qid_table *", {"devices": self._room})

    def append(self, dev: int, prefix: int) -> None:
        table, count = self.table, self.table.count
        if count == self._room:
            # Readers hold the old table alive; it stays right, only shorter.
            self._room *= 2
            table = _new("nd_qid_table *", {"devices": self._room})
            table.devices[0:count] = self.table.devices[0:count]
        table.devices[count].dev = dev
        table.devices[count].prefix = prefix
        table.count = count + 1
        self.table = table


_spare: Final[list[Any]] = []
"""An nd_stat for each thread that was in a call, with Python's view of it: making one takes longer
than the call."""


def _stat_room() -> Any:
    try:
        return _spare.pop()
    except IndexError:
        room = _new("nd_stat *")
        return room, _buffer(room)


def _stat_in(room: Any) -> Stat:
    found = made(Stat, _unpack_stat(room[1]))
    _spare.append(room)
    return found


def walk(dirfd: int, name: bytes) -> tuple[int, Stat] | None:
    """An O_PATH descriptor of ``name`` in a directory, links not followed, and its attributes.

    None if there is nothing of that name: clients ask before they create, and an exception would
    take longer than the call.
    """
    if _CHECKS:
        assert_unlocked()
    out = _stat_room()
    fd = _lib.nd_walk(dirfd, name, out[0])
    if fd == _NO_ENTRY:
        _spare.append(out)
        return None
    return checked(fd), _stat_in(out)


def stat(fd: int) -> Stat:
    """Attributes of what ``fd`` holds, its generation included; O_PATH descriptors are fine."""
    return _stat(fd, b"", True)


def stat_at(dirfd: int, name: bytes) -> Stat:
    """Attributes of a name in a directory, the link itself if it is one; no generation.

    An empty name is ``dirfd`` itself.
    """
    return _stat(dirfd, name, False)


def _stat(dirfd: int, name: bytes, identify: bool) -> Stat:
    if _CHECKS:
        assert_unlocked()
    out = _stat_room()
    checked(_lib.nd_stat_at(dirfd, name, identify, out[0]))
    return _stat_in(out)


def open_scoped(dirfd: int, name: bytes, flags: int) -> int:
    """openat2 that neither leaves ``dirfd`` nor follows any link."""
    if _CHECKS:
        assert_unlocked()
    return checked(_lib.nd_open_scoped(dirfd, name, flags))


def open_parent(dirfd: int) -> int:
    """An O_PATH descriptor of ``..``, wherever that is: the caller checks that it may be used."""
    if _CHECKS:
        assert_unlocked()
    return checked(_lib.nd_open_parent(dirfd))


def getattr_body(fd: int, devices: QidDevices, generation: int, body: Any) -> bool:
    """Write the body of an Rgetattr (9P2000.L) of what ``fd`` holds, GETATTR_BODY bytes.

    False if the table has no qid.path for it; then use ``getattr_body_as``.
    """
    return checked(_lib.nd_getattr(fd, devices.table, generation, body)) != _UNMAPPED


def getattr_body_as(fd: int, path: int, generation: int, body: Any) -> None:
    """The same with a given qid.path."""
    checked(_lib.nd_getattr_as(fd, path, generation, body))


def create(dirfd: int, name: bytes, flags: int, mode: int, uid: int, gid: int) -> int:
    """Create and open a regular file that does not exist yet (EEXIST), owned by uid and gid."""
    return checked(_lib.nd_create(dirfd, name, flags, mode, uid, gid))


def mkdir(dirfd: int, name: bytes, mode: int, uid: int, gid: int) -> None:
    """mkdirat(2) under the identity uid, gid."""
    checked(_lib.nd_mkdir(dirfd, name, mode, uid, gid))


def symlink(target: bytes, dirfd: int, name: bytes, uid: int, gid: int) -> None:
    """symlinkat(2) under the identity uid, gid."""
    checked(_lib.nd_symlink(target, dirfd, name, uid, gid))


def mknod(dirfd: int, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int) -> None:
    """mknodat(2) under the identity uid, gid."""
    checked(_lib.nd_mknod(dirfd, name, mode, major, minor, uid, gid))


def chown(fd: int, uid: int, gid: int) -> None:
    """Change the owner of what ``fd`` holds, a symbolic link included; NO_ID keeps one."""
    checked(_lib.nd_chown(fd, uid, gid))


def utimens(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set (seconds, nanoseconds) times; nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    checked(_lib.nd_utimens(fd, *atime, *mtime))


def fstatfs(fd: int) -> Statfs:
    """Statistics of the file system that ``fd`` lies on."""
    if _CHECKS:
        assert_unlocked()
    out = _new("nd_statfs *")
    checked(_lib.nd_fstatfs(fd, out))
    return Statfs._make(_STATFS.unpack(_buffer(out)))


def write_out(fd: int, offset: int, count: int) -> None:
    """Have the disk begin with bytes that were written to a file, which may wait for it."""
    if _CHECKS:
        assert_unlocked()
    checked(_lib.nd_write_out(fd, offset, count))


def lock(fd: int, kind: int, start: int, length: int) -> None:
    """Lock or unlock bytes for an open file description, without waiting; length 0: to the end."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def find_lock(fd: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
    """(kind, start, length, pid) of a lock that is in the way of such a one, or F_UNLCK."""
    request = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    found, _, at, size, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
    return found, at, size, pid


def file_handle(fd: int) -> bytes:
    """The kernel's name for the inode, its generation included; EOPNOTSUPP if it has none."""
    if _CHECKS:
        assert_unlocked()
    out = _new("uint8_t[]", _HANDLE_MAX)
    size = checked(_lib.nd_file_handle(fd, out))
    return cast("bytes", _buffer(out)[0:size])


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open what ``handle`` names on the mount of ``mount_fd``; ESTALE if it is gone.

    Needs CAP_DAC_READ_SEARCH. ``mount_fd`` must not be an O_PATH descriptor.
    """
    if _CHECKS:
        assert_unlocked()
    return checked(_lib.nd_open_by_handle(mount_fd, handle, len(handle), flags))


def getxattr(fd: int, name: bytes) -> bytes | None:
    """The value of an extended attribute of what ``fd`` holds; None if it has none of that name.

    That is the usual answer, and an exception would take longer than the call.
    """
    for size in (_USUAL_VALUE, XATTR_SIZE_MAX):
        out = _new("uint8_t[]", size)
        got = _lib.nd_getxattr(fd, name, out, size)
        if got == -errno.ENODATA:
            return None
        if got != -errno.ERANGE:
            break
    return cast("bytes", _buffer(out)[0 : checked(got)])


def keep_set_ids(keep: bool) -> None:
    """Let setuid and setgid bits outlive what the calling thread does from now on, or not.

    If not, they go with a write or a truncation, as for a user who is not root (write(2)).
    """
    checked(_lib.nd_keep_set_ids(keep))
