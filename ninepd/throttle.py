"""Limits on what the guests of an export read and write: QEMU's options, and QEMU's leaky buckets.

``-fsdev local,throttling.bps-total=N`` is ``--throttle-bps-total N``, and so on for all of them
(fsdev/qemu-fsdev-throttle.c; docs/throttle.txt tells what they mean).

What is done flows into a bucket, which leaks at the rate that is allowed in the long run. As long
as it holds more than its size, nothing is begun. So the request that fills it is let through as a
whole, however large it is, and in any time t no more is done than

    rate * t + size + one request

Sizes and rates are QEMU's (util/throttle.c, throttle_compute_wait), and so is what counts: the
bytes that a read asks for, whether the file has them or not, and those that a write brings.
"""

import threading
from dataclasses import dataclass
from math import ceil
from typing import Final, NamedTuple

from ninepd.errors import UsageError

UNITS: Final = ("bps", "iops")
"""Bytes, and operations, a second."""
DIRECTIONS: Final = ("total", "read", "write")
MOST: Final = 10**15
"""QEMU's THROTTLE_VALUE_MAX."""
SECOND: Final = 10**9
_QUIET_SHARE: Final = 10
"""A burst that nobody named is that of a tenth of a second: without, every request would wait."""


class Rate(NamedTuple):
    """Of bytes or of operations, a second; an average of 0 is no limit."""

    average: int
    burst: int
    """The rate for ``length`` seconds after some quiet; 0: none is named."""
    length: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The options, for one export."""

    throttle_bps_total: int = 0
    throttle_bps_total_max: int = 0
    throttle_bps_total_max_length: int = 1
    throttle_bps_read: int = 0
    throttle_bps_read_max: int = 0
    throttle_bps_read_max_length: int = 1
    throttle_bps_write: int = 0
    throttle_bps_write_max: int = 0
    throttle_bps_write_max_length: int = 1
    throttle_iops_total: int = 0
    throttle_iops_total_max: int = 0
    throttle_iops_total_max_length: int = 1
    throttle_iops_read: int = 0
    throttle_iops_read_max: int = 0
    throttle_iops_read_max_length: int = 1
    throttle_iops_write: int = 0
    throttle_iops_write_max: int = 0
    throttle_iops_write_max_length: int = 1
    throttle_iops_size: int = 0
    """An operation on more bytes than this counts as several; 0: each counts as one."""

    def rate(self, unit: str, direction: str) -> Rate:
        """What was said of one of UNITS in one of DIRECTIONS."""
        name = f"throttle_{unit}_{direction}"
        values = [getattr(self, name + part) for part in ("", "_max", "_max_length")]
        return Rate._make(values)

    @property
    def limited(self) -> bool:
        """Is there any limit?"""
        return any(self.rate(unit, way).average for unit in UNITS for way in DIRECTIONS)

    def check_rates(self) -> None:
        """UsageError where QEMU refuses them, too (util/throttle.c, throttle_is_valid)."""
        for unit in UNITS:
            for direction in DIRECTIONS:
                _check(f"--throttle-{unit}-{direction}", self.rate(unit, direction))
            if self.rate(unit, "total").average:
                for direction in ("read", "write"):
                    if self.rate(unit, direction).average:
                        raise UsageError(
                            f"--throttle-{unit}-{direction}: --throttle-{unit}-total limits both "
                            "already; give either that or one for each direction"
                        )
        _check_value("--throttle-iops-size", self.throttle_iops_size)
        if self.throttle_iops_size and not any(
            self.rate("iops", way).average for way in DIRECTIONS
        ):
            raise UsageError(
                "--throttle-iops-size: that needs a limit of operations (--throttle-iops-...)"
            )


def _check(option: str, rate: Rate) -> None:
    _check_value(option, rate.average)
    _check_value(f"{option}-max", rate.burst)
    if rate.length < 1:
        raise UsageError(f"{option}-max-length: {rate.length} is no length; 1 second is the least")
    if rate.length > 1 and not rate.burst:
        raise UsageError(f"{option}-max-length: that needs {option}-max")
    if rate.burst:
        if not rate.average:
            raise UsageError(f"{option}-max: that needs {option}")
        if rate.burst < rate.average:
            raise UsageError(f"{option}-max: {rate.burst} is below {option}, {rate.average}")
        if rate.length > MOST // rate.burst:
            raise UsageError(f"{option}-max-length: {rate.length} is too long for such a burst")


def _check_value(option: str, value: int) -> None:
    if not 0 <= value <= MOST:
        raise UsageError(f"{option}: {value} is not between 0 and {MOST}")


class Bucket:
    """One limit, of bytes or of operations."""

    def __init__(self, rate: float, size: float) -> None:
        self._rate = rate
        self._size = size
        self._level = 0.0

    def leak(self, nanoseconds: int) -> None:
        """So much time has passed."""
        self._level = max(self._level - self._rate * nanoseconds / SECOND, 0.0)

    def wait(self) -> int:
        """Nanoseconds until something may be begun; 0: now."""
        extra = self._level - self._size
        return ceil(extra * SECOND / self._rate) if extra > 0 else 0

    def fill(self, units: float) -> None:
        """So much is begun."""
        self._level += units


def buckets(rate: Rate) -> list[Bucket]:
    """Those that hold to a rate, if it is a limit."""
    if not rate.average:
        return []
    if not rate.burst:
        return [Bucket(rate.average, rate.average / _QUIET_SHARE)]
    found = [Bucket(rate.average, rate.burst * rate.length)]
    if rate.length > 1:  # not all of a long burst at once, but at the rate of the burst
        found.append(Bucket(rate.burst, rate.burst / _QUIET_SHARE))
    return found


class Throttle:
    """The limits of one export, for all its guests. Safe to use from several threads.

    Times are nanoseconds of any clock that does not go backwards.
    """

    def __init__(self, rates: Rates, now: int) -> None:
        self._lock = threading.Lock()
        self._now = now
        self._operation_size = rates.throttle_iops_size
        bps = {way: buckets(rates.rate("bps", way)) for way in DIRECTIONS}
        iops = {way: buckets(rates.rate("iops", way)) for way in DIRECTIONS}
        self._all = [bucket for way in DIRECTIONS for bucket in (*bps[way], *iops[way])]
        # By whether it is a write.
        self._bytes = (bps["total"] + bps["read"], bps["total"] + bps["write"])
        self._operations = (iops["total"] + iops["read"], iops["total"] + iops["write"])

    def admit(self, writes: bool, nbytes: int, now: int) -> int:
        """May a request be begun? 0: it is counted. Else ask again in so many nanoseconds."""
        with self._lock:
            if now > self._now:
                for bucket in self._all:
                    bucket.leak(now - self._now)
                self._now = now
            of_bytes, of_operations = self._bytes[writes], self._operations[writes]
            wait = max([bucket.wait() for bucket in of_bytes + of_operations], default=0)
            if not wait:
                for bucket in of_bytes:
                    bucket.fill(nbytes)
                units = self._units(nbytes)
                for bucket in of_operations:
                    bucket.fill(units)
            return wait

    def _units(self, nbytes: int) -> float:
        """As how many operations it counts."""
        size = self._operation_size
        return nbytes / size if size and nbytes > size else 1.0
