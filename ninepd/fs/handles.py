"""Handles: the inodes of an export that fids name, each held by one descriptor.

A ``Handle`` is pinned by an O_PATH descriptor, so it stays the same file whatever is renamed,
replaced or removed on the host. All fids on one inode share one Handle. When descriptors run short
an idle one is put aside, and the same inode is found again, never another: by its file handle
(``by_handle``, open_by_handle_at(2)), or by the name it had last, if its file handle is still the
same. What could not be found again is not put aside: unlinked files, and storage without handles.
"""

import contextlib
import errno
import logging
import os
import stat as st
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, TypeAlias

from ninepd import syscalls
from ninepd.config import Multidevs
from ninepd.fs.cookies import Cookies
from ninepd.fs.descriptors import Budget, Holder, on_worker
from ninepd.syscalls import Stat

log = logging.getLogger(__name__)

_MEMORY_TYPES: Final = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
_REMOTE_TYPES: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse", "fuseblk", "gfs2", "gpfs", "lustre", "nfs", "nfs4",
     "ocfs2", "smb3", "virtiofs"}
)  # fmt: skip
"""Names as in /proc/self/mountinfo (proc(5)), without a subtype such as that of "fuse.sshfs"."""
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


def _storage_of(fd: int, mnt_id: int) -> Storage:
    kind = _listed_type(mnt_id) or _NAMES.get(syscalls.fstatfs(fd).type, "")
    if kind in _MEMORY_TYPES:
        return Storage.MEMORY
    return Storage.REMOTE if kind in _REMOTE_TYPES else Storage.LOCAL


def _listed_type(mnt_id: int) -> str | None:
    """By the mount's entry, because statfs(2) asks the file system itself, which may hang."""
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            words = line.split()
            if int(words[0]) == mnt_id:
                return words[words.index(b"-") + 1].decode().split(".")[0]
    return None


Key: TypeAlias = int
"""Mount, device and inode, 64 bits each, as one number because that is the smallest object. The
mount belongs to it: one inode may be seen through a writable and through a read-only mount."""


def key_of(stat: Stat) -> Key:
    return stat.mnt_id << 128 | stat.dev << 64 | stat.ino


class Device:
    """A device that handles are on."""

    __slots__ = ("handles", "number", "storage")

    def __init__(self, number: int, storage: Storage) -> None:
        self.number = number
        self.storage = storage
        self.handles = 0


class Handle(Holder):
    """One inode of the export. Reference-counted by ``HandleTable``; not made elsewhere."""

    __slots__ = (
        "_restorer",
        "cookies",
        "device",
        "generation",
        "has_generation",
        "key",
        "kind",
        "opened",
        "place",
        "refs",
        "token",
    )

    def __init__(
        self, budget: Budget, fd: int, stat: Stat, device: Device, restorer: "HandleTable"
    ) -> None:
        super().__init__(budget, fd)
        self._restorer = restorer
        self.key = key_of(stat)
        self.kind = st.S_IFMT(stat.mode)
        """S_IFMT bits; an inode never changes them."""
        self.generation = stat.generation
        self.has_generation = bool(stat.has_generation)
        self.device = device
        self.refs = 1
        self.place: tuple[Handle, bytes] | None = None
        """Where it was found last, if it may have to be found again by name."""
        self.token = b""
        """Its file handle while it is put aside."""
        self.cookies: Cookies | None = None
        """Of a directory that was read."""
        self.opened: tuple[Holder, ...] = ()
        """The files that are open on it."""

    @property
    def storage(self) -> Storage:
        return self.device.storage

    @property
    def mount(self) -> int:
        """Number of the mount it was found on."""
        return self.key >> 128

    @property
    def path(self) -> str:
        """Names the held object in calls that take a path and follow links."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def is_directory(self) -> bool:
        return self.kind == st.S_IFDIR

    @property
    def is_symlink(self) -> bool:
        return self.kind == st.S_IFLNK

    def may_rest(self) -> bool:
        return self._restorer.may_rest(self)

    def _restore(self) -> int:
        return self._restorer.restore(self)


class Opened(Holder):
    """A file or directory that is open for I/O on a handle."""

    __slots__ = ("_reopen", "flags", "handle")

    def __init__(
        self, handle: Handle, fd: int, flags: int, reopen: Callable[[Handle, int], int]
    ) -> None:
        """``reopen`` opens the handle with host flags; ``flags`` are those of ``fd``."""
        super().__init__(handle._budget, fd)  # noqa: SLF001 - of its own base class
        self._reopen = reopen
        self.handle = handle
        self.flags = flags
        handle.opened = (*handle.opened, self)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def synchronous(self) -> bool:
        return bool(self.flags & (os.O_SYNC | os.O_DSYNC))

    def close(self) -> None:
        """OSError says what became of late writes; there is nothing left to close then, too."""
        self.handle.opened = tuple(other for other in self.handle.opened if other is not self)
        if not self.handle.opened:
            self.handle.cookies = None
        self.discard()

    def may_rest(self) -> bool:
        return self.handle._restorer.may_reopen(self)  # noqa: SLF001 - one mechanism

    def _restore(self) -> int:
        return self._reopen(self.handle, self.flags & ~os.O_TRUNC)


class _Mount:
    """A mount that handles are on; ``fd`` is what open_by_handle_at wants, -1 if that fails."""

    __slots__ = ("fd", "handles")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.handles = 0


class HandleTable:
    """All handles of an export. Safe to use from several threads."""

    def __init__(self, budget: Budget, by_handle: bool, multidevs: Multidevs) -> None:
        """``by_handle`` needs CAP_DAC_READ_SEARCH."""
        self.budget = budget
        self.remote = False
        """Was any handle on storage that may keep a request waiting?"""
        self._by_handle = by_handle
        self._multidevs = multidevs
        self._lock = threading.Lock()
        self._handles: dict[Key, Handle] = {}
        self._devices: dict[int, Device] = {}
        self._warned: set[int] = set()
        self._mounts: dict[int, _Mount] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def adopt(self, fd: int, stat: Stat, place: tuple[Handle, bytes] | None = None) -> Handle:
        """The Handle of a fresh O_PATH descriptor, which is taken over, even by an error.

        ENODEV if it is on a device that may not be reached, EMFILE if no descriptor can be spared.
        """
        key = key_of(stat)
        with self._lock:
            handle = self._handles.get(key)
            if handle is not None:
                if handle.is_open:
                    handle.refs += 1
                    os.close(fd)
                    return handle
                if self._is_same(handle, fd):
                    handle.refs += 1
                    handle.give(fd)
                    return handle
                # Its inode number has come to another file while the handle was put aside.
            try:
                self.budget.check()
                device = self._admit(fd, stat)
                handle = Handle(self.budget, fd, stat, device, self)
            except OSError:
                os.close(fd)
                raise
            device.handles += 1
            self._handles[key] = handle
            if place is not None and not self._by_handle:
                place[0].refs += 1
                handle.place = place
            if on_worker():
                # Nothing but this would keep it open while the worker goes on with it.
                handle.pins = 1
            if self._by_handle:
                self._enter_mount(handle)
            return handle

    def _admit(self, fd: int, stat: Stat) -> Device:
        device = self._devices.get(stat.dev)
        if device is not None:
            return device
        if self._devices:  # the first one is the root's
            if self._multidevs is Multidevs.FORBID:
                raise OSError(errno.ENODEV, "another device is mounted here (multidevs=forbid)")
            if self._multidevs is Multidevs.WARN and stat.dev not in self._warned:
                self._warned.add(stat.dev)
                log.warning(
                    "another device is mounted below the export: two files may show the guest "
                    "one inode number (--multidevs warn)"
                )
        device = self._devices[stat.dev] = Device(stat.dev, _storage_of(fd, stat.mnt_id))
        self.remote |= device.storage is Storage.REMOTE
        return device

    def share(self, handle: Handle) -> Handle:
        """Another reference to the same handle."""
        with self._lock:
            handle.refs += 1
        return handle

    def release(self, handle: Handle) -> None:
        """Give a reference back; the last one closes the descriptor."""
        while True:
            with self._lock:
                handle.refs -= 1
                if handle.refs:
                    return
                if self._handles.get(handle.key) is handle:
                    del self._handles[handle.key]
                device = handle.device
                device.handles -= 1
                if not device.handles:
                    # Its number may come to another file system.
                    del self._devices[device.number]
                if self._by_handle:
                    self._leave_mount(handle)
            handle.discard()
            if handle.place is None:
                return
            # A loop, because the chain of parents may be long.
            parent, handle.place = handle.place[0], None
            handle = parent

    # Mounts

    def _enter_mount(self, handle: Handle) -> None:
        mount = self._mounts.get(handle.mount)
        if mount is None:
            mount = self._mounts[handle.mount] = _Mount(_mount_fd(handle))
        mount.handles += 1

    def _leave_mount(self, handle: Handle) -> None:
        mount = self._mounts[handle.mount]
        mount.handles -= 1
        if not mount.handles:
            # An open descriptor would keep the host from unmounting.
            del self._mounts[handle.mount]
            if mount.fd >= 0:
                os.close(mount.fd)

    # Putting aside and finding again

    def may_rest(self, handle: Handle) -> bool:
        """Can the handle, which is open, be found again if its descriptor is closed now?"""
        if handle.storage is Storage.REMOTE:
            return False
        try:
            if not syscalls.stat(handle.fd).nlink:
                return False
            handle.token = syscalls.file_handle(handle.fd)
            if self._by_handle:
                return self._mounts[handle.mount].fd >= 0
            return handle.place is not None and self.is_at(handle, *handle.place)
        except OSError:
            return False

    def may_reopen(self, file: Opened) -> bool:
        """Can a file that is open on a handle be opened again later?

        Only by file handle: by name it could be gone by then, and its data with it.
        """
        handle = file.handle
        if not self._by_handle or handle.storage is Storage.REMOTE:
            return False
        # Without links the last descriptor on it must stay, be it the handle's or this.
        return handle.is_open or bool(handle.token and syscalls.stat(file.fd).nlink)

    def restore(self, handle: Handle) -> int:
        """A new O_PATH descriptor of what is put aside; ESTALE if that is gone."""
        for file in handle.opened:
            if file.is_open:
                return os.open(f"/proc/self/fd/{file.fd}", os.O_PATH | os.O_CLOEXEC)
        if self._by_handle:
            mount_fd = self._mounts[handle.mount].fd
            return self._verified(
                handle, syscalls.open_by_handle(mount_fd, handle.token, os.O_PATH)
            )
        return self._find_by_name(handle)

    def _find_by_name(self, handle: Handle) -> int:
        steps: list[tuple[Handle, bytes]] = []
        start = handle
        while not start.is_open and not (steps and any(f.is_open for f in start.opened)):
            if start.place is None:
                raise OSError(errno.ESTALE, "the file is gone")
            steps.append((start, start.place[1]))
            start = start.place[0]
        fd = os.dup(start.fd)
        for step, name in reversed(steps):
            try:
                found, _ = syscalls.walk(fd, name)
            except (FileNotFoundError, NotADirectoryError):
                raise OSError(errno.ESTALE, "the file no longer has the name it had") from None
            finally:
                os.close(fd)
            fd = self._verified(step, found)
        return fd

    def _verified(self, handle: Handle, fd: int) -> int:
        if not self._is_same(handle, fd):
            os.close(fd)
            raise OSError(errno.ESTALE, "another file is in the place of the one that was held")
        return fd

    @staticmethod
    def _is_same(handle: Handle, fd: int) -> bool:
        try:
            same = key_of(syscalls.stat_at(fd, b"")) == handle.key
            return same and syscalls.file_handle(fd) == handle.token
        except OSError:
            return False

    def is_at(self, handle: Handle, directory: Handle, name: bytes) -> bool:
        """Does ``name`` in ``directory`` name what ``handle`` holds? ESTALE if that is gone."""
        _ = handle.fd  # while it is open, its inode number is no other file's
        try:
            return key_of(syscalls.stat_at(directory.fd, name)) == handle.key
        except FileNotFoundError:
            return False

    def before_change(self, directory: Handle, name: bytes) -> Handle | None:
        """The guest is about to unlink or rename ``name``: what is held of it must not be lost.

        Returns the handle on it, if there is one.
        """
        if self._by_handle and not self.budget.resting:
            return None
        try:
            handle = self._handles.get(key_of(syscalls.stat_at(directory.fd, name)))
        except FileNotFoundError:
            return None
        if handle is not None:
            # Open it: without links it then stays open. ESTALE: it was lost before.
            with contextlib.suppress(OSError):
                _ = handle.fd
        return handle

    def moved(self, handle: Handle | None, directory: Handle, name: bytes) -> None:
        """The guest has renamed what ``before_change`` returned."""
        if handle is not None and handle.place is not None:
            old = handle.place[0]
            handle.place = self.share(directory), name
            self.release(old)


def _mount_fd(handle: Handle) -> int:
    """An ordinary descriptor on the handle's mount, if its files can be opened by handle; or -1."""
    if not handle.is_directory or handle.storage is Storage.REMOTE:
        return -1
    try:
        fd = syscalls.open_scoped(handle.fd, b".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    try:
        os.close(syscalls.open_by_handle(fd, syscalls.file_handle(handle.fd), os.O_PATH))
    except OSError as error:
        log.info("handles on mount %d stay open: %s", handle.mount, error)
        os.close(fd)
        return -1
    return fd
