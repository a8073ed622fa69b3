"""Kicks and calls of the virtqueue: who notifies whom, and how the device waits for it."""

import fcntl
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from ninepd.errors import RingBroken
from ninepd.vring import Vring, signal_err
from tests.support.driver import Driver
from tests.support.vring_rig import Device, Rig, echo, message, started_rig

rig = pytest.fixture(started_rig)


# ---- notification suppression ----


def test_event_idx_kicks_only_an_idle_device(rig: Rig) -> None:
    d = rig.driver
    assert not kicked_while_busy(rig)
    idle = threading.Thread(target=rig.take)
    idle.start()
    wait_for(lambda: d.avail_event == d.avail_idx)
    d.submit([message()])
    assert d.kick()
    idle.join()
    assert not kicked_while_busy(rig)


def kicked_while_busy(rig: Rig) -> bool:
    """Requests that arrive while the device works need no kick, except maybe the very first."""
    rig.driver.submit([message()])
    rig.driver.kick()
    rig.take()
    rig.driver.submit([message()])
    kicked = rig.driver.kick()
    rig.take()
    return kicked


def test_flags_kick_only_an_idle_device() -> None:
    with closing(Rig(event_idx=False)) as rig:
        d = rig.driver
        idle = threading.Thread(target=rig.take)
        idle.start()
        wait_for(lambda: rig.ring.stats.numbers.sleeps == 1)
        d.submit([message()])
        assert d.kick()
        idle.join()
        assert d.used_flags == 1
        d.submit([message()])
        assert not d.kick()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_event_idx_calls_only_when_asked(rig: Rig) -> None:
    d = rig.driver
    heads = [d.submit([message()]) for _ in range(6)]
    rig.take()
    d.used_event = 40
    rig.push((heads[0], 0, 0, 0))
    assert d.called()  # the first decision after a start always notifies
    rig.push((heads[1], 0, 0, 0))
    assert not d.called()
    d.used_event = 3
    rig.push((heads[2], 0, 0, 0))  # used index 3: not past it yet
    assert not d.called()
    rig.push((heads[3], 0, 0, 0), (heads[4], 0, 0, 0))
    assert d.called()
    rig.push((heads[5], 0, 0, 0))
    assert not d.called()
    assert rig.ring.stats.numbers.calls == 2


def test_flags_call_only_when_asked() -> None:
    with closing(Rig(event_idx=False)) as rig:
        d = rig.driver
        heads = [d.submit([message()]) for _ in range(2)]
        rig.take()
        d.avail_flags = 1
        rig.push((heads[0], 0, 0, 0))
        assert not d.called()
        d.avail_flags = 0
        rig.push((heads[1], 0, 0, 0))
        assert d.called()


def test_call_socket_full_and_hung_up() -> None:
    """User-Mode Linux's call descriptor: EAGAIN is a pending signal, EPIPE a peer that left."""
    with closing(Rig(Driver(call_socket=True))) as rig:
        d = rig.driver
        for i in range(2000):
            head = d.submit([message()])
            d.used_event = d.used_idx
            rig.take()
            if i == 1000:
                d._call_end.shutdown(2)
            rig.push((head, 0, 0, 0))
            d.reply(head)
        assert rig.ring.stats.numbers.calls == 2000


def test_no_call_descriptor_and_a_late_one() -> None:
    with closing(Rig(call=False)) as rig:
        d = rig.driver
        heads = [d.submit([message()]) for _ in range(2)]
        rig.take()
        rig.push((heads[0], 0, 0, 0))
        rig.ring.set_call(d.call_fd)
        d.used_event = 1
        rig.push((heads[1], 0, 0, 0))
        assert d.called()
        rig.ring.set_call(-1)


def test_a_blocking_call_descriptor_that_is_full(rig: Rig) -> None:
    """An eventfd at its limit would block a write for ever; the driver only hurts itself."""
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, (1 << 64) - 2)
    rig.ring.set_call(full)
    head = rig.driver.submit([message()])
    rig.take()
    rig.push((head, 0, 0, 0))
    assert rig.driver.used_idx == 1
    signal_err(full)
    signal_err(-1)
    os.close(full)


def test_signal_err() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    signal_err(fd)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


# ---- waiting ----


def test_kick_is_drained_even_when_others_read_it(rig: Rig) -> None:
    """The kick descriptor blocks; losing the race for its count must not hang the device."""
    d = rig.driver
    assert not fcntl.fcntl(d.kick_fd, fcntl.F_GETFL) & os.O_NONBLOCK
    script = f"""
import os
while True:
    try:
        os.preadv({d.kick_fd}, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
"""
    thief = subprocess.Popen([sys.executable, "-c", script], pass_fds=[d.kick_fd])
    try:
        with Device(rig):
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                head = d.submit([message()])
                d.force_kick()
                try:
                    done = d.wait_used(timeout=0.001)
                except TimeoutError:  # stolen before we looked; but a wake must get through
                    rig.ring.wake()
                    done = d.wait_used(timeout=2)
                assert done == [(head, 0)]
                d.reply(head)
    finally:
        thief.kill()
        thief.wait()
    assert not fcntl.fcntl(d.kick_fd, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("spin", [0, 1000])
@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_is_lost_between_busy_and_idle(spin: int, event_idx: bool) -> None:
    """Ping-pong: each request needs the device to notice it, asleep, spinning or in between."""
    with closing(Rig(event_idx=event_idx)) as rig:
        with Device(rig, spin):
            for i in range(3000):
                head = rig.driver.submit([message()])
                if i % 7 == 0:
                    time.sleep(0.0001)
                rig.driver.kick()
                assert rig.driver.wait_used() == [(head, 0)]
                rig.driver.reply(head)
        counters = rig.ring.stats.numbers
        assert counters.taken == 3000
        assert counters.kicks <= rig.driver.kicks
        if spin:
            assert counters.spin_hits > 100
            assert rig.driver.kicks < 2900


def test_idle_means_asleep(rig: Rig) -> None:
    with Device(rig, spin=100) as device:
        for _ in range(200):
            echo(rig)
        time.sleep(0.05)
        before = device.switches(), rig.ring.stats.numbers.sleeps
        time.sleep(0.5)
        assert (device.switches(), rig.ring.stats.numbers.sleeps) == before


def test_spinning_stops_when_it_catches_nothing(rig: Rig) -> None:
    with Device(rig, spin=4000) as device:
        deadline = time.monotonic() + 60
        while rig.ring.stats.numbers.spin_hits <= 5:  # a busy machine may be late for some
            assert time.monotonic() < deadline
            time.sleep(0.0005)
            echo(rig)
        before = device.cpu()
        for _ in range(20):
            time.sleep(0.03)
            echo(rig)
        assert device.cpu() - before < 0.04  # 4 + 2 + 1 ... ms, not twenty times four


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """This thread, and those that it starts, may use one CPU only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_cpu")
def test_no_spinning_on_the_guest_s_own_cpu(rig: Rig) -> None:
    """There it would only stand in the guest's way; now and then it is tried."""
    with Device(rig, spin=4000):
        for _ in range(20):
            echo(rig)
        before = rig.ring.stats.numbers.spin_hits
        for _ in range(160):
            echo(rig)
        assert rig.ring.stats.numbers.spin_hits - before < 40


def test_wake_by_call_and_by_descriptor(rig: Rig) -> None:
    rig.ring.wake()
    assert rig.take() == []
    os.eventfd_write(rig.wake, 1)
    assert rig.take() == []
    assert not select.select([rig.wake], [], [], 0)[0]
    head = rig.driver.submit([message()])
    rig.ring.wake()
    assert [r[0] for r in rig.take()] == [head]  # the wake is consumed with it...
    timer = threading.Timer(0.1, rig.ring.wake)
    timer.start()
    began = time.monotonic()
    assert rig.take() == []  # ...so this one waits for the next
    assert time.monotonic() - began > 0.05
    timer.join()


def test_kicks_for_nothing_do_not_spin(rig: Rig) -> None:
    """A kick descriptor that is always readable: the device looks, but does not burn a CPU."""
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            os.eventfd_write(rig.driver.kick_fd, 1)

    thread = threading.Thread(target=storm)
    thread.start()
    with Device(rig):
        time.sleep(0.3)
        sleeps = rig.ring.stats.numbers.sleeps
        head = rig.driver.submit([message()])
        assert rig.driver.wait_used() == [(head, 0)]
    stop.set()
    thread.join()
    assert 64 < sleeps < 1000


def test_dead_kick_descriptor_breaks_the_ring(rig: Rig) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    os.dup2(reader, rig.driver.kick_fd)
    os.close(reader)
    with pytest.raises(RingBroken, match="kick descriptor fails: end of file"):
        rig.take()


def test_no_kick_descriptor_means_looking(rig: Rig) -> None:
    d = rig.driver
    ring = Vring(
        rig.memory,
        num=d.num,
        desc=d.user_addr(d.desc),
        used=d.user_addr(d.used),
        avail=d.user_addr(d.avail),
        base=0,
        event_idx=True,
        indirect=True,
        kick=-1,
        call=-1,
        wake=rig.wake,
    )
    timer = threading.Timer(0.05, lambda: d.submit([message()]))
    timer.start()
    assert ring.wait(0) == 1
    timer.join()


# ---- alarms ----


@pytest.mark.parametrize("spin_us", [0, 10_000])
@pytest.mark.parametrize("event_idx", [True, False])
def test_alarm_ends_the_wait(event_idx: bool, spin_us: int) -> None:
    """Not before its time, and with a kick or a wake still good for the same."""
    with closing(Rig(event_idx=event_idx)) as rig:
        at = time.monotonic_ns() + 5_000_000
        rig.ring.set_alarm(at)
        assert rig.take(spin_us) == []
        assert time.monotonic_ns() >= at
        assert rig.take(spin_us) == []  # it stays set
        rig.ring.set_alarm(time.monotonic_ns() + 3600 * 10**9)
        timer = threading.Timer(0.05, lambda: (rig.driver.submit([message()]), rig.driver.kick()))
        timer.start()
        assert len(rig.take(spin_us)) == 1
        timer.join()
        rig.ring.set_alarm(0)
        timer = threading.Timer(0.05, rig.ring.wake)
        timer.start()
        assert rig.take(spin_us) == []
        timer.join()
