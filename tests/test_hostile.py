"""Guests and front ends that break the rules, against a live daemon: the three radii of failure.

A bad request is told an error. A bad ring stops that device until it is reset. A bad control
message is refused. In no case does the process end, a descriptor leak, or another export notice.
"""

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ninepd.p9 import messages as p9
from ninepd.p9.messages import (
    HEADER,
    NUMBERS,
    Rlerror,
    Tgetattr,
    Tlock,
    Tmkdir,
    Twalk,
    Twrite,
    decode,
    encode,
)
from ninepd.vhostuser.messages import Request
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon
from tests.support.driver import INDIRECT, NEXT, WRITE, Driver
from tests.support.frontend import FakeFrontEnd, Ring, SharedRegion
from tests.support.waiting import eventually

NOWHERE = 1 << 50


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[Client]:
    """Attached, with an err eventfd and a descriptor count taken while idle."""
    with Client(daemon.socket) as client:
        client.attach()
        yield client


# Bad requests


@pytest.mark.threat("t_short_header")
@pytest.mark.parametrize("size", range(7))
def test_request_shorter_than_a_header(guest: Client, size: int) -> None:
    """There is nothing to answer: it comes back empty, and the ring goes on."""
    pieces = [bytes(size)] if size else []
    head = guest.submit(*pieces)
    assert guest.driver.wait_used() == [(head, 0)]
    guest.driver.free(head)
    guest.getattr(ROOT)


@pytest.mark.threat("t_reply_small")
@pytest.mark.parametrize("room", range(11))
def test_no_room_for_any_reply(guest: Client, export: Path, room: int) -> None:
    head = guest.submit(encode(1, Tmkdir(ROOT, b"d", 0o755, 0)), room=[room] if room else [])
    assert guest.driver.wait_used() == [(head, 0)]
    guest.driver.free(head)
    assert os.listdir(export) == []


@pytest.mark.threat("t_reply_fit")
@pytest.mark.parametrize("room", [11, 19])
def test_reply_that_does_not_fit(guest: Client, export: Path, room: int) -> None:
    """Rmkdir has 20 bytes: with less room the directory is not made."""
    assert guest.error(Tmkdir(ROOT, b"d", 0o755, 0), room=room) == "EMSGSIZE"
    assert os.listdir(export) == []
    assert guest.error(Tmkdir(ROOT, b"d", 0o755, 0), room=20) == ""


@pytest.mark.threat("t_reply_fit")
def test_walk_reply_that_does_not_fit(guest: Client, export: Path) -> None:
    (export / "d").mkdir()
    assert guest.error(Twalk(ROOT, 1, (b"d", b"..")), room=9 + 25) == "EMSGSIZE"
    assert guest.error(Tgetattr(1, 0)) == "ENOENT"
    assert guest.error(Twalk(ROOT, 1, (b"d", b"..")), room=9 + 26) == ""


@pytest.mark.threat("t_size_lie")
@pytest.mark.parametrize("size", [0, 6, 20, 4096, 0xFFFFFFFF])
def test_size_field_that_lies(guest: Client, size: int) -> None:
    """Tgetattr has 19 bytes; a smaller size field is caught by the codec."""
    raw = size.to_bytes(4, "little") + encode(5, Tgetattr(ROOT, 0))[4:]
    assert decode(guest.exchange(raw)) == (5, Rlerror(errno.EINVAL))
    guest.getattr(ROOT)


@pytest.mark.threat("t_size_lie")
@pytest.mark.parametrize("size", range(7, 19))
def test_size_field_that_cuts_the_message_short(guest: Client, size: int) -> None:
    raw = size.to_bytes(4, "little") + encode(5, Tgetattr(ROOT, 0))[4:]
    assert decode(guest.exchange(raw)) == (5, Rlerror(errno.EINVAL))


def test_trailing_bytes_are_ignored(guest: Client) -> None:
    raw = encode(5, Tgetattr(ROOT, 0)) + b"\xff" * 100
    assert len(guest.exchange(raw)) == 160
    raw = len(raw).to_bytes(4, "little") + raw[4:]
    assert len(guest.exchange(raw)) == 160


@pytest.mark.threat("t_string")
@pytest.mark.parametrize("length", [5, 100, 0xFFFF])
def test_string_past_the_end(guest: Client, export: Path, length: int) -> None:
    body = (ROOT).to_bytes(4, "little") + length.to_bytes(2, "little") + b"name"
    raw = HEADER.pack(7 + len(body), NUMBERS[Tmkdir], 5) + body
    assert decode(guest.exchange(raw)) == (5, Rlerror(errno.EINVAL))
    assert os.listdir(export) == []


@pytest.mark.threat("t_string")
def test_string_past_the_end_into_the_next_request(guest: Client, export: Path) -> None:
    """What another request left in memory is no part of this one."""
    guest.rpc(Tgetattr(ROOT, 0))
    body = (ROOT).to_bytes(4, "little") + (4).to_bytes(2, "little") + b"ab"
    raw = HEADER.pack(7 + len(body), NUMBERS[Tmkdir], 5) + body
    assert decode(guest.exchange(raw, b"cd" + bytes(8))) == (5, Rlerror(errno.EINVAL))
    assert os.listdir(export) == []


@pytest.mark.threat("t_nwname")
def test_seventeen_names(guest: Client) -> None:
    body = bytes(4) + (1).to_bytes(4, "little") + (17).to_bytes(2, "little") + b"\x01\0." * 17
    raw = HEADER.pack(7 + len(body), NUMBERS[Twalk], 5) + body
    assert decode(guest.exchange(raw)) == (5, Rlerror(errno.EINVAL))


@pytest.mark.threat("t_size_lie")
def test_message_larger_than_anything(guest: Client) -> None:
    raw = HEADER.pack(1 << 20, NUMBERS[Tmkdir], 5) + bytes((1 << 20) - 7)
    _, reply = decode(guest.exchange(raw))
    assert isinstance(reply, Rlerror)
    guest.getattr(ROOT)


# No quarantine: the ring itself is sound, and only this request is refused.
@pytest.mark.threat("t_desc_oob")
def test_payload_buffer_outside_memory(guest: Client, export: Path) -> None:
    """The chain itself is sound, so only this request fails."""
    (export / "f").write_bytes(b"x" * 8192)
    guest.open(ROOT, 1, b"f", flags=2)
    header = bytearray(encode(5, Twrite(1, 0, 4096)))
    header[:4] = (len(header) + 4096).to_bytes(4, "little")
    driver = guest.driver
    at = driver.allocate(len(header))
    driver.write(at, bytes(header))
    answer = driver.allocate(4096)
    driver.write_desc(0, at, len(header), NEXT, 1)
    driver.write_desc(1, NOWHERE, 4096, NEXT, 2)
    driver.write_desc(2, answer, 4096, WRITE, 0)
    driver.publish(0)
    driver.force_kick()
    ((head, used),) = driver.wait_used()
    assert head == 0
    _, reply = decode(driver.read(answer, used))
    assert isinstance(reply, Rlerror)
    assert (export / "f").read_bytes() == b"x" * 8192
    guest.getattr(ROOT)


@pytest.mark.threat("t_desc_oob")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_lengths_that_overflow(guest: Client, count: int) -> None:
    """Sums beyond 32 bits, of buffers that reach far out of memory: back, and nothing else."""
    driver = guest.driver
    for index in range(count):
        driver.write_desc(index, driver.gpa(driver.heap), 0xFFFFFFFF, NEXT, index + 1)
    driver.write_desc(count, driver.gpa(driver.heap), 0xFFFFFFFF, WRITE, 0)
    before = bytes(driver.bytes[driver.heap + 4096 :])
    driver.publish(0)
    driver.force_kick()
    ((head, used),) = driver.wait_used()
    assert head == 0
    assert used <= 11
    assert bytes(driver.bytes[driver.heap + 4096 :]) == before
    guest.getattr(ROOT)


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=10))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_bytes(guest: Client, pieces: list[bytes]) -> None:
    head = guest.submit(*filter(None, pieces))
    ((finished, used),) = guest.driver.wait_used()
    assert finished == head
    raw = guest.driver.reply(head, used)
    if raw:
        assert int.from_bytes(raw[:4], "little") == len(raw)


@given(
    number=st.sampled_from([n for m, n in NUMBERS.items() if m.__name__ not in {"Tversion"}]),
    fid=st.sampled_from([0, 1, 2, 0xFFFFFFFF]),
    body=st.binary(max_size=120),
)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_bodies(guest: Client, number: int, fid: int, body: bytes) -> None:
    """Whatever happens to the tree, each gets one well-formed answer of the right type."""
    body = fid.to_bytes(4, "little") + body
    raw = guest.exchange(HEADER.pack(7 + len(body), number, 77) + body)
    size, answer, tag = HEADER.unpack_from(raw)
    assert (size, tag) == (len(raw), 77)
    assert answer in {7, number + 1}


# Bad rings

Break = Callable[[Driver], object]


def loop(driver: Driver) -> None:
    driver.write_desc(0, driver.gpa(driver.heap), 8, NEXT, 1)
    driver.write_desc(1, driver.gpa(driver.heap), 8, NEXT, 0)
    driver.publish(0)


def self_loop(driver: Driver) -> None:
    driver.write_desc(5, driver.gpa(driver.heap), 8, NEXT, 5)
    driver.publish(5)


def head_out_of_range(driver: Driver) -> None:
    driver.publish(driver.num)


def next_out_of_range(driver: Driver) -> None:
    driver.write_desc(0, driver.gpa(driver.heap), 8, NEXT, driver.num)
    driver.publish(0)


def writable_before_readable(driver: Driver) -> None:
    driver.write_desc(0, driver.gpa(driver.heap), 64, NEXT | WRITE, 1)
    driver.write_desc(1, driver.gpa(driver.heap), 64, 0, 0)
    driver.publish(0)


def available_jump(driver: Driver) -> None:
    driver.avail_idx = driver.next_avail + driver.num + 1


def odd_indirect_table(driver: Driver) -> None:
    driver.write_desc(0, driver.gpa(driver.heap), 17, INDIRECT, 0)
    driver.publish(0)


def nested_indirect_table(driver: Driver) -> None:
    table = driver.allocate(32, 16)
    inner = (
        table.to_bytes(8, "little")
        + (16).to_bytes(4, "little")
        + INDIRECT.to_bytes(2, "little")
        + bytes(2)
    )
    driver.write(table, inner)
    driver.write_desc(0, table, 16, INDIRECT, 0)
    driver.publish(0)


def indirect_table_outside_memory(driver: Driver) -> None:
    driver.write_desc(0, NOWHERE, 16, INDIRECT, 0)
    driver.publish(0)


BREAKS: tuple[Break, ...] = (
    loop,
    self_loop,
    head_out_of_range,
    next_out_of_range,
    writable_before_readable,
    available_jump,
    odd_indirect_table,
    nested_indirect_table,
    indirect_table_outside_memory,
)


def header_outside_memory(driver: Driver) -> None:
    driver.write_desc(0, NOWHERE, 64, NEXT, 1)
    driver.write_desc(1, driver.gpa(driver.heap), 64, WRITE, 0)
    driver.publish(0)


def fired(eventfd: int, timeout: float = 60) -> bool:
    return bool(select.select([eventfd], [], [], timeout)[0])


@pytest.mark.threat("t_desc_loop", "t_indirect", "t_avail_jump")
@pytest.mark.parametrize("breakage", BREAKS, ids=lambda breakage: breakage.__name__)
def test_bad_ring_stops_the_device_until_it_is_reset(
    start_daemon: StartDaemon, breakage: Break
) -> None:
    daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        connected = daemon.descriptors()
        err = os.eventfd(0, os.EFD_NONBLOCK)
        client.front_end.set_vring_fd(Request.SET_VRING_ERR, err)
        client.getattr(ROOT)
        breakage(client.driver)
        client.driver.force_kick()
        assert fired(err), "the front end was not told"
        os.close(err)
        # The device may have been slow to signal what was answered before: that is no new call.
        client.driver.called()
        # Nothing is served until then ...
        head = client.driver.submit([encode(1, Tgetattr(ROOT, 0))], [4096])
        client.driver.force_kick()
        assert not client.driver.called(0.05)
        assert client.driver.take_used() == []
        client.driver.free(head)
        # ... and everything again afterwards, on a fresh ring.
        client.reboot()
        client.attach()
        client.getattr(ROOT)
        assert daemon.descriptors() == connected
    assert daemon.stop() == 0
    lines = [line for line in daemon.log.splitlines() if "ring stopped" in line]
    assert len(lines) == 1, daemon.log
    assert daemon.log.strip() == lines[0]


@pytest.mark.threat("t_desc_oob")
def test_first_buffer_outside_memory(guest: Client, daemon: Daemon) -> None:
    """Without a header nobody knows the tag: dropped, or the ring stops; never a fault."""
    header_outside_memory(guest.driver)
    guest.driver.force_kick()
    try:
        assert guest.driver.wait_used(1) == [(0, 0)]
        guest.getattr(ROOT)
    except TimeoutError:
        daemon.stop()
        assert "ring stopped" in daemon.log
    assert daemon.process.poll() in {None, 0}


def test_broken_ring_leaves_the_next_front_end_alone(daemon: Daemon) -> None:
    idle = daemon.idle_descriptors()
    with Client(daemon.socket) as client:
        client.attach()
        loop(client.driver)
        client.driver.force_kick()
    with Client(daemon.socket) as client:
        client.attach()
        client.getattr(ROOT)
    eventually(lambda: daemon.idle_descriptors() == idle, "all descriptors come back")


@pytest.mark.threat("t_double_fetch")
def test_guest_that_rewrites_a_request_while_it_is_served(guest: Client, export: Path) -> None:
    """Each answer fits one consistent copy of the request: made as "aaaa" or "bbbb", or refused."""
    driver = guest.driver
    request = encode(1, Tmkdir(ROOT, b"aaaa", 0o755, 0))
    head = driver.submit([request], [4096])
    at = driver._chains[head][1][0].addr
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for name in (b"bbbb", b"a/.."[:4], b"aaaa"):
                driver.write(at + 13, name)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(300):
            driver.kick()
            driver.wait_used()
            driver.publish(head)
    finally:
        stop.set()
        thread.join()
    driver.kick()
    driver.wait_used()
    assert not {name for name in os.listdir(export) if "/" in name or name == ".."}
    assert export.parent.joinpath("bbbb").exists() is False


@pytest.mark.threat("t_ram_truncate")
def test_file_of_guest_memory_is_cut(start_daemon: StartDaemon) -> None:
    """SIGBUS is what a careless back end gets; here at most that device stops."""
    daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        head = client.driver.submit([encode(1, Tgetattr(ROOT, 0))], [4096])
        del head
        os.ftruncate(client.driver.fd, client.driver.heap)
        client.driver.force_kick()
        client.driver.called(0.5)
        # The mapping here must not be touched any more either.
        os.ftruncate(client.driver.fd, client.driver.size)
    assert daemon.process.poll() is None, "the daemon died"
    with Client(daemon.socket) as client:
        client.attach()
        client.getattr(ROOT)


# Bad front ends


def test_unknown_control_message(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.attach()
        assert client.front_end.ack(200, b"rubbish") != 0
        client.getattr(ROOT)
    daemon.stop()
    assert daemon.log.count("refused") == 1


def test_ring_at_impossible_addresses(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.attach()
        client.front_end.stop()
        driver = client.driver
        regions = [
            SharedRegion(r.gpa, r.size, r.user_addr, r.offset, driver.fd) for r in driver.regions
        ]
        ring = Ring(driver.num, NOWHERE, NOWHERE, NOWHERE, driver.kick_fd, driver.call_fd)
        assert client.front_end.start(regions, ring) != 0
        client.reboot()
        client.attach()
    assert daemon.stop() == 0


def test_lost_framing_closes_this_connection_only(daemon: Daemon) -> None:
    front_end = FakeFrontEnd(daemon.socket)
    front_end.send(Request.GET_FEATURES, size=1 << 30)
    assert front_end.socket.recv(1) == b""
    front_end.close()
    with Client(daemon.socket) as client:
        client.attach()
    daemon.stop()
    assert daemon.log.count("disconnected") == 1


@pytest.mark.threat("t_peer")
def test_second_front_end_is_refused(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.attach()
        with socket.socket(socket.AF_UNIX) as second:
            second.settimeout(5)
            second.connect(daemon.socket)
            assert second.recv(1) == b""
        client.getattr(ROOT)
    daemon.stop()
    (line,) = daemon.log.splitlines()
    assert "second front end" in line
    assert str(os.getpid()) in line


def test_front_end_that_leaves_in_the_middle_of_a_message(daemon: Daemon) -> None:
    idle = daemon.idle_descriptors()
    front_end = FakeFrontEnd(daemon.socket)
    stray = os.eventfd(0)
    front_end.send_bytes(b"\x01\x00\x00\x00\x01", [stray])
    os.close(stray)
    front_end.close()
    with Client(daemon.socket) as client:
        client.attach()
    eventually(lambda: daemon.idle_descriptors() == idle, "all descriptors come back")


# Nothing leaks


@pytest.mark.threat("t_leak")
def test_front_end_leaves_with_everything_open(daemon: Daemon, export: Path) -> None:
    idle = daemon.idle_descriptors()
    with Client(daemon.socket) as client:
        client.attach()
        for fid in range(1, 101):
            client.create(ROOT, fid, b"%d" % fid)
            client.rpc(Tlock(fid, 1, 0, 0, 0, fid, b"guest"))
        assert daemon.descriptors() >= idle + 300
    eventually(lambda: daemon.idle_descriptors() == idle, "all descriptors come back")


@pytest.mark.threat("t_leak")
def test_reconnecting_for_ever(daemon: Daemon) -> None:
    idle = daemon.idle_descriptors()
    for _ in range(30):
        with Client(daemon.socket) as client:
            client.attach()
            client.walk(ROOT, 1)
    eventually(lambda: daemon.idle_descriptors() == idle, "all descriptors come back")


@pytest.mark.threat("t_leak")
def test_errors_leak_nothing(daemon: Daemon, guest: Client, export: Path) -> None:
    (export / "f").write_text("")
    os.mkfifo(export / "fifo")
    guest.walk(ROOT, 1, b"f")
    guest.walk(ROOT, 2, b"fifo")
    failing = [
        Twalk(ROOT, 3, (b"f", b"x")),
        Twalk(ROOT, 3, (b"missing",)),
        Twalk(ROOT, 1, (b"f",)),
        p9.Tlopen(2, 0),
        p9.Tlcreate(2, b"x", 2, 0o644, 0),
        p9.Tattach(1, 0xFFFFFFFF, b"", b"f", 0),
        p9.Tattach(9, 0xFFFFFFFF, b"", b"f/x", 0),
        p9.Txattrwalk(1, 3, b"user.none"),
        p9.Tremove(77),
        p9.Tlink(ROOT, 1, b"f"),
    ]
    before = daemon.descriptors()
    for _ in range(50):
        for message in failing:
            guest.error(message)
    assert daemon.descriptors() == before


@pytest.mark.threat("t_log")
def test_log_of_a_flood_is_bounded(start_daemon: StartDaemon, export: Path) -> None:
    """What a guest does wrong is told to the guest, not to the host's disk."""
    daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        for _ in range(3000):
            assert client.error(Twalk(ROOT, 1, (b"missing\n\x1b[31m",))) == "ENOENT"
            client.exchange(HEADER.pack(7, 250, 1))
    daemon.stop()
    assert daemon.log == ""


@pytest.mark.threat("t_log")
def test_names_in_the_trace_are_escaped(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--trace")
    with Client(daemon.socket) as client:
        client.attach()
        client.error(Twalk(ROOT, 1, (b"evil\n\x1b[31m",)))
    daemon.stop()
    assert "evil" in daemon.log
    assert "\x1b" not in daemon.log


# Exports do not disturb each other


def test_misbehaving_export_beside_another(
    tmp_path: Path, export: Path, start_daemon: StartDaemon
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = tmp_path / "ninepd.toml"
    sockets = [tmp_path / "bad.sock", tmp_path / "good.sock"]
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{path}"\ntag = "{path.name}"\nsocket-path = "{sock}"\n'
            for path, sock in zip((export, other), sockets, strict=True)
        )
    )
    daemon = start_daemon(config=str(config))
    with Client(str(sockets[1])) as good:
        good.attach()
        good.create(ROOT, 1, b"f")
        for breakage in BREAKS:
            with Client(str(sockets[0])) as bad:
                bad.attach()
                breakage(bad.driver)
                bad.driver.force_kick()
                good.write(1, 0, b"text")
        with FakeFrontEnd(str(sockets[0])) as front_end:
            front_end.send(Request.GET_FEATURES, size=1 << 30)
            assert front_end.socket.recv(1) == b""
        assert good.read(1, 0, 4) == b"text"
    assert daemon.stop() == 0
    assert (other / "f").read_text() == "text"
