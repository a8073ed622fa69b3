"""Which number an id has on the other side."""

import errno
import random

import pytest

from ninepd.idranges import NO_SQUASH, IdRange, IdRanges
from ninepd.ids import OVERFLOW_ID, IdMap
from ninepd.syscalls import NO_ID

HIGHEST = 0xFFFFFFFE
TWO = IdRanges((IdRange(0, 100000, 65536), IdRange(70000, 5, 10)))


@pytest.mark.parametrize(
    ("guest", "host"),
    [(0, 100000), (65535, 165535), (70000, 5), (70009, 14)],
)
def test_both_ways(guest: int, host: int) -> None:
    ids = IdMap(TWO)
    assert (ids.to_host(guest), ids.to_guest(host)) == (host, guest)
    assert ids.shown(host) == guest
    assert ids.owner(guest) == ids.creator(guest, 0) == host


@pytest.mark.parametrize("guest", [65536, 69999, 70010, HIGHEST])
def test_unknown_to_the_host(guest: int) -> None:
    ids = IdMap(TWO)
    assert ids.to_host(guest) == NO_ID
    for ask in (ids.owner, lambda number: ids.creator(number, 0)):
        with pytest.raises(OSError, match=f"id {guest} of the guest") as caught:
            ask(guest)
        assert caught.value.errno == errno.EOVERFLOW


@pytest.mark.parametrize("host", [0, 4, 15, 99999, 165536, HIGHEST])
def test_unknown_to_the_guest(host: int) -> None:
    ids = IdMap(TWO)
    assert ids.to_guest(host) == NO_ID
    assert ids.shown(host) == OVERFLOW_ID == 65534


@pytest.mark.parametrize("number", [0, 1, 65534, HIGHEST])
def test_without_ranges(number: int) -> None:
    ids = IdMap(IdRanges())
    assert ids.to_host(number) == ids.to_guest(number) == ids.shown(number) == number
    assert ids.owner(number) == ids.creator(number, 0) == number


def test_nobody_in_particular() -> None:
    """NO_ID keeps an owner; what is created belongs to somebody whom the guest knows."""
    for said in (IdRanges(), TWO, IdRanges(TWO.ranges, 1000)):
        assert IdMap(said).owner(NO_ID) == NO_ID
    assert IdMap(IdRanges()).creator(NO_ID, 0) == 0
    assert IdMap(TWO).creator(NO_ID, 0) == 100000
    assert IdMap(IdRanges((IdRange(70000, 5, 10),))).creator(NO_ID, 5) == NO_ID
    with pytest.raises(OSError, match="has no number"):
        IdMap(TWO).creator(NO_ID, 66000)
    assert IdMap(IdRanges((), 1000)).creator(NO_ID, 0) == 1000
    assert IdMap(IdRanges(TWO.ranges, 1000)).creator(NO_ID, 0) == 100000
    assert IdMap(IdRanges(TWO.ranges, 1000)).creator(NO_ID, 66000) == 1000


def test_squash() -> None:
    """Of what is in no range; it changes nothing of what the guest sees."""
    ids = IdMap(IdRanges((), 1000))
    for number in (0, 1000, 4321, HIGHEST):
        assert ids.owner(number) == ids.creator(number, 0) == 1000
        assert ids.shown(number) == number
    ids = IdMap(IdRanges((IdRange(0, 1000, 1),), 1000))
    assert [ids.owner(number) for number in (0, 1, HIGHEST)] == [1000] * 3
    assert [ids.shown(number) for number in (1000, 0, 1)] == [0, OVERFLOW_ID, OVERFLOW_ID]


def test_the_highest_ids() -> None:
    ids = IdMap(IdRanges((IdRange(HIGHEST - 1, 0, 2), IdRange(0, HIGHEST - 1, 2))))
    assert [ids.to_host(number) for number in (HIGHEST, 1, 2)] == [1, HIGHEST, NO_ID]
    assert [ids.to_guest(number) for number in (HIGHEST, 1, 2)] == [1, HIGHEST, NO_ID]
    everybody = IdMap(IdRanges((IdRange(0, 0, HIGHEST + 1),)))
    assert everybody.to_host(NO_ID) == everybody.to_guest(NO_ID) == NO_ID


def test_at_random() -> None:
    """Against the plain meaning of the ranges."""
    dice = random.Random(5)
    for _ in range(50):
        ranges, guest, host = [], 0, 0
        for _ in range(dice.randrange(1, 12)):
            guest, host = guest + dice.randrange(3), host + dice.randrange(3)
            ranges.append(IdRange(guest, host, dice.randrange(1, 4)))
            guest, host = guest + ranges[-1].length, host + ranges[-1].length
        dice.shuffle(ranges)
        ids = IdMap(IdRanges(tuple(ranges), NO_SQUASH))
        pairs = {r.guest + at: r.host + at for r in ranges for at in range(r.length)}
        back = {there: here for here, there in pairs.items()}
        for number in range(80):
            assert ids.to_host(number) == pairs.get(number, NO_ID)
            assert ids.to_guest(number) == back.get(number, NO_ID)
