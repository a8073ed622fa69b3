"""Requests that are out: on a worker, waiting for one, or done there and not answered yet.

A job owns what it works with: the session it began in, references to its fids and their
descriptors, and memory of its own for data. So it can take as long as dead storage takes, and
meanwhile the ring may stop, guest memory go, and the next session begin.

Jobs that change a fid (open it, move it) or whose order matters (appending writes) have it to
themselves; others share it. A job waits only for earlier ones on the same fids.
"""

import errno
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ninepd.errors import to_errno
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Later, Payload, Reply
from ninepd.payload import PrivatePayload

log = logging.getLogger(__name__)


class Job:
    """One request.

    ``work`` runs on a worker. A job without waits until all others are answered; then ``last`` is
    called by the thread that serves the ring, and returns the reply.
    """

    __slots__ = (
        "exclusive",
        "fids",
        "flushes",
        "guest",
        "head",
        "holders",
        "last",
        "payload",
        "reply",
        "tag",
        "work",
    )

    def __init__(
        self,
        head: int,
        tag: int,
        guest: Guest,
        fids: list[Fid],
        payload: PrivatePayload,
        work: Callable[[Payload], Reply] | None,
        exclusive: bool,
        last: Callable[[], Reply] | None = None,
    ) -> None:
        self.head = head
        self.tag = tag
        self.guest = guest
        self.fids = fids
        self.holders = [holder for fid in fids for holder in fid.holders()]
        self.payload = payload
        self.work = work
        self.exclusive = exclusive
        self.last = last
        self.flushes: list[tuple[int, int]] = []
        """(head, tag) of each Tflush that waits for it."""
        self.reply: Reply = None


class Jobs:
    """The jobs of one ring. Its methods belong to the thread that serves the ring."""

    def __init__(
        self, name: str, size: int, prepare: Callable[[], None], wake: Callable[[], None]
    ) -> None:
        """At most ``size`` jobs will be out, and each can have a thread: so none waits for another
        that hangs. ``prepare`` runs first on each; ``wake`` is called there when a job is done.
        """
        self._name = name
        self._wake = wake
        self._workers = ThreadPoolExecutor(
            size, thread_name_prefix=f"{name} worker", initializer=prepare
        )
        self.by_tag: dict[int, Job] = {}
        self._followers: dict[int, Job] = {}
        self._held: list[Job] = []
        self._waiting: list[Job] = []
        self._active: dict[Fid, int] = {}
        self._exclusive: set[Fid] = set()
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._closed = False
        self._close_lock = threading.Lock()

    def __len__(self) -> int:
        """How many are not answered yet."""
        return len(self.by_tag)

    def find(self, tag: int) -> Job | None:
        """The job with this tag, or the one that the Tflush with this tag waits for."""
        return self.by_tag.get(tag) or self._followers.get(tag)

    def follow(self, job: Job, head: int, tag: int) -> None:
        """A Tflush is to be answered right behind the job."""
        job.flushes.append((head, tag))
        self._followers[tag] = job

    def must_wait(self, fids: list[Fid], exclusive: bool) -> bool:
        """Are there jobs that a request on these fids has to wait for?"""
        held = {fid for job in self._held for fid in job.fids}
        return not self._may_start(fids, exclusive, held)

    def add(self, job: Job) -> None:
        """Take a job over and start it as soon as its fids allow."""
        self.by_tag[job.tag] = job
        if job.work is None:
            self._waiting.append(job)
            return
        job.guest.pin(job.fids, job.holders)
        self._held.append(job)
        self._start_held()

    def completed(self, timeout: float | None = None) -> Iterator[Job]:
        """The jobs to be answered now. With a timeout, wait so long for the first."""
        try:
            while True:
                job = self._done.get(block=timeout is not None, timeout=timeout)
                timeout = None
                self._forget(job)
                yield job
                self._start_held()
                while self._waiting and len(self.by_tag) == len(self._waiting):
                    waiting = self._waiting.pop(0)
                    self._forget(waiting)
                    yield waiting
        except queue.Empty:
            return

    def close(self) -> None:
        """None will be answered. Those that run end by themselves and let go of what they own."""
        with self._close_lock:  # no wake comes after this: its descriptor may be closed then
            self._closed = True
        for job in self._held:
            job.guest.unpin(job.fids, job.holders)
        self._held.clear()
        self._workers.shutdown(wait=False)

    def _forget(self, job: Job) -> None:
        del self.by_tag[job.tag]
        for _, tag in job.flushes:
            self._followers.pop(tag, None)
        if job.work is None:
            return
        for fid in job.fids:
            self._active[fid] -= 1
            if not self._active[fid]:
                del self._active[fid]
            if job.exclusive:
                self._exclusive.discard(fid)

    def _start_held(self) -> None:
        still_held: list[Job] = []
        blocked: set[Fid] = set()
        for job in self._held:
            if self._may_start(job.fids, job.exclusive, blocked):
                for fid in job.fids:
                    self._active[fid] = self._active.get(fid, 0) + 1
                    if job.exclusive:
                        self._exclusive.add(fid)
                self._workers.submit(self._run, job)
            else:
                blocked.update(job.fids)
                still_held.append(job)
        self._held = still_held

    def _may_start(self, fids: list[Fid], exclusive: bool, blocked: set[Fid]) -> bool:
        for fid in fids:
            if fid in blocked or fid in self._exclusive:
                return False
            if exclusive and fid in self._active:
                return False
        return True

    def _run(self, job: Job) -> None:
        """On a worker. What the work returns may be more work."""
        try:
            if not self._closed and job.work is not None:
                reply = job.work(job.payload)
                while isinstance(reply, Later):
                    reply = reply.work(job.payload)
                job.reply = reply
        except OSError as error:
            job.reply = job.guest.session.error(to_errno(error))
        except Exception:
            log.exception("%s: a bug made a request fail", self._name)
            job.reply = job.guest.session.error(errno.EIO)
        # Here and not on the device thread: closing a file may have to wait for its storage.
        try:
            job.guest.unpin(job.fids, job.holders)
        except Exception:
            log.exception("%s: a bug kept a fid from being released", self._name)
        self._done.put(job)
        with self._close_lock:
            if not self._closed:
                self._wake()
