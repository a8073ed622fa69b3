"""The process that serves the control tree and the metrics, and does nothing else.

It has no export, no capability, and nothing of the host's file system. What it can do is read
counters, ask the processes of exports, and ring for the supervisor.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import uvloop

from ninepd import sandbox
from ninepd.config import Export
from ninepd.control import metrics, tree
from ninepd.control.doors import Doors
from ninepd.control.http import MetricsProtocol
from ninepd.control.links import Links
from ninepd.control.plan9 import Plan9Protocol
from ninepd.control.questions import Questions
from ninepd.control.trace import Trace
from ninepd.process import name_process

log = logging.getLogger(__name__)

_CLIENTS: Final = 32
"""Of each of the two; more wait."""
_PAUSE: Final = 1.0

Factory = Callable[[Callable[[], None]], asyncio.Protocol]
"""Makes the protocol of a connection, which says when that has ended."""


class _Acceptor:
    """Lets clients in on a socket that listens."""

    def __init__(self, listening: socket.socket, factory: Factory) -> None:
        self._loop = asyncio.get_running_loop()
        self._listening = listening
        self._factory = factory
        self._clients = 0
        listening.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        if self._clients >= _CLIENTS:
            self._loop.remove_reader(self._listening)
            return
        try:
            connected, _ = self._listening.accept()
        except OSError as error:
            log.warning("control: a client could not be accepted: %s", error)
            self._loop.remove_reader(self._listening)
            self._loop.call_later(_PAUSE, self._listen)
            return
        self._clients += 1
        self._loop.create_task(self._meet(connected))

    async def _meet(self, connected: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._factory(self._ended), sock=connected
            )
        except OSError:  # it has left again
            connected.close()
            self._ended()

    def _ended(self) -> None:
        self._clients -= 1
        self._listen()


async def _serve(doors: Doors, watched: Sequence[tree.Watched], reload: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    handled = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    registry = metrics.registry({one.export.tag: one.seen for one in watched})
    files = tree.grow(watched, registry, reload)
    if doors.control is not None:
        _Acceptor(doors.control, partial(Plan9Protocol, files))
    if doors.metrics is not None:
        _Acceptor(doors.metrics, partial(MetricsProtocol, partial(metrics.text, registry)))
    await stop.wait()


def serve(
    doors: Doors, exports: Sequence[tuple[Export, Links]], reload: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT. ``reload`` asks the supervisor for it."""
    name_process("control")
    watched = []
    for export, links in exports:
        seen, asking, following = links.watch()
        questions = Questions(asking)
        watched.append(tree.Watched(export, seen, questions, Trace(following, questions)))
    sandbox.isolate()
    uvloop.run(_serve(doors, watched, reload))
