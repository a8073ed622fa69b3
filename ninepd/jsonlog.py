"""Log records as JSON: an object on a line, in ASCII, for programs that collect them."""

import json
import logging
import time
from typing import Any


class JsonFormatter(logging.Formatter):
    """Always ``time`` (UTC), ``level``, ``logger`` and ``message``; the rest where it is known."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "export": getattr(record, "export", None),
            "guest_pid": getattr(record, "guest_pid", None),
            "message": record.getMessage(),
            "p9": request(record),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({n: _plain(value) for n, value in fields.items() if value is not None})


def request(record: logging.LogRecord) -> dict[str, Any] | None:
    """Of a line of the trace: the tag, and the message with its fields, in terms of JSON."""
    tag = getattr(record, "p9_tag", None)
    if tag is None:
        return None
    message = getattr(record, "p9_message", None)
    if message is None:
        return {"tag": tag}
    return {"tag": tag, "type": type(message).__name__, "fields": _plain(message)}


def _plain(value: Any) -> Any:
    """In terms of JSON; a name that is no text is escaped, for halves of surrogates are none."""
    match value:
        case bytes():
            return value.decode(errors="backslashreplace")
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {name: _plain(field) for name, field in value.items()}
        case tuple():
            return _plain(value._asdict()) if hasattr(value, "_asdict") else [*map(_plain, value)]
        case _:
            return value
