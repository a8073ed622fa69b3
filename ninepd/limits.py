"""How much of the host one guest may take: the options, for one export.

Bounds that nobody has to choose are constants, where they are kept to; docs/limits.md has them all.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

from ninepd.errors import UsageError
from ninepd.p9.limits import MIN_MSIZE


class Choice(NamedTuple):
    """What may be said of one of them."""

    least: int
    most: int


CHOICES: Final = {
    "msize_max": Choice(MIN_MSIZE, (1 << 32) - 1),  # a message has 32 bits for its size
    # Below this a mount has hardly a fid to walk with. Fids have 32 bits, and one of them is NOFID.
    "fids_max": Choice(16, (1 << 32) - 1),
    # Each process of a guest that reads an attribute has one open for that moment.
    "xattrs_max": Choice(16, 1 << 16),
    # The host's kernel looks through the locks of a file one by one (fs/locks.c).
    "locks_max": Choice(1, 1 << 16),
    # Half of them must be more than the entries of one reply. Numbers have 30 bits (_listing.c).
    "cookies_max": Choice(8192, 1 << 30),
    # One for each of two file systems: so that a dead one leaves the other.
    "workers_max": Choice(2, 1024),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The options, for one export."""

    msize_max: int = 1 << 20
    """Bytes of a message."""
    fids_max: int = 1 << 20
    xattrs_max: int = 1024
    """Extended attributes that are open at once; QEMU's server has the same, as max_xattr."""
    locks_max: int = 4096
    """Ranges of bytes."""
    cookies_max: int = 1 << 20
    """Positions of one open directory (listing.py)."""
    workers_max: int = 32
    """Requests that wait for storage at once, half of them for one file system (jobs.py)."""

    def check_limits(self) -> None:
        """UsageError if one is not what it can be."""
        for name, (least, most) in CHOICES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                option = name.replace("_", "-")
                raise UsageError(f"--{option}: {value} is not between {least} and {most}")
