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

from ninepd import foreign, sandbox, systemd
from ninepd.capabilities import CAP_DAC_READ_SEARCH, has_capabilities, needed
from ninepd.config import MAPPED, Export, HostMounts, Multidevs, Reclaim, Sandbox
from ninepd.connection import Connection
from ninepd.errors import UsageError
from ninepd.export.descriptors import budget_of
from ninepd.export.models import choose_model, make_host
from ninepd.export.tree import Tree
from ninepd.exposure import refuse_unsafe
from ninepd.listener import Listener
from ninepd.logs import about
from ninepd.ops.guest import Service
from ninepd.process import name_process
from ninepd.throttle import Throttle

log = logging.getLogger(__name__)

HANDLED: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals. Whoever forks this process may block them until it can handle them."""
_CLOSED: Final = -1
_ACCEPT_PAUSE: Final = 1.0
_FAREWELL_SECONDS: Final = 1.5
"""How long the end of the process waits for requests that are out."""
_UCRED: Final = struct.Struct("=iII")
"""pid, uid, gid of a peer (unix(7))."""


class Offer:
    """An export that can be served: all that could be wrong with it was found out."""

    def __init__(self, export: Export, file_limit: int) -> None:
        """Hold its directory, and listen; or UsageError."""
        self.export = export
        self._budget = budget_of(file_limit)
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self._directory = os.open(export.export, flags)
        except OSError as error:
            raise UsageError(f"--export: {export.export}: {error.strerror}") from None
        try:
            self.model = choose_model(export, self._directory)
            self._host = make_host(export, self.model, self._directory)
            self.open_tree().close()
            refuse_unsafe(export, self.model, self._directory)
            self.sandbox = self._choose_sandbox()
            self.listener = Listener(export)
        except BaseException:
            os.close(self._directory)
            raise

    def __str__(self) -> str:
        export = self.export
        readonly = ", read-only" if export.readonly else ""
        return (
            f"{export.export} as {export.tag} at {self.listener}"
            f" ({self.model}, reclaim {export.reclaim}{readonly}, sandbox {self.sandbox.mode})"
        )

    def open_tree(self) -> Tree:
        """The directory that was found at the start, whatever has happened to its name."""
        export = self.export
        reclaim = Reclaim(export.reclaim)
        insists = reclaim is Reclaim.HANDLES
        if insists and not has_capabilities(CAP_DAC_READ_SEARCH):
            raise UsageError(
                "--reclaim: handles needs CAP_DAC_READ_SEARCH; run as root, or use names"
            )
        try:
            tree = Tree(
                os.dup(self._directory),
                self._host,
                budget=self._budget,
                reclaim=reclaim,
                multidevs=Multidevs(export.multidevs),
                kernel_filesystems=export.allow_kernel_filesystems,
            )
        except OSError as error:
            raise UsageError(f"--export: {export.export}: {error.strerror}") from None
        if insists and not tree.root.volume.by_handle:
            tree.close()
            raise UsageError(
                f"--reclaim: the file system of {export.export} cannot open files by handle; "
                "use names"
            )
        return tree

    def _choose_sandbox(self) -> sandbox.Choice:
        export = self.export
        choice = sandbox.choose(Sandbox(export.sandbox), self._rooms)
        if export.host_mounts == HostMounts.IGNORE and choice.mode is not Sandbox.NAMESPACE:
            raise UsageError(
                f"--host-mounts: sandbox {choice.mode} leaves the host's mounts; ignore goes with "
                "namespace"
            )
        # Landlock does not keep those that override permissions from modes and owners.
        weak = choice.mode is Sandbox.NONE or (
            choice.mode is Sandbox.LANDLOCK and self.capabilities
        )
        for lack in choice.lacks:
            level = logging.WARNING if weak else logging.INFO
            log.log(level, "%s: sandbox %s, %s", export.tag, choice.mode, lack)
        return choice

    @property
    def by_handle(self) -> bool:
        """May files be opened by handle?"""
        return self.export.reclaim != Reclaim.NAMES and has_capabilities(CAP_DAC_READ_SEARCH)

    @property
    def capabilities(self) -> frozenset[int]:
        """What serving it takes, once it is shut in."""
        return needed(
            as_others=self.model not in MAPPED,
            by_handle=self.by_handle,
            trusted_xattrs=self.export.trusted_xattrs,
        )

    @property
    def _rooms(self) -> sandbox.Rooms:
        return sandbox.Rooms(
            self._directory,
            self.export.readonly,
            self.export.host_mounts == HostMounts.FOLLOW,
            self.by_handle,
            self.capabilities,
        )

    def shut_in(self) -> None:
        """This process will serve the export, and do nothing else any more.

        Before it has a loop, which could keep ways around what follows.
        """
        systemd.connect()
        foreign.remember_mounts()
        rooms = self._rooms
        if self.sandbox.mode is not Sandbox.NONE:
            self.listener.entrust_name(self.export.tag)
        sandbox.enter(self.sandbox, rooms)
        sandbox.finish(self.sandbox, rooms)

    def close(self) -> None:
        """Another process serves it: let its descriptors go."""
        self.listener.close()
        self._close_directory()

    def withdraw(self) -> None:
        """It is served no more: nobody shall connect."""
        self.listener.remove()
        self._close_directory()

    def _close_directory(self) -> None:
        directory, self._directory = self._directory, _CLOSED
        if directory != _CLOSED:
            os.close(directory)


class ExportServer:
    """An export on its socket, on the loop thread."""

    def __init__(
        self,
        offer: Offer,
        loop: asyncio.AbstractEventLoop,
        finished: Callable[[], None],
        once: bool,
        report: Callable[[bool], None],
    ) -> None:
        """``finished`` is called when no front end is there and none can or shall come.

        With ``once`` the first that speaks is the last. ``report`` is told whether one is there.
        """
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

    async def close(self) -> None:
        """Accept no more; answer what is in flight, part from the front end.

        Storage that does not answer is not waited for.
        """
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._offer.listener.socket)
        self._offer.listener.socket.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._closing.append(connection.closed)
        if self._closing:
            await asyncio.wait(self._closing, timeout=_FAREWELL_SECONDS)

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
        service = Service(self._tree, export.msize_max, export.fids_max, export.tag, self._throttle)
        self._connection = Connection(connected, export, service, self._loop, self._connection_left)
        self._report(True)

    def _connection_left(self) -> None:
        if self._connection is not None:
            self._served |= self._connection.spoke
            self._closing = [future for future in self._closing if not future.done()]
            self._closing.append(self._connection.closed)
            self._connection = None
            about.pop("guest_pid", None)
            self._report(False)
        if not self._offer.listener.listening or (self._once and self._served):
            self._finished()


class _Peer(NamedTuple):
    """Who connected, or made a pair of sockets."""

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"pid {self.pid}, uid {self.uid}"


def _peer(connection: socket.socket) -> _Peer:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _Peer._make(_UCRED.unpack(found))


def _tell_manager(offer: Offer, connected: bool) -> None:
    systemd.notify(systemd.status(str(offer), int(connected)))


def _stay_alive(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """The watchdog of the manager sees that this loop turns."""
    systemd.notify("WATCHDOG=1")
    loop.call_later(seconds, _stay_alive, loop, seconds)


async def _serve(offer: Offer, once: bool, report: Callable[[bool], None]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    os.umask(0)  # guests have applied their own; each mode arrives as it shall be
    server = ExportServer(offer, loop, stop.set, once, report)
    seconds = systemd.watchdog_seconds()
    if seconds < math.inf:
        loop.call_later(seconds, _stay_alive, loop, seconds)
    try:
        systemd.notify("READY=1", systemd.status(str(offer), 0), wait=True)
        server.start()
        await stop.wait()
        systemd.notify("STOPPING=1")
    finally:
        await server.close()


def serve(offer: Offer, once: bool, report: Callable[[bool], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until no further front end can or shall come.

    ``report`` is told whether one is connected; else the service manager is.
    """
    name_process(offer.export.tag)
    about["export"] = offer.export.tag
    offer.shut_in()
    uvloop.run(_serve(offer, once, report or partial(_tell_manager, offer)))
