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
        self.telling, self._following = socket.socketpair(type=socket.SOCK_SEQPACKET)
        for end in (self.answering, self._asking, self.telling, self._following):
            end.setblocking(False)

    def close(self) -> None:
        """They are about another process than this."""
        self.stats.close()
        os.close(self._fd)
        for end in (self.answering, self._asking, self.telling, self._following):
            end.close()

    def serve(self) -> None:
        """This is the process of the export."""
        os.close(self._fd)
        self._asking.close()
        self._following.close()

    def watch(self) -> tuple[Reader, socket.socket, socket.socket]:
        """This process watches: it can read, ask, and follow messages."""
        self.stats.close()
        self.answering.close()
        self.telling.close()
        seen = reader(self._fd)
        os.close(self._fd)
        return seen, self._asking, self._following
