"""Descriptors as a budget: what is idle is reclaimed when they run short, and comes back on use.

A ``Holder`` owns one descriptor, or none while it is reclaimed. Whoever reads ``fd`` gets an open
one. It stays open as long as the holder is pinned; without a pin until the next ``make_room``,
which is called only by the thread that serves the ring, between requests, and does nothing while
the ring of another connection is served as well. So a request that may
outlast that moment pins what it uses: its fids' holders are pinned when it becomes a job, and what
it finds on its way is pinned at once (``HandleTable.adopt``), until its end.

Which holder goes is decided by second chance: those used since the last look stay (the same policy
as QEMU's v9fs_reclaim_fd, which however reopens by path).

One lock guards the budget, its holders and the handle table (``Budget.lock``, statelock.py). It is
never held while the host is asked.
"""

import errno
import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Final

from mypy_extensions import i32, mypyc_attr

from ninepd.statelock import DESCRIPTORS, state_lock

log = logging.getLogger(__name__)

RESERVE_MAX: Final = 256
"""Descriptors kept back for sockets, guest memory, eventfds and what one request needs."""
SLICE: Final = 64
"""Holders that one ``make_room`` asks the host about, at 16 us each."""
GLANCES: Final = 1024
"""Holders that it passes by without asking, at 0.1 us each."""
SPARE: Final = 32
"""Descriptors that the longest requests take: a walk of 16 names, some of them at once."""

_GONE: Final = -2


def budget_of(limit: int) -> int:
    """How many of ``limit`` descriptors fids may keep open."""
    return limit - min(RESERVE_MAX, max(limit // 4, 64))


@mypyc_attr(acyclic=True)
class Holder:
    """Owner of a descriptor that can be closed and had again. Subclasses know how.

    Acyclic: the garbage collector need not look at a million of them, because each gives up its
    references when it is closed.
    """

    __slots__ = ("_fd", "at", "followed", "pins", "recent")

    def __init__(self, fd: int) -> None:
        """Take over ``fd``. Whoever makes one adds it to its budget."""
        self._fd: i32 = fd
        self.pins: i32 = 0
        """Requests that use it, and other reasons not to put it aside."""
        self.at: i32 = 0
        """Where it stands among the open ones; the budget's."""
        self.recent = True
        self.followed = False
        """Of a handle: has the host moved it since the guest found it, and was that noticed? It
        stands here because here it takes no memory."""

    @property
    @abstractmethod
    def budget(self) -> "Budget":
        """That counts its descriptor."""

    @property
    def fd(self) -> int:
        """The open descriptor. If it has to be opened again: ESTALE if the file is gone."""
        self.recent = True
        fd = self._fd
        return fd if fd >= 0 else self._bring_back()

    @property
    def stays(self) -> bool:
        """Is it plain, without asking the host, that it could not be had again?"""
        return False

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    @property
    def peek(self) -> int:
        """The descriptor, negative if there is none now; this does not count as use."""
        return self._fd

    def _bring_back(self) -> int:
        try:
            return self.regain(self._restore())
        except OSError:
            fd = self._fd
            if fd >= 0:  # another thread was faster, and the file may have moved since
                return fd
            raise

    def regain(self, fd: int) -> int:
        """Take over a descriptor of the same file, if there is none already. Returns what is held.

        ESTALE if the file was let go meanwhile.
        """
        with self.budget.lock:
            surplus = self.take(fd)
            held = self._fd
        if surplus >= 0:
            self.budget.close(surplus)
        if held < 0:
            raise OSError(errno.ESTALE, "the file was let go")
        return held

    def take(self, fd: int) -> int:
        """As ``regain``, under the lock; returns what is to be closed, or -1."""
        if self._fd != -1:  # another thread was faster
            return fd
        self._fd = fd
        self.recent = True
        self.budget.reclaimed -= 1
        self.budget.add(self)
        return -1

    def forget(self) -> int:
        """Not be counted any more; under the lock. Returns what is to be closed, or -1."""
        fd = self._fd
        if fd >= 0:
            self.budget.remove(self)
        elif fd == -1:
            self.budget.reclaimed -= 1
        self._fd = _GONE
        return fd if fd >= 0 else -1

    def reclaim(self) -> int:
        """Have no descriptor until the next use; under the lock. Returns what is to be closed."""
        self.budget.remove(self)
        self.budget.reclaimed += 1
        self.budget.reclaims += 1
        fd: int = self._fd
        self._fd = -1
        return fd

    @abstractmethod
    def _restore(self) -> int:
        """Open the same file again; OSError if that cannot be done."""

    @abstractmethod
    def may_reclaim(self) -> bool:
        """Could ``_restore`` succeed later? Asks the host; the holder is pinned meanwhile."""


class Budget:
    """The descriptors of one export's fids."""

    def __init__(self, limit: int, close: Callable[[int], None]) -> None:
        self.limit = limit
        self._close = close
        self._high = limit - min(max(limit // 8, SPARE), limit // 4)
        self.lock = state_lock(DESCRIPTORS)
        """Guards it, its holders' descriptors, and the handle table."""
        self._serving: i32 = 0
        """Threads that serve a ring on these descriptors."""
        self.reclaimed = 0
        """Holders that are reclaimed."""
        self.reclaims = 0
        """How often one was, since that was taken note of."""
        self.files = 0
        """Holders that are open files, reclaimed or not."""
        self._open: list[Holder] = []
        self._hand = 0
        """Who is looked at next, round and round."""
        self._turn = 0
        """Of whoever makes room: the last to begin may reclaim."""
        self._fruitless = 0
        """Looks since one was reclaimed."""
        self._calls_to_skip = 0
        self._exhausted = False
        """Has it been said that there are too few? Once, until there is room again."""

    @property
    def used(self) -> int:
        return len(self._open)

    def enter(self, holder: Holder) -> None:
        """A new holder, which may be reclaimed already. Under the lock."""
        if holder.is_open:
            self.add(holder)
        else:
            self.reclaimed += 1

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

    def take_reclaims(self) -> int:
        """Take note of them."""
        with self.lock:
            reclaims, self.reclaims = self.reclaims, 0
        return reclaims

    def pin(self, holders: list[Holder], pins: list[Holder]) -> None:
        """Keep their descriptors open; adds them to ``pins``, for ``unpin``."""
        with self.lock:
            for holder in holders:
                holder.pins += 1
            pins.extend(holders)

    def unpin(self, pins: list[Holder]) -> None:
        """Take all of these back, as at the end of a request, and empty the list."""
        with self.lock:
            for holder in pins:
                holder.pins -= 1
            pins.clear()

    @property
    def crowded(self) -> bool:
        """Is it time to ``make_room``?"""
        return len(self._open) >= self._high and self._serving < 2

    def close(self, fd: int) -> None:
        """Close a descriptor that nobody asks about any more. Not under the lock."""
        try:
            self._close(fd)
        except OSError as error:
            log.warning("closing an idle file: %s", error)

    def begin_serving(self) -> None:
        """A thread serves a ring from now on. While several do, none may reclaim: an old
        connection is at its last batch, whose descriptors are not pinned.
        """
        with self.lock:
            self._serving += 1

    def end_serving(self) -> None:
        """It does no more."""
        with self.lock:
            self._serving -= 1

    def check(self, wanted: int = 1) -> None:
        """EMFILE if so many more descriptors are too many: all are in use."""
        if len(self._open) + wanted <= self.limit:
            if self._exhausted and len(self._open) < self._high:
                self._exhausted = False
            return
        if not self._exhausted:
            self._exhausted = True
            log.warning(
                "guests are refused new files: all %d descriptors are in use; raise the limit "
                "of open files (LimitNOFILE=)",
                self.limit,
            )
        raise OSError(errno.EMFILE, f"all {self.limit} descriptors are in use")

    def take_over(self) -> None:
        """Another thread serves the ring from now on: the old one puts nothing aside any more."""
        with self.lock:
            self._turn += 1

    def make_room(self) -> None:
        """Put idle holders aside, so that there is room again: a slice of the work.

        Only the thread that serves the ring calls this, and only while it has no request in hand.
        """
        last_chance = len(self._open) + SPARE // 2 >= self.limit
        if self._calls_to_skip and not last_chance:
            self._calls_to_skip -= 1
            return
        with self.lock:
            self._turn += 1
            turn = self._turn
            if last_chance:  # else EMFILE could be told while one is idle since the last look
                self._fruitless = 0
        for _ in range(SLICE):
            with self.lock:
                holder = self._next_idle(turn)
                if holder is None:
                    return
                holder.pins += 1
            may_reclaim = False
            fd = -1
            try:
                may_reclaim = holder.may_reclaim()
            except OSError as error:
                log.warning("an idle file cannot be looked at: %s", error)
            with self.lock:
                holder.pins -= 1
                if may_reclaim and self._is_idle(holder) and turn == self._turn:
                    self._hand = holder.at  # of the one that fills the gap
                    self._fruitless = 0
                    fd = holder.reclaim()
            if fd >= 0:
                self.close(fd)

    @staticmethod
    def _is_idle(holder: Holder) -> bool:
        return holder.is_open and not holder.recent and not holder.pins and not holder.stays

    def _next_idle(self, turn: int) -> Holder | None:
        """Who may go next; None if that is enough for now. Under the lock."""
        wanted = self.limit - 2 * (self.limit - self._high)
        if turn != self._turn:
            return None
        for _ in range(GLANCES):
            count = len(self._open)
            if count <= wanted:
                return None
            if self._fruitless > 2 * count:  # each lost its second chance, and was looked at
                # Nearly all are busy: the next look would find the same, so it can wait a little.
                self._fruitless = 0
                self._calls_to_skip = self.limit // 64
                return None
            self._hand = self._hand % count
            holder = self._open[self._hand]
            self._hand += 1
            self._fruitless += 1
            if self._is_idle(holder):
                return holder
            holder.recent = False
        return None
