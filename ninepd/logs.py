"""What is logged, how and where to; few enough lines to be read: what guests can cause is limited.

Each line is one write, so that those of several processes do not mix; and no reader, or a reader
that has gone, is no reason for anything to fail.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final

from ninepd import journal
from ninepd.errors import UsageError
from ninepd.jsonlog import JsonFormatter
from ninepd.process import write_error

BURST: Final = 10
"""Lines of one kind that are written in an interval."""
INTERVAL_SECONDS: Final = 10.0

_TRACE_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FORMAT: Final = "ninepd: %(message)s"

Write = Callable[[logging.LogRecord], None]


class Level(StrEnum):
    """From which severity on lines are written."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    """What is served where, and who comes and goes, too."""
    DEBUG = "debug"
    """Every message, too."""


class Format(StrEnum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"
    JOURNAL = "journal"


about: Final[dict[str, str | int]] = {}
"""What lines are about: ``export`` (its tag), ``guest_pid`` (of its front end).

Where a process has one of each at a time. A record that is about another says so by ``extra``.
"""


@contextlib.contextmanager
def concerning(tag: str) -> Iterator[None]:
    """For a while, all lines are about this export."""
    about["export"] = tag
    try:
        yield
    finally:
        del about["export"]


class _Kind:
    """Lines from one place of the code."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0
        self.last: logging.LogRecord | None = None
        """Of those that were left out."""


class LimitedHandler(logging.Handler):
    """Writes, of each kind of record, ``BURST`` in an interval, and how many more came.

    That is said with the next line of any kind, or at the end: a timer would wake an idle daemon.
    What was asked for by the level ``debug`` is not limited.
    """

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write_record = write
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        self._close_intervals(now - INTERVAL_SECONDS)
        record.__dict__.update(about | record.__dict__)
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
            self._write_record(record)
        except Exception:
            self.handleError(record)


def to_standard_error(formatter: logging.Formatter) -> Write:
    """Records become lines there."""
    return lambda record: write_error(formatter.format(record))


def start_logging(level: Level, form: Format) -> None:
    """From here on; or UsageError. Before descriptors and names are out of reach."""
    handler = LimitedHandler(_writer(level, form))
    _rehearse()
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(capture=True)


def _writer(level: Level, form: Format) -> Write:
    if form is Format.JSON:
        return to_standard_error(JsonFormatter())
    if form is Format.JOURNAL:
        return _journal()
    formatter = logging.Formatter(_TRACE_FORMAT if level is Level.DEBUG else _FORMAT)
    formatter.converter = time.gmtime  # the zone's file is out of reach once we are shut in
    formatter.default_msec_format = "%s.%03dZ"
    return to_standard_error(formatter)


def _journal() -> Write:
    try:
        return journal.Journal(journal.connect()).write
    except OSError as error:
        if journal.reads_standard_error():
            return to_standard_error(journal.PrefixedFormatter())
        raise UsageError(
            f"--log-format: the journal cannot be reached ({error.strerror}); use text or json"
        ) from None


def _rehearse() -> None:
    """Show an exception once: Python loads now what it could not find once we are shut in."""
    try:
        [][0] + 1
    except IndexError:
        logging.Formatter().formatException(sys.exc_info())
