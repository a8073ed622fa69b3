"""A 9P client on a real ring: a live daemon, a fake front end, a fake driver, real descriptors.

Tests say what they send as message objects and get message objects back; everything between is
the daemon's own path, from the kick eventfd to the used ring.
"""

import errno
import os
import select
import signal
import socket as socketlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ninepd.p9.messages import (
    NOFID,
    NOTAG,
    Qid,
    Rerror,
    Rgetattr,
    Rlerror,
    Rread,
    Rreaddir,
    Rversion,
    Tattach,
    Tclunk,
    Tgetattr,
    Tlcreate,
    Tlopen,
    Tread,
    Treaddir,
    Tversion,
    Twalk,
    Twrite,
    Txattrcreate,
    Txattrwalk,
    decode,
    encode,
)
from ninepd.vhostuser.messages import Request
from tests.support.audit import check_reply
from tests.support.driver import Driver
from tests.support.frontend import FakeFrontEnd, Ring, SharedRegion

ROOT = 0
MSIZE = 1 << 17
TAG = 2000
"""Of what is sent and not waited for; ``Client`` uses smaller ones."""
ERRORS: dict[int, str] = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}


_OTHER = 0x2000_0000


class Entry(NamedTuple):
    qid: Qid
    offset: int
    type: int
    name: bytes

    def shows(self, qid: Qid) -> bool:
        """Is it an entry of that file? Clients do not look at its version."""
        return (self.qid.type, self.qid.path) == (qid.type, qid.path)


class Readiness:
    """The service manager's end of sd_notify(3)."""

    def __init__(self) -> None:
        self._socket = socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_DGRAM)
        self._socket.bind("")  # a free abstract name
        self.address = "@" + os.fsdecode(self._socket.getsockname()[1:])

    def close(self) -> None:
        self._socket.close()

    def wait(self, pid: int, timeout: float = 20) -> bool:
        """Does the process say that it is ready, before it ends?"""
        end = os.pidfd_open(pid)
        try:
            while True:
                ready, _, _ = select.select([self._socket.fileno(), end], [], [], timeout)
                if self._socket.fileno() not in ready:
                    return False
                if self._socket.recv(4096).startswith(b"READY=1"):
                    return True
        finally:
            os.close(end)


class Daemon:
    """``ninepd serve`` as a process of its own."""

    def __init__(
        self,
        *arguments: str,
        socket: str,
        export: str,
        tag: str = "test",
        launcher: Sequence[str] = (),
        config: str | None = None,
        python: str = sys.executable,
    ) -> None:
        """``launcher``: a command that sets limits or identity and then runs the daemon.

        ``config``: a configuration file, which takes the place of the other options.
        """
        self.socket = socket
        command = [*launcher, python, "-m", "ninepd", "serve"]
        if config is None:
            command += ["--socket-path", socket, "--export", export, "--tag", tag, *arguments]
        else:
            command += ["--config", config, *arguments]
        self.log = ""
        self._readiness = Readiness()
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"NOTIFY_SOCKET": self._readiness.address},
        )
        if not self._readiness.wait(self.process.pid):
            self.stop()
            raise AssertionError(f"the daemon did not start: {self.log}")

    @property
    def pid(self) -> int:
        return self.process.pid

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def idle_descriptors(self) -> int:
        """How many it has while a front end is connected that has done nothing yet."""
        front_end = FakeFrontEnd(self.socket)
        front_end.get(Request.GET_FEATURES)
        count = self.descriptors()
        front_end.close()
        return count

    def reload(self) -> None:
        """Have it read its file again; returns when it has done what can be done."""
        self.process.send_signal(signal.SIGHUP)
        assert self._readiness.wait(self.pid)

    def stop(self) -> int:
        """End it as a service manager does; returns the exit status and keeps the log."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            _, log = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, log = self.process.communicate()
        self.log += log
        self._readiness.close()
        return self.process.returncode


def children(pid: int) -> list[int]:
    """In the order of the exports, while none was started again."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class P9Error(OSError):
    """An Rlerror, or the Rerror of an old dialect."""

    def __init__(self, reply: Rlerror | Rerror, message: object) -> None:
        code = reply.ecode if isinstance(reply, Rlerror) else reply.errno
        super().__init__(code, f"{message} -> {os.strerror(code)}")
        self.reply = reply


class Client:
    """One connection, one ring, one 9P session."""

    def __init__(
        self, socket: str | socketlib.socket, *, num: int = 128, memory: int = 8 << 20
    ) -> None:
        self.driver = Driver(num, size=memory)
        self.front_end = FakeFrontEnd(socket)
        self.tag = 0
        try:
            self.front_end.connect()
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self, base: int = 0) -> None:
        driver = self.driver
        regions = [
            SharedRegion(r.gpa, r.size, r.user_addr, r.offset, driver.fd) for r in driver.regions
        ]
        ring = Ring(
            num=driver.num,
            desc=driver.user_addr(driver.desc),
            used=driver.user_addr(driver.used),
            avail=driver.user_addr(driver.avail),
            kick=driver.kick_fd,
            call=driver.call_fd,
        )
        assert self.front_end.start(regions, ring, base=base) == 0
        # Once another message is answered, the descriptors of the last one are closed over there.
        self.front_end.get(Request.GET_FEATURES)

    def reboot(self) -> None:
        """As a guest that resets the device: a fresh ring on the same connection."""
        self.front_end.stop()
        old = self.driver
        gpa = _OTHER if old.regions[0].gpa != _OTHER else 2 * _OTHER  # else it were the same region
        self.driver = Driver(old.num, gpa=gpa, user_addr=gpa << 20)
        self.start()
        old.close()

    def close(self) -> None:
        self.front_end.close()
        self.driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Raw requests

    def submit(self, *out: bytes, room: int | Sequence[int] = 4096) -> int:
        """Make a request available and kick; returns its head."""
        sizes = [room] if isinstance(room, int) else list(room)
        head = self.driver.submit(out, sizes)
        self.driver.kick()
        return head

    def finish(self, head: int, timeout: float = 60) -> bytes:
        """The reply bytes of the only request that is out."""
        done = self.driver.wait_used(timeout)
        assert [entry[0] for entry in done] == [head]
        return self.driver.reply(head, done[0][1])

    def exchange(self, *out: bytes, room: int | Sequence[int] = 4096) -> bytes:
        return self.finish(self.submit(*out, room=room))

    # Messages

    def rpc(self, message: Any, data: bytes = b"", room: int = 4096) -> Any:
        """Send a message, return the reply message; P9Error for an Rlerror."""
        reply, _ = self.rpc_with_data(message, data, room)
        return reply

    def rpc_with_data(self, message: Any, data: bytes = b"", room: int = 4096) -> tuple[Any, bytes]:
        self.tag = (self.tag + 1) % 1000
        tag = NOTAG if isinstance(message, Tversion) else self.tag
        request = encode(tag, message)
        if data:
            size = len(request) + len(data)
            request = size.to_bytes(4, "little") + request[4:]
        raw = self.exchange(*filter(None, (request, data)), room=room)
        answered, reply = decode(raw)
        assert answered == tag
        assert int.from_bytes(raw[:4], "little") == len(raw)
        if isinstance(reply, Rlerror | Rerror):
            raise P9Error(reply, message)
        rest = raw[11:] if isinstance(reply, Rread | Rreaddir) else b""
        check_reply(message, reply, rest)
        return reply, rest

    def attach(self, uid: int = 0, msize: int = MSIZE, fid: int = ROOT) -> Qid:
        """Version and attach; fid 0 is the root."""
        version = self.rpc(Tversion(msize, b"9P2000.L"))
        assert isinstance(version, Rversion)
        assert version.version == b"9P2000.L"
        qid: Qid = self.rpc(Tattach(fid, NOFID, b"", b"", uid)).qid
        return qid

    def walk(self, fid: int, newfid: int, *names: bytes) -> tuple[Qid, ...]:
        """A complete walk; a partial one fails the test."""
        reply = self.rpc(Twalk(fid, newfid, names))
        assert len(reply.qids) == len(names)
        qids: tuple[Qid, ...] = reply.qids
        return qids

    def read(self, fid: int, offset: int, count: int) -> bytes:
        return self.rpc_with_data(Tread(fid, offset, count), room=11 + count)[1]

    def write(self, fid: int, offset: int, data: bytes) -> int:
        written: int = self.rpc(Twrite(fid, offset, len(data)), data).nbytes
        return written

    def readdir(self, fid: int, offset: int = 0, count: int = 8192) -> list[Entry]:
        return list(entries(self.rpc_with_data(Treaddir(fid, offset, count), room=11 + count)[1]))

    def error(self, message: Any, data: bytes = b"", room: int = 4096) -> str:
        """Name of the errno that a message is refused with, or "" if it is not refused."""
        try:
            self.rpc(message, data, room)
        except P9Error as error:
            return ERRORS[error.errno or 0]
        return ""

    def clunk(self, *fids: int) -> None:
        for fid in fids:
            self.rpc(Tclunk(fid))

    def getattr(self, fid: int) -> Rgetattr:
        attributes: Rgetattr = self.rpc(Tgetattr(fid, 0x3FFF))
        return attributes

    def open(self, fid: int, newfid: int, *names: bytes, flags: int = 0) -> Qid:
        """Walk to a new fid, or clone one, and open it."""
        self.walk(fid, newfid, *names)
        qid: Qid = self.rpc(Tlopen(newfid, flags)).qid
        return qid

    def create(
        self,
        fid: int,
        newfid: int,
        name: bytes,
        mode: int = 0o644,
        flags: int = 0x8042,
        gid: int = 0,
    ) -> Qid:
        """Create a file in a directory fid; newfid is open on it for reading and writing."""
        self.walk(fid, newfid)
        qid: Qid = self.rpc(Tlcreate(newfid, name, flags, mode, gid)).qid
        return qid

    def listing(self, fid: int, count: int = 8192) -> list[Entry]:
        """All entries of a fid that is open as a directory."""
        found: list[Entry] = []
        while more := self.readdir(fid, found[-1].offset if found else 0, count):
            found += more
        return found

    def names(self, fid: int) -> set[bytes]:
        """What a directory fid that is not open holds, without the dots."""
        self.open(fid, 9999)
        found = {entry.name for entry in self.listing(9999)}
        self.clunk(9999)
        return found - {b".", b".."}

    def get_xattr(self, fid: int, name: bytes) -> bytes:
        """The value of an extended attribute, or with an empty name the list."""
        size: int = self.rpc(Txattrwalk(fid, 9999, name)).size
        value = self.read(9999, 0, size) if size else b""
        self.clunk(9999)
        return value

    def set_xattr(self, fid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """As setxattr(2) in a Linux guest."""
        self.walk(fid, 9999)
        try:
            self.rpc(Txattrcreate(9999, name, len(value), flags))
        except P9Error:
            self.clunk(9999)
            raise
        for at in range(0, len(value), 8192):
            self.write(9999, at, value[at : at + 8192])
        self.clunk(9999)


def entries(data: bytes) -> Iterable[Entry]:
    """The directory entries of an Rreaddir."""
    at = 0
    while at < len(data):
        qid = Qid(
            data[at],
            int.from_bytes(data[at + 1 : at + 5], "little"),
            int.from_bytes(data[at + 5 : at + 13], "little"),
        )
        offset = int.from_bytes(data[at + 13 : at + 21], "little")
        length = int.from_bytes(data[at + 22 : at + 24], "little")
        yield Entry(qid, offset, data[at + 21], data[at + 24 : at + 24 + length])
        at += 24 + length


def send(client: Client, message: Any, data: bytes = b"", *, tag: int = TAG) -> int:
    """Send and do not wait; returns the head."""
    request = encode(tag, message)
    if data:
        request = (len(request) + len(data)).to_bytes(4, "little") + request[4:]
    return client.submit(*filter(None, (request, data)))


def receive(client: Client, head: int) -> Any:
    """The reply of a request that was sent, as the next one that comes."""
    return decode(client.finish(head))[1]
