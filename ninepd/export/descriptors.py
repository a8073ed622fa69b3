"""Descriptors as a budget: what is idle is put aside when they run short, and comes back on use.

A ``Holder`` owns one descriptor, or none while it is put aside. Whoever reads ``fd`` gets an open
one, which stays open at least until the next ``make_room``: that is called only on the thread that
serves requests, between them or where one wants more descriptors. Work on other threads pins the
holders it uses.

Which holder goes is decided by second chance: those used since the last look stay (the same policy
as QEMU's v9fs_reclaim_fd, which however reopens by path).
"""

import errno
import logging
import os
import threading
from abc import abstractmethod
from typing import Final

from mypy_extensions import i32, mypyc_attr

log = logging.getLogger(__name__)

RESERVE_MAX: Final = 256
"""Descriptors kept back for sockets, guest memory, eventfds and what one request needs."""


def budget_of(limit: int) -> int:
    """How many of ``limit`` descriptors fids may keep open."""
    return limit - min(RESERVE_MAX, max(limit // 4, 64))


_thread = threading.local()


def mark_worker() -> None:
    """The calling thread is a worker: what it finds is not put aside under its hands."""
    _thread.is_worker = True


def on_worker() -> bool:
    return getattr(_thread, "is_worker", False)


@mypyc_attr(acyclic=True)
class Holder:
    """Owner of a descriptor that can be closed and had again. Subclasses know how.

    Acyclic: the garbage collector need not look at a million of them, because each gives up its
    references when it is closed.
    """

    __slots__ = ("_fd", "at", "pins", "recent")

    def __init__(self, fd: int) -> None:
        """Take over ``fd``. Whoever makes one adds it to its budget."""
        self._fd: i32 = fd
        self.pins: i32 = 0
        """Users on other threads, and other reasons not to put it aside."""
        self.at: i32 = 0
        """Where it stands among the open ones; the budget's."""
        self.recent = True

    @property
    @abstractmethod
    def budget(self) -> "Budget":
        """That counts its descriptor."""

    @property
    def fd(self) -> int:
        """The open descriptor. If it has to be opened again: ESTALE if the file is gone."""
        fd = self._fd
        if fd < 0:
            return self._bring_back()
        self.recent = True
        return fd

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def _bring_back(self) -> int:
        with self.budget.lock:
            self.give(self._restore())
            return self._fd

    def give(self, fd: int) -> None:
        """Take over a descriptor of the same file, if there is none already."""
        budget = self.budget
        with budget.lock:
            if self._fd >= 0:  # another thread was faster
                os.close(fd)
                return
            self._fd = fd
            self.recent = True
            budget.resting -= 1
            budget.add(self)

    def leave(self) -> int:
        """Not be counted any more; under the budget's lock. Returns what is to be closed, or -1."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            self.budget.resting -= 1
        else:
            self.budget.remove(self)
        return fd

    def rest(self) -> None:
        """Close until the next use; under the budget's lock."""
        self.budget.remove(self)
        self.budget.resting += 1
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as error:
            log.warning("closing an idle file: %s", error)

    def discard(self) -> None:
        """Close for good. OSError, as of close(2): it is closed all the same."""
        with self.budget.lock:
            fd = self.leave()
        if fd >= 0:
            os.close(fd)

    @abstractmethod
    def _restore(self) -> int:
        """Open the same file again, under the budget's lock; OSError if that cannot be done."""

    @abstractmethod
    def may_rest(self) -> bool:
        """Could ``_restore`` succeed later? Asked just before it is put aside."""


class Budget:
    """The descriptors of one export's fids."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._high = limit - limit // 16
        self.lock = threading.RLock()
        """Guards it, its holders' descriptors, and the handle table."""
        self._frozen = False
        self.resting = 0
        """Holders that are put aside."""
        self._open: list[Holder] = []
        self._hand = 0
        """Who is looked at next, round and round."""
        self._calls_to_skip = 0
        self._exhausted = False
        """Has it been said that there are too few? Once, until there is room again."""

    @property
    def used(self) -> int:
        return len(self._open)

    def add(self, holder: Holder) -> None:
        """Under the lock, like ``remove``."""
        holder.at = len(self._open)
        self._open.append(holder)

    def remove(self, holder: Holder) -> None:
        assert self._open[holder.at] is holder  # noqa: S101 - else others would be mixed up
        last = self._open.pop()
        if last is not holder:  # it fills the gap
            self._open[holder.at] = last
            last.at = holder.at

    @property
    def crowded(self) -> bool:
        """Is it time to ``make_room``?"""
        return len(self._open) >= self._high and not self._frozen

    def freeze(self) -> None:
        """Nothing is put aside any more."""
        self._frozen = True

    def check(self, wanted: int = 1) -> None:
        """EMFILE if so many more descriptors are too many, and nothing is idle.

        What a caller has read from ``fd`` before may not be used behind it.
        """
        if len(self._open) + wanted <= self.limit:
            if self._exhausted and len(self._open) < self._high:
                self._exhausted = False
            return
        if not on_worker():
            self._calls_to_skip = 0
            self.make_room()
        if len(self._open) + wanted > self.limit:
            if not self._exhausted:
                log.warning(
                    "guests are refused new files: all %d descriptors are in use; raise the limit "
                    "of open files (LimitNOFILE=)",
                    self.limit,
                )
            self._exhausted = True
            raise OSError(errno.EMFILE, f"all {self.limit} descriptors are in use")

    def make_room(self) -> None:
        """Put idle holders aside, so that there is room again. On the device thread only."""
        if self._calls_to_skip:
            self._calls_to_skip -= 1
            return
        wanted = self.limit - self.limit // 8
        with self.lock:
            # Each is looked at twice at the most: once to lose its second chance.
            for _ in range(2 * len(self._open)):
                if len(self._open) <= wanted:
                    return
                self._hand = self._hand % len(self._open)
                holder = self._open[self._hand]
                if not holder.recent and not holder.pins and holder.may_rest():
                    holder.rest()  # another one takes its place
                    continue
                holder.recent = False
                self._hand += 1
            # Nearly all are busy: the next look would find the same, so it can wait a little.
            self._calls_to_skip = self.limit // 16
