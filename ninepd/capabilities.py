"""Capabilities (capabilities(7)): those that this process has, and those that serving needs."""

import os
import resource
from collections.abc import Collection
from functools import cache
from typing import Final, Protocol, cast

import ninepd._libvring as _libvring
from ninepd.errors import UsageError

CAP_DAC_READ_SEARCH: Final = 2
_SETGID: Final = 6
REACHING: Final = frozenset({1, 3})
"""DAC_OVERRIDE and FOWNER, to change any user's files."""
_CREATING: Final = {"CHOWN": 0, "SETGID": _SETGID, "SETUID": 7}
"""To create them as any user, too."""
CAP_SETPCAP: Final = 8
_ALSO: Final = {"FSETID": 4, "MKNOD": 27, "SETFCAP": 31}
"""Set-ID bits, device nodes and file capabilities are guests' to make where files are."""
CAP_SYS_CHROOT: Final = 18
CAP_SYS_ADMIN: Final = 21
"""For extended attributes ``trusted.*``, and ``security.*`` other than file capabilities."""


class _Lib(Protocol):
    def nd_keep_only(self, capabilities: int) -> int: ...


_lib: Final = cast("_Lib", _libvring.lib)


def privileged() -> bool:
    """May this process create files as any user?"""
    return has_capabilities(*REACHING, *_CREATING.values(), CAP_SETPCAP)


def overrides_permissions() -> bool:
    """May this process do what the permissions of some files do not let it?"""
    return any(has_capabilities(bit) for bit in (*REACHING, CAP_DAC_READ_SEARCH))


@cache
def _at_first() -> int:
    """What was in effect when that was asked first, as a mask: before any was given up."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def has_capabilities(*bits: int) -> bool:
    """Had this process all of them in effect when it was asked first?"""
    return all(_at_first() >> bit & 1 for bit in bits)


@cache
def may_set_groups() -> bool:
    """Might this process when it was asked first?

    Not in a user namespace that an ordinary user has made (user_namespaces(7)).
    """
    with open("/proc/self/setgroups", encoding="ascii") as answer:
        return answer.read().strip() == "allow"


def needed(*, as_others: bool, by_handle: bool, trusted_xattrs: bool) -> frozenset[int]:
    """What serving an export takes, of that which this process had at first.

    ``as_others``: files are created as the guest's users; else all are ours. ``by_handle``: they
    are found again by file handle.
    """
    keep = {*REACHING}
    if as_others and privileged():
        keep |= {*_CREATING.values(), *_ALSO.values()}
        if trusted_xattrs:
            keep.add(CAP_SYS_ADMIN)
    if by_handle:
        keep.add(CAP_DAC_READ_SEARCH)
    return frozenset(bit for bit in keep if has_capabilities(bit))


def give_up(keep: Collection[int]) -> None:
    """Keep these; the rest is gone for good. Before there are threads.

    Nothing that is executed gets more, and no dump of memory is left on disk. UsageError if
    securebits are locked so that a guest's user would take them away.
    """
    # With 1, unlike 0, there is none either where a program takes them (fs/coredump.c).
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    size = 1 if most else 0
    resource.setrlimit(resource.RLIMIT_CORE, (size, size))
    if os.getgroups() and has_capabilities(_SETGID) and may_set_groups():
        os.setgroups([])
    error = _lib.nd_keep_only(sum(1 << bit for bit in keep))
    if error:
        raise UsageError(
            f"privileges cannot be given up ({os.strerror(-error)}): whoever starts ninepd has "
            "locked securebits (SecureBits= in a unit); leave them alone"
        )
