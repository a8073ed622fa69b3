"""Which function serves which T-message, and all else that is known of each beforehand."""

import errno
import os
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from mypy_extensions import i32

from ninepd.export.handles import Opened
from ninepd.export.readonly import refuse
from ninepd.ops import attributes, files, legacy, names, readdir, walking, xattrs
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Payload, Reply
from ninepd.p9 import messages as p9
from ninepd.p9.codecs import Codec
from ninepd.p9.session import Dialect, Session

Handler: TypeAlias = Callable[..., Reply]
"""``(guest, message, payload, *fids)``: the fids that its row names, in that order."""
Rows: TypeAlias = dict[int, "Row"]
"""By the number of the message."""


class Row:
    """One T-message."""

    def __init__(
        self,
        message: type[Any],
        handler: Handler | None,
        fids: tuple[str, ...] = ("fid",),
        *,
        exclusive: bool | Callable[[Any, Fid], bool] = False,
        changes: bool | Callable[[Any], bool] = False,
        clunks: bool = False,
        header_limit: int = 0,
    ) -> None:
        self.message = message
        self.codec: Codec = p9.CODEC_OF[message]
        self.handler = handler
        """None: it concerns the session or other requests (pipeline.py)."""
        positions = [message._fields.index(name) for name in fids]
        self.count: i32 = len(positions)
        """How many fids it uses."""
        self._first: i32 = positions[0] if positions else 0
        self._second: i32 = positions[1] if len(positions) > 1 else 0
        self.may_change = changes is not False
        """Are there messages of this type that do change the export?"""
        self._exclusive = exclusive
        self._changes = changes
        self.clunks = clunks
        """Is the fid gone afterwards, whatever the answer?"""
        self.header_limit = header_limit
        """How much of it is copied out of guest memory; 0 for all of it."""
        answer = p9.CODECS.get(self.codec.number + 1)
        self.reply_size = max(p9.RLERROR_SIZE, p9.HEADER_SIZE + answer.size if answer else 0)
        """What its reply takes at least: checked first, so that nothing is done in vain."""

    def fid(self, session: Session[Fid], message: tuple[Any, ...]) -> Fid | None:
        """The first of the fids that it uses, if there are any; ENOENT if there is none of that
        number.
        """
        return session.get(message[self._first]) if self.count else None

    def other(self, session: Session[Fid], message: tuple[Any, ...]) -> Fid | None:
        """The second, likewise."""
        return session.get(message[self._second]) if self.count > 1 else None

    def is_exclusive(self, message: Any, fids: list[Fid]) -> bool:
        """Is a fid not what it was before, or does the order matter? No other may use it then."""
        decide = self._exclusive
        return decide if isinstance(decide, bool) else decide(message, fids[0])

    def changes(self, message: Any) -> bool:
        """Does it change the export, if it succeeds?

        Not so Twrite: that needs a file which is open for writing, or an announced attribute.
        """
        decide = self._changes
        return decide if isinstance(decide, bool) else decide(message)

    def serve(
        self, guest: Guest, message: Any, payload: Payload, fid: Fid | None, other: Fid | None
    ) -> Reply:
        """Call the handler, unless the message may not be served; raises OSError."""
        if self.may_change and guest.readonly and self.changes(message):
            if self.clunks and fid is not None:
                guest.retire(guest.remove(message.fid, fid))
            refuse()
        handler = self.handler
        assert handler is not None  # noqa: S101 - of those that the pipeline gives to us
        if other is not None:
            return handler(guest, message, payload, fid, other)
        if fid is not None:
            return handler(guest, message, payload, fid)
        return handler(guest, message, payload)

    def serve_held(
        self, guest: Guest, message: Any, fid: Fid | None, other: Fid | None, payload: Payload
    ) -> Reply:
        """As ``serve``, for one that had to wait; ENOENT if a fid was clunked meanwhile."""
        if (fid is not None and fid.doomed) or (other is not None and other.doomed):
            raise FileNotFoundError(errno.ENOENT, "the fid was clunked meanwhile")
        return self.serve(guest, message, payload, fid, other)


def _walks_itself(message: p9.Twalk, _fid: Fid) -> bool:
    return message.fid == message.newfid


def _appends(_message: p9.Twrite, fid: Fid) -> bool:
    """Appending writes must reach the file in the order in which they came (open(2))."""
    opened = fid.opened
    return isinstance(opened, Opened) and bool(opened.flags & os.O_APPEND)


def _reads_directory(_message: p9.Tread, fid: Fid) -> bool:
    """It moves the position of the open directory."""
    return fid.handle.is_directory


def _opens_for_change(message: p9.Tlopen) -> bool:
    return files.is_for_change(message.flags)


def _opens_old_for_change(message: p9.Topen) -> bool:
    return files.is_for_change(legacy.open_flags(message.mode))


_COMMON: Final = (
    Row(p9.Tattach, walking.attach, ()),
    Row(p9.Tauth, walking.auth, ()),
    Row(p9.Tclunk, walking.clunk, exclusive=True, clunks=True),
    Row(p9.Tflush, None, ()),
    Row(p9.Tremove, names.remove, exclusive=True, changes=True, clunks=True),
    Row(p9.Tversion, None, ()),
    Row(p9.Twalk, walking.walk, exclusive=_walks_itself),
    Row(p9.Twrite, files.write, exclusive=_appends, header_limit=p9.WRITE_HEADER),
)
_LINUX: Final = (
    Row(p9.Tfsync, files.fsync),
    Row(p9.Tgetattr, attributes.getattr),
    Row(p9.Tgetlock, files.getlock),
    Row(p9.Tlcreate, files.lcreate, exclusive=True, changes=True),
    Row(p9.Tlink, names.link, ("dfid", "fid"), changes=True),
    Row(p9.Tlock, files.lock),
    Row(p9.Tlopen, files.lopen, exclusive=True, changes=_opens_for_change),
    Row(p9.Tmkdir, names.mkdir, ("dfid",), changes=True),
    Row(p9.Tmknod, names.mknod, ("dfid",), changes=True),
    Row(p9.Tread, files.read),
    Row(p9.Treaddir, readdir.readdir, exclusive=True),
    Row(p9.Treadlink, names.readlink),
    Row(p9.Trename, names.rename, ("fid", "dfid"), exclusive=True, changes=True),
    Row(p9.Trenameat, names.renameat, ("olddirfid", "newdirfid"), changes=True),
    Row(p9.Tsetattr, attributes.setattr, changes=True),
    Row(p9.Tstatfs, attributes.statfs),
    Row(p9.Tsymlink, names.symlink, ("dfid",), changes=True),
    Row(p9.Tunlinkat, names.unlinkat, ("dirfid",), changes=True),
    Row(p9.Txattrcreate, xattrs.xattrcreate, exclusive=True, changes=True),
    Row(p9.Txattrwalk, xattrs.xattrwalk),
)
_OLD: Final = (
    Row(p9.Tcreate, legacy.create, exclusive=True, changes=True),
    Row(p9.Topen, legacy.open, exclusive=True, changes=_opens_old_for_change),
    Row(p9.Tread, legacy.read, exclusive=_reads_directory),
    Row(p9.Tstat, legacy.stat),
    Row(p9.Twstat, legacy.wstat, exclusive=True, changes=True),
)


def _by_number(rows: tuple[Row, ...]) -> Rows:
    return {row.codec.number: row for row in rows}


ROWS: Final[dict[Dialect, Rows]] = {
    Dialect.L: _by_number(_COMMON + _LINUX),
    Dialect.U: _by_number(_COMMON + _OLD),
    Dialect.PLAIN: _by_number(_COMMON + _OLD),
}
HEADER_LIMITS: Final = {
    row.codec.number: row.header_limit for row in _COMMON + _LINUX + _OLD if row.header_limit
}
"""How much of a request is copied out of guest memory, where that is not all of it."""
