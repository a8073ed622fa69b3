"""Who is at fault, in three radii of failure, and the one road from an exception to an errno.

A bad request is an ``OSError`` and becomes an Rlerror. A bad ring is a ``RingBroken`` and stops
that device until the guest resets it. A bad control message is a ``Refused`` and is NACKed. Bad
options are a ``UsageError``: one line for the user, exit status 2.
"""

import errno
import os


class ProtocolError(OSError):
    """A 9P message that cannot be parsed; ``errno`` is what the guest is told."""

    def __init__(self, reason: str, code: int = errno.EINVAL) -> None:
        super().__init__(code, reason)


class RingBroken(Exception):
    """The guest or front end made a ring that cannot be served; the text says how."""


class Refused(Exception):
    """A vhost-user message that is answered with a NACK; the text says why."""


class FramingLost(Exception):
    """The vhost-user byte stream cannot be trusted any more: the connection must close."""


class UsageError(Exception):
    """A configuration that cannot work; the text is one sentence that says what to do."""


def to_errno(error: OSError) -> int:
    """The Linux errno for Rlerror: 1..4095 and never a kernel-internal restart code (512..530).

    Linux takes 0 for success and parses garbage (net/9p/client.c, p9_check_errors).
    """
    code = error.errno
    if code is None or not 0 < code < 512:
        return errno.EIO
    return code


def words_for(code: int) -> bytes:
    """An errno in words, as 9P2000 and 9P2000.u send it."""
    return os.strerror(code).encode()
