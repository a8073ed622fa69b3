"""Typed face of ``_ids.c``: ids of the host's in the guest's numbers, and the other way round."""

import errno
from typing import Any, Final, Protocol, cast

import ninepd._libvring as _libvring
from ninepd.idranges import IdRanges
from ninepd.syscalls import NO_ID, checked

OVERFLOW_ID: Final = 65534
"""What the kernel shows in the place of an id that has no number: nobody, or nogroup."""


class _Lib(Protocol):
    ND_KNOWN: int

    def nd_id_to_guest(self, table: Any, number: int) -> int: ...
    def nd_id_to_host(self, table: Any, number: int) -> int: ...
    def nd_show_ids(self, body: Any, uids: Any, gids: Any) -> None: ...
    def nd_rights_to(self, dirfd: int, name: bytes, uids: Any, gids: Any) -> int: ...


_ffi: Final[Any] = _libvring.ffi
_lib: Final = cast("_Lib", _libvring.lib)
_new: Final = _ffi.new
KNOWN: Final[int] = _lib.ND_KNOWN
"""Among rights to a file: the guest has numbers for both of its owners."""


class IdMap:
    """Ids of one kind, users' or groups'."""

    def __init__(self, said: IdRanges) -> None:
        ranges = list(said.ranges)
        init = {"squash": said.squash, "count": len(ranges), "ranges": ranges}
        self.table: Any = _new("nd_id_map *", init)

    def to_guest(self, number: int) -> int:
        """The guest's number of an id of the host's, or NO_ID."""
        return _lib.nd_id_to_guest(self.table, number)

    def to_host(self, number: int) -> int:
        """The host's number of an id of the guest's, or NO_ID."""
        return _lib.nd_id_to_host(self.table, number)

    def shown(self, number: int) -> int:
        """What the guest sees of an id of the host's."""
        found = self.to_guest(number)
        return OVERFLOW_ID if found == NO_ID else found

    def owner(self, number: int) -> int:
        """The host's number of whom the guest gives a file to; EOVERFLOW if there is none.

        NO_ID says that nothing changes.
        """
        return number if number == NO_ID else self._known(number)

    def creator(self, number: int, own: int) -> int:
        """The same of whom it creates a file as.

        NO_ID is whoever has the number of this process, ``own``, in the guest, as on an idmapped
        mount; if nobody has, this process itself, but only if the guest knows it.
        """
        if number == NO_ID:
            if self.to_host(own) == NO_ID and self.to_guest(own) != NO_ID:
                return NO_ID
            number = own
        return self._known(number)

    def _known(self, number: int) -> int:
        found = self.to_host(number)
        if found == NO_ID:  # as on an idmapped mount (Linux, may_create() and notify_change())
            raise OSError(errno.EOVERFLOW, f"id {number} of the guest has no number on the host")
        return found


class Ids:
    """Users and groups of an export."""

    def __init__(self, users: IdRanges, groups: IdRanges) -> None:
        self.uids = IdMap(users)
        self.gids = IdMap(groups)

    def show(self, body: Any) -> None:
        """Put the guest's numbers into the body of an Rgetattr that has the host's."""
        _lib.nd_show_ids(body, self.uids.table, self.gids.table)

    def rights_to(self, directory: int, name: bytes) -> int:
        """What the guest's root may do with a name, or with ``directory`` itself if that is empty.

        Everything, and KNOWN, with files whose owners it knows; else what their modes say.
        """
        uids, gids = self.uids.table, self.gids.table
        return checked(_lib.nd_rights_to(directory, name, uids, gids))
