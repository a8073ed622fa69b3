"""What a request must be before it is decoded: whole, expected, and with room for its reply."""

import errno

from ninepd.errors import ProtocolError
from ninepd.ops.table import Row
from ninepd.p9.messages import HEADER_SIZE, Tversion


def is_sound(row: Row, msize: int, readable: int, writable: int, copied: int, size: int) -> bool:
    """May a request be decoded? If not, ``refusal`` says why. ``msize`` is 0 before a Tversion.

    Its chain has ``readable`` and ``writable`` bytes, ``copied`` of which are in the header; what
    the message says of itself is ``size``.
    """
    return (
        HEADER_SIZE <= size <= readable
        and (size <= msize or (not msize and row.message is Tversion))
        and writable >= row.reply_size
        and (copied >= size or row.header_limit != 0)
    )


def refusal(
    row: Row | None, msize: int, readable: int, writable: int, fault: int, size: int, number: int
) -> ProtocolError:
    """Why a request, of type ``number``, is not served. ``fault`` is what C found, or 0."""
    if fault:
        return ProtocolError("a buffer lies outside guest memory", fault)
    if not HEADER_SIZE <= size <= readable:
        return ProtocolError(f"the size field says {size}, {readable} bytes came")
    if msize and size > msize:
        return ProtocolError(f"{size} bytes are more than msize", errno.EMSGSIZE)
    if row is None:
        return ProtocolError(f"message type {number} is not served", errno.EOPNOTSUPP)
    if writable < row.reply_size:
        return ProtocolError("the reply does not fit", errno.EMSGSIZE)
    if not msize and row.message is not Tversion:
        return ProtocolError("no Tversion came before")
    return ProtocolError("the message is too long", errno.ENAMETOOLONG)
