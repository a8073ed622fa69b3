"""What a guest may try with the names of what a host user is swapping: lists of requests.

Each attempt is a function of two fids that are its own, and of the way to a file.
"""

from typing import Any

from ninepd.p9 import messages as p9
from ninepd.p9.messages import LockType, SetattrValid
from tests.support.client import ROOT

DEEP, BELOW = 2, 3
"""Fids of a directory that is inside and outside by turns, and of one in it."""
MANY, HOW_MANY = 1000, 300
"""The first fid of so many files."""
EVERYTHING = int(
    SetattrValid.MODE
    | SetattrValid.UID
    | SetattrValid.GID
    | SetattrValid.SIZE
    | SetattrValid.ATIME
    | SetattrValid.MTIME
)
WAYS = (
    (b"f",), (b"fl",), (b"d", b"f"), (b"l", b"f"), (b"d", b"sub", b"f"), (b"l", b"sub", b"f"),
    (b"d", b"..", b"f"), (b"d",), (b"l",), (b"d", b"sub"), (b"l", b"sub"), (b"x", b"deep", b"f"),
    (b".m", b"f"), (b".mr",), (b".m",), (b"y", b"deep", b"sub", b"..", b".."), (b"link", b"f"),
)  # fmt: skip
Requests = list[Any]


def setattr_(fid: int, valid: int, **fields: int) -> p9.Tsetattr:
    values = {"mode": 0o777, "uid": 4242, "gid": 4242, "size": 3} | fields
    return p9.Tsetattr(
        fid, valid, values["mode"], values["uid"], values["gid"], values["size"], 1, 0, 1, 0
    )


def reading(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way),
        p9.Tgetattr(fid, 0x3FFF),
        p9.Tlopen(fid, 0),
        p9.Tread(fid, 0, 2000),
        p9.Treaddir(fid, 0, 2000),
        p9.Tclunk(fid),
    ]


def attributes(fid: int, other: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way),
        setattr_(fid, EVERYTHING),
        setattr_(fid, int(SetattrValid.MODE), mode=0o6777),
        p9.Txattrwalk(fid, other, b"user.x"),
        p9.Tread(other, 0, 2000),
        p9.Tclunk(other),
        p9.Treadlink(fid),
        p9.Tgetattr(fid, 0x3FFF),
        p9.Tclunk(fid),
    ]


def setting_xattr(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way),
        p9.Txattrcreate(fid, b"user.x", 4, 0),
        p9.Twrite(fid, 0, 4),
        p9.Tclunk(fid),
    ]


def writing(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way),
        p9.Tlopen(fid, 2 | 0x200),
        p9.Twrite(fid, 0, 4),
        p9.Tlock(fid, LockType.WRLCK, 0, 0, 0, 1, b"guest"),
        setattr_(fid, int(SetattrValid.SIZE), size=1),
        p9.Tclunk(fid),
    ]


def creating(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    """Over a name that is a file and a link by turns, and in directories that are."""
    return [
        p9.Twalk(ROOT, fid, way[:-1]),
        p9.Tlcreate(fid, way[-1], 0x42 | 0x200, 0o666, 0),
        p9.Twrite(fid, 0, 4),
        p9.Tclunk(fid),
    ]


def making(fid: int, other: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way),
        p9.Tmkdir(fid, b"new", 0o777, 0),
        p9.Tunlinkat(fid, b"new", 0x200),
        p9.Tsymlink(fid, b"new", b"f", 0),
        p9.Twalk(fid, other, (b"new",)),
        p9.Tlink(fid, other, b"twin"),
        p9.Tunlinkat(fid, b"twin", 0),
        p9.Tremove(other),
        p9.Tclunk(fid),
    ]


def moving(fid: int, other: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way[:-1]),
        p9.Twalk(fid, other, way[-1:]),
        p9.Trenameat(fid, way[-1], ROOT, b"gone"),
        p9.Trenameat(ROOT, b"gone", fid, way[-1]),
        p9.Trename(other, ROOT, b"gone"),
        p9.Tremove(other),
        p9.Tclunk(fid),
    ]


def removing(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Twalk(ROOT, fid, way[:-1]),
        p9.Tunlinkat(fid, way[-1], 0),
        p9.Tunlinkat(fid, way[-1], 0x200),
        p9.Tclunk(fid),
    ]


def climbing(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    """From a directory that is inside and outside by turns."""
    up = (b"..",) * (1 + len(way))
    return [
        p9.Twalk((DEEP, BELOW)[len(way) % 2], fid, (*up, *way)),
        p9.Tgetattr(fid, 0x3FFF),
        p9.Tlopen(fid, 0),
        p9.Tread(fid, 0, 2000),
        p9.Tclunk(fid),
        p9.Twalk(DEEP, fid, (b"..", b"f")),
        p9.Tclunk(fid),
    ]


def attaching(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    return [
        p9.Tattach(fid, p9.NOFID, b"", b"/".join(way), 0),
        p9.Tgetattr(fid, 0x3FFF),
        p9.Tclunk(fid),
    ]


def held(fid: int, _: int, way: tuple[bytes, ...]) -> Requests:
    """Fids whose descriptors were put aside, and are found again by their names."""
    return [p9.Tgetattr(MANY + (fid * 7 + at + len(way)) % HOW_MANY, 0x3FFF) for at in range(4)]


KINDS = (
    reading, attributes, setting_xattr, writing, creating, making, moving, removing, climbing,
    attaching, held,
)  # fmt: skip
