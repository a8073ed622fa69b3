"""A process that removes the name of a socket for one that cannot reach it any more.

Who is shut in has no folder of the host's left, and must not have: with the folder of its socket
it could remove, or exchange, whatever else lies there. So a process is forked before, which has
that folder and nothing else. It sleeps until it is told, or until the other has gone, however it
went, and ends.
"""

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Collection
from typing import Final, NoReturn

from ninepd import walls
from ninepd.capabilities import REACHING, give_up
from ninepd.errors import UsageError
from ninepd.process import close_inherited, hold_standard_descriptors, name_process

log = logging.getLogger(__name__)

_WAIT_SECONDS: Final = 2.0


class Remover:
    """Made before there are threads, and before this process is shut in."""

    def __init__(self, name: str, remove: Callable[[], None], descriptors: Collection[int]) -> None:
        """``remove`` needs these descriptors only; ``name`` is what ps(1) shows."""
        self._word, its = socket.socketpair()
        if not os.fork():
            self._serve(name, its, remove, descriptors)
        its.close()

    def remove(self) -> None:
        """Returns when it is done, or when the process for it has died, or does not answer."""
        self._word.settimeout(_WAIT_SECONDS)
        try:
            self._word.send(b"\0", socket.MSG_NOSIGNAL)
            self._word.recv(1)
        except OSError as error:
            log.warning(
                "the socket stays where it is, for the process for that has gone: %s", error
            )
        finally:
            self._word.close()

    @staticmethod
    def _serve(
        name: str, word: socket.socket, remove: Callable[[], None], descriptors: Collection[int]
    ) -> NoReturn:
        status = 1
        try:
            # They are sent to whole groups of processes; this one ends when the other has.
            signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            name_process(name)
            close_inherited({word.fileno(), *descriptors})
            hold_standard_descriptors()
            with contextlib.suppress(UsageError):  # the other says so itself, and ends
                give_up(REACHING)
            if walls.can_filter_calls():
                walls.filter_calls()
            word.recv(1)
            with contextlib.suppress(OSError):  # the name has gone, or somebody has taken its place
                remove()
            status = 0
        except BaseException:
            log.exception("a bug kept a socket from being removed")
        finally:
            os._exit(status)
