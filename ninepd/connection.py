"""A front end that is connected, and its device: messages in, replies out, on the loop thread.

A message that has to wait for the ring stops the reading: the others of this connection wait behind
it, in order. Only that the front end has gone is seen meanwhile.
"""

import asyncio
import functools
import logging
import select
import socket
from collections.abc import Callable, Iterator

from ninepd.config import Export
from ninepd.device import Device
from ninepd.errors import FramingLost
from ninepd.frontend import FrontEnd
from ninepd.ops.guest import Service
from ninepd.vhostuser.messages import Message

log = logging.getLogger(__name__)


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From any thread: have the loop thread call it.

    A thread may come back from slow storage when the loop has ended, with all that it served.
    """
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise


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
        """``left`` is called when the front end has gone by itself; all is being closed then."""
        self._tag = export.tag
        self._loop = loop
        self._left = left
        self._device = Device(
            export.tag, export.config_space, service, export.poll_us, self._call_soon
        )
        self._front_end = FrontEnd(sock)
        self._messages: Iterator[Message] = iter(())
        self._waits = False
        """Is a message with the device, and not answered yet?"""
        self._hangup: select.epoll | None = None
        """Tells that the front end has gone, while it is not read from."""
        self._open = True
        self.spoke = False
        """Has a message arrived?"""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when the device has let everything go."""
        loop.add_reader(self._front_end.fileno(), self.readable)

    def _call_soon(self, call: Callable[[], None]) -> None:
        call_soon(self._loop, functools.partial(self._guarded, call))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._part(error)

    def readable(self) -> None:
        """Handle what has arrived, up to a message that has to wait."""
        if self._hangup is not None:
            if self._hangup.poll(0):
                self._part(EOFError())
        elif not self._waits and self._open:
            self._messages = self._front_end.receive()
            self._guarded(self._handle_messages)

    def _handle_messages(self) -> None:
        for message in self._messages:
            self.spoke = True
            self._waits = True
            self._device.handle(message, self._answer)
            if self._waits:
                self._stop_reading()
                return

    def _answer(self, reply: bytes | None) -> None:
        self._waits = False
        if not self._open:
            return
        if reply is not None:
            self._front_end.send(reply)
        if self._hangup is not None:
            self._go_on_reading()

    def _stop_reading(self) -> None:
        self._loop.remove_reader(self._front_end.fileno())
        self._hangup = select.epoll(1)
        self._hangup.register(self._front_end.fileno(), select.EPOLLRDHUP)
        self._loop.add_reader(self._hangup.fileno(), self._part, EOFError())

    def _go_on_reading(self) -> None:
        """The message that waited is answered, and its turn ends with the next step."""
        self._forget_hangup()
        self._loop.add_reader(self._front_end.fileno(), self.readable)
        self._loop.call_soon(self._guarded, self._go_on)

    def _go_on(self) -> None:
        if not self._waits and self._open:
            self._handle_messages()

    def _forget_hangup(self) -> None:
        hangup, self._hangup = self._hangup, None
        if hangup is not None:
            self._loop.remove_reader(hangup.fileno())
            hangup.close()

    def _part(self, error: Exception) -> None:
        """The front end has gone, or must go."""
        if not self._open:
            log.error("%s: a bug while a front end was parted from", self._tag, exc_info=error)
            return
        if isinstance(error, EOFError):
            log.info("%s: front end left", self._tag)
        elif isinstance(error, FramingLost):
            log.warning("%s: front end disconnected: %s", self._tag, error)
        else:
            # A bug of ours: this device cannot go on, the others can.
            log.error("%s: front end disconnected because of a bug", self._tag, exc_info=error)
        self._close(answer=False)
        self._left()

    def close(self) -> None:
        """Part from the front end; ``closed`` tells when the ring rests and all is let go."""
        self._close(answer=True)

    def _close(self, answer: bool) -> None:
        if not self._open:
            return
        self._open = False
        self._forget_hangup()
        self._loop.remove_reader(self._front_end.fileno())
        self._messages = iter(())  # closes the descriptors of the message at hand
        self._front_end.close()
        self._device.close(answer, lambda: self.closed.set_result(None))
