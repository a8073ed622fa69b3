"""What the service manager is told (sd_notify(3))."""

import logging
import math
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


def notify(*assignments: str, wait: bool = False) -> None:
    """Send ``READY=1`` and the like, if a service manager started us.

    Without ``wait`` they are lost if it does not read: guests do not wait for it, nor does an end.
    """
    sock = connect()
    if sock is None:
        return
    try:
        message = "\n".join(assignments).encode(errors="surrogateescape")
        sock.send(message, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    except OSError as error:
        log.warning("systemd could not be notified: %s", error)


def status(what: str, front_ends: int) -> str:
    """The line that ``systemctl status`` shows, as an assignment."""
    plural = "" if front_ends == 1 else "s"
    return f"STATUS=Serving {what}: {front_ends} front end{plural} connected"


def watchdog_seconds() -> float:
    """How often to send WATCHDOG=1: twice in the time that the manager waits; infinity: never.

    Another process that has inherited the variables is not the one that is meant
    (sd_watchdog_enabled(3)).
    """
    microseconds, pid = (os.environ.get(f"WATCHDOG_{name}", "") for name in ("USEC", "PID"))
    seconds = int(microseconds) / 2e6 if microseconds.isdecimal() else 0
    return seconds if seconds and pid in {"", str(os.getpid())} else math.inf


def leave() -> None:
    """This process is not the service's main one: it has nothing to tell."""
    os.environ.pop(_SOCKET, None)
    sock = connect()  # of whom we come from
    connect.cache_clear()
    if sock is not None:
        sock.close()
