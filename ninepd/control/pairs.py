"""What somebody reads who follows messages: a line for each request, with its reply.

And how long it took, from when it was decoded to when its reply was about to be put on the ring.
"""

import errno
import json
import time
from collections.abc import Collection, Iterator
from typing import Any, Final

_ERRORS: Final = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}  # not the other name of it
Entry = dict[str, Any]


class Pairs:
    """Puts together what following.py tells."""

    def __init__(
        self,
        types: Collection[str] = (),
        fids: Collection[int] = (),
        path: str | None = None,
    ) -> None:
        """Only requests of these types (``Twalk``), on these fids, at or below ``path``."""
        self._types = {kind.lower().removeprefix("t") for kind in types}
        self._fids = fids
        self._path = None if path is None else path.rstrip("/")
        self._out: dict[int, Entry] = {}
        """Requests without a reply, by their tags."""

    def lines(self, data: bytes) -> Iterator[str]:
        """What there is to say when this was told."""
        entry = json.loads(data)
        if entry.get("lost"):
            yield f"... {entry['lost']} requests and replies were lost, for nobody read them"
        tag, kind = entry.get("tag"), entry.get("type")
        if kind is None:
            if tag in self._out:
                self._out[tag]["because"] = entry.get("because")
        elif kind.startswith("T"):
            self._out[tag] = entry
        else:
            yield from self._answered(tag, entry)

    def _answered(self, tag: int, reply: Entry) -> Iterator[str]:
        request = self._out.pop(tag, None)  # none: it came before anybody looked
        if request is None:
            return
        if request["type"] == "Tflush":
            flushed = self._out.pop(request["fields"]["oldtag"], None)
            if flushed is not None and self._wanted(flushed):
                yield _line(flushed, reply["clock"], "flushed")
        if self._wanted(request):
            yield _line(request, reply["clock"], _told(request, reply))

    def _wanted(self, request: Entry) -> bool:
        if self._types and request["type"].lower().removeprefix("t") not in self._types:
            return False
        if self._fids and request["fields"].get("fid") not in self._fids:
            return False
        if self._path is None:
            return True
        path = request.get("path")
        return path is not None and (path == self._path or path.startswith(f"{self._path}/"))


def _line(request: Entry, clock: int, told: str) -> str:
    at = request["time"]
    when = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at % 1 * 1e6):06}"
    where = f" {_text(request['path'])}" if "path" in request else ""
    asked = f"{request['type']} {_fields(request['fields'])}".rstrip()
    micros = (clock - request["clock"]) / 1000
    return f"{when} {micros:8.0f} us  tag {request['tag']} {asked}{where} -> {told}"


def _told(request: Entry, reply: Entry) -> str:
    fields = reply["fields"]
    if reply["type"] != "Rlerror":
        return f"{reply['type']} {_fields(fields)}".rstrip()
    name = _ERRORS.get(fields["ecode"], str(fields["ecode"]))
    because = request.get("because")
    return f"{name} ({_text(because)})" if because else name


def _fields(fields: Any) -> str:
    return " ".join(f"{name}={_text(value)}" for name, value in fields.items())


def _text(value: Any) -> str:
    """For a terminal, whatever a guest has put into a name."""
    match value:
        case dict():
            return f"({_fields(value)})"
        case list():
            return f"[{', '.join(map(_text, value))}]"
        case str() if value.isprintable():
            return value
        case _:
            return json.dumps(value)
