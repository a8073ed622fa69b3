"""Interval arithmetic of locks: against a model that looks at every byte, and what it costs."""

import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.ops.fid import Fid
from ninepd.ops.ranges import TO_END, Cover, Owner, Range, Ranges, without
from ninepd.p9.messages import LockType
from tests.support.interpreted import interpreted

READ, WRITE, UNLOCK = LockType.RDLCK, LockType.WRLCK, LockType.UNLCK
BYTES = 24


TREE = Tree(os.open(Path(__file__).parent, os.O_PATH), LocalHost(strict=False))


def fid() -> Fid:
    return Fid(TREE.root, 0)


class Model:
    """Each byte of a small file, with what each owner has there."""

    def __init__(self) -> None:
        self.bytes: list[dict[Owner, tuple[LockType, Fid]]] = [{} for _ in range(BYTES)]

    def set(self, new: Range) -> None:
        for here in self.bytes[new.start : new.end]:
            here.pop(new.owner, None)
            if new.type != UNLOCK:
                here[new.owner] = (new.type, new.fid)

    def drop(self, fid: Fid) -> None:
        for here in self.bytes:
            for owner, (_, through) in list(here.items()):
                if through is fid:
                    del here[owner]

    def has_rivals(self, new: Range) -> bool:
        return any(
            WRITE in {kind, new.type} and owner != new.owner
            for here in self.bytes[new.start : new.end]
            for owner, (kind, _) in here.items()
        )


def as_bytes(ranges: Ranges) -> list[dict[Owner, tuple[LockType, Fid]]]:
    found: list[dict[Owner, tuple[LockType, Fid]]] = [{} for _ in range(BYTES)]
    for held in ranges.all():
        for here in found[held.start : held.end]:
            assert held.owner not in here
            here[held.owner] = (held.type, held.fid)
    return found


def check(ranges: Ranges, model: Model, fids: list[Fid]) -> None:
    assert as_bytes(ranges) == model.bytes
    assert bool(ranges) == any(model.bytes)
    assert ranges.written == any(k == WRITE for here in model.bytes for k, _ in here.values())
    assert ranges.cover.locked(0, BYTES) == sum(map(len, model.bytes))
    locked = {at for start, end in ranges.cover.held() for at in range(start, end)}
    assert locked == {at for at, here in enumerate(model.bytes) if here}
    assert sum(one.locks for one in fids) == len(ranges.all())
    for one in fids:
        assert sorted(ranges.through(one)) == sorted(h for h in ranges.all() if h.fid is one)


@pytest.mark.parametrize("seed", range(40))
def test_against_a_model(seed: int) -> None:
    chance = random.Random(seed)
    owners = [Owner(number, b"guest") for number in range(3)]
    fids = [fid() for _ in range(3)]
    ranges, model = Ranges(), Model()
    for _ in range(200):
        start, end = sorted(chance.sample(range(BYTES + 1), 2))
        new = Range(start, end, chance.choice(list(LockType)), chance.choice(owners),
                    chance.choice(fids))  # fmt: skip
        if new.type != UNLOCK:
            assert bool(ranges.rivals(new)) == model.has_rivals(new)
            if model.has_rivals(new):
                continue
        gone, come = ranges.replaced(new)
        ranges.change(gone, come, start, end)
        model.set(new)
        check(ranges, model, fids)
        if chance.random() < 0.05:
            closed = chance.choice(fids)
            ranges.change(ranges.through(closed), [], 0, TO_END)
            model.drop(closed)
            check(ranges, model, fids)
    for one in fids:
        ranges.change(ranges.through(one), [], 0, TO_END)
    assert not ranges
    assert len(ranges.cover) == 1


def test_neighbours_become_one() -> None:
    ranges, through, owner = Ranges(), fid(), Owner(1, b"guest")
    for start in (0, 20, 10):
        new = Range(start, start + 10, READ, owner, through)
        ranges.change(*ranges.replaced(new), start, start + 10)
    assert ranges.all() == [Range(0, 30, READ, owner, through)]
    assert through.locks == 1


def test_what_is_left() -> None:
    held = Range(10, 20, WRITE, Owner(1, b"guest"), fid())
    assert [part[:2] for part in without(held, 12, 15)] == [(10, 12), (15, 20)]
    assert [part[:2] for part in without(held, 0, 15)] == [(15, 20)]
    assert without(held, 10, 20) == []


def test_free_stretches_are_told_once() -> None:
    cover = Cover()
    cover.add([(10, 20, 1), (40, 50, 1)])
    pieces = [(21, 22), (25, 26), (45, 60), (70, 80)]
    assert cover.free(pieces) == [(20, 40), (50, TO_END)]
    assert cover.held() == [(10, 20), (40, 50)]


# What it costs: lines of Python that run, whatever the machine


def lines(work: Callable[[], object]) -> int:
    """How many lines run in functions that ``work`` calls."""
    seen: Counter[CodeType] = Counter()

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            seen[frame.f_code] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen.total()


MANY = 4096


@pytest.mark.parametrize("readers", ["one", "many"])
def test_a_request_costs_the_same_among_many(readers: str) -> None:
    """It is about one of the ranges; the others belong to the same owner, or each to another."""
    code = interpreted("ninepd.ops.ranges")
    through = fid()

    def costs(count: int) -> int:
        ranges = code.Ranges()

        def lock(kind: LockType, number: int) -> None:
            owner = code.Owner(number if readers == "many" else 0, b"guest")
            new = code.Range(2 * number, 2 * number + 1, kind, owner, through)
            ranges.rivals(new)
            ranges.change(*ranges.replaced(new), new.start, new.end)

        for number in range(count):
            lock(READ, number)
        middle = count // 2

        def all_kinds() -> None:
            for kind in (UNLOCK, WRITE, READ, UNLOCK):
                lock(kind, middle)

        return lines(all_kinds)

    assert costs(MANY) <= costs(16) + 8 * math.log2(MANY)


BOUNDS: dict[str, Callable[[int], tuple[int, int]]] = {
    "apart": lambda number: (2 * number, 2 * number + 1),
    "together": lambda _number: (0, TO_END),
    "nested": lambda number: (number, 3 * MANY - number),
}


@pytest.mark.parametrize("readers", BOUNDS)
def test_a_request_about_all_costs_in_proportion(readers: str) -> None:
    """A lock of the whole file, and a close: half of the readers go with it."""
    code = interpreted("ninepd.ops.ranges")
    through, closed = fid(), fid()

    def costs(count: int) -> int:
        ranges = code.Ranges()
        for number in range(count):
            start, end = BOUNDS[readers](number)
            owner = code.Owner(number, b"guest")
            new = code.Range(start, end, READ, owner, (through, closed)[number % 2])
            ranges.change(*ranges.replaced(new), start, end)

        def all_of_it() -> None:
            mine = code.Range(0, TO_END, WRITE, code.Owner(-1, b"guest"), through)
            assert len(ranges.rivals(mine)) == count
            mine = mine._replace(type=READ)
            ranges.change(*ranges.replaced(mine), 0, TO_END)
            ranges.change([mine], [], 0, TO_END)
            gone = ranges.through(closed)
            ranges.change(gone, [], 0, TO_END)
            ranges.cover.free(code.clipped(gone, 0, TO_END))
            ranges.cover.held()

        return lines(all_of_it)

    assert costs(MANY) <= 1.5 * MANY / 64 * costs(64)
