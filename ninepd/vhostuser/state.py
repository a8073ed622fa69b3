"""What the guest relies on behind one vhost-user connection: one small immutable value.

It says by itself whether the ring runs (``State.runnable``): started, enabled, not broken, and
soundly laid out in shared memory. A ring that lost its memory therefore pauses, and goes on when
the region returns; QEMU removes and re-adds regions under a running ring.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ninepd.errors import Refused
from ninepd.vhostuser.messages import MemoryRegion, VirtioFeature
from ninepd.vring import REGIONS_MAX, RING_MAX

MAX_QUEUE_SIZE = RING_MAX  # virtio 1.3, 2.7; crosvm's default
MAX_MEM_SLOTS = REGIONS_MAX  # QEMU wants the number never to shrink
# Without indirect descriptors a request and its reply, a page each that may straddle two.
_DESCRIPTORS = 4


@dataclass(frozen=True, slots=True)
class RingState:
    """One ring as the front end set it up; its parts are at user addresses.

    ``base`` is the next available entry to take: the front end sets it, and the device each time
    that it parks the ring.
    """

    num: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    base: int = 0
    # Where the dirty log has the used ring, if writes to it are logged.
    log: int | None = None
    addressed: bool = False
    started: bool = False
    enabled: bool = False
    broken: bool = False
    # New addresses came after the ring broke: the next KICK or ENABLE mends it.
    readdressed: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """All of it, apart from descriptors."""

    config_space: bytes
    features: int = 0
    protocol_features: int = 0
    regions: tuple[MemoryRegion, ...] = ()
    ring: RingState = RingState()

    def with_ring(self, **changes: Any) -> "State":
        return replace(self, ring=replace(self.ring, **changes))

    def mended(self) -> "State":
        ring = self.ring
        return self.with_ring(broken=ring.broken and not ring.readdressed, readdressed=False)

    @property
    def wanted(self) -> bool:
        """Did the front end ask for a running ring, and the guest not break it?"""
        return self.ring.started and self.ring.enabled and not self.ring.broken

    @property
    def logging(self) -> bool:
        """Is the front end told which pages are written to, given a log to tell it in?"""
        return bool(self.features & VirtioFeature.LOG_ALL)

    @property
    def runnable(self) -> bool:
        return self.wanted and self.ring_fault() is None

    def ring_fault(self) -> str | None:
        """Why the ring cannot run as it is set up, if it cannot (virtio 1.3, 2.7)."""
        ring = self.ring
        if not ring.num or not ring.addressed:
            return "the ring has no size or no addresses"
        if ring.num < _DESCRIPTORS and not self.features & VirtioFeature.INDIRECT_DESC:
            return f"a ring of {ring.num} without indirect descriptors cannot hold a 9P request"
        if not self.regions:
            return "no guest memory is shared (QEMU: its memory backend needs share=on)"
        event = 2 if self.features & VirtioFeature.EVENT_IDX else 0
        parts = (
            ("descriptor table", ring.desc, 16 * ring.num, 16),
            ("available ring", ring.avail, 4 + 2 * ring.num + event, 2),
            ("used ring", ring.used, 4 + 8 * ring.num + event, 4),
        )
        for name, start, size, alignment in parts:
            if start % alignment:
                return f"the {name} at {start:#x} is not aligned to {alignment} bytes"
            if not any(r.ua <= start and start + size <= r.ua + r.size for r in self.regions):
                return f"the {name}, {size} bytes at {start:#x}, is not in one memory region"
        if _overlap((start, size) for _, start, size, _ in parts):
            return "the parts of the ring overlap"
        return None


def check_regions(regions: tuple[MemoryRegion, ...]) -> None:
    """Refuse a memory table in which an address could mean two things or nothing."""
    if not 0 < len(regions) <= MAX_MEM_SLOTS:
        raise Refused(f"{len(regions)} memory regions instead of 1 to {MAX_MEM_SLOTS}")
    for region in regions:
        if not region.size:
            raise Refused(f"the memory region at {region.gpa:#x} is empty")
        if max(region.gpa, region.ua) + region.size > 1 << 64:
            raise Refused(f"the memory region at {region.gpa:#x} wraps around")
        if region.offset + region.size >= 1 << 63:
            raise Refused(f"the memory region at {region.gpa:#x} ends beyond any file")
    if _overlap((r.gpa, r.size) for r in regions) or _overlap((r.ua, r.size) for r in regions):
        raise Refused("memory regions overlap")


def _overlap(ranges: Iterable[tuple[int, int]]) -> bool:
    return any(start + size > after for (start, size), (after, _) in pairwise(sorted(ranges)))
