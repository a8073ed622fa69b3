"""A guest goes on in another process, which has the same descriptors."""

import fcntl
import os
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.limits import Limits
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Later
from ninepd.ops.snapshot import GuestState, dump, load
from ninepd.ops.table import ROWS
from ninepd.p9 import messages as p9
from ninepd.p9.session import Dialect
from ninepd.payload import Buffers, PrivatePayload
from tests.conftest import Mount

ROOT, FILE, GONE, LISTED, MOVED, VALUE, WRITER, CLONE, BELOW = range(9)
COUNT: Final = 300
LIMIT: Final = 48
"""Descriptors that fids may keep."""
MANY: Final = range(100, 160)
"""Fids of files that are only held."""


class Session:
    """A guest, with requests as its client sends them."""

    def __init__(self, root: int) -> None:
        self.guest = Guest(Tree(root, LocalHost(), budget=LIMIT), Limits())

    def ask(self, message: Any, data: bytes = b"") -> Any:
        """The reply, and behind it in ``data`` what came with it."""
        budget = self.guest.tree.handles.budget
        if budget.crowded:
            budget.make_room()
        row = ROWS[self.guest.session.dialect][p9.NUMBERS[type(message)]]
        payload = PrivatePayload(2000, Buffers())
        if data:
            payload.put(data)
            payload.available = len(data)
        session = self.guest.session
        fids = row.fid(session, message), row.other(session, message)
        try:
            reply = row.serve(self.guest, message, payload, *fids)
            while isinstance(reply, Later):
                reply = reply.work(payload)
        finally:
            self.guest.unpin(payload.pins)
        self.data = bytes(payload._buffer or b"")[: payload._end - payload._start]
        return reply

    def walk(self, fid: int, newfid: int, *names: bytes) -> None:
        assert len(self.ask(p9.Twalk(fid, newfid, names)).qids) == len(names)

    def open(self, fid: int, newfid: int, name: bytes, flags: int = os.O_RDONLY) -> None:
        self.walk(fid, newfid, name)
        self.ask(p9.Tlopen(newfid, flags))

    def names(self, fid: int, offset: int, rounds: int = 1 << 20) -> tuple[list[bytes], int]:
        """Entries behind a cookie, and the last cookie."""
        found: list[bytes] = []
        for _ in range(rounds):
            if not self.ask(p9.Treaddir(fid, offset, 2000)).nbytes:
                break
            at = 0
            while at < len(self.data):
                offset, _, length = struct.unpack_from("<QBH", self.data, at + 13)
                found.append(self.data[at + 24 : at + 24 + length])
                at += 24 + length
        return found, offset

    def end(self) -> None:
        self.guest.end()
        self.guest.tree.close()


def in_child(work: Callable[[], None]) -> None:
    """Run it in a process that has our descriptors; what fails there fails here."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4096:])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as errors:
        text = errors.read()
    os.waitpid(pid, 0)
    assert not text, text


def leave_it_to_a_child() -> None:
    """The caller goes on as a child of itself, when the process that it was has ended."""
    read, write = os.pipe()
    if os.fork():
        os._exit(0)
    os.close(write)
    os.read(read, 1)
    os.close(read)


def locked(path: Path) -> bool:
    """Would a write lock of the whole file be refused to another program?"""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with path.open("r+") as file:
        answer = fcntl.fcntl(file.fileno(), fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def prepare(export: Path) -> None:
    (export / "file").write_text("some text")
    (export / "gone").write_text("unlinked text")
    (export / "dir").mkdir()
    (export / "dir" / "below").write_text("below")
    for number in range(COUNT):
        (export / "dir" / f"entry{number:03}").touch()
    (export / "many").mkdir()
    for number in MANY:
        (export / "many" / str(number)).write_text(str(number))
    os.setxattr(export / "file", "user.old", b"old value")


def begin(session: Session, export: Path) -> tuple[list[bytes], int]:
    """Have some of all that a guest can have; returns the names it has listed, and where it is."""
    ask = session.ask
    session.guest.version(p9.Tversion(1 << 16, Dialect.L.value), 1 << 20)
    ask(p9.Tattach(ROOT, p9.NOFID, b"", b"", 0))
    session.open(ROOT, FILE, b"file", os.O_RDWR | os.O_APPEND)
    session.open(ROOT, GONE, b"gone")
    ask(p9.Tunlinkat(ROOT, b"gone", 0))
    session.open(ROOT, LISTED, b"dir")
    listed = session.names(LISTED, 0, rounds=2)
    session.walk(ROOT, BELOW, b"dir", b"below")
    (export / "dir" / "below").rename(export / "moved")  # by the host
    session.walk(ROOT, MOVED, b"moved")
    session.walk(FILE, CLONE)
    ask(p9.Txattrwalk(CLONE, VALUE, b"user.old"))
    session.walk(FILE, WRITER)
    ask(p9.Txattrcreate(WRITER, b"user.new", 9, 0))
    ask(p9.Twrite(WRITER, 0, 4), b"new ")
    ask(p9.Tlock(FILE, p9.LockType.WRLCK, 0, 4, 0, 7, b"guest"))
    for number in MANY:
        session.walk(ROOT, number, b"many", str(number).encode())
    return listed


def go_on(session: Session, export: Path, listed: tuple[list[bytes], int]) -> None:
    """Everything that ``begin`` has begun comes to its end."""
    ask = session.ask
    names, offset = listed
    assert ask(p9.Tread(FILE, 0, 100)).nbytes == 9
    assert session.data == b"some text"
    ask(p9.Twrite(FILE, 0, 5), b" more")
    assert (export / "file").read_text() == "some text more"
    ask(p9.Tread(GONE, 0, 100))
    assert session.data == b"unlinked text"
    rest, _ = session.names(LISTED, offset)
    entries = [b".", b"..", *(f"entry{number:03}".encode() for number in range(COUNT))]
    assert sorted({*names, *rest} - {b"below"}) == entries  # that one was moved meanwhile
    assert len(names + rest) in {len(entries), len(entries) + 1}
    again, _ = session.names(LISTED, 0)
    assert sorted(again) == entries
    ask(p9.Tread(VALUE, 0, 100))
    assert session.data == b"old value"
    ask(p9.Twrite(WRITER, 4, 5), b"value")
    ask(p9.Tclunk(WRITER))
    assert os.getxattr(export / "file", "user.new") == b"new value"
    assert locked(export / "file")
    ask(p9.Tlock(FILE, p9.LockType.UNLCK, 0, 0, 0, 7, b"guest"))
    assert not locked(export / "file")
    for number in MANY:
        ask(p9.Tlopen(number, os.O_RDONLY))
        ask(p9.Tread(number, 0, 100))
        assert session.data == str(number).encode()
        ask(p9.Tclunk(number))
    ask(p9.Tremove(MOVED))
    assert not (export / "moved").exists()


@pytest.mark.parametrize("place", ["ext4", "tmpfs"])
def test_a_guest_goes_on_in_another_process(
    tmp_path: Path, memory_dir: Path, mount_ext4: Mount, place: str
) -> None:
    """On ext4 the positions in a directory are hashes, which need cookies."""
    export = memory_dir if place == "tmpfs" else mount_ext4(tmp_path / "export")
    prepare(export)

    def work() -> None:
        before = set(os.listdir("/proc/self/fd"))
        session = Session(os.open(export, os.O_PATH))
        listed = begin(session, export)
        state = dump(session.guest)
        assert any(handle.fd < 0 for handle in state.handles), "some are reclaimed"
        leave_it_to_a_child()
        session.guest.tree.mounts.close()  # the watch is no part of a guest's state
        other = Session(state.root)
        load(other.guest, state)
        assert dump(other.guest) == state
        go_on(other, export, listed)
        other.end()
        budget = other.guest.tree.handles.budget
        assert (budget.used, budget.reclaimed) == (0, 0)
        assert set(os.listdir("/proc/self/fd")) == before

    in_child(work)


def plain(value: object) -> bool:
    """Is it made of numbers, bytes, strings, lists and the like only?"""
    if isinstance(value, dict):
        return all(plain(key) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return all(plain(getattr(value, name)) for name in fields)
    return value is None or type(value) in {int, bool, bytes, str}


def test_the_state_is_plain_data(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    prepare(export)
    session = Session(os.open(export, os.O_PATH))
    begin(session, export)
    state = dump(session.guest)
    assert isinstance(state, GuestState)
    assert plain(state)
    session.end()
