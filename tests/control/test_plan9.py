"""pyroute2's 9P2000 server as we mend it: what it did wrong, one by one, and hostile clients."""

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from ninepd.control.plan9 import MSIZE, Files, Plan9Protocol

NOTAG, NOFID = 0xFFFF, 0xFFFF_FFFF
TVERSION, TATTACH, TFLUSH, TWALK, TOPEN, TREAD, TWRITE = 100, 104, 108, 110, 112, 116, 118
TCREATE, TCLUNK, TREMOVE, TSTAT, TWSTAT, TCALL, RERROR = 114, 120, 122, 124, 126, 80, 107
LONG = bytes(range(256)) * 400


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<H", len(data)) + data


class Reply(NamedTuple):
    kind: int
    tag: int
    body: bytes

    @property
    def error(self) -> str:
        assert self.kind == RERROR, self
        return self.body[2:].decode()


class Peer:
    """The other end, byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(20)

    def send(self, kind: int, body: bytes = b"", tag: int = 1) -> None:
        self.socket.sendall(frame(kind, body, tag))

    def receive(self) -> Reply:
        size, kind, tag = struct.unpack("<IBH", self._exactly(7))
        return Reply(kind, tag, self._exactly(size - 7))

    def call(self, kind: int, body: bytes = b"", tag: int = 1) -> Reply:
        self.send(kind, body, tag)
        reply = self.receive()
        assert reply.tag == tag
        return reply

    def ok(self, kind: int, body: bytes = b"") -> bytes:
        reply = self.call(kind, body)
        assert reply.kind == kind + 1, reply
        return reply.body

    def walk(self, fid: int, newfid: int, *names: str) -> Reply:
        body = struct.pack("<IIH", fid, newfid, len(names)) + b"".join(map(string, names))
        return self.call(TWALK, body)

    def open(self, newfid: int, *names: str, mode: int = 0) -> None:
        assert self.walk(0, newfid, *names).kind == TWALK + 1
        self.ok(TOPEN, struct.pack("<IB", newfid, mode))

    def read(self, fid: int, offset: int = 0, count: int = 1 << 20) -> bytes:
        return self.ok(TREAD, struct.pack("<IQI", fid, offset, count))[4:]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            some = self.socket.recv(size - len(data))
            if not some:
                raise EOFError
            data += some
        return data


def frame(kind: int, body: bytes = b"", tag: int = 1) -> bytes:
    return struct.pack("<IBH", 7 + len(body), kind, tag) + body


class Served:
    """A tree on a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.written: list[bytes] = []
        self.opened = 0
        self.go_on = asyncio.Event()
        self.ended = threading.Semaphore(0)
        self._peers: list[Peer] = []
        self.files = Files("somebody")
        self.files.folder("folder")
        for number in range(20):
            self.files.file(f"folder/file{number:02}", self._long)
        self.files.file("count", self._count)
        self.files.file("slow", self._slow)
        self.files.file("broken", self._broken)
        self.files.file("ctl", self._long, self.written.append)

    async def _long(self) -> bytes:
        return LONG

    async def _count(self) -> bytes:
        self.opened += 1
        return b"%d" % self.opened

    async def _slow(self) -> bytes:
        await self.go_on.wait()
        return b"at last"

    async def _broken(self) -> bytes:
        raise ZeroDivisionError

    def connect(self) -> Peer:
        ours, theirs = socket.socketpair()

        async def accept() -> None:
            await self.loop.connect_accepted_socket(
                lambda: Plan9Protocol(self.files, self._end), sock=theirs
            )

        asyncio.run_coroutine_threadsafe(accept(), self.loop).result(20)
        self._peers.append(Peer(ours))
        return self._peers[-1]

    def _end(self) -> None:
        self.ended.release()

    def close(self) -> None:
        for peer in self._peers:
            peer.socket.close()
        for _ in self._peers:
            assert self.ended.acquire(timeout=20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


@pytest.fixture
def peer(served: Served) -> Peer:
    """Attached as fid 0."""
    peer = served.connect()
    version = peer.call(TVERSION, struct.pack("<I", 8192) + string("9P2000"), NOTAG)
    assert version.body == struct.pack("<I", 8192) + string("9P2000")
    peer.ok(TATTACH, struct.pack("<II", 0, NOFID) + string("me") + string(""))
    return peer


def test_a_request_may_come_in_pieces(peer: Peer) -> None:
    request = frame(TWALK, struct.pack("<IIH", 0, 1, 1) + string("folder"))
    for at in range(len(request)):
        peer.socket.sendall(request[at : at + 1])
    assert peer.receive().kind == TWALK + 1


def test_what_comes_behind_an_error_is_answered(peer: Peer) -> None:
    wrong = frame(TWALK, struct.pack("<IIH", 0, 1, 1) + string("nothing"), 3)
    peer.socket.sendall(wrong + frame(TSTAT, struct.pack("<I", 0), 4))
    assert peer.receive() == Reply(RERROR, 3, string("No such file or directory"))
    assert peer.receive()[:2] == (TSTAT + 1, 4)


@pytest.mark.parametrize("size", [0, 6, 8193, 0xFFFF_FFFF])
def test_an_impossible_size_ends_the_connection(served: Served, peer: Peer, size: int) -> None:
    peer.socket.sendall(struct.pack("<IBH", size, TSTAT, 1) + bytes(8))
    assert served.ended.acquire(timeout=20)
    served.ended.release()


@pytest.mark.parametrize("kind", [0, 7, 12, TCALL, 101, RERROR, 255])
def test_what_is_no_request_of_9p2000_is_refused(peer: Peer, kind: int) -> None:
    """Rerror above all: of one that a client sends, pyroute2 would call what its text names."""
    body = string('{"class": "exit", "argv": [1], "str": ""}')
    assert peer.call(kind, body).error == "Function not implemented"


@pytest.mark.parametrize("kind", [TATTACH, TWALK, TOPEN, TREAD, TCLUNK, TSTAT, TVERSION])
def test_a_request_that_is_cut_is_refused(peer: Peer, kind: int) -> None:
    assert peer.call(kind, b"\0").error == "Invalid argument"
    assert peer.call(TSTAT, struct.pack("<I", 0)).kind == TSTAT + 1


def test_names_that_are_no_text_are_refused(peer: Peer) -> None:
    body = struct.pack("<IIH", 0, 1, 1) + struct.pack("<H", 2) + b"\xff\xfe"
    assert peer.call(TWALK, body).error == "Invalid argument"


def test_a_fid_is_free_after_its_clunk(peer: Peer) -> None:
    for _ in range(2):
        peer.walk(0, 1, "folder")
        peer.ok(TCLUNK, struct.pack("<I", 1))
    assert peer.call(TSTAT, struct.pack("<I", 1)).error == "unknown fid"
    assert peer.call(TCLUNK, struct.pack("<I", 1)).error == "unknown fid"


def test_a_fid_is_given_once(peer: Peer) -> None:
    peer.walk(0, 1, "folder")
    assert peer.walk(0, 1, "count").error == "fid in use"


def test_there_are_not_fids_without_end(peer: Peer) -> None:
    errors = [peer.walk(0, number).kind == RERROR for number in range(1, 300)]
    assert sum(errors) == 300 - 256
    assert peer.walk(0, 0, "folder").kind == TWALK + 1  # onto itself


def test_a_walk_goes_as_far_as_it_can(peer: Peer) -> None:
    reply = peer.walk(0, 1, "folder", "..", "folder", "nothing", "more")
    assert struct.unpack_from("<H", reply.body) == (3,)
    assert peer.call(TSTAT, struct.pack("<I", 1)).error == "unknown fid"


def test_an_open_fid_does_not_walk(peer: Peer) -> None:
    peer.open(1, "folder")
    assert peer.walk(1, 2, "file00").error == "fid is open"
    assert peer.call(TOPEN, struct.pack("<IB", 1, 0)).error == "fid is open"


def test_replies_fit_into_a_message(peer: Peer) -> None:
    peer.open(1, "folder", "file00")
    assert peer.read(1) == LONG[: 8192 - 11]
    data = b""
    while some := peer.read(1, len(data)):
        data += some
    assert data == LONG


@pytest.mark.parametrize("count", [100, 333, 8192])
def test_a_directory_is_read_in_whole_entries(peer: Peer, count: int) -> None:
    peer.open(1, "folder")
    names, offset = [], 0
    while some := peer.read(1, offset, count):
        at = 0
        while at < len(some):
            [size] = struct.unpack_from("<H", some, at)
            [length] = struct.unpack_from("<H", some, at + 41)
            names.append(some[at + 43 : at + 43 + length].decode())
            at += 2 + size
        assert at == len(some)
        offset += len(some)
    assert names == [f"file{number:02}" for number in range(20)]


def test_a_file_is_made_for_whoever_opens_it(served: Served, peer: Peer) -> None:
    peer.open(1, "count")
    peer.open(2, "count")
    assert (peer.read(1), peer.read(2), peer.read(1)) == (b"1", b"2", b"1")
    other = served.connect()
    other.ok(TVERSION, struct.pack("<I", 8192) + string("9P2000"))
    other.ok(TATTACH, struct.pack("<II", 0, NOFID) + string("me") + string(""))
    other.open(1, "count")
    assert other.read(1) == b"3"


def test_others_do_not_wait_for_a_file_that_takes_a_while(served: Served, peer: Peer) -> None:
    peer.walk(0, 1, "slow")
    peer.send(TOPEN, struct.pack("<IB", 1, 0), 5)
    peer.open(2, "count")
    assert peer.call(TSTAT, struct.pack("<I", 0), 5).error == "tag in use"
    served.loop.call_soon_threadsafe(served.go_on.set)
    assert peer.receive()[:2] == (TOPEN + 1, 5)
    assert peer.read(1) == b"at last"


def test_a_flushed_request_is_not_answered(served: Served, peer: Peer) -> None:
    peer.walk(0, 1, "slow")
    peer.send(TOPEN, struct.pack("<IB", 1, 0), 5)
    assert peer.call(TFLUSH, struct.pack("<H", 5), 6).kind == TFLUSH + 1
    served.loop.call_soon_threadsafe(served.go_on.set)
    assert peer.call(TSTAT, struct.pack("<I", 0), 5).kind == TSTAT + 1
    assert peer.call(TFLUSH, struct.pack("<H", 77)).kind == TFLUSH + 1


def test_no_more_is_read_than_can_be_out(served: Served, peer: Peer) -> None:
    count = 100
    for number in range(count):
        peer.walk(0, 1 + number, "slow")
    for number in range(count):
        peer.send(TOPEN, struct.pack("<IB", 1 + number, 0), 1 + number)
    served.loop.call_soon_threadsafe(served.go_on.set)
    assert sorted(peer.receive().tag for _ in range(count)) == list(range(1, 1 + count))


def test_who_takes_no_replies_gets_no_others(served: Served, peer: Peer) -> None:
    peer.open(1, "folder", "file00")
    request = frame(TREAD, struct.pack("<IQI", 1, 0, 8000))
    peer.socket.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while sent < 100_000:
            sent += peer.socket.send(request) == len(request)
    assert sent < 100_000
    peer.socket.settimeout(20)
    for _ in range(sent):
        assert peer.receive().kind == TREAD + 1


def test_a_bug_is_an_error_of_one_request(peer: Peer) -> None:
    peer.walk(0, 1, "broken")
    reply = peer.call(TOPEN, struct.pack("<IB", 1, 0))
    assert reply.error == "Input/output error"
    peer.open(2, "count")


@pytest.mark.parametrize("mode", [1, 2, 0x10])
def test_only_what_takes_something_is_opened_for_writing(peer: Peer, mode: int) -> None:
    peer.walk(0, 1, "count")
    assert peer.call(TOPEN, struct.pack("<IB", 1, mode)).error == "Permission denied"


def test_what_is_written_arrives(served: Served, peer: Peer) -> None:
    peer.open(1, "ctl", mode=1)
    peer.ok(TWSTAT, struct.pack("<IHH", 1, 2, 0))  # O_TRUNC
    reply = peer.ok(TWRITE, struct.pack("<IQI", 1, 0, 4) + b"word")
    assert (struct.unpack("<I", reply), served.written) == ((4,), [b"word"])


def test_what_is_not_open_for_it_is_neither_read_nor_written(peer: Peer) -> None:
    peer.walk(0, 1, "ctl")
    write = struct.pack("<IQI", 1, 0, 4) + b"word"
    assert peer.call(TREAD, struct.pack("<IQI", 1, 0, 4)).error == "fid is not open"
    assert peer.call(TWRITE, write).error == "fid is not open for writing"
    peer.ok(TOPEN, struct.pack("<IB", 1, 0))
    assert peer.call(TWRITE, write).error == "fid is not open for writing"


@pytest.mark.parametrize("kind", [TCREATE, TREMOVE, TWSTAT])
def test_nothing_is_made_removed_or_changed(peer: Peer, kind: int) -> None:
    peer.walk(0, 1, "count")
    assert peer.call(kind, struct.pack("<I", 1)).error == "Permission denied"
    gone = peer.call(TCLUNK, struct.pack("<I", 1)).kind == RERROR
    assert gone == (kind == TREMOVE)


def test_a_new_session_has_no_fids_of_the_old_one(peer: Peer) -> None:
    peer.walk(0, 1, "folder")
    peer.ok(TVERSION, struct.pack("<I", 1 << 20) + string("9P2000.L"))
    assert peer.call(TSTAT, struct.pack("<I", 0)).error == "unknown fid"


@pytest.mark.parametrize(
    ("msize", "version", "answer"),
    [
        (1 << 20, "9P2000.u", (MSIZE, "9P2000")),
        (8192, "9P1999", (MSIZE, "unknown")),
        (100, "9P2000", (MSIZE, "unknown")),
    ],
)
def test_version(served: Served, msize: int, version: str, answer: tuple[Any, ...]) -> None:
    peer = served.connect()
    body = peer.ok(TVERSION, struct.pack("<I", msize) + string(version))
    assert body == struct.pack("<I", answer[0]) + string(answer[1])


def test_owners_need_no_entry_in_passwd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0xFFFF_FFF0)
    assert Files("somebody").root.stat["uid"] == "somebody"
