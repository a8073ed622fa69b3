"""A front end that is connected, and its device: messages in, replies out, on the loop thread."""

import asyncio
import logging
import socket
from collections.abc import Callable

from ninepd.config import Export
from ninepd.device import Device
from ninepd.errors import FramingLost
from ninepd.frontend import FrontEnd
from ninepd.ops.guest import Service

log = logging.getLogger(__name__)


class Connection:
    """Owns the connected socket and the device behind it."""

    def __init__(
        self,
        sock: socket.socket,
        export: Export,
        service: Service,
        loop: asyncio.AbstractEventLoop,
        left: Callable[[], None],
    ) -> None:
        """``left`` is called when the front end has gone by itself; all is closed then."""
        self._tag = export.tag
        self._loop = loop
        self._left = left
        self._device = Device(
            export.tag, export.config_space, service, export.poll_us, self._call_soon
        )
        self._front_end = FrontEnd(sock)
        self.spoke = False
        """Has a message arrived?"""
        self._loop.add_reader(self._front_end.fileno(), self.readable)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def readable(self) -> None:
        """Handle what has arrived."""
        try:
            for message in self._front_end.receive():
                self.spoke = True
                reply = self._device.handle(message)
                if reply is not None:
                    self._front_end.send(reply)
        except EOFError:
            log.info("%s: front end left", self._tag)
        except FramingLost as error:
            log.warning("%s: front end disconnected: %s", self._tag, error)
        except Exception:
            # A bug of ours: this device cannot go on, the others can.
            log.exception("%s: front end disconnected because of a bug", self._tag)
        else:
            return
        self.close()
        self._left()

    def close(self) -> None:
        """Part from the front end; answer what is in flight."""
        self._loop.remove_reader(self._front_end.fileno())
        self._front_end.close()
        self._device.close()
