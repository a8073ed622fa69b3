"""9P messages made and changed field by field, from the same tables that the codecs are made of."""

from collections.abc import Sequence
from random import Random
from typing import Any, Final, get_type_hints

from ninepd.errors import ProtocolError
from ninepd.p9.messages import (
    CODEC_OF,
    HEADER,
    HEADER_SIZE,
    NUMBERS,
    Qid,
    decode,
)

KINDS: Final[dict[type[Any], list[str]]] = {
    message: [
        "qid" if hint is Qid else hint.__metadata__[0]
        for hint in get_type_hints(message, include_extras=True).values()
    ]
    for message in NUMBERS
}
"""Message class to the wire types of its fields."""
BITS: Final = {"B": 8, "H": 16, "I": 32, "Q": 64}
MESSAGES: Final = tuple(NUMBERS)
REQUESTS: Final = tuple(message for message in MESSAGES if message.__name__.startswith("T"))
NAMES: Final = (
    b"",
    b".",
    b"..",
    b"a/b",
    b"a\0b",
    b"\xff",
    b"n" * 255,
    b"n" * 256,
    b"f",
    b"d",
    b"link",
    b"canary",
    b"../canary",
    b"/etc/passwd",
    b"user.x",
    b"user.virtfs.uid",
    b".virtfs_metadata",
    b"security.capability",
    b"system.posix_acl_access",
    b"9P2000.L",
    b"9P2000.u",
    b"9P2000",
)


def number(rng: Random, bits: int) -> int:
    """Often one at the edge of something."""
    kind = rng.randrange(6)
    if kind == 0:
        value = rng.randrange(4)
    elif kind == 1:
        value = -1 - rng.randrange(3)
    elif kind == 2:
        value = (1 << rng.randrange(bits)) - rng.randrange(2)
    elif kind == 3:
        value = rng.getrandbits(bits)
    else:
        value = rng.randrange(64)
    return value & ((1 << bits) - 1)


def string(rng: Random) -> bytes:
    if rng.randrange(3):
        return rng.choice(NAMES)
    return rng.randbytes(rng.randrange(20))


def field(rng: Random, kind: str) -> Any:
    """A value of a wire type."""
    match kind:
        case "string":
            return string(rng)
        case "names":
            return tuple(string(rng) for _ in range(rng.choice((0, 1, 1, 2, 16))))
        case "qid":
            return Qid(number(rng, 8), number(rng, 32), number(rng, 64))
        case "qids":
            return tuple(field(rng, "qid") for _ in range(rng.randrange(4)))
        case _:
            return number(rng, BITS[kind])


def message(rng: Random, kinds: Sequence[type[Any]] = MESSAGES) -> Any:
    chosen = rng.choice(kinds)
    return chosen(*(field(rng, kind) for kind in KINDS[chosen]))


def changed(rng: Random, original: Any) -> Any:
    """The same message with another value in one of its fields."""
    kinds = KINDS[type(original)]
    if not kinds:
        return original
    at = rng.randrange(len(kinds))
    values = list(original)
    values[at] = field(rng, kinds[at])
    return type(original)(*values)


def encoded(tag: int, message: Any, data: bytes = b"") -> bytes:
    """With its data, whatever its fields say of that."""
    codec = CODEC_OF[type(message)]
    body = codec.encode(message) + data
    return HEADER.pack(HEADER_SIZE + len(body), codec.number, tag) + body


def data_of(raw: bytes, message: Any) -> bytes:
    """What stands behind the fields of a message that was decoded."""
    size = min(int.from_bytes(raw[:4], "little"), len(raw))
    return raw[HEADER_SIZE + len(CODEC_OF[type(message)].encode(message)) : size]


def mutated(rng: Random, raw: bytes, kinds: Sequence[type[Any]] = MESSAGES) -> bytes:
    """The bytes of a message: one of its fields, its length, its type or its tag is another."""
    try:
        tag, original = decode(raw)
    except ProtocolError:
        return encoded(number(rng, 16), message(rng, kinds))
    header = (len(raw), raw[4], tag)
    kind = rng.randrange(8)
    if kind == 0:
        header = (number(rng, 32), raw[4], tag)
    elif kind == 1:
        header = (len(raw), NUMBERS[rng.choice(kinds)], tag)
    elif kind == 2:
        header = (len(raw), raw[4], number(rng, 16))
    elif kind == 3:
        return raw[: rng.randrange(len(raw)) + 1]
    else:
        return encoded(tag, changed(rng, original), data_of(raw, original))
    return HEADER.pack(*header) + raw[HEADER_SIZE:]
