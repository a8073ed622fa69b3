"""The way of one request: from the available ring to the used ring, on the device thread.

    wait (C)      a batch of requests: chains checked, headers copied out of guest memory
    _begin        header -> message; anything wrong with it -> the errno that the guest is told
    handler       fs/: the system calls; data moves between file and guest pages in C
    _finish       reply -> bytes in the slot's reply buffer
    push (C)      replies scattered, used entries published, at most one notification

A request that may block leaves the thread at ``_hand_over`` and comes back through ``_completed``.
Each request is answered exactly once. A Tflush of a request that is out is answered right behind
it, never before: the client frees the request's memory when it sees the Rflush (9p.md 1.7).
"""

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple

from ninepd import syscalls
from ninepd.errors import ProtocolError, RingBroken, to_errno
from ninepd.fs.fid import Fid
from ninepd.fs.ops import HANDLERS, Handler, fid_fields
from ninepd.fs.security import privileged
from ninepd.fs.server import Encoded, Later, Reply, Server, waits
from ninepd.p9.messages import (
    CODEC_OF,
    CODECS,
    HEADER,
    HEADER_SIZE,
    IO_HEADER,
    NUMBERS,
    WITH_DATA,
    WRITE_HEADER,
    Rerror,
    RerrorPlain,
    Rflush,
    Tflush,
    Tversion,
    Twalk,
    Twrite,
    encode,
)
from ninepd.p9.session import Dialect
from ninepd.payload import ChainPayload, PrivatePayload
from ninepd.vring import DONE, REQUEST, Vring

log = logging.getLogger(__name__)
trace = logging.getLogger("ninepd.trace")

WORKERS: Final = 16
GRACE_SECONDS: Final = 1.0
"""How long a ring that is told to stop waits for work that is out (vhost-user.md 3.6)."""
HEADER_LIMITS: Final = {NUMBERS[Twrite]: WRITE_HEADER}
"""How much of a request is copied out of guest memory, where that is not all of it."""
ERRORS: Final = frozenset({Rerror, RerrorPlain})
"""Errors in words, which are cut to what room there is. An Rlerror always fits."""
RLERROR_SIZE: Final = HEADER_SIZE + 4
_RWALK_FIXED: Final = 9
_QID_SIZE: Final = 13
_SEGMENTS: Final = 1024
"""Descriptors in one indirect table, or in a chain of a ring that is larger."""
_PAGE: Final = 4096


class Route(NamedTuple):
    """All that is known about one T-message beforehand."""

    message: type[Any]
    decode: Callable[[Any, int, int], Any]
    handler: Handler | None
    fid_fields: tuple[int, ...]
    reply_size: int
    """What its reply takes at least: checked first, so that nothing is done in vain."""


def _route(message: type[Any], handler: Handler | None) -> Route:
    codec = CODECS[NUMBERS[message]]
    answer = CODECS.get(codec.number + 1)
    size = RLERROR_SIZE if answer is None else max(RLERROR_SIZE, HEADER_SIZE + answer.size)
    return Route(message, codec.decode, handler, fid_fields(message), size)


ROUTES: Final[dict[Dialect, dict[int, Route]]] = {
    dialect: {
        NUMBERS[message]: _route(message, handler)
        for message, handler in {**handlers, Tversion: None, Tflush: None}.items()
    }
    for dialect, handlers in HANDLERS.items()
}


class Job:
    """A request that is out: on a worker, or done there and not yet answered."""

    __slots__ = ("fids", "flushes", "head", "in_guest_memory", "payload", "pinned", "reply", "tag")

    def __init__(
        self,
        head: int,
        tag: int,
        fids: list[Fid],
        payload: ChainPayload | PrivatePayload,
        in_guest_memory: bool,
    ) -> None:
        self.head = head
        self.tag = tag
        self.fids = fids
        self.payload = payload
        self.in_guest_memory = in_guest_memory
        """Does its work touch guest memory? Then the memory stays until it is done."""
        self.flushes: list[tuple[int, int]] = []
        """(head, tag) of each Tflush that waits for it."""
        self.reply: Reply = None
        self.pinned = [holder for fid in fids for holder in fid.holders()]

    def pin(self) -> None:
        """Its fids and their descriptors stay until ``unpin``."""
        for fid in self.fids:
            fid.users += 1
        for holder in self.pinned:
            holder.pins += 1

    def unpin(self) -> list[Fid]:
        """Returns the fids that were clunked meanwhile and have no other user."""
        for holder in self.pinned:
            holder.pins -= 1
        for fid in self.fids:
            fid.users -= 1
        return [fid for fid in self.fids if fid.doomed and not fid.users]


class Pipeline:
    """The request engine on one ring. All but ``start`` and ``stop`` runs on its own thread.

    ``stop`` leaves the ring as it is, so that ``start`` may go on with it; what is still out then
    is answered after that, or dropped with the pipeline.
    """

    def __init__(
        self, server: Server, vring: Vring, num: int, indirect: bool, poll_us: int, name: str
    ) -> None:
        self._server = server
        self._vring = vring
        self._poll_us = poll_us
        self._name = name
        self._payloads = [ChainPayload(vring, head) for head in range(num)]
        segments = max(num, _SEGMENTS) if indirect else num
        # Request, reply and one page of slop, as the Linux driver counts (trans_virtio.c).
        self._msize_limit = (segments - 3) * _PAGE
        self._tracing = trace.isEnabledFor(logging.DEBUG)
        self._budget = server.tree.handles.budget
        self._jobs: dict[int, Job] = {}
        self._completed: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._waiting_versions: list[tuple[int, int, Tversion]] = []
        self._done = 0
        self._workers = ThreadPoolExecutor(
            WORKERS, thread_name_prefix=f"{name} worker", initializer=_prepare_thread
        )
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._close_lock = threading.Lock()
        self.broken: str | None = None
        """Why the ring can no longer be served, if so."""

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
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(on_broken,), name=self._name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Return when nothing touches guest memory any more: taken requests answered, or parked."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._vring.wake()
        thread.join()
        deadline = time.monotonic() + GRACE_SECONDS
        while self._jobs and self.broken is None:
            left = deadline - time.monotonic()
            if left <= 0 and not any(job.in_guest_memory for job in self._jobs.values()):
                log.warning("%s: %d requests are still out", self._name, len(self._jobs))
                break
            try:
                self._complete(self._completed.get(timeout=max(left, 0.05)))
            except queue.Empty:
                continue
            self._publish()

    def set_call(self, fd: int) -> None:
        """Notify the guest through another descriptor, or not at all (-1). While stopped only."""
        self._vring.set_call(fd)

    def close(self) -> None:
        """Forget what is out; the ring is gone. Call ``stop`` first."""
        with self._close_lock:
            self._closed = True
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._vring.close()

    # On the device thread

    def _run(self, on_broken: Callable[[], None]) -> None:
        try:
            _prepare_thread()
            while not self._stopping:
                count = self._vring.wait(self._poll_us)
                for entry in REQUEST.iter_unpack(self._vring.batch[: count * REQUEST.size]):
                    self._request(*entry)
                while not self._completed.empty():
                    self._complete(self._completed.get_nowait())
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

    def _push(self, head: int, copy: int, used: int) -> None:
        DONE.pack_into(self._vring.done, self._done * DONE.size, head, copy, used)
        self._done += 1

    def _request(self, head: int, readable: int, writable: int, copied: int, fault: int) -> None:
        if copied < HEADER_SIZE or writable < RLERROR_SIZE:
            log.info("%s: request dropped: no header, or no room for a reply", self._name)
            self._push(head, 0, 0)
            return
        start = head * self._vring.header_stride
        size, number, tag = HEADER.unpack_from(self._vring.headers, start)
        payload = self._payloads[head]
        payload.room = writable - IO_HEADER
        payload.available = readable - WRITE_HEADER
        try:
            if self._budget.crowded:
                self._budget.make_room()
            if fault:
                raise ProtocolError("a buffer lies outside guest memory", fault)
            route, message = self._begin(start, size, number, readable, copied, writable)
            if self._tracing:
                trace.debug("%s: tag %d %s", self._name, tag, message)
            if tag in self._jobs:
                raise ProtocolError(f"tag {tag} is in use")
            if route.handler is None:
                self._session_message(head, tag, message)
                return
            if self._server.tree.handles.remote:
                fids = self._fids(route, message)
                if any(map(waits, fids)):
                    data = payload.take(message.nbytes) if route.message is Twrite else b""
                    private = PrivatePayload(data, payload.room)
                    work = partial(route.handler, self._server, message, private)
                    self._hand_over(Job(head, tag, fids, private, False), work)
                    return
            reply = route.handler(self._server, message, payload)
            if type(reply) is Later:
                fids = self._fids(route, message)
                self._hand_over(Job(head, tag, fids, payload, reply.in_guest_memory), reply.work)
                return
        except OSError as error:
            reply = self._error(to_errno(error))
            if self._tracing:
                trace.debug("%s: tag %d because: %s", self._name, tag, error)
        except Exception:
            log.exception("%s: a bug made this request fail: message type %d", self._name, number)
            reply = self._error(errno.EIO)
        self._finish(head, tag, reply)

    def _fids(self, route: Route, message: Any) -> list[Fid]:
        numbers = [message[field] for field in route.fid_fields]
        fids = self._server.session.fids
        return [fids[number] for number in numbers if number in fids]

    def _begin(
        self, start: int, size: int, number: int, readable: int, copied: int, writable: int
    ) -> tuple[Route, Any]:
        """The message, if it is one that may be served: else ProtocolError."""
        if not HEADER_SIZE <= size <= readable:
            raise ProtocolError(f"the size field says {size}, {readable} bytes came")
        session = self._server.session
        route = ROUTES[session.dialect].get(number)
        if route is None:
            raise ProtocolError(f"message type {number} is not served", errno.EOPNOTSUPP)
        if writable < route.reply_size:
            raise ProtocolError("the reply does not fit", errno.EMSGSIZE)
        if copied < size and route.message is not Twrite:
            raise ProtocolError("the message is too long", errno.ENAMETOOLONG)
        message = route.decode(self._vring.headers, start + HEADER_SIZE, start + min(size, copied))
        if not session.msize and route.message is not Tversion:
            raise ProtocolError("no Tversion came before")
        if route.message is Twalk and writable < _RWALK_FIXED + _QID_SIZE * len(message.names):
            raise ProtocolError("the reply does not fit", errno.EMSGSIZE)
        if route.message is Twrite and message.nbytes > size - WRITE_HEADER:
            raise ProtocolError(f"a Twrite of {size} bytes has no {message.nbytes} bytes of data")
        return route, message

    def _error(self, code: int) -> Reply:
        return self._server.session.error(code)

    def _session_message(self, head: int, tag: int, message: Any) -> None:
        if isinstance(message, Tflush):
            job = self._jobs.get(message.oldtag)
            if job is not None:
                job.flushes.append((head, tag))
            else:
                self._finish(head, tag, Rflush())
        elif self._jobs:
            # A new session must not see replies of the old one.
            self._waiting_versions.append((head, tag, message))
        else:
            self._version(head, tag, message)

    def _version(self, head: int, tag: int, message: Tversion) -> None:
        reply: Reply
        try:
            reply = self._server.version(message, self._msize_limit)
        except OSError as error:
            reply = self._error(to_errno(error))
        self._finish(head, tag, reply)

    def _hand_over(self, job: Job, work: Callable[[], Reply]) -> None:
        job.pin()
        self._jobs[job.tag] = job
        self._workers.submit(self._work, job, work)

    def _work(self, job: Job, work: Callable[[], Reply]) -> None:
        """On a worker. What it returns may be more work, when all of the request runs there."""
        try:
            reply = work()
            while type(reply) is Later:
                reply = reply.work()
            job.reply = reply
        except OSError as error:
            job.reply = self._error(to_errno(error))
        except Exception:
            log.exception("%s: a bug made a request fail", self._name)
            job.reply = self._error(errno.EIO)
        with self._close_lock:
            if self._closed:
                self._unpin(job)
            else:
                self._completed.put(job)
                self._vring.wake()

    def _unpin(self, job: Job) -> None:
        for fid in job.unpin():
            self._server.release(fid)

    def _complete(self, job: Job) -> None:
        del self._jobs[job.tag]
        self._unpin(job)
        if isinstance(job.payload, PrivatePayload):
            job.payload.deliver(self._payloads[job.head])
        self._finish(job.head, job.tag, job.reply)
        for head, tag in job.flushes:
            self._finish(head, tag, Rflush())
        if self._waiting_versions and not self._jobs:
            waiting, self._waiting_versions = self._waiting_versions, []
            for head, tag, message in waiting:
                self._version(head, tag, message)

    def _finish(self, head: int, tag: int, reply: Reply) -> None:
        """Encode a reply into the slot; one that does not fit becomes an error."""
        if self._tracing:
            trace.debug("%s: tag %d %s", self._name, tag, reply)
        vring = self._vring
        kind = type(reply)
        start = head * vring.reply_stride
        room = self._payloads[head].room + IO_HEADER
        if kind is Encoded:
            # Its space was checked beforehand, like that of all replies of a fixed size.
            size = HEADER_SIZE + reply.size
            HEADER.pack_into(vring.replies, start, size, reply.number, tag)
            self._push(head, size, size)
            return
        codec = CODEC_OF[kind]
        if codec.place is not None:
            copy = used = HEADER_SIZE + codec.size
            if kind in WITH_DATA:
                used += reply.nbytes
            codec.place(vring.replies, start, used, tag, reply)
            self._push(head, copy, used)
            return
        data = encode(tag, reply)
        if len(data) > room:
            self._finish_too_long(head, tag, reply, len(data) - room)
        elif len(data) <= vring.reply_stride:
            vring.replies[start : start + len(data)] = data
            self._push(head, len(data), len(data))
        else:
            vring.scatter(head, 0, data)
            self._push(head, 0, len(data))

    def _finish_too_long(self, head: int, tag: int, reply: Reply, excess: int) -> None:
        if type(reply) not in ERRORS:
            self._finish(head, tag, self._error(errno.EMSGSIZE))
        elif reply.ename:
            self._finish(head, tag, reply._replace(ename=reply.ename[:-excess]))
        else:
            self._push(head, 0, 0)


def _prepare_thread() -> None:
    if privileged():
        syscalls.keep_capabilities()
