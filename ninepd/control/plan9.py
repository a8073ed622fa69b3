"""pyroute2's 9P2000 server, with what is amiss in it mended (as of 0.9.7).

- A request that comes in several pieces was never answered, and what came behind a request that
  failed was dropped. Requests are cut out of the stream by their sizes now.
- A size that cannot be is the end of the connection, not of what else has arrived.
- Errors were JSON: now they are sentences, in those words that Linux has an errno for.
- Clunked fids stayed. Fids that are not free, or not there, are told so.
- Twalk to a name that is not there lost the names before it.
- msize was what the client said; replies were as long as it asked for.
- A directory was cut between any two bytes; 9P wants whole entries.
- Tflush was unknown, and Tcreate, Tremove and Twstat did as if, or not even that.
- Who has no entry in passwd(5), or cannot read it any more, could serve nothing.
- A file's contents were one for all clients. Here a file is made when it is opened, for that fid,
  and that may take a while: other requests are answered meanwhile.

Lengths of strings still count characters, so names and errors here are ASCII.
"""

import asyncio
import errno
import logging
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, TypeAlias, cast

from pyroute2.plan9 import (
    Marshal9P,
    Stat,
    Tattach,
    Tauth,
    Tclunk,
    Tcreate,
    Tflush,
    Topen,
    Tread,
    Tremove,
    Tstat,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
    msg_base,
    msg_rattach,
    msg_rclunk,
    msg_rerror,
    msg_ropen,
    msg_rread,
    msg_rstat,
    msg_rversion,
    msg_rwalk,
    msg_rwrite,
    msg_rwstat,
)
from pyroute2.plan9.filesystem import Filesystem, Inode
from pyroute2.plan9.server import Plan9ServerProtocol

log = logging.getLogger(__name__)

Message: TypeAlias = Any
"""A message of pyroute2's, which has no types."""
Later: TypeAlias = partial[Awaitable[Message]]
"""Makes a reply that takes a while."""
Make: TypeAlias = Callable[[], Awaitable[bytes]]
"""The contents of a file, for whoever opens it."""


class Stream(ABC):
    """What somebody reads who waits for more."""

    @abstractmethod
    async def read(self, count: int) -> bytes:
        """What there is, at most so much; if there is nothing, as soon as there is."""

    @abstractmethod
    def close(self) -> None:
        """Nobody reads it any more."""


Begin: TypeAlias = Callable[[], Stream]
"""A stream of its own, for whoever opens the file."""
Take: TypeAlias = Callable[[bytes], None]
"""What is written to a file, as one Twrite; OSError says what is wrong about it."""

DIRECTORY: Final = 0x80
MSIZE: Final = 64 << 10
_LEAST_MSIZE: Final = 256
_VERSION: Final = "9P2000"
_HEADER: Final = struct.Struct("<IBH")
_READ_HEADER: Final = _HEADER.size + 4
_NOTAG: Final = 0xFFFF
_FIDS: Final = 256
_REQUESTS: Final = 32
"""That may be out at once; more are not read."""
_WRITES: Final = 1
_ACCESS: Final = 3
_TRUNCATES: Final = 0x10


class msg_tflush(msg_base):  # noqa: N801 - as its siblings
    defaults: ClassVar = {"header": {"type": Tflush}}
    fields = (("oldtag", "H"),)


class msg_rflush(msg_base):  # noqa: N801
    defaults: ClassVar = {"header": {"type": Tflush + 1}}


class msg_of_fid(msg_base):  # noqa: N801
    fields = (("fid", "I"),)


class Marshal(Marshal9P):
    """Knows all T-messages of 9P2000, as far as they are looked at."""

    msg_map = Marshal9P.msg_map | {
        Tflush: msg_tflush,
        Tcreate: msg_of_fid,
        Tremove: msg_of_fid,
        Twstat: msg_of_fid,
    }


@dataclass
class _Fid:
    inode: Inode
    data: bytes | None = None
    """Its contents, if it is open."""
    writes: bool = False
    stream: Stream | None = None

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


class Files(Filesystem):
    """Those that are served; ``owner`` is a name, whether this host knows it or not."""

    def __init__(self, owner: str) -> None:  # not that of the class, which asks passwd(5)
        self._owner = owner
        self.inodes = {0: self._inode("/", 0, DIRECTORY, 0o500)}
        self.root.add_parent(self.root)

    @property
    def root(self) -> Inode:
        return self.inodes[0]

    def _inode(self, name: str, number: int, qtype: int, mode: int) -> Inode:
        inode = Inode(name, number, qtype=qtype, mode=mode, uid=self._owner, gid=self._owner)
        inode.stat["type"] = 0  # there are 16 bits for it
        return inode

    def folder(self, path: str) -> None:
        self._add(path, DIRECTORY, 0o500)

    def file(self, path: str, make: Make, take: Take | None = None) -> None:
        """``make`` its contents when it is opened, ``take`` what is written to it."""
        inode = self._add(path, 0, 0o400 if take is None else 0o600)
        inode.add_callback(Topen, make)
        if take is not None:
            inode.add_callback(Twrite, take)

    def stream(self, path: str, begin: Begin) -> None:
        """A file that has no end."""
        self._add(path, 0, 0o400).add_callback(Tread, begin)

    def _add(self, path: str, qtype: int, mode: int) -> Inode:
        folder, _, name = path.rpartition("/")
        number = len(self.inodes)
        inode = self.inodes[number] = self._inode(name, number, qtype, mode)
        self.walk(folder).add_child(inode)
        return inode


class Plan9Protocol(Plan9ServerProtocol):
    """One connection."""

    def __init__(self, filesystem: Files, ended: Callable[[], None]) -> None:
        """``ended`` is called when the connection has."""
        super().__init__(None, Marshal(), filesystem)
        self._ended = ended
        self._buffer = bytearray()
        self._full = False
        self._msize = MSIZE
        self._fids: dict[int, _Fid] = {}
        self._out: dict[int, asyncio.Task[None]] = {}
        """Requests that take a while, by their tags."""

    # The stream

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._begin_anew()
        self._ended()

    def pause_writing(self) -> None:
        """Who does not take replies gets no others."""
        self._full = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self._full = False
        self.transport.resume_reading()
        self._receive()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._receive()

    def _receive(self) -> None:
        """Answer what is there, in whole requests."""
        while len(self._buffer) >= _HEADER.size and not self.transport.is_closing():
            if self._full:
                return
            if len(self._out) >= _REQUESTS:
                self.transport.pause_reading()
                return
            size, kind, tag = _HEADER.unpack_from(self._buffer)
            if not _HEADER.size <= size <= self._msize:
                log.info("control: a client was parted from: no message has %d bytes", size)
                self.transport.abort()
                return
            if len(self._buffer) < size:
                return
            message = bytes(self._buffer[:size])
            del self._buffer[:size]
            self._answer(kind, tag, message)

    def _answer(self, kind: int, tag: int, message: bytes) -> None:
        try:
            if kind not in self.rtable or kind not in self.marshal.msg_map:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            request = next(self.marshal.parse(message))
            if tag in self._out and tag != _NOTAG:
                raise OSError(errno.EINVAL, "tag in use")
            reply = self.rtable[kind](self, request)
        except Exception as error:
            self.error(error, tag)
            return
        if isinstance(reply, partial):
            self._out[tag] = asyncio.ensure_future(self._answer_later(tag, reply))
        elif reply is not None:
            self._send(tag, reply)

    async def _answer_later(self, tag: int, make: Later) -> None:
        try:
            self._send(tag, await make())
        except Exception as error:
            self.error(error, tag)
        finally:
            if self._out.get(tag) is asyncio.current_task():  # it was not flushed
                del self._out[tag]
            if not self.transport.is_closing():
                if not self._full:
                    self.transport.resume_reading()
                asyncio.get_running_loop().call_soon(self._receive)

    def _send(self, tag: int, reply: Message) -> None:
        reply["header"]["tag"] = tag
        reply.encode()
        self.transport.write(bytes(reply.data))

    def error(self, e: Exception, tag: int = 0) -> None:
        """An OSError in its words; else the request was no sound one, or we have a bug."""
        if isinstance(e, OSError):
            words = e.strerror or os.strerror(errno.EIO)
        elif isinstance(e, (struct.error, UnicodeDecodeError, StopIteration)):
            words = os.strerror(errno.EINVAL)
        else:
            log.error("control: a bug made a request fail", exc_info=e)
            words = os.strerror(errno.EIO)
        reply = msg_rerror()
        reply["ename"] = words.encode("ascii", "backslashreplace").decode()
        self._send(tag, reply)

    # Fids

    def _begin_anew(self) -> None:
        """Nothing is left of the session."""
        for task in self._out.values():
            task.cancel()
        self._out.clear()
        for fid in self._fids.values():
            fid.close()
        self._fids.clear()

    def _fid(self, number: int) -> _Fid:
        try:
            return self._fids[number]
        except KeyError:
            raise OSError(errno.EBADF, "unknown fid") from None

    def _new_fid(self, number: int, inode: Inode) -> None:
        if number in self._fids:
            raise OSError(errno.EINVAL, "fid in use")
        if len(self._fids) >= _FIDS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._fids[number] = _Fid(inode)

    # Messages

    def t_version(self, req: Message) -> Message:
        """A new session: nothing of an old one is left."""
        self._begin_anew()
        reply = msg_rversion()
        known = req["version"].split(".")[0] == _VERSION and req["msize"] >= _LEAST_MSIZE
        self._msize = min(req["msize"], MSIZE) if known else MSIZE
        reply["msize"] = self._msize
        reply["version"] = _VERSION if known else "unknown"
        return reply

    def t_auth(self, req: Message) -> Message:  # noqa: ARG002
        raise OSError(errno.EPERM, "no authentication required")

    def t_attach(self, req: Message) -> Message:
        root = self.filesystem.root
        self._new_fid(req["fid"], root)
        reply = msg_rattach()
        reply["qid"] = root.qid
        return reply

    def t_flush(self, req: Message) -> Message:
        """The flushed request gets no answer any more."""
        task = self._out.pop(req["oldtag"], None)
        if task is not None:
            task.cancel()
        return msg_rflush()

    def t_walk(self, req: Message) -> Message:
        """As far as there are names; the new fid is there if all are (walk(5))."""
        fid, names = self._fid(req["fid"]), req["wname"]
        if fid.data is not None:
            raise OSError(errno.EINVAL, "fid is open")
        inode, qids = fid.inode, []
        for name in names:
            step = _step(inode, name)
            if step is None:
                break
            inode = step
            qids.append(inode.qid)
        if names and not qids:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if len(qids) == len(names):
            if req["newfid"] == req["fid"]:
                fid.inode = inode
            else:
                self._new_fid(req["newfid"], inode)
        reply = msg_rwalk()
        reply["wqid"] = qids
        return reply

    def t_stat(self, req: Message) -> Message:
        reply = msg_rstat()
        reply["stat"] = self._fid(req["fid"]).inode.stat
        return reply

    def t_open(self, req: Message) -> Message | Later:
        fid, mode = self._fid(req["fid"]), req["mode"]
        inode = fid.inode
        writes = mode & _ACCESS in {_WRITES, 2} or bool(mode & _TRUNCATES)
        if fid.data is not None:
            raise OSError(errno.EINVAL, "fid is open")
        if writes and Twrite not in inode.callbacks:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        fid.writes = writes
        make = inode.callbacks.get(Topen)
        if make is not None and mode & _ACCESS != _WRITES:
            return partial(_make, fid, cast("Make", make))
        begin = inode.callbacks.get(Tread)
        if begin is not None:
            fid.stream = cast("Begin", begin)()
        fid.data = b""
        return _opened(fid)

    def t_read(self, req: Message) -> Message | Later:
        fid, offset = self._fid(req["fid"]), req["offset"]
        if fid.data is None:
            raise OSError(errno.EBADF, "fid is not open")
        count = min(req["count"], self._msize - _READ_HEADER)
        if fid.stream is not None:
            return partial(_read_stream, fid.stream, count)
        reply = msg_rread()
        if fid.inode.qid["type"] & DIRECTORY:
            reply["data"] = _entries(fid.inode, offset, count)
        else:
            reply["data"] = fid.data[offset : offset + count]
        return reply

    def t_write(self, req: Message) -> Message:
        fid = self._fid(req["fid"])
        if not fid.writes:
            raise OSError(errno.EBADF, "fid is not open for writing")
        cast("Take", fid.inode.callbacks[Twrite])(bytes(req["data"]))
        reply = msg_rwrite()
        reply["count"] = len(req["data"])
        return reply

    def t_clunk(self, req: Message) -> Message:
        self._fid(req["fid"]).close()
        del self._fids[req["fid"]]
        return msg_rclunk()

    def t_create(self, req: Message) -> Message:
        self._fid(req["fid"])
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def t_remove(self, req: Message) -> Message:
        """The fid goes in any case (remove(5))."""
        self.t_clunk(req)
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def t_wstat(self, req: Message) -> Message:
        """What can be written to can be truncated, which Linux does by this; that is all."""
        if Twrite not in self._fid(req["fid"]).inode.callbacks:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return msg_rwstat()

    rtable: ClassVar = {
        Tversion: t_version,
        Tauth: t_auth,
        Tattach: t_attach,
        Tflush: t_flush,
        Twalk: t_walk,
        Tstat: t_stat,
        Topen: t_open,
        Tread: t_read,
        Twrite: t_write,
        Tclunk: t_clunk,
        Tcreate: t_create,
        Tremove: t_remove,
        Twstat: t_wstat,
    }
    """Messages are looked up here, not by their names; no calls of functions among them."""


async def _make(fid: _Fid, make: Make) -> Message:
    fid.data = await make()
    return _opened(fid)


async def _read_stream(stream: Stream, count: int) -> Message:
    reply = msg_rread()
    reply["data"] = await stream.read(count)
    return reply


def _opened(fid: _Fid) -> Message:
    reply = msg_ropen()
    reply["qid"] = fid.inode.qid
    reply["iounit"] = 0  # as much as goes into a message
    return reply


def _step(inode: Inode, name: str) -> Inode | None:
    if name == "..":
        return inode.get_parent()
    for child in inode.children:
        if child.stat["name"] == name:
            return child
    return None


def _entries(directory: Inode, offset: int, count: int) -> bytearray:
    """Whole ones, from where the last read ended."""
    data = bytearray()
    at = 0
    for child in sorted(directory.children, key=lambda child: cast("str", child.stat["name"])):
        entry = bytearray()
        Stat.encode_into(entry, 0, child.stat)
        if at >= offset:
            if len(data) + len(entry) > count:
                break
            data += entry
        at += len(entry)
    return data
