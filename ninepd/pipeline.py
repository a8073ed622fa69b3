"""The way of one request: from the available ring to the used ring, on the thread that serves it.

    wait (C)      a batch of requests: chains checked, headers copied out of guest memory
    _request      header -> message; anything wrong with it -> the errno that the guest is told
    row.serve     ops/: the system calls; data moves between file and guest pages in C
    finish        reply -> bytes in the slot's reply buffer (answers.py)
    push (C)      replies scattered, used entries published, at most one notification

A request that is known to wait leaves the thread at ``_hand_over`` and comes back through
``_complete`` (jobs.py). One that turns out to wait keeps the thread, and loses the ring: the
watcher makes a job of it, and another thread goes on with the batch.

    Turn.claim    holds the slot of the request that is being served. Whoever pops it decides what
                  becomes of the request: the serving thread, when it has come back with the reply,
                  or the watcher, when it has not. Popping from a list is atomic, and costs nothing.

Each request is answered exactly once. A Tflush of a request that is out is answered right behind
it, never before: the client frees the request's memory when it sees the Rflush (net/9p/client.c,
p9_client_flush).
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, Final

from mypy_extensions import i64

from ninepd.answers import Answers
from ninepd.errors import ProtocolError, RingBroken, to_errno
from ninepd.export.handles import Handle
from ninepd.framing import is_sound, refusal
from ninepd.jobs import Job, Jobs
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
from ninepd.vring import REQUEST, DirtyLog, GuestMemory, Vring, Watch
from ninepd.workers import Workers

log = logging.getLogger(__name__)
trace = logging.getLogger("ninepd.trace")

_MOVES_DATA: Final = frozenset({Tread, Treaddir, Twrite})
"""Messages whose handlers may touch guest memory."""
_LOCKS: Final = frozenset({Tlock, Tgetlock})
_CLUNKS: Final = frozenset({Tclunk, Tremove})
_NO_SLOT: Final = -1
"""A claim on no request: room is made for the next one."""
_SEGMENTS: Final = 1024
"""Descriptors in one indirect table, or in a chain of a ring that is larger."""
_PAGE: Final = 4096


class Turn:
    """One thread's turn at the ring. If the turn was taken from it, ``job`` is its request."""

    __slots__ = ("claim", "job")

    def __init__(self) -> None:
        self.claim: list[int | None] = [None, None, None]
        """Behind the Nones the slot of the request that it serves. Its own: whoever comes back late
        must not take that of the thread that serves the ring by then. With the Nones the list never
        becomes so short that Python gives its memory back, only to ask for it again."""
        self.job: Job | None = None


class Pipeline:
    """The request engine on one ring.

    ``start``, ``pause``, ``relocate``, ``set_call`` and ``close`` are the loop's; all else runs on
    whichever thread serves the ring, or where it says so. A pause leaves the ring as it is, so that
    ``start`` may go on with it; what is out then is answered after that, or dropped by ``close``.
    """

    def __init__(
        self,
        service: Service,
        vring: Vring,
        watch: Watch,
        workers: Workers,
        *,
        num: int,
        indirect: bool,
        poll_us: int,
        name: str,
    ) -> None:
        self._service = service
        self._vring = vring
        self._watch = watch
        self._workers = workers
        self._poll_us = poll_us
        self._name = name
        self._header_stride = vring.header_stride
        self._answers = Answers(vring, name)
        self._payloads: list[ChainPayload | None] = [None] * num
        self._buffers = Buffers()
        segments = max(num, _SEGMENTS) if indirect else num
        # Request, reply and one page of slop, as the Linux driver counts (trans_virtio.c).
        self._msize_limit = (segments - 3) * _PAGE
        self._tracing = trace.isEnabledFor(logging.DEBUG)
        handles = service.guest.tree.handles
        self._handles = handles
        self._budget = handles.budget
        self._volumes = handles.volumes
        self._jobs = Jobs(name, workers, vring.wake)
        self._follow_session()
        self._batch: Iterator[tuple[int, ...]] = iter(())
        """What is left of it: the next to serve the ring goes on with that."""
        self._stopping = False
        self._deadline = 0.0
        """Until when a pause waits for requests that are out."""
        self._watched = False
        # The request that is being served; see Turn.claim.
        self._begun: i64 = 0
        self._tag = 0
        self._message: Any = None
        self._fid: Fid | None = None
        self._other: Fid | None = None
        self._entry: tuple[int, ...] = ()
        """As it came from the batch, while there is made room for it."""
        self._turn = Turn()
        self._lock = threading.Lock()
        """Guards what follows, and a change of turn. No system call on the export under it."""
        self._serving = False
        self._touching = 0
        """Threads that lost the ring and may still move data in guest memory."""
        self.broken: str | None = None
        """Why the ring can no longer be served, if so."""
        self.on_rest: Callable[[], None] = _nothing
        """Called on some thread when nothing touches the ring or guest memory any more: after
        ``pause``, or because the ring broke."""

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
        """Serve the ring until ``pause``; OSError if there are no threads to be had.

        One thread serves, one watches, and one is there to take over.
        """
        self._follow_session()
        self._stopping = False
        self._turn = turn = Turn()
        self._serving = True
        self._budget.begin_serving()
        if not self._watched:
            self._watched = self._workers.start(self._watch_over)
        ready = self._watched and self._workers.reserve()
        if not ready or not self._workers.start(partial(self._serve, turn)):
            self._serving = False
            self._budget.end_serving()
            raise OSError(errno.EAGAIN, "the limit of threads is reached; raise it (TasksMax=)")
        self._workers.reserve()

    def pause(self, grace: float) -> None:
        """Bring the ring to rest, which ``on_rest`` tells: taken requests answered, or out.

        Those that are out get ``grace`` seconds to end.
        """
        self._deadline = time.monotonic() + grace
        self._stopping = True
        self._vring.wake()

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

    def close(self) -> None:
        """Forget what is out; the ring is gone. It must rest."""
        self.on_rest = _nothing
        self._watch.stop()
        self._jobs.close()

    # Taking turns

    def _serve(self, turn: Turn) -> None:
        """Serve the ring until it is to rest, or until the turn is taken away."""
        try:
            while self._serve_batch(turn):
                if self._jobs.by_tag:
                    for job in self._jobs.completed():
                        self._complete(job)
                self._answers.publish()
                if self._stopping:
                    break
                count = self._vring.wait(self._poll_us)
                self._batch = REQUEST.iter_unpack(self._vring.batch[: count * REQUEST.size])
            else:
                return
            self._drain()
        except RingBroken as error:
            self.broken = str(error)
        except Exception as error:
            log.exception("%s: a bug stopped this device", self._name)
            self.broken = f"internal error: {error!r}"
            if turn is not self._turn:  # somebody else has the ring, and will find it broken
                self.pause(0)
                return
        self._watch.rest()
        self._budget.end_serving()
        with self._lock:
            self._serving = False
            rests = not self._touching
        if rests:
            self.on_rest()

    def _serve_batch(self, turn: Turn) -> bool:
        """Serve what is left of the batch; False if somebody else does that now."""
        for entry in self._batch:
            head, readable, writable, copied, fault, size, number, tag = entry
            if not self._request(turn, head, readable, writable, copied, fault, size, number, tag):
                return False
        return True

    def _drain(self) -> None:
        """Answer what comes back before the deadline."""
        while self._jobs:
            left = self._deadline - time.monotonic()
            if left <= 0:
                break
            for job in self._jobs.completed(left):
                self._complete(job)
            self._answers.publish()

    def _watch_over(self) -> None:
        """On the watcher's thread, as long as there is the ring."""
        begun: i64 = -1
        while self._watch.wait():
            if self._begun == begun:
                try:
                    self._take_over()
                except Exception:  # the serving thread will find that it has no job, and say so
                    log.exception("%s: a bug kept the ring from another thread", self._name)
            begun = self._begun

    def _take_over(self) -> None:
        """The serving thread has been in one request for more than a tick: another one serves on.

        Not if no thread can be had; then the next tick tries again.
        """
        if not self._workers.reserve():
            return
        with self._lock:
            claim = self._turn.claim
            head = claim.pop()
            if head is None:  # it has just come back, or is not in a request
                claim.insert(0, None)
                return
            if head == _NO_SLOT:
                self._batch = chain((self._entry,), self._batch)
            else:
                self._make_job(head)
            self._turn = turn = Turn()
        self._budget.take_over()
        self._answers.publish()
        if not self._workers.start(partial(self._serve, turn)):
            self._serve(turn)  # unwatched: better than not at all

    def _make_job(self, head: int) -> None:
        """Of the request that the serving thread is in."""
        message, payload = self._message, self._payload(head)
        fids = _listed(self._fid, self._other)
        payload.uses = 1
        # A clunk may have given up its locks, or be about to: who knows.
        locks = fids[0].handle if type(message) in _LOCKS | _CLUNKS else None
        job = self._job(head, self._tag, message, fids, payload, None, locks)
        job.moves_data = type(message) in _MOVES_DATA
        self._jobs.adopt(job)
        self._touching += job.moves_data
        self._turn.job = job
        log.debug("%s: tag %d takes long: %s", self._name, job.tag, message)

    def _make_room(self, turn: Turn, entry: tuple[int, ...]) -> bool:
        """Before a request is served; False if another thread has the ring, and the request."""
        self._entry = entry
        self._begun += 1
        turn.claim.append(_NO_SLOT)
        try:
            self._budget.make_room()
        finally:
            mine = turn.claim.pop() is not None
        return mine

    def _be_late(self, turn: Turn, reply: Reply) -> None:
        """Back from a request, but somebody else serves the ring now: the request is a job."""
        with self._lock:
            job = turn.job
        assert job is not None  # noqa: S101 - who took the claim has set it, under the lock
        work = None
        if isinstance(reply, Later):
            work = reply.work
            try:
                job.payload = self._private(self._payload(job.head), job.message)
            except OSError as error:  # the request's data is gone
                work, reply = None, job.guest.session.error(to_errno(error))
        self._leave_memory(job)
        if work is None:
            self._jobs.finish(job, reply)
        else:
            self._jobs.perform(job, work)

    def _leave_memory(self, job: Job) -> None:
        """A job that has lost the ring will not touch guest memory any more."""
        if job.moves_data:
            job.moves_data = False
            with self._lock:  # of the last to leave, the change and the look are one step
                self._touching -= 1
                rests = not self._serving and not self._touching
            if rests:
                self.on_rest()

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
                trace.debug("%s: tag %d %s", self._name, tag, message)
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
                trace.debug("%s: tag %d because: %s", self._name, tag, error)
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
    """The inode whose locks it works on, which it must have to itself (ops/locks.py)."""
    kind = type(message)
    locks = kind in _LOCKS or (kind in _CLUNKS and fids[0].locks)
    return fids[0].handle if locks else None


def _first(before: Callable[[], None], reply: Reply) -> Reply:
    before()
    return reply


def _nothing() -> None:
    pass
