"""Locks on state, which nobody holds while the host is asked.

A system call on the export may take as long as dead storage takes. Whoever held a lock meanwhile
would keep everybody else waiting, so the pattern is: look and pin under the lock, let go, ask the
host, lock again, see that nothing has changed, commit; who loses a race closes what it has opened.

Order: a thread that holds a lock takes only locks of a higher rank. Both rules are checked where
NINEPD_CHECKS=1 is in the environment, as it is in tests; otherwise these are plain locks.
"""

import os
import threading
from types import TracebackType
from typing import Final, Protocol

CHECKS: Final = os.environ.get("NINEPD_CHECKS") == "1"

GUEST: Final = 1
"""Rank of a guest's fids and their users."""
DESCRIPTORS: Final = 2
"""Rank of an export's descriptors, handles and volumes."""


class Lock(Protocol):
    """What ``with`` needs."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class _Held(threading.local):
    """Ranks of the locks that the calling thread holds."""

    def __init__(self) -> None:
        self.ranks: list[int] = []


_held: Final = _Held()


class CheckedLock:
    """One that knows who holds it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()

    def __enter__(self) -> bool:
        if _held.ranks and _held.ranks[-1] >= self._rank:
            raise AssertionError(f"a lock of rank {self._rank} is taken behind {_held.ranks}")
        self._lock.acquire()
        _held.ranks.append(self._rank)
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        _held.ranks.pop()
        self._lock.release()


def state_lock(rank: int) -> Lock:
    """A lock of this rank, checked or plain."""
    return CheckedLock(rank) if CHECKS else threading.Lock()


def assert_unlocked() -> None:
    """The host is about to be asked: the calling thread may hold no lock. Only with CHECKS."""
    if _held.ranks:
        raise AssertionError(f"the host is asked while locks are held: ranks {_held.ranks}")
