"""``mapped-file``: what guests set is kept in files beside those that it is about (metadata.py).

For storage without extended attributes. A file is found by its name there, so for one that is held
the name is asked of the kernel, who follows renames by whomever (proc(5)), and it counts only if it
leads to that file. Of what the host has renamed nothing is found, since the file beside it has kept
the old name: then the host's own attributes show, as with QEMU, until the guest sets new ones. The
same goes for paths of more than 4096 bytes. Of what the guest itself has removed, what was kept is
remembered in memory, as long as that is not too much.

A new file shows as the host's for the moment until it has its lines.
"""

import errno
import os
import stat as st
import threading
from typing import Final, TypeAlias

from ninepd import syscalls
from ninepd.export import metadata, xattr_ids
from ninepd.export.host import ACLS
from ninepd.export.mapped import MappedHost
from ninepd.ids import Ids
from ninepd.listing import Cookies, LookUp
from ninepd.owners import Owner, shown_mode
from ninepd.syscalls import NO_ID, QidDevices, Stat

REMEMBERED_MAX: Final = 4096
_DOTS: Final = frozenset({b".", b".."})
_NOTHING: Final = Owner()
_Identity: TypeAlias = tuple[int, int, int]
"""Device, inode number and generation."""


class MappedFileHost(MappedHost):
    """Shows files as the metadata beside them says."""

    __slots__ = ("_lock", "_removed", "_root")

    def __init__(self, fmode: int, dmode: int, root: int, ids: Ids | None = None) -> None:
        """``root`` is a descriptor of the export's root, which stays open."""
        super().__init__(fmode, dmode, ids)
        self._root = root
        self._removed: dict[_Identity, Owner] = {}
        """What was kept of files that the guest may still hold, the oldest first."""
        self._lock = threading.Lock()

    # Where it is kept

    def _place(self, fd: int) -> tuple[int, bytes] | None:
        """Directory and name that lead to what a descriptor holds, if any do.

        The directory's descriptor is the caller's.
        """
        try:
            top, path = self.name_of(self._root), self.name_of(fd)
            if path == top:
                return self.duplicate(self._root), metadata.ITSELF
            top = top.rstrip(b"/") + b"/"
            above, _, name = path.rpartition(b"/")
            if not path.startswith(top):
                return None
            flags = os.O_PATH | os.O_DIRECTORY
            directory = self.open_below(self._root, (above + b"/")[len(top) :] or b".", flags)
        except OSError:
            return None
        try:
            here, there = syscalls.stat_at(fd, b""), syscalls.stat_at(directory, name)
            if (here.ino, here.dev) == (there.ino, there.dev):
                return directory, name
        except OSError:
            pass
        self.close(directory)
        return None

    def _owner(self, fd: int) -> Owner:
        place = self._place(fd)
        if place is None:
            with self._lock:
                if not self._removed:
                    return _NOTHING
            identity = _identity(syscalls.stat(fd))
            with self._lock:
                return self._removed.get(identity, _NOTHING)
        directory, name = place
        try:
            return metadata.read(directory, name)
        finally:
            self.close(directory)

    def _mode_at(self, directory: int, name: bytes, stat: Stat) -> int:
        if name in _DOTS:
            return stat.mode
        owner = metadata.read(directory, name) if name else self._owner(directory)
        return shown_mode(stat.mode, owner.mode)

    def _keep(self, fd: int, owner: Owner) -> None:
        place = self._place(fd)
        if place is None:
            stat = syscalls.stat(fd)
            if stat.nlink and _identity(stat) not in self._removed:
                raise FileNotFoundError(errno.ENOENT, "it is not known where the file is now")
            self._remember(_identity(stat), metadata.merge(self._owner(fd), owner))
            return
        directory, name = place
        try:
            metadata.write(directory, name, owner)
        finally:
            self.close(directory)

    def _remember(self, identity: _Identity, owner: Owner) -> None:
        with self._lock:
            self._removed.pop(identity, None)
            self._removed[identity] = owner
            if len(self._removed) > REMEMBERED_MAX:
                del self._removed[next(iter(self._removed))]

    def _before_removal(self, directory: int, name: bytes) -> tuple[Stat, Owner] | None:
        """For ``_after_removal``."""
        found = syscalls.walk(directory, name)
        if found is None:
            return None
        self.close(found[0])
        return found[1], metadata.read(directory, name)

    def _after_removal(self, removed: tuple[Stat, Owner] | None) -> None:
        if removed is not None:
            self._remember(_identity(removed[0]), removed[1])

    # Names that are hidden

    @staticmethod
    def _check(name: bytes) -> None:
        if metadata.is_metadata(name):
            raise OSError(errno.EINVAL, "these names are the server's own")

    def walk(self, directory: int, name: bytes) -> tuple[int, Stat] | None:
        self._check(name)
        found = syscalls.walk(directory, name)
        if found is None:
            return None
        fd, stat = found
        try:
            if st.S_ISDIR(stat.mode):
                self._check_directory(directory, stat)
            return fd, self._shown(directory, name, stat)
        except OSError:
            self.close(fd)
            raise

    @staticmethod
    def _check_directory(directory: int, found: Stat) -> None:
        """By whatever name it was found, it must not be that of the metadata."""
        try:
            hidden = syscalls.stat_at(directory, metadata.DIRECTORY)
        except OSError:
            return
        if (hidden.ino, hidden.dev) == (found.ino, found.dev):
            raise OSError(errno.EINVAL, "this directory is the server's own")

    def readdir(
        self,
        _fd: int,
        _offset: int,
        _at_root: bool,
        _look_up: LookUp,
        _covered: bytes,
        _devices: QidDevices,
        _cookies: Cookies,
        _size: int,
    ) -> bytes:
        """Each entry has to be looked at, which C cannot do."""
        raise OSError(errno.EDOM, "entries are looked up one by one")

    def getdents(self, fd: int, offset: int) -> list[tuple[int, bytes]]:
        while entries := super().getdents(fd, offset):
            shown = [entry for entry in entries if not metadata.is_metadata(entry[1])]
            if shown:
                return shown
            offset = entries[-1][0]
        return []

    def open_by_handle(self, _mount: int, _handle: bytes) -> int:
        """The kernel may know no name of what was opened like that."""
        raise OSError(errno.EOPNOTSUPP, "mapped-file finds files by their names")

    # Making

    def _make_file(
        self, directory: int, name: bytes, flags: int, owner: Owner, content: bytes
    ) -> int:
        self._check(name)
        fd = syscalls.create(directory, name, flags, self._fmode, NO_ID, NO_ID)
        try:
            metadata.remove(directory, name)  # of a file that the host has removed
            self._fill(fd, content)
            metadata.write(directory, name, owner)
        except OSError:
            self.close(fd)
            os.unlink(name, dir_fd=directory)
            raise
        return fd

    def mkdir(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> None:
        self._check(name)
        syscalls.mkdir(directory, name, self._dmode, NO_ID, NO_ID)
        try:
            metadata.remove(directory, name)
            metadata.write(directory, name, Owner(uid, gid, st.S_IFDIR | st.S_IMODE(mode)))
        except OSError:
            os.rmdir(name, dir_fd=directory)
            raise

    def link(self, fd: int, directory: int, name: bytes) -> None:
        self._check(name)
        place = self._place(fd)
        try:
            owner = self._owner(fd)
            super().link(fd, directory, name)
            try:
                if place is not None:
                    metadata.link(*place, directory, name)
                else:
                    metadata.remove(directory, name)
                    if owner != _NOTHING:
                        metadata.write(directory, name, owner)
            except OSError:
                os.unlink(name, dir_fd=directory)
                raise
        finally:
            if place is not None:
                self.close(place[0])

    # Moving and removing

    def rename(self, old: int, old_name: bytes, new: int, new_name: bytes) -> None:
        self._check(old_name)
        self._check(new_name)
        moved, replaced = self._before_removal(old, old_name), self._before_removal(new, new_name)
        kept = metadata.exists(old, old_name)
        if kept:
            metadata.make_directory(new)
        emptied = -1
        if _are_directories(moved, replaced):
            emptied = self._remove_metadata(new, new_name)
        try:
            super().rename(old, old_name, new, new_name)
        except OSError:
            if emptied >= 0:
                metadata.make_directory(emptied)
            raise
        finally:
            if emptied >= 0:
                self.close(emptied)
        if moved and replaced and _identity(moved[0]) == _identity(replaced[0]):
            return  # two names of one file both stay
        try:
            if kept:
                metadata.move(old, old_name, new, new_name)
            else:
                metadata.remove(new, new_name)
        except OSError:
            if replaced is None:
                super().rename(new, new_name, old, old_name)
            raise
        self._after_removal(replaced)

    def unlink(self, directory: int, name: bytes) -> None:
        self._check(name)
        removed = self._before_removal(directory, name)
        super().unlink(directory, name)
        metadata.remove(directory, name)
        self._after_removal(removed)

    def rmdir(self, directory: int, name: bytes) -> None:
        """With its metadata, which must be empty, as the directory is then."""
        self._check(name)
        removed = self._before_removal(directory, name)
        emptied = self._remove_metadata(directory, name)
        try:
            super().rmdir(directory, name)
        except OSError:
            if emptied >= 0:
                metadata.make_directory(emptied)
            raise
        finally:
            if emptied >= 0:
                self.close(emptied)
        metadata.remove(directory, name)
        self._after_removal(removed)

    def _remove_metadata(self, directory: int, name: bytes) -> int:
        """A descriptor of the directory, if there was any; else -1. ENOTEMPTY if it has some."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
        fd = self.open_below(directory, name, flags)
        try:
            os.rmdir(metadata.DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            self.close(fd)
            return -1
        except OSError:
            self.close(fd)
            raise
        return fd

    # Extended attributes

    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        """ACLs are the host's here, as with QEMU."""
        value = super().getxattr(fd, name)
        if value is None or self._ids is None:
            return value
        return xattr_ids.to_guest(name, value, self._ids)

    def setxattr(self, fd: int, name: bytes, value: bytes, flags: int) -> None:
        if self._ids is not None:
            value = xattr_ids.to_host(name, value, self._ids)
        super().setxattr(fd, name, value, flags)
        if name == ACLS[0]:
            self._drop_set_group_id(fd)


def _identity(stat: Stat) -> _Identity:
    return stat.dev, stat.ino, stat.generation


def _are_directories(moved: tuple[Stat, Owner] | None, replaced: tuple[Stat, Owner] | None) -> bool:
    """Two of them, so that rename(2) wants the second to be empty?"""
    if moved is None or replaced is None or _identity(moved[0]) == _identity(replaced[0]):
        return False
    return st.S_ISDIR(moved[0].mode) and st.S_ISDIR(replaced[0].mode)
