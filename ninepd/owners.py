"""Typed face of ``_owners.c``: owners and modes that guests have set, in the place of the host's.

On the host all files are the daemon's own then; QEMU calls that "mapped".
"""

from struct import Struct
from typing import Any, Final, NamedTuple, Protocol, cast

import ninepd._libvring as _libvring
from ninepd.syscalls import NO_ID, checked
from ninepd.tuples import made

NO_DEVICE: Final = 0xFFFFFFFFFFFFFFFF


class Owner(NamedTuple):
    """What a guest has set for a file; each field may be NO_ID, or NO_DEVICE: nothing."""

    uid: int = NO_ID
    gid: int = NO_ID
    mode: int = NO_ID
    """With the type of the file."""
    rdev: int = NO_DEVICE
    """As of makedev(3)."""


class _Lib(Protocol):
    def nd_owner_of(self, fd: int, out: Any) -> int: ...
    def nd_mode_at(self, dirfd: int, name: bytes, host: int) -> int: ...
    def nd_shown_mode(self, host: int, given: int) -> int: ...
    def nd_put_owner(self, body: Any, uid: int, gid: int, mode: int, rdev: int) -> None: ...


_ffi: Final[Any] = _libvring.ffi
_lib: Final = cast("_Lib", _libvring.lib)
_new: Final = _ffi.new
_buffer: Final = _ffi.buffer
_unpack: Final = Struct("=3I4xQ").unpack


def owner_of(fd: int) -> Owner:
    """What QEMU's extended attributes of a file say; O_PATH descriptors are fine."""
    out = _new("nd_owner *")
    checked(_lib.nd_owner_of(fd, out))
    return made(Owner, _unpack(_buffer(out)))


def mode_at(dirfd: int, name: bytes, host: int) -> int:
    """The mode that is shown of a name in a directory, by these attributes.

    An empty name is ``dirfd`` itself; ``host`` is its mode on the host.
    """
    return _lib.nd_mode_at(dirfd, name, host)


def shown_mode(host: int, given: int) -> int:
    """What is shown of a file with one mode on the host and another that a guest has set."""
    return _lib.nd_shown_mode(host, given)


def put_owner(body: Any, owner: Owner) -> None:
    """Put it into the body of an Rgetattr that shows the host's."""
    _lib.nd_put_owner(body, *owner)
