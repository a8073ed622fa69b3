"""The vhost-user socket and session: a front end that sends what it likes, with real descriptors.

An input is a run of messages: ``Sent``, then its payload. Whatever comes, no exception leaves the
session, an answer is due or not by the tables, a refusal changes nothing, and afterwards as many
descriptors are open as before.
"""

import array
import contextlib
import os
import socket
from collections.abc import Callable
from random import Random
from struct import Struct
from typing import Final, NamedTuple
from unittest.mock import patch

from ninepd import foreign
from ninepd.errors import FramingLost
from ninepd.frontend import FrontEnd
from ninepd.vhostuser.messages import (
    MESSAGE_HEADER,
    NEED_REPLY,
    REPLY,
    REQUESTS,
    UINT64,
    VERSION,
    Header,
    Message,
    Request,
)
from ninepd.vhostuser.session import BackendSession, RingFault, Step
from ninepd.vhostuser.state import check_regions

from . import grammar

Mutate = Callable[[bytes, int], bytes]

_HEAD: Final = Struct("<BBBBH")
_CONFIG_SPACE: Final = b"\4\0home"
_POOL: Final[list[int]] = []
"""Descriptors to send: one of each kind that matters."""


class Sent(NamedTuple):
    """How a message is sent. ``lie``: what is added to its size, of 8 bits with a sign.

    ``outcome``: bits of what becomes of it. 1: the effect fails. 2: the ring is found broken. 4: a
    pause in the middle of the message.
    """

    request: int
    flags: int
    fds: int
    lie: int
    payload_size: int

    @property
    def outcome(self) -> int:
        return self.flags >> 5


def _descriptors(count: int) -> "array.array[int]":
    if not _POOL:
        file = os.memfd_create("fuzz")
        os.ftruncate(file, 1 << 16)
        _POOL.extend((file, os.eventfd(0), os.open("/dev/null", os.O_RDWR), *os.pipe()))
    return array.array("i", (_POOL[at % len(_POOL)] for at in range(min(count, 253))))


def _send(peer: socket.socket, data: bytes, fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _descriptors(fds))] if fds else []
    if data:
        peer.sendmsg([data], rights)


def _check(session: BackendSession, message: Message, step: Step) -> None:
    """What must be so after any message."""
    rule = REQUESTS.get(message.header.request)
    needs_reply = bool(message.header.flags & NEED_REPLY)
    if step.refusal is not None:
        assert session.state == step.before
        assert step.effect is None or isinstance(step.effect, RingFault)
    if needs_reply and rule is None:
        assert step.reply is not None
    if step.reply is not None:
        header = MESSAGE_HEADER.unpack(step.reply[:12])
        assert header.request == message.header.request
        assert header.flags == VERSION | REPLY
        assert header.size == len(step.reply) - 12
        if needs_reply and (rule is None or rule.refusal is None):
            assert bool(UINT64.unpack(step.reply[12:])) == (step.refusal is not None)
    for lent in (getattr(step.effect, "fd", None), *getattr(step.effect, "fds", ())):
        assert lent is None or lent in message.fds
    if session.state.regions:
        check_regions(session.state.regions)
    if session.state.runnable:
        assert session.state.ring_fault() is None


def _handle(session: BackendSession, message: Message, outcome: int) -> bytes | None:
    for fd in message.fds:
        os.fstat(fd)  # they are open while it is their turn
    step = session.handle(message)
    _check(session, message, step)
    if outcome & 1 and step.effect is not None and step.refusal is None:
        step = session.refuse(step, "the effect failed")
        assert session.state == step.before
    if outcome & 2 and session.state.runnable:
        session.mark_broken()
        assert not session.state.runnable
    elif session.state.runnable:
        session.parked_at(message.header.size & 0xFFFF)
    return step.reply


def _converse(data: bytes, peer: socket.socket, front_end: FrontEnd) -> None:
    session = BackendSession(_CONFIG_SPACE)
    while len(data) >= _HEAD.size:
        sent = Sent(*_HEAD.unpack_from(data))
        payload = data[_HEAD.size :][: sent.payload_size]
        data = data[_HEAD.size + len(payload) :]
        size = max(len(payload) + (sent.lie ^ 0x80) - 0x80, 0)
        if sent.lie == 0x7F:
            size <<= 16
        wire = MESSAGE_HEADER.pack(Header(sent.request, sent.flags & 31, size)) + payload
        cut = len(wire) // 2 if sent.outcome & 4 else len(wire)
        for piece, fds in ((wire[:cut], sent.fds), (wire[cut:], sent.fds % 3)):
            _send(peer, piece, fds)
            for message in front_end.receive():
                reply = _handle(session, message, sent.outcome)
                if reply is not None:
                    front_end.send(reply)
                    peer.recv(1 << 16)


def one_input(data: bytes) -> None:
    _descriptors(0)
    peer, theirs = socket.socketpair()
    peer.settimeout(0)
    before = len(os.listdir("/proc/self/fd"))
    front_end = FrontEnd(theirs)
    # They part: the message at hand, and what is still in the socket, are closed with it.
    with patch.object(foreign, "close", os.close):  # not on another thread: they are counted here
        with contextlib.suppress(EOFError, FramingLost, BlockingIOError):
            _converse(data, peer, front_end)
        front_end.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    peer.close()


def _message(rng: Random) -> bytes:
    """By its row of REQUESTS: of the right size, with the right descriptors, or nearly."""
    request = rng.choice(tuple(Request))
    sizes = {
        Request.SET_MEM_TABLE: 8 + 32 * rng.randrange(3),
        Request.SET_VRING_ADDR: 40,
        Request.ADD_MEM_REG: 40,
        Request.REM_MEM_REG: 40,
        Request.SET_LOG_BASE: 16,
        Request.GET_CONFIG: 12 + rng.randrange(8),
    }
    payload = b"".join(
        grammar.number(rng, 64).to_bytes(8, "little")
        for _ in range(-(-sizes.get(request, rng.choice((0, 8))) // 8))
    )[: sizes.get(request, 8)]
    if request is Request.SET_MEM_TABLE:
        payload = ((len(payload) - 8) // 32).to_bytes(8, "little") + payload[8:]
    flags = (
        VERSION | rng.choice((0, NEED_REPLY)) | (rng.randrange(8) << 5 if rng.randrange(2) else 0)
    )
    lie = rng.choice((0, 0, 0, 0, 1, 0xFF, 0x7F))
    fds = rng.choice((0, 1, 1, 2, len(payload) // 32))
    return _HEAD.pack(request, flags, fds, lie, len(payload)) + payload


def mutator(data: bytes, max_size: int, seed: int, mutate: Mutate) -> bytes:
    """Messages are added, dropped, swapped; or ``mutate`` has its way."""
    rng = Random(seed)
    messages = []
    rest = data
    while len(rest) >= _HEAD.size:
        size = _HEAD.size + Sent(*_HEAD.unpack_from(rest)).payload_size
        messages.append(rest[:size])
        rest = rest[size:]
    kind = rng.randrange(6)
    at = rng.randrange(len(messages) + 1)
    if kind == 0:
        messages.insert(at, _message(rng))
    elif kind == 1 and messages:
        messages.insert(at, rng.choice(messages))
    elif kind == 2 and at < len(messages):
        del messages[at]
    elif kind == 3 and at < len(messages):
        head, payload = messages[at][: _HEAD.size], messages[at][_HEAD.size :]
        changed = mutate(payload, 4096)
        sent = Sent(*_HEAD.unpack(head))
        messages[at] = _HEAD.pack(*sent[:4], len(changed)) + changed
    else:
        return mutate(data, max_size)
    return b"".join(messages)[:max_size]
