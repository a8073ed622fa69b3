"""The numbers that a client has given to its fids.

Linux takes the lowest free number (net/9p/client.c, p9_fid_create), so nearly all of them stand in
a list, where an entry costs a tenth of what it does in a dictionary.
"""

from typing import Final, Generic, TypeVar

F = TypeVar("F")

_GAP: Final = 1024
"""So many numbers, and as many as there are fids, may be left out in the list: for clients that do
not begin at 0."""


class FidTable(Generic[F]):
    """From number to fid. ``F`` is whatever the file system keeps for one."""

    def __init__(self) -> None:
        self._low: list[F | None] = []
        self._high: dict[int, F] = {}
        """Only numbers beyond the end of the list."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, number: int) -> F | None:
        """None if the number is free."""
        if number < len(self._low):
            return self._low[number]
        return self._high.get(number)

    def items(self) -> list[tuple[int, F]]:
        """All fids by their numbers, in order."""
        low = [(number, fid) for number, fid in enumerate(self._low) if fid is not None]
        return low + sorted(self._high.items(), key=lambda item: item[0])

    def some(self, start: int, count: int) -> tuple[list[tuple[int, F]], int | None]:
        """Up to so many fids from a place on, and where to go on; None if there are no more.

        A piece takes no longer than a copy of what is in the dictionary. While another thread may
        change the table: then it is a mixture of before and after.
        """
        low = self._low[start : start + max(count, _GAP)]
        found = [(start + at, fid) for at, fid in enumerate(low) if fid is not None]
        if len(found) > count:
            return found[:count], found[count][0]
        if low:
            return found, start + len(low)
        at = max(start - len(self._low), 0)
        high = list(self._high.items())[at : at + count]
        return high, start + count if len(high) == count else None

    def add(self, number: int, fid: F) -> None:
        """Give a number that is free."""
        low = self._low
        if number < len(low):
            low[number] = fid
        elif number > 2 * self._count + _GAP:  # by what is there, so that a few cannot make it long
            self._high[number] = fid
        else:
            while len(low) <= number:
                low.append(self._high.pop(len(low), None) if self._high else None)
            low[number] = fid
        self._count += 1

    def pop(self, number: int) -> F | None:
        """Take a number back; None if it was free."""
        fid = self.get(number)
        if fid is not None:
            if number < len(self._low):
                self._low[number] = None
            else:
                del self._high[number]
            self._count -= 1
        return fid

    def take(self, count: int) -> list[F]:
        """Take back up to so many numbers, none if all are free; returns the fids they had."""
        fids: list[F] = []
        low = self._low
        while low and len(fids) < min(count, self._count):
            fid = low.pop()
            if fid is not None:
                fids.append(fid)
        while self._high and len(fids) < count:
            fids.append(self._high.popitem()[1])
        self._count -= len(fids)
        return fids
