"""The process of one export: one front end at a time on its socket, signals, its loop.

A front end may leave and another may come: a guest that reboots keeps its connection, a QEMU that
restarts makes a new one. Losing the daemon is worse for both than losing a request, so nothing
that arrives here ends the process (QEMU's generic device does not survive a disconnect).
"""

import asyncio
import logging
import math
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import uvloop

from ninepd import foreign, systemd
from ninepd.connection import Connection
from ninepd.export.handles import Handle
from ninepd.following import SECONDS as FOLLOW_SECONDS
from ninepd.following import Following
from ninepd.inspection import Ends, Inspection, Visitor
from ninepd.logs import about
from ninepd.offer import Offer
from ninepd.ops.guest import Service
from ninepd.process import name_process
from ninepd.stats import Stats
from ninepd.throttle import Throttle

log = logging.getLogger(__name__)

RETIRE: Final = signal.SIGUSR1
"""End as soon as no front end is connected. Who comes then waits for the next process."""
HANDLED: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, RETIRE})
"""Signals. Whoever forks this process may block them until it can handle them."""
_ACCEPT_PAUSE: Final = 1.0
_FAREWELL_SECONDS: Final = 1.5
"""How long the end of the process waits for requests that are out."""
_UCRED: Final = struct.Struct("=iII")
"""pid, uid, gid of a peer (unix(7))."""


class ExportServer:
    """An export on its socket, on the loop thread."""

    def __init__(
        self,
        offer: Offer,
        loop: asyncio.AbstractEventLoop,
        finished: Callable[[], None],
        once: bool,
        report: Callable[[bool], None],
        stats: Stats,
        ends: Ends | None,
    ) -> None:
        """``finished`` is called when no front end is there and none can or shall come.

        With ``once`` the first that speaks is the last. ``report`` is told who comes or leaves;
        ``stats`` is where all of them are counted, and ``ends`` lead to whoever watches.
        """
        self._stats = stats
        self._inspection: Inspection | None = None
        self._following: Following | None = None
        self._follow_until: asyncio.TimerHandle | None = None
        if ends is not None:
            self._inspection = Inspection(ends.answering, self._visitor, self._follow)
            self._following = Following(ends.telling, self._handle)
        self._visit: _Visit | None = None
        self._offer = offer
        self._tag = offer.export.tag
        self._loop = loop
        self._finished = finished
        self._once = once
        self._report = report
        self._tree = offer.open_tree()
        export = offer.export
        # One guest cannot get around it by another, nor by coming again.
        self._throttle = Throttle(export, time.monotonic_ns()) if export.limited else None
        self._connection: Connection | None = None
        self._closing: list[asyncio.Future[None]] = []
        """Of connections that have ended, or are about to."""
        self._served = False
        self._retires = False
        self._pause: asyncio.TimerHandle | None = None
        self._may_accept = True
        """Has the last attempt to accept a front end not failed?"""

    def start(self) -> None:
        """Accept front ends; or, if the descriptor is connected already, serve that one."""
        sock = self._offer.listener.socket
        sock.setblocking(False)
        if self._offer.listener.listening:
            self._loop.add_reader(sock, self._accept)
        else:
            self._meet(sock.dup())
        if self._inspection is not None:
            self._loop.add_reader(self._inspection.fileno(), self._inspect, self._inspection)

    def _inspect(self, inspection: Inspection) -> None:
        if not inspection.answer():
            self._loop.remove_reader(inspection.fileno())

    def _visitor(self) -> Visitor | None:
        if self._visit is None:
            return None
        peer, since, service = self._visit
        return Visitor(peer.pid, peer.uid, since, service.guest)

    def _handle(self, number: int) -> Handle | None:
        """What the guest's fid of that number refers to; for any thread."""
        visit = self._visit
        fid = None if visit is None else visit.service.guest.session.fids.get(number)
        return None if fid is None else fid.handle

    def _follow(self, wanted: bool) -> None:
        """Tell of messages for a while, or not any more."""
        if self._follow_until is not None:
            self._follow_until.cancel()
            self._follow_until = None
        if self._following is None:
            return
        if wanted:
            self._following.start()
            self._follow_until = self._loop.call_later(FOLLOW_SECONDS, self._follow, False)
        else:
            self._following.stop()
        if self._visit is not None:
            self._visit.service.follow_log()

    def retire(self) -> None:
        """Accept nobody any more, and end when the front end that is there has left."""
        self._retires = True
        if self._connection is None:
            self._accept_no_more()
            self._finished()

    async def close(self) -> None:
        """Accept no more; answer what is in flight, part from the front end.

        Storage that does not answer is not waited for.
        """
        self._accept_no_more()
        self._follow(False)
        if self._inspection is not None:
            self._loop.remove_reader(self._inspection.fileno())
        self._offer.listener.socket.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._closing.append(connection.closed)
        if self._closing:
            await asyncio.wait(self._closing, timeout=_FAREWELL_SECONDS)

    def _accept_no_more(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._offer.listener.socket)

    def _accept(self) -> None:
        sock = self._offer.listener.socket
        try:
            connected, _ = sock.accept()
        except OSError as error:
            if self._may_accept:
                log.warning("%s: a front end could not be accepted: %s", self._tag, error)
            self._may_accept = False
            # It stays in the backlog, and would bring us back at once.
            self._loop.remove_reader(sock)
            self._pause = self._loop.call_later(
                _ACCEPT_PAUSE, self._loop.add_reader, sock, self._accept
            )
            return
        self._may_accept = True
        self._meet(connected)

    def _meet(self, connected: socket.socket) -> None:
        """Serve a front end, or refuse it before anything of it is read."""
        allowed = self._offer.export.allow_uid
        peer = _peer(connected)
        if allowed and peer.uid not in allowed:
            log.warning(
                "%s: a front end (%s) was refused: --allow-uid names other users",
                self._tag,
                peer,
                extra={"guest_pid": peer.pid},
            )
            foreign.close(connected.detach())
            if not self._offer.listener.listening:
                self._finished()
            return
        if self._connection is not None:
            # It may have left already, and its farewell lie behind this event.
            self._connection.readable()
        if self._connection is not None:
            log.warning(
                "%s: a second front end (%s) was refused: this socket serves one at a time",
                self._tag,
                peer,
                extra={"guest_pid": peer.pid},
            )
            foreign.close(connected.detach())
            return
        about["guest_pid"] = peer.pid
        log.info("%s: front end connected (%s)", self._tag, peer)
        export = self._offer.export
        service = Service(self._tree, export, export.tag, self._throttle, self._stats)
        self._visit = _Visit(peer, time.time(), service)
        self._connection = Connection(connected, export, service, self._loop, self._connection_left)
        self._tell(True)

    def _connection_left(self) -> None:
        if self._connection is not None:
            self._served |= self._connection.spoke
            self._closing = [future for future in self._closing if not future.done()]
            self._closing.append(self._connection.closed)
            self._connection = self._visit = None
            about.pop("guest_pid", None)
            self._tell(False)
        if self._retires:
            self.retire()
        elif not self._offer.listener.listening or (self._once and self._served):
            self._finished()

    def _tell(self, connected: bool) -> None:
        numbers = self._stats.numbers
        numbers.connected = connected
        numbers.front_ends += connected
        self._report(connected)


class _Peer(NamedTuple):
    """Who connected, or made a pair of sockets."""

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"pid {self.pid}, uid {self.uid}"


class _Visit(NamedTuple):
    """A front end that is connected, since when, and what it is served by."""

    peer: _Peer
    since: float
    service: Service


def _peer(connection: socket.socket) -> _Peer:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _Peer._make(_UCRED.unpack(found))


def _tell_manager(offer: Offer, connected: bool) -> None:
    systemd.notify(systemd.status(str(offer), int(connected)))


def _stay_alive(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """The watchdog of the manager sees that this loop turns."""
    systemd.notify("WATCHDOG=1")
    loop.call_later(seconds, _stay_alive, loop, seconds)


async def _serve(
    offer: Offer,
    once: bool,
    report: Callable[[bool], None],
    stats: Stats,
    ends: Ends | None,
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    os.umask(0)  # guests have applied their own; each mode arrives as it shall be
    server = ExportServer(offer, loop, stop.set, once, report, stats, ends)
    loop.add_signal_handler(RETIRE, server.retire)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    seconds = systemd.watchdog_seconds()
    if seconds < math.inf:
        loop.call_later(seconds, _stay_alive, loop, seconds)
    try:
        systemd.notify("READY=1", wait=True)
        report(False)
        server.start()
        await stop.wait()
        systemd.notify("STOPPING=1")
    finally:
        await server.close()


def serve(
    offer: Offer,
    once: bool,
    report: Callable[[bool], None] | None = None,
    stats: Stats | None = None,
    ends: Ends | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until no further front end can or shall come.

    ``report`` is told when it begins, and whether one is connected; else the service manager is.
    ``stats`` is where to count, if somebody shall see it, and ``ends`` are sockets on which to say
    more.
    """
    stats = Stats() if stats is None else stats
    stats.numbers.pid = os.getpid()
    name_process(offer.export.tag)
    about["export"] = offer.export.tag
    offer.shut_in()
    uvloop.run(_serve(offer, once, report or partial(_tell_manager, offer), stats, ends))
