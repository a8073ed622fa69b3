"""A host whose users and groups have other numbers in the guest.

It answers as an idmapped mount of the same ranges does (mount_setattr(2)). So an id of the host's
without a number in the guest shows as 65534, and the guest creates nothing, and gives nothing away,
under an id of its own without one on the host: EOVERFLOW. What belongs to somebody whom the guest
does not know it cannot change, and it reads only what the mode lets it. That is checked here if the
daemon may do more than the permissions of files let it, else by the kernel.
"""

import errno
import os
from contextlib import suppress
from typing import Any, Final

from ninepd import syscalls
from ninepd.capabilities import overrides_permissions
from ninepd.export import xattr_ids
from ninepd.export.host import Time
from ninepd.export.local import LocalHost, restated
from ninepd.ids import KNOWN, Ids
from ninepd.syscalls import QidDevices, Stat

_FOR_CHANGE: Final = os.O_ACCMODE | os.O_TRUNC


class IdMappedHost(LocalHost):
    """``passthrough`` and ``none`` under other ids."""

    __slots__ = ("_guards", "_ids")

    def __init__(self, ids: Ids, strict: bool = True) -> None:
        super().__init__(strict)
        self._ids = ids
        self._guards = overrides_permissions()

    # Looking

    def walk(self, directory: int, name: bytes) -> tuple[int, Stat] | None:
        self._guard_looking(directory, os.X_OK)
        return super().walk(directory, name)

    def stat_at(self, directory: int, name: bytes) -> Stat:
        if name:
            self._guard_looking(directory, os.X_OK)
        return super().stat_at(directory, name)

    def attributes(self, fd: int) -> os.stat_result:
        host, ids = os.fstat(fd), self._ids
        uid, gid = ids.uids.shown(host.st_uid), ids.gids.shown(host.st_gid)
        return restated(host, host.st_mode, uid, gid, host.st_rdev)

    def getattr_body(self, fd: int, devices: QidDevices, generation: int, body: Any) -> bool:
        if not syscalls.getattr_body(fd, devices, generation, body):
            return False
        self._ids.show(body)
        return True

    def getattr_body_as(self, fd: int, path: int, generation: int, body: Any) -> None:
        syscalls.getattr_body_as(fd, path, generation, body)
        self._ids.show(body)

    # Whom the guest does not know

    def _guard(self, number: int, directory: int, name: bytes = b"") -> None:
        """Refuse to change what a name, or else ``directory`` itself, is."""
        if self._guards and not self._ids.rights_to(directory, name) & KNOWN:
            raise OSError(number, "it belongs to somebody whom the guest does not know")

    def _guard_looking(self, fd: int, right: int) -> None:
        """Refuse to read, or to look names up in, what the guest's root may not."""
        if self._guards and not self._ids.rights_to(fd, b"") & right:
            raise PermissionError(errno.EACCES, "the guest does not know whom it belongs to")

    def open(self, fd: int, flags: int, wait: bool) -> int:
        if flags & _FOR_CHANGE:
            self._guard(errno.EACCES, fd)
        else:
            self._guard_looking(fd, os.R_OK)
        return super().open(fd, flags, wait)

    def link(self, fd: int, directory: int, name: bytes) -> None:
        self._guard(errno.EOVERFLOW, fd)
        self._guard(errno.EACCES, directory)
        super().link(fd, directory, name)

    def rename(self, old: int, old_name: bytes, new: int, new_name: bytes) -> None:
        self._guard(errno.EOVERFLOW, old, old_name)
        self._guard(errno.EACCES, old)
        self._guard(errno.EACCES, new)
        with suppress(FileNotFoundError):
            self._guard(errno.EOVERFLOW, new, new_name)
        super().rename(old, old_name, new, new_name)

    def unlink(self, directory: int, name: bytes) -> None:
        self._guard_removal(directory, name)
        super().unlink(directory, name)

    def rmdir(self, directory: int, name: bytes) -> None:
        self._guard_removal(directory, name)
        super().rmdir(directory, name)

    def _guard_removal(self, directory: int, name: bytes) -> None:
        self._guard(errno.EOVERFLOW, directory, name)
        self._guard(errno.EACCES, directory)

    def chmod(self, fd: int, mode: int) -> None:
        self._guard(errno.EOVERFLOW, fd)
        super().chmod(fd, mode)

    def utimens(self, fd: int, atime: Time, mtime: Time) -> None:
        self._guard(errno.EOVERFLOW, fd)
        super().utimens(fd, atime, mtime)

    def truncate(self, fd: int, size: int) -> None:
        self._guard(errno.EACCES, fd)
        super().truncate(fd, size)

    # Making, and giving away

    def _creator(self, directory: int, name: bytes, uid: int, gid: int) -> tuple[int, int]:
        """Whom a name is made for on the host. If it exists already, that is said first."""
        try:
            self._guard(errno.EACCES, directory)
            ids = self._ids
            return ids.uids.creator(uid, os.geteuid()), ids.gids.creator(gid, os.getegid())
        except OSError:
            try:
                self.stat_at(directory, name)
            except FileNotFoundError:
                pass
            else:
                raise FileExistsError(errno.EEXIST, "it exists") from None
            raise

    def create(self, directory: int, name: bytes, flags: int, mode: int, uid: int, gid: int) -> int:
        uid, gid = self._creator(directory, name, uid, gid)
        return super().create(directory, name, flags, mode, uid, gid)

    def mkdir(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> None:
        uid, gid = self._creator(directory, name, uid, gid)
        super().mkdir(directory, name, mode, uid, gid)

    def symlink(self, target: bytes, directory: int, name: bytes, uid: int, gid: int) -> None:
        uid, gid = self._creator(directory, name, uid, gid)
        super().symlink(target, directory, name, uid, gid)

    def mknod(
        self, directory: int, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> None:
        uid, gid = self._creator(directory, name, uid, gid)
        super().mknod(directory, name, mode, major, minor, uid, gid)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        self._guard(errno.EOVERFLOW, fd)
        super().chown(fd, self._ids.uids.owner(uid), self._ids.gids.owner(gid))

    # Extended attributes

    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        if name.startswith(b"user."):  # others need no right (Linux, xattr_permission())
            self._guard_looking(fd, os.R_OK)
        value = super().getxattr(fd, name)
        return None if value is None else xattr_ids.to_guest(name, value, self._ids)

    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int) -> None:
        self._guard(errno.EPERM, fd)
        super().setxattr(fd, name, xattr_ids.to_host(name, value, self._ids), flags)

    def removexattr(self, fd: int, name: bytes) -> None:
        self._guard(errno.EPERM, fd)
        super().removexattr(fd, name)
