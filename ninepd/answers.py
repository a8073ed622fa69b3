"""Replies on their way into the ring: encoded into their slots, and published in a batch."""

import errno
import logging
from typing import Final

from mypy_extensions import i64

from ninepd.errors import words_for
from ninepd.ops.fid import Fid
from ninepd.ops.replies import Encoded, Reply
from ninepd.p9.codecs import FixedCodec
from ninepd.p9.messages import (
    CODEC_OF,
    CODECS,
    HEADER_SIZE,
    WITH_DATA,
    Rerror,
    RerrorPlain,
)
from ninepd.p9.session import Session
from ninepd.vring import Vring, done_entry

log = logging.getLogger(__name__)
trace = logging.getLogger("ninepd.trace")

_IN_WORDS: Final = frozenset({Rerror, RerrorPlain})
"""Errors that are cut to what room there is. An Rlerror always fits."""


class Answers:
    """Those of one ring. For the thread that serves it."""

    def __init__(self, vring: Vring, name: str) -> None:
        self._vring = vring
        self._name = name
        self._stride = vring.reply_stride
        self._replies = vring.replies
        self.tracing = False
        """Is each reply to be logged?"""
        self._done: list[i64] = []
        self.session: Session[Fid] = Session(words_for, 0)
        """That the replies belong to: in its dialect errors are told."""

    def publish(self) -> None:
        """Let the guest have all that are finished, with one notification at most."""
        if self._done:
            self._vring.push(self._done)
            self._done.clear()

    def finish(self, slot: int, tag: int, reply: Reply, room: int) -> None:
        """Encode a reply of at most ``room`` bytes; one that does not fit becomes an error."""
        if self.tracing:
            readable = self._readable(slot, reply)
            extra = {"p9_tag": tag, "p9_message": readable}
            trace.debug("%s: tag %d %s", self._name, tag, readable, extra=extra)
        if isinstance(reply, Encoded):
            # Its space was checked beforehand, like that of all replies of a fixed size.
            size = HEADER_SIZE + reply.size
            self._push(slot, reply.number, size, size)
            return
        kind = type(reply)
        codec = CODEC_OF[kind]
        body_at = slot * self._stride + HEADER_SIZE
        if isinstance(codec, FixedCodec):
            size = HEADER_SIZE + codec.size
            codec.place(self._replies, body_at, reply)
            self._push(slot, codec.number, size, size + reply.nbytes if kind in WITH_DATA else size)
            return
        body = codec.encode(reply)
        size = HEADER_SIZE + len(body)
        if size > room:
            self._finish_too_long(slot, tag, reply, room, size - room)
        elif size <= self._stride:
            self._replies[body_at : body_at + len(body)] = body
            self._push(slot, codec.number, size, size)
        else:
            self._finish_long(slot, codec.number, body)

    def drop(self, slot: int) -> None:
        """Return a request without a reply."""
        self._push(slot, 0, 0, 0)

    def cannot(self, slot: int, error: OSError) -> None:
        """The guest's memory went away, and with it the place for a reply."""
        log.info("%s: a reply cannot be delivered: %s", self._name, error)
        self.drop(slot)

    def _push(self, slot: int, number: int, copy: int, used: int) -> None:
        """A reply is ready: C writes its header, and copies ``copy`` of its ``used`` bytes."""
        self._done.append(done_entry(slot, number, copy, used))

    def _finish_long(self, slot: int, number: int, body: bytes) -> None:
        """The body of a reply that is longer than its buffer goes straight to the guest."""
        try:
            self._vring.scatter(slot, HEADER_SIZE, body)
        except OSError as error:
            self.cannot(slot, error)
        else:
            self._push(slot, number, HEADER_SIZE, HEADER_SIZE + len(body))

    def _finish_too_long(self, slot: int, tag: int, reply: Reply, room: int, excess: int) -> None:
        if type(reply) not in _IN_WORDS:
            self.finish(slot, tag, self.session.error(errno.EMSGSIZE), room)
        elif reply.ename:
            self.finish(slot, tag, reply._replace(ename=reply.ename[:-excess]), room)
        else:
            self.drop(slot)

    def _readable(self, slot: int, reply: Reply) -> Reply:
        """For the trace: what C has encoded is decoded again."""
        if not isinstance(reply, Encoded):
            return reply
        start = slot * self._stride + HEADER_SIZE
        return CODECS[reply.number].decode(self._replies, start, start + reply.size)
