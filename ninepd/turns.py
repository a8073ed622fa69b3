"""Which thread serves a ring, and who does when that one does not come back from a request.

One thread serves, one watches, one waits to take over. They share what is left of the batch.

    Turn.claim    holds the slot of the request that is being served. Whoever pops it decides what
                  becomes of the request: the serving thread, when it has come back with the reply,
                  or the watcher, when it has not. Popping from a list is atomic, and costs nothing.

If the watcher has it, the request becomes a job (jobs.py), and another thread goes on with the
batch.
"""

import errno
import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Final

from mypy_extensions import i64

from ninepd.answers import Answers
from ninepd.errors import RingBroken, to_errno
from ninepd.export.descriptors import Budget
from ninepd.jobs import Job, Jobs
from ninepd.ops.replies import Later, Reply
from ninepd.vring import REQUEST, Vring, Watch
from ninepd.workers import Workers

log = logging.getLogger(__name__)

_NO_SLOT: Final = -1
"""A claim on no request: room is made for the next one."""


class Turn:
    """One thread's turn at the ring. If the turn was taken from it, ``job`` is its request."""

    __slots__ = ("claim", "job")

    def __init__(self) -> None:
        self.claim: list[int | None] = [None, None, None]
        """Behind the Nones the slot of the request that it serves. Its own: whoever comes back late
        must not take that of the thread that serves the ring by then. With the Nones the list never
        becomes so short that Python gives its memory back, only to ask for it again."""
        self.job: Job | None = None


class Turns:
    """The threads of one ring. Its subclass serves the requests.

    ``start``, ``pause`` and ``close`` are the loop's; all else runs on whichever thread serves the
    ring, or where it says so.
    """

    def __init__(
        self,
        vring: Vring,
        watch: Watch,
        workers: Workers,
        budget: Budget,
        *,
        workers_max: int,
        poll_us: int,
        name: str,
    ) -> None:
        self._vring = vring
        self._watch = watch
        self._workers = workers
        self._budget = budget
        self._poll_us = poll_us
        self._name = name
        self._answers = Answers(vring, name)
        self._jobs = Jobs(name, workers, vring.wake, workers_max)
        self._batch: Iterator[tuple[int, ...]] = iter(())
        """What is left of it: the next to serve the ring goes on with that."""
        self._stopping = False
        self._deadline = 0.0
        """Until when a pause waits for requests that are out."""
        self._watched = False
        self._begun: i64 = 0
        """Requests that were begun, by which the watcher sees that one lasts."""
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

    # What becomes of a request

    @abstractmethod
    def _serve_batch(self, turn: Turn) -> bool:
        """Serve what is left of the batch; False if somebody else does that now."""

    @abstractmethod
    def _job_under_way(self, head: int) -> Job:
        """Of the request that the serving thread is in."""

    @abstractmethod
    def _take_data(self, job: Job) -> None:
        """Copy what a job needs of guest memory, which it will not touch from now on; OSError."""

    @abstractmethod
    def _complete(self, job: Job) -> None:
        """Answer a job. The last of a session may have more to do."""

    @abstractmethod
    def _take_stock(self) -> None:
        """A batch is done: tell whoever watches what the guest holds now."""

    # On the loop thread

    def start(self) -> None:
        """Serve the ring until ``pause``; OSError if there are no threads to be had.

        One thread serves, one watches, and one is there to take over.
        """
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

    def close(self) -> None:
        """Forget what is out; the ring is gone. It must rest."""
        self.on_rest = _nothing
        self._watch.stop()
        self._jobs.close()

    def _serve(self, turn: Turn) -> None:
        """Serve the ring until it is to rest, or until the turn is taken away."""
        try:
            while self._serve_batch(turn):
                if self._jobs.by_tag:
                    for job in self._jobs.completed():
                        self._complete(job)
                self._answers.publish()
                self._take_stock()
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
                job = self._turn.job = self._job_under_way(head)
                self._jobs.adopt(job)
                self._touching += job.moves_data
                self._vring.stats.numbers.stalls += 1
                log.debug("%s: tag %d takes long: %s", self._name, job.tag, job.message)
            self._turn = turn = Turn()
        self._budget.take_over()
        self._answers.publish()
        if not self._workers.start(partial(self._serve, turn)):
            self._serve(turn)  # unwatched: better than not at all

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
                self._take_data(job)
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


def _nothing() -> None:
    pass
