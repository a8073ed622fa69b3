"""What joins an export's process, the supervisor and whoever watches; made before they fork."""

import os
import socket

from ninepd.stats import Reader, Stats, reader, shared


class Links:
    """Of one export, for all its processes. Each process closes the ends that are not its own."""

    def __init__(self) -> None:
        self.stats: Stats
        self.stats, self._fd = shared()
        self.answering, self._asking = socket.socketpair()
        for end in (self.answering, self._asking):
            end.setblocking(False)

    def close(self) -> None:
        """They are about another process than this."""
        self.stats.close()
        os.close(self._fd)
        self.answering.close()
        self._asking.close()

    def serve(self) -> None:
        """This is the process of the export."""
        os.close(self._fd)
        self._asking.close()

    def watch(self) -> tuple[Reader, socket.socket]:
        """This process watches: it can read, and ask."""
        self.stats.close()
        self.answering.close()
        seen = reader(self._fd)
        os.close(self._fd)
        return seen, self._asking
