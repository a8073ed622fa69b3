"""Threads for what may wait, and what becomes of a task when there are none."""

import contextlib
import threading
from collections.abc import Iterator

from ninepd.workers import Workers
from tests.support.waiting import eventually


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Nobody could have so much memory for a stack."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


def test_who_found_no_thread_is_told_when_there_is_one() -> None:
    workers = Workers("test")
    go_on, told, done = threading.Event(), threading.Event(), threading.Event()
    assert workers.start(lambda: assert_set(go_on))
    with no_threads():
        assert not workers.start(done.set)
        workers.when_idle(told.set)
        assert not told.wait(0.1)
        go_on.set()
        assert told.wait(20)
        assert workers.start(done.set)
        assert done.wait(20)
    workers.close()


def test_who_asks_when_there_is_one_already_is_told_at_once() -> None:
    workers = Workers("test")
    ran, told = threading.Event(), threading.Event()
    assert workers.start(ran.set)
    assert ran.wait(20)
    with no_threads():
        eventually(lambda: workers.start(_nothing), "the thread has come back")
    assert workers.reserve()
    workers.when_idle(told.set)
    assert told.wait(20)
    workers.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def _nothing() -> None:
    pass
