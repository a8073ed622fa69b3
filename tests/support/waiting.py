"""How long things may take."""

import contextlib
import time
from collections.abc import Callable, Iterator

PROMPT = 2.0
"""Seconds in which what has nothing to wait for is answered, however busy the computer."""


@contextlib.contextmanager
def promptly(seconds: float = PROMPT) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def eventually(holds: Callable[[], bool], what: str, seconds: float = 10) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, f"{what}: not within {seconds} s"
        time.sleep(0.01)
