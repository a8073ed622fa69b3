"""What the service manager is told while a daemon serves (sd_notify(3))."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from ninepd.systemd import watchdog_seconds
from tests.support.activating import activating
from tests.support.client import Client, children
from tests.support.waiting import eventually

PROGRAM = (sys.executable, "-m", "ninepd", "serve")


class Manager:
    """The service manager's end of the socket, and what it has read there."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")
        self.address = "@" + os.fsdecode(self._socket.getsockname()[1:])

    def close(self) -> None:
        self._socket.close()

    def read(self, seconds: float = 20) -> list[str]:
        """The next message, as lines; empty if there is none in time."""
        readable, _, _ = select.select([self._socket], [], [], seconds)
        return self._socket.recv(4096).decode().splitlines() if readable else []

    def wait_for(self, assignment: str) -> None:
        """Leave out others."""
        while assignment not in (lines := self.read()):
            assert lines, f"nothing came any more, and no {assignment}"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def manager() -> Iterator[Manager]:
    with closing(Manager()) as manager:
        yield manager


@pytest.fixture
def start(manager: Manager) -> Iterator[Start]:
    with ExitStack() as stack:

        def do(command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
            environment = os.environ | {"NOTIFY_SOCKET": manager.address} | variables
            process = subprocess.Popen(command, env=environment, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield do


@pytest.fixture
def single(tmp_path: Path, export: Path) -> tuple[list[str], list[str], str]:
    """Of one export: command, paths of sockets, and how it is described."""
    path = str(tmp_path / "a")
    command = [*PROGRAM, "--socket-path", path, "--export", str(export), "--tag", "a"]
    return command, [path], f"{export} as a at {path} ("


@pytest.fixture
def several(tmp_path: Path, export: Path) -> tuple[list[str], list[str], str]:
    paths = [str(tmp_path / tag) for tag in "ab"]
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{export}"\ntag = "{Path(path).name}"\nsocket-path = "{path}"\n'
            for path in paths
        )
    )
    return [*PROGRAM, "--config", str(config)], paths, "2 exports: "


def test_life_of_one_export(
    manager: Manager, start: Start, single: tuple[list[str], list[str], str]
) -> None:
    command, (path,), described = single
    process = start(command)
    assert manager.read() == ["READY=1"]
    (status,) = manager.read()
    assert status.startswith(f"STATUS=Serving {described}")
    assert status.endswith(": 0 front ends connected")
    with Client(path):
        assert manager.read() == [status.replace("0 front ends", "1 front end")]
    assert manager.read() == [status]
    process.terminate()
    assert manager.read() == ["STOPPING=1"]
    assert process.wait(10) == 0


def test_life_of_several(
    manager: Manager, start: Start, several: tuple[list[str], list[str], str]
) -> None:
    command, (first, second), described = several
    process = start(command)
    assert manager.read() == ["READY=1"]
    status = f"STATUS=Serving {described}{{}} connected"
    assert manager.read() == [status.format("0 front ends")]
    with Client(first), Client(second):
        manager.wait_for(status.format("2 front ends"))
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert manager.read() == [status.format("1 front end")]
    assert manager.read() == [status.format("0 front ends")]
    process.terminate()
    assert manager.read() == ["STOPPING=1"]
    assert process.wait(10) == 0


def test_reload(manager: Manager, start: Start, several: tuple[list[str], list[str], str]) -> None:
    """The manager waits for the second message."""
    command, _, _ = several
    process = start(command)
    manager.wait_for("READY=1")
    manager.read()
    before = time.monotonic_ns() // 1000
    process.send_signal(signal.SIGHUP)
    first, second = manager.read()
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert manager.read() == ["READY=1"]


@pytest.mark.parametrize("which", ["single", "several"])
def test_watchdog(
    manager: Manager, start: Start, request: pytest.FixtureRequest, which: str
) -> None:
    """It hears of a daemon until that hangs, and again when it goes on."""
    command, _, _ = request.getfixturevalue(which)
    process = start(command, WATCHDOG_USEC="200000")
    for _ in range(3):
        manager.wait_for("WATCHDOG=1")
    process.send_signal(signal.SIGSTOP)
    while manager.read(0.5):  # what was on its way
        pass
    process.send_signal(signal.SIGCONT)
    assert manager.read() == ["WATCHDOG=1"]


def test_process_that_dies_again_and_again_is_no_hang(
    manager: Manager, start: Start, several: tuple[list[str], list[str], str]
) -> None:
    command, _, _ = several
    process = start(command, WATCHDOG_USEC="100000")
    manager.wait_for("READY=1")
    for _ in range(3):
        eventually(lambda: len(children(process.pid)) == 2, "the next process")
        os.kill(children(process.pid)[0], signal.SIGKILL)
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
    assert process.poll() is None


@pytest.mark.parametrize("which", ["single", "several"])
def test_no_watchdog(
    manager: Manager, start: Start, request: pytest.FixtureRequest, which: str
) -> None:
    """The variables of another process, as whoever starts us through a shell has them."""
    command, _, _ = request.getfixturevalue(which)
    start(command, WATCHDOG_USEC="10000", WATCHDOG_PID="1")
    manager.wait_for("READY=1")
    while lines := manager.read(0.3):
        assert lines != ["WATCHDOG=1"]


@pytest.mark.parametrize("which", ["single", "several"])
def test_manager_that_does_not_read(
    manager: Manager, start: Start, request: pytest.FixtureRequest, which: str
) -> None:
    """Its socket takes 10 messages, or whatever net.unix.max_dgram_qlen says."""
    command, (path, *_), _ = request.getfixturevalue(which)
    process = start(command, WATCHDOG_USEC="2000")
    manager.wait_for("READY=1")
    for _ in range(int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 10):
        with Client(path):
            pass
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize("microseconds", ["", "x", "-5", "1.5", "0"])
def test_watchdog_that_is_none(monkeypatch: pytest.MonkeyPatch, microseconds: str) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_seconds() == float("inf")


def test_activated_export_is_described_by_its_path(
    manager: Manager, start: Start, tmp_path: Path, export: Path
) -> None:
    path = f"{tmp_path}/s"
    start([*activating(f"={path}"), *PROGRAM, "--export", str(export), "--tag", "a"])
    manager.wait_for("READY=1")
    assert manager.read()[0].startswith(f"STATUS=Serving {export} as a at {path} (")
