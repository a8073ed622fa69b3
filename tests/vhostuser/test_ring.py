from collections.abc import Callable

import pytest

from ninepd.vhostuser.messages import (
    NOFD,
    UINT64,
    Request,
    VirtioFeature,
)
from ninepd.vhostuser.session import (
    OFFERED_FEATURES,
    OFFERED_PROTOCOL_FEATURES,
    Effect,
    ResetDevice,
    ResetSession,
    RingFault,
    SetCall,
    SetErr,
    SetKick,
    StopRing,
)
from ninepd.vhostuser.state import State
from tests.support.dialogue import CONFIG_SPACE, HIGH, LOW, RING, TOP, Dialogue


@pytest.fixture
def front() -> Dialogue:
    return Dialogue()


@pytest.fixture
def running(front: Dialogue) -> Dialogue:
    front.run()
    return front


@pytest.mark.parametrize("num", [0, 3, 129, 32767, 32769, 65536, (1 << 32) - 1])
def test_bad_sizes(running: Dialogue, num: int) -> None:
    before = running.state
    assert running.num(num) == 1
    assert running.state == before


def test_good_sizes(front: Dialogue) -> None:
    for shift in range(16):
        assert front.num(1 << shift) == 0
    assert front.state.ring.num == 32768


@pytest.mark.parametrize("queue", [1, 255, 512, (1 << 32) - 1])
def test_there_is_one_queue(running: Dialogue, queue: int) -> None:
    before = running.state
    assert running.num(64, queue) == 1
    assert running.base(7, queue) == 1
    assert running.addr(RING._replace(queue=queue)) == 1
    assert running.enable(0, queue) == 1
    assert running.stop(queue).num == 0
    assert running.refusal == f"there is no ring {queue}"
    fds = () if queue & NOFD else (3,)
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        assert running.ack(request, UINT64.pack(queue), *fds) == 1
    assert running.state == before


def test_ring_descriptors(front: Dialogue) -> None:
    effects: dict[Request, Callable[[int | None], Effect]] = {
        Request.SET_VRING_KICK: SetKick,
        Request.SET_VRING_CALL: SetCall,
        Request.SET_VRING_ERR: SetErr,
    }
    for request, make in effects.items():
        assert front.ack(request, UINT64.pack(0), 5) == 0
        assert front.effect == make(5)
        assert front.ack(request, UINT64.pack(NOFD)) == 0
        assert front.effect == make(None)
        for payload, fds in [(0, ()), (0, (1, 2)), (NOFD, (1,)), (1 << 9, (1,)), (1 << 32, (1,))]:
            assert front.ack(request, UINT64.pack(payload), *fds) == 1
            assert front.effect is None


def test_a_kick_that_is_refused_does_not_start(front: Dialogue) -> None:
    front.set_up()
    assert front.ack(Request.SET_VRING_KICK, UINT64.pack(0)) == 1
    assert not front.state.ring.started


def test_start_needs_kick_and_enable(front: Dialogue) -> None:
    front.set_up()
    assert front.kick() == 0
    assert not front.state.runnable
    assert front.enable(1) == 0
    assert front.state.runnable
    assert front.enable(0) == 0
    assert not front.state.runnable
    assert front.enable(1) == 0
    assert front.state.runnable
    assert front.enable(2) == 1
    assert front.enable((1 << 32) - 1) == 1
    assert front.state.runnable


def test_without_protocol_features_a_kick_is_enough(front: Dialogue) -> None:
    front.set_up()
    legacy = OFFERED_FEATURES & ~VirtioFeature.PROTOCOL_FEATURES
    assert front.ack(Request.SET_FEATURES, UINT64.pack(legacy)) == 0
    assert front.state.ring.enabled
    assert front.kick() == 0
    assert front.state.runnable


def test_a_ring_that_was_never_set_up_can_be_enabled(front: Dialogue) -> None:
    assert front.enable(1) == 0
    assert not front.state.runnable


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"desc": RING.desc + 8}, "descriptor table at 0x7f0000001008 is not aligned to 16"),
        ({"avail": RING.avail + 1}, "available ring at 0x7f0000002001 is not aligned to 2"),
        ({"used": RING.used + 2}, "used ring at 0x7f0000003002 is not aligned to 4"),
        ({"desc": 0}, "not in one memory region"),
        ({"avail": LOW.ua - 2}, "not in one memory region"),
        ({"desc": TOP - 15}, "not in one memory region"),
        # The regions are adjacent, but no part of a ring may lie across two of them.
        ({"desc": HIGH.ua - 16}, "not in one memory region"),
        ({"used": HIGH.ua + HIGH.size - 1024}, "not in one memory region"),
        ({"used": RING.desc + 16}, "overlap"),
        ({"used": RING.avail}, "overlap"),
        ({"avail": RING.used + 1024}, "overlap"),
    ],
)
def test_a_ring_that_cannot_run_is_told_at_the_start(
    front: Dialogue, bad: dict[str, int], reason: str
) -> None:
    front.set_up()
    assert front.addr(RING._replace(**bad)) == 0
    assert front.kick() == 0
    assert front.enable(1) == 1
    assert front.refusal is not None
    assert reason in front.refusal
    assert front.effect == RingFault()
    assert not front.state.ring.enabled
    # A later valid set-up works.
    assert front.addr() == 0
    assert front.enable(1) == 0
    assert front.state.runnable


def test_event_idx_needs_two_more_bytes(front: Dialogue) -> None:
    front.set_up()
    tight = RING._replace(used=HIGH.ua + HIGH.size - 4 - 8 * 128)
    assert front.addr(tight) == 0
    assert front.kick() == 0
    assert front.enable(1) == 1
    plain = OFFERED_FEATURES & ~VirtioFeature.EVENT_IDX
    assert front.ack(Request.SET_FEATURES, UINT64.pack(plain)) == 0
    assert front.enable(1) == 0


@pytest.mark.parametrize("missing", ["num", "addr", "table"])
def test_kick_before_the_rest(front: Dialogue, missing: str) -> None:
    assert front.kick() == 0
    steps: dict[str, Callable[[], int]] = {
        "num": lambda: front.num(128),
        "addr": front.addr,
        "table": lambda: front.table(LOW),
    }
    last = steps.pop(missing)
    for step in steps.values():
        assert step() == 0
    assert front.enable(1) == 1
    assert front.effect == RingFault()
    assert last() == 0
    assert front.enable(1) == 0
    assert front.state.runnable


def test_no_memory_at_all_names_the_cure(front: Dialogue) -> None:
    front.num(128)
    front.addr()
    front.kick()
    assert front.enable(1) == 1
    assert front.refusal is not None
    assert "share=on" in front.refusal


def test_a_kick_on_an_enabled_ring_is_refused_if_it_cannot_run(front: Dialogue) -> None:
    assert front.ack(Request.SET_FEATURES, UINT64.pack(0)) == 0
    assert front.kick() == 1
    assert front.effect == RingFault()
    assert not front.state.ring.started


def test_a_running_ring_is_not_moved_to_nowhere(running: Dialogue) -> None:
    before = running.state
    assert running.addr(RING._replace(desc=0)) == 1
    assert running.num(32768) == 1
    assert running.state == before
    assert running.addr(RING._replace(log=TOP)) == 0
    assert running.state == before


def test_the_base_is_where_the_device_parked(running: Dialogue) -> None:
    running.session.parked_at(0xFFFE)
    assert running.stop() == (0, 0xFFFE)
    assert running.effect == StopRing()
    assert not running.state.ring.started
    # A fresh start at the old place: ENABLE 1 never went away, KICK starts.
    assert running.kick() == 0
    assert running.state.runnable
    assert running.state.ring.base == 0xFFFE


def test_only_the_low_half_of_a_base_counts(front: Dialogue) -> None:
    assert front.base(0x8000_0005) == 0
    assert front.state.ring.base == 5


def test_a_broken_ring_stays_broken(running: Dialogue) -> None:
    running.session.mark_broken()
    assert not running.state.runnable
    attempts: list[Callable[[], int]] = [
        lambda: running.enable(0),
        lambda: running.enable(1),
        running.kick,
        lambda: running.table(LOW),
        lambda: running.num(128),
        lambda: running.ack(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES)),
        running.addr,
    ]
    for attempt in attempts:
        assert attempt() == 0
        assert running.state.ring.broken
        assert not running.state.runnable


@pytest.mark.parametrize("start", ["kick", "enable"])
def test_new_addresses_and_a_start_mend_a_ring(running: Dialogue, start: str) -> None:
    running.session.mark_broken()
    assert running.addr() == 0
    assert (running.kick() if start == "kick" else running.enable(1)) == 0
    assert running.state.runnable
    # Breaking again needs mending again.
    running.session.mark_broken()
    assert running.kick() == 0
    assert not running.state.runnable


def test_a_stop_mends_a_ring(running: Dialogue) -> None:
    running.session.mark_broken()
    running.stop()
    assert not running.state.ring.broken
    running.run()


def test_a_new_owner_starts_anew(running: Dialogue) -> None:
    running.session.mark_broken()
    assert running.ack(Request.SET_OWNER) == 0
    assert running.effect == ResetSession()
    assert running.state == State(CONFIG_SPACE, protocol_features=OFFERED_PROTOCOL_FEATURES)
    running.run()


def test_resets_disable(running: Dialogue) -> None:
    assert running.ack(Request.RESET_OWNER) == 0
    assert running.effect is None
    assert not running.state.runnable
    assert running.enable(1) == 0
    assert running.ack(Request.RESET_DEVICE) == 0
    assert running.effect == ResetDevice()
    assert not running.state.runnable


def test_unoffered_features_change_nothing(running: Dialogue) -> None:
    before = running.state
    for bit in (24, 33, 34, 35, 40, 63):
        assert running.ack(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES | 1 << bit)) == 1
        assert running.state == before


@pytest.mark.parametrize("num", [1, 2])
def test_a_ring_must_hold_a_request_and_its_reply(front: Dialogue, num: int) -> None:
    front.set_up()
    assert front.num(num) == 0
    assert front.kick() == 0
    assert front.enable(1) == 0, "an indirect table has room"
    assert front.ack(Request.SET_FEATURES, UINT64.pack(VirtioFeature.PROTOCOL_FEATURES)) == 0
    assert not front.state.runnable
    assert front.enable(1) == 1
    assert front.refusal == (
        f"a ring of {num} without indirect descriptors cannot hold a 9P request"
    )
    assert front.num(4) == 0
    assert front.enable(1) == 0
