"""Messages of one export, for all who follow them.

The export's process tells them as long as it is asked to (following.py). Who reads too slowly
loses lines, and is told how many.
"""

import asyncio
import json
import socket
from collections import deque
from contextlib import suppress
from typing import Final

from ninepd.control.plan9 import Stream
from ninepd.control.questions import NoAnswer, Questions

_LINE_MAX: Final = 1 << 18
_ROOM: Final = 1 << 20
"""Bytes that wait for one reader."""
_ASK_SECONDS: Final = 1.0
"""How often the process is asked to go on, and the next one, should it have died, to begin."""
_BATCH: Final = 64
"""Lines that are taken before others have their turn."""


class Trace:
    """One export's."""

    def __init__(self, following: socket.socket, questions: Questions) -> None:
        self._socket = following
        self._questions = questions
        self._readers: set[Reader] = set()
        self._asking: asyncio.Task[None] | None = None

    def follow(self) -> Stream:
        """All messages from now on."""
        reader = Reader(self)
        if not self._readers:
            self._forget_old()
            asyncio.get_running_loop().add_reader(self._socket, self._receive)
            self._asking = asyncio.ensure_future(self._ask())
        self._readers.add(reader)
        return reader

    def leave(self, reader: "Reader") -> None:
        """It reads no more."""
        self._readers.discard(reader)
        if not self._readers and self._asking is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._asking.cancel()
            self._asking = None

    def _forget_old(self) -> None:
        """What was told when the last one had left."""
        with suppress(BlockingIOError):
            while self._socket.recv(_LINE_MAX):
                pass

    async def _ask(self) -> None:
        while True:
            with suppress(NoAnswer):  # it is asked again
                await self._questions.ask("trace", 1)
            await asyncio.sleep(_ASK_SECONDS)

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(_BATCH):
                line = self._socket.recv(_LINE_MAX)
                if not line:  # nobody is left who could tell anything
                    asyncio.get_running_loop().remove_reader(self._socket)
                    return
                for reader in self._readers:
                    reader.add(line + b"\n")


class Reader(Stream):
    """One who follows."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._there = asyncio.Event()

    def add(self, line: bytes) -> None:
        """The next line, if there is room."""
        if self._size + len(line) > _ROOM:
            self._lost += 1
            return
        if self._lost:
            told = json.dumps({"lost": self._lost}).encode() + b"\n"
            self._lost = 0
            self._append(told)
        self._append(line)
        self._there.set()

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)

    async def read(self, count: int) -> bytes:
        await self._there.wait()
        data = bytearray()
        while self._lines and len(data) < count:
            line = self._lines.popleft()
            fits = count - len(data)
            if len(line) > fits:
                self._lines.appendleft(line[fits:])
            data += line[:fits]
        self._size -= len(data)
        if not self._lines:
            self._there.clear()
        return bytes(data)

    def close(self) -> None:
        self._trace.leave(self)
