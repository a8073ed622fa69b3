"""The table of fid numbers behaves as a dictionary, whatever numbers a client chooses."""

from hypothesis import given
from hypothesis import strategies as st

from ninepd.p9.fids import FidTable

NUMBERS = st.integers(0, 12) | st.integers(0, (1 << 32) - 2)


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
    assert sorted(table.clear()) == sorted(model.values())
    assert len(table) == 0
    assert all(table.get(number) is None for _, number in steps)


def test_numbers_from_the_top_take_no_more_room_than_others() -> None:
    """Numbers are the client's choice, so a large one must not make a long list."""
    table: FidTable[int] = FidTable()
    for number in (0xFFFF_FFFE, 1 << 31, 5):
        table.add(number, number)
    table.add(0, 0)
    assert sorted(table.clear()) == [0, 5, 1 << 31, 0xFFFF_FFFE]
