"""The buckets by a clock that the tests hold: never too fast, never slower than they say."""

from dataclasses import fields
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninepd.errors import UsageError
from ninepd.throttle import MOST, SECOND, Rate, Rates, Throttle

READ, WRITE = False, True
MIB = 1 << 20


class Begun(NamedTuple):
    at: int
    writes: bool
    units: float


class Guest:
    """Keeps asking until it may, as fast as it is let."""

    def __init__(self, rates: Rates) -> None:
        self.throttle = Throttle(rates, 0)
        self.now = 0
        self.begun: list[Begun] = []

    def move(self, nbytes: int, writes: bool = READ) -> None:
        asked = 0
        while wait := self.throttle.admit(writes, nbytes, self.now):
            self.now += wait
            asked += 1
            assert asked < 4, "it was told a time at which it may not"
        self.begun.append(Begun(self.now, writes, nbytes))

    def run(self, seconds: float, nbytes: int, writes: bool = READ) -> int:
        """How many requests are let through from now on, in so many seconds."""
        end, before = self.now + round(seconds * SECOND), len(self.begun)
        while True:
            wait = self.throttle.admit(writes, nbytes, self.now)
            if self.now + wait > end:
                self.now = end
                return len(self.begun) - before
            if wait:
                self.now += wait
            else:
                self.begun.append(Begun(self.now, writes, nbytes))


# Options

REFUSED = [
    ("bps-total: -1 is not between 0 and 1000000000000000", {"bps_total": -1}),
    ("iops-read: 1000000000000001 is not between", {"iops_read": MOST + 1}),
    ("bps-write-max: -1 is not between", {"bps_write": 1, "bps_write_max": -1}),
    ("iops-size: -1 is not between", {"iops_total": 1, "iops_size": -1}),
    ("iops-size: that needs a limit of operations", {"bps_total": 1, "iops_size": 4096}),
    ("bps-read: --throttle-bps-total limits both", {"bps_total": 1, "bps_read": 1}),
    ("iops-write: --throttle-iops-total limits both", {"iops_total": 1, "iops_write": 1}),
    ("bps-read-max: that needs --throttle-bps-read", {"bps_total": 1, "bps_read_max": 5}),
    ("iops-total-max: 8 is below --throttle-iops-total, 9", {"iops_total": 9, "iops_total_max": 8}),
    ("bps-read-max-length: 0 is no length", {"bps_read": 1, "bps_read_max_length": 0}),
    ("bps-read-max-length: that needs --throttle-bps-read-max",
     {"bps_read": 1, "bps_read_max_length": 2}),
    ("iops-read-max-length: 125000000000001 is too long",
     {"iops_read": 1, "iops_read_max": 8, "iops_read_max_length": MOST // 8 + 1}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "options"), REFUSED)
def test_refused_as_by_qemu(words: str, options: dict[str, int]) -> None:
    rates = Rates(**{f"throttle_{name}": value for name, value in options.items()})
    with pytest.raises(UsageError) as caught:
        rates.check_rates()
    assert str(caught.value).startswith(f"--throttle-{words}")


@pytest.mark.parametrize(
    "options",
    [
        {"bps_total": 1, "iops_read": 1, "iops_write": 1},
        {"bps_read": 5, "bps_read_max": 5, "bps_read_max_length": 1},
        {"iops_read": 1, "iops_read_max": 8, "iops_read_max_length": MOST // 8, "iops_size": 1},
        {"bps_write": MOST, "bps_write_max": MOST},
    ],
)
def test_taken_as_by_qemu(options: dict[str, int]) -> None:
    Rates(**{f"throttle_{name}": value for name, value in options.items()}).check_rates()


# QEMU's examples (docs/throttle.txt)


def test_without_a_limit_nothing_waits() -> None:
    guest = Guest(Rates())
    assert not Rates().limited
    for _ in range(1000):
        guest.move(MIB)
    assert guest.now == 0


def test_limit_of_operations() -> None:
    """``iops-total=100``: a tenth of a second's worth at once, then 100 a second of any size."""
    guest = Guest(Rates(throttle_iops_total=100))
    assert guest.run(0, MIB) == 11
    assert guest.run(100, MIB, WRITE) in range(9999, 10002)


def test_burst_of_a_minute() -> None:
    """``iops-total=100,iops-total-max=2000,iops-total-max-length=60``, by a tenth.

    200 a second for somewhat more than a minute, since the bucket leaks 10 a second meanwhile;
    then 10 a second; and after a long rest the same again.
    """
    guest = Guest(
        Rates(
            throttle_iops_total=10,
            throttle_iops_total_max=200,
            throttle_iops_total_max_length=60,
        )
    )
    assert guest.run(63, 1) in range(63 * 200, 63 * 200 + 22)
    guest.run(2, 1)
    assert guest.run(100, 1) in range(999, 1002)
    guest.now += 1200 * SECOND
    assert guest.run(5, 1) in range(5 * 200, 5 * 200 + 22)


def test_burst_of_a_second_comes_at_once() -> None:
    guest = Guest(Rates(throttle_bps_read=MIB, throttle_bps_read_max=8 * MIB))
    assert guest.run(0, MIB) == 9  # eight, and the one that makes it too much
    assert guest.run(100, MIB) in range(99, 102)


def test_large_operations_count_as_several() -> None:
    """``iops-size=4096``: 8 KiB are two operations, 6 KiB one and a half, 1 byte is one."""
    rates = Rates(throttle_iops_total=100, throttle_iops_size=4096)
    for nbytes, each in ((1, 1.0), (4096, 1.0), (6144, 1.5), (8192, 2.0)):
        guest = Guest(rates)
        guest.run(1, nbytes)
        assert guest.run(30, nbytes) == pytest.approx(3000 / each, abs=2)


def test_each_direction_has_its_own() -> None:
    guest = Guest(Rates(throttle_bps_read=1000, throttle_bps_write=10))
    assert guest.run(100, 100, READ) in range(1000, 1003)
    assert guest.run(100, 10, WRITE) in range(100, 103)
    guest = Guest(Rates(throttle_bps_write=1))
    assert [guest.throttle.admit(READ, MIB, 0) for _ in range(9)] == [0] * 9
    assert [guest.throttle.admit(WRITE, MIB, 0) > 0 for _ in range(2)] == [False, True]


def test_both_share_the_total() -> None:
    guest = Guest(Rates(throttle_bps_total=1000))
    guest.move(5000, READ)
    assert guest.throttle.admit(WRITE, 1, 0) == guest.throttle.admit(READ, 1, 0) == 4.9 * SECOND


def test_clock_that_two_threads_read() -> None:
    """One may come with a time that is older than what the other came with."""
    throttle = Throttle(Rates(throttle_bps_total=10), 0)
    assert throttle.admit(READ, 100, 5 * SECOND) == 0
    assert throttle.admit(READ, 1, 4 * SECOND) == throttle.admit(READ, 1, 5 * SECOND) > 0


# Any limits, any requests

SIZES = st.sampled_from((0, 1, 100, 4096, 65536, MIB, 0xFFFFFFFF))


@st.composite
def limits(draw: st.DrawFn) -> Rate:
    average = draw(st.integers(1, 10**9) | st.integers(1, 10))
    burst = draw(st.just(0) | st.integers(average, 10**10))
    return Rate(average, burst, draw(st.integers(1, 100)) if burst else 1)


def size_of(rate: Rate) -> float:
    return rate.burst * rate.length if rate.burst else rate.average / 10


def named(unit: str, direction: str, rate: Rate) -> dict[str, int]:
    option = f"throttle_{unit}_{direction}"
    return dict(zip((option, f"{option}_max", f"{option}_max_length"), rate, strict=True))


REQUESTS = st.lists(
    st.tuples(SIZES, st.booleans(), st.integers(0, 3 * SECOND) | st.just(0)), max_size=40
)
"""(bytes, is it a write, how long the guest rests before it)"""


@given(unit=st.sampled_from(("bps", "iops")), direction=st.sampled_from(("total", "read", "write")),
       rate=limits(), requests=REQUESTS)  # fmt: skip
def test_never_too_fast(
    unit: str, direction: str, rate: Rate, requests: list[tuple[int, bool, int]]
) -> None:
    """In no window more than rate * time + burst + the request that makes it too much."""
    guest = Guest(Rates(**named(unit, direction, rate)))
    for nbytes, writes, rest in requests:
        guest.now += rest
        guest.move(nbytes, writes)
    counted = [
        Begun(begun.at, begun.writes, begun.units if unit == "bps" else 1)
        for begun in guest.begun
        if direction == "total" or begun.writes == (direction == "write")
    ]
    bounds = [(rate.average, size_of(rate))]
    if rate.length > 1:
        bounds.append((rate.burst, rate.burst / 10))
    for first in range(len(counted)):
        moved = 0.0
        for last in counted[first:]:
            moved += last.units
            seconds = (last.at - counted[first].at) / SECOND
            for average, size in bounds:
                most = average * seconds + size + last.units
                assert moved <= most * (1 + 1e-9) + average / SECOND


@given(rate=limits(), requests=REQUESTS)
def test_never_slower_than_it_says(rate: Rate, requests: list[tuple[int, bool, int]]) -> None:
    """A guest that does nothing but ask has its rate, and its burst."""
    guest = Guest(Rates(**named("bps", "total", rate)))
    for nbytes, writes, _ in requests:
        guest.move(nbytes, writes)
        moved = sum(begun.units for begun in guest.begun[:-1])
        if guest.now and rate.length == 1:
            assert moved >= (rate.average * guest.now / SECOND + size_of(rate)) * (1 - 1e-9) - 1
    assert len(guest.begun) == len(requests)


def test_all_options_are_limits() -> None:
    """None of them is forgotten."""
    names = {field.name for field in fields(Rates)}
    assert len(names) == 2 * 3 * 3 + 1
    for name in names:
        if not name.endswith(("max", "length", "size")):
            assert Rates(**{name: 1}).limited
