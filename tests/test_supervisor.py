"""A process for each export: what happens to one changes nothing for the others."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ninepd.p9.messages import Tgetattr
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, children
from tests.support.frontend import FakeFrontEnd

EXPORTS = 3
WAIT_SECONDS = 20


@pytest.fixture
def sockets(tmp_path: Path) -> list[str]:
    return [str(tmp_path / f"{number}.sock") for number in range(EXPORTS)]


def write_config(tmp_path: Path, sockets: list[str]) -> str:
    config = tmp_path / "config.toml"
    text = ""
    for number, path in enumerate(sockets):
        folder = tmp_path / f"folder{number}"
        folder.mkdir(exist_ok=True)
        text += f'[[export]]\nexport = "{folder}"\ntag = "tag{number}"\nsocket-path = "{path}"\n'
    config.write_text(text)
    return str(config)


@pytest.fixture
def supervisor(start_daemon: StartDaemon, tmp_path: Path, sockets: list[str]) -> Daemon:
    """Ready, and each of its processes has served a front end."""
    daemon = start_daemon(config=write_config(tmp_path, sockets))
    for path in sockets:
        exchange(path)
    return daemon


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_end(pidfd: int) -> None:
    readable, _, _ = select.select([pidfd], [], [], WAIT_SECONDS)
    assert readable


def successor(supervisor: Daemon, known: list[int]) -> int:
    """The process that is none of those known."""
    wait_for(lambda: bool(set(children(supervisor.pid)) - set(known)))
    return min(set(children(supervisor.pid)) - set(known))


@pytest.fixture
def end_of() -> Iterator[Callable[[int], int]]:
    """A descriptor that becomes readable when a process has ended."""
    with ExitStack() as stack:

        def opened(pid: int) -> int:
            fd = os.pidfd_open(pid)
            stack.callback(os.close, fd)
            return fd

        yield opened


def exchange(path: str) -> None:
    with Client(path) as client:
        client.attach()
        client.getattr(ROOT)


def test_names_that_administrators_see(supervisor: Daemon) -> None:
    pids = [supervisor.pid, *children(supervisor.pid)]
    names = [Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode() for pid in pids]
    assert names == ["ninepd: supervisor", "ninepd: tag0", "ninepd: tag1", "ninepd: tag2"]
    assert Path(f"/proc/{pids[1]}/comm").read_text() == "ninepd: tag0\n"


def test_name_of_a_single_export(daemon: Daemon) -> None:
    """Beside it is who removes its socket, with nothing else in hand."""
    (other,) = children(daemon.pid)
    names = [Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") for pid in (daemon.pid, other)]
    assert names == [b"ninepd: test", b"ninepd: test (socket)"]
    held = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{other}/fd")}
    folder = os.path.dirname(daemon.socket)
    assert {link for link in held if link.startswith("/")} == {folder, daemon.socket}


def test_socket_of_a_single_export_goes_however_it_ends(
    daemon: Daemon, end_of: Callable[[int], int]
) -> None:
    (other,) = children(daemon.pid)
    end = end_of(other)
    os.kill(other, signal.SIGTERM)  # as a terminal's Ctrl-C, and some service managers
    with Client(daemon.socket) as client:
        client.attach()
    daemon.process.kill()
    wait_for_end(end)
    assert not os.path.exists(daemon.socket)


def test_name_that_is_longer_than_the_command_line(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """It is cut, and what stands behind the command line, the environment, is left alone."""
    tag = "t" * 250
    config = tmp_path / "c"
    config.write_text(f'[[export]]\nexport="{tmp_path}"\ntag="{tag}"\nsocket-path="{tmp_path}/s"\n')
    daemon = start_daemon(config=str(config))
    (pid,) = children(daemon.pid)
    shown = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    assert f"ninepd: {tag}".startswith(shown)
    assert len(shown) > 15
    assert b"NOTIFY_SOCKET=" in Path(f"/proc/{pid}/environ").read_bytes()


def test_supervisor_is_one_thread_that_sleeps(supervisor: Daemon, sockets: list[str]) -> None:
    """It wakes up once when a front end comes."""
    assert len(os.listdir(f"/proc/{supervisor.pid}/task")) == 1

    def sleeps() -> list[str]:
        """How often it has gone to sleep, and was interrupted."""
        return Path(f"/proc/{supervisor.pid}/status").read_text().splitlines()[-2:]

    def calm() -> bool:
        """Does nothing of what the fixture did keep it busy any more?"""
        before = sleeps()
        time.sleep(0.2)
        return sleeps() == before

    wait_for(calm)
    before = sleeps()
    with Client(sockets[0]) as client:
        wait_for(lambda: sleeps() != before)
        wait_for(calm)
        before = sleeps()
        client.attach()
        for _ in range(100):
            client.getattr(ROOT)
        assert sleeps() == before


def test_processes_hold_nothing_of_each_other(
    supervisor: Daemon, sockets: list[str], tmp_path: Path
) -> None:
    """No listening socket, directory or front end of another export."""
    inodes = [(tmp_path / f"folder{number}").stat().st_ino for number in range(EXPORTS)]

    def held(pid: int) -> set[str]:
        links = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
        return {link for link in links if link.startswith(("socket:", "/")) and link != "/dev/null"}

    with Client(sockets[0]) as client:
        client.attach()
        before = held(supervisor.pid)
        listening = {link for link in before if link.startswith("socket:")}
        shared = [held(pid) & listening for pid in children(supervisor.pid)]
        assert [len(links) for links in shared] == [1] * EXPORTS
        assert len(listening.difference(*shared)) == 1  # the service manager's
        for number, pid in enumerate(children(supervisor.pid)):
            found = {os.stat(entry.path).st_ino for entry in os.scandir(f"/proc/{pid}/fd")}
            assert found & set(inodes) == {inodes[number]}
    assert held(supervisor.pid) == before  # it never had the front end's


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_dead_process_is_started_again(
    supervisor: Daemon, sockets: list[str], number: signal.Signals, end_of: Callable[[int], int]
) -> None:
    with Client(sockets[1]) as other:
        other.attach()
        pids = children(supervisor.pid)
        end = end_of(pids[0])
        os.kill(pids[0], number)
        wait_for_end(end)
        other.getattr(ROOT)
        exchange(sockets[0])
    successor(supervisor, pids)
    assert supervisor.stop() == 0
    assert f"tag0: its process was killed by {number.name}; the next starts in 0 s" in (
        supervisor.log
    )
    assert supervisor.log.count("\n") == 1


def test_process_that_dies_again_and_again(
    supervisor: Daemon, sockets: list[str], end_of: Callable[[int], int]
) -> None:
    """Each time the supervisor waits longer. A front end that comes meanwhile waits, too."""
    last, *others = children(supervisor.pid)
    for _ in range(4):
        end = end_of(last)
        os.kill(last, signal.SIGKILL)
        wait_for_end(end)
        last = successor(supervisor, [last, *others])
    exchange(sockets[0])
    assert set(others) <= set(children(supervisor.pid))
    assert supervisor.stop() == 0
    waits = re.findall(r"starts in (\S+) s", supervisor.log)
    assert waits == ["0", "0.1", "0.5", "1"]


def test_stopped_process_delays_nobody(supervisor: Daemon, sockets: list[str]) -> None:
    first = children(supervisor.pid)[0]
    with Client(sockets[0]) as stopped, Client(sockets[1]) as other:
        stopped.attach()
        other.attach()
        os.kill(first, signal.SIGSTOP)
        try:
            for _ in range(100):
                other.getattr(ROOT)
            exchange(sockets[2])
        finally:
            os.kill(first, signal.SIGCONT)
        stopped.getattr(ROOT)


def test_stopped_process_does_not_hold_up_the_end(
    supervisor: Daemon, sockets: list[str], end_of: Callable[[int], int]
) -> None:
    ends = [end_of(pid) for pid in children(supervisor.pid)]
    os.kill(children(supervisor.pid)[0], signal.SIGSTOP)
    started = time.monotonic()
    assert supervisor.stop() == 0
    assert time.monotonic() - started < 4
    for end in ends:
        wait_for_end(end)
    assert not any(map(os.path.exists, sockets))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_termination(
    supervisor: Daemon,
    sockets: list[str],
    number: signal.Signals,
    end_of: Callable[[int], int],
) -> None:
    ends = [end_of(pid) for pid in children(supervisor.pid)]
    with Client(sockets[0]) as client:
        client.attach()
        supervisor.process.send_signal(number)
        assert supervisor.process.wait(WAIT_SECONDS) == 0
    for end in ends:
        wait_for_end(end)
    assert not any(map(os.path.exists, sockets))


def test_guests_outlive_the_supervisor(
    tmp_path: Path, sockets: list[str], end_of: Callable[[int], int]
) -> None:
    """Whoever kills it wants no guest to lose its files. The rest of them end one by one.

    Nobody is left to remove the sockets then: the next supervisor takes their place.
    """
    daemon = Daemon(socket="", export="", config=write_config(tmp_path, sockets))
    pids = children(daemon.pid)
    ends = [end_of(pid) for pid in pids]
    try:
        with Client(sockets[0]) as client:
            client.attach()
            daemon.process.kill()
            daemon.process.wait()
            client.getattr(ROOT)
            exchange(sockets[1])
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
    for end in ends:
        wait_for_end(end)
    assert daemon.stop() == -signal.SIGKILL
    assert daemon.log == ""
    daemon = Daemon(socket="", export="", config=write_config(tmp_path, sockets))
    exchange(sockets[0])
    assert daemon.stop() == 0
    assert not any(map(os.path.exists, sockets))


def test_once(tmp_path: Path, sockets: list[str]) -> None:
    """Each process ends with its front end, the supervisor with the last process."""
    daemon = Daemon("--once", socket="", export="", config=write_config(tmp_path, sockets))
    try:
        for number, path in enumerate(sockets):
            assert len(children(daemon.pid)) == EXPORTS - number
            exchange(path)
            wait_for(lambda path=path: not os.path.exists(path))  # type: ignore[misc]
        assert daemon.process.wait(WAIT_SECONDS) == 0
    finally:
        daemon.stop()
    assert daemon.log == ""


def test_connected_descriptors(tmp_path: Path) -> None:
    """The supervisor keeps none: a front end whose process has died sees it."""
    pairs = [socket.socketpair() for _ in range(2)]
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{tmp_path}"\ntag = "tag{n}"\nfd = {theirs.fileno()}\n'
            for n, (_, theirs) in enumerate(pairs)
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "ninepd", "serve", "--config", config],
        pass_fds=[theirs.fileno() for _, theirs in pairs],
        stderr=subprocess.PIPE,
        text=True,
    )
    for _, theirs in pairs:
        theirs.close()
    try:
        first, second = (Client(ours) for ours, _ in pairs)
        first.attach()
        second.attach()
        os.kill(children(process.pid)[0], signal.SIGKILL)
        wait_for(lambda: select.select([pairs[0][0]], [], [], 0)[0] != [])
        assert pairs[0][0].recv(1) == b""
        second.getattr(ROOT)
        second.close()
        assert process.wait(WAIT_SECONDS) == 1
        assert process.stderr is not None
        assert process.stderr.read() == "ninepd: tag0: its process was killed by SIGKILL\n"
        first.close()
    finally:
        process.kill()
        process.communicate()


def test_directory_that_is_renamed_stays_the_one(
    supervisor: Daemon, tmp_path: Path, sockets: list[str], end_of: Callable[[int], int]
) -> None:
    """A process that is started again serves the directory that was found at the start."""
    (tmp_path / "folder0" / "mine").touch()
    (tmp_path / "folder0").rename(tmp_path / "elsewhere")
    (tmp_path / "folder0").mkdir()
    end = end_of(children(supervisor.pid)[0])
    os.kill(children(supervisor.pid)[0], signal.SIGKILL)
    wait_for_end(end)
    with Client(sockets[0]) as client:
        client.attach()
        assert client.names(ROOT) == {b"mine"}


def test_each_process_has_all_descriptors_for_itself(
    start_daemon: StartDaemon, tmp_path: Path, sockets: list[str]
) -> None:
    """One guest that uses up its descriptors leaves the others theirs."""
    launcher = ("prlimit", "--nofile=256:256")
    config = write_config(tmp_path, sockets)
    start_daemon(config=config, launcher=launcher)
    for path in sockets[:2]:
        with Client(path) as client:
            client.attach()
            for fid in range(1, 150):
                client.create(ROOT, fid, b"%d" % fid)
            client.error(Tgetattr(1, 0))


def test_nothing_is_served_unless_all_can_be(tmp_path: Path, sockets: list[str]) -> None:
    config = write_config(tmp_path, sockets)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(sockets[-1])
        sock.listen()
        result = subprocess.run(
            [sys.executable, "-m", "ninepd", "serve", "--config", config],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not any(map(os.path.exists, sockets[:-1]))
    assert os.path.exists(sockets[-1])


def test_front_end_that_waits_for_its_process(
    supervisor: Daemon, sockets: list[str], end_of: Callable[[int], int]
) -> None:
    """The socket listens all the time, so that who comes between two processes is served."""
    first = children(supervisor.pid)[0]
    os.kill(first, signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sockets[0])
        end = end_of(first)
        os.kill(first, signal.SIGKILL)
        wait_for_end(end)
        front_end = FakeFrontEnd(sock)
        front_end.connect()
        front_end.close()
