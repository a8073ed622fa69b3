import struct
from collections.abc import Callable

import pytest

from ninepd.vhostuser.messages import (
    CONFIG,
    LOG_AREA,
    MEMORY_TABLE,
    NEED_REPLY,
    REGION,
    REPLY,
    UINT64,
    VERSION,
    VRING_STATE,
    ConfigSpace,
    Header,
    LogArea,
    MemoryRegion,
    Message,
    Request,
    VirtioFeature,
    VringState,
)
from ninepd.vhostuser.session import (
    OFFERED_FEATURES,
    OFFERED_PROTOCOL_FEATURES,
    AddRegion,
    DropLog,
    RemoveRegion,
    SetLog,
    SetLogSignal,
    SetMemory,
)
from ninepd.vhostuser.state import MAX_MEM_SLOTS
from tests.support.dialogue import CONFIG_SPACE, HIGH, LOW, RING, TOP, Dialogue


@pytest.fixture
def front() -> Dialogue:
    return Dialogue()


@pytest.fixture
def running(front: Dialogue) -> Dialogue:
    front.run()
    return front


# Who is answered, and how.


def test_offers() -> None:
    front = Dialogue(negotiated=False)
    assert front.get(Request.GET_FEATURES) == 0x1_7400_0001
    assert front.get(Request.GET_PROTOCOL_FEATURES) == 0xA22B


def test_the_bit_in_the_message_decides_about_an_ack() -> None:
    front = Dialogue(negotiated=False)
    # User-Mode Linux asks before anything is negotiated.
    assert front.ack(Request.SET_PROTOCOL_FEATURES, UINT64.pack(OFFERED_PROTOCOL_FEATURES)) == 0
    assert front.send(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES)) is None
    assert front.send(Request.SET_FEATURES, UINT64.pack(TOP)) is None
    assert front.refusal == "feature bits 0xfffffffe8bfffffe were not offered"


@pytest.mark.parametrize("flags", [VERSION, VERSION | NEED_REPLY])
def test_a_body_of_its_own_comes_once_and_always(running: Dialogue, flags: int) -> None:
    state = VRING_STATE.pack(VringState(0, 0))
    config = CONFIG.pack(ConfigSpace(0, 0, bytes(6)))
    assert running.send(Request.GET_FEATURES, flags=flags) == UINT64.pack(OFFERED_FEATURES)
    assert running.send(Request.GET_QUEUE_NUM, flags=flags) == UINT64.pack(1)
    assert running.send(Request.GET_MAX_MEM_SLOTS, flags=flags) == UINT64.pack(509)
    assert running.send(Request.GET_CONFIG, config, flags=flags) == config[:12] + CONFIG_SPACE
    assert running.send(Request.GET_VRING_BASE, state, flags=flags) == state


@pytest.mark.parametrize("request_id", [0, 46, 9999, (1 << 32) - 1])
def test_unknown_requests(front: Dialogue, request_id: int) -> None:
    assert front.send(request_id, b"x" * 7, 3, 4) is None
    assert front.ack(request_id, b"x" * 7, 3, 4) == 1
    assert front.effect is None


@pytest.mark.parametrize(
    ("request_id", "body"),
    [
        (Request.GET_FEATURES, UINT64.pack(0)),
        (Request.GET_VRING_BASE, bytes(8)),
        (Request.GET_QUEUE_NUM, UINT64.pack(0)),
        (Request.IOTLB_MSG, UINT64.pack(1)),
        (Request.GET_CONFIG, b""),
        (Request.POSTCOPY_LISTEN, UINT64.pack(1)),
        (Request.GET_INFLIGHT_FD, bytes(24)),
        (Request.SET_DEVICE_STATE_FD, UINT64.pack(0x101)),
        (Request.CHECK_DEVICE_STATE, UINT64.pack(1)),
        (Request.GET_SHMEM_CONFIG, bytes(2056)),
    ],
)
def test_a_refused_getter_still_answers(front: Dialogue, request_id: int, body: bytes) -> None:
    for flags in (VERSION, VERSION | NEED_REPLY, 2, VERSION | REPLY):
        assert front.send(request_id, b"odd", flags=flags) == body
        assert front.refusal is not None


def test_bad_flags_change_nothing(running: Dialogue) -> None:
    before = running.state
    for flags in (2, VERSION | REPLY, VERSION | 1 << 4):
        off = VRING_STATE.pack(VringState(0, 0))
        assert running.send(Request.SET_VRING_ENABLE, off, flags=flags) is None
        nack = running.send(Request.SET_VRING_ENABLE, off, flags=flags | NEED_REPLY)
        assert nack == UINT64.pack(1)
        assert running.state == before
    assert running.enable(0) == 0


def test_unnegotiated_requests_are_refused() -> None:
    front = Dialogue(negotiated=False)
    assert front.get(Request.GET_MAX_MEM_SLOTS) == 0
    assert front.add(LOW) == 1
    assert front.ack(Request.SET_BACKEND_REQ_FD, b"", 3) == 1
    assert front.ack(Request.RESET_DEVICE) == 1
    assert front.refusal == "RESET_DEVICE was not negotiated"


def test_protocol_features_that_were_not_offered(front: Dialogue) -> None:
    assert front.ack(Request.SET_PROTOCOL_FEATURES, UINT64.pack(1 << 14)) == 1
    assert front.state.protocol_features == OFFERED_PROTOCOL_FEATURES


# Configuration space.


def test_config_is_cut_and_padded(front: Dialogue) -> None:
    assert front.config(0, 6) == CONFIG_SPACE
    assert front.config(0, 256) == CONFIG_SPACE.ljust(256, b"\0")
    assert front.config(3, 2) == b"om"
    assert front.config(5, 4, flags=1) == b"e\0\0\0"
    assert front.config((1 << 32) - 1, 4) == bytes(4)
    assert front.config(0, 0) == b""
    assert front.config(0, 4084) == CONFIG_SPACE.ljust(4084, b"\0")


def test_config_is_served_before_and_without_negotiation() -> None:
    assert Dialogue(negotiated=False).config(0, 6) == CONFIG_SPACE


def test_config_cannot_be_written(front: Dialogue) -> None:
    assert front.ack(Request.SET_CONFIG, CONFIG.pack(ConfigSpace(0, 1, b"evil"))) == 0
    assert front.config(0, 6) == CONFIG_SPACE


# Memory.


@pytest.mark.parametrize("count", [1, 8, 9, 32, 127])
def test_tables_of_many_regions(front: Dialogue, count: int) -> None:
    table = tuple(MemoryRegion(i << 20, 1 << 20, i << 20, 0) for i in range(count))
    assert front.table(*table) == 0
    assert front.state.regions == table
    assert front.effect == SetMemory(table, tuple(range(20, 20 + count)))


BAD_REGIONS = [
    LOW._replace(size=0),
    LOW._replace(gpa=TOP - LOW.size + 2),
    LOW._replace(ua=TOP - LOW.size + 2),
    LOW._replace(offset=TOP),
    LOW._replace(offset=(1 << 63) - LOW.size),
    LOW._replace(size=TOP),
]


@pytest.mark.parametrize("bad", BAD_REGIONS)
def test_regions_that_wrap_or_are_empty(front: Dialogue, bad: MemoryRegion) -> None:
    assert front.table(HIGH) == 0
    before = front.state
    assert front.table(bad) == 1
    assert front.add(bad) == 1
    assert front.state == before
    assert front.effect is None


def test_a_region_may_end_at_the_end_of_its_space(front: Dialogue) -> None:
    top = MemoryRegion((1 << 64) - 4096, 4096, (1 << 64) - 4096, (1 << 63) - 4097)
    assert front.table(top) == 0


@pytest.mark.parametrize(
    "bad",
    [
        HIGH._replace(gpa=LOW.gpa + LOW.size - 1),
        HIGH._replace(ua=LOW.ua + LOW.size - 1),
        HIGH._replace(gpa=0, size=4096),
        LOW._replace(offset=4096),
    ],
)
def test_regions_that_overlap(front: Dialogue, bad: MemoryRegion) -> None:
    assert front.table(LOW) == 0
    before = front.state
    attempts: list[Callable[[], int]] = [
        lambda: front.table(LOW, bad),
        lambda: front.table(bad, LOW),
        lambda: front.add(bad),
    ]
    for attempt in attempts:
        assert attempt() == 1
        assert front.refusal == "memory regions overlap"
        assert front.state == before


def test_tables_that_do_not_agree_with_themselves(front: Dialogue) -> None:
    assert front.table(HIGH) == 0
    before = front.state
    wire = MEMORY_TABLE.pack((LOW,))
    for payload, fds in [
        (MEMORY_TABLE.pack(()), ()),
        (wire, ()),
        (wire, (1, 2)),
        (struct.pack("=II", 1 << 31, 0) + wire[8:], (1,)),
        (wire[:-1], (1,)),
        (wire + b"\0", (1,)),
        (b"", ()),
    ]:
        assert front.ack(Request.SET_MEM_TABLE, payload, *fds) == 1
        assert front.state == before


def test_a_region_is_added(front: Dialogue) -> None:
    assert front.table(LOW) == 0
    assert front.add(HIGH, 7) == 0
    assert front.effect == AddRegion(HIGH, 7)
    assert front.state.regions == (LOW, HIGH)


def test_a_region_is_removed(front: Dialogue) -> None:
    assert front.table(LOW, HIGH) == 0
    # The offset does not count, and a surplus descriptor does no harm.
    assert front.remove(LOW._replace(offset=77), 9) == 0
    assert front.effect == RemoveRegion(LOW)
    assert front.state.regions == (HIGH,)
    for unknown in (LOW, HIGH._replace(size=4096), HIGH._replace(ua=0), HIGH._replace(gpa=0)):
        assert front.remove(unknown) == 1
    assert front.state.regions == (HIGH,)
    assert front.remove(HIGH) == 0
    assert not front.state.regions


def test_an_identical_region_is_replaced(front: Dialogue) -> None:
    assert front.add(LOW, 7) == 0
    assert front.add(LOW, 8) == 0
    assert front.effect == AddRegion(LOW, 8)
    assert front.state.regions == (LOW,)


@pytest.mark.parametrize("fds", [(), (1, 2)])
def test_add_takes_one_descriptor(front: Dialogue, fds: tuple[int, ...]) -> None:
    assert front.ack(Request.ADD_MEM_REG, REGION.pack(LOW), *fds) == 1
    assert front.state.regions == ()


def test_slots_run_out(front: Dialogue) -> None:
    for i in range(MAX_MEM_SLOTS):
        assert front.add(MemoryRegion(i << 12, 4096, i << 12, 0)) == 0
    assert front.add(MemoryRegion(1 << 40, 4096, 1 << 40, 0)) == 1
    assert front.add(MemoryRegion(0, 4096, 0, 0)) == 0
    assert len(front.state.regions) == MAX_MEM_SLOTS


def test_a_ring_without_its_memory_pauses(running: Dialogue) -> None:
    assert running.remove(HIGH) == 0
    assert running.state.runnable
    assert running.remove(LOW) == 0
    assert not running.state.runnable
    assert running.add(LOW) == 0
    assert running.state.runnable
    assert running.table(HIGH) == 0
    assert not running.state.runnable


# Effects that fail.


@pytest.mark.parametrize(
    ("request_id", "payload", "fds"),
    [
        (Request.SET_MEM_TABLE, MEMORY_TABLE.pack((HIGH,)), (1,)),
        (Request.ADD_MEM_REG, REGION.pack(MemoryRegion(1 << 40, 4096, 0, 0)), (1,)),
        (Request.SET_VRING_KICK, UINT64.pack(0), (1,)),
        (Request.SET_VRING_ENABLE, VRING_STATE.pack(VringState(0, 0)), ()),
        (Request.SET_OWNER, b"", ()),
    ],
)
def test_a_failing_effect_is_taken_back(
    running: Dialogue, request_id: int, payload: bytes, fds: tuple[int, ...]
) -> None:
    before = running.state
    for flags, reply in ((VERSION | NEED_REPLY, UINT64.pack(1)), (VERSION, None)):
        step = running.session.handle(
            Message(Header(request_id, flags, len(payload)), payload, fds)
        )
        assert step.refusal is None
        step = running.session.refuse(step, "mmap: no memory")
        assert running.state == before
        assert step.refusal == "mmap: no memory"
        assert step.effect is None
        assert (step.reply and step.reply[12:]) == reply


# The dirty log.


def test_the_log_is_echoed(running: Dialogue) -> None:
    """All 16 bytes of it: the rust-vmm front end waits for no less."""
    area = LOG_AREA.pack(LogArea(4096, 8192))
    assert running.send(Request.SET_LOG_BASE, area, 5) == area
    assert running.effect == SetLog(LogArea(4096, 8192), 5)
    assert running.send(Request.SET_LOG_BASE, area) == bytes(16)
    assert running.refusal == "0 descriptors came instead of 1"


def test_new_marks_are_told_where_the_front_end_says(running: Dialogue) -> None:
    before = running.state
    assert running.ack(Request.SET_LOG_FD, b"", 6) == 0
    assert running.effect == SetLogSignal(6)
    assert running.state == before


def test_a_log_without_its_feature_gets_no_body() -> None:
    front = Dialogue(negotiated=False)
    assert front.send(Request.SET_LOG_BASE, LOG_AREA.pack(LogArea(4096, 0)), 5) is None
    assert front.refusal == "LOG_SHMFD was not negotiated"
    assert front.ack(Request.SET_LOG_BASE, UINT64.pack(0)) == 1


def test_logging_is_switched_by_feature_and_flag(running: Dialogue) -> None:
    assert running.state.logging
    quiet = OFFERED_FEATURES & ~VirtioFeature.LOG_ALL
    assert running.ack(Request.SET_FEATURES, UINT64.pack(quiet)) == 0
    assert running.effect == DropLog()
    assert not running.state.logging
    assert running.state.runnable
    assert running.addr(RING._replace(flags=1, log=77)) == 0
    assert running.state.ring.log == 77
    assert running.addr(RING._replace(flags=0, log=77)) == 0
    assert running.state.ring.log is None
    assert running.state.runnable
