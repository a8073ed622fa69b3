"""Sockets that whoever started us has made: systemd's socket activation (sd_listen_fds(3)).

Each is for the export whose tag is its name (FileDescriptorName= in systemd.socket(5)). Where there
is one socket and one export they belong together without a name.
"""

import os
import socket
import stat
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from ninepd.errors import UsageError

_FIRST: Final = 3
"""SD_LISTEN_FDS_START."""
_UNNAMED: Final = "unknown"
"""What sd_listen_fds_with_names(3) calls a socket without a name."""


class Activated(NamedTuple):
    """A socket of systemd's."""

    name: str
    fd: int


def take_activated() -> tuple[Activated, ...]:
    """The sockets that are meant for this process, once: the environment forgets them."""
    pid, count, names = (
        os.environ.pop(name, None) for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if count is None or pid != str(os.getpid()):
        return ()
    if not (count.isascii() and count.isdecimal()):
        raise UsageError(f"LISTEN_FDS: {count!r} is no number of sockets")
    found = None if names is None else names.split(":")
    if found is not None and len(found) != int(count):
        raise UsageError(f"LISTEN_FDNAMES: {len(found)} names for {count} sockets")
    sockets = []
    for number in range(int(count)):
        name, fd = _UNNAMED if found is None else found[number], _FIRST + number
        try:
            usable = is_usable(fd)
        except OSError:
            usable = False
        if not usable:
            raise UsageError(
                f"LISTEN_FDS: descriptor {fd}, {name!r}, is no unix socket that listens or is "
                "connected; ListenStream= with a path makes one"
            )
        sockets.append(Activated(name, fd))
    return tuple(sockets)


def choose_activated(sockets: Sequence[Activated], tag: str, alone: bool) -> int | None:
    """The descriptor for the export of this tag, which may be the only one; None if none is there.

    UsageError if there are some, and not one for it.
    """
    if not sockets:
        return None
    if alone and len(sockets) == 1:
        return sockets[0].fd
    fitting = [fd for name, fd in sockets if name == tag]
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        f"--tag: systemd has {len(fitting) or 'no'} sockets named {tag!r}; give one of them "
        f"FileDescriptorName={tag}, or this export a socket-path"
    )


def refuse_unused(sockets: Sequence[Activated], used: Collection[int | None]) -> None:
    """UsageError if nobody would ever accept on one of them, and who connects wait in vain."""
    for name, fd in sockets:
        if fd not in used:
            raise UsageError(
                f"LISTEN_FDNAMES: no export takes the socket {name!r} of systemd's; the one that "
                "shall has this tag, and neither socket-path nor fd"
            )


def is_usable(fd: int) -> bool:
    """Is this descriptor a unix socket that listens, or is connected? OSError: it is not open."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            return False
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return True
        try:
            sock.getpeername()
        except OSError:
            return False
        return True
