"""Front ends that stop, go on and look in: the ring and the session survive it."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from ninepd.connection import call_soon
from ninepd.vhostuser.messages import Request
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon
from tests.support.driver import Driver


def test_messages_when_the_position_wraps(daemon: Daemon) -> None:
    """Position 65536 is 0 on the ring, and no beginning: the session goes on."""
    with Client(daemon.socket) as client:
        client.front_end.stop()
        base = 65530
        client.driver.close()
        client.driver = Driver(base=base, gpa=1 << 32, user_addr=1 << 40)
        client.start(base)
        client.attach()
        client.walk(ROOT, 1)
        for _ in range(8):
            client.front_end.set_vring_fd(Request.SET_VRING_CALL, client.driver.call_fd)
            client.getattr(1)
        assert client.driver.next_avail < base


def two_exports(start_daemon: StartDaemon, tmp_path: Path) -> Sequence[str]:
    """Sockets of two exports of one daemon."""
    config, sockets = "", []
    for tag in ("one", "two"):
        (tmp_path / tag).mkdir()
        sockets.append(str(tmp_path / f"{tag}.sock"))
        config += f'[[export]]\nexport = "{tmp_path / tag}"\ntag = "{tag}"\n'
        config += f'socket-path = "{sockets[-1]}"\npoll-us = 0\n'
    (tmp_path / "config.toml").write_text(config)
    start_daemon(config=str(tmp_path / "config.toml"))
    return sockets


def test_kicks_stop_and_come_by_another_descriptor(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Its number over there is another one, too: the old one has gone to another front end."""
    sockets = two_exports(start_daemon, tmp_path)
    with Client(sockets[0]) as client:
        client.attach()
        client.walk(ROOT, 1)
        assert client.front_end.enable(False) == 0
        client.front_end.set_vring_fd(Request.SET_VRING_KICK, None)
        with Client(sockets[1]) as other:
            other.attach()
            client.front_end.set_vring_fd(Request.SET_VRING_KICK, client.driver.kick_fd)
            assert client.front_end.enable(True) == 0
            for _ in range(20):  # the first may be seen without a kick
                client.getattr(1)
            other.getattr(ROOT)


def test_a_ring_without_kicks_is_looked_at_now_and_then(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    with Client(two_exports(start_daemon, tmp_path)[0]) as client:
        client.attach()
        client.front_end.set_vring_fd(Request.SET_VRING_KICK, None)
        for _ in range(20):
            time.sleep(0.005)  # it sleeps meanwhile
            client.getattr(ROOT)
        client.front_end.set_vring_fd(Request.SET_VRING_KICK, client.driver.kick_fd)
        client.getattr(ROOT)


def test_a_probe_does_not_end_once(start_daemon: StartDaemon) -> None:
    """Whoever says nothing was no front end."""
    daemon = start_daemon("--once")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        probe.connect(daemon.socket)
        probe.shutdown(socket.SHUT_WR)
        assert probe.recv(1) == b""
    with Client(daemon.socket) as client:
        client.attach()
        client.getattr(ROOT)
    assert daemon.process.wait(5) == 0
    assert not os.path.exists(daemon.socket)


def test_threads_call_the_loop_while_there_is_one() -> None:
    """One that comes back from its storage when the process ends has nobody to tell."""
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    thread = threading.Thread(target=call_soon, args=(loop, loop.stop))
    thread.start()
    loop.run_forever()
    thread.join()
    loop.close()
    call_soon(loop, loop.stop)
