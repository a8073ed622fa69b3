"""Security models: under which identity the host sees what the guest does.

``passthrough``: the guest's owners and modes are the host's. ``none``: the same as far as the
daemon's privileges allow, and for the rest the daemon's own identity; no ACLs. Names and meaning
are QEMU's (``-fsdev local,security_model=``).
"""

import errno
import os
from collections.abc import Callable
from functools import cache
from typing import Final, Protocol

from ninepd.errors import UsageError
from ninepd.syscalls import NO_ID

ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")
_NEEDED: Final = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
}


CAP_DAC_READ_SEARCH: Final = 2


def privileged() -> bool:
    """May this process create files as any user (capabilities(7))?"""
    return has_capabilities(*_NEEDED.values())


@cache
def has_capabilities(*bits: int) -> bool:
    """Does this process have all of them in effect?"""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
                return all(effective >> bit & 1 for bit in bits)
    return False


class SecurityModel(Protocol):
    """What differs between the models."""

    def identity(self, uid: int, gid: int) -> tuple[int, int]:
        """The (uid, gid) to create as for a guest's; NO_ID keeps ours. EPERM if it cannot be."""

    def allows_xattr(self, name: bytes) -> bool:
        """May the guest see and change extended attributes of this name?"""


class Passthrough:
    """Real owners and modes. Without privileges only the daemon's own user can create."""

    def __init__(self) -> None:
        self._privileged = privileged()

    def identity(self, uid: int, gid: int) -> tuple[int, int]:
        if self._privileged:
            return uid, gid
        if uid not in {NO_ID, os.geteuid()} or gid not in {NO_ID, os.getegid()}:
            raise PermissionError(
                errno.EPERM, f"creating as {uid}:{gid} needs root, or --security-model none"
            )
        return NO_ID, NO_ID

    def allows_xattr(self, name: bytes) -> bool:
        return name.startswith((b"user.", b"security.", b"trusted.")) or name in ACLS


class Unmapped:
    """The model ``none``: identity where possible, and no complaint where it is not."""

    def __init__(self) -> None:
        self._privileged = privileged()

    def identity(self, uid: int, gid: int) -> tuple[int, int]:
        return (uid, gid) if self._privileged else (NO_ID, NO_ID)

    def allows_xattr(self, name: bytes) -> bool:
        return name.startswith(b"user.")


MODELS: Final[dict[str, Callable[[], SecurityModel]]] = {
    "passthrough": Passthrough,
    "none": Unmapped,
}
NOT_YET: Final = ("mapped-xattr", "mapped-file")


def make_model(name: str) -> SecurityModel:
    """The model of that name; UsageError if there is none."""
    if name in NOT_YET:
        raise UsageError(
            f"--security-model: {name} is not supported yet; use passthrough (as root) or none"
        )
    if name not in MODELS:
        raise UsageError(f"--security-model: {name!r} is unknown; use passthrough or none")
    return MODELS[name]()
