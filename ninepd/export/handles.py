"""Handles: the inodes of an export that fids name, each held by one descriptor.

A ``Handle`` is pinned by an O_PATH descriptor, so it stays the same file whatever is renamed,
replaced or removed on the host. All fids on one inode share one Handle. When descriptors run short
an idle one is put aside, and the same inode is found again, never another: by its file handle
(``by_handle``, open_by_handle_at(2)), or by the name it had last, if its file handle is still the
same. What could not be found again is not put aside: unlinked files, and storage without handles.
"""

import contextlib
import errno
import os
import stat as st
from collections.abc import Callable
from typing import TypeAlias

from mypy_extensions import i32, mypyc_attr

from ninepd import syscalls
from ninepd.config import Multidevs
from ninepd.export.descriptors import Budget, Holder, on_worker
from ninepd.export.volumes import Volume, Volumes
from ninepd.listing import Cookies
from ninepd.syscalls import Stat


def is_same_inode(one: Stat, other: Stat) -> bool:
    """Are they attributes of one file, seen through one mount?"""
    return one.ino == other.ino and one.dev == other.dev and one.mnt_id == other.mnt_id


@mypyc_attr(acyclic=True)
class Handle(Holder):
    """One inode of the export. Reference-counted by ``HandleTable``; not made elsewhere.

    There may be a million, so each attribute counts.
    """

    __slots__ = (
        "_name",
        "directory",
        "generation",
        "ino",
        "kind",
        "opened",
        "refs",
        "table",
        "token",
        "volume",
    )

    def __init__(self, fd: int, stat: Stat, volume: Volume, table: "HandleTable") -> None:
        super().__init__(fd)
        self.refs: i32 = 1
        self.kind: i32 = st.S_IFMT(stat.mode)
        """S_IFMT bits; an inode never changes them."""
        self.table = table
        self.volume = volume
        self.ino = stat.ino
        self.generation = stat.generation
        self.directory: Handle | None = None
        """Where it was found: a hint, which may no longer be true. None for the root, and for
        what was found by its ``..``."""
        self._name = b""
        self.token = b""
        """Its file handle while it is put aside."""
        self.opened: tuple[Opened, ...] = ()
        """The files that are open on it."""

    @property
    def budget(self) -> Budget:
        return self.table.budget

    @property
    def in_memory(self) -> bool:
        """Is no call on it ever kept waiting?"""
        return self.volume.in_memory

    @property
    def remote(self) -> bool:
        """May any call on it be kept waiting, for any time?"""
        return self.volume.remote

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

    def holds(self, stat: Stat) -> bool:
        """Are these attributes of this inode? Only while it is open: numbers are used again."""
        volume = self.volume
        return (
            stat.ino == self.ino and stat.dev == volume.dev and stat.mnt_id == volume.mount.mnt_id
        )

    @property
    def place(self) -> "Place | None":
        """Directory and name that it was found at."""
        return None if self.directory is None else (self.directory, self._name)

    def is_placed(self, directory: "Handle", name: bytes) -> bool:
        return self.directory is directory and self._name == name

    def put_in(self, directory: "Handle | None", name: bytes) -> "Handle | None":
        """Takes over a reference to ``directory``, and gives back the one to the old one."""
        old, self.directory, self._name = self.directory, directory, name
        return old

    def begin_listing(self) -> Cookies:
        """Cookies for a directory, the same for all that have it open now and later."""
        cookies = Cookies()
        for file in self.opened:
            file.cookies = cookies
        return cookies

    def may_rest(self) -> bool:
        return self.table.may_rest(self)

    def _restore(self) -> int:
        return self.table.restore(self)


Place: TypeAlias = tuple[Handle, bytes]
"""Directory and name."""


@mypyc_attr(acyclic=True)
class Opened(Holder):
    """A file or directory that is open for I/O on a handle."""

    __slots__ = ("_reopen", "cookies", "flags", "handle", "read_offset", "read_position")

    def __init__(
        self, handle: Handle, fd: int, flags: int, reopen: Callable[[Handle, int], int]
    ) -> None:
        """``reopen`` opens the handle with host flags; ``flags`` are those of ``fd``."""
        super().__init__(fd)
        self._reopen = reopen
        self.handle = handle
        self.flags = flags
        self.read_offset = self.read_position = 0
        """How far an old client has read a directory: in bytes, and where that is on the host."""
        self.cookies: Cookies | None = handle.opened[0].cookies if handle.opened else None
        """Of a directory that was read."""
        handle.opened = (*handle.opened, self)
        budget = self.budget
        with budget.lock:
            budget.add(self)

    @property
    def budget(self) -> Budget:
        return self.handle.budget

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def synchronous(self) -> bool:
        return bool(self.flags & (os.O_SYNC | os.O_DSYNC))

    def close(self) -> None:
        """OSError says what became of late writes; there is nothing left to close then, too."""
        self.handle.opened = tuple([other for other in self.handle.opened if other is not self])
        self.discard()

    def may_rest(self) -> bool:
        return self.handle.table.may_reopen(self)

    def _restore(self) -> int:
        if self not in self.handle.opened:
            raise OSError(errno.EBADF, "the file was closed")
        return self._reopen(self.handle, self.flags & ~os.O_TRUNC)


class HandleTable:
    """All handles of an export. Safe to use from several threads."""

    def __init__(
        self, budget: Budget, by_handle: bool, multidevs: Multidevs, kernel_filesystems: bool
    ) -> None:
        """``by_handle`` needs CAP_DAC_READ_SEARCH."""
        self.budget = budget
        self.volumes = Volumes(by_handle, multidevs, kernel_filesystems)
        self._by_handle = by_handle
        self._lock = budget.lock

    def adopt(self, fd: int, stat: Stat, place: Place | None = None) -> Handle:
        """The Handle of a fresh O_PATH descriptor, which is taken over, even by an error.

        ENODEV if it is on a device that may not be reached, EMFILE if no descriptor can be spared.
        """
        with self._lock:
            volume = self.volumes.find(stat)
            if volume is not None:
                handle = volume.handles.get(stat.ino)
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
                if volume is None:
                    volume = self.volumes.admit(fd, stat)
            except OSError:
                os.close(fd)
                raise
            handle = volume.handles[stat.ino] = Handle(fd, stat, volume, self)
            if place is not None:
                directory, name = place
                directory.refs += 1
                handle.put_in(directory, name)
            if on_worker():
                # Nothing but this would keep it open while the worker goes on with it.
                handle.pins = 1
            self.budget.add(handle)
            return handle

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
                volume = handle.volume
                if volume.handles.get(handle.ino) is handle:
                    del volume.handles[handle.ino]
                    if not volume.handles:
                        self.volumes.drop(volume)
                fd = handle.leave()
                directory = handle.put_in(None, b"")
            if fd >= 0:
                os.close(fd)
            # A loop, because the chain of directories may be long.
            if directory is None:
                return
            handle = directory

    # Pins

    def pin(self, holders: list[Holder], pins: list[Holder]) -> None:
        """Keep their descriptors open; adds them to ``pins``, for ``unpin``."""
        with self._lock:
            for holder in holders:
                holder.pins += 1
            pins.extend(holders)

    def unpin(self, pins: list[Holder]) -> None:
        """Take all of these back, and empty the list."""
        with self._lock:
            for holder in pins:
                holder.pins -= 1
            pins.clear()

    # Putting aside and finding again

    def may_rest(self, handle: Handle) -> bool:
        """Can the handle, which is open, be found again if its descriptor is closed now?"""
        if handle.remote:
            return False
        try:
            if not syscalls.stat(handle.fd).nlink:
                return False
            handle.token = syscalls.file_handle(handle.fd)
            if self._by_handle:
                return handle.volume.mount.fd >= 0
            place = handle.place
            return place is not None and self.is_at(handle, *place)
        except OSError:
            return False

    def may_reopen(self, file: Opened) -> bool:
        """Can a file that is open on a handle be opened again later?

        Only by file handle: by name it could be gone by then, and its data with it.
        """
        handle = file.handle
        if not self._by_handle or handle.remote:
            return False
        if handle.is_open:
            return True
        # Without links the last descriptor on it must stay, be it the handle's or this.
        try:
            return bool(handle.token and syscalls.stat(file.fd).nlink)
        except OSError:
            return False

    def restore(self, handle: Handle) -> int:
        """A new O_PATH descriptor of what is put aside; ESTALE if that is gone."""
        if not handle.refs:
            raise OSError(errno.ESTALE, "the file was let go")
        for file in handle.opened:
            if file.is_open:
                return os.open(f"/proc/self/fd/{file.fd}", os.O_PATH | os.O_CLOEXEC)
        if self._by_handle:
            mount_fd = handle.volume.mount.fd
            if mount_fd < 0:
                raise OSError(errno.ESTALE, "the file system is gone")
            return self._verified(
                handle, syscalls.open_by_handle(mount_fd, handle.token, os.O_PATH)
            )
        return self._find_by_name(handle)

    def _find_by_name(self, handle: Handle) -> int:
        steps: list[Place] = []
        start = handle
        while not start.is_open and not (steps and any(f.is_open for f in start.opened)):
            place = start.place
            if place is None:
                raise OSError(errno.ESTALE, "the file is gone")
            directory, name = place
            steps.append((start, name))
            start = directory
        fd = os.dup(start.fd)
        for step, name in reversed(steps):
            try:
                found = syscalls.walk(fd, name)
            except NotADirectoryError:
                found = None
            finally:
                os.close(fd)
            if found is None:
                raise OSError(errno.ESTALE, "the file no longer has the name it had")
            fd = self._verified(step, found[0])
        return fd

    def _verified(self, handle: Handle, fd: int) -> int:
        if not self._is_same(handle, fd):
            os.close(fd)
            raise OSError(errno.ESTALE, "another file is in the place of the one that was held")
        return fd

    @staticmethod
    def _is_same(handle: Handle, fd: int) -> bool:
        try:
            same = handle.holds(syscalls.stat_at(fd, b""))
            return same and syscalls.file_handle(fd) == handle.token
        except OSError:
            return False

    # Names

    def is_at(self, handle: Handle, directory: Handle, name: bytes) -> bool:
        """Does ``name`` in ``directory`` name what ``handle`` holds? ESTALE if that is gone."""
        _ = handle.fd  # while it is open, its inode number is no other file's
        try:
            return handle.holds(syscalls.stat_at(directory.fd, name))
        except FileNotFoundError:
            return False

    def kept(self, place: Place | None) -> Place | None:
        """The same, with a reference to its directory."""
        if place is not None:
            self.share(place[0])
        return place

    def kept_place(self, handle: Handle) -> Place | None:
        """Where a handle was found, with a reference to the directory."""
        with self._lock:
            return self.kept(handle.place)

    def note(self, handle: Handle, directory: Handle, name: bytes) -> Place | None:
        """What a fid has to remember that found ``handle`` there: nothing, if the handle does.

        The place comes with a reference to its directory.
        """
        if handle.is_placed(directory, name) or name in {b".", b".."}:
            return None
        return self.share(directory), name

    def before_change(self, directory: Handle, name: bytes) -> Handle | None:
        """The guest is about to unlink or rename ``name``: what is held of it must not be lost.

        Returns a reference to the handle on it, if there is one, for ``after_change``.
        """
        if self._by_handle and not self.budget.resting:
            return None
        try:
            stat = syscalls.stat_at(directory.fd, name)
        except FileNotFoundError:
            return None
        with self._lock:
            volume = self.volumes.find(stat)
            handle = None if volume is None else volume.handles.get(stat.ino)
            if handle is None:
                return None
            handle.refs += 1
        # Open it: without links it then stays open. ESTALE: it was lost before.
        with contextlib.suppress(OSError):
            _ = handle.fd
        return handle

    def after_change(self, handle: Handle | None) -> None:
        """Give back what ``before_change`` returned."""
        if handle is not None:
            self.release(handle)

    def moved(self, handle: Handle, old: Place, new: Place) -> None:
        """The guest has renamed it from the one place to the other."""
        directory, name = new
        with self._lock:
            if not handle.is_placed(*old):
                return
            above: Handle | None = directory
            while above is not None and above is not handle:
                above = above.directory
            if above is None:
                directory.refs += 1
                left = handle.put_in(directory, name)
            else:  # a ring, by places that the host has changed
                left = handle.put_in(None, b"")
        if left is not None:
            self.release(left)
