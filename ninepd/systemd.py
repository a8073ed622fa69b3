"""What the service manager is told (sd_notify(3))."""

import logging
import os
import socket
from typing import Final

log = logging.getLogger(__name__)

_SOCKET: Final = "NOTIFY_SOCKET"


def notify(*assignments: str) -> None:
    """Send ``READY=1`` and the like, if a service manager started us."""
    address = os.environ.get(_SOCKET)
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send("\n".join(assignments).encode(errors="surrogateescape"))
        except OSError as error:
            log.warning("systemd could not be notified: %s", error)


def leave() -> None:
    """This process is not the service's main one: it has nothing to tell."""
    os.environ.pop(_SOCKET, None)
