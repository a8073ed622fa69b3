"""A fid: a handle on an inode and, once opened, what it was opened as."""

from dataclasses import dataclass, field

from ninepd.fs.descriptors import Holder
from ninepd.fs.handles import Handle, Opened


@dataclass(slots=True)
class XattrValue:
    """The value, or the list of names, that a Txattrwalk read."""

    data: bytes


@dataclass(slots=True)
class XattrWriter:
    """A value that a Txattrcreate announced; it is set when the fid is clunked."""

    name: bytes
    size: int
    flags: int
    data: bytearray = field(default_factory=bytearray)


class Fid:
    """State of one fid.

    ``users`` counts requests that run outside the device thread and use this fid: as long as there
    are any, a clunk leaves the descriptors open and marks the fid ``doomed``.
    """

    __slots__ = (
        "doomed",
        "handle",
        "opened",
        "place",
        "read_offset",
        "read_position",
        "uid",
        "users",
    )

    def __init__(self, handle: Handle, uid: int, place: tuple[Handle, bytes] | None) -> None:
        """Takes over one reference to ``handle`` and one to the directory in ``place``."""
        self.handle = handle
        self.uid = uid
        """n_uname of the attach it descends from: the owner of what is created through it."""
        self.place = place
        """Directory and name it was found at: a hint, which may no longer be true."""
        self.opened: Opened | XattrValue | XattrWriter | None = None
        self.users = 0
        self.doomed = False
        self.read_offset = self.read_position = 0
        """How far an old client has read a directory: in bytes, and where that is on the host."""

    def holders(self) -> list[Holder]:
        """What keeps the descriptors that a request on this fid may use."""
        holders: list[Holder] = [self.handle]
        if isinstance(self.opened, Opened):
            holders.append(self.opened)
        if self.place is not None:
            holders.append(self.place[0])
        return holders
