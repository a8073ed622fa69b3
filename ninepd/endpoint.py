"""Where metrics are offered: an address of this computer's own, or a unix socket."""

import ipaddress
import re
from typing import Final, NamedTuple

from ninepd.errors import UsageError

_UNIX: Final = "unix:"
_TCP: Final = re.compile(r"\[?([0-9a-fA-F.:]+)\]?:([0-9]{1,5})", re.ASCII)


class Endpoint(NamedTuple):
    """A ``path``, or else a host and a port."""

    path: str | None
    host: str = ""
    port: int = 0


def parse_endpoint(option: str, text: str) -> Endpoint:
    """``ADDR:PORT`` or ``unix:PATH``; UsageError for what others could reach, too."""
    if text.startswith(_UNIX):
        return Endpoint(text.removeprefix(_UNIX))
    found = _TCP.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        host, port = ipaddress.ip_address(found[1]), int(found[2])
    except ValueError:
        raise UsageError(
            f"--{option}: {text!r} is neither ADDR:PORT, such as 127.0.0.1:9564, nor unix:PATH"
        ) from None
    if not 0 < port < 1 << 16:
        raise UsageError(f"--{option}: {port} is not between 1 and 65535")
    if not host.is_loopback:
        raise UsageError(
            f"--{option}: {host} can be reached from other computers, and anybody who reaches it "
            "could read; use 127.0.0.1 or [::1], with a proxy that asks who it is"
        )
    return Endpoint(None, str(host), port)
