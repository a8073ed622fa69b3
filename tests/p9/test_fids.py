"""The table of fid numbers behaves as a dictionary, whatever numbers a client chooses."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninepd.p9.fids import FidTable

NUMBERS = st.integers(0, 12) | st.integers(1020, 3200) | st.integers(0, (1 << 32) - 2)


@given(st.lists(st.tuples(st.booleans(), NUMBERS)))
def test_as_a_dictionary(steps: list[tuple[bool, int]]) -> None:
    table: FidTable[str] = FidTable()
    model: dict[int, str] = {}
    for turn, (adds, number) in enumerate(steps):
        if adds and number not in model:
            fid = f"fid {turn}"
            table.add(number, fid)
            model[number] = fid
        elif not adds:
            assert table.pop(number) == model.pop(number, None)
        assert table.get(number) == model.get(number)
        assert len(table) == len(model)
    assert sorted(table.take(1 << 20)) == sorted(model.values())
    assert len(table) == 0
    assert all(table.get(number) is None for _, number in steps)


@pytest.mark.parametrize("numbers", [[0xFFFF_FFFE], [1024 * (2**k - 1) for k in range(1, 11)]])
def test_few_numbers_take_little_room(numbers: list[int]) -> None:
    """They are the client's choice, so large ones must not make a long list."""
    table: FidTable[int] = FidTable()
    tracemalloc.start()
    for number in numbers:
        table.add(number, number)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert sorted(table.take(1 << 20)) == numbers


def test_numbers_with_a_gap_before_them() -> None:
    table: FidTable[int] = FidTable()
    for number in (1025, 1024, 3072, 3075, 3074, 0):
        table.add(number, number)
        assert table.get(number) == number
    assert [table.pop(number) for number in (3075, 3074, 3073, 1025)] == [3075, 3074, None, 1025]
    assert sorted(table.take(1 << 20)) == [0, 1024, 3072]
