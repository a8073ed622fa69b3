"""The sockets of the control tree and of the metrics; the supervisor keeps them.

A process that is started again goes on with the same ones, and they have names as long as the
supervisor lives.
"""

import contextlib
import os
import socket
from typing import Final

from ninepd.config import Config
from ninepd.endpoint import Endpoint
from ninepd.errors import UsageError
from ninepd.listener import Door, Place

_OWN: Final = 0o600
_BACKLOG: Final = 16


class Doors:
    """Those that were asked for."""

    def __init__(self, config: Config) -> None:
        """They listen; or UsageError."""
        self._places: list[Place] = []
        self.control: socket.socket | None = None
        self.metrics: socket.socket | None = None
        try:
            if config.control_path is not None:
                self.control = self._named("control-path", config.control_path)
            endpoint = config.metrics_endpoint
            if endpoint is not None:
                self.metrics = (
                    _listening(endpoint)
                    if endpoint.path is None
                    else self._named("metrics-listen", endpoint.path)
                )
        except BaseException:
            self.remove()
            raise

    def _named(self, option: str, path: str) -> socket.socket:
        place = Place(Door(option, path, _OWN))
        self._places.append(place)
        return place.socket

    def close(self) -> None:
        """Another process has them, and their names."""
        for sock in (self.control, self.metrics):
            if sock is not None:
                sock.close()
        for place in self._places:
            place.close()
        self._places.clear()

    def remove(self) -> None:
        """Nobody shall connect any more."""
        for place in self._places:
            with contextlib.suppress(OSError):
                place.remove()
        self.close()


def _listening(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((endpoint.host, endpoint.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        words = os.strerror(error.errno or 0)
        raise UsageError(f"--metrics-listen: {endpoint.host}:{endpoint.port}: {words}") from None
    return sock
