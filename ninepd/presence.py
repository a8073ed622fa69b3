"""Whether a process serves, and has a front end, told to the supervisor by bytes through a pipe.

The supervisor has no loop: SIGIO tells it that something is there (O_ASYNC in fcntl(2)). Each
export has a pipe of its own, so that its process can say what is wrong about itself only.
"""

import contextlib
import fcntl
import os


class Presence:
    """The pipe of one export, for all its processes; made by the supervisor, who blocks SIGIO."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._reading, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._reading, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        self._connected = False
        self.serving = False
        """Has the process ever said something? Or has it ended, and the next one may, too."""

    def tell(self, connected: bool) -> None:
        """It serves now; or a front end has come, or left. Whether somebody looks or not."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._writing, bytes([connected]))

    def look(self) -> bool:
        """Has the process a front end, as far as it has said?"""
        with contextlib.suppress(BlockingIOError):
            # Once: whoever writes all the time shall not be waited for.
            self._connected = bool(os.read(self._reading, 1 << 16)[-1])
            self.serving = True
        return self._connected

    def reset(self) -> None:
        """The process has ended, whatever it has said."""
        self.look()
        self._connected = False
        self.serving = True

    def close(self) -> None:
        """It is about another process than this."""
        os.close(self._reading)
        os.close(self._writing)
