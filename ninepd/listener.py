"""Listening sockets: made at a path of the file system, or handed over by whoever started us.

Of several daemons that want one path one gets it. Whoever looks at a path to take its place, or
to remove what is there, holds a lock on the folder meanwhile (flock(2): nothing is left behind, and
systemd-tmpfiles(8) respects it). A new socket is made in a private folder beside its path. When it
gets its name it has its group and mode, so that nobody else can have connected before, and listens
already, for those who wait for the path to appear.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from ninepd.activation import is_usable
from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.remover import Remover
from ninepd.syscalls import fd_path

_BACKLOG: Final = 4
_LOCK_SECONDS: Final = 5.0
_LOCK_PAUSE: Final = 0.01
_UNNAMED: Final = "ninepd"
"""The name of a socket that has not got its own yet, in a folder for it alone."""
_ACL: Final = "system.posix_acl_access"


class Door(NamedTuple):
    """A socket that shall have a name."""

    option: str
    """That says so, for errors."""
    path: str
    mode: int
    gid: int | None = None
    group: str | None = None
    """What the user calls that."""


class Listener:
    """The socket of an export; its descriptor is inherited by the process that serves it."""

    def __init__(self, export: Export) -> None:
        """It listens, or is connected already if the export's descriptor is; or UsageError."""
        self._place: Place | None = None
        self._remover: Remover | None = None
        path, fd = export.socket_path, export.fd
        if path is not None:
            self._place = Place(_door(path, export))
            self.socket = self._place.socket
        else:
            self.socket = socket.socket(fileno=fd)
            self.socket.set_inheritable(False)
        self.listening = bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._where = path or _bound(self.socket) or f"descriptor {fd}"

    def __str__(self) -> str:
        return self._where

    def let_in(self, export: Export) -> None:
        """Whoever may connect by the options of this export; UsageError: all stays as it was."""
        if self._place is not None:
            try:
                self._place.let_in(_door(self._where, export))
            except OSError as error:
                raise UsageError(f"--socket-mode: {self}: {error.strerror}") from None

    def close(self) -> None:
        """Let it go; what others have of it stays, and so does its name."""
        self.socket.close()
        self.forget_name()

    def forget_name(self) -> None:
        """It is another process's to remove."""
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def entrust_name(self, tag: str) -> None:
        """It will be out of reach for this process, but not for one that is made now."""
        if self._place is not None:
            name = f"{tag} (socket)"
            self._remover = Remover(name, self._place.remove, self._place.descriptors)
            self.forget_name()

    def remove(self) -> None:
        """Remove its name, if it is still ours, so that nobody connects in vain; then close."""
        if self._remover is not None:
            self._remover.remove()
        elif self._place is not None:
            with contextlib.suppress(OSError):
                self._place.remove()
        self.close()


def check_descriptor(fd: int) -> None:
    """UsageError unless that is a socket to serve; before we open any that has its number."""
    try:
        usable = is_usable(fd)
    except (OSError, OverflowError):
        raise UsageError(f"--fd: descriptor {fd} is not open") from None
    if not usable:
        raise UsageError(f"--fd: descriptor {fd} is no unix socket that listens or is connected")


class Place:
    """A socket of our own, which listens, and the name that it was given."""

    def __init__(self, door: Door) -> None:
        """UsageError if it cannot be had."""
        try:
            self._make(door)
        except OSError as error:
            raise UsageError(f"--{door.option}: {door.path}: {error.strerror}") from None

    def _make(self, door: Door) -> None:
        folder, self._name = os.path.split(door.path)
        self._folder = _open_folder(folder or ".")
        self._inode = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(self._folder):
                self._refuse_occupied(door)
                self._listen(door)
        except BaseException:
            self.socket.close()
            self.close()
            raise

    @property
    def descriptors(self) -> tuple[int, int]:
        """All that removing it takes."""
        return self._folder, self._inode

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

    def let_in(self, door: Door) -> None:
        """Whoever may connect holds what is there: our own user alone, unless told otherwise."""
        inode = fd_path(self._inode)
        with contextlib.suppress(OSError):  # with a list of the folder the mode means more people
            os.removexattr(inode, _ACL)
        if door.gid is not None:
            try:
                os.chown(inode, -1, door.gid)
            except OSError as error:
                raise UsageError(
                    f"--socket-group: this user may not give a socket to {door.group} "
                    f"({error.strerror}); choose a group of its own, or run ninepd as root"
                ) from None
        os.chmod(inode, door.mode)

    def _refuse_occupied(self, door: Door) -> None:
        """UsageError unless there is nothing, or a socket that nobody listens on any more."""
        try:
            occupant = _hold(self._name, self._folder)
        except FileNotFoundError:
            return
        try:
            if not stat.S_ISSOCK(os.fstat(occupant).st_mode):
                raise UsageError(
                    f"--{door.option}: {door.path} exists and is no socket; remove it or choose "
                    "another"
                )
            if _is_served(occupant):
                raise UsageError(f"--{door.option}: {door.path} is in use by another process")
        finally:
            os.close(occupant)

    def _listen(self, door: Door) -> None:
        with _private_folder(self._folder) as private:
            self.socket.bind(f"{fd_path(private)}/{_UNNAMED}")
            try:
                self._inode = _hold(_UNNAMED, private)
                self.let_in(door)
                self.socket.listen(_BACKLOG)
                os.rename(_UNNAMED, self._name, src_dir_fd=private, dst_dir_fd=self._folder)
            except BaseException:
                os.unlink(_UNNAMED, dir_fd=private)
                raise


def _door(path: str, export: Export) -> Door:
    mode, gid = export.socket_permissions, export.socket_gid
    return Door("socket-path", path, mode, gid, export.socket_group)


def _bound(sock: socket.socket) -> str:
    """The path of a socket that somebody else has made, if it has one."""
    name = sock.getsockname()
    return name if isinstance(name, str) else ""


def _hold(name: str, folder: int) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


@contextlib.contextmanager
def _private_folder(parent: int) -> Iterator[int]:
    """For a moment: a folder in which nobody else can reach, or exchange, what is made in it."""
    name = f".ninepd-{os.urandom(8).hex()}"
    umask = os.umask(0)  # it may be too narrow for a folder
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    finally:
        os.umask(umask)
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(name, flags, dir_fd=parent)
        try:
            found = os.fstat(folder)
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise PermissionError(errno.EPERM, "somebody exchanges what is made in its folder")
            yield folder
        finally:
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):  # whoever owns the parent may have moved it
            os.rmdir(name, dir_fd=parent)


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
