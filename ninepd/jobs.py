"""Requests that are out: they wait for others, run on a worker, or are done and not answered yet.

    HELD     another job has a fid of it to itself, or all workers are taken
    RUNNING  on a worker; what it uses is pinned from here on
    DONE     its reply is there; the thread that serves the ring answers it
    ANSWERED forgotten

A request gets here in two ways: before it runs, because it is known to wait (``add``), or while it
runs, because the thread that served the ring did not come back from it (``adopt``). Either can take
as long as dead storage takes: meanwhile the ring may stop, guest memory go, and the next session
begin. Jobs that change a fid (open it, move it) or whose order matters (appending writes) have it
to themselves; others share it. A job waits only for earlier ones on the same fids, and for a
worker: there are so many, and half of them for one file system, so that a dead one leaves others.
"""

import errno
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum, auto
from functools import partial
from typing import Any

from ninepd.errors import to_errno
from ninepd.export.handles import Handle
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Later, Payload, Reply
from ninepd.workers import Workers

log = logging.getLogger(__name__)


class JobState(Enum):
    """Where a job stands; see above."""

    HELD = auto()
    RUNNING = auto()
    DONE = auto()
    ANSWERED = auto()


class Job:
    """One request.

    ``work`` runs on a worker. A job without waits until all others are answered; then ``last`` is
    called by the thread that serves the ring, and returns the reply.
    """

    __slots__ = (
        "alone",
        "fids",
        "flushes",
        "guest",
        "head",
        "last",
        "late",
        "message",
        "moves_data",
        "payload",
        "reply",
        "shared",
        "state",
        "tag",
        "volume",
        "work",
    )

    def __init__(
        self,
        head: int,
        tag: int,
        guest: Guest,
        message: Any,
        fids: list[Fid],
        payload: Payload,
        work: Callable[[Payload], Reply] | None,
        exclusive: bool,
        locks: Handle | None = None,
        last: Callable[[], Reply] | None = None,
    ) -> None:
        """``exclusive``: it has its fids to itself; ``locks``: and the locks on this inode."""
        self.head = head
        self.tag = tag
        self.guest = guest
        self.message = message
        self.fids = fids
        self.payload = payload
        self.work = work
        self.last = last
        self.shared: list[Any] = [] if exclusive else list(fids)
        self.alone: list[Any] = list(fids) if exclusive else []
        if locks is not None:
            self.alone.append(locks)
        self.volume: Any = fids[0].handle.volume if fids else None
        """The file system whose storage it will wait for, as far as that can be known."""
        self.late = False
        """Did it hold up the ring? Then others like it, on that file system, leave the ring."""
        self.moves_data = False
        """May it touch guest memory while it runs?"""
        self.state = JobState.HELD
        self.flushes: list[tuple[int, int]] = []
        """(head, tag) of each Tflush that waits for it."""
        self.reply: Reply = None


class Jobs:
    """The jobs of one ring. All but ``finish`` belongs to the thread that serves the ring."""

    def __init__(self, name: str, workers: Workers, wake: Callable[[], None], limit: int) -> None:
        """At most ``limit`` jobs run on workers at once, two or more, half of them on one file
        system.

        ``wake`` is called on a worker when a job is done.
        """
        self._name = name
        self._workers = workers
        self._wake = wake
        self._limit = limit
        self._limit_each = limit // 2
        self.by_tag: dict[int, Job] = {}
        self._followers: dict[int, Job] = {}
        self._held: list[Job] = []
        self._waiting: list[Job] = []
        self._shared: Counter[Any] = Counter()
        self._alone: set[Any] = set()
        self._running = 0
        self._running_on: Counter[Any] = Counter()
        self._late_on: Counter[Any] = Counter()
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

    def must_wait(
        self, message: Any, fids: list[Fid], exclusive: bool, locks: Handle | None, changes: bool
    ) -> bool:
        """Would a request have to wait for a job, or is it likely to hold up the ring?

        The latter is only worth a worker as long as some are left for other file systems. Beyond
        that it is tried on the ring all the same, for what only looks may be answered from memory,
        where ``changes`` of a file system that has held up many can wait.
        """
        if not self.by_tag:
            return False
        if fids and self._late_on:
            volume = fids[0].handle.volume
            late = self._late_on[volume, type(message)]
            if late and self._running_on[volume] < self._limit_each:
                return True
            if late >= self._limit_each and changes:
                return True
        blocked = {key for job in self._held for key in (*job.shared, *job.alone)}
        shared: list[Any] = [] if exclusive else list(fids)
        alone: list[Any] = list(fids) if exclusive else []
        if locks is not None:
            alone.append(locks)
        return not self._is_free(shared, alone, blocked)

    def add(self, job: Job) -> None:
        """Take a job over and start it as soon as its fids and the workers allow."""
        self.by_tag[job.tag] = job
        for _, tag in job.flushes:
            self._followers[tag] = job
        if job.work is None:
            self._waiting.append(job)
            return
        job.guest.keep(job.fids)
        self._held.append(job)
        self._start_held()

    def adopt(self, job: Job) -> None:
        """A request that runs already, on a thread that will call ``finish``, becomes a job."""
        self.by_tag[job.tag] = job
        job.guest.keep(job.fids)
        job.guest.pin(job.fids, job.payload.pins)
        job.late = True
        self._late_on[job.volume, type(job.message)] += 1
        self._set_running(job)

    def completed(self, timeout: float | None = None) -> Iterator[Job]:
        """The jobs to be answered now. With a timeout, wait so long for the first."""
        if self._held:
            self._start_held()  # a worker may be had by now
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

    def finish(self, job: Job, reply: Reply) -> None:
        """The thread that ran a job gives its reply, and lets go of what the job used.

        Here and not on the ring's thread: closing a file may have to wait for its storage.
        """
        job.reply = reply
        try:
            job.guest.unpin(job.payload.pins)
            job.guest.let_go(job.fids)
        except Exception:
            log.exception("%s: a bug kept a fid from being released", self._name)
        job.state = JobState.DONE
        self._done.put(job)
        self._look_again()

    def _look_again(self) -> None:
        """Have the thread that serves the ring ask for what is completed."""
        with self._close_lock:
            if not self._closed:
                self._wake()

    def close(self) -> None:
        """None will be answered. Those that run end by themselves and let go of what they own."""
        with self._close_lock:  # no wake comes after this: its descriptor may be closed then
            self._closed = True
        held, self._held = self._held, []
        if held and not self._workers.start(partial(_let_go, held)):
            _let_go(held)

    def _forget(self, job: Job) -> None:
        del self.by_tag[job.tag]
        for _, tag in job.flushes:
            self._followers.pop(tag, None)
        if job.state is JobState.DONE:
            self._set_ended(job)
        if job.late:
            _less(self._late_on, (job.volume, type(job.message)))
        job.state = JobState.ANSWERED

    def _start_held(self) -> None:
        still_held: list[Job] = []
        blocked: set[Any] = set()
        for job in self._held:
            if (
                self._running < self._limit
                and self._running_on[job.volume] < self._limit_each
                and self._is_free(job.shared, job.alone, blocked)
                and self._start(job)
            ):
                continue
            blocked.update(job.shared, job.alone)
            still_held.append(job)
        self._held = still_held

    def _start(self, job: Job) -> bool:
        job.guest.pin(job.fids, job.payload.pins)
        self._set_running(job)
        if self._workers.start(partial(self._run, job)):
            return True
        self._set_ended(job)
        job.guest.unpin(job.payload.pins)
        job.state = JobState.HELD
        self._workers.when_idle(self._look_again)
        return False

    def _set_running(self, job: Job) -> None:
        job.state = JobState.RUNNING
        if not job.late:
            self._running += 1
            self._running_on[job.volume] += 1
        self._shared.update(job.shared)
        self._alone.update(job.alone)

    def _set_ended(self, job: Job) -> None:
        if not job.late:
            self._running -= 1
            _less(self._running_on, job.volume)
        for key in job.shared:
            _less(self._shared, key)
        self._alone.difference_update(job.alone)

    def _is_free(self, shared: list[Any], alone: list[Any], blocked: set[Any]) -> bool:
        for key in shared:
            if key in blocked or key in self._alone:
                return False
        for key in alone:
            if key in blocked or key in self._alone or key in self._shared:
                return False
        return True

    def _run(self, job: Job) -> None:
        """On a worker."""
        if self._closed or job.work is None:
            self.finish(job, None)
        else:
            self.perform(job, job.work)

    def perform(self, job: Job, work: Callable[[Payload], Reply]) -> None:
        """Do the work of a job on this thread, to its end. What it returns may be more work."""
        reply: Reply
        try:
            reply = work(job.payload)
            while isinstance(reply, Later):
                reply = reply.work(job.payload)
        except OSError as error:
            reply = job.guest.session.error(to_errno(error))
        except Exception:
            log.exception("%s: a bug made a request fail: %s", self._name, type(job.message))
            reply = job.guest.session.error(errno.EIO)
        self.finish(job, reply)


def _let_go(jobs: list[Job]) -> None:
    """Perhaps the last that use a file: closing it may have to wait for its storage."""
    for job in jobs:
        job.guest.let_go(job.fids)


def _less(counter: "Counter[Any]", key: Any) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
