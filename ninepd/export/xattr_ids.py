"""Ids in the values of extended attributes: ACLs, and whose root a file capability is of.

Values that are nothing of the kind pass as they are; the kernel refuses them.
"""

import errno
from struct import Struct
from typing import Final

from ninepd.export.host import ACLS
from ninepd.ids import IdMap, Ids
from ninepd.syscalls import NO_ID

CAPABILITY: Final = b"security.capability"

_ACL_HEADER: Final = Struct("<I")
_ACL_ENTRY: Final = Struct("<HHI")
_ACL_VERSION: Final = 2
_USER, _GROUP = 0x02, 0x08
"""Tags of entries that name somebody (linux/posix_acl.h)."""

_CAP_SETS: Final = Struct("<5I")
_CAP_V3: Final = Struct("<6I")
_REVISION: Final = 0xFF000000
_REVISION_2, _REVISION_3 = 0x02000000, 0x03000000
"""Of the host's root, and of the root of a user namespace (linux/capability.h)."""


def to_guest(name: bytes, value: bytes, ids: Ids) -> bytes | None:
    """A value of the host's as the guest sees it; None if it sees none."""
    if name in ACLS:
        return _acl(value, ids, to_host=False)
    return _capability(value, ids.uids, to_host=False) if name == CAPABILITY else value


def to_host(name: bytes, value: bytes, ids: Ids) -> bytes:
    """A value that the guest sets; EINVAL, as on an idmapped mount, if it names an id that the
    host has not.
    """
    if name in ACLS:
        return _acl(value, ids, to_host=True)
    if name == CAPABILITY:
        found = _capability(value, ids.uids, to_host=True)
        if found is None:
            raise OSError(errno.EINVAL, "the guest's root of that capability is not on the host")
        return found
    return value


def _acl(value: bytes, ids: Ids, to_host: bool) -> bytes:
    """The kernel shows NO_ID for whom the guest does not know. A guest's kernel takes that for a
    broken ACL, and cannot look at the file any more (Linux, fs/9p/acl.c, v9fs_get_acl), so here it
    is the overflow id.
    """
    at = _ACL_HEADER.size
    if (len(value) - at) % _ACL_ENTRY.size or _ACL_HEADER.unpack_from(value)[0] != _ACL_VERSION:
        return value
    out = bytearray(value)
    while at < len(value):
        tag, permissions, number = _ACL_ENTRY.unpack_from(value, at)
        if tag in {_USER, _GROUP}:
            kind = ids.uids if tag == _USER else ids.gids
            found = kind.to_host(number) if to_host else kind.shown(number)
            if found == NO_ID:
                raise OSError(errno.EINVAL, f"id {number} of the ACL has no number on the host")
            _ACL_ENTRY.pack_into(out, at, tag, permissions, found)
        at += _ACL_ENTRY.size
    return bytes(out)


def _capability(value: bytes, uids: IdMap, to_host: bool) -> bytes | None:
    """None if the root that it is of is not known over there: then nobody has the capability."""
    root = 0
    if len(value) == _CAP_V3.size:
        *sets, root = _CAP_V3.unpack(value)
        revision = _REVISION_3
    elif len(value) == _CAP_SETS.size:
        sets = list(_CAP_SETS.unpack(value))
        revision = _REVISION_2
    else:
        return value
    if sets[0] & _REVISION != revision:
        return value
    found = uids.to_host(root) if to_host else uids.to_guest(root)
    if found == NO_ID:
        return None
    flags = sets[0] & ~_REVISION
    if not found:
        return _CAP_SETS.pack(_REVISION_2 | flags, *sets[1:])
    return _CAP_V3.pack(_REVISION_3 | flags, *sets[1:], found)
