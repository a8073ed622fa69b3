"""The host's own file systems, under the identities that two security models choose.

``passthrough``: the guest's owners and modes are the host's. ``none``: the same as far as the
daemon's privileges allow, and for the rest the daemon's own identity; no ACLs. Names and meaning
are QEMU's (``-fsdev local,security_model=``).

Three things can be done with an O_PATH descriptor: stat it, look names up in it, and go through
``/proc/self/fd/N`` for the calls that want a path (xattrs, chmod, truncate, link, reopening). That
magic link ends at the held object itself, even if it is a symbolic link (proc(5)).
"""

import errno
import os
import stat as st
from typing import Any

from ninepd import listing, syscalls
from ninepd.capabilities import privileged
from ninepd.export.host import ACLS, Host, Time
from ninepd.listing import Cookies, LookUp
from ninepd.statelock import CHECKS, assert_unlocked
from ninepd.syscalls import NO_ID, QidDevices, Stat, Statfs, fd_path


def restated(host: os.stat_result, mode: int, uid: int, gid: int, rdev: int) -> os.stat_result:
    """The host's attributes of a file, but for these."""
    shown = list(host)
    shown[st.ST_MODE], shown[st.ST_UID], shown[st.ST_GID] = mode, uid, gid
    more = {
        "st_atime": host.st_atime,
        "st_mtime": host.st_mtime,
        "st_ctime": host.st_ctime,
        "st_rdev": rdev,
    }
    return os.stat_result(shown, more)


class LocalHost(Host):
    """``passthrough``, if ``strict``: without privileges only the daemon's own user can create.

    Else ``none``: identity where possible, and no complaint where it is not.
    """

    __slots__ = ("_privileged", "_strict", "maps_types")

    def __init__(self, strict: bool = True) -> None:
        super().__init__(readonly=False)
        self._strict = strict
        self._privileged = privileged()
        self.maps_types = False
        """Do extended attributes say of plain files what they are for guests?"""

    # Identity

    def _identity(self, uid: int, gid: int) -> tuple[int, int]:
        """The (uid, gid) to create as for a guest's; NO_ID keeps ours. EPERM if it cannot be."""
        if self._privileged:
            return uid, gid
        foreign = uid not in {NO_ID, os.geteuid()} or gid not in {NO_ID, os.getegid()}
        if foreign and self._strict:
            raise PermissionError(
                errno.EPERM, f"creating as {uid}:{gid} needs root, or a mapped security model"
            )
        return NO_ID, NO_ID

    def _shows_xattr(self, name: bytes) -> bool:
        if name.startswith(b"user."):
            return True
        return self._strict and (name.startswith((b"security.", b"trusted.")) or name in ACLS)

    # Looking

    def walk(self, directory: int, name: bytes) -> tuple[int, Stat] | None:
        return syscalls.walk(directory, name)

    def stat(self, fd: int) -> Stat:
        return syscalls.stat(fd)

    def stat_at(self, directory: int, name: bytes) -> Stat:
        return syscalls.stat_at(directory, name)

    def attributes(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def getattr_body(self, fd: int, devices: QidDevices, generation: int, body: Any) -> bool:
        return syscalls.getattr_body(fd, devices, generation, body)

    def getattr_body_as(self, fd: int, path: int, generation: int, body: Any) -> None:
        syscalls.getattr_body_as(fd, path, generation, body)

    def statfs(self, fd: int) -> Statfs:
        return syscalls.fstatfs(fd)

    def mount_type(self, mnt_id: int) -> str | None:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                words = line.split()
                if int(words[0]) == mnt_id:
                    return words[words.index(b"-") + 1].decode().split(".")[0]
        return None

    def readlink(self, fd: int) -> bytes:
        return os.readlink(b"", dir_fd=fd)

    def name_of(self, fd: int) -> bytes:
        if CHECKS:
            assert_unlocked()
        return os.readlink(os.fsencode(fd_path(fd)))

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
        return listing.readdir(
            fd, offset, at_root, look_up, covered, devices, cookies, size, self.maps_types
        )

    def getdents(self, fd: int, offset: int) -> list[tuple[int, bytes]]:
        return listing.getdents(fd, offset)

    # Descriptors

    def hold(self, fd: int) -> int:
        return os.open(fd_path(fd), os.O_PATH | os.O_CLOEXEC)

    def parent(self, directory: int) -> int:
        return syscalls.open_parent(directory)

    def open_below(self, directory: int, path: bytes, flags: int) -> int:
        return syscalls.open_scoped(directory, path, flags)

    def open(self, fd: int, flags: int, wait: bool) -> int:
        flags |= os.O_CLOEXEC | os.O_NOCTTY
        try:
            return self._open(fd, flags, wait)
        except PermissionError:
            if not flags & os.O_NOATIME:
                raise
            # O_NOATIME is for owners only (open(2)); QEMU drops it too where it is not allowed.
            return self._open(fd, flags & ~os.O_NOATIME, wait)

    def _open(self, fd: int, flags: int, wait: bool) -> int:
        if CHECKS:
            assert_unlocked()
        if wait:
            return os.open(fd_path(fd), flags)
        # A lease would keep us waiting without O_NONBLOCK; afterwards the flag must not linger,
        # because FUSE servers see it.
        opened = os.open(fd_path(fd), flags | os.O_NONBLOCK)
        os.set_blocking(opened, True)
        return opened

    def open_by_handle(self, mount: int, handle: bytes) -> int:
        return syscalls.open_by_handle(mount, handle, os.O_PATH)

    def file_handle(self, fd: int) -> bytes:
        return syscalls.file_handle(fd)

    def duplicate(self, fd: int) -> int:
        return os.dup(fd)

    def close(self, fd: int) -> None:
        if CHECKS:
            assert_unlocked()
        os.close(fd)

    # Names

    def create(self, directory: int, name: bytes, flags: int, mode: int, uid: int, gid: int) -> int:
        uid, gid = self._identity(uid, gid)
        return syscalls.create(directory, name, flags, mode, uid, gid)

    def mkdir(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> None:
        uid, gid = self._identity(uid, gid)
        syscalls.mkdir(directory, name, mode, uid, gid)

    def symlink(self, target: bytes, directory: int, name: bytes, uid: int, gid: int) -> None:
        uid, gid = self._identity(uid, gid)
        syscalls.symlink(target, directory, name, uid, gid)

    def mknod(
        self, directory: int, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> None:
        uid, gid = self._identity(uid, gid)
        syscalls.mknod(directory, name, mode, major, minor, uid, gid)

    def link(self, fd: int, directory: int, name: bytes) -> None:
        os.link(fd_path(fd), name, dst_dir_fd=directory, follow_symlinks=True)

    def rename(self, old: int, old_name: bytes, new: int, new_name: bytes) -> None:
        os.rename(old_name, new_name, src_dir_fd=old, dst_dir_fd=new)

    def unlink(self, directory: int, name: bytes) -> None:
        os.unlink(name, dir_fd=directory)

    def rmdir(self, directory: int, name: bytes) -> None:
        os.rmdir(name, dir_fd=directory)

    # Attributes and data

    def act_for(self, uid: int) -> None:
        syscalls.keep_set_ids(uid == 0)

    def before_write(self, fd: int) -> None:
        """The kernel sees to it, who knows for whom this thread writes."""

    def write_out(self, fd: int, offset: int, count: int) -> None:
        syscalls.write_out(fd, offset, count)

    def chmod(self, fd: int, mode: int) -> None:
        os.chmod(fd_path(fd), mode)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        syscalls.chown(fd, uid, gid)

    def utimens(self, fd: int, atime: Time, mtime: Time) -> None:
        syscalls.utimens(fd, atime, mtime)

    def truncate(self, fd: int, size: int) -> None:
        os.truncate(fd_path(fd), size)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    # Locks

    def lock(self, fd: int, kind: int, start: int, length: int) -> None:
        syscalls.lock(fd, kind, start, length)

    def find_lock(self, fd: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
        return syscalls.find_lock(fd, kind, start, length)

    # Extended attributes

    def check_xattr(self, name: bytes) -> None:
        if not self._shows_xattr(name):
            raise OSError(errno.EOPNOTSUPP, "this security model does not serve that attribute")

    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        return syscalls.getxattr(fd, name)

    def listxattr(self, fd: int) -> list[bytes]:
        names = [os.fsencode(name) for name in os.listxattr(fd_path(fd))]
        return [name for name in names if self._shows_xattr(name)]

    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(fd_path(fd), name, value, flags)

    def removexattr(self, fd: int, name: bytes) -> None:
        os.removexattr(fd_path(fd), name)
