"""Which bytes of one file are locked, and by whom: interval arithmetic, without any system call.

An owner's ranges never overlap (POSIX: a new lock replaces the old one), those of several readers
may. A request costs the logarithm of the number of ranges, and what lies within its own range.
"""

from bisect import bisect_left, bisect_right
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from ninepd.p9.messages import LockType

if TYPE_CHECKING:
    from ninepd.ops.fid import Fid

TO_END: Final = 1 << 63
"""First offset that no range can contain; a length of 0 reaches up to it."""
_start: Final = attrgetter("start")
_end: Final = attrgetter("end")


class Owner(NamedTuple):
    """Who a client says holds a lock."""

    proc_id: int
    client_id: bytes


class Range(NamedTuple):
    """Bytes [start, end) locked by an owner through a fid."""

    start: int
    end: int
    type: LockType
    owner: Owner
    fid: "Fid"


class Cover:
    """By how many ranges each byte is locked: a step function."""

    def __init__(self) -> None:
        self._starts = [0]
        self._counts = [0]
        """From each start up to the next; neighbours differ."""

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, changes: list[tuple[int, int, int]]) -> None:
        """(start, end, count) of each stretch that so many more ranges lock."""
        steps: dict[int, int] = {}
        for start, end, count in changes:
            steps[start] = steps.get(start, 0) + count
            steps[end] = steps.get(end, 0) - count
        places = sorted(steps)
        for at in places:
            self._cut(at)
        more = 0
        for low, high in pairwise(places):
            more += steps[low]
            if more:
                for index in range(self._index(low), self._index(high)):
                    self._counts[index] += more
        for at in reversed(places):
            self._join(self._index(at))

    def locked(self, start: int, end: int) -> int:
        """Sum over the bytes of [start, end): how many ranges lock it."""
        return sum(
            (min(high, end) - max(low, start)) * count
            for low, high, count in self._steps(start, end)
        )

    def held(self) -> list[tuple[int, int]]:
        """What is locked at all, in as few pieces as possible."""
        pieces: list[tuple[int, int]] = []
        for low, high, count in self._steps(0, TO_END):
            if count and pieces and pieces[-1][1] == low:
                pieces[-1] = (pieces[-1][0], high)
            elif count:
                pieces.append((low, high))
        return pieces

    def free(self, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The stretches without any lock that contain bytes of ``pieces``, each once."""
        found: list[tuple[int, int]] = []
        for start, end in _merged(pieces):
            for low, high, count in self._steps(start, end):
                if not count and (not found or found[-1][0] != low):
                    found.append((low, high))
        return found

    def _steps(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(start, end, count) of each step that overlaps [start, end)."""
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, end)
        starts = self._starts[first : last + 1]
        if last == len(self._starts):
            starts.append(TO_END)
        return list(zip(starts, starts[1:], self._counts[first:last], strict=False))

    def _index(self, at: int) -> int:
        """Of the first step that begins there or behind."""
        return bisect_left(self._starts, at)

    def _cut(self, at: int) -> None:
        """Have a step that begins there."""
        index = self._index(at)
        if at < TO_END and (index == len(self._starts) or self._starts[index] != at):
            self._starts.insert(index, at)
            self._counts.insert(index, self._counts[index - 1])

    def _join(self, index: int) -> None:
        """Make one step of two that have become alike."""
        if 0 < index < len(self._starts) and self._counts[index] == self._counts[index - 1]:
            del self._starts[index], self._counts[index]


class Ranges:
    """The locks on one file."""

    def __init__(self) -> None:
        self.cover = Cover()
        self._owners: dict[Owner, list[Range]] = {}
        self._writers: list[Range] = []
        """Those of all owners: no two write locks overlap."""
        self._fids: dict[Fid, dict[Range, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._owners)

    @property
    def written(self) -> bool:
        """Is any of it locked for writing?"""
        return bool(self._writers)

    def all(self) -> list[Range]:
        """Whole, even while another thread changes them: then a mixture of before and after."""
        return [held for ranges in list(self._owners.values()) for held in ranges]

    def of(self, owner: Owner, start: int, end: int) -> list[Range]:
        """What an owner has of [start, end)."""
        return _overlapping(self._owners.get(owner, []), start, end)

    def through(self, fid: "Fid") -> list[Range]:
        """What was locked through a fid, by any owner."""
        return list(self._fids.get(fid, ()))

    def others(self, owner: Owner, start: int, end: int) -> list[Range]:
        """What other owners have of [start, end)."""
        mine = clipped(self.of(owner, start, end), start, end)
        if self.cover.locked(start, end) == sum(high - low for low, high in mine):
            return []
        return [
            held for other in self._owners if other != owner for held in self.of(other, start, end)
        ]

    def rivals(self, new: Range) -> list[Range]:
        """What no other owner may have beside a new lock."""
        if new.type == LockType.WRLCK:
            return self.others(new.owner, new.start, new.end)
        writers = _overlapping(self._writers, new.start, new.end)
        return [held for held in writers if held.owner != new.owner]

    def replaced(self, new: Range) -> tuple[list[Range], list[Range]]:
        """What goes and what comes when an owner gets a range, or gives it back (UNLCK)."""
        start, end = new.start, new.end
        gone: list[Range] = []
        come: list[Range] = []
        for held in self.of(new.owner, max(start - 1, 0), end + 1):
            if held.type == new.type and held.fid is new.fid:
                start, end = min(start, held.start), max(end, held.end)
            elif held.start < new.end and new.start < held.end:
                come += without(held, new.start, new.end)
            else:
                continue
            gone.append(held)
        if new.type != LockType.UNLCK:
            come.append(new._replace(start=start, end=end))
        return gone, come

    def change(self, gone: list[Range], come: list[Range], start: int, end: int) -> None:
        """Some ranges take the place of others; outside [start, end) they cover the same."""
        for held in gone:
            self._remove(held)
        for held in come:
            self._insert(held)
        self.cover.add(
            [(*piece, -1) for piece in clipped(gone, start, end)]
            + [(*piece, 1) for piece in clipped(come, start, end)]
        )

    def _insert(self, new: Range) -> None:
        _insert(self._owners.setdefault(new.owner, []), new)
        if new.type == LockType.WRLCK:
            _insert(self._writers, new)
        self._fids.setdefault(new.fid, {})[new] = None
        new.fid.locks += 1

    def _remove(self, held: Range) -> None:
        ranges = self._owners[held.owner]
        _remove(ranges, held)
        if not ranges:
            del self._owners[held.owner]
        if held.type == LockType.WRLCK:
            _remove(self._writers, held)
        through = self._fids[held.fid]
        del through[held]
        if not through:
            del self._fids[held.fid]
        held.fid.locks -= 1


def clipped(ranges: list[Range], start: int, end: int) -> list[tuple[int, int]]:
    """What of [start, end) the ranges lie on."""
    return [
        (max(held.start, start), min(held.end, end))
        for held in ranges
        if held.start < end and start < held.end
    ]


def is_whole(some: Range) -> bool:
    """Is it the whole file, as all locks of flock(2) are?"""
    return some.start == 0 and some.end == TO_END


def without(held: Range, start: int, end: int) -> list[Range]:
    """What is left of a range that loses [start, end)."""
    parts = []
    if held.start < start:
        parts.append(held._replace(end=start))
    if end < held.end:
        parts.append(held._replace(start=end))
    return parts


def _merged(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in order, each once."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(pieces):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlapping(ranges: list[Range], start: int, end: int) -> list[Range]:
    """Of ranges that do not overlap each other, in order."""
    return ranges[bisect_right(ranges, start, key=_end) : bisect_left(ranges, end, key=_start)]


def _insert(ranges: list[Range], new: Range) -> None:
    ranges.insert(bisect_left(ranges, new.start, key=_start), new)


def _remove(ranges: list[Range], held: Range) -> None:
    del ranges[bisect_left(ranges, held.start, key=_start)]
