"""What the mapped security models share: owners, modes and kinds of files that only guests see.

On the host every file belongs to the daemon's user, who needs no privileges, and has the mode
``fmode``, directories ``dmode``. Symbolic links are regular files that hold their target; devices,
FIFOs and sockets are empty ones. What the guest sees instead is kept beside the file, in QEMU's
formats (``-fsdev local,security_model=mapped-xattr`` or ``mapped-file``); what is not kept there is
the host's own. So it is for a real symbolic link, too, which QEMU's server cannot read.

The kernel of the host knows nothing of these modes, so set-ID bits are dropped here.
"""

import errno
import os
import stat as st
import threading
from abc import abstractmethod
from typing import Any, Final

from ninepd import owners, syscalls
from ninepd.export.host import ACLS
from ninepd.export.local import LocalHost, restated
from ninepd.ids import Ids
from ninepd.owners import NO_DEVICE, Owner, shown_mode
from ninepd.syscalls import NO_ID, QidDevices, Stat, fd_path
from ninepd.tuples import made

TARGET_MAX: Final = 4096
"""PATH_MAX: a longer target could not be followed (path_resolution(7))."""
_ROOT: Final = 0
_PROGRAM: Final = st.S_ISUID | st.S_ISGID
_NODES: Final = frozenset({st.S_IFREG, st.S_IFCHR, st.S_IFBLK, st.S_IFIFO, st.S_IFSOCK})
_NO_UNNAMED: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.EPERM})
"""What openat(2) says to O_TMPFILE where it knows nothing of it, or, on ext4, where the directory
was removed."""


def without_set_ids(mode: int) -> int:
    """What a write, or another owner, leaves of a mode (write(2), chown(2))."""
    if mode & st.S_IXGRP:
        mode &= ~st.S_ISGID
    return mode & ~st.S_ISUID


class MappedHost(LocalHost):
    """Shows files as guests have made them. Subclasses know where that is kept."""

    __slots__ = ("_acting", "_dmode", "_fmode", "_ids")

    def __init__(self, fmode: int, dmode: int, ids: Ids | None = None) -> None:
        """``ids``: what the guest knows the host's owners as. Those that it sets are its own."""
        super().__init__()
        self._ids = ids
        self.watches_writes = True
        self._fmode = fmode
        self._dmode = dmode
        self._acting: Any = threading.local()
        """Whom each thread acts for."""

    # Where it is kept

    @abstractmethod
    def _owner(self, fd: int) -> Owner:
        """What a guest has set for the file that a descriptor holds."""

    @abstractmethod
    def _mode_at(self, directory: int, name: bytes, stat: Stat) -> int:
        """The mode that is shown of a name, or of ``directory`` itself if that is empty."""

    @abstractmethod
    def _keep(self, fd: int, owner: Owner) -> None:
        """Set those fields that say something."""

    @abstractmethod
    def _make_file(
        self, directory: int, name: bytes, flags: int, owner: Owner, content: bytes
    ) -> int:
        """Make a regular file that shows as what ``owner`` says, and open it; EEXIST."""

    # Looking

    def _shown(self, directory: int, name: bytes, stat: Stat) -> Stat:
        mode = self._mode_at(directory, name, stat)
        if mode == stat.mode:
            return stat
        dev, ino, mnt_id, generation, _, nlink, version, automount = stat
        return made(Stat, (dev, ino, mnt_id, generation, mode, nlink, version, automount))

    def walk(self, directory: int, name: bytes) -> tuple[int, Stat] | None:
        found = syscalls.walk(directory, name)
        if found is None:
            return None
        fd, stat = found
        try:
            return fd, self._shown(fd, b"", stat)
        except OSError:
            self.close(fd)
            raise

    def stat(self, fd: int) -> Stat:
        return self._shown(fd, b"", syscalls.stat(fd))

    def stat_at(self, directory: int, name: bytes) -> Stat:
        return self._shown(directory, name, syscalls.stat_at(directory, name))

    def attributes(self, fd: int) -> os.stat_result:
        host, owner, ids = os.fstat(fd), self._owner(fd), self._ids
        uid, gid = host.st_uid, host.st_gid
        if ids is not None:
            uid, gid = ids.uids.shown(uid), ids.gids.shown(gid)
        return restated(
            host,
            shown_mode(host.st_mode, owner.mode),
            uid if owner.uid == NO_ID else owner.uid,
            gid if owner.gid == NO_ID else owner.gid,
            host.st_rdev if owner.rdev == NO_DEVICE else owner.rdev,
        )

    def getattr_body(self, fd: int, devices: QidDevices, generation: int, body: Any) -> bool:
        if not syscalls.getattr_body(fd, devices, generation, body):
            return False
        if self._ids is not None:
            self._ids.show(body)
        owners.put_owner(body, self._owner(fd))
        return True

    def getattr_body_as(self, fd: int, path: int, generation: int, body: Any) -> None:
        syscalls.getattr_body_as(fd, path, generation, body)
        if self._ids is not None:
            self._ids.show(body)
        owners.put_owner(body, self._owner(fd))

    def readlink(self, fd: int) -> bytes:
        if st.S_ISLNK(syscalls.stat_at(fd, b"").mode):  # the host's own
            return os.readlink(b"", dir_fd=fd)
        opened = self._open(fd, os.O_RDONLY | os.O_CLOEXEC, True)
        try:
            return os.pread(opened, TARGET_MAX, 0).partition(b"\0")[0]
        finally:
            self.close(opened)

    # Opening

    def open(self, fd: int, flags: int, wait: bool) -> int:
        if flags & os.O_TRUNC:
            self._drop_set_ids(fd)
        return super().open(fd, flags, wait)

    # Making

    def create(self, directory: int, name: bytes, flags: int, mode: int, uid: int, gid: int) -> int:
        owner = Owner(uid, gid, st.S_IFREG | st.S_IMODE(mode))
        return self._make_file(directory, name, flags, owner, b"")

    def symlink(self, target: bytes, directory: int, name: bytes, uid: int, gid: int) -> None:
        if not target:
            raise FileNotFoundError(errno.ENOENT, "a symbolic link leads somewhere")
        if len(target) >= TARGET_MAX:
            raise OSError(errno.ENAMETOOLONG, "nobody could follow a target of that length")
        owner = Owner(uid, gid, st.S_IFLNK | 0o777)
        self.close(self._make_file(directory, name, os.O_RDWR, owner, target))

    def mknod(
        self, directory: int, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> None:
        kind = st.S_IFMT(mode) or st.S_IFREG
        if kind not in _NODES:  # as mknod(2) says it
            number = errno.EPERM if kind == st.S_IFDIR else errno.EINVAL
            raise OSError(number, "that kind of file is not made like this")
        owner = Owner(uid, gid, kind | st.S_IMODE(mode), os.makedev(major, minor))
        self.close(self._make_file(directory, name, os.O_RDWR, owner, b""))

    def _unnamed(self, directory: int, mode: int) -> int:
        """A file without a name, for ``_name``; -1 where file systems have no such (open(2))."""
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            return os.open(b".", flags, mode, dir_fd=directory)
        except OSError as error:
            if error.errno in _NO_UNNAMED:
                return -1
            raise

    def _name(self, fd: int, directory: int, name: bytes, flags: int) -> int:
        """Give it one, and open it by that, because it keeps the kernel's name for it right.

        Takes over ``fd`` if it returns.
        """
        os.link(fd_path(fd), name, dst_dir_fd=directory, follow_symlinks=True)
        try:
            found = syscalls.walk(directory, name)
        except OSError:
            found = None
        if found is None:  # gone already
            return fd
        held, stat = found
        try:
            here = syscalls.stat(fd)
            if (stat.ino, stat.dev) != (here.ino, here.dev):
                return fd
            opened = self._open(held, flags & ~os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY, True)
        except OSError:  # fmode may not allow it
            return fd
        finally:
            self.close(held)
        self.close(fd)
        return opened

    @staticmethod
    def _fill(fd: int, content: bytes) -> None:
        while content:
            content = content[os.write(fd, content) :]

    # Attributes

    def act_for(self, uid: int) -> None:
        self._acting.uid = uid
        super().act_for(uid)

    def _drop_set_ids(self, fd: int) -> None:
        """Of a file that this thread changes for somebody who is not root."""
        if getattr(self._acting, "uid", _ROOT) != _ROOT:
            self.before_write(fd)

    def before_write(self, fd: int) -> None:
        mode = self.stat_at(fd, b"").mode
        if mode & _PROGRAM and st.S_ISREG(mode):
            left = without_set_ids(mode)
            if left != mode:
                self._keep(fd, Owner(mode=left))

    def chmod(self, fd: int, mode: int) -> None:
        kind = st.S_IFMT(self.stat_at(fd, b"").mode)
        self._keep(fd, Owner(mode=kind | st.S_IMODE(mode)))

    def chown(self, fd: int, uid: int, gid: int) -> None:
        if uid == gid == NO_ID:  # touches ctime
            super().chown(fd, uid, gid)
            return
        self.before_write(fd)
        self._keep(fd, Owner(uid=uid, gid=gid))

    def truncate(self, fd: int, size: int) -> None:
        if st.S_IFMT(self.stat_at(fd, b"").mode) not in {st.S_IFREG, st.S_IFDIR}:
            raise OSError(errno.EINVAL, "only a regular file has a size to be set")
        self._drop_set_ids(fd)
        super().truncate(fd, size)

    def ftruncate(self, fd: int, size: int) -> None:
        self._drop_set_ids(fd)
        super().ftruncate(fd, size)

    def _drop_set_group_id(self, fd: int) -> None:
        """Of a program whose ACL was set by somebody who is not of its group."""
        mode = self.stat_at(fd, b"").mode
        foreign = getattr(self._acting, "uid", _ROOT) != _ROOT
        if foreign and mode & st.S_ISGID and st.S_ISREG(mode):
            self._keep(fd, Owner(mode=mode & ~st.S_ISGID))

    # Extended attributes

    def _shows_xattr(self, name: bytes) -> bool:
        return name.startswith(b"user.") or name in ACLS
