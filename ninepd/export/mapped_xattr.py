"""``mapped-xattr``: what guests set is kept in extended attributes of the file, in QEMU's format.

``user.virtfs.uid``, ``gid`` and ``mode`` are 32-bit numbers in little endian, the mode with the
type of the file, ``user.virtfs.rdev`` is a 64-bit one as of makedev(3). ACLs are kept as
``user.virtfs.system.posix_acl_access`` and ``_default``, which mean nothing to the host. All these
names are hidden from the guest, who must not forge them.
"""

import errno
import os
import stat as st
from typing import Final

from ninepd import owners, syscalls
from ninepd.export.host import ACLS
from ninepd.export.mapped import MappedHost
from ninepd.ids import Ids
from ninepd.owners import NO_DEVICE, Owner
from ninepd.syscalls import NO_ID, Stat, fd_path

PREFIX: Final = b"user.virtfs."


def takes_xattrs(directory: int) -> bool:
    """Can a directory's files have extended attributes? Nothing is left behind by asking.

    What reads says so, too: EOPNOTSUPP where there can be none (xattr(7)).
    """
    try:
        syscalls.getxattr(directory, PREFIX + b"mode")
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
    try:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        trial = os.open(b".", flags, 0o600, dir_fd=directory)
    except OSError:  # it may be read only, or know no unnamed files
        return True
    try:
        os.setxattr(trial, PREFIX + b"mode", bytes(4))
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    finally:
        os.close(trial)
    return True


def _kept(name: bytes) -> bytes:
    """Under which name an attribute of the guest's is kept."""
    return PREFIX + name if name in ACLS else name


class MappedXattrHost(MappedHost):
    """Shows files as their extended attributes say."""

    __slots__ = ()

    def __init__(self, fmode: int, dmode: int, ids: Ids | None = None) -> None:
        super().__init__(fmode, dmode, ids)
        self.maps_types = True

    def _owner(self, fd: int) -> Owner:
        return owners.owner_of(fd)

    def _mode_at(self, directory: int, name: bytes, stat: Stat) -> int:
        return owners.mode_at(directory, name, stat.mode)

    def _keep(self, fd: int, owner: Owner) -> None:
        """The mode last: until then the file shows as the host's, which only its owner may use."""
        path = fd_path(fd)
        if owner.uid != NO_ID:
            os.setxattr(path, PREFIX + b"uid", owner.uid.to_bytes(4, "little"))
        if owner.gid != NO_ID:
            os.setxattr(path, PREFIX + b"gid", owner.gid.to_bytes(4, "little"))
        if owner.rdev != NO_DEVICE:
            os.setxattr(path, PREFIX + b"rdev", owner.rdev.to_bytes(8, "little"))
        if owner.mode != NO_ID:
            os.setxattr(path, PREFIX + b"mode", owner.mode.to_bytes(4, "little"))

    def _make_file(
        self, directory: int, name: bytes, flags: int, owner: Owner, content: bytes
    ) -> int:
        """It gets its name when it is complete."""
        fd = self._unnamed(directory, self._fmode)
        if fd < 0:
            return self._make_named(directory, name, flags, owner, content)
        try:
            self._keep(fd, owner)
            self._fill(fd, content)
            return self._name(fd, directory, name, flags)
        except OSError:
            self.close(fd)
            raise

    def _make_named(
        self, directory: int, name: bytes, flags: int, owner: Owner, content: bytes
    ) -> int:
        """Where there are no files without a name: for a moment it shows as the host's."""
        flags = flags & ~os.O_ACCMODE | os.O_RDWR
        fd = syscalls.create(directory, name, flags, self._fmode, NO_ID, NO_ID)
        try:
            self._fill(fd, content)
            self._keep(fd, owner)
        except OSError:
            self.close(fd)
            self.unlink(directory, name)
            raise
        return fd

    def mkdir(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> None:
        syscalls.mkdir(directory, name, self._dmode, NO_ID, NO_ID)
        try:
            found = syscalls.walk(directory, name)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "the directory is gone")
            try:
                self._keep(found[0], Owner(uid, gid, st.S_IFDIR | st.S_IMODE(mode)))
            finally:
                self.close(found[0])
        except OSError:
            self.rmdir(directory, name)
            raise

    # Extended attributes

    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        if name.startswith(PREFIX):
            return None
        return syscalls.getxattr(fd, _kept(name))

    def listxattr(self, fd: int) -> list[bytes]:
        names = [os.fsencode(name) for name in os.listxattr(fd_path(fd))]
        acls = [name for name in ACLS if PREFIX + name in names]
        return acls + [
            name for name in names if name.startswith(b"user.") and not name.startswith(PREFIX)
        ]

    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int) -> None:
        self._check_change(name)
        super().setxattr(fd, _kept(name), value, flags)
        if name == ACLS[0]:
            self._drop_set_group_id(fd)

    def removexattr(self, fd: int, name: bytes) -> None:
        self._check_change(name)
        super().removexattr(fd, _kept(name))

    @staticmethod
    def _check_change(name: bytes) -> None:
        if name.startswith(PREFIX):
            raise PermissionError(errno.EACCES, "these attributes are the server's own")
