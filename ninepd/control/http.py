"""Metrics by HTTP/1.1 (RFC 9112): one request a connection, and one thing to get."""

import asyncio
from collections.abc import Callable
from typing import Final, cast

from ninepd.control.metrics import CONTENT_TYPE

_HEAD_MAX: Final = 8192
_SECONDS: Final = 5.0
_END: Final = b"\r\n\r\n"
_PATH: Final = "/metrics"


class MetricsProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, make: Callable[[], bytes], ended: Callable[[], None]) -> None:
        """``make`` is what there is to get; ``ended`` is called when the connection has."""
        self._make = make
        self._ended = ended
        self._head = bytearray()
        self._transport: asyncio.Transport
        self._alarm: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # Whoever says nothing, or does not read, goes.
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(_SECONDS, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._alarm.cancel()
        self._ended()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._head += data
        if _END in self._head:
            self._answer(self._head.split(b"\r\n", 1)[0].decode("latin-1").split(" "))
        elif len(self._head) > _HEAD_MAX:
            self._send("431 Request Header Fields Too Large", b"")

    def _answer(self, words: list[str]) -> None:
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            self._send("400 Bad Request", b"")
        elif words[0] not in {"GET", "HEAD"}:
            self._send("405 Method Not Allowed", b"", "Allow: GET, HEAD\r\n")
        elif words[1].split("?")[0] != _PATH:
            self._send("404 Not Found", f"there is {_PATH}\n".encode())
        else:
            self._send("200 OK", self._make(), f"Content-Type: {CONTENT_TYPE}\r\n", words[0])

    def _send(self, status: str, body: bytes, more: str = "", method: str = "GET") -> None:
        head = f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\n"
        head += "Connection: close\r\n\r\n"
        self._transport.write(head.encode() + (b"" if method == "HEAD" else body))
        self._transport.close()
