"""What an export counts, in memory that another process can look at without asking (_stats.c).

The supervisor makes it before it forks: the process of the export writes, and the next one goes on
where the last one has ended. Who watches has only the sealed descriptor, and maps it to read.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from cffi import FFI


class Numbers(Protocol):
    """All but those of messages: totals, and from ``fids`` on how many there are now."""

    taken: int
    batches: int
    kicks: int
    spin_hits: int
    sleeps: int
    calls: int
    calls_saved: int
    dropped: int
    in_flight: int
    reclaims: int
    stalls: int
    hand_overs: int
    front_ends: int
    restarts: int
    fids: int
    files: int
    descriptors: int
    reclaimed: int
    connected: int
    pid: int


class Messages(NamedTuple):
    """What was counted of one kind of messages."""

    type: int
    """Of the request; 0 stands for all that are no known kind."""
    requests: int
    bytes_in: int
    bytes_out: int
    seconds: float
    buckets: tuple[int, ...]
    """How many took no longer than ``BOUNDS`` say, but longer than the one before; at the end those
    that took longer than all."""
    errors: dict[int, int]
    """By errno; 0 where the reply names none."""


class _MessageStats(Protocol):
    requests: int
    bytes_in: int
    bytes_out: int
    ns: int
    buckets: Sequence[int]
    errors: Sequence[int]


class _Stats(Numbers, Protocol):
    messages: Sequence[_MessageStats]


_module = import_module("ninepd._libvring")
_ffi: "FFI" = _module.ffi
SIZE: Final[int] = _ffi.sizeof("np_stats")
BOUNDS: Final = tuple(1024 * 2**n / 1e9 for n in range(_module.lib.NP_STATS_BUCKETS - 1))
"""Seconds."""
_F_SEAL_FUTURE_WRITE: Final = 0x0010
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_GAUGES: Final = ("in_flight", "fids", "files", "descriptors", "reclaimed", "connected", "pid")


class Reader:
    """Numbers of one export, as they stand."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory  # unmapped with this object
        self.address = _ffi.cast("np_stats *", _ffi.from_buffer(memory))
        self.numbers: Final = cast("Numbers", self.address)

    def messages(self) -> Iterator[Messages]:
        """Of each kind of which there was any."""
        for kind, found in enumerate(cast("_Stats", self.address).messages):
            if found.requests:
                yield Messages(
                    2 * kind,
                    found.requests,
                    found.bytes_in,
                    found.bytes_out,
                    found.ns / 1e9,
                    tuple(found.buckets),
                    {number: count for number, count in enumerate(found.errors) if count},
                )

    def close(self) -> None:
        """Unmap them; nobody may look any more."""
        self._memory.close()


class Stats(Reader):
    """The same to write; what is not used yet takes no memory."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        """Without ``memory`` for this process alone."""
        super().__init__(mmap.mmap(-1, SIZE) if memory is None else memory)
        self.stock = (0, 0, 0, 0)
        """What was told last of what a guest holds: fids, files, descriptors, reclaimed ones."""

    def forget_gauges(self) -> None:
        """The process has ended, and with it all that it held."""
        for name in _GAUGES:
            setattr(self.numbers, name, 0)


def shared() -> tuple[Stats, int]:
    """Numbers, and a descriptor through which another process can read them but not write."""
    fd = os.memfd_create("ninepd stats", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    stats = Stats(mmap.mmap(fd, SIZE))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return stats, fd


def reader(fd: int) -> Reader:
    """What ``shared`` has given to another process."""
    return Reader(mmap.mmap(fd, SIZE, prot=mmap.PROT_READ))
