"""A host on which nothing can be changed, whatever the host below would allow."""

import errno
import os
from typing import Any, Final, NoReturn

from ninepd.export.host import Host, Time
from ninepd.listing import Cookies, LookUp
from ninepd.syscalls import QidDevices, Stat, Statfs

_FOR_CHANGE: Final = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC


def refuse() -> NoReturn:
    """EROFS."""
    raise OSError(errno.EROFS, "the export is read-only")


class ReadonlyHost(Host):
    """Looks through to the host below, and leaves no traces there, not even access times."""

    __slots__ = ("_host",)

    def __init__(self, host: Host) -> None:
        super().__init__(readonly=True)
        self._host = host

    # Looking

    def walk(self, directory: int, name: bytes) -> tuple[int, Stat] | None:
        return self._host.walk(directory, name)

    def stat(self, fd: int) -> Stat:
        return self._host.stat(fd)

    def stat_at(self, directory: int, name: bytes) -> Stat:
        return self._host.stat_at(directory, name)

    def attributes(self, fd: int) -> os.stat_result:
        return self._host.attributes(fd)

    def getattr_body(self, fd: int, devices: QidDevices, generation: int, body: Any) -> bool:
        return self._host.getattr_body(fd, devices, generation, body)

    def getattr_body_as(self, fd: int, path: int, generation: int, body: Any) -> None:
        self._host.getattr_body_as(fd, path, generation, body)

    def statfs(self, fd: int) -> Statfs:
        return self._host.statfs(fd)

    def mount_type(self, mnt_id: int) -> str | None:
        return self._host.mount_type(mnt_id)

    def readlink(self, fd: int) -> bytes:
        return self._host.readlink(fd)

    def name_of(self, fd: int) -> bytes:
        return self._host.name_of(fd)

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
        return self._host.readdir(fd, offset, at_root, look_up, covered, devices, cookies, size)

    def getdents(self, fd: int, offset: int) -> list[tuple[int, bytes]]:
        return self._host.getdents(fd, offset)

    # Descriptors

    def hold(self, fd: int) -> int:
        return self._host.hold(fd)

    def parent(self, directory: int) -> int:
        return self._host.parent(directory)

    def open_below(self, directory: int, path: bytes, flags: int) -> int:
        if flags & _FOR_CHANGE:
            refuse()
        return self._host.open_below(directory, path, flags)

    def open(self, fd: int, flags: int, wait: bool) -> int:
        if flags & _FOR_CHANGE:
            refuse()
        return self._host.open(fd, flags | os.O_NOATIME, wait)

    def open_by_handle(self, mount: int, handle: bytes) -> int:
        return self._host.open_by_handle(mount, handle)

    def file_handle(self, fd: int) -> bytes:
        return self._host.file_handle(fd)

    def duplicate(self, fd: int) -> int:
        return self._host.duplicate(fd)

    def close(self, fd: int) -> None:
        self._host.close(fd)

    # Names

    def create(
        self, _directory: int, _name: bytes, _flags: int, _mode: int, _uid: int, _gid: int
    ) -> int:
        refuse()

    def mkdir(self, _directory: int, _name: bytes, _mode: int, _uid: int, _gid: int) -> None:
        refuse()

    def symlink(self, _target: bytes, _directory: int, _name: bytes, _uid: int, _gid: int) -> None:
        refuse()

    def mknod(
        self,
        _directory: int,
        _name: bytes,
        _mode: int,
        _major: int,
        _minor: int,
        _uid: int,
        _gid: int,
    ) -> None:
        refuse()

    def link(self, _fd: int, _directory: int, _name: bytes) -> None:
        refuse()

    def rename(self, _old: int, _old_name: bytes, _new: int, _new_name: bytes) -> None:
        refuse()

    def unlink(self, _directory: int, _name: bytes) -> None:
        refuse()

    def rmdir(self, _directory: int, _name: bytes) -> None:
        refuse()

    # Attributes and data

    def act_for(self, uid: int) -> None:
        self._host.act_for(uid)

    def before_write(self, _fd: int) -> None:
        refuse()

    def write_out(self, _fd: int, _offset: int, _count: int) -> None:
        refuse()

    def chmod(self, _fd: int, _mode: int) -> None:
        refuse()

    def chown(self, _fd: int, _uid: int, _gid: int) -> None:
        refuse()

    def utimens(self, _fd: int, _atime: Time, _mtime: Time) -> None:
        refuse()

    def truncate(self, _fd: int, _size: int) -> None:
        refuse()

    def ftruncate(self, _fd: int, _size: int) -> None:
        refuse()

    def fsync(self, fd: int) -> None:
        self._host.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        self._host.fdatasync(fd)

    # Locks

    def lock(self, fd: int, kind: int, start: int, length: int) -> None:
        self._host.lock(fd, kind, start, length)

    def find_lock(self, fd: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
        return self._host.find_lock(fd, kind, start, length)

    # Extended attributes

    def check_xattr(self, name: bytes) -> None:
        self._host.check_xattr(name)

    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        return self._host.getxattr(fd, name)

    def listxattr(self, fd: int) -> list[bytes]:
        return self._host.listxattr(fd)

    def setxattr(self, _fd: int, _name: bytes, _value: bytes, _flags: int) -> None:
        refuse()

    def removexattr(self, _fd: int, _name: bytes) -> None:
        refuse()
