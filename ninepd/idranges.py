"""Which ids of guests are which of the host: what --map-uid, --map-gid and --squash-to say.

The rules are those of the kernel's own maps (user_namespaces(7)).
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from ninepd.errors import UsageError

ID_MAX: Final = 0xFFFFFFFE
"""The next number means "no id" to the kernel (chown(2))."""
NO_SQUASH: Final = 0xFFFFFFFF
RANGES_MAX: Final = 340
"""As many as the kernel takes (user_namespaces(7))."""
_RANGE: Final = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})", re.ASCII)
_SQUASH: Final = re.compile(r"([0-9]{1,10})(?::([0-9]{1,10}))?", re.ASCII)


class IdRange(NamedTuple):
    """Consecutive ids of the guest, and the first one's number on the host."""

    guest: int
    host: int
    length: int

    def __str__(self) -> str:
        return ":".join(map(str, self))


class IdRanges(NamedTuple):
    """All of users, or of groups. Without ranges an id is the same on both sides."""

    ranges: tuple[IdRange, ...] = ()
    squash: int = NO_SQUASH
    """On the host, what is in no range."""


def parse_ranges(option: str, texts: Sequence[str]) -> tuple[IdRange, ...]:
    """The ranges that an option was given, GUEST:HOST:COUNT each; or UsageError."""
    if len(texts) > RANGES_MAX:
        raise UsageError(f"--{option}: {len(texts)} ranges are more than {RANGES_MAX}")
    ranges = tuple([_parse_range(option, text) for text in texts])
    for side in ("guest", "host"):
        ordered = sorted(ranges, key=lambda found: getattr(found, side))
        for one, other in pairwise(ordered):
            if getattr(one, side) + one.length > getattr(other, side):
                raise UsageError(
                    f"--{option}: {one} and {other} overlap: an id of the {side} can be in one only"
                )
    return ranges


def _parse_range(option: str, text: str) -> IdRange:
    numbers = _RANGE.fullmatch(text)
    if not numbers:
        raise UsageError(f"--{option}: {text!r} is not GUEST:HOST:COUNT, three whole numbers")
    found = IdRange(*map(int, numbers.groups()))
    if not found.length:
        raise UsageError(f"--{option}: {text}: a range has at least one id")
    for side in ("guest", "host"):
        last = getattr(found, side) + found.length - 1
        if last > ID_MAX:
            raise UsageError(
                f"--{option}: {text}: the last id of the {side} is {last}, "
                f"but {ID_MAX} is the highest that there is"
            )
    return found


def parse_squash(text: str) -> tuple[int, int]:
    """The ids of UID[:GID], the same ones without the latter; or UsageError."""
    numbers = _SQUASH.fullmatch(text)
    if not numbers:
        raise UsageError(f"--squash-to: {text!r} is not UID or UID:GID, whole numbers")
    uid = int(numbers[1])
    gid = uid if numbers[2] is None else int(numbers[2])
    for number in (uid, gid):
        if number > ID_MAX:
            raise UsageError(
                f"--squash-to: {number} is no id, {ID_MAX} is the highest that there is"
            )
    return uid, gid
