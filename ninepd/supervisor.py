"""A process for each export of a file, and one that watches over them.

Several exports in one process would share an interpreter, a descriptor table and a loop: what one
guest does the others would feel. So the supervisor loads the program, finds out whether all exports
can be served, and forks. When it is told to it reads the file again, and does the same for what is
new in it. It keeps the sockets open on which they listen, so that a process that is
started again goes on with the same one, but accepts on none and never has a front end's descriptor.

If others shall be able to look at the exports, there is a process for that as well (control/), and
a supervisor be it for one export.

It has one thread, no loop, and sleeps until a signal comes. If it is killed itself the exports are
served on, because guests need them more than order; a service manager that kills the whole control
group ends them too.
"""

import contextlib
import gc
import grp
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
    give_up,
    needed,
    privileged,
)
from ninepd.children import Child, Watcher, Worker
from ninepd.config import Config, Export
from ninepd.errors import UsageError
from ninepd.listener import check_descriptor
from ninepd.logs import Format, Level, concerning, start_logging
from ninepd.offer import Offer
from ninepd.process import close_inherited, name_process, raise_file_limit
from ninepd.reload import Plan, Read, compare, sockets

log = logging.getLogger(__name__)

_LEAVE_SECONDS: Final = 1.8
"""From SIGTERM to SIGKILL: more than requests that are out are given (daemon.py)."""
_KILL_SECONDS: Final = 0.1
"""The kernel may keep a process until its storage answers: who waits for that waits in vain."""
_SIGNALS: Final = daemon.HANDLED | {signal.SIGCHLD, signal.SIGIO}


class _Supervisor:
    def __init__(
        self, config: Config, read: Read | None, offers: list[Offer], file_limit: int
    ) -> None:
        self._workers = [Worker(offer, config.watched) for offer in offers]
        self._watcher = Watcher(config) if config.watched else None
        self._config = config
        self._read = read
        self._file_limit = file_limit
        self._status = 0
        self._owes_ready = True
        """Does the service manager wait until all processes serve?"""
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
        while any(worker.pid or worker.due is not None for worker in self._workers):
            self._tell_manager()
            number = self._wait()
            if self._watcher is not None and self._watcher.bell.rung():
                log.info("asked to reload by way of --control-path")
                os.kill(os.getpid(), signal.SIGHUP)
            if number in {signal.SIGTERM, signal.SIGINT}:
                systemd.notify("STOPPING=1")
                self._stop()
                return 0
            if number == signal.SIGHUP:
                self._reload()
            for child, status in self._reap():
                with child.concerning():
                    self._follow_up(child, status)
            self._start_due()
        self._stop()
        return self._status

    def _shut_in(self) -> None:
        """As far as those can be who still have to shut themselves in."""
        offers = [worker.offer for worker in self._workers]
        # What any export may take, for those that are added later; and what it takes to shut one
        # in, the last one from within a chroot(2).
        keep = needed(as_others=True, by_handle=True, trusted_xattrs=True)
        keep |= {CAP_SETPCAP, CAP_SYS_ADMIN, CAP_SYS_CHROOT}
        systemd.connect()
        with contextlib.suppress(KeyError):
            grp.getgrnam("")  # no library that this takes can be loaded any more
        give_up(keep)
        if all(offer.sandbox.filtered for offer in offers):
            sandbox.watch(users=any(offer.sandbox.users for offer in offers))

    # The file, again

    def _reload(self) -> None:
        if self._read is None:
            log.warning("reload: there is no configuration file to read again")
            return
        usec = time.monotonic_ns() // 1000
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={usec}", wait=True)
        served = {w.tag: w.offer.export for w in self._workers if not w.withdrawn}
        try:
            wanted = self._read(sockets(served.values()))
        except UsageError as error:
            log.error("reload: nothing was changed: %s", error)  # noqa: TRY400 - a sentence
        else:
            self._follow(compare(self._config, served, wanted), wanted)
        self._owes_ready = True

    def _follow(self, plan: Plan, wanted: Config) -> None:
        """As far as guests notice nothing of it."""
        for option in plan.settings:
            log.warning("reload: --%s is changed by a restart only", option)
        workers = {worker.tag: worker for worker in self._workers}
        for tag in plan.removed:
            with concerning(tag), _reported():
                self._remove(workers[tag])
        for number, export in plan.changed:
            with concerning(export.tag), _reported(), _placed(wanted, number):
                self._change(workers[export.tag], export)
        for number, export in plan.added:
            with concerning(export.tag), _reported(), _placed(wanted, number):
                self._add(workers.get(export.tag), export)
        if self._watcher is not None and (plan.removed or plan.changed or plan.added):
            self._watcher.leave()

    def _remove(self, worker: Worker) -> None:
        log.info("%s: served no more", worker.tag)
        worker.offer.withdraw()
        worker.withdrawn = True
        worker.leave()
        if not worker.pid:
            self._forget(worker)

    def _change(self, worker: Worker, export: Export) -> None:
        before = worker.offer
        worker.offer = self._offer(export, before)
        if worker.offer.listener is before.listener:
            before.close_directory()
        else:
            before.withdraw()
        worker.leave()

    def _add(self, worker: Worker | None, export: Export) -> None:
        """``worker`` has served an export of this tag, and ends."""
        offer = self._offer(export)
        if worker is None:
            self._workers.append(Worker(offer, self._config.watched))
        else:
            worker.offer, worker.withdrawn = offer, False

    def _offer(self, export: Export, before: Offer | None = None) -> Offer:
        if export.fd is not None and (before is None or before.export.fd != export.fd):
            raise UsageError("--fd: a descriptor can be handed over at the start only; restart")
        offer = Offer(export, self._file_limit, before)
        _announce(offer)
        return offer

    def _forget(self, worker: Worker) -> None:
        worker.forget()
        self._workers.remove(worker)
        if self._watcher is not None:
            self._watcher.leave()

    def _tell_manager(self) -> None:
        """That we are alive, if it is time; and what has changed."""
        now = time.monotonic()
        if now >= self._alive_at:
            self._alive_at = now + self._alive_seconds
            systemd.notify("WATCHDOG=1")
        front_ends = sum(worker.presence.look() for worker in self._workers)
        if self._owes_ready:
            if not all(worker.presence.serving for worker in self._workers):
                return
            self._owes_ready = False
            systemd.notify("READY=1", wait=True)
        served = [str(worker.offer) for worker in self._workers if not worker.withdrawn]
        what = served[0] if len(served) == 1 else f"{len(served)} exports"
        status = systemd.status(what, front_ends)
        if status != self._told:
            self._told = status
            systemd.notify(status)

    # Waiting

    @property
    def _children(self) -> list[Child]:
        return [*self._workers] if self._watcher is None else [*self._workers, self._watcher]

    @property
    def _running(self) -> list[Child]:
        return [child for child in self._children if child.pid]

    @property
    def _next_due(self) -> float | None:
        """When the next process is to be started."""
        return min((c.due for c in self._children if c.due is not None), default=None)

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
        for child in self._children:
            if child.due is not None and child.due <= now:
                with child.concerning():
                    self._start(child)

    def _start(self, child: Child) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            wait = child.put_off()
            log.warning("%s: no process for it, next try in %g s: %s", child.tag, wait, error)
            return
        if not pid:
            self._become(child)
        child.runs(pid)

    def _become(self, child: Child) -> NoReturn:
        """The life of a child."""
        status = 1
        try:
            systemd.leave()
            if isinstance(child, Worker):
                for other in self._workers:
                    if other is not child:
                        other.close()
                if self._watcher is not None:
                    self._watcher.close()
                child.serve(self._config.once)
            elif self._watcher is not None:
                self._watcher.serve(self._workers)
            status = 0
        except UsageError as error:
            log.error("%s: %s", child.tag, error)  # noqa: TRY400 - a sentence
        except BaseException:
            log.exception("%s: a bug ended its process", child.tag)
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap(self) -> Iterator[tuple[Child, int]]:
        """Processes that have ended, and their exit status, or minus the signal."""
        for child in self._running:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                child.ended()
                yield child, os.waitstatus_to_exitcode(status)

    def _follow_up(self, child: Child, status: int) -> None:
        """A process has ended."""
        if child.leaves:
            child.leaves = False
            if status:
                log.error("%s: its process %s", child.tag, _described(status))
            if isinstance(child, Worker) and child.withdrawn:
                self._forget(child)
            else:
                child.due = 0.0
            return
        if isinstance(child, Worker) and (
            not child.offer.listener.listening or (self._config.once and not status)
        ):
            child.offer.withdraw()
            if status:
                log.error("%s: its process %s", child.tag, _described(status))
                self._status = 1
            return
        wait = child.put_off()
        log.error(
            "%s: its process %s; the next starts in %g s", child.tag, _described(status), wait
        )

    def _signal(self, number: int) -> None:
        for child in self._running:
            os.kill(child.pid, number)  # not reaped yet, so the number is still its own

    def _stop(self) -> None:
        """All leave, willing or not. Sockets go first: nobody shall connect in vain."""
        for worker in self._workers:
            worker.offer.withdraw()
        if self._watcher is not None:
            self._watcher.withdraw()
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


def serve(config: Config, read: Read | None) -> int:
    """Serve all exports until told to stop; returns the exit status. UsageError: none is served.

    ``read``: reads the file again that they are from, if there is one; else there is one export.
    """
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
                _announce(offer)
        if read is not None or config.watched:
            return _Supervisor(config, read, offers, file_limit).run()
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


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """What cannot be done of a reload is said, and changes nothing for others."""
    try:
        yield
    except UsageError as error:
        log.warning("reload: %s", error)
    except Exception:
        log.exception("reload: a bug left this export as it was")


def _announce(offer: Offer) -> None:
    log.info("serving %s", offer)
    if offer.model == "passthrough" and not privileged():
        log.warning(
            "%s: without root, guests can neither create files as a user other than %d nor give "
            "files away (EPERM); --security-model mapped-xattr keeps owners apart from the host's",
            offer.export.tag,
            os.geteuid(),
        )
