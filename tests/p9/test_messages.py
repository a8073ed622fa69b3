"""The 9P codec, by table: whatever holds for one message is tested on all of them."""

import errno
from typing import Any, Final, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninepd.errors import ProtocolError
from ninepd.p9.limits import MAX_WALK
from ninepd.p9.messages import (
    CODECS,
    HEADER,
    HEADER_SIZE,
    NUMBERS,
    WITH_DATA,
    Qid,
    Rerror,
    Rgetattr,
    Rlerror,
    Rreaddir,
    Rstatfs,
    Rwalk,
    Tattach,
    Tauth,
    Tcreate,
    Tfsync,
    Tgetattr,
    Tlcreate,
    Tsetattr,
    Tversion,
    Twalk,
    Twrite,
    decode,
    encode,
)

BITS: Final = {"B": 8, "H": 16, "I": 32, "Q": 64}
MESSAGES: Final = sorted(NUMBERS, key=lambda message: NUMBERS[message])
QIDS: Final = st.builds(
    Qid, st.integers(0, 2**8 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    if hint is Qid:
        return QIDS
    kind = hint.__metadata__[0]
    if kind == "string":
        return st.binary(max_size=300)
    if kind == "names":
        return st.lists(st.binary(max_size=255), max_size=MAX_WALK).map(tuple)
    if kind == "qids":
        return st.lists(QIDS, max_size=MAX_WALK).map(tuple)
    return st.integers(0, 2 ** BITS[kind] - 1)


def any_of(message: type[Any]) -> st.SearchStrategy[Any]:
    """Messages of one class, with any values that the wire can carry."""
    hints = get_type_hints(message, include_extras=True)
    fields = {name: _values(hint) for name, hint in hints.items()}
    if message in WITH_DATA:
        fields["nbytes"] = st.integers(0, 2**24)
    return st.builds(message, **fields)


def sample(message: type[Any]) -> Any:
    """One message of a class, every string and list with something in it."""
    by_kind: dict[str, Any] = {
        "string": b"name",
        "names": (b"a", b"bc"),
        "qids": (Qid(1, 2, 3), Qid(4, 5, 6)),
    }
    values = []
    for hint in get_type_hints(message, include_extras=True).values():
        if hint is Qid:
            values.append(Qid(0x80, 7, 9))
        else:
            values.append(by_kind.get(hint.__metadata__[0], 3))
    return message(*values)


def framed(number: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER_SIZE + len(body), number, 1) + body


def outcome(raw: bytes) -> int:
    """The errno that a message is refused with, or 0; anything but ProtocolError goes on."""
    try:
        decode(raw)
    except ProtocolError as error:
        return error.errno or -1
    return 0


def wire(message: Any, tag: int = 1) -> bytes:
    """The bytes of a message, with the data that a reply announces."""
    encoded = encode(tag, message)
    data = message.nbytes if type(message) in WITH_DATA else 0
    return encoded + bytes(data)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_round_trip(message: type[Any]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(any_of(message), st.integers(0, 0xFFFF))
    def check(value: Any, tag: int) -> None:
        raw = wire(value, tag)
        assert int.from_bytes(raw[:4], "little") == len(raw)
        assert raw[4] == NUMBERS[message]
        assert decode(raw) == (tag, value)

    check()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_truncation_at_every_byte(message: type[Any]) -> None:
    """No prefix of a body is a message, but for fields that old clients leave out."""
    body = encode(1, sample(message))[HEADER_SIZE:]
    number = NUMBERS[message]
    outcomes = [outcome(framed(number, body[:length])) for length in range(len(body))]
    assert set(outcomes) <= {0, errno.EINVAL}
    understood = [length for length, code in enumerate(outcomes) if not code]
    tail = {Tfsync: 4, Tattach: 4, Tauth: 4, Rerror: 4, Tcreate: 6}
    assert understood == ([len(body) - tail[message]] if message in tail else [])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_trailing_bytes_are_ignored(message: type[Any]) -> None:
    value = sample(message)
    body = encode(1, value)[HEADER_SIZE:]
    assert decode(framed(NUMBERS[message], body + b"\xff" * 5)) == (1, value)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_announced_size_is_that_of_the_shortest_body(message: type[Any]) -> None:
    codec = CODECS[NUMBERS[message]]
    empty = framed(codec.number, bytes(codec.size))
    assert len(encode(1, decode(empty)[1])) >= len(empty)
    if codec.size and message is not Tfsync:
        with pytest.raises(ProtocolError):
            decode(framed(codec.number, bytes(codec.size - 1)))


@given(st.integers(0, 255), st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_body_is_a_message_or_a_protocol_error(number: int, body: bytes) -> None:
    code = outcome(framed(number, body))
    assert code in ({0, errno.EINVAL} if number in CODECS else {errno.EOPNOTSUPP})


@given(st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_message_or_a_protocol_error(raw: bytes) -> None:
    assert outcome(raw) in {0, errno.EINVAL, errno.EOPNOTSUPP}


@pytest.mark.parametrize("size", [0, 6, 12, 0xFFFFFFFF])
def test_size_field_that_lies(size: int) -> None:
    raw = size.to_bytes(4, "little") + encode(1, sample(Tattach))[4:11]
    with pytest.raises(ProtocolError, match="size field"):
        decode(raw)


@pytest.mark.parametrize("length", range(HEADER_SIZE))
def test_no_header(length: int) -> None:
    with pytest.raises(ProtocolError):
        decode(bytes(length))


@pytest.mark.parametrize("length", [5, 300, 0xFFFF])
def test_string_past_the_end(length: int) -> None:
    body = bytes(4) + length.to_bytes(2, "little") + b"name"
    with pytest.raises(ProtocolError, match="past the end"):
        decode(framed(NUMBERS[Tlcreate], body + bytes(0)))


def test_string_that_swallows_the_fields_behind_it() -> None:
    raw = bytearray(encode(1, Tlcreate(1, b"name", 2, 3, 4)))
    raw[11:13] = (4 + 12).to_bytes(2, "little")
    with pytest.raises(ProtocolError):
        decode(raw)


@pytest.mark.parametrize("count", [17, 18, 255, 0xFFFF])
def test_too_many_names(count: int) -> None:
    body = bytes(8) + count.to_bytes(2, "little") + bytes(2) * count
    with pytest.raises(ProtocolError, match=f"{count} names"):
        decode(framed(NUMBERS[Twalk], body))


def test_sixteen_names() -> None:
    names = tuple(b"%d" % number for number in range(16))
    assert decode(wire(Twalk(1, 2, names))) == (1, Twalk(1, 2, names))


def test_fsync_without_datasync() -> None:
    body = (7).to_bytes(4, "little")
    assert decode(framed(NUMBERS[Tfsync], body)) == (1, Tfsync(7, 0))


def test_strings_are_bytes_of_any_value() -> None:
    name = bytes(range(256))
    assert decode(wire(Tversion(1, name)))[1].version == name


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (Rgetattr, 160),
        (Rstatfs, 67),
        (Rlerror, 11),
        (Tsetattr, 67),
        (Tgetattr, 19),
        (Twrite, 23),
        (Rreaddir, 11),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sizes_on_the_wire(message: type[Any], size: int) -> None:
    assert len(encode(1, sample(message))) == size


@pytest.mark.parametrize("count", [0, 1, 16])
def test_size_of_a_walk_reply(count: int) -> None:
    assert len(encode(1, Rwalk((Qid(0, 1, 2),) * count))) == 9 + 13 * count


def test_data_counts_but_is_not_encoded() -> None:
    raw = encode(5, Rreaddir(100))
    assert len(raw) == 11
    assert HEADER.unpack_from(raw) == (111, 41, 5)


def test_replies_follow_their_requests() -> None:
    by_name = {message.__name__: number for message, number in NUMBERS.items()}
    answers = {name: number for name, number in by_name.items() if name.startswith("R")}
    for name, number in answers.items():
        if name not in {"Rlerror", "Rerror"}:
            assert by_name["T" + name[1:]] == number - 1
    requests = {"R" + name[1:] for name in by_name if name.startswith("T")}
    assert requests - set(answers) == {"Rauth"}


def test_layout_of_one_message_by_hand() -> None:
    expected = bytes.fromhex("1b000000 0e 0500 07000000 0200 6162 41800000 a4010000 e8030000")
    assert encode(5, Tlcreate(7, b"ab", 0x8041, 0o644, 1000)) == expected
