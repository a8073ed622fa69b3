"""The 9P codecs and what holds a session's numbers: bytes in, a message or a ProtocolError out.

The first byte of an input chooses what is tried, see ``PARTS``.
"""

import errno
from collections.abc import Callable
from random import Random
from typing import Final

from ninepd.errors import ProtocolError, words_for
from ninepd.framing import is_sound, refusal
from ninepd.ops.table import ROWS
from ninepd.p9.fids import FidTable
from ninepd.p9.messages import (
    CODEC_OF,
    CODECS,
    HEADER,
    HEADER_SIZE,
    WITH_DATA,
    Tversion,
    decode,
    encode,
)
from ninepd.p9.session import Dialect, Session
from ninepd.p9.stat import decode_stat, encode_stat

from . import grammar

Mutate = Callable[[bytes, int], bytes]

_DATA_MAX: Final = 1 << 16
_REFUSALS: Final = {errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENAMETOOLONG}


def whole_message(data: bytes) -> None:
    """What was decoded is encoded to bytes that decode to it."""
    try:
        tag, message = decode(data)
    except ProtocolError as error:
        assert error.errno in {errno.EINVAL, errno.EOPNOTSUPP}
        return
    count = message.nbytes if type(message) in WITH_DATA else 0
    if count > _DATA_MAX:
        return
    again = encode(tag, message) + bytes(count)
    assert decode(again) == (tag, message)
    assert str(message)


def served_message(data: bytes) -> None:
    """As the pipeline does: checked, then decoded from what was copied of it."""
    if len(data) < HEADER_SIZE + 9:
        return
    msize = int.from_bytes(data[0:4], "little")
    readable, writable = int.from_bytes(data[4:7], "little"), int.from_bytes(data[7:9], "little")
    buffer = data[9:]
    size, number, _ = HEADER.unpack_from(buffer)
    for dialect in Dialect:
        row = ROWS[dialect].get(number)
        if row is None or not is_sound(row, msize, readable, writable, len(buffer), size):
            reason = refusal(row, msize, readable, writable, 0, size, number)
            assert reason.errno in _REFUSALS
            continue
        try:
            message = row.codec.decode(memoryview(buffer), HEADER_SIZE, min(size, len(buffer)))
        except ProtocolError as error:
            assert error.errno == errno.EINVAL
        else:
            assert type(message) is row.message


def cut_message(data: bytes) -> None:
    """Any piece of memory as the body of any message."""
    if len(data) < 4:
        return
    codec = CODECS.get(data[0])
    if codec is None:
        return
    start, end = data[1] % len(data), data[2] % len(data)
    try:
        message = codec.decode(data, start, max(start, end))
    except ProtocolError:
        return
    body = CODEC_OF[type(message)].encode(message)
    assert codec.decode(body, 0, len(body)) == message


def stat_structure(data: bytes) -> None:
    for extended in (False, True):
        try:
            stat = decode_stat(data, extended)
        except ProtocolError as error:
            assert error.errno == errno.EINVAL
            continue
        assert decode_stat(encode_stat(stat, extended), extended) == stat


def negotiation(data: bytes) -> None:
    session: Session[bytes] = Session(words_for, 1)
    msize_max, request = 1 << 20, Tversion(int.from_bytes(data[:4], "little"), data[4:])
    try:
        reply = session.negotiate(request, msize_max)
    except OSError as error:
        assert error.errno == errno.EMSGSIZE
        assert session.msize == 0
        return
    assert reply.msize <= min(request.msize, msize_max)
    assert session.msize == (0 if reply.version == b"unknown" else reply.msize)
    encode(0, session.error(data[0]))


def fid_numbers(data: bytes) -> None:
    """The table of fids beside a dictionary."""
    table: FidTable[int] = FidTable()
    model: dict[int, int] = {}
    for at in range(0, len(data) - 4, 5):
        number = int.from_bytes(data[at + 1 : at + 5], "little") >> data[at] // 8
        match data[at] % 8:
            case 0 | 1 | 2 | 3:
                if number not in model:
                    table.add(number, at)
                    model[number] = at
            case 4 | 5:
                assert table.pop(number) == model.pop(number, None)
            case 6:
                assert table.items() == sorted(model.items())
            case _:
                taken = table.take(number % 16)
                assert len(taken) == min(number % 16, len(model))
                model = {key: value for key, value in model.items() if value not in taken}
        assert table.get(number) == model.get(number)
        assert len(table) == len(model)


PARTS: Final[tuple[Callable[[bytes], None], ...]] = (
    whole_message,
    served_message,
    cut_message,
    stat_structure,
    negotiation,
    fid_numbers,
)


def one_input(data: bytes) -> None:
    if data:
        PARTS[data[0] % len(PARTS)](data[1:])


def mutator(data: bytes, max_size: int, seed: int, mutate: Mutate) -> bytes:
    """By fields where there is a message; else ``mutate``, which knows nothing of it."""
    rng = Random(seed)
    prefix = {0: 1, 1: 10}.get(data[0] % len(PARTS)) if data else None
    if prefix is None or not rng.randrange(4):
        return mutate(data, max_size)
    changed = grammar.mutated(rng, data[prefix:])
    return (data[:prefix].ljust(prefix, b"\xff") + changed)[:max_size]
