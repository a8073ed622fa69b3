"""QEMU's monitor: one command at a time, over a connected socket."""

import json
import socket
import threading
from typing import Any

from .errors import GuestError

LIMIT = 30.0  # seconds for an answer


class Qmp:
    def __init__(self, line: socket.socket) -> None:
        line.settimeout(LIMIT)
        self._line = line
        self._file = line.makefile("rb")
        self._lock = threading.Lock()
        self._ready = False

    def command(self, name: str, **arguments: object) -> Any:
        """What QEMU returns; names with a dash are written with an underscore."""
        with self._lock:
            if not self._ready:
                self._read()  # the greeting
                self._execute("qmp_capabilities", {})
                self._ready = True
            return self._execute(name, {k.replace("_", "-"): v for k, v in arguments.items()})

    def _execute(self, name: str, arguments: dict[str, object]) -> Any:
        try:
            self._line.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        except OSError as error:
            raise GuestError(f"QEMU is gone: {name} cannot be sent") from error
        while True:
            message = self._read()
            if "error" in message:
                raise GuestError(f"QEMU refuses {name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def _read(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except OSError as error:
            raise GuestError(f"QEMU's monitor did not answer within {LIMIT:.0f} s") from error
        if not line:
            raise GuestError("QEMU has ended: its monitor does not answer any more")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._file.close()
        self._line.close()
