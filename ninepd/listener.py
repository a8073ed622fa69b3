"""Listening sockets: made at a path of the file system, or handed over by whoever started us.

Of several daemons that want one path one gets it. Whoever looks at a path to take its place, or
to remove what is there, holds a lock on the folder meanwhile (flock(2): nothing is left behind, and
systemd-tmpfiles(8) respects it). A new socket gets its name when it listens already, for those who
wait for the path to appear.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from typing import Final

from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.syscalls import fd_path

_BACKLOG: Final = 4
_LOCK_SECONDS: Final = 5.0
_LOCK_PAUSE: Final = 0.01


class Listener:
    """The socket of an export; its descriptor is inherited by the process that serves it."""

    def __init__(self, export: Export) -> None:
        """It listens, or is connected already if the export's descriptor is; or UsageError."""
        self._place: _Place | None = None
        path, fd = export.socket_path, export.fd
        if path is not None:
            try:
                self._place = _Place(path)
                self.socket = self._place.socket
            except OSError as error:
                raise UsageError(f"--socket-path: {path}: {error.strerror}") from None
        else:
            self.socket = socket.socket(fileno=fd)
            self.socket.set_inheritable(False)
        self.listening = bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def close(self) -> None:
        """Let it go; what others have of it stays, and so does its name."""
        self.socket.close()
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def remove(self) -> None:
        """Remove its name, if it is still ours, so that nobody connects in vain; then close."""
        if self._place is not None:
            with contextlib.suppress(OSError):
                self._place.remove()
        self.close()


class _Place:
    """A socket of our own, and the name that it was given."""

    def __init__(self, path: str) -> None:
        folder, self._name = os.path.split(path)
        self._folder = _open_folder(folder or ".")
        self._inode = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(self._folder):
                self._refuse_occupied(path)
                self._listen()
        except BaseException:
            self.socket.close()
            self.close()
            raise

    def close(self) -> None:
        os.close(self._folder)
        if self._inode >= 0:
            os.close(self._inode)

    def remove(self) -> None:
        with _locked(self._folder, 0):
            # The inode cannot be another's: we have held it since.
            there = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            if os.path.samestat(os.fstat(self._inode), there):
                os.unlink(self._name, dir_fd=self._folder)

    def _open(self, name: str) -> int:
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=self._folder)

    def _refuse_occupied(self, path: str) -> None:
        """UsageError unless there is nothing, or a socket that nobody listens on any more."""
        try:
            occupant = self._open(self._name)
        except FileNotFoundError:
            return
        try:
            if not stat.S_ISSOCK(os.fstat(occupant).st_mode):
                raise UsageError(
                    f"--socket-path: {path} exists and is no socket; remove it or choose another"
                )
            if _is_served(occupant):
                raise UsageError(f"--socket-path: {path} is in use by another process")
        finally:
            os.close(occupant)

    def _listen(self) -> None:
        temporary = f".ninepd-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._folder)
        # Whoever may connect holds the export: nobody but our own user, unless told otherwise.
        umask = os.umask(0o177)
        try:
            self.socket.bind(f"{fd_path(self._folder)}/{temporary}")
        finally:
            os.umask(umask)
        try:
            self.socket.listen(_BACKLOG)
            self._inode = self._open(temporary)
            os.rename(temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError:
            os.unlink(temporary, dir_fd=self._folder)
            raise


def _open_folder(path: str) -> int:
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDONLY | flags)
    except PermissionError:
        return os.open(path, os.O_PATH | flags)  # names can be made in it, but it has no lock


def _is_served(occupant: int) -> bool:
    """Does somebody listen on this socket of the file system?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(fd_path(occupant))
        except BlockingIOError:  # its backlog is full
            return True
        except ConnectionRefusedError:
            return False
    return True


@contextlib.contextmanager
def _locked(folder: int, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    """One daemon at a time.

    Anybody who may read the folder can hold its lock: who does so for longer keeps out nobody.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK and time.monotonic() < deadline:
                time.sleep(_LOCK_PAUSE)
                continue
        break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)
