"""The stat structure of 9P2000 and 9P2000.u: what Rstat, Twstat and directory reads carry.

``size[2] type[2] dev[4] qid[13] mode[4] atime[4] mtime[4] length[8] name[s] uid[s] gid[s] muid[s]``
and in 9P2000.u ``extension[s] n_uid[4] n_gid[4] n_muid[4]``; ``size`` does not count itself. In a
Twstat a field of all ones, or an empty string, means: leave it (stat(5)).
"""

from struct import Struct
from typing import Final, NamedTuple

from ninepd.errors import ProtocolError
from ninepd.p9.messages import NO_NUMERIC_ID, Qid

_FIXED: Final = Struct("<HIBIQIIIQ")
_IDS: Final = Struct("<III")
UNTOUCHED_32: Final = 0xFFFFFFFF
UNTOUCHED_64: Final = 0xFFFFFFFFFFFFFFFF


class Mode:
    """Bits of ``mode`` and ``perm`` above the nine permission bits."""

    DIR: Final = 0x80000000
    SYMLINK: Final = 0x02000000
    LINK: Final = 0x01000000
    DEVICE: Final = 0x00800000
    PIPE: Final = 0x00200000
    SOCKET: Final = 0x00100000
    SETUID: Final = 0x00080000
    SETGID: Final = 0x00040000
    STICKY: Final = 0x00010000


class LegacyStat(NamedTuple):
    """One file as old clients see it. Times in whole seconds."""

    qid: Qid
    mode: int
    atime: int
    mtime: int
    length: int
    name: bytes
    uid: bytes
    gid: bytes
    muid: bytes
    extension: bytes = b""
    n_uid: int = NO_NUMERIC_ID
    n_gid: int = NO_NUMERIC_ID
    n_muid: int = NO_NUMERIC_ID


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(2, "little") + value


def encode_stat(stat: LegacyStat, extended: bool) -> bytes:
    """The structure with its leading size; ``extended`` for 9P2000.u."""
    body = _FIXED.pack(0, 0, *stat.qid, *stat[1:5])
    body += b"".join(map(_string, stat[5:9]))
    if extended:
        body += _string(stat.extension) + _IDS.pack(stat.n_uid, stat.n_gid, stat.n_muid)
    return _string(body)


def decode_stat(data: bytes, extended: bool) -> LegacyStat:
    """The reverse; ProtocolError if it is cut short."""
    at = 2 + _FIXED.size
    if len(data) < at:
        raise ProtocolError("the stat structure is cut short")
    _, _, kind, version, path, *numbers = _FIXED.unpack_from(data, 2)
    strings = []
    for _ in range(5 if extended else 4):
        length = int.from_bytes(data[at : at + 2], "little")
        at += 2 + length
        if at > len(data):
            raise ProtocolError("a string in the stat structure is cut short")
        strings.append(data[at - length : at])
    ids: tuple[int, ...] = ()
    if extended:
        if len(data) < at + _IDS.size:
            raise ProtocolError("the stat structure is cut short")
        ids = _IDS.unpack_from(data, at)
    return LegacyStat(Qid(kind, version, path), *numbers, *strings, *ids)
