"""The loop thread: one front end at a time on each socket, signals, readiness.

A front end may leave and another may come: a guest that reboots keeps its connection, a QEMU that
restarts makes a new one. Losing the daemon is worse for both than losing a request, so nothing
that arrives here ends the process (QEMU's generic device does not survive a disconnect).
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final

from ninepd import foreign
from ninepd.capabilities import CAP_DAC_READ_SEARCH, has_capabilities, privileged
from ninepd.config import Config, Export, Multidevs, Reclaim
from ninepd.connection import Connection
from ninepd.errors import UsageError
from ninepd.export.descriptors import budget_of
from ninepd.export.local import make_host
from ninepd.export.tree import Tree
from ninepd.listener import Listener
from ninepd.ops.guest import Service
from ninepd.syscalls import keep_capabilities

log = logging.getLogger(__name__)

_ACCEPT_PAUSE: Final = 1.0
_FAREWELL_SECONDS: Final = 1.5
"""How long the end of the process waits for requests that are out."""
_PEER_CREDENTIALS: Final = 12
"""Bytes of struct ucred."""


class ExportServer:
    """An export on its socket."""

    def __init__(
        self,
        export: Export,
        loop: asyncio.AbstractEventLoop,
        budget: int,
        left: Callable[[], None],
    ) -> None:
        """Ready to listen, or UsageError. ``budget`` is how many descriptors fids may keep open.

        ``left`` is called whenever a front end has gone.
        """
        self._export = export
        self._loop = loop
        self._left = left
        self._tree = _open_tree(export, budget)
        self._listener = Listener(export)
        self._connection: Connection | None = None
        self._closing: list[asyncio.Future[None]] = []
        """Of connections that have ended, or are about to."""
        self._served = False

    def start(self) -> None:
        """Accept front ends; or, if the descriptor is connected already, serve that one."""
        sock = self._listener.socket
        sock.setblocking(False)
        if self._listener.listening:
            self._loop.add_reader(sock, self._accept)
        else:
            self._serve(sock.dup())

    def expects_front_ends(self, once: bool) -> bool:
        """Is there one, or can another come? With ``once`` the first that speaks is the last."""
        if self._connection is not None:
            return True
        return self._listener.listening and not (once and self._served)

    async def close(self) -> None:
        """Answer what is in flight, part from the front end, remove the socket.

        Storage that does not answer is not waited for.
        """
        self._loop.remove_reader(self._listener.socket)
        self._listener.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._closing.append(connection.closed)
        if self._closing:
            await asyncio.wait(self._closing, timeout=_FAREWELL_SECONDS)

    def _accept(self) -> None:
        sock = self._listener.socket
        try:
            connected, _ = sock.accept()
        except OSError as error:
            log.warning("%s: a front end could not be accepted: %s", self._export.tag, error)
            # It stays in the backlog, and would bring us back at once.
            self._loop.remove_reader(sock)
            self._loop.call_later(_ACCEPT_PAUSE, self._loop.add_reader, sock, self._accept)
            return
        if self._connection is not None:
            # It may have left already, and its farewell lie behind this event.
            self._connection.readable()
        if self._connection is not None:
            log.warning(
                "%s: a second front end (%s) was refused: this socket serves one at a time",
                self._export.tag,
                _peer(connected),
            )
            foreign.close(connected.detach())
            return
        self._serve(connected)

    def _serve(self, connected: socket.socket) -> None:
        log.info("%s: front end connected (%s)", self._export.tag, _peer(connected))
        service = Service(self._tree, self._export.msize_max)
        self._connection = Connection(
            connected, self._export, service, self._loop, self._connection_left
        )

    def _connection_left(self) -> None:
        if self._connection is not None:
            self._served |= self._connection.spoke
            self._closing = [future for future in self._closing if not future.done()]
            self._closing.append(self._connection.closed)
            self._connection = None
        self._left()


def _open_tree(export: Export, budget: int) -> Tree:
    by_handle = export.reclaim == Reclaim.HANDLES
    if by_handle and not has_capabilities(CAP_DAC_READ_SEARCH):
        raise UsageError("--reclaim: handles needs CAP_DAC_READ_SEARCH; run as root, or use names")
    host = make_host(export.security_model, export.readonly)
    try:
        tree = Tree(
            os.open(export.export, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
            host,
            budget=budget,
            by_handle=by_handle,
            multidevs=Multidevs(export.multidevs),
        )
    except OSError as error:
        raise UsageError(f"--export: {export.export}: {error.strerror}") from None
    if by_handle and not tree.handles.may_rest(tree.root):
        tree.close()
        raise UsageError(
            f"--reclaim: the file system of {export.export} cannot open files by handle; use names"
        )
    return tree


def _peer(connection: socket.socket) -> str:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS)
    pid, uid = (int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4))
    return f"pid {pid}, uid {uid}"


def _raise_file_limit() -> int:
    """A fid is a descriptor: take all that is allowed, and say how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _notify(message: str) -> None:
    """Tell systemd, if it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(message.encode())
        except OSError as error:
            log.warning("systemd could not be notified: %s", error)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, or until no further front end can or shall come."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    budget = budget_of(_raise_file_limit(), len(config.exports))
    if privileged():
        keep_capabilities()  # in all threads: they inherit it from this one
    os.umask(0)  # guests have applied their own; each mode arrives as it shall be
    servers: list[ExportServer] = []

    def left() -> None:
        if not any(server.expects_front_ends(config.once) for server in servers):
            stop.set()

    try:
        for export in config.exports:
            servers.append(ExportServer(export, loop, budget, left))  # noqa: PERF401 - a failing one: finally
        for server in servers:
            server.start()
        _notify("READY=1")
        await stop.wait()
        _notify("STOPPING=1")
    finally:
        await asyncio.gather(*[server.close() for server in servers])
