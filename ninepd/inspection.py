"""Answers to whoever watches: what only the process of an export knows (control/questions.py).

A question is a line of JSON, and so is its answer. It is answered on the loop thread, from what
stands in memory: no lock is waited for that a request holds across a system call, and no answer is
longer than a piece, behind which the next question goes on. An answer that nobody takes is lost.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ninepd.export.handles import Handle, Opened
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.ranges import TO_END, Range

log = logging.getLogger(__name__)

PIECE: Final = 64
"""Rows of an answer."""
_QUESTION_MAX: Final = 4096
_PATH_MAX: Final = 512
_DEPTH_MAX: Final = 128
_USES: Final = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}
_KINDS: Final = {0o040000: "dir", 0o100000: "file", 0o120000: "link"}


class Visitor(NamedTuple):
    """A front end that is connected, and the guest behind it."""

    pid: int
    uid: int
    since: float
    """Seconds since the epoch."""
    guest: Guest


class Ends(NamedTuple):
    """Sockets to whoever watches."""

    answering: socket.socket
    telling: socket.socket
    """Of messages, while somebody follows them (following.py)."""


class Inspection:
    """Answers on a socket, for the export's process."""

    def __init__(
        self,
        answering: socket.socket,
        visitor: Callable[[], Visitor | None],
        follow: Callable[[bool], None],
    ) -> None:
        """``follow`` is told that somebody goes on following messages, or that nobody does."""
        self._socket = answering
        self._visitor = visitor
        self._follow = follow

    def fileno(self) -> int:
        return self._socket.fileno()

    def answer(self) -> bool:
        """Something has arrived; of questions that have waited the last is answered.

        False if nobody is left to ask.
        """
        try:
            data = self._socket.recv(_QUESTION_MAX)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        try:
            question = json.loads(data.splitlines()[-1] if data else "")
            rows, following = self._rows(question["what"], question["from"])
            answer = {"id": question["id"], "rows": rows, "next": following}
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            log.debug("no question: %r", error)
        else:
            # A line of its own, whatever became of the one before.
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self._socket.send(b"\n" + json.dumps(answer).encode() + b"\n")
        return bool(data)

    def _rows(self, what: str, start: int) -> tuple[list[dict[str, Any]], int | None]:
        visitor = self._visitor()
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"nothing begins at {start!r}")
        if what == "trace":
            self._follow(bool(start))
            return [], None
        if visitor is None:
            return [], None
        if what == "clients":
            return [_client(visitor)], None
        if what == "fids":
            fids, following = visitor.guest.session.fids.some(start, PIECE)
            return [_fid(number, fid) for number, fid in fids], following
        if what == "locks":
            locks, following = visitor.guest.locks.some(start, PIECE)
            return [_lock(handle, held) for handle, held in locks], following
        raise ValueError(f"nobody knows about {what!r}")


def _client(visitor: Visitor) -> dict[str, Any]:
    session = visitor.guest.session
    return {
        "pid": visitor.pid,
        "uid": visitor.uid,
        "since": visitor.since,
        "dialect": session.dialect.value.decode() if session.msize else "",
        "msize": session.msize,
        "fids": len(session.fids),
    }


def _fid(number: int, fid: Fid) -> dict[str, Any]:
    handle, opened = fid.handle, fid.opened
    if isinstance(opened, Opened):
        use = _USES.get(opened.flags & os.O_ACCMODE, "")
    else:
        use = "" if opened is None else "xattr"
    return {
        "fid": number,
        "kind": _KINDS.get(handle.kind, "special"),
        "open": use,
        "uid": fid.uid,
        "reclaimed": not handle.is_open,
        "path": path_of(handle),
    }


def _lock(handle: Handle, held: Range) -> dict[str, Any]:
    return {
        "type": held.type.name,
        "start": held.start,
        "end": held.end if held.end < TO_END else None,
        "process": held.owner.proc_id,
        "client": printable(held.owner.client_id),
        "path": path_of(handle),
    }


def path_of(handle: Handle) -> str:
    """Where it was found, which may not be true any more; printable, and cut at its beginning."""
    names: list[str] = []
    size = 0
    at = handle
    while at.hint is not None and len(names) < _DEPTH_MAX and size < _PATH_MAX:
        at, name = at.hint
        names.append(printable(name))
        size += len(names[-1]) + 1
    path = "/" + "/".join(reversed(names))
    return path if at.hint is None and len(path) <= _PATH_MAX else "..." + path[-_PATH_MAX:]


def printable(name: bytes) -> str:
    """A guest chooses names, and whoever reads them has a terminal."""
    return "".join(
        char if char.isprintable() and char != "\\" else _escaped(ord(char))
        for char in name.decode(errors="backslashreplace")
    )


def _escaped(code: int) -> str:
    """Without the codec for that, which cannot be loaded any more."""
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\U{code:08x}"
