"""Handles: the inodes of an export that fids name, each held by one descriptor.

A ``Handle`` is pinned by an O_PATH descriptor, so it stays the same file whatever is renamed,
replaced or removed on the host. All fids on one inode share one Handle. When descriptors run short
an idle one is reclaimed, and the same inode is found again, never another (reclaim.py).

References say how long a handle is wanted, pins how long its descriptor must stay open.
"""

import contextlib
import os
import stat as st
from collections.abc import Callable
from typing import TypeAlias

from mypy_extensions import i32, mypyc_attr

from ninepd.export.descriptors import Budget, Holder
from ninepd.export.host import Host
from ninepd.export.reclaim import Finder
from ninepd.export.volumes import Survey, Volume, Volumes
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
        "file_handle",
        "generation",
        "ino",
        "kind",
        "opened",
        "refs",
        "table",
        "volume",
    )

    def __init__(self, fd: int, stat: Stat, volume: Volume["Handle"], table: "HandleTable") -> None:
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
        self.file_handle = b""
        """Its file handle while it is reclaimed."""
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
    def hint(self) -> "Hint | None":
        """Directory and name that it was found at."""
        return None if self.directory is None else (self.directory, self._name)

    def has_hint(self, directory: "Handle", name: bytes) -> bool:
        return self.directory is directory and self._name == name

    def set_hint(self, directory: "Handle | None", name: bytes) -> "Handle | None":
        """Takes over a reference to ``directory``, and gives back the one to the old one."""
        old, self.directory, self._name = self.directory, directory, name
        return old

    def begin_listing(self, cookies_max: int) -> Cookies:
        """Cookies for a directory, the same for all that have it open now and later."""
        fresh = Cookies(cookies_max)
        with self.budget.lock:  # two may begin at once
            known = [file.cookies for file in self.opened if file.cookies is not None]
            cookies = known[0] if known else fresh
            for file in self.opened:
                file.cookies = cookies
        return cookies

    @property
    def stays(self) -> bool:
        return self.volume.remote

    def may_reclaim(self) -> bool:
        return self.table.finder.may_reclaim(self)

    def _restore(self) -> int:
        return self.table.finder.restore(self)


Hint: TypeAlias = tuple[Handle, bytes]
"""Directory and name."""


@mypyc_attr(acyclic=True)
class Opened(Holder):
    """A file or directory that is open for I/O on a handle."""

    __slots__ = (
        "_reopen",
        "cookies",
        "flags",
        "handle",
        "read_offset",
        "read_position",
        "writes_through",
    )

    def __init__(
        self, handle: Handle, fd: int, flags: int, reopen: Callable[[Handle, int, bool], int]
    ) -> None:
        """``reopen`` opens the handle with host flags, and may be told to wait for a lease;
        ``flags`` are those of ``fd``.
        """
        super().__init__(fd)
        self._reopen = reopen
        self.handle = handle
        self.flags = flags
        self.writes_through = bool(flags & (os.O_SYNC | os.O_DSYNC)) or handle.table.host.writes_out
        """Is what is written to go to the disk at once, which may wait for it?"""
        self.read_offset = self.read_position = 0
        """How far an old client has read a directory: in bytes, and where that is on the host."""
        self.cookies: Cookies | None = None
        """Of a directory that was read."""
        budget = self.budget
        with budget.lock:
            if handle.opened:
                self.cookies = handle.opened[0].cookies
            handle.opened = (*handle.opened, self)
            budget.files += 1
            budget.enter(self)

    @property
    def budget(self) -> Budget:
        return self.handle.budget

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    def close(self) -> None:
        """OSError says what became of late writes; there is nothing left to close then, too."""
        handle = self.handle
        with self.budget.lock:
            handle.opened = tuple([other for other in handle.opened if other is not self])
            self.budget.files -= 1
            fd = self.forget()
        if fd >= 0:
            handle.table.host.close(fd)

    @property
    def stays(self) -> bool:
        """By name it could be gone by then, and its data with it."""
        handle = self.handle
        return not handle.volume.by_handle or handle.remote

    def may_reclaim(self) -> bool:
        return self.handle.table.finder.may_reopen(self)

    def _restore(self) -> int:
        pins: list[Holder] = []
        budget = self.budget
        budget.pin([self.handle], pins)
        try:
            return self._reopen(self.handle, self.flags & ~os.O_TRUNC, True)
        finally:
            budget.unpin(pins)


class HandleTable:
    """All handles of an export. Safe to use from several threads.

    What takes ``pins`` adds to it what it finds: that stays open until the list is given back
    (``unpin``), which for a request is its end.
    """

    def __init__(
        self,
        host: Host,
        budget: Budget,
        volumes: Volumes[Handle],
        by_name: bool,
        find: Callable[[Handle, int, list[Holder]], Hint],
    ) -> None:
        """``by_name``: files are found again by name where that cannot be done by file handle.

        ``find`` says where a held file is now, given a descriptor of it: as ``Tree.find_by``.
        """
        self.host = host
        self.budget = budget
        self.volumes = volumes
        self.finder = Finder(self, by_name, find)
        self._lock = budget.lock

    def adopt(self, fd: int, stat: Stat, pins: list[Holder], hint: Hint | None = None) -> Handle:
        """The Handle of a fresh O_PATH descriptor, which is taken over, even by an error.

        ENODEV if it is on a device that may not be reached, EMFILE if no descriptor can be spared.
        """
        survey: Survey | None = None
        file_handle: bytes | None = None
        surplus = fd
        try:
            while True:
                with self._lock:
                    volume = self.volumes.find(stat)
                    if volume is None and survey is not None:
                        self.budget.check()
                        volume = self.volumes.admit(stat, survey)
                    if volume is not None:
                        known = volume.handles.get(stat.ino)
                        if known is None or self._was_recycled(known, file_handle):
                            self.budget.check()
                            known = self._add(fd, stat, volume, hint)
                            surplus = -1
                        elif known.is_open:
                            known.refs += 1
                        elif file_handle is not None:
                            known.refs += 1
                            surplus = known.take(fd)
                        else:
                            known = None
                        if known is not None:
                            known.pins += 1
                            pins.append(known)
                            return known
                # The host is asked without the lock; then it is looked again.
                if volume is None:
                    survey = self.volumes.survey(fd, stat)
                else:
                    file_handle = self._file_handle(fd)
        finally:
            if surplus >= 0:
                self.budget.close(surplus)
            if survey is not None:
                self._drop(survey)

    @staticmethod
    def _was_recycled(known: Handle, file_handle: bytes | None) -> bool:
        """Has the inode number come to another file while the handle was reclaimed?"""
        return (
            file_handle is not None
            and file_handle != known.file_handle
            and not known.is_open
            and not any(file.is_open for file in known.opened)
        )

    def _drop(self, survey: Survey) -> None:
        if survey.mount_fd >= 0:  # another thread was faster
            self.budget.close(survey.mount_fd)

    def _file_handle(self, fd: int) -> bytes:
        try:
            return self.host.file_handle(fd)
        except OSError:
            return b""

    def _add(self, fd: int, stat: Stat, volume: Volume[Handle], hint: Hint | None) -> Handle:
        handle = volume.handles[stat.ino] = Handle(fd, stat, volume, self)
        if hint is not None:
            directory, name = hint
            directory.refs += 1
            handle.set_hint(directory, name)
        self.budget.add(handle)
        return handle

    def revive(
        self, fd: int, stat: Stat, file_handle: bytes, known: bool, survey: Survey
    ) -> Handle:
        """A handle that another process had; ``fd`` is negative if it was reclaimed.

        ``known``: it is the one that is meant when a look-up finds its inode number. ``survey`` is
        what is known of its volume.
        """
        with self._lock:
            volume = self.volumes.find(stat) or self.volumes.admit(stat, survey)
            handle = Handle(fd, stat, volume, self)
            handle.file_handle = file_handle
            if known:
                volume.handles[stat.ino] = handle
            self.budget.enter(handle)
        return handle

    def share(self, handle: Handle) -> Handle:
        """Another reference to the same handle."""
        with self._lock:
            handle.refs += 1
        return handle

    def release(self, handle: Handle) -> None:
        """Give a reference back; the last one closes the descriptor."""
        while True:
            mount_fd = -1
            with self._lock:
                handle.refs -= 1
                if handle.refs:
                    return
                volume = handle.volume
                if volume.handles.get(handle.ino) is handle:
                    del volume.handles[handle.ino]
                    if not volume.handles:
                        mount_fd = self.volumes.drop(volume)
                fd = handle.forget()
                directory = handle.set_hint(None, b"")
            if fd >= 0:
                self.budget.close(fd)
            if mount_fd >= 0:
                self.budget.close(mount_fd)
            # A loop, because the chain of directories may be long.
            if directory is None:
                return
            handle = directory

    def pin(self, holders: list[Holder], pins: list[Holder]) -> None:
        """As ``Budget.pin``."""
        self.budget.pin(holders, pins)

    def unpin(self, pins: list[Holder]) -> None:
        """As ``Budget.unpin``."""
        self.budget.unpin(pins)

    # Names

    def is_at(self, handle: Handle, directory: Handle, name: bytes) -> bool:
        """Does ``name`` in ``directory`` name what ``handle`` holds? ESTALE if that is gone."""
        _ = handle.fd  # while it is open, its inode number is no other file's
        return self.shows(directory, name, handle)

    def shows(self, directory: Handle, name: bytes, handle: Handle) -> bool:
        """The same for a handle that is open."""
        try:
            return handle.holds(self.host.stat_at(directory.fd, name))
        except FileNotFoundError:
            return False

    def share_hint(self, hint: Hint | None) -> Hint | None:
        """The same, with a reference to its directory."""
        if hint is not None:
            self.share(hint[0])
        return hint

    def pinned_hint(
        self, handle: Handle, pins: list[Holder], own_hint: Hint | None = None
    ) -> Hint | None:
        """Where a handle was found, or ``own_hint``, with a reference to the directory."""
        with self._lock:
            hint = own_hint or handle.hint
            if hint is not None:
                directory = hint[0]
                directory.refs += 1
                directory.pins += 1
                pins.append(directory)
            return hint

    def hint_for(self, handle: Handle, directory: Handle, name: bytes) -> Hint | None:
        """What a fid has to remember that found ``handle`` there: nothing, if the handle does.

        Once the handle has followed the host, fids with nothing to remember are those of its old
        name. The hint comes with a reference to its directory.
        """
        if name in {b".", b".."} or (handle.has_hint(directory, name) and not handle.followed):
            return None
        return self.share(directory), name

    def before_change(self, directory: Handle, name: bytes, pins: list[Holder]) -> Handle | None:
        """The guest is about to unlink or rename ``name``: what is held of it must not be lost.

        Returns a reference to the handle on it, if there is one, for ``after_change``. Until the
        pins are given back it stays open: afterwards it may have no name to be found by.
        """
        try:
            stat = self.host.stat_at(directory.fd, name)
        except FileNotFoundError:
            return None
        with self._lock:
            volume = self.volumes.find(stat)
            handle = None if volume is None else volume.handles.get(stat.ino)
            if handle is None:
                return None
            handle.refs += 1
            handle.pins += 1
            pins.append(handle)
        # Open it: without links it then stays open. ESTALE: it was lost before.
        with contextlib.suppress(OSError):
            _ = handle.fd
        return handle

    def after_change(self, handle: Handle | None) -> None:
        """Give back what ``before_change`` returned."""
        if handle is not None:
            self.release(handle)

    def moved(self, handle: Handle, old: Hint, new: Hint) -> None:
        """The guest has renamed it from the one place to the other."""
        with self._lock:
            if not handle.has_hint(*old):
                return
            new[0].refs += 1
            left = self._hint(handle, *new)
        for directory in left:
            self.release(directory)

    def found_at(self, handle: Handle, hint: Hint) -> None:
        """The host has moved it there. Takes over the reference to the directory."""
        with self._lock:
            handle.followed = True
            left = self._hint(handle, *hint)
        for directory in left:
            self.release(directory)

    @staticmethod
    def _hint(handle: Handle, directory: Handle, name: bytes) -> list[Handle]:
        """Takes over a reference to ``directory``; returns those to be released."""
        above: Handle | None = directory
        while above is not None and above is not handle:
            above = above.directory
        # A ring, by places that the host has changed, would never be let go.
        kept = handle.refs > 0 and above is None
        left = handle.set_hint(directory, name) if kept else handle.set_hint(None, b"")
        return [other for other in (left, None if kept else directory) if other is not None]
