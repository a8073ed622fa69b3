"""The way of one request: from the available ring to the used ring, on the device thread.

    wait (C)      a batch of requests: chains checked, headers copied out of guest memory
    _request      header -> message; anything wrong with it -> the errno that the guest is told
    handler       ops/, export/: the system calls; data moves between file and guest pages in C
    _finish       reply -> bytes in the slot's reply buffer
    push (C)      replies scattered, used entries published, at most one notification

A request that may block leaves the thread at ``_hand_over`` and comes back through ``_complete``
(jobs.py). Each request is answered exactly once. A Tflush of a request that is out is answered
right behind it, never before: the client frees the request's memory when it sees the Rflush
(net/9p/client.c, p9_client_flush).
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ninepd import syscalls
from ninepd.capabilities import privileged
from ninepd.errors import ProtocolError, RingBroken, to_errno
from ninepd.export.descriptors import mark_worker
from ninepd.jobs import Job, Jobs
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest, Service
from ninepd.ops.replies import Encoded, Later, Payload, Reply
from ninepd.ops.table import ROWS, Row
from ninepd.p9.codecs import FixedCodec
from ninepd.p9.messages import (
    CODEC_OF,
    HEADER_SIZE,
    IO_HEADER,
    RLERROR_SIZE,
    WITH_DATA,
    WRITE_HEADER,
    Rerror,
    RerrorPlain,
    Rflush,
    Tattach,
    Tflush,
    Tversion,
)
from ninepd.payload import ChainPayload, PrivatePayload
from ninepd.vring import DONE, REQUEST, Vring

log = logging.getLogger(__name__)
trace = logging.getLogger("ninepd.trace")

GRACE_SECONDS: Final = 1.0
"""How long a ring that is told to stop waits for work that is out."""
ERRORS: Final = frozenset({Rerror, RerrorPlain})
"""Errors in words, which are cut to what room there is. An Rlerror always fits."""
_pack_done: Final = DONE.pack_into
_DONE_SIZE: Final = int(DONE.size)
_SEGMENTS: Final = 1024
"""Descriptors in one indirect table, or in a chain of a ring that is larger."""
_PAGE: Final = 4096


class Pipeline:
    """The request engine on one ring. All but ``start`` and ``stop`` runs on its own thread.

    ``stop`` leaves the ring as it is, so that ``start`` may go on with it; what is still out then
    is answered after that, or dropped with the pipeline.
    """

    def __init__(
        self, service: Service, vring: Vring, num: int, indirect: bool, poll_us: int, name: str
    ) -> None:
        self._service = service
        self._vring = vring
        self._poll_us = poll_us
        self._name = name
        self._header_stride = vring.header_stride
        self._reply_stride = vring.reply_stride
        self._replies = vring.replies
        self._payloads = [ChainPayload(vring, head) for head in range(num)]
        segments = max(num, _SEGMENTS) if indirect else num
        # Request, reply and one page of slop, as the Linux driver counts (trans_virtio.c).
        self._msize_limit = (segments - 3) * _PAGE
        self._tracing = trace.isEnabledFor(logging.DEBUG)
        handles = service.guest.tree.handles
        self._budget = handles.budget
        self._volumes = handles.volumes
        self._jobs = Jobs(name, num, _prepare_worker, vring.wake)
        self._follow_session()
        self._done = 0
        self._device_thread: threading.Thread | None = None
        self._stopping = False
        self.broken: str | None = None
        """Why the ring can no longer be served, if so."""
        self.stuck = False
        """Did the thread not come back from a system call? Then it may still use anything."""

    # From the loop thread

    @property
    def next_avail(self) -> int:
        """The available index that comes next; exact while the thread is stopped."""
        return self._vring.counters.last_avail

    @property
    def jobs(self) -> int:
        """Requests that are out."""
        return len(self._jobs)

    def start(self, on_broken: Callable[[], None]) -> None:
        """Serve the ring until ``stop``. If it breaks, ``on_broken`` is called on its thread."""
        self._follow_session()
        self._stopping = False
        self._device_thread = threading.Thread(
            target=self._run, args=(on_broken,), name=self._name, daemon=True
        )
        self._device_thread.start()

    def stop(self, grace: float) -> None:
        """Return when nothing touches guest memory any more: taken requests answered, or parked.

        ``grace`` is how many seconds to wait for requests that are out.
        """
        thread, self._device_thread = self._device_thread, None
        if thread is None:
            return
        self._stopping = True
        self._vring.wake()
        deadline = time.monotonic() + grace
        thread.join(GRACE_SECONDS)
        if thread.is_alive():
            self.stuck = True
            self.broken = "the storage does not answer"
        while self._jobs and self.broken is None:
            left = deadline - time.monotonic()
            if left <= 0:
                if grace:
                    log.warning("%s: %d requests are still out", self._name, len(self._jobs))
                break
            for job in self._jobs.completed(left):
                self._complete(job)
            self._publish()

    def set_call(self, fd: int) -> None:
        """Notify the guest through another descriptor, or not at all (-1). While stopped only."""
        self._vring.set_call(fd)

    def close(self) -> None:
        """Forget what is out; the ring is gone. Call ``stop`` first."""
        self._jobs.close()

    # On the device thread

    def _run(self, on_broken: Callable[[], None]) -> None:
        try:
            _prepare_thread()
            while not self._stopping:
                count = self._vring.wait(self._poll_us)
                for entry in REQUEST.iter_unpack(self._vring.batch[: count * REQUEST.size]):
                    head, readable, writable, copied, fault, size, number, tag = entry
                    self._request(head, readable, writable, copied, fault, size, number, tag)
                    if self.stuck:
                        return
                if self._jobs.by_tag:
                    for job in self._jobs.completed():
                        self._complete(job)
                self._publish()
        except RingBroken as error:
            self.broken = str(error)
            on_broken()
        except Exception as error:
            log.exception("%s: a bug stopped this device", self._name)
            self.broken = f"internal error: {error!r}"
            on_broken()

    def _publish(self) -> None:
        if self._done:
            self._vring.push(self._done)
            self._done = 0

    def _push(self, head: int, number: int, copy: int, used: int) -> None:
        """A reply is ready: C writes its header, and copies ``copy`` of its ``used`` bytes."""
        _pack_done(self._vring.done, self._done * _DONE_SIZE, head, number, copy, used)
        self._done += 1

    def _follow_session(self) -> None:
        """Look up what each request needs to know of the session, which may be a new one."""
        self._guest = guest = self._service.guest
        self._msize = guest.session.msize
        self._rows = ROWS[guest.session.dialect]

    def _request(
        self,
        head: int,
        readable: int,
        writable: int,
        copied: int,
        fault: int,
        size: int,
        number: int,
        tag: int,
    ) -> None:
        if copied < HEADER_SIZE or writable < RLERROR_SIZE:
            log.info("%s: request dropped: no header, or no room for a reply", self._name)
            self._push(head, 0, 0, 0)
            return
        guest = self._guest
        jobs = self._jobs
        payload = self._payloads[head]
        payload.room = (self._msize if 0 < self._msize < writable else writable) - IO_HEADER
        payload.available = readable - WRITE_HEADER
        try:
            if self._budget.crowded:
                self._budget.make_room()
            row = self._rows.get(number)
            if row is None or fault or not self._is_sound(row, readable, writable, copied, size):
                raise self._refusal(row, readable, writable, fault, size, number)
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
                self._session_message(guest, head, tag, message)
                return
            fids = row.resolve(guest.session, message)
            if (jobs.by_tag or self._volumes.remote) and self._must_leave(
                guest, row, message, fids
            ):
                self._hand_over(guest, head, tag, row, message, fids, None)
                return
            reply = row.serve(guest, message, payload, fids)
            if isinstance(reply, Later):
                self._hand_over(guest, head, tag, row, message, fids, reply.work)
                return
        except OSError as error:
            reply = guest.session.error(to_errno(error))
            if self._tracing:
                trace.debug("%s: tag %d because: %s", self._name, tag, error)
        except Exception:
            log.exception("%s: a bug made this request fail: message type %d", self._name, number)
            reply = guest.session.error(errno.EIO)
        self._finish(head, tag, reply)

    def _is_sound(self, row: Row, readable: int, writable: int, copied: int, size: int) -> bool:
        """May a request be decoded? If not, ``_refusal`` says why."""
        return (
            HEADER_SIZE <= size <= readable
            and (size <= self._msize or (not self._msize and row.message is Tversion))
            and writable >= row.reply_size
            and (copied >= size or row.header_limit != 0)
        )

    def _refusal(
        self, row: Row | None, readable: int, writable: int, fault: int, size: int, number: int
    ) -> ProtocolError:
        if fault:
            return ProtocolError("a buffer lies outside guest memory", fault)
        if not HEADER_SIZE <= size <= readable:
            return ProtocolError(f"the size field says {size}, {readable} bytes came")
        if self._msize and size > self._msize:
            return ProtocolError(f"{size} bytes are more than msize", errno.EMSGSIZE)
        if row is None:
            return ProtocolError(f"message type {number} is not served", errno.EOPNOTSUPP)
        if writable < row.reply_size:
            return ProtocolError("the reply does not fit", errno.EMSGSIZE)
        if not self._msize and row.message is not Tversion:
            return ProtocolError("no Tversion came before")
        return ProtocolError("the message is too long", errno.ENAMETOOLONG)

    def _must_leave(self, guest: Guest, row: Row, message: Any, fids: list[Fid]) -> bool:
        """Is it on storage that may hang, or does it have to wait for others that are?"""
        if any(fid.handle.remote for fid in fids):
            return True
        if row.message is Tattach and guest.tree.root.remote:
            return True
        return bool(self._jobs) and self._jobs.must_wait(fids, row.is_exclusive(message, fids))

    def _hand_over(
        self,
        guest: Guest,
        head: int,
        tag: int,
        row: Row,
        message: Any,
        fids: list[Fid],
        rest: Callable[[Payload], Reply] | None,
    ) -> None:
        """The whole request becomes a job, or the ``rest`` of it."""
        payload = self._payloads[head]
        data = payload.take(message.nbytes) if row.header_limit else b""
        private = PrivatePayload(data, payload.room)
        work = rest or (lambda payload: row.serve(guest, message, payload, fids))
        exclusive = row.is_exclusive(message, fids)
        self._jobs.add(Job(head, tag, guest, list(dict.fromkeys(fids)), private, work, exclusive))

    def _session_message(self, guest: Guest, head: int, tag: int, message: Any) -> None:
        if isinstance(message, Tflush):
            job = self._jobs.find(message.oldtag)
            if job is None:
                self._finish(head, tag, Rflush())
            else:
                self._jobs.follow(job, head, tag)
            return
        work = partial(self._version, message)
        if self._jobs.by_tag:
            # A new session must not see replies of the old one.
            self._jobs.add(Job(head, tag, guest, [], PrivatePayload(b"", 0), None, False, work))
        else:
            self._finish(head, tag, work())

    def _version(self, message: Tversion) -> Reply:
        try:
            self._service.restart()
            return self._service.guest.version(message, self._msize_limit)
        except OSError as error:
            return self._service.guest.session.error(to_errno(error))
        finally:
            self._follow_session()

    def _complete(self, job: Job) -> None:
        if job.last is not None:
            job.reply = job.last()
        job.payload.deliver(self._payloads[job.head])
        self._finish(job.head, job.tag, job.reply)
        for head, tag in job.flushes:
            self._finish(head, tag, Rflush())

    def _finish(self, head: int, tag: int, reply: Reply) -> None:
        """Encode a reply into the slot; one that does not fit becomes an error."""
        if self._tracing:
            trace.debug("%s: tag %d %s", self._name, tag, reply)
        if isinstance(reply, Encoded):
            # Its space was checked beforehand, like that of all replies of a fixed size.
            size = HEADER_SIZE + reply.size
            self._push(head, reply.number, size, size)
            return
        kind = type(reply)
        codec = CODEC_OF[kind]
        body_at = head * self._reply_stride + HEADER_SIZE
        if isinstance(codec, FixedCodec):
            size = HEADER_SIZE + codec.size
            codec.place(self._replies, body_at, reply)
            self._push(head, codec.number, size, size + reply.nbytes if kind in WITH_DATA else size)
            return
        body = codec.encode(reply)
        size = HEADER_SIZE + len(body)
        room = self._payloads[head].room + IO_HEADER
        if size > room:
            self._finish_too_long(head, tag, reply, size - room)
        elif size <= self._reply_stride:
            self._replies[body_at : body_at + len(body)] = body
            self._push(head, codec.number, size, size)
        else:
            self._vring.scatter(head, HEADER_SIZE, body)
            self._push(head, codec.number, HEADER_SIZE, size)

    def _finish_too_long(self, head: int, tag: int, reply: Reply, excess: int) -> None:
        if type(reply) not in ERRORS:
            self._finish(head, tag, self._service.guest.session.error(errno.EMSGSIZE))
        elif reply.ename:
            self._finish(head, tag, reply._replace(ename=reply.ename[:-excess]))
        else:
            self._push(head, 0, 0, 0)


def _prepare_thread() -> None:
    if privileged():
        syscalls.keep_capabilities()


def _prepare_worker() -> None:
    _prepare_thread()
    mark_worker()
