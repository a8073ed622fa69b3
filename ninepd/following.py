"""Messages of a guest, for whoever follows them by the control tree (control/trace.py).

A line of JSON for each request and each reply, by a socket that keeps them apart. Whoever serves
does not wait: a line for which there is no room is lost, and the next one tells how many were.
"""

import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Final

from ninepd.export.handles import Handle
from ninepd.inspection import path_of
from ninepd.jsonlog import request

SECONDS: Final = 5.0
"""How long messages are told after they were asked for, unless they are asked for again."""
_trace: Final = logging.getLogger("ninepd.trace")


class Following(logging.Handler):
    """Takes lines of the trace, while it is asked for."""

    def __init__(self, telling: socket.socket, handle: Callable[[int], Handle | None]) -> None:
        """``handle`` is what the guest's fid of that number refers to."""
        super().__init__()
        self._socket = telling
        self._handle = handle
        self._lost = 0
        self._before = (_trace.level, _trace.propagate)
        self.goes_on = False

    def start(self) -> None:
        """Beginning with the next message."""
        if not self.goes_on:
            self.goes_on = True
            # What the log does not show stays out of it.
            self._before = (_trace.level, _trace.propagate)
            _trace.propagate = _trace.isEnabledFor(logging.DEBUG)
            _trace.setLevel(logging.DEBUG)
            _trace.addHandler(self)

    def stop(self) -> None:
        """Nobody follows any more."""
        if self.goes_on:
            self.goes_on = False
            _trace.removeHandler(self)
            level, _trace.propagate = self._before
            _trace.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        """Under the lock of this handler: a message of any thread."""
        try:
            self._tell(record)
        except Exception:
            self.handleError(record)  # a bug here is no reason for a request to fail

    def _tell(self, record: logging.LogRecord) -> None:
        line = {"time": record.created, "clock": time.monotonic_ns()} | (request(record) or {})
        fields = line.get("fields", {})
        if "type" not in line:
            line["because"] = str(record.args[-1]) if isinstance(record.args, tuple) else ""
        elif line["type"].startswith("T") and isinstance(fields.get("fid"), int):
            handle = self._handle(fields["fid"])
            if handle is not None:
                line["path"] = path_of(handle)
        if self._lost:
            line["lost"] = self._lost
        try:
            self._socket.send(json.dumps(line).encode())
        except OSError:  # no room, or a line that is too long
            self._lost += 1
        else:
            self._lost = 0
