"""Putting files aside and finding them again: the same inode, never another.

By its file handle (open_by_handle_at(2)) where the file system and the daemon's rights allow, else
by the name it had last, if what is found there has the same file handle. What could not be found
again is not reclaimed: unlinked files, and storage without file handles.

All of it asks the host, so all of it runs without the lock. A descriptor that it works with may be
reclaimed or let go meanwhile: it takes a duplicate, under the lock.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from ninepd.export.descriptors import Holder

if TYPE_CHECKING:
    from ninepd.export.handles import Handle, HandleTable, Hint, Opened


class Finder:
    """Finds the files of one handle table."""

    def __init__(
        self,
        table: "HandleTable",
        by_name: bool,
        find: "Callable[[Handle, int, list[Holder]], Hint]",
    ) -> None:
        """``by_name``: where that cannot be done by handle."""
        self._table = table
        self._host = table.host
        self._lock = table.budget.lock
        self._by_name = by_name
        self._find = find

    # May it go?

    def may_reclaim(self, handle: "Handle") -> bool:
        """Can the handle, which is pinned, be found again if its descriptor is closed now?"""
        fd = self._duplicate(handle)
        if fd < 0:
            return False
        try:
            if not self._host.stat(fd).nlink:
                return False
            handle.file_handle = self._host.file_handle(fd)
            return handle.volume.by_handle or (self._by_name and self._has_name(handle, fd))
        except OSError:
            return False
        finally:
            self._host.close(fd)

    def may_reopen(self, file: "Opened") -> bool:
        """Can a file that is open on a handle be opened again later, by file handle?"""
        handle = file.handle
        if handle.is_open:
            return True
        # Without links the last descriptor on it must stay, be it the handle's or this.
        fd = self._duplicate(file)
        if fd < 0:
            return False
        try:
            return bool(handle.file_handle and self._host.stat(fd).nlink)
        except OSError:
            return False
        finally:
            self._host.close(fd)

    def _duplicate(self, holder: Holder) -> int:
        """Another descriptor of what is open, or -1 if it is not."""
        with self._lock:
            return self._host.duplicate(holder.peek) if holder.is_open else -1

    def _has_name(self, handle: "Handle", fd: int) -> bool:
        """Is it where it was found? If the host has moved it, that becomes its place."""
        pins: list[Holder] = []
        try:
            return self._is_in_place(handle, pins) or self._has_moved(handle, fd, pins)
        finally:
            self._table.unpin(pins)

    def _is_in_place(self, handle: "Handle", pins: list[Holder]) -> bool:
        hint = self._table.pinned_hint(handle, pins)
        if hint is None:
            return False
        directory, name = hint
        try:
            return self._table.shows(directory, name, handle)
        except OSError:  # the directory itself is lost
            return False
        finally:
            self._table.release(directory)

    def _has_moved(self, handle: "Handle", fd: int, pins: list[Holder]) -> bool:
        try:
            hint = self._find(handle, fd, pins)
        except OSError:
            return False
        self._table.found_at(handle, hint)
        return True

    # Finding it again

    def restore(self, handle: "Handle") -> int:
        """A new O_PATH descriptor of what is reclaimed; ESTALE if that is gone."""
        with self._lock:
            mount_fd = handle.volume.mount.fd
            by_handle = mount_fd >= 0 and not self._is_opened(handle)
            if by_handle:
                mount_fd = self._host.duplicate(mount_fd)
        if not by_handle:
            return self._find_by_name(handle)
        try:
            fd = self._host.open_by_handle(mount_fd, handle.file_handle)
        finally:
            self._host.close(mount_fd)
        return self._verified(handle, fd)

    @staticmethod
    def _is_opened(handle: "Handle") -> bool:
        return any(file.is_open for file in handle.opened)

    def _find_by_name(self, handle: "Handle") -> int:
        """From the nearest directory above that is open, or from the file, opened for I/O."""
        while True:
            with self._lock:
                steps, source = self._way_to(handle)
                fd = self._host.duplicate(source.peek)
            try:
                return self._follow(fd, steps)
            except OSError:
                with self._lock:
                    if handle.is_open or self._way_to(handle) == (steps, source):
                        raise
                # The guest has renamed something on the way meanwhile.

    @staticmethod
    def _way_to(handle: "Handle") -> "tuple[list[Hint], Holder]":
        """What is open, and the steps from there, the last one first. Under the lock."""
        steps: list[Hint] = []
        step = handle
        while True:
            if step.is_open:
                return steps, step
            for file in step.opened:
                if file.is_open:
                    return steps, file
            hint = step.hint
            if hint is None:
                raise OSError(errno.ESTALE, "the file is gone")
            directory, name = hint
            steps.append((step, name))
            step = directory

    def _follow(self, fd: int, steps: "list[Hint]") -> int:
        """Takes over ``fd``."""
        if not steps:
            try:
                return self._host.hold(fd)
            finally:
                self._host.close(fd)
        for step, name in reversed(steps):
            try:
                found = self._host.walk(fd, name)
            except NotADirectoryError:
                found = None
            finally:
                self._host.close(fd)
            if found is None:
                raise OSError(errno.ESTALE, "the file no longer has the name it had")
            fd = self._verified(step, found[0])
        return fd

    def _verified(self, handle: "Handle", fd: int) -> int:
        try:
            same = handle.holds(self._host.stat_at(fd, b""))
            if same and self._host.file_handle(fd) == handle.file_handle:
                return fd
        except OSError:
            pass
        self._host.close(fd)
        raise OSError(errno.ESTALE, "another file is in the place of the one that was held")
