"""Every message of 9P2000.L, 9P2000.u and 9P2000, in wire order, with a codec made from that.

A message is its declaration: a ``NamedTuple`` whose fields stand in the order of the wire and carry
their wire type. ``decode`` and ``encode`` are built once from the annotations, so there is no
second description to keep in step. Payload (the data of Tread's reply, Twrite and Treaddir's reply)
never passes here: it stays in guest memory, and the message holds only its count (named
``nbytes`` here, because a tuple has a method ``count``).

Wire format: ``size[4] type[1] tag[2] body``, little endian, ``size`` counts itself; strings are
``len[2]`` and bytes without a NUL (9P2000 intro(5); diod's protocol.md for the .L additions).
"""

import errno
from enum import IntEnum
from typing import Annotated, Any, Final, NamedTuple, get_type_hints

from ninepd.errors import ProtocolError
from ninepd.p9.codecs import HEADER as HEADER
from ninepd.p9.codecs import HEADER_SIZE as HEADER_SIZE
from ninepd.p9.codecs import QID as QID
from ninepd.p9.codecs import VARIABLE, Buffer, Codec, FixedCodec, VariableCodec
from ninepd.p9.codecs import Qid as Qid

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
String = Annotated[bytes, "string"]
Names = Annotated[tuple[bytes, ...], "names"]


Qids = Annotated[tuple[Qid, ...], "qids"]

NOTAG: Final = 0xFFFF
NOFID: Final = 0xFFFFFFFF
NO_NUMERIC_ID: Final = 0xFFFFFFFF
"""n_uname, uid or gid that stands for "none given"."""
IO_HEADER: Final = 11
"""Bytes before the data of an Rread or Rreaddir: header and count[4]."""
WRITE_HEADER: Final = 23
"""Bytes before the data of a Twrite."""
RLERROR_SIZE: Final = HEADER_SIZE + 4


# Flags are plain numbers: operators of IntFlag cost as much as a system call.


class QidType:
    """The bits of qid.type that a Linux client looks at (fs/9p/vfs_inode.c); no others are set."""

    DIR: Final = 0x80
    SYMLINK: Final = 0x02


class OpenFlag:
    """Tlopen and Tlcreate flags: protocol numbers (include/net/9p/9p.h), not the host's O_*."""

    WRONLY: Final = 0x1
    RDWR: Final = 0x2
    NOACCESS: Final = 0x3
    CREATE: Final = 0x40
    EXCL: Final = 0x80
    NOCTTY: Final = 0x100
    TRUNC: Final = 0x200
    APPEND: Final = 0x400
    NONBLOCK: Final = 0x800
    DSYNC: Final = 0x1000
    FASYNC: Final = 0x2000
    DIRECT: Final = 0x4000
    LARGEFILE: Final = 0x8000
    DIRECTORY: Final = 0x10000
    NOFOLLOW: Final = 0x20000
    NOATIME: Final = 0x40000
    CLOEXEC: Final = 0x80000
    SYNC: Final = 0x100000


class SetattrValid:
    """Which fields of a Tsetattr count."""

    MODE: Final = 0x1
    UID: Final = 0x2
    GID: Final = 0x4
    SIZE: Final = 0x8
    ATIME: Final = 0x10
    MTIME: Final = 0x20
    CTIME: Final = 0x40
    ATIME_SET: Final = 0x80
    MTIME_SET: Final = 0x100


class LockType(IntEnum):
    """Type of a byte-range lock; in Rgetlock UNLCK means that nothing conflicts."""

    RDLCK = 0
    WRLCK = 1
    UNLCK = 2


class LockStatus(IntEnum):
    """Answer of Rlock."""

    SUCCESS = 0
    BLOCKED = 1
    ERROR = 2
    GRACE = 3


LOCK_FLAG_BLOCK: Final = 1
LOCK_FLAG_RECLAIM: Final = 2
XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2
UNLINK_REMOVEDIR: Final = 0x200


class Rlerror(NamedTuple):
    ecode: U32


class Tstatfs(NamedTuple):
    fid: U32


class Rstatfs(NamedTuple):
    type: U32
    bsize: U32
    blocks: U64
    bfree: U64
    bavail: U64
    files: U64
    ffree: U64
    fsid: U64
    namelen: U32


class Tlopen(NamedTuple):
    fid: U32
    flags: U32


class Rlopen(NamedTuple):
    qid: Qid
    iounit: U32


class Tlcreate(NamedTuple):
    fid: U32
    name: String
    flags: U32
    mode: U32
    gid: U32


class Rlcreate(NamedTuple):
    qid: Qid
    iounit: U32


class Tsymlink(NamedTuple):
    dfid: U32
    name: String
    target: String
    gid: U32


class Rsymlink(NamedTuple):
    qid: Qid


class Tmknod(NamedTuple):
    dfid: U32
    name: String
    mode: U32
    major: U32
    minor: U32
    gid: U32


class Rmknod(NamedTuple):
    qid: Qid


class Trename(NamedTuple):
    fid: U32
    dfid: U32
    name: String


class Rrename(NamedTuple):
    pass


class Treadlink(NamedTuple):
    fid: U32


class Rreadlink(NamedTuple):
    target: String


class Tgetattr(NamedTuple):
    fid: U32
    request_mask: U64


class Rgetattr(NamedTuple):
    valid: U64
    qid: Qid
    mode: U32
    uid: U32
    gid: U32
    nlink: U64
    rdev: U64
    size: U64
    blksize: U64
    blocks: U64
    atime_sec: U64
    atime_nsec: U64
    mtime_sec: U64
    mtime_nsec: U64
    ctime_sec: U64
    ctime_nsec: U64
    btime_sec: U64
    btime_nsec: U64
    gen: U64
    data_version: U64


class Tsetattr(NamedTuple):
    fid: U32
    valid: U32
    mode: U32
    uid: U32
    gid: U32
    size: U64
    atime_sec: U64
    atime_nsec: U64
    mtime_sec: U64
    mtime_nsec: U64


class Rsetattr(NamedTuple):
    pass


class Txattrwalk(NamedTuple):
    fid: U32
    newfid: U32
    name: String


class Rxattrwalk(NamedTuple):
    size: U64


class Txattrcreate(NamedTuple):
    fid: U32
    name: String
    attr_size: U64
    flags: U32


class Rxattrcreate(NamedTuple):
    pass


class Treaddir(NamedTuple):
    fid: U32
    offset: U64
    nbytes: U32


class Rreaddir(NamedTuple):
    """``nbytes`` bytes of entries follow, placed by the payload."""

    nbytes: U32


class Tfsync(NamedTuple):
    """Old clients leave ``datasync`` out (diod's protocol.md); Linux sends it."""

    fid: U32
    datasync: U32 = 0


class Rfsync(NamedTuple):
    pass


class Tlock(NamedTuple):
    fid: U32
    type: U8
    flags: U32
    start: U64
    length: U64
    proc_id: U32
    client_id: String


class Rlock(NamedTuple):
    status: U8


class Tgetlock(NamedTuple):
    fid: U32
    type: U8
    start: U64
    length: U64
    proc_id: U32
    client_id: String


class Rgetlock(NamedTuple):
    type: U8
    start: U64
    length: U64
    proc_id: U32
    client_id: String


class Tlink(NamedTuple):
    dfid: U32
    fid: U32
    name: String


class Rlink(NamedTuple):
    pass


class Tmkdir(NamedTuple):
    dfid: U32
    name: String
    mode: U32
    gid: U32


class Rmkdir(NamedTuple):
    qid: Qid


class Trenameat(NamedTuple):
    olddirfid: U32
    oldname: String
    newdirfid: U32
    newname: String


class Rrenameat(NamedTuple):
    pass


class Tunlinkat(NamedTuple):
    dirfid: U32
    name: String
    flags: U32


class Runlinkat(NamedTuple):
    pass


class Rerror(NamedTuple):
    """9P2000.u: what went wrong in words and as an errno."""

    ename: String
    errno: U32 = 0


class RerrorPlain(NamedTuple):
    """9P2000: in words only."""

    ename: String


class Topen(NamedTuple):
    fid: U32
    mode: U8


class Ropen(NamedTuple):
    qid: Qid
    iounit: U32


class Tcreate(NamedTuple):
    """``extension`` is 9P2000.u's: the target of a link, or numbers of a device."""

    fid: U32
    name: String
    perm: U32
    mode: U8
    extension: String = b""


class Rcreate(NamedTuple):
    qid: Qid
    iounit: U32


class Tstat(NamedTuple):
    fid: U32


class Rstat(NamedTuple):
    """``stat`` is encoded by p9/stat.py."""

    stat: String


class Twstat(NamedTuple):
    fid: U32
    stat: String


class Rwstat(NamedTuple):
    pass


class Tversion(NamedTuple):
    msize: U32
    version: String


class Rversion(NamedTuple):
    msize: U32
    version: String


class Tauth(NamedTuple):
    """Plain 9P2000 has no ``n_uname``."""

    afid: U32
    uname: String
    aname: String
    n_uname: U32 = NO_NUMERIC_ID


class Tattach(NamedTuple):
    """Plain 9P2000 has no ``n_uname``."""

    fid: U32
    afid: U32
    uname: String
    aname: String
    n_uname: U32 = NO_NUMERIC_ID


class Rattach(NamedTuple):
    qid: Qid


class Tflush(NamedTuple):
    oldtag: U16


class Rflush(NamedTuple):
    pass


class Twalk(NamedTuple):
    fid: U32
    newfid: U32
    names: Names


class Rwalk(NamedTuple):
    qids: Qids


class Tread(NamedTuple):
    fid: U32
    offset: U64
    nbytes: U32


class Rread(NamedTuple):
    """``nbytes`` bytes of data follow, placed by the payload."""

    nbytes: U32


class Twrite(NamedTuple):
    """``nbytes`` bytes of data follow in guest memory."""

    fid: U32
    offset: U64
    nbytes: U32


class Rwrite(NamedTuple):
    nbytes: U32


class Tclunk(NamedTuple):
    fid: U32


class Rclunk(NamedTuple):
    pass


class Tremove(NamedTuple):
    fid: U32


class Rremove(NamedTuple):
    pass


NUMBERS: Final[dict[type[Any], int]] = {
    Rlerror: 7,
    Tstatfs: 8,
    Rstatfs: 9,
    Tlopen: 12,
    Rlopen: 13,
    Tlcreate: 14,
    Rlcreate: 15,
    Tsymlink: 16,
    Rsymlink: 17,
    Tmknod: 18,
    Rmknod: 19,
    Trename: 20,
    Rrename: 21,
    Treadlink: 22,
    Rreadlink: 23,
    Tgetattr: 24,
    Rgetattr: 25,
    Tsetattr: 26,
    Rsetattr: 27,
    Txattrwalk: 30,
    Rxattrwalk: 31,
    Txattrcreate: 32,
    Rxattrcreate: 33,
    Treaddir: 40,
    Rreaddir: 41,
    Tfsync: 50,
    Rfsync: 51,
    Tlock: 52,
    Rlock: 53,
    Tgetlock: 54,
    Rgetlock: 55,
    Tlink: 70,
    Rlink: 71,
    Tmkdir: 72,
    Rmkdir: 73,
    Trenameat: 74,
    Rrenameat: 75,
    Tunlinkat: 76,
    Runlinkat: 77,
    Tversion: 100,
    Rversion: 101,
    Tauth: 102,
    Tattach: 104,
    Rattach: 105,
    Tflush: 108,
    Rflush: 109,
    Twalk: 110,
    Rwalk: 111,
    Tread: 116,
    Rread: 117,
    Twrite: 118,
    Rwrite: 119,
    Tclunk: 120,
    Rclunk: 121,
    Tremove: 122,
    Rremove: 123,
    Rerror: 107,
    Topen: 112,
    Ropen: 113,
    Tcreate: 114,
    Rcreate: 115,
    Tstat: 124,
    Rstat: 125,
    Twstat: 126,
    Rwstat: 127,
}
"""Message class to its type number (include/net/9p/9p.h, enum p9_msg_t)."""

WITH_DATA: Final = frozenset({Rread, Rreaddir})
"""Replies whose data, ``nbytes`` bytes, stands in guest memory behind the encoded part."""


def _codec(message: type[Any], number: int) -> Codec:
    hints = get_type_hints(message, include_extras=True)
    kinds = ["BIQ" if hint is Qid else hint.__metadata__[0] for hint in hints.values()]
    kind_of_codec = VariableCodec if any(kind in VARIABLE for kind in kinds) else FixedCodec
    return kind_of_codec(message, number, kinds)


CODEC_OF: Final[dict[type[Any], Codec]] = {
    message: _codec(message, number) for message, number in NUMBERS.items()
}
"""Message class to codec."""
CODECS: Final[dict[int, Codec]] = {codec.number: codec for codec in CODEC_OF.values()}
"""Type number to codec, for both directions."""
CODEC_OF[RerrorPlain] = _codec(RerrorPlain, NUMBERS[Rerror])


def decode(buffer: Buffer) -> tuple[int, Any]:
    """Parse one whole message; returns (tag, message).

    Raises ProtocolError: EINVAL for a malformed one, EOPNOTSUPP for a type that is not known.
    Bytes behind the last field are ignored, as 9P servers do.
    """
    if len(buffer) < HEADER_SIZE:
        raise ProtocolError(f"{len(buffer)} bytes are no 9P header")
    size, number, tag = HEADER.unpack_from(buffer)
    if not HEADER_SIZE <= size <= len(buffer):
        raise ProtocolError(f"the size field says {size}, the message has {len(buffer)} bytes")
    codec = CODECS.get(number)
    if codec is None:
        raise ProtocolError(f"message type {number} is not known", errno.EOPNOTSUPP)
    return tag, codec.decode(buffer, HEADER_SIZE, size)


def encode(tag: int, message: Any) -> bytes:
    """The bytes of one message. Data of a reply in WITH_DATA is counted but not included."""
    codec = CODEC_OF[type(message)]
    body = codec.encode(message)
    size = HEADER_SIZE + len(body)
    if type(message) in WITH_DATA:
        size += message.nbytes
    return HEADER.pack(size, codec.number, tag) + body
