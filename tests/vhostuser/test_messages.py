import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninepd.errors import Refused
from ninepd.vhostuser.messages import (
    CONFIG,
    LOG_AREA,
    MEMORY_TABLE,
    MESSAGE_HEADER,
    NEED_REPLY,
    NOFD,
    NOTHING,
    REGION,
    REPLY,
    REQUESTS,
    UINT64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    ConfigSpace,
    Fixed,
    Header,
    LogArea,
    MemoryRegion,
    Message,
    PayloadCodec,
    Request,
    VringAddr,
    VringState,
    decode,
    reply,
)

EVERYTHING = (1 << 64) - 1

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
regions = st.builds(MemoryRegion, u64, u64, u64, u64)

VALUES: list[tuple[PayloadCodec[Any], st.SearchStrategy[Any]]] = [
    (MESSAGE_HEADER, st.builds(Header, u32, u32, u32)),
    (NOTHING, st.just(())),
    (UINT64, u64),
    (VRING_STATE, st.builds(VringState, u32, u32)),
    (VRING_ADDR, st.builds(VringAddr, u32, u32, u64, u64, u64, u64)),
    (REGION, regions),
    (LOG_AREA, st.builds(LogArea, u64, u64)),
    (MEMORY_TABLE, st.lists(regions, max_size=130).map(tuple)),
    (CONFIG, st.builds(ConfigSpace, u32, u32, st.binary(max_size=300))),
]

SERVED = [request for request in Request if REQUESTS[request].payload is not None]
FIXED = [request for request in SERVED if isinstance(REQUESTS[request].payload, Fixed)]


def message(request: int, payload: bytes = b"", fds: int = 0, flags: int = VERSION) -> Message:
    return Message(Header(request, flags, len(payload)), payload, tuple(range(fds)))


def good(request: Request) -> Message:
    """A message that agrees with its row."""
    payload = {MEMORY_TABLE: bytes(8), CONFIG: bytes(12)}
    codec = REQUESTS[request].payload
    assert codec is not None
    body = bytes(codec.size) if isinstance(codec, Fixed) else payload[codec]
    expected = REQUESTS[request].fds(codec.unpack(body))
    return message(request, body, expected or 0)


@given(st.data())
def test_every_codec_round_trips(data: st.DataObject) -> None:
    codec, values = data.draw(st.sampled_from(VALUES))
    value = data.draw(values)
    assert codec.unpack(codec.pack(value)) == value


@given(st.data(), st.binary(max_size=200))
def test_every_codec_refuses_or_understands_any_bytes(data: st.DataObject, wire: bytes) -> None:
    codec, _ = data.draw(st.sampled_from(VALUES))
    try:
        value = codec.unpack(wire)
    except Refused:
        return
    assert len(codec.pack(value)) == len(wire)


def test_sizes_are_those_of_the_c_structs() -> None:
    codecs = (MESSAGE_HEADER, UINT64, VRING_STATE, VRING_ADDR, REGION, LOG_AREA)
    assert [codec.size for codec in codecs] == [12, 8, 8, 40, 40, 16]
    assert len(MEMORY_TABLE.pack((MemoryRegion(0, 0, 0, 0),) * 3)) == 8 + 32 * 3
    assert len(CONFIG.pack(ConfigSpace(0, 0, bytes(34)))) == 12 + 34


def test_fields_lie_where_qemu_puts_them() -> None:
    assert VRING_ADDR.unpack(struct.pack("=IIQQQQ", 1, 2, 3, 4, 5, 6)) == VringAddr(
        queue=1, flags=2, desc=3, used=4, avail=5, log=6
    )
    region = MemoryRegion(gpa=1, size=2, ua=3, offset=4)
    fields = struct.pack("=QQQQ", 1, 2, 3, 4)
    assert REGION.unpack(b"\xff" * 8 + fields) == region
    assert MEMORY_TABLE.unpack(struct.pack("=II", 1, 99) + fields) == (region,)
    assert CONFIG.unpack(struct.pack("=III", 7, 2, 1) + b"ab") == ConfigSpace(7, 1, b"ab")


def test_every_request_has_a_row() -> None:
    assert set(REQUESTS) == set(Request)
    assert [*Request] == list(range(1, 46))


@pytest.mark.parametrize("request_id", FIXED)
def test_fixed_payloads_have_exactly_one_size(request_id: Request) -> None:
    sample = good(request_id)
    decode(sample, EVERYTHING)
    for size in range(len(sample.payload) + 2):
        if size != len(sample.payload):
            with pytest.raises(Refused, match="bytes instead of"):
                decode(message(request_id, bytes(size), len(sample.fds)), EVERYTHING)


@pytest.mark.parametrize("claimed", [0, 1, 3, 4, 1 << 31, (1 << 32) - 1])
def test_memory_table_counts_its_regions(claimed: int) -> None:
    wire = struct.pack("=II", claimed, 0) + bytes(64)
    with pytest.raises(Refused, match="does not hold"):
        MEMORY_TABLE.unpack(wire)
    for size in (*range(8), *range(9, 72), 73):
        with pytest.raises(Refused):
            MEMORY_TABLE.unpack((struct.pack("=II", 2, 0) + bytes(65))[:size])


@pytest.mark.parametrize("claimed", [0, 3, 5, (1 << 32) - 1])
def test_config_counts_its_bytes(claimed: int) -> None:
    with pytest.raises(Refused, match="configuration bytes"):
        CONFIG.unpack(struct.pack("=III", 0, claimed, 0) + bytes(4))
    for size in range(12):
        with pytest.raises(Refused):
            CONFIG.unpack(bytes(size))


@pytest.mark.parametrize("request_id", SERVED)
@pytest.mark.parametrize("flags", [0, 2, 3, VERSION | REPLY, VERSION | 1 << 4, 1 << 31 | VERSION])
def test_flags_must_be_those_of_a_request(request_id: Request, flags: int) -> None:
    for asked in (0, NEED_REPLY):
        sample = good(request_id)
        header = sample.header._replace(flags=flags | asked)
        with pytest.raises(Refused, match="flags"):
            decode(Message(header, sample.payload, sample.fds), EVERYTHING)


@pytest.mark.parametrize("request_id", SERVED)
def test_features_gate_their_requests(request_id: Request) -> None:
    feature = REQUESTS[request_id].feature
    if feature is None:
        decode(good(request_id), 0)
    else:
        decode(good(request_id), feature)
        with pytest.raises(Refused, match="not negotiated"):
            decode(good(request_id), EVERYTHING & ~feature)


@pytest.mark.parametrize("request_id", [r for r in Request if r not in SERVED] + [0, 46, 9999])
def test_requests_that_are_not_offered_are_refused(request_id: int) -> None:
    for size in (0, 8, 40):
        with pytest.raises(Refused, match="not offered"):
            decode(message(request_id, bytes(size)), EVERYTHING)


def test_transport_faults_refuse_the_message() -> None:
    spoilt = Message(Header(Request.GET_FEATURES, VERSION, 0), fault="descriptors were lost")
    with pytest.raises(Refused, match="descriptors were lost"):
        decode(spoilt, EVERYTHING)


ANY = {0, 1, 2, 3, 253}
TABLE_OF_TWO = MEMORY_TABLE.pack((MemoryRegion(0, 1, 0, 0), MemoryRegion(1, 1, 1, 0)))


@pytest.mark.parametrize(
    ("request_id", "payload", "accepted"),
    [
        (Request.GET_FEATURES, b"", ANY),
        (Request.REM_MEM_REG, bytes(40), ANY),
        (Request.SET_VRING_KICK, UINT64.pack(0), {1}),
        (Request.SET_VRING_KICK, UINT64.pack(NOFD), {0}),
        (Request.SET_VRING_CALL, UINT64.pack(0), {1}),
        (Request.SET_VRING_CALL, UINT64.pack(NOFD), {0}),
        (Request.SET_VRING_ERR, UINT64.pack(0), {1}),
        (Request.SET_VRING_ERR, UINT64.pack(NOFD), {0}),
        (Request.ADD_MEM_REG, bytes(40), {1}),
        (Request.SET_BACKEND_REQ_FD, b"", {1}),
        (Request.SET_MEM_TABLE, TABLE_OF_TWO, {2}),
    ],
)
def test_descriptors_are_counted(request_id: Request, payload: bytes, accepted: set[int]) -> None:
    for count in ANY:
        sample = message(request_id, payload, count)
        if count in accepted:
            decode(sample, EVERYTHING)
        else:
            with pytest.raises(Refused, match="descriptors came"):
                decode(sample, EVERYTHING)


def test_a_reply_has_flags_5() -> None:
    assert reply(Request.GET_FEATURES, UINT64.pack(7)) == struct.pack("=IIIQ", 1, 5, 8, 7)


def test_messages_are_named_for_the_log() -> None:
    assert message(Request.GET_CONFIG).name == "GET_CONFIG"
    assert message(0).name == "request 0"


def test_reading_and_signals_do_not_disturb_the_ring() -> None:
    quiet = {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_BACKEND_REQ_FD,
        Request.GET_CONFIG,
        Request.SET_CONFIG,
        Request.GET_MAX_MEM_SLOTS,
    }
    assert {request for request in SERVED if not message(request).disturbs} == quiet
    assert not message(9999).disturbs
