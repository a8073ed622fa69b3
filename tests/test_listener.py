"""Sockets of the file system: who gets a path, and who removes what is there."""

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.support.client import Client, Daemon

ROUNDS = 50
_AT_ONCE = """
import sys, time
from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.listener import Listener
path, rounds = sys.argv[1], int(sys.argv[2])
for number in range(rounds):
    start = float(sys.stdin.readline())
    while time.monotonic() < start:
        pass
    try:
        listener = Listener(Export("/", "t", path))
    except UsageError as error:
        print(error, flush=True)
        sys.stdin.readline()
    else:
        print("serving", flush=True)
        sys.stdin.readline()
        listener.close() if number % 2 else listener.remove()
"""
"""Rounds of: make the socket of a daemon at the time that the first line says, let it go at the
second. What is left every other time is stale for the next round."""


def test_two_at_once_end_with_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _AT_ONCE, path, str(ROUNDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for _ in range(ROUNDS):
            begin(processes)
            words = sorted(process.stdout.readline().strip() for process in processes)  # type: ignore[union-attr]
            assert words[0] == f"--socket-path: {path} is in use by another process"
            assert words[1] == "serving"
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
            begin(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def begin(processes: "list[subprocess.Popen[str]]") -> None:
    """At the same moment, so that they come into each other's way."""
    start = time.monotonic() + 0.002
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{start}\n")
        process.stdin.flush()


@pytest.mark.parametrize("stale", [False, True])
def test_two_daemons_at_once(tmp_path: Path, export: Path, stale: bool) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", str(path)]
    for _ in range(5):
        if stale:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        processes = [
            subprocess.Popen(
                [*command, "--export", str(export), "--tag", "t"], stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        ends = [os.pidfd_open(process.pid) for process in processes]
        try:
            # One of them ends by itself; the other serves, and ends when it is told to.
            readable, _, _ = select.select(ends, [], [], 20)
            (loser,) = [ends.index(end) for end in readable]
            assert processes[loser].wait() == 2
            assert processes[loser].stderr.read().count("\n") == 1  # type: ignore[union-attr]
            with Client(str(path)) as client:
                client.attach()
            winner = processes[1 - loser]
            winner.terminate()
            assert winner.wait(10) == 0
        finally:
            for process, end in zip(processes, ends, strict=True):
                process.kill()
                process.communicate()
                os.close(end)
        assert os.listdir(tmp_path) == ["export"]


def test_socket_of_another_is_not_removed(
    start_daemon: StartDaemon, tmp_path: Path, export: Path
) -> None:
    """Somebody removed ours, and another daemon listens there now."""
    path = str(tmp_path / "s")
    first = start_daemon(socket=path)
    os.unlink(path)
    second = start_daemon(socket=path)
    assert first.stop() == 0
    with Client(second.socket) as client:
        client.attach()
    assert second.stop() == 0
    assert not os.path.exists(path)


def test_what_replaced_the_socket_is_not_removed(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "s"
    daemon = start_daemon(socket=str(path))
    path.unlink()
    path.write_text("precious")
    assert daemon.stop() == 0
    assert path.read_text() == "precious"


def test_folder_that_was_renamed(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The socket is found where it is now."""
    folder = tmp_path / "folder"
    folder.mkdir()
    daemon = start_daemon(socket=str(folder / "s"))
    folder.rename(tmp_path / "moved")
    assert daemon.stop() == 0
    assert os.listdir(tmp_path / "moved") == []


def test_remains_of_a_start_that_was_interrupted(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Process numbers come again, in containers soon."""
    path = tmp_path / "s"
    launcher = ["sh", "-c", f'touch {tmp_path}/.ninepd-$$; exec "$@"', "sh"]
    start_daemon(socket=str(path), launcher=launcher)
    assert sorted(os.listdir(tmp_path)) == ["export", "s"]


def test_lock_that_a_stranger_holds_keeps_nobody_out(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with Client(start_daemon().socket) as client:
            client.attach()
    finally:
        os.close(folder)


def test_folder_that_may_not_be_listed(
    start_daemon: StartDaemon, tmp_path: Path, other_user: tuple[str, ...]
) -> None:
    folder = tmp_path / "drop"
    folder.mkdir()
    folder.chmod(0o333)
    daemon = start_daemon("--security-model", "none", socket=str(folder / "s"), launcher=other_user)
    assert daemon.stop() == 0
    assert os.listdir(folder) == []


def test_full_backlog_is_in_use(start_daemon: StartDaemon, tmp_path: Path, export: Path) -> None:
    """A daemon that does not come to accept is there all the same, and nobody waits for it."""
    daemon: Daemon = start_daemon()
    daemon.process.send_signal(signal.SIGSTOP)
    sockets = []
    try:
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sockets.append(sock)
            try:
                sock.connect(daemon.socket)
            except BlockingIOError:
                break
        command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", daemon.socket]
        result = subprocess.run(
            [*command, "--export", export, "--tag", "t"], capture_output=True, text=True, timeout=20
        )
        assert result.returncode == 2
        assert "in use" in result.stderr
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        for sock in sockets:
            sock.close()
