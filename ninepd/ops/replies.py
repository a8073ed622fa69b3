"""What a handler is given and what it returns.

Each function of the modules beside this one serves a T-message: ``(guest, message, payload) ->
reply``. It runs to its end and returns the reply, or, when something may have to wait for a disk,
returns a ``Later`` with the rest of the work. Whoever calls it (pipeline.py) decides on which
thread that runs.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from ninepd.export.descriptors import Holder


class Payload:
    """The data part of one request, in guest memory: behind the message or behind its reply."""

    __slots__ = ("available", "body", "pins", "room", "uses")

    def __init__(self, available: int, room: int, body: Any) -> None:
        self.available = available
        """Bytes of data behind the 23 bytes of a Twrite."""
        self.room = room
        """Bytes of data that fit behind the 11 bytes of an Rread or Rreaddir."""
        self.body = body
        """C's view of the buffer for a small reply, behind its header: for ``Encoded``."""
        self.pins: list[Holder] = []
        """Whose descriptors the request uses: they stay open until it ends."""
        self.uses = 0
        """How often the request itself is counted among the users of its fids."""

    @abstractmethod
    def read(self, fd: int, skip: int, count: int, offset: int, flags: int = 0) -> int:
        """preadv2 into the reply's data after ``skip`` bytes; returns bytes, raises OSError."""

    @abstractmethod
    def write(self, fd: int, skip: int, count: int, offset: int, uid: int) -> int:
        """Pwrite from the request's data after ``skip`` bytes; returns bytes, raises OSError.

        As ``Host.act_for`` a guest's user.
        """

    @abstractmethod
    def put(self, data: bytes, skip: int = 0) -> None:
        """Copy ``data`` into the reply's data after ``skip`` bytes."""

    @abstractmethod
    def take(self, count: int) -> bytes:
        """Copy the first ``count`` bytes of the request's data."""


class Encoded:
    """A reply whose body, ``size`` bytes, C has encoded into ``payload.body``."""

    __slots__ = ("number", "size")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size

    def __repr__(self) -> str:
        return f"message {self.number}, {self.size} bytes"


class Later:
    """The rest of a request, which may block; ``work`` returns the reply or raises OSError.

    It is given a payload of its own: guest memory may be gone by the time it runs.
    """

    __slots__ = ("work",)

    def __init__(self, work: Callable[[Payload], Any]) -> None:
        self.work = work


Reply: TypeAlias = Any
"""An R-message, ``Encoded`` or ``Later``."""
