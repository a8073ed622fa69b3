"""Typed face of ``_walls.c`` and ``_seccomp.c``: how a process shuts itself off, step by step.

Every function raises OSError with the kernel's errno. Descriptors returned are the caller's.
"""

import errno
from enum import IntFlag
from typing import Final, Protocol, cast

import ninepd._libvring as _libvring
from ninepd.syscalls import checked


class Attributes(IntFlag):
    """Of a mount (mount_setattr(2))."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOSYMFOLLOW = 0x200000


class Unshare(IntFlag):
    """What a process gets of its own (namespaces(7))."""

    MOUNTS = 0x00020000
    UTS = 0x04000000
    IPC = 0x08000000
    USERS = 0x10000000
    NETWORK = 0x40000000


class Access(IntFlag):
    """Rights on files and below directories (landlock(7))."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15
    RESOLVE_UNIX = 1 << 16


class _Lib(Protocol):
    def nd_unshare(self, flags: int) -> int: ...
    def nd_clone_tree(self, dirfd: int, path: bytes, recursive: bool) -> int: ...
    def nd_restrict_tree(self, fd: int, attributes: int, recursive: bool) -> int: ...
    def nd_follow_tree(self, fd: int) -> int: ...
    def nd_attach_tree(self, fd: int, dirfd: int, name: bytes) -> int: ...
    def nd_new_tmpfs(self) -> int: ...
    def nd_follow_host(self) -> int: ...
    def nd_change_root(self, fd: int) -> int: ...
    def nd_landlock_query(self, flags: int) -> int: ...
    def nd_landlock_ruleset(self, files: int, network: int, scope: int) -> int: ...
    def nd_landlock_allow(self, ruleset: int, fd: int, files: int) -> int: ...
    def nd_landlock_enforce(self, ruleset: int) -> int: ...
    def nd_hide_memory(self) -> int: ...
    def nd_never_execute(self) -> int: ...
    def nd_can_filter_calls(self) -> bool: ...
    def nd_filter_calls(self, watches: bool, by_handle: bool) -> int: ...


_lib: Final = cast("_Lib", _libvring.lib)
AT_FDCWD: Final = -100
_LANDLOCK_VERSION: Final = 1
_LANDLOCK_ERRATA: Final = 2
_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16, 7: 16, 8: 16, 9: 17}
"""How many rights on files a version of Landlock knows."""
_TCP: Final = 3
"""To bind and to connect, since version 4."""
_OUTSIDE: Final = 3
"""Abstract unix sockets of others, and signals to them, since version 6."""


def unshare(what: Unshare) -> None:
    """Have these of one's own, from here on. With USERS first, and by its rights the others."""
    checked(_lib.nd_unshare(what))


def clone_tree(dirfd: int, path: bytes, recursive: bool) -> int:
    """A copy of the mount at a path, attached nowhere, as an O_PATH descriptor."""
    return checked(_lib.nd_clone_tree(dirfd, path, recursive))


def restrict_tree(fd: int, attributes: Attributes, recursive: bool = False) -> None:
    """Add attributes to a mount, or with ``recursive`` to all below it, too."""
    checked(_lib.nd_restrict_tree(fd, attributes, recursive))


def attach_tree(fd: int, dirfd: int, name: bytes) -> None:
    """Mount a detached one on a directory."""
    checked(_lib.nd_attach_tree(fd, dirfd, name))


def new_tmpfs() -> int:
    """A small file system in memory, attached nowhere."""
    return checked(_lib.nd_new_tmpfs())


def follow_tree(fd: int) -> None:
    """What the host unmounts below shall go away here, too, and what it mounts may appear."""
    checked(_lib.nd_follow_tree(fd))


def follow_host() -> None:
    """The same of all there is; and what is done here is not done there.

    The working directory may be the root afterwards.
    """
    checked(_lib.nd_follow_host())


def change_root(fd: int) -> None:
    """Make a detached mount the root, and let all others go."""
    checked(_lib.nd_change_root(fd))


def landlock_version() -> int:
    """0 where there is none, or it is switched off."""
    return max(_lib.nd_landlock_query(_LANDLOCK_VERSION), 0)


def landlock_errata() -> int:
    """A bit for each erratum that is mended here."""
    return max(_lib.nd_landlock_query(_LANDLOCK_ERRATA), 0)


def landlock_ruleset(version: int) -> tuple[int, Access]:
    """Rules that forbid all that this version knows; and which rights on files those are."""
    rights = Access((1 << _RIGHTS.get(version, max(_RIGHTS.values()))) - 1)
    network, scope = (_TCP if version >= 4 else 0), (_OUTSIDE if version >= 6 else 0)
    return checked(_lib.nd_landlock_ruleset(rights, network, scope)), rights


def landlock_allow(ruleset: int, fd: int, rights: Access) -> None:
    """Allow these below a directory."""
    checked(_lib.nd_landlock_allow(ruleset, fd, rights))


def landlock_enforce(ruleset: int) -> None:
    """For this thread and those that it makes, for good."""
    checked(_lib.nd_landlock_enforce(ruleset))


def hide_memory() -> None:
    """No other process of this user may look into this one."""
    checked(_lib.nd_hide_memory())


def never_execute() -> bool:
    """Execute no memory that was not executable from its start; False if the kernel cannot."""
    result = _lib.nd_never_execute()
    if result == -errno.EINVAL:
        return False  # before Linux 6.3
    return checked(result) == 0


def can_filter_calls() -> bool:
    """Does the filter know this architecture?"""
    return _lib.nd_can_filter_calls()


def filter_calls(watches: bool = False, by_handle: bool = False) -> None:
    """From here on, only the system calls that serving takes; ``by_handle``: files by handle, too.

    ``watches``: and those that starting processes takes which serve, and watching over them.
    """
    checked(_lib.nd_filter_calls(watches, by_handle))
