"""Checks each reply that tests get: it says no more than was asked for, and is well formed.

Clients trust these numbers: Linux took counts of Rread and Rwrite as they came (CVE-2025-37879).
"""

from typing import Any

from ninepd.p9.messages import (
    Rread,
    Rreaddir,
    Rreadlink,
    Rversion,
    Rwalk,
    Rwrite,
)

_FIXED = 24
"""Bytes of a directory entry beside its name."""


def check_reply(message: Any, reply: Any, data: bytes) -> None:
    """``data`` is what follows a reply that announces data."""
    match reply:
        case Rread(count) | Rreaddir(count):
            assert len(data) == count <= message.nbytes, (message, reply)
            if isinstance(reply, Rreaddir):
                _check_entries(data)
        case Rwrite(count):
            assert count <= message.nbytes, (message, reply)
        case Rwalk(qids):
            assert len(qids) <= len(message.names), (message, reply)
        case Rreadlink(target):
            assert target, message
            assert 0 not in target, (message, reply)
        case Rversion(msize, _):
            assert msize <= message.msize, (message, reply)


def _check_entries(data: bytes) -> None:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at + 22 : at + 24], "little")
        name = data[at + _FIXED : at + _FIXED + size]
        assert 0 < len(name) == size, "half an entry"
        assert not set(name) & set(b"\0/"), name
        at += _FIXED + size
