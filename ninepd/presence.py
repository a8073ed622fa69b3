"""What a process tells the supervisor, by bytes through a pipe.

The supervisor has no loop: SIGIO tells it that something is there (O_ASYNC in fcntl(2)). Each
process has a pipe of its own, so that it can speak for itself only.
"""

import contextlib
import fcntl
import os


class _Pipe:
    """For all processes that take one another's place; made by the supervisor, who blocks SIGIO."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._reading, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._reading, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)

    def _say(self, byte: int) -> None:
        """Whether somebody looks or not."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._writing, bytes([byte]))

    def _heard(self) -> bytes:
        """What was said. Once: whoever speaks all the time shall not be waited for."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self._reading, 1 << 16)
        return b""

    def close(self) -> None:
        """It is another process's."""
        os.close(self._reading)
        os.close(self._writing)


class Presence(_Pipe):
    """Whether the process of an export serves, and has a front end."""

    def __init__(self) -> None:
        super().__init__()
        self._connected = False
        self.serving = False
        """Has the process ever said something? Or has it ended, and the next one may, too."""

    def tell(self, connected: bool) -> None:
        """It serves now; or a front end has come, or left."""
        self._say(connected)

    def look(self) -> bool:
        """Has the process a front end, as far as it has said?"""
        heard = self._heard()
        if heard:
            self._connected = bool(heard[-1])
            self.serving = True
        return self._connected

    def reset(self) -> None:
        """The process has ended, whatever it has said."""
        self.look()
        self._connected = False
        self.serving = True


class Bell(_Pipe):
    """Rung to have something done; how often does not matter."""

    def ring(self) -> None:
        self._say(1)

    def rung(self) -> bool:
        """Since the last look?"""
        return bool(self._heard())
