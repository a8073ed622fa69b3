"""A 9P client on a real ring: a live daemon, a fake front end, a fake driver, real descriptors.

Tests say what they send as message objects and get message objects back; everything between is
the daemon's own path, from the kick eventfd to the used ring.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from ninepd.p9.messages import (
    NOFID,
    NOTAG,
    Qid,
    Rlerror,
    Rread,
    Rreaddir,
    Rversion,
    Tattach,
    Tread,
    Treaddir,
    Tversion,
    Twalk,
    Twrite,
    decode,
    encode,
)
from tests.driver import Driver
from tests.frontend import FakeFrontEnd, Ring, SharedRegion

ROOT = 0
MSIZE = 1 << 17


class Entry(NamedTuple):
    qid: Qid
    offset: int
    type: int
    name: bytes


class Daemon:
    """``ninepd serve`` as a process of its own."""

    def __init__(self, *arguments: str, socket: str, export: str, tag: str = "test") -> None:
        self.socket = socket
        command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", socket]
        command += ["--export", export, "--tag", tag, *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.log = ""
        limit = time.monotonic() + 10
        while not os.path.exists(socket):
            if self.process.poll() is not None or time.monotonic() > limit:
                self.stop()
                raise AssertionError(f"the daemon did not start: {self.log}")
            time.sleep(0.005)

    @property
    def pid(self) -> int:
        return self.process.pid

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> int:
        """End it as a service manager does; returns the exit status and keeps the log."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            _, log = self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, log = self.process.communicate()
        self.log += log
        return self.process.returncode


class P9Error(OSError):
    """An Rlerror."""


class Client:
    """One connection, one ring, one 9P session."""

    def __init__(self, socket: str, *, num: int = 128, memory: int = 8 << 20) -> None:
        self.driver = Driver(num, size=memory)
        self.front_end = FakeFrontEnd(socket)
        self.front_end.connect()
        self.tag = 0
        self.start()

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

    def finish(self, head: int, timeout: float = 10) -> bytes:
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
        if isinstance(reply, Rlerror):
            raise P9Error(reply.ecode, f"{message} -> {os.strerror(reply.ecode)}")
        rest = raw[11:] if isinstance(reply, Rread | Rreaddir) else b""
        if isinstance(reply, Rread | Rreaddir):
            assert reply.nbytes == len(rest)
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
