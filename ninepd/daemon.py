"""The loop thread: listening sockets, one front end at a time on each, signals, readiness.

A front end may leave and another may come: a guest that reboots keeps its connection, a QEMU that
restarts makes a new one. Losing the daemon is worse for both than losing a request, so nothing
that arrives here ends the process (QEMU's generic device does not survive a disconnect).
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable
from typing import Final

from ninepd.config import Config, Export, Multidevs, Reclaim
from ninepd.device import Device
from ninepd.errors import FramingLost, UsageError
from ninepd.export.descriptors import budget_of
from ninepd.export.security import CAP_DAC_READ_SEARCH, has_capabilities, make_model
from ninepd.export.tree import Tree
from ninepd.frontend import FrontEnd
from ninepd.ops.guest import Policy, Service

log = logging.getLogger(__name__)

_BACKLOG: Final = 4
_ACCEPT_PAUSE: Final = 1.0
_PEER_CREDENTIALS: Final = 12
"""Bytes of struct ucred."""


class Listener:
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
        policy = Policy(make_model(export.security_model), export.readonly, export.msize_max)
        self._tree = _open_tree(export, budget)
        self._policy = policy
        self._front_end: FrontEnd | None = None
        self._device: Device | None = None
        self._bound_path: str | None = None
        self._socket = self._open_socket()
        self._listening = bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._served = False

    def _open_socket(self) -> socket.socket:
        path, fd = self._export.socket_path, self._export.fd
        if fd is not None:
            return socket.socket(fileno=os.dup(fd))
        assert path is not None  # noqa: S101 - Export allows one of the two
        _refuse_occupied(path)
        try:
            sock = _listen(path)
        except OSError as error:
            raise UsageError(f"--socket-path: {path}: {error.strerror}") from None
        self._bound_path = path
        return sock

    def start(self) -> None:
        """Accept front ends; or, if the descriptor is connected already, serve that one."""
        self._socket.setblocking(False)
        if self._listening:
            self._loop.add_reader(self._socket, self._accept)
        else:
            self._serve(self._socket.dup())

    def expects_front_ends(self, once: bool) -> bool:
        """Is there one, or can another come? With ``once`` the first that speaks is the last."""
        if self._front_end is not None:
            return True
        return self._listening and not (once and self._served)

    def close(self) -> None:
        """Answer what is in flight, part from the front end, remove the socket."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        if self._bound_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._bound_path)
        self._leave()
        self._tree.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            log.warning("%s: a front end could not be accepted: %s", self._export.tag, error)
            # It stays in the backlog, and would bring us back at once.
            self._loop.remove_reader(self._socket)
            self._loop.call_later(_ACCEPT_PAUSE, self._loop.add_reader, self._socket, self._accept)
            return
        # The last one may have left already, and its farewell lie behind this event.
        self._readable()
        if self._front_end is not None:
            log.warning(
                "%s: a second front end (%s) was refused: this socket serves one at a time",
                self._export.tag,
                _peer(connection),
            )
            connection.close()
            return
        self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        log.info("%s: front end connected (%s)", self._export.tag, _peer(connection))
        self._device = Device(
            self._export.tag,
            self._export.config_space,
            Service(self._tree, self._policy),
            self._export.poll_us,
            self._call_soon,
        )
        self._front_end = FrontEnd(connection)
        self._loop.add_reader(self._front_end.fileno(), self._readable)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _readable(self) -> None:
        front_end, device = self._front_end, self._device
        if front_end is None or device is None:
            return
        try:
            for message in front_end.receive():
                self._served = True
                reply = device.handle(message)
                if reply is not None:
                    front_end.send(reply)
        except EOFError:
            log.info("%s: front end left", self._export.tag)
        except FramingLost as error:
            log.warning("%s: front end disconnected: %s", self._export.tag, error)
        except Exception:
            # A bug of ours: this device cannot go on, the others can.
            log.exception("%s: front end disconnected because of a bug", self._export.tag)
        else:
            return
        self._leave()
        self._left()

    def _leave(self) -> None:
        front_end, self._front_end = self._front_end, None
        device, self._device = self._device, None
        if front_end is not None:
            self._loop.remove_reader(front_end.fileno())
            front_end.close()
        if device is not None:
            device.close()


def _open_tree(export: Export, budget: int) -> Tree:
    by_handle = export.reclaim == Reclaim.HANDLES
    if by_handle and not has_capabilities(CAP_DAC_READ_SEARCH):
        raise UsageError("--reclaim: handles needs CAP_DAC_READ_SEARCH; run as root, or use names")
    try:
        tree = Tree(
            export.export,
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
    pid, uid = (int.from_bytes(credentials[at : at + 4], "little") for at in (0, 4))
    return f"pid {pid}, uid {uid}"


def _listen(path: str) -> socket.socket:
    """A listening socket, in the place of what was at the path.

    It gets its name only when it listens, for those who wait for the path to appear.
    """
    folder, name = os.path.split(path)
    folder_fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Whoever may connect holds the export: nobody but our own user, unless told otherwise.
    umask = os.umask(0o177)
    try:
        temporary = f".ninepd-{os.getpid()}"
        sock.bind(f"/proc/self/fd/{folder_fd}/{temporary}")
        sock.listen(_BACKLOG)
        os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(umask)
        os.close(folder_fd)
    return sock


def _refuse_occupied(path: str) -> None:
    """UsageError unless there is nothing, or a socket that nobody listens on any more."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--socket-path: {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise UsageError(
            f"--socket-path: {path} exists and is no socket; remove it or choose another"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise UsageError(f"--socket-path: {path}: {error.strerror}") from None
        else:
            raise UsageError(f"--socket-path: {path} is in use by another process")


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
    os.umask(0)  # guests have applied their own; each mode arrives as it shall be
    listeners: list[Listener] = []

    def left() -> None:
        if not any(listener.expects_front_ends(config.once) for listener in listeners):
            stop.set()

    try:
        for export in config.exports:
            listeners.append(Listener(export, loop, budget, left))  # noqa: PERF401 - a failing one: finally
        for listener in listeners:
            listener.start()
        _notify("READY=1")
        await stop.wait()
        _notify("STOPPING=1")
    finally:
        for listener in listeners:
            listener.close()
