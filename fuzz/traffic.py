"""What a guest sends: requests and the moments at which it kicks, as they are kept in files.

A file is a run of records: length[4] room[4], then so many bytes of a 9P message, whatever they
say of themselves; ``room`` is what the guest leaves for the reply. A record of no bytes is no
request: the guest kicks, or with room resets its device.
"""

from collections.abc import Sequence
from random import Random
from struct import Struct
from typing import Final, NamedTuple

from ninepd.errors import ProtocolError
from ninepd.p9.messages import (
    CODEC_OF,
    HEADER_SIZE,
    IO_HEADER,
    NUMBERS,
    RLERROR_SIZE,
    Rerror,
    Rlerror,
    Tflush,
    Tversion,
    decode,
)

from . import grammar

_HEAD: Final = Struct("<II")
RAW_MAX: Final = 8192
ROOM_MAX: Final = 1 << 16
RECORDS_MAX: Final = 400
_RERROR_MIN: Final = HEADER_SIZE + CODEC_OF[Rerror].size


class Record(NamedTuple):
    """A request and the room for its reply, or without bytes something else that a guest does."""

    raw: bytes
    room: int = 4096

    @property
    def is_request(self) -> bool:
        return bool(self.raw)

    @property
    def tag(self) -> int:
        return int.from_bytes(self.raw[5:7], "little")

    @property
    def number(self) -> int:
        return self.raw[4] if len(self.raw) >= HEADER_SIZE else 0


KICK: Final = Record(b"", 0)
RESET: Final = Record(b"", 1)


def parse(data: bytes) -> list[Record]:
    """All that is whole; what is too long is cut."""
    records: list[Record] = []
    while len(data) >= _HEAD.size and len(records) < RECORDS_MAX:
        length, room = _HEAD.unpack_from(data)
        raw = data[_HEAD.size :][: min(length, RAW_MAX)]
        data = data[_HEAD.size + min(length, RAW_MAX) :]
        records.append(Record(raw, min(room, ROOM_MAX)))
    return records


def join(records: Sequence[Record]) -> bytes:
    return b"".join(_HEAD.pack(len(raw), room) + raw for raw, room in records)


def check_answer(request: Record, reply: bytes) -> tuple[int, int, int]:
    """A reply is whole, and belongs to its request; what it comes to, for feedback.

    No reply at all is right only where not even an error can be told.
    """
    if not reply:
        assert len(request.raw) < HEADER_SIZE or request.room < _RERROR_MIN, "it was not answered"
        return request.number, 0, 0
    assert len(request.raw) >= HEADER_SIZE
    assert request.room >= RLERROR_SIZE
    assert int.from_bytes(reply[:4], "little") == len(reply), "the size of a reply is wrong"
    tag, message = decode(reply)
    assert tag == request.tag, "a reply has another tag"
    if isinstance(message, Rlerror):
        return request.number, reply[4], message.ecode
    if isinstance(message, Rerror):
        return request.number, reply[4], message.errno
    assert reply[4] == request.number + 1, "a reply is of another type"
    return request.number, reply[4], 0


# Mutation


def _fids(records: Sequence[Record]) -> list[int]:
    """The numbers that stand where nearly all messages have a fid."""
    return [int.from_bytes(r.raw[7:11], "little") for r in records if len(r.raw) >= 11] or [0]


def _confused(rng: Random, records: Sequence[Record], record: Record) -> Record:
    """Another fid in the place of the first or the second."""
    at = HEADER_SIZE + 4 * rng.randrange(2)
    if len(record.raw) < at + 4:
        return record
    fid = rng.choice(_fids(records)).to_bytes(4, "little")
    return record._replace(raw=record.raw[:at] + fid + record.raw[at + 4 :])


def _session_message(rng: Random, records: Sequence[Record]) -> Record:
    """A flush of something, or in mid-flight a new session."""
    if rng.randrange(3):
        return Record(
            grammar.encoded(rng.randrange(64), Tflush(rng.choice([r.tag for r in records] or [0])))
        )
    version = rng.choice((b"9P2000.L", b"9P2000.L", b"9P2000.u", b"9P2000", b"9P2001"))
    return Record(grammar.encoded(0xFFFF, Tversion(rng.choice((4096, 8192, 1 << 17)), version)))


def _changed(rng: Random, records: Sequence[Record], record: Record) -> Record:
    match rng.randrange(6):
        case 0:
            return _confused(rng, records, record)
        case 1:
            return record._replace(room=rng.choice((0, 7, 11, 12, 13, 24, 160, 4096, ROOM_MAX)))
        case 2:
            tag = rng.choice([r.tag for r in records]).to_bytes(2, "little")
            return record._replace(raw=record.raw[:5] + tag + record.raw[7:])
        case _:
            return record._replace(raw=grammar.mutated(rng, record.raw, grammar.REQUESTS))


def mutated(rng: Random, records: Sequence[Record], other: Sequence[Record]) -> list[Record]:
    """A case, and some of another, with changes that each keep most of it what it was."""
    result = list(records) or [KICK]
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(result))
        match rng.randrange(12):
            case 0:
                result.insert(at, _session_message(rng, result))
            case 1:
                result.insert(at, rng.choice(result))
            case 2 if len(result) > 1:
                del result[at]
            case 3:  # all that follows comes in one kick
                result[at:] = [record for record in result[at:] if record.is_request] or [KICK]
            case 4 if other:
                start = rng.randrange(len(other))
                result[at:at] = other[start : start + rng.randrange(1, 16)]
            case 5:
                to = rng.randrange(len(result))
                result[at], result[to] = result[to], result[at]
            case 6:
                result.insert(at, RESET if rng.randrange(8) == 0 else KICK)
            case _:
                if result[at].is_request:
                    result[at] = _changed(rng, result, result[at])
    return result[:RECORDS_MAX]


def describe(record: Record) -> str:
    """In a word, for a report."""
    if not record.is_request:
        return "reset" if record.room else "kick"
    try:
        return f"{decode(record.raw)} in {record.room}"
    except ProtocolError:
        return f"{record.raw.hex()} in {record.room}"


def default_room(raw: bytes) -> int:
    """What a guest would leave for the reply to a request that reads, or to another."""
    reading = {116: 19, 40: 19}  # Tread, Treaddir: where their count stands
    assert reading.keys() <= set(NUMBERS.values())
    at = reading.get(raw[4])
    if at is None:
        return 4096
    return min(IO_HEADER + int.from_bytes(raw[at : at + 4], "little"), ROOM_MAX)
