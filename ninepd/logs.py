"""Lines on standard error, few enough to be read: what guests can cause is limited.

Each line is one write, so that those of several processes do not mix; and no reader, or a reader
that has gone, is no reason for anything to fail.
"""

import logging
import math
import sys
import time
from typing import Final

from ninepd.process import write_error

BURST: Final = 10
"""Lines of one kind that are written in an interval."""
INTERVAL_SECONDS: Final = 10.0

_TRACE_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FORMAT: Final = "ninepd: %(message)s"


class _Kind:
    """Lines from one place of the code."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0
        self.last: logging.LogRecord | None = None
        """Of those that were left out."""


class LineHandler(logging.Handler):
    """Writes records as lines. Of each kind ``BURST`` in an interval, and how many more came.

    That is said with the next line of any kind, or at the end: a timer would wake an idle daemon.
    What was asked for by --trace is not limited.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        self._close_intervals(now - INTERVAL_SECONDS)
        if record.levelno > logging.DEBUG:
            kind = self._kinds.setdefault((record.name, str(record.msg)), _Kind(now))
            kind.count += 1
            if kind.count > BURST:
                record.exc_info = None  # it would keep all that the frames hold
                kind.last = record
                return
        self._write(record)

    def flush(self) -> None:
        """At the end: say what was left out."""
        self.acquire()
        try:
            self._close_intervals(math.inf)
        finally:
            self.release()

    def _close_intervals(self, before: float) -> None:
        for name in [name for name, kind in self._kinds.items() if kind.since <= before]:
            kind = self._kinds.pop(name)
            if kind.last is not None:
                last = logging.makeLogRecord(kind.last.__dict__)
                more = kind.count - BURST
                last.msg, last.args = f"{last.getMessage()} (and {more} more like this)", None
                last.exc_info = last.exc_text = None
                self._write(last)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            write_error(self.format(record))
        except Exception:
            self.handleError(record)


def start_logging(verbose: bool, trace: bool) -> None:
    """Log what needs attention; with ``verbose`` who comes and goes, with ``trace`` everything."""
    handler = LineHandler()
    formatter = logging.Formatter(_TRACE_FORMAT if trace else _FORMAT)
    formatter.converter = time.gmtime  # the zone's file is out of reach once we are shut in
    formatter.default_msec_format = "%s.%03dZ"
    handler.setFormatter(formatter)
    _rehearse(formatter)
    level = logging.DEBUG if trace else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)


def _rehearse(formatter: logging.Formatter) -> None:
    """Show an exception once: Python loads now what it could not find once we are shut in."""
    try:
        [][0] + 1
    except IndexError:
        formatter.formatException(sys.exc_info())
