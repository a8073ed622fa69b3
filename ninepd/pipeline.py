"""The way of one request: from the available ring to the used ring, on the thread that serves it.

    wait (C)      a batch of requests: chains checked, headers copied out of guest memory
    _request      header -> message; anything wrong with it -> the errno that the guest is told
    row.serve     ops/: the system calls; data moves between file and guest pages in C
    finish        reply -> bytes in the slot's reply buffer (answers.py)
    push (C)      replies scattered, used entries published, at most one notification

A request that is known to wait leaves the thread at ``_hand_over`` and comes back through
``_complete`` (jobs.py). One that turns out to wait keeps the thread, and loses the ring (turns.py).

Each request is answered exactly once. A Tflush of a request that is out is answered right behind
it, never before: the client frees the request's memory when it sees the Rflush (net/9p/client.c,
p9_client_flush).
"""

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from ninepd.errors import ProtocolError, to_errno
from ninepd.export.handles import Handle
from ninepd.framing import is_sound, refusal
from ninepd.jobs import Job
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Service
from ninepd.ops.replies import Later, Payload, Reply
from ninepd.ops.table import ROWS, Row
from ninepd.p9.messages import (
    HEADER_SIZE,
    IO_HEADER,
    NUMBERS,
    RLERROR_SIZE,
    WRITE_HEADER,
    Rflush,
    Tattach,
    Tclunk,
    Tflush,
    Tgetlock,
    Tlock,
    Tread,
    Treaddir,
    Tremove,
    Tversion,
    Twrite,
)
from ninepd.payload import Buffers, ChainPayload, PrivatePayload
from ninepd.turns import Turn, Turns
from ninepd.vring import DirtyLog, GuestMemory, Vring, Watch
from ninepd.workers import Workers

log = logging.getLogger(__name__)
trace = logging.getLogger("ninepd.trace")

_MOVES_DATA: Final = frozenset({Tread, Treaddir, Twrite})
"""Messages whose handlers may touch guest memory."""
_LOCKS: Final = frozenset({Tlock, Tgetlock})
_CLUNKS: Final = frozenset({Tclunk, Tremove})
_SEGMENTS: Final = 1024
"""Descriptors in one indirect table, or in a chain of a ring that is larger."""
_PAGE: Final = 4096


class RingSetup(NamedTuple):
    """What a ring is like."""

    num: int
    """Its size."""
    indirect: bool
    """May chains lie in tables of their own?"""
    poll_us: int
    """How long to look for requests before sleeping, at most."""
    name: str
    """In the log."""


class Pipeline(Turns):
    """The request engine on one ring.

    ``start``, ``pause``, ``relocate``, ``set_log``, ``set_call`` and ``close`` are the loop's; all
    else runs on whichever thread serves the ring. A pause leaves the ring as it is, so that
    ``start`` may go on with it; what is out then is answered after that, or dropped by ``close``.
    """

    def __init__(
        self,
        service: Service,
        vring: Vring,
        watch: Watch,
        workers: Workers,
        setup: RingSetup,
    ) -> None:
        num = setup.num
        handles = service.guest.tree.handles
        super().__init__(
            vring,
            watch,
            workers,
            handles.budget,
            workers_max=service.limits.workers_max,
            poll_us=setup.poll_us,
            name=setup.name,
        )
        self._service = service
        self._header_stride = vring.header_stride
        self._payloads: list[ChainPayload | None] = [None] * num
        self._buffers = Buffers()
        segments = max(num, _SEGMENTS) if setup.indirect else num
        # Request, reply and one page of slop, as the Linux driver counts (trans_virtio.c).
        self._msize_limit = (segments - 3) * _PAGE
        self._tracing = service.traced
        self._handles = handles
        self._volumes = handles.volumes
        self._follow_session()
        # The request that is being served; see Turn.claim.
        self._tag = 0
        self._message: Any = None
        self._fid: Fid | None = None
        self._other: Fid | None = None

    # On the loop thread

    @property
    def next_avail(self) -> int:
        """The available index that comes next; exact while the ring rests."""
        return self._vring.counters.last_avail

    @property
    def jobs(self) -> int:
        """Requests that are out."""
        return len(self._jobs)

    def start(self) -> None:
        self._follow_session()
        super().start()

    def relocate(self, memory: GuestMemory) -> None:
        """Guest memory has changed, while the ring rests; RingBroken if the ring is not in it."""
        self._vring.relocate(memory)

    def continues(self) -> bool:
        """Has the guest left the ring as it was, while it rested?"""
        return self._vring.continues()

    def set_log(self, log: DirtyLog | None, used_gpa: int | None) -> None:
        """Log what is written to guest memory, or not. While the ring rests."""
        self._vring.set_log(log, used_gpa)

    def set_call(self, fd: int) -> None:
        """Notify the guest through another descriptor, or not at all (-1)."""
        self._vring.set_call(fd)

    # Serving

    def _payload(self, head: int) -> ChainPayload:
        payload = self._payloads[head]
        if payload is None:
            payload = self._payloads[head] = ChainPayload(self._vring, head)
        return payload

    def _follow_session(self) -> None:
        """Look up what each request needs to know of the session, which may be a new one."""
        self._guest = guest = self._service.guest
        self._answers.session = guest.session
        self._msize = guest.session.msize
        self._rows = ROWS[guest.session.dialect]

    def _serve_batch(self, turn: Turn) -> bool:
        self._answers.tracing = self._tracing = self._service.traced
        for entry in self._batch:
            head, readable, writable, copied, fault, size, number, tag = entry
            if not self._request(turn, head, readable, writable, copied, fault, size, number, tag):
                return False
        return True

    def _request(
        self,
        turn: Turn,
        head: int,
        readable: int,
        writable: int,
        copied: int,
        fault: int,
        size: int,
        number: int,
        tag: int,
    ) -> bool:
        """Serve one request; False if the ring was lost over it."""
        if copied < HEADER_SIZE or writable < RLERROR_SIZE:
            log.info("%s: request dropped: no header, or no room for a reply", self._name)
            self._answers.drop(head)
            return True
        guest = self._guest
        jobs = self._jobs
        payload = self._payloads[head]
        if payload is None:
            payload = self._payload(head)
        payload.room = (self._msize if 0 < self._msize < writable else writable) - IO_HEADER
        payload.available = readable - WRITE_HEADER
        payload.uses = 0
        if self._budget.crowded:
            entry = (head, readable, writable, copied, fault, size, number, tag)
            if not self._make_room(turn, entry):
                return False
        try:
            row = self._rows.get(number)
            if (
                row is None
                or fault
                or not is_sound(row, self._msize, readable, writable, copied, size)
            ):
                raise refusal(row, self._msize, readable, writable, fault, size, number)
            start = head * self._header_stride
            end = start + (size if size < copied else copied)
            message = row.codec.decode(self._vring.headers, start + HEADER_SIZE, end)
            if row.header_limit and message.nbytes > size - row.header_limit:
                raise ProtocolError(f"a Twrite of {size} bytes has no {message.nbytes} of data")
            if self._tracing:
                extra = {"p9_tag": tag, "p9_message": message}
                trace.debug("%s: tag %d %s", self._name, tag, message, extra=extra)
            if jobs.by_tag and jobs.find(tag) is not None:
                raise ProtocolError(f"tag {tag} is in use")
            if row.handler is None:
                self._session_message(head, tag, message)
                return True
            fid = row.fid(guest.session, message)
            other = row.other(guest.session, message)
            if jobs.by_tag or self._volumes.remote:
                fids = _listed(fid, other)
                if self._must_leave(row, message, fids):
                    work = partial(row.serve_held, guest, message, fid, other)
                    self._hand_over(head, tag, message, fids, work)
                    return True
        except Exception as error:
            self._answer(head, tag, self._error(tag, error))
            return True
        self._tag, self._message, self._fid, self._other = tag, message, fid, other
        self._begun += 1
        claim = turn.claim
        claim.append(head)
        try:
            reply = row.serve(guest, message, payload, fid, other)
        except Exception as error:
            reply = self._error(tag, error)
        if claim.pop() is None:
            self._be_late(turn, reply)
            return False
        if payload.pins:
            self._handles.unpin(payload.pins)
        if isinstance(reply, Later):
            self._hand_over(head, tag, message, _listed(fid, other), reply.work)
        else:
            self._answers.finish(head, tag, reply, payload.room + IO_HEADER)
        return True

    def _answer(self, head: int, tag: int, reply: Reply) -> None:
        self._answers.finish(head, tag, reply, self._payload(head).room + IO_HEADER)

    def _error(self, tag: int, error: Exception) -> Reply:
        """What the guest is told of an error; one that is no OSError is a bug of ours."""
        if isinstance(error, OSError):
            if self._tracing:
                extra = {"p9_tag": tag}
                trace.debug("%s: tag %d because: %s", self._name, tag, error, extra=extra)
            return self._guest.session.error(to_errno(error))
        log.error("%s: a bug made a request fail", self._name, exc_info=error)
        return self._guest.session.error(errno.EIO)

    def _must_leave(self, row: Row, message: Any, fids: list[Fid]) -> bool:
        """Is it on storage that may hang, or does it have to wait for others that are?"""
        for fid in fids:
            if fid.handle.remote:
                return True
        if row.message is Tattach and self._guest.tree.root.remote:
            return True
        exclusive, locks = row.is_exclusive(message, fids), _locks(message, fids)
        changes = row.may_change or row.message is Twrite
        return self._jobs.must_wait(message, fids, exclusive, locks, changes)

    # Requests that leave, and come back

    def _hand_over(
        self, head: int, tag: int, message: Any, fids: list[Fid], work: Callable[[Payload], Reply]
    ) -> None:
        try:
            private = self._private(self._payload(head), message)
        except OSError as error:
            self._answer(head, tag, self._error(tag, error))
            return
        self._service.stats.numbers.hand_overs += 1
        locks = _locks(message, fids)
        self._jobs.add(self._job(head, tag, message, fids, private, work, locks))

    def _private(self, slot: ChainPayload, message: Any) -> PrivatePayload:
        private = PrivatePayload(slot.room, self._buffers)
        if type(message) is Twrite:
            private.fill(slot, message.nbytes)
        private.pins, slot.pins = slot.pins, []
        private.uses = 1
        return private

    def _job(
        self,
        head: int,
        tag: int,
        message: Any,
        fids: list[Fid],
        payload: Payload,
        work: Callable[[Payload], Reply] | None,
        locks: Handle | None = None,
    ) -> Job:
        row = self._rows[NUMBERS[type(message)]]
        return Job(
            head,
            tag,
            self._guest,
            message,
            fids,
            payload,
            work,
            bool(fids) and row.is_exclusive(message, fids),
            locks,
        )

    def _job_under_way(self, head: int) -> Job:
        fids = _listed(self._fid, self._other)
        message, payload = self._message, self._payload(head)
        payload.uses = 1
        # A clunk may have given up its locks, or be about to: who knows.
        locks = fids[0].handle if type(message) in _LOCKS | _CLUNKS else None
        job = self._job(head, self._tag, message, fids, payload, None, locks)
        job.moves_data = type(message) in _MOVES_DATA
        return job

    def _take_data(self, job: Job) -> None:
        job.payload = self._private(self._payload(job.head), job.message)

    def _session_message(self, head: int, tag: int, message: Any) -> None:
        if isinstance(message, Tflush):
            job = self._jobs.find(message.oldtag)
            if job is None:
                self._answer(head, tag, Rflush())
            else:
                self._jobs.follow(job, head, tag)
            return
        job = self._job(head, tag, message, [], self._private(self._payload(head), message), None)
        # A new session must not see replies of the old one.
        job.last = partial(self._version, message)
        if self._jobs.by_tag:
            self._jobs.add(job)
        else:
            self._complete(job)

    def _version(self, message: Tversion) -> Reply:
        """A new session; the old one ends before the answer, if no storage keeps it from that."""
        old = self._service.renew()
        reply: Reply
        try:
            reply = self._service.guest.version(message, self._msize_limit)
        except OSError as error:
            reply = self._service.guest.session.error(to_errno(error))
        self._follow_session()
        if self._volumes.remote:
            if not self._workers.start(old.end):
                old.end()
            return reply
        return Later(lambda _payload: _first(old.end, reply))

    def _take_stock(self) -> None:
        self._service.take_stock()

    def _complete(self, job: Job) -> None:
        """Answer a job. The last of a session may have more to do."""
        if job.last is not None:
            job.reply = job.last()
            if isinstance(job.reply, Later):
                job.last, job.work = None, job.reply.work
                self._jobs.add(job)
                return
        if isinstance(job.payload, PrivatePayload):
            try:
                job.payload.deliver(self._payload(job.head))
            except OSError as error:
                self._answers.cannot(job.head, error)
            else:
                self._answer(job.head, job.tag, job.reply)
            job.payload.close()
        else:
            self._answer(job.head, job.tag, job.reply)
        for head, tag in job.flushes:
            self._answer(head, tag, Rflush())


def _listed(fid: Fid | None, other: Fid | None) -> list[Fid]:
    """Each once."""
    if fid is None:
        return []
    return [fid] if other is None or other is fid else [fid, other]


def _locks(message: Any, fids: list[Fid]) -> Handle | None:
    """The inode whose locks it works on, which it must have to itself (ops/locks.py).

    A clunk gives up those of its fid, also those that a request which is out will have taken.
    """
    kind = type(message)
    if kind in _LOCKS:
        return fids[0].handle
    if kind in _CLUNKS and (fids[0].locks or fids[0].users):
        return fids[0].handle
    return None


def _first(before: Callable[[], None], reply: Reply) -> Reply:
    before()
    return reply
