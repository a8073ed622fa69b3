"""A guest that writes where only the device should, and a ring that is stopped when it is full."""

import random
from pathlib import Path

import pytest

from ninepd.p9.messages import Rfsync, Rgetattr, Rmkdir, Tfsync, Tgetattr, Tmkdir, decode, encode
from tests.support.client import ROOT, Client, Daemon, send


@pytest.mark.threat("t_used_tamper")
@pytest.mark.parametrize("what", ["index", "flags", "event", "entries", "everything"])
def test_guest_that_writes_to_its_used_ring(client: Client, export: Path, what: str) -> None:
    """The device counts by itself: each request is served once, and told in its own place."""
    driver = client.driver
    used, num = driver.used, driver.num
    places = {
        "flags": (used, used + 2),
        "index": (used + 2, used + 4),
        "entries": (used + 4, used + 4 + 8 * num),
        "event": (used + 4 + 8 * num, used + 6 + 8 * num),
        "everything": (used, used + 6 + 8 * num),
    }
    start, end = places[what]
    noise = random.Random(7)
    for number in range(2 * num):
        before = driver.last_used
        driver.bytes[start:end] = noise.randbytes(end - start)
        if driver.used_idx == before + 1:
            driver.used_idx = before + 9  # so that it shows when the device has answered
        driver.used_event = before  # the driver's own part: it wants to be called
        head = driver.submit([encode(1, Tmkdir(ROOT, b"d%d" % number, 0o755, 0))], [4096])
        driver.force_kick()
        while driver.used_idx != (before + 1) & 0xFFFF:
            assert driver.called(20), "the device did not answer"
        ((answered, length),) = driver.take_used()
        assert answered == head
        assert isinstance(decode(driver.reply(head, length))[1], Rmkdir)
    assert len(list(export.iterdir())) == 2 * num


@pytest.mark.threat("t_reset_inflight")
def test_full_ring_is_stopped_and_goes_on(client: Client, daemon: Daemon) -> None:
    """Each of the requests is answered once, before or after; what was out holds nothing."""
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"x" * 50_000)
    before = daemon.descriptors()
    driver = client.driver
    for turn in range(10):
        heads = {}
        for number in range(driver.num // 2):
            message = (Tfsync(1, number % 2), Tgetattr(ROOT, 0))[number % 3 == 2]
            heads[send(client, message, tag=turn * 100 + number)] = message
        base = client.front_end.stop()
        client.start(base)
        done = driver.wait_used(count=len(heads))
        assert sorted(head for head, _ in done) == sorted(heads)
        for head, length in done:
            kind = Rfsync if isinstance(heads[head], Tfsync) else Rgetattr
            assert isinstance(decode(driver.reply(head, length))[1], kind)
    assert daemon.descriptors() == before


@pytest.mark.threat("t_reset_inflight")
def test_full_ring_is_reset(client: Client, daemon: Daemon) -> None:
    """The next session begins, and nothing of the last one is left."""
    client.create(ROOT, 1, b"f")
    client.attach()
    before = daemon.descriptors()
    for _ in range(10):
        client.open(ROOT, 1, b"f", flags=2)
        client.write(1, 0, b"x" * 50_000)
        for number in range(client.driver.num // 2):
            send(client, Tfsync(1, 0), tag=number)
        client.reboot()
        client.attach()
    assert daemon.descriptors() == before
