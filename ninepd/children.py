"""The processes that a supervisor has: one for each export, and one through which others look."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from ninepd import daemon
from ninepd.config import Config
from ninepd.control.doors import Doors
from ninepd.control.links import Links
from ninepd.inspection import Ends
from ninepd.logs import concerning
from ninepd.offer import Offer
from ninepd.presence import Bell, Presence

log = logging.getLogger(__name__)

BACK_OFF: Final = (0, 0.1, 0.5, 1, 2, 5)
"""Seconds from the end of a process to the start of the next, one after the other."""
_LIVED_SECONDS: Final = 10
"""What a process must have lived, so that its end is the first one again."""


class Child:
    """A process that is started again when it ends."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.pid = 0
        self.due: float | None = 0.0
        """When it is to be started, if it does not run."""
        self.started = 0.0
        self.leaves = False
        """Was its process told to make way for another?"""
        self._deaths = 0

    def concerning(self) -> contextlib.AbstractContextManager[None]:
        """What is logged meanwhile is about it."""
        return contextlib.nullcontext()

    def runs(self, pid: int) -> None:
        """Its process was started."""
        self.pid, self.due, self.started = pid, None, time.monotonic()

    def ended(self) -> None:
        """Its process has, however."""
        self.pid = 0

    def put_off(self) -> float:
        """It has died: when is it to be started again? Returns the seconds until then."""
        now = time.monotonic()
        if now - self.started >= _LIVED_SECONDS:
            self._deaths = 0
        seconds = BACK_OFF[min(self._deaths, len(BACK_OFF) - 1)]
        self._deaths += 1
        self.due = now + seconds
        return seconds


class Worker(Child):
    """An export and its process."""

    def __init__(self, offer: Offer, watched: bool) -> None:
        super().__init__(offer.export.tag)
        self.offer = offer
        self.presence = Presence()
        self.links = Links() if watched else None
        """To whoever looks, if somebody may."""
        self.withdrawn = False
        """Is the export to be served no more?"""

    def concerning(self) -> contextlib.AbstractContextManager[None]:
        return concerning(self.tag)

    def leave(self) -> None:
        """Its process, if there is one, serves its guest as long as that stays, and nobody else."""
        self._deaths = 0
        self.due = None if self.pid or self.withdrawn else 0.0
        if self.pid and not self.leaves:
            self.leaves = True
            os.kill(self.pid, daemon.RETIRE)
        if self.pid and self.presence.look():
            log.warning(
                "reload: %s: its guest is connected, and keeps this export as it is until it "
                "disconnects",
                self.tag,
            )

    def runs(self, pid: int) -> None:
        if self.links is not None and self.started and self._deaths:  # not to make way
            self.links.stats.numbers.restarts += 1
        super().runs(pid)
        if not self.offer.listener.listening:
            self.offer.close()  # the descriptor of a front end, which is its process's alone

    def ended(self) -> None:
        super().ended()
        self.presence.reset()
        if self.links is not None:
            self.links.stats.forget_gauges()

    def serve(self, once: bool) -> None:
        """Be its process."""
        self.offer.listener.forget_name()
        tell = self.presence.tell
        if self.links is None:
            daemon.serve(self.offer, once, tell)
        else:
            self.links.serve()
            ends = Ends(self.links.answering, self.links.telling)
            daemon.serve(self.offer, once, tell, self.links.stats, ends)

    def forget(self) -> None:
        """It is served no more."""
        self.presence.close()
        if self.links is not None:
            self.links.close()

    def close(self) -> None:
        """It is another process's business."""
        self.offer.close()
        self.forget()


class Watcher(Child):
    """The process through which others can look at what the exports do."""

    def __init__(self, config: Config) -> None:
        """UsageError if its sockets cannot be had."""
        super().__init__("control")
        self._doors = Doors(config)
        self.bell = Bell()
        # What it needs is loaded for its sake only, and before it is shut in.
        self._serve = import_module("ninepd.control.process").serve

    def leave(self) -> None:
        """Exports have come or gone: the next process knows those that there are then."""
        if self.pid and not self.leaves:
            self.leaves = True
            os.kill(self.pid, signal.SIGTERM)

    def serve(self, workers: Sequence[Worker]) -> None:
        """Be its process."""
        exports = []
        for worker in workers:
            worker.offer.close()
            worker.presence.close()
            if worker.links is not None:
                exports.append((worker.offer.export, worker.links))
        self._serve(self._doors, exports, self.bell.ring)

    def close(self) -> None:
        """It is another process's business."""
        self._doors.close()
        self.bell.close()

    def withdraw(self) -> None:
        """Nobody shall connect any more."""
        self._doors.remove()
