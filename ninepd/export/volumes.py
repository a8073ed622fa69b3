"""Volumes: the file systems that an export reaches into, and how each behaves."""

import logging
import os
import stat as st
from enum import Enum, auto
from errno import EACCES, ENODEV
from typing import Final, Generic, TypeVar

from ninepd.config import Multidevs
from ninepd.export.host import Host
from ninepd.listing import LookUp
from ninepd.syscalls import Stat

log = logging.getLogger(__name__)

H = TypeVar("H")

_MEMORY_TYPES: Final = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
_REMOTE_TYPES: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse", "fuseblk", "gfs2", "gpfs", "lustre", "nfs", "nfs4",
     "ocfs2", "smb3", "virtiofs"}
)  # fmt: skip
"""Names as in /proc/self/mountinfo (proc(5)), without a subtype such as that of "fuse.sshfs"."""
_LOOK_UPS: Final = {
    **dict.fromkeys(("ext2", "ext3", "ext4", "xfs", "tmpfs", "f2fs"), LookUp.COVERED),
    **dict.fromkeys(("btrfs", "bcachefs", "zfs"), LookUp.DIRECTORIES),
}
"""Where a directory entry shows the inode number that stat(2) shows. Elsewhere it may not: FAT
makes one up, overlayfs shows that of a layer, FUSE servers need not care."""
_KERNEL_TYPES: Final = {
    0x42494E4D: "binfmt_misc",
    0xCAFE4A11: "bpf",
    0x0027E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x62656570: "configfs",
    0x64626720: "debugfs",
    0x00001CD1: "devpts",
    0xDE5E81E4: "efivarfs",
    0x65735543: "fusectl",
    0x6E667364: "nfsd",
    0x6E736673: "nsfs",
    0x00009FA0: "proc",
    0x6165676C: "pstore",
    0x07655821: "resctrl",
    0x67596969: "rpc_pipefs",
    0x73636673: "securityfs",
    0xF97CFF8C: "selinuxfs",
    0x43415D53: "smackfs",
    0x62656572: "sysfs",
    0x74726163: "tracefs",
}
"""Where files are the kernel's controls, and this process's own: /proc/self/mem, for one."""
_NAMES: Final = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb3",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x5346414F: "afs",
    **_KERNEL_TYPES,
}
"""f_type of statfs(2) to name, for a mount that is not listed: in a chroot its root is not."""


class Storage(Enum):
    """How long a file system may keep a system call waiting."""

    MEMORY = auto()
    """Never: tmpfs, ramfs, hugetlbfs."""
    LOCAL = auto()
    """As long as a disk takes, and only for data that is not cached."""
    REMOTE = auto()
    """Any time, in any call: network and user-space file systems."""


def _type_of(host: Host, fd: int, mnt_id: int) -> str:
    return host.mount_type(mnt_id) or _NAMES.get(host.statfs(fd).type, "")


def _storage_of(kind: str) -> Storage:
    if kind in _MEMORY_TYPES:
        return Storage.MEMORY
    return Storage.REMOTE if kind in _REMOTE_TYPES else Storage.LOCAL


class Mount:
    """A mount; ``fd`` is what open_by_handle_at wants, -1 if that is not wanted or fails."""

    __slots__ = ("fd", "mnt_id", "volumes")

    def __init__(self, mnt_id: int, fd: int) -> None:
        self.mnt_id = mnt_id
        self.fd = fd
        self.volumes = 0


class Volume(Generic[H]):
    """One device seen through one mount: here an inode number is one file.

    The mount belongs to it, because a device may be mounted twice, once of it read-only.
    """

    __slots__ = ("automounts", "dev", "handles", "in_memory", "kind", "look_up", "mount", "remote")

    def __init__(self, mount: Mount, dev: int, kind: str) -> None:
        """``kind`` is its file system type."""
        storage = _storage_of(kind)
        self.mount = mount
        self.kind = kind
        self.look_up = _LOOK_UPS.get(kind, LookUp.ALL)
        """What a listing has to look up besides mount points."""
        self.automounts = kind == "autofs"
        """May any of its directories have something mounted on it when it is entered?"""
        self.dev = dev
        self.in_memory = storage is Storage.MEMORY
        self.remote = storage is Storage.REMOTE
        self.handles: dict[int, H] = {}
        """By inode number. The handle table's."""

    @property
    def by_handle(self) -> bool:
        """Are its files found again by file handle?"""
        return self.mount.fd >= 0


class Survey:
    """What the host says of a volume that is not known yet."""

    __slots__ = ("kind", "mount_fd")

    def __init__(self, kind: str, mount_fd: int) -> None:
        self.kind = kind
        self.mount_fd = mount_fd


class Volumes(Generic[H]):
    """Those that handles are on now. ``H`` is what the handle table keeps for an inode.

    All but ``survey`` is called under the handle table's lock.
    """

    def __init__(
        self, host: Host, by_handle: bool, multidevs: Multidevs, kernel_filesystems: bool
    ) -> None:
        """``by_handle``: files are to be opened by file handle, where that can be done.

        ``kernel_filesystems``: those may be reached, too.
        """
        self.remote = False
        """Was any on storage that may keep a request waiting?"""
        self._host = host
        self._by_handle = by_handle
        self._multidevs = multidevs
        self._refused_types = (
            frozenset() if kernel_filesystems else frozenset(_KERNEL_TYPES.values())
        )
        self._refused = False
        """Has the log said so?"""
        self._root_dev: int | None = None
        self._volumes: dict[tuple[int, int], Volume[H]] = {}
        self._mounts: dict[int, Mount] = {}
        self._warned: set[int] = set()

    def find(self, stat: Stat) -> Volume[H] | None:
        """The volume that a file is on, if it is known."""
        return self._volumes.get((stat.mnt_id, stat.dev))

    def survey(self, fd: int, stat: Stat) -> Survey:
        """Ask the host about the volume of a file; ENODEV or EACCES if it may not be reached."""
        kind = _type_of(self._host, fd, stat.mnt_id)
        if kind in self._refused_types:
            self._refuse(kind)
        self._check_device(stat.dev)
        remote = _storage_of(kind) is Storage.REMOTE
        usable = self._by_handle and st.S_ISDIR(stat.mode) and not remote
        return Survey(kind, _mount_fd(self._host, fd) if usable else -1)

    def _check_device(self, dev: int) -> None:
        if self._root_dev is None or dev == self._root_dev:
            return
        if self._multidevs is Multidevs.FORBID:
            raise OSError(ENODEV, "another device is mounted here (multidevs=forbid)")
        if self._multidevs is Multidevs.WARN and dev not in self._warned:
            self._warned.add(dev)
            log.warning(
                "another device is mounted below the export: two files may show the guest "
                "one inode number (--multidevs warn)"
            )

    def admit(self, stat: Stat, survey: Survey) -> Volume[H]:
        """A volume that was not known. The first is the root's."""
        if self._root_dev is None:
            self._root_dev = stat.dev
        mount = self._mounts.get(stat.mnt_id)
        if mount is None:
            mount = self._mounts[stat.mnt_id] = Mount(stat.mnt_id, survey.mount_fd)
            survey.mount_fd = -1
        mount.volumes += 1
        volume: Volume[H] = Volume(mount, stat.dev, survey.kind)
        self._volumes[stat.mnt_id, stat.dev] = volume
        self.remote |= volume.remote
        return volume

    def _refuse(self, kind: str) -> None:
        if self._root_dev is not None and not self._refused:
            self._refused = True
            log.warning(
                "a file system of the kernel's own (%s) is mounted below the export: guests may "
                "not enter it, nor others like it (--allow-kernel-filesystems)",
                kind,
            )
        raise PermissionError(
            EACCES,
            f"{kind} is a file system of the kernel's own; --allow-kernel-filesystems serves it",
        )

    def drop(self, volume: Volume[H]) -> int:
        """It holds no handles any more: its numbers may come to another file system.

        Returns a descriptor to be closed, or -1: while open it keeps the host from unmounting.
        """
        mount = volume.mount
        del self._volumes[mount.mnt_id, volume.dev]
        mount.volumes -= 1
        if mount.volumes:
            return -1
        del self._mounts[mount.mnt_id]
        fd, mount.fd = mount.fd, -1
        return fd


def _mount_fd(host: Host, directory: int) -> int:
    """An ordinary descriptor on a mount whose files can be opened by handle; or -1.

    Tried out, because the right to do so depends on more than a capability.
    """
    try:
        fd = host.open_below(directory, b".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    try:
        host.close(host.open_by_handle(fd, host.file_handle(directory)))
    except OSError as error:
        log.info("on a mount, files cannot be opened by handle: %s", error)
        host.close(fd)
        return -1
    return fd
