"""The journal's end of its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/)."""

import socket
import threading
from pathlib import Path


def fields_of(datagram: bytes) -> dict[str, str]:
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(datagram[:8], "little")
            value, end, datagram = (
                datagram[8:][:size],
                datagram[8 + size :][:1],
                datagram[9 + size :],
            )
            assert end == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class FakeJournal:
    """Reads what arrives on a socket of its own, as fast as it comes."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._entries: list[dict[str, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while datagram := self._socket.recv(1 << 20):
            self._entries.append(fields_of(datagram))

    def entries(self) -> list[dict[str, str]]:
        """All that came, once nobody sends any more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(self._path)
            sock.send(b"")
        self._reader.join()
        return self._entries

    def close(self) -> None:
        if self._reader.is_alive():
            self.entries()
        self._socket.close()
