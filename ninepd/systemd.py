"""What the service manager is told (sd_notify(3))."""

import logging
import os
import socket
from functools import cache
from typing import Final

log = logging.getLogger(__name__)

_SOCKET: Final = "NOTIFY_SOCKET"


@cache
def connect() -> socket.socket | None:
    """The manager's socket, if one started us; once, as long as it can be reached by its name."""
    address = os.environ.get(_SOCKET)
    if not address:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        log.warning("systemd could not be reached: %s", error)
        sock.close()
        return None
    return sock


def notify(*assignments: str) -> None:
    """Send ``READY=1`` and the like, if a service manager started us."""
    sock = connect()
    if sock is None:
        return
    try:
        sock.send("\n".join(assignments).encode(errors="surrogateescape"))
    except OSError as error:
        log.warning("systemd could not be notified: %s", error)


def leave() -> None:
    """This process is not the service's main one: it has nothing to tell."""
    os.environ.pop(_SOCKET, None)
    sock = connect()  # of whom we come from
    connect.cache_clear()
    if sock is not None:
        sock.close()
