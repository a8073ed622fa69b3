"""Questions to the process of an export, which answers in pieces (inspection.py)."""

import asyncio
import contextlib
import json
import socket
import time
from typing import Any, Final, TypeAlias

Row: TypeAlias = dict[str, Any]

SECONDS: Final = 2.0
"""How long a whole answer may take."""
ROWS_MAX: Final = 100_000
_LINE_MAX: Final = 1 << 20


class NoAnswer(Exception):
    """The process does not answer, or not in time."""


class Questions:
    """To one export. One at a time, so that its process has at most one piece to send."""

    def __init__(self, asking: socket.socket) -> None:
        self._socket = asking
        self._turn = asyncio.Lock()
        self._number = time.monotonic_ns()
        """An answer that is late, or to somebody who has gone, has another one."""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, what: str, start: int = 0) -> list[Row]:
        """All rows from there on, or as many as anybody reads; NoAnswer."""
        try:
            async with asyncio.timeout(SECONDS):
                async with self._turn:
                    return await self._pieces(what, start)
        except (TimeoutError, OSError, ValueError) as error:
            raise NoAnswer from error

    async def _pieces(self, what: str, start: int) -> list[Row]:
        rows: list[Row] = []
        at: int | None = start
        while at is not None and len(rows) < ROWS_MAX:
            some, at = await self._piece(what, at)
            rows += some
        return rows

    async def _piece(self, what: str, at: int) -> tuple[list[Row], int | None]:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(sock=self._socket, limit=_LINE_MAX)
        reader, writer = self._streams
        self._number += 1
        writer.write(json.dumps({"id": self._number, "what": what, "from": at}).encode() + b"\n")
        while True:
            line = await reader.readline()
            if not line:
                raise ConnectionError("nobody will ever answer")
            # What a process was saying when it died is no whole line.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                answer = json.loads(line)
                if answer["id"] == self._number:
                    rows = [row for row in answer["rows"] if isinstance(row, dict)]
                    return rows, _number_or_none(answer["next"])


def _number_or_none(value: object) -> int | None:
    if value is None or isinstance(value, int):
        return value
    raise TypeError("an answer goes on at a number")
