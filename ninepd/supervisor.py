"""A process for each export, and one that watches over them.

Several exports in one process would share an interpreter, a descriptor table and a loop: what one
guest does the others would feel. So the supervisor loads the program, finds out whether all exports
can be served, and forks. It keeps the sockets open on which they listen, so that a process that is
started again goes on with the same one, but accepts on none and never has a front end's descriptor.

It has one thread, no loop, and sleeps until a signal comes. If it is killed itself the exports are
served on, because guests need them more than order; a service manager that kills the whole control
group ends them too.
"""

import contextlib
import gc
import logging
import math
import os
import signal
import time
from collections.abc import Collection, Iterator
from typing import Final, NoReturn

from ninepd import daemon, sandbox, systemd
from ninepd.capabilities import (
    CAP_SETPCAP,
    CAP_SYS_ADMIN,
    CAP_SYS_CHROOT,
    REACHING,
    give_up,
    privileged,
)
from ninepd.config import Config, Sandbox
from ninepd.errors import UsageError
from ninepd.listener import check_descriptor
from ninepd.logs import Format, Level, concerning, start_logging
from ninepd.offer import Offer
from ninepd.presence import Presence
from ninepd.process import close_inherited, name_process, raise_file_limit

log = logging.getLogger(__name__)

BACK_OFF: Final = (0, 0.1, 0.5, 1, 2, 5)
"""Seconds from the end of a process to the start of the next, one after the other."""
_LIVED_SECONDS: Final = 10
"""What a process must have lived, so that its end is the first one again."""
_LEAVE_SECONDS: Final = 1.8
"""From SIGTERM to SIGKILL: more than requests that are out are given (daemon.py)."""
_KILL_SECONDS: Final = 0.1
"""The kernel may keep a process until its storage answers: who waits for that waits in vain."""
_SIGNALS: Final = daemon.HANDLED | {signal.SIGCHLD, signal.SIGIO}


class _Worker:
    """An export and its process."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.tag = offer.export.tag
        self.pid = 0
        self.due: float | None = 0.0
        """When it is to be started, if it does not run."""
        self.started = 0.0
        self.presence = Presence()
        self._deaths = 0

    def put_off(self) -> float:
        """It has died: when is it to be started again? Returns the seconds until then."""
        now = time.monotonic()
        if now - self.started >= _LIVED_SECONDS:
            self._deaths = 0
        seconds = BACK_OFF[min(self._deaths, len(BACK_OFF) - 1)]
        self._deaths += 1
        self.due = now + seconds
        return seconds


class _Supervisor:
    def __init__(self, offers: list[Offer], once: bool) -> None:
        self._workers = [_Worker(offer) for offer in offers]
        self._once = once
        self._status = 0
        self._told = ""
        """What the service manager knows of us."""
        self._alive_seconds = systemd.watchdog_seconds()
        self._alive_at = time.monotonic() + self._alive_seconds
        """When it is to be told that we are alive."""

    def run(self) -> int:
        """Until it is told to stop, or nothing is left to serve. Returns the exit status."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else children would vanish unseen
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        name_process("supervisor")
        # What is never looked at again stays shared by all that are forked.
        gc.collect()
        gc.freeze()
        self._shut_in()
        self._start_due()
        systemd.notify("READY=1", wait=True)
        while self._running or self._next_due is not None:
            self._tell_manager()
            number = self._wait()
            if number in {signal.SIGTERM, signal.SIGINT}:
                systemd.notify("STOPPING=1")
                self._stop()
                return 0
            if number == signal.SIGHUP:
                self._signal(signal.SIGHUP)
            for worker, status in self._reap():
                with concerning(worker.tag):
                    self._follow_up(worker, status)
            self._start_due()
        return self._status

    def _shut_in(self) -> None:
        """As far as those can be who still have to shut themselves in."""
        offers = [worker.offer for worker in self._workers]
        keep = REACHING.union({CAP_SETPCAP}, *(offer.capabilities for offer in offers))
        if any(offer.sandbox.mode is Sandbox.NAMESPACE for offer in offers):
            keep |= {CAP_SYS_ADMIN, CAP_SYS_CHROOT}  # the latter from within a chroot(2)
        systemd.connect()
        give_up(keep)
        if all(offer.sandbox.filtered for offer in offers):
            sandbox.watch(
                by_handle=any(offer.by_handle for offer in offers),
                users=any(offer.sandbox.users for offer in offers),
            )

    def _tell_manager(self) -> None:
        """That we are alive, if it is time; and how many have a front end, if that has changed."""
        now = time.monotonic()
        if now >= self._alive_at:
            self._alive_at = now + self._alive_seconds
            systemd.notify("WATCHDOG=1")
        front_ends = sum(worker.presence.look() for worker in self._workers)
        status = systemd.status(f"{len(self._workers)} exports", front_ends)
        if status != self._told:
            self._told = status
            systemd.notify(status)

    # Waiting

    @property
    def _running(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.pid]

    @property
    def _next_due(self) -> float | None:
        """When the next process is to be started."""
        return min((w.due for w in self._workers if w.due is not None), default=None)

    def _wait(self) -> int | None:
        """The next signal; None if it is time for something."""
        due = self._next_due
        until = self._alive_at if due is None else min(due, self._alive_at)
        if until == math.inf:
            return signal.sigwaitinfo(_SIGNALS).si_signo
        return _signal_before(until, _SIGNALS)

    # Processes

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.due is not None and worker.due <= now:
                with concerning(worker.tag):
                    self._start(worker)

    def _start(self, worker: _Worker) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            wait = worker.put_off()
            log.warning("%s: no process for it, next try in %g s: %s", worker.tag, wait, error)
            return
        if not pid:
            self._become(worker)
        worker.pid, worker.due, worker.started = pid, None, time.monotonic()
        if not worker.offer.listener.listening:
            worker.offer.close()  # the descriptor of a front end, which is its process's alone

    def _become(self, worker: _Worker) -> NoReturn:
        """The life of a child."""
        status = 1
        try:
            systemd.leave()
            worker.offer.listener.forget_name()
            for other in self._workers:
                if other is not worker:
                    other.offer.close()
                    other.presence.close()
            daemon.serve(worker.offer, self._once, worker.presence.tell)
            status = 0
        except UsageError as error:
            log.error("%s: %s", worker.tag, error)  # noqa: TRY400 - a sentence
        except BaseException:
            log.exception("%s: a bug ended its process", worker.tag)
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap(self) -> Iterator[tuple[_Worker, int]]:
        """Processes that have ended, and their exit status, or minus the signal."""
        for worker in self._running:
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                worker.pid = 0
                worker.presence.reset()
                yield worker, os.waitstatus_to_exitcode(status)

    def _follow_up(self, worker: _Worker, status: int) -> None:
        """A process has ended, and was not told to."""
        if not worker.offer.listener.listening or (self._once and not status):
            worker.offer.withdraw()
            if status:
                log.error("%s: its process %s", worker.tag, _described(status))
                self._status = 1
            return
        wait = worker.put_off()
        log.error(
            "%s: its process %s; the next starts in %g s", worker.tag, _described(status), wait
        )

    def _signal(self, number: int) -> None:
        for worker in self._running:
            os.kill(worker.pid, number)  # not reaped yet, so the number is still its own

    def _stop(self) -> None:
        """All leave, willing or not. Sockets go first: nobody shall connect in vain."""
        for worker in self._workers:
            worker.offer.withdraw()
        for number, seconds in ((signal.SIGTERM, _LEAVE_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            self._signal(number)
            deadline = time.monotonic() + seconds
            while self._running and _signal_before(deadline, {signal.SIGCHLD}):
                list(self._reap())


def _signal_before(deadline: float, numbers: Collection[int]) -> int | None:
    """Wait for one of these signals; None if it is too late."""
    found = signal.sigtimedwait(numbers, max(deadline - time.monotonic(), 0))
    return found.si_signo if found is not None else None


def _described(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a realtime signal
        return f"was killed by signal {-status}"


def serve(config: Config) -> int:
    """Serve all exports until told to stop; returns the exit status. UsageError: none is served."""
    for number, export in enumerate(config.exports, 1):
        if export.fd is not None:
            with _placed(config, number):
                check_descriptor(export.fd)
    close_inherited({export.fd for export in config.exports if export.fd is not None})
    start_logging(Level(config.log_level), Format(config.log_format))
    file_limit = raise_file_limit()
    offers: list[Offer] = []
    try:
        for number, export in enumerate(config.exports, 1):
            with concerning(export.tag), _placed(config, number):
                offers.append(Offer(export, file_limit))
        for offer in offers:
            with concerning(offer.export.tag):
                log.info("serving %s", offer)
                _warn(offer)
        if len(offers) > 1:
            return _Supervisor(offers, config.once).run()
        daemon.serve(offers[0], config.once)
        return 0
    finally:
        for offer in offers:
            offer.withdraw()


@contextlib.contextmanager
def _placed(config: Config, number: int) -> Iterator[None]:
    """What is wrong with an export is said with its place."""
    try:
        yield
    except UsageError as error:
        raise config.placed(number, error) from None


def _warn(offer: Offer) -> None:
    if offer.model == "passthrough" and not privileged():
        log.warning(
            "%s: without root, guests can neither create files as a user other than %d nor give "
            "files away (EPERM); --security-model mapped-xattr keeps owners apart from the host's",
            offer.export.tag,
            os.geteuid(),
        )
