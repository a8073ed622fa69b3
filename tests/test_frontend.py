import os
import resource
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninepd.errors import FramingLost, Refused
from ninepd.frontend import MAX_DISCARD, MAX_FDS, MAX_PAYLOAD, FrontEnd
from ninepd.vhostuser.messages import (
    MESSAGE_HEADER,
    NEED_REPLY,
    REQUESTS,
    UINT64,
    VERSION,
    Header,
    Message,
    Request,
)
from ninepd.vhostuser.session import AddRegion, BackendSession, SetKick
from tests.support.dialogue import CONFIG_SPACE
from tests.support.frontend import FakeFrontEnd, Ring, SharedRegion

SIZE, GPA, UA = 1 << 20, 0x4000_0000, 0x7F00_0000_0000


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def assert_open(expected: set[str]) -> None:
    """Soon: what might take its time is closed on another thread."""
    limit = time.monotonic() + 10
    while open_fds() != expected and time.monotonic() < limit:
        time.sleep(0.001)
    assert open_fds() == expected


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    before = open_fds()
    yield
    assert_open(before)


@contextmanager
def connected() -> Iterator[tuple[FakeFrontEnd, FrontEnd]]:
    theirs, ours = socket.socketpair()
    back = FrontEnd(ours)
    with FakeFrontEnd(theirs) as front:
        try:
            yield front, back
        finally:
            back.close()


@contextmanager
def files(count: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


# Framing.


@pytest.mark.parametrize("piece", [1, 2, 5, 11, 13])
def test_pieces_make_whole_messages(piece: int) -> None:
    wire = MESSAGE_HEADER.pack(Header(Request.SET_FEATURES, VERSION, 8)) + UINT64.pack(77)
    wire += MESSAGE_HEADER.pack(Header(Request.GET_FEATURES, VERSION, 0))
    with connected() as (front, back):
        seen: list[Message] = []
        for start in range(0, len(wire), piece):
            front.send_bytes(wire[start : start + piece])
            seen += back.receive()
        assert [(m.header.request, m.payload, m.fds, m.fault) for m in seen] == [
            (Request.SET_FEATURES, UINT64.pack(77), (), None),
            (Request.GET_FEATURES, b"", (), None),
        ]
        assert list(back.receive()) == []


def test_descriptors_stay_with_their_message() -> None:
    with connected() as (front, back), tempfile.TemporaryFile() as file:
        front.send(Request.GET_FEATURES)
        front.send(Request.SET_VRING_KICK, UINT64.pack(0), [file.fileno()])
        front.send(Request.GET_FEATURES)
        counts = []
        for message in back.receive():
            counts.append(len(message.fds))
            for fd in message.fds:
                assert os.path.sameopenfile(fd, file.fileno())
                assert not os.get_inheritable(fd)
        assert counts == [0, 1, 0]


def test_descriptors_of_a_message_in_pieces() -> None:
    with connected() as (front, back), files(2) as fds:
        wire = MESSAGE_HEADER.pack(Header(Request.SET_FEATURES, VERSION, 8)) + UINT64.pack(0)
        front.send_bytes(wire[:1], fds)
        assert list(back.receive()) == []
        for i in range(1, len(wire) - 1):
            front.send_bytes(wire[i : i + 1])
            assert list(back.receive()) == []
        front.send_bytes(wire[-1:])
        assert [len(message.fds) for message in back.receive()] == [2]


def test_as_many_descriptors_as_the_kernel_carries() -> None:
    with connected() as (front, back), files(1) as [fd]:
        front.send(Request.GET_FEATURES, fds=[fd] * MAX_FDS)
        assert [(len(set(m.fds)), m.fault) for m in back.receive()] == [(MAX_FDS, None)]


def test_more_descriptors_than_one_message_can_have() -> None:
    with connected() as (front, back), files(1) as [fd]:
        before = open_fds()
        wire = MESSAGE_HEADER.pack(Header(Request.SET_FEATURES, VERSION, 8)) + UINT64.pack(0)
        for i in range(len(wire)):
            front.send_bytes(wire[i : i + 1], [fd] * MAX_FDS)
            seen = list(back.receive())
            assert len(open_fds() - before) <= MAX_FDS
        [message] = seen
        assert message.fault == "more than 253 descriptors"
        front.send(Request.GET_FEATURES)
        assert [m.fault for m in back.receive()] == [None]


def test_descriptors_that_the_kernel_could_not_deliver() -> None:
    with connected() as (front, back), files(10) as fds:
        front.send(Request.SET_VRING_KICK, UINT64.pack(0), fds)
        front.send(Request.GET_FEATURES)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(fds[0])
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
        try:
            faults = [(message.fds, message.fault) for message in back.receive()]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        lost = "descriptors were lost: the limit of open files is too low"
        assert faults == [((), lost), ((), None)]


@pytest.mark.parametrize("cut", range(20))
def test_end_in_the_middle(cut: int) -> None:
    wire = MESSAGE_HEADER.pack(Header(Request.SET_VRING_KICK, VERSION, 8)) + UINT64.pack(0)
    with connected() as (front, back), files(3) as fds:
        if cut:
            front.send_bytes(wire[:cut], fds)
        front.close()
        with pytest.raises(EOFError):
            list(back.receive())


def test_end_after_a_message() -> None:
    with connected() as (front, back), files(1) as fds:
        front.send(Request.GET_FEATURES, fds=fds)
        front.close()
        messages = back.receive()
        assert next(messages).header.request == Request.GET_FEATURES
        with pytest.raises(EOFError):
            next(messages)
        with pytest.raises(EOFError):
            back.send(b"a reply to nobody")


def test_a_reset_is_an_end() -> None:
    with connected() as (front, back):
        back.send(b"unread")  # makes the kernel answer close with ECONNRESET
        front.close()
        with pytest.raises(EOFError):
            list(back.receive())


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 100_000, MAX_DISCARD])
def test_large_payloads_are_read_and_dropped(size: int) -> None:
    with connected() as (front, back), files(2) as fds:
        sender = threading.Thread(target=front.send, args=(9999, bytes(size), fds))
        sender.start()
        while not (seen := list(back.receive())):
            pass
        sender.join()
        [message] = seen
        assert message.payload == b""
        assert message.fault == f"{size} payload bytes are too many"
        front.send(Request.SET_FEATURES, bytes(MAX_PAYLOAD))
        [message] = back.receive()
        assert (message.payload, message.fault) == (bytes(MAX_PAYLOAD), None)


@pytest.mark.parametrize("size", [MAX_DISCARD + 1, (1 << 32) - 1])
def test_beyond_all_measure_framing_is_lost(size: int) -> None:
    with connected() as (front, back), files(2) as fds:
        front.send(9999, b"", fds, size=size)
        with pytest.raises(FramingLost, match=f"claims {size} payload bytes"):
            list(back.receive())


def test_a_turn_is_bounded() -> None:
    with connected() as (front, back):
        front.send_bytes(100 * MESSAGE_HEADER.pack(Header(Request.GET_FEATURES, VERSION, 0)))
        assert len(list(back.receive())) == 64
        assert len(list(back.receive())) == 36


def test_descriptors_are_closed_when_their_turn_ends_badly() -> None:
    with connected() as (front, back), files(3) as fds:
        front.send(Request.GET_FEATURES, fds=fds)
        front.send(Request.GET_FEATURES)
        before = open_fds()
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            for _message in back.receive():
                raise ZeroDivisionError
        assert open_fds() == before
        assert len(list(back.receive())) == 1


def test_replies_that_nobody_reads() -> None:
    with connected() as (_front, back), pytest.raises(FramingLost, match="does not read"):
        back.send(bytes(1 << 24))


def test_a_long_reply_arrives_whole() -> None:
    with connected() as (front, back):
        front.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        body = os.urandom(1 << 20)
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(front.receive(1)))
        reader.start()
        back.send(struct.pack("=III", 1, 5, len(body)) + body)
        reader.join()
        assert received == [body]


wires = st.lists(
    st.tuples(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda request, flags, payload, lie: (
                    MESSAGE_HEADER.pack(Header(request, flags, max(0, len(payload) + lie)))
                    + payload
                ),
                st.integers(0, 50),
                st.sampled_from([VERSION, VERSION | NEED_REPLY, 2]),
                st.binary(max_size=40),
                st.sampled_from([0] * 9 + [1, -1, 5000, 1 << 21]),
            ),
        ),
        st.integers(0, 4),
    ),
    max_size=12,
)


@pytest.mark.threat("t_vhost_fuzz")
@settings(max_examples=200, deadline=None)
@given(wires)
def test_whatever_arrives_nothing_leaks(script: list[tuple[bytes, int]]) -> None:
    session = BackendSession(CONFIG_SPACE)
    before = open_fds()
    with connected() as (front, back), files(4) as fds:
        try:
            for wire, count in script:
                if wire:
                    front.send_bytes(wire, fds[:count])
                for message in back.receive():
                    assert len(message.payload) == message.header.size or message.fault
                    session.handle(message)
        except (EOFError, FramingLost):
            pass
    assert_open(before)


# A whole back end in miniature: what device.py does, without a ring.


class Miniature:
    """Serves one connection in a thread; keeps the kick, and refuses regions as it is told."""

    def __init__(self, sock: socket.socket) -> None:
        self.session = BackendSession(CONFIG_SPACE)
        self.refuse_regions = False
        self.refusals: list[tuple[str, str]] = []
        self._kick: int | None = None
        self._front = FrontEnd(sock)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                select.select([self._front], [], [])
                for message in self._front.receive():
                    self._serve(message)
        except (EOFError, FramingLost):
            self._front.close()
            self._set_kick(None)

    def _serve(self, message: Message) -> None:
        step = self.session.handle(message)
        try:
            match step.effect:
                case SetKick(fd):
                    self._set_kick(None if fd is None else os.dup(fd))
                case AddRegion() if self.refuse_regions:
                    raise Refused("mmap: no memory")
        except Refused as refusal:
            step = self.session.refuse(step, str(refusal))
        if step.refusal is not None:
            self.refusals.append((message.name, step.refusal))
        if step.reply is not None:
            self._front.send(step.reply)

    def _set_kick(self, fd: int | None) -> None:
        if self._kick is not None:
            os.close(self._kick)
        self._kick = fd


@contextmanager
def served() -> Iterator[tuple[FakeFrontEnd, Miniature]]:
    theirs, ours = socket.socketpair()
    back = Miniature(ours)
    try:
        with FakeFrontEnd(theirs) as front:
            yield front, back
    finally:
        back.join()


@contextmanager
def guest() -> Iterator[tuple[SharedRegion, Ring]]:
    memory = os.memfd_create("guest")
    os.ftruncate(memory, SIZE)
    with files(2) as (kick, call):
        ring = Ring(128, desc=UA, avail=UA + 0x1000, used=UA + 0x2000, kick=kick, call=call)
        yield SharedRegion(GPA, SIZE, UA, 0, memory), ring
    os.close(memory)


def test_qemu_over_a_socket() -> None:
    with served() as (front, back), guest() as (region, ring):
        front.connect()
        assert front.get_config(8) == CONFIG_SPACE + b"\0\0"
        for base in (0, 5, 0xFFFF):
            assert front.start([region], ring, base) == 0
            assert back.session.state.runnable
            assert front.stop() == base
        assert front.start([], ring) == 1
        assert "share=on" in back.refusals[-1][1]
        front.connect()
        assert front.start([region], ring) == 0


def test_user_mode_linux_over_a_socket() -> None:
    with served() as (front, back), guest() as (region, ring):
        front.connect_uml()
        for _probe in range(2):
            assert front.start_uml(region, ring) == 0
            assert back.session.state.runnable
            assert front.get_config(6) == CONFIG_SPACE
            front.stop_uml()
            assert not back.session.state.runnable
        assert back.refusals == []


def test_a_region_that_cannot_be_mapped_is_refused() -> None:
    with served() as (front, back), guest() as (region, ring):
        front.connect()
        back.refuse_regions = True
        assert front.add_region(region) == 1
        assert back.refusals == [("ADD_MEM_REG", "mmap: no memory")]
        assert front.remove_region(region) == 1
        back.refuse_regions = False
        assert front.start([region], ring) == 0


@pytest.mark.threat("t_vhost_fuzz")
def test_hostile_messages_do_not_end_the_conversation() -> None:
    with served() as (front, back), guest() as (region, ring), files(4) as fds:
        front.connect()
        assert front.start([region], ring) == 0
        state = back.session.state
        for request in (*Request, 0, 46, 9999):
            for size in (1, 7, 9, 39, 41, 4096):
                for count in (0, 2, 4):
                    body = front.request(request, bytes(size), fds[:count], need_reply=True)
                    rule = REQUESTS.get(request)
                    no = UINT64.pack(1) if rule is None or rule.refusal is None else rule.refusal
                    assert body == no, request
        assert back.session.state == state
        assert front.ack(9999, bytes(100_000), fds) == 1
        assert front.get(Request.GET_QUEUE_NUM) == 1
        assert front.stop() == 0
