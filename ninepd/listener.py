"""Listening sockets: made at a path of the file system, or handed over by whoever started us."""

import contextlib
import errno
import os
import socket
import stat
from typing import Final

from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.syscalls import fd_path

_BACKLOG: Final = 4


class Listener:
    """The socket of an export."""

    def __init__(self, export: Export) -> None:
        """It listens, or is connected already if the export's descriptor is; or UsageError."""
        self._bound_path: str | None = None
        self.socket = self._open(export)
        self.listening = bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def _open(self, export: Export) -> socket.socket:
        path, fd = export.socket_path, export.fd
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

    def close(self) -> None:
        """Listen no more, and remove the socket if it is ours."""
        self.socket.close()
        if self._bound_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._bound_path)


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
        sock.bind(f"{fd_path(folder_fd)}/{temporary}")
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
