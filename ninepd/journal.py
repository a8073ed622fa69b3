"""The systemd journal: its native protocol, and what it understands of lines on standard error.

A record is one datagram of fields (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/), so that a line has
its priority and says which export it is about. The journal sees by itself who has sent it. Not told
is where in the code a line comes from: what mypyc has compiled shows up in no Python frame.
"""

import logging
import os
import socket
from typing import Final

from ninepd.process import write_error

_SOCKET: Final = "/run/systemd/journal/socket"
_STREAM: Final = "JOURNAL_STREAM"
"""Device and inode of the journal's end of a standard stream (systemd.exec(5))."""
MESSAGE_MAX: Final = 32 << 10
"""Bytes; one datagram has to hold them all, with what an unprivileged socket may send at once."""
_IDENTIFIER: Final = "ninepd"
_PRIORITIES: Final = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
"""As in syslog(3)."""


def _priority(record: logging.LogRecord) -> int:
    return _PRIORITIES.get(record.levelno, _PRIORITIES[logging.ERROR])


def reads_standard_error() -> bool:
    """Is the journal what standard error leads to?"""
    found = os.fstat(2)
    return os.environ.get(_STREAM) == f"{found.st_dev}:{found.st_ino}"


class PrefixedFormatter(logging.Formatter):
    """Lines that begin with their priority, as ``<4>`` (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_priority(record)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


def connect() -> socket.socket:
    """The journal's socket, while its name is in reach; OSError if nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.connect(_SOCKET)
    except OSError:
        sock.close()
        raise
    return sock


class Journal:
    """What is written to the journal's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._formatter = logging.Formatter()

    def write(self, record: logging.LogRecord) -> None:
        """Send a record. One that the journal does not take at once goes to standard error."""
        message = self._formatter.format(record)
        fields = {
            "MESSAGE": message.encode(errors="backslashreplace")[:MESSAGE_MAX],
            "PRIORITY": _priority(record),
            "SYSLOG_IDENTIFIER": _IDENTIFIER,
            "LOGGER": record.name,
            "EXPORT": getattr(record, "export", None),
            "GUEST_PID": getattr(record, "guest_pid", None),
            "P9_TAG": getattr(record, "p9_tag", None),
        }
        if hasattr(record, "p9_message"):
            fields["P9_TYPE"] = type(record.p9_message).__name__
        data = b"".join(_field(name, value) for name, value in fields.items() if value is not None)
        try:
            self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            write_error(f"{_IDENTIFIER}: {message}")


def _field(name: str, value: str | int | bytes) -> bytes:
    data = value if isinstance(value, bytes) else str(value).encode(errors="backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
    return b"%s=%s\n" % (name.encode(), data)
