"""The conversations of the four front ends as they were read in their sources, and a fuzzer."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ninepd.vhostuser.messages import (
    CONFIG,
    LOG_AREA,
    MEMORY_TABLE,
    MESSAGE_HEADER,
    NEED_REPLY,
    NOFD,
    REGION,
    REPLY,
    REQUESTS,
    UINT64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    ConfigSpace,
    Header,
    LogArea,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VirtioFeature,
    VringAddr,
    VringState,
)
from ninepd.vhostuser.session import (
    OFFERED_FEATURES,
    OFFERED_PROTOCOL_FEATURES,
    RingFault,
    SetChannel,
)
from ninepd.vhostuser.state import MAX_MEM_SLOTS, State
from tests.support.dialogue import CONFIG_SPACE, HIGH, LOW, RING, TOP, Dialogue


def test_qemu() -> None:
    front = Dialogue(negotiated=False)

    def connect() -> None:
        assert front.get(Request.GET_FEATURES) == OFFERED_FEATURES
        offered = front.get(Request.GET_PROTOCOL_FEATURES)
        assert front.send(Request.SET_PROTOCOL_FEATURES, UINT64.pack(offered)) is None
        assert front.get(Request.GET_QUEUE_NUM) == 1
        assert front.get(Request.GET_MAX_MEM_SLOTS) == 509
        assert front.ack(Request.SET_BACKEND_REQ_FD, b"", 4) == 0
        assert front.effect == SetChannel(4)
        assert front.ack(Request.SET_OWNER) == 0
        assert front.get(Request.GET_FEATURES) == OFFERED_FEATURES
        assert front.send(Request.SET_VRING_CALL, UINT64.pack(0), 5) is None
        assert front.send(Request.SET_VRING_ERR, UINT64.pack(0), 6) is None
        assert front.config(0, 34) == CONFIG_SPACE.ljust(34, b"\0")

    def start(base: int) -> None:
        assert front.send(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES)) is None
        for region in (LOW, HIGH):
            if region not in front.state.regions:
                assert front.add(region) == 0
        front.send(Request.SET_VRING_NUM, VRING_STATE.pack(VringState(0, 128)))
        front.send(Request.SET_VRING_BASE, VRING_STATE.pack(VringState(0, base)))
        front.send(Request.SET_VRING_ADDR, VRING_ADDR.pack(RING))
        front.send(Request.SET_VRING_KICK, UINT64.pack(0), 7)
        front.send(Request.SET_VRING_CALL, UINT64.pack(0), 8)
        assert not front.state.runnable
        assert front.enable(1) == 0
        front.send(Request.SET_VRING_CALL, UINT64.pack(0), 9)
        assert front.state.runnable

    def stop(base: int) -> None:
        front.session.parked_at(base)
        assert front.enable(0) == 0
        assert front.stop() == (0, base)
        assert front.state.regions == (LOW, HIGH)

    connect()
    start(0)
    stop(77)
    start(77)
    assert front.remove(HIGH) == 0
    assert front.add(HIGH) == 0
    assert front.state.runnable
    stop(99)
    start(0)
    stop(5)
    # device_del and device_add on the same socket.
    connect()
    start(0)


def test_user_mode_linux() -> None:
    front = Dialogue(negotiated=False)
    region = MemoryRegion(0x60000000, 1 << 29, 0x60000000, 0x60000000)
    ring = VringAddr(0, 0, 0x60001000, 0x60003000, 0x60002000, TOP)
    assert front.send(Request.SET_OWNER) is None
    assert front.get(Request.GET_FEATURES) == OFFERED_FEATURES
    assert front.get(Request.GET_PROTOCOL_FEATURES) == OFFERED_PROTOCOL_FEATURES
    assert front.ack(Request.SET_PROTOCOL_FEATURES, UINT64.pack(0x229)) == 0
    assert front.ack(Request.SET_BACKEND_REQ_FD, b"", 4) == 0
    assert front.get(Request.GET_QUEUE_NUM) == 1
    for _probe in range(3):
        assert front.ack(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES)) == 0
        assert front.table(region) == 0
        assert front.ack(Request.SET_VRING_CALL, UINT64.pack(0), 5) == 0
        assert front.num(256) == 0
        assert front.base(0) == 0
        assert front.addr(ring) == 0
        assert not front.state.runnable
        assert front.kick() == 0
        assert front.enable(1) == 0
        assert front.state.runnable
        assert front.state.ring.base == 0
        assert front.config(0, 6) == CONFIG_SPACE
        # Suspend, resume, unbind: never a GET_VRING_BASE.
        for on in (0, 1, 0):
            front.session.parked_at(12)
            assert front.enable(on) == 0
            assert front.state.runnable == bool(on)
        assert front.get(Request.GET_FEATURES) == OFFERED_FEATURES


def test_cloud_hypervisor() -> None:
    front = Dialogue(negotiated=False)
    assert front.ack(Request.SET_OWNER) == 0
    assert front.get(Request.GET_FEATURES) == OFFERED_FEATURES
    offered = front.get(Request.GET_PROTOCOL_FEATURES)
    assert front.ack(Request.SET_PROTOCOL_FEATURES, UINT64.pack(offered)) == 0
    assert front.get(Request.GET_QUEUE_NUM) == 1
    assert front.ack(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES)) == 0
    assert front.table(LOW) == 0
    assert front.num(128) == 0
    assert front.addr() == 0
    assert front.base(3) == 0
    assert front.kick() == 0
    assert front.enable(1) == 0
    assert front.ack(Request.SET_BACKEND_REQ_FD, b"", 4) == 0
    assert front.state.runnable
    assert front.state.ring.base == 3
    assert front.add(HIGH) == 0
    assert front.state.runnable
    for on in (0, 1, 0):
        assert front.enable(on) == 0
        assert front.state.runnable == bool(on)
    assert front.stop() == (0, 3)
    # Restore sends SET_PROTOCOL_FEATURES without having asked.
    assert front.ack(Request.SET_OWNER) == 0
    assert front.ack(Request.SET_PROTOCOL_FEATURES, UINT64.pack(offered)) == 0


def test_crosvm() -> None:
    front = Dialogue(negotiated=False)
    features = OFFERED_FEATURES & ~VirtioFeature.INDIRECT_DESC
    front.send(Request.SET_OWNER)
    front.get(Request.GET_FEATURES)
    front.send(Request.SET_PROTOCOL_FEATURES, UINT64.pack(front.get(Request.GET_PROTOCOL_FEATURES)))
    front.send(Request.SET_BACKEND_REQ_FD, b"", 4)
    assert front.get(Request.GET_QUEUE_NUM) == 1
    front.send(Request.SET_FEATURES, UINT64.pack(features))
    big = RING._replace(avail=LOW.ua + 0x100000, used=LOW.ua + 0x200000)
    for _activation in range(2):  # the second time without SET_FEATURES
        assert front.table(LOW) == 0
        front.num(32768)
        front.addr(big)
        front.base(0)
        front.send(Request.SET_VRING_CALL, UINT64.pack(0), 5)
        front.send(Request.SET_VRING_KICK, UINT64.pack(0), 6)
        front.send(Request.SET_VRING_ENABLE, VRING_STATE.pack(VringState(0, 1)))
        assert front.state.runnable
        assert front.state.features == features
        assert front.config(2, 4, flags=1) == b"home"
        front.enable(0)
        front.stop()


# Anything at all.

small = st.sampled_from([0, 1, 2, 3, 4096, 8192, 12288, 1 << 31, (1 << 63) - 1, TOP])
u32 = st.sampled_from([0, 1, 2, 4, 64, 256, 32769, (1 << 32) - 1])
region_values = st.one_of(
    st.sampled_from([LOW, HIGH]), st.builds(MemoryRegion, small, small, small, small)
)
BODIES: dict[object, st.SearchStrategy[Any]] = {
    UINT64: st.sampled_from([0, 1, NOFD, OFFERED_FEATURES, 0x229, OFFERED_PROTOCOL_FEATURES, TOP]),
    VRING_STATE: st.builds(VringState, u32, u32),
    VRING_ADDR: st.one_of(
        st.just(RING), st.builds(VringAddr, u32, u32, small, small, small, small)
    ),
    REGION: region_values,
    LOG_AREA: st.builds(LogArea, small, small),
    MEMORY_TABLE: st.lists(region_values, max_size=3).map(tuple),
    CONFIG: st.builds(ConfigSpace, u32, u32, st.binary(max_size=40)),
}


@st.composite
def messages(draw: st.DrawFn) -> Message:
    request = draw(st.one_of(st.sampled_from(Request), st.integers(0, 60)))
    codec = REQUESTS[request].payload if request in REQUESTS else None
    payload = codec.pack(draw(BODIES.get(codec, st.just(())))) if codec else b""
    if draw(st.integers(0, 9)) == 0:
        payload = draw(st.binary(max_size=80))
    flags = draw(st.sampled_from([VERSION, VERSION | NEED_REPLY, 2, VERSION | REPLY, 0x19]))
    fds = tuple(range(draw(st.integers(0, 3))))
    fault = draw(st.sampled_from([None] * 9 + ["descriptors were lost"]))
    return Message(Header(request, flags, len(payload)), payload, fds, fault)


NO_FEATURES = Message(Header(Request.SET_PROTOCOL_FEATURES, VERSION, 8), bytes(8), (), None)
LOG_WITHOUT_SHMFD = Message(Header(Request.SET_LOG_BASE, VERSION, 0), b"", (), None)


@pytest.mark.threat("t_vhost_fuzz")
@settings(max_examples=400)
@example(running=False, script=[(NO_FEATURES, 19), (LOG_WITHOUT_SHMFD, 19)])
@given(st.booleans(), st.lists(st.tuples(messages(), st.integers(0, 19)), max_size=40))
def test_whatever_comes_the_session_stays_sound(
    running: bool, script: list[tuple[Message, int]]
) -> None:
    dialogue = Dialogue()
    if running:
        dialogue.run()
    session = dialogue.session
    for message, event in script:
        before = session.state
        step = session.handle(message)
        if event == 0:
            step = session.refuse(step, "the effect failed")
        if step.refusal is not None:
            assert session.state == before
            assert step.effect in (None, RingFault())
        check_reply(message, step.reply, before.protocol_features)
        check_state(session.state)
        if event == 1:
            session.mark_broken()
        elif event == 2:
            session.parked_at(0xFFFF)


def check_reply(message: Message, reply: bytes | None, protocol_features: int) -> None:
    request, flags, _ = message.header
    own_body = request in REQUESTS and REQUESTS[request].refusal is not None
    if request == Request.SET_LOG_BASE:  # its reply came with LOG_SHMFD (vhost-user.rst)
        own_body = bool(protocol_features & ProtocolFeature.LOG_SHMFD)
    assert (reply is not None) == bool(own_body or flags & NEED_REPLY)
    if reply is not None:
        assert MESSAGE_HEADER.unpack(reply[:12]) == (request, 5, len(reply) - 12)
        if not own_body:
            assert UINT64.unpack(reply[12:]) in (0, 1)


def check_state(state: State) -> None:
    assert not state.features & ~OFFERED_FEATURES
    assert not state.protocol_features & ~OFFERED_PROTOCOL_FEATURES
    assert len(set(state.regions)) == len(state.regions) <= MAX_MEM_SLOTS
    for space in ("gpa", "ua"):
        end = 0
        for start, size in sorted((getattr(r, space), r.size) for r in state.regions):
            assert start >= end
            end = start + size
            assert size
            assert end <= 1 << 64
    ring = state.ring
    assert 0 <= ring.base <= 0xFFFF
    assert ring.num == 0 or ring.num in [1 << shift for shift in range(16)]
    if state.runnable:
        assert ring.started
        assert ring.enabled
        assert not ring.broken
        for start, size in (
            (ring.desc, 16 * ring.num),
            (ring.avail, 4 + 2 * ring.num),
            (ring.used, 4 + 8 * ring.num),
        ):
            assert any(
                start in range(r.ua, r.ua + r.size) and start + size - 1 < r.ua + r.size
                for r in state.regions
            )
