"""The files of the control tree.

    metrics                 as Prometheus reads them
    exports/NAME/config     the options of an export
    exports/NAME/stats      its counters
    exports/NAME/clients    who is connected
    exports/NAME/fids       what the guest holds
    exports/NAME/locks      what it has locked
    exports/NAME/trace      its messages from now on, as lines of JSON; a read waits for the next
    ctl                     write "reload"; read what came of the last write

NAME is the tag, with %XX for bytes that a name of a file would better not have.
"""

import errno
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry

from ninepd.config import Export
from ninepd.control import metrics, report
from ninepd.control.names import name_of
from ninepd.control.plan9 import Files
from ninepd.control.questions import NoAnswer, Questions, Row
from ninepd.control.trace import Trace
from ninepd.stats import Reader

_TABLES: Final = {"clients": report.clients, "fids": report.fids, "locks": report.locks}


class Watched(NamedTuple):
    """An export, as this process sees it."""

    export: Export
    seen: Reader
    questions: Questions
    trace: Trace


class Control:
    """What was told by ``ctl``, and what came of it."""

    def __init__(self, reload: Callable[[], None]) -> None:
        self._commands = {"reload": (reload, "reload: the supervisor has been told\n")}
        self._result = "nothing was written yet\n"

    def take(self, data: bytes) -> None:
        """A command, as it is written; EINVAL if it is none."""
        words = data.decode("ascii", "backslashreplace").strip()
        found = self._commands.get(words)
        if found is None:
            self._result = f"unknown: {words[:80]!r}; write one of: {', '.join(self._commands)}\n"
            raise OSError(errno.EINVAL, "Invalid argument")
        run, self._result = found
        run()

    async def result(self) -> bytes:
        return self._result.encode()


def grow(
    exports: Sequence[Watched], registry: CollectorRegistry, reload: Callable[[], None]
) -> Files:
    """The whole tree."""
    tree = Files("ninepd")

    async def all_metrics() -> bytes:
        return metrics.text(registry)

    tree.file("metrics", all_metrics)
    control = Control(reload)
    tree.file("ctl", control.result, control.take)
    tree.folder("exports")
    for watched in exports:
        folder = f"exports/{name_of(watched.export.tag)}"
        tree.folder(folder)
        tree.file(f"{folder}/config", partial(_config, watched))
        tree.file(f"{folder}/stats", partial(_stats, watched))
        for what in _TABLES:
            tree.file(f"{folder}/{what}", partial(_asked, watched, what))
        tree.stream(f"{folder}/trace", watched.trace.follow)
    return tree


async def _config(watched: Watched) -> bytes:
    """As a TOML file would have it; what is not set is a remark."""
    lines = []
    for field in fields(watched.export):
        value = getattr(watched.export, field.name)
        line = f"{field.name.replace('_', '-')} = {_toml(value)}"
        lines.append(line if value not in (None, ()) else f"# {field.name.replace('_', '-')}")
    return "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    chars = (char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)
    return f'"{"".join(chars)}"'


async def _stats(watched: Watched) -> bytes:
    return report.stats(watched.seen).encode()


async def _asked(watched: Watched, what: str) -> bytes:
    tag = watched.export.tag
    try:
        if not watched.seen.numbers.pid:
            raise NoAnswer
        rows: list[Row] = await watched.questions.ask(what)
    except NoAnswer:
        return f"{tag}: its process does not answer\n".encode(errors="backslashreplace")
    return _TABLES[what](rows).encode(errors="backslashreplace")
