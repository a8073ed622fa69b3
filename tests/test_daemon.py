"""The life of the daemon: sockets, signals, front ends that come and go, and its end."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from ninepd.p9.messages import Rfsync, Tfsync, Tgetattr, decode, encode
from tests.conftest import OTHER_USER, StartDaemon
from tests.support.client import ROOT, Client, Daemon, Readiness

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start ``ninepd serve`` with any arguments, and wait until it says that it is ready."""
    with ExitStack() as stack:

        def start(*arguments: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
            readiness = stack.enter_context(closing(Readiness()))
            process = subprocess.Popen(
                [sys.executable, "-m", "ninepd", "serve", *arguments],
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=pass_fds,
                env=os.environ | {"NOTIFY_SOCKET": readiness.address},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert readiness.wait(process.pid)
            return process

        yield start


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


# Coming and going


def test_reconnect(daemon: Daemon, export: Path) -> None:
    for number in range(5):
        with Client(daemon.socket) as client:
            client.attach()
            client.create(ROOT, 1, b"%d" % number)
    assert len(os.listdir(export)) == 5
    assert daemon.process.poll() is None


def test_front_end_that_starts_anew_on_its_connection(daemon: Daemon) -> None:
    """A guest that reboots: the ring starts from 0, and the old session is gone."""
    with Client(daemon.socket) as client:
        client.attach()
        client.walk(ROOT, 1)
        client.reboot()
        assert client.error(Tgetattr(1, 0)) == "EINVAL"  # no Tversion yet
        client.attach()
        assert client.error(Tgetattr(1, 0)) == "ENOENT"


def test_pause_keeps_the_session(daemon: Daemon) -> None:
    """QEMU stops and starts the ring when the virtual machine is paused."""
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"f")
        for _ in range(3):
            base = client.front_end.stop()
            assert base == client.driver.next_avail
            client.start(base)
            client.write(1, 0, b"text")


def test_once(launch: Launch, tmp_path: Path, export: Path) -> None:
    path = str(tmp_path / "socket")
    process = launch("--socket-path", path, "--export", str(export), "--tag", "t", "--once")
    with Client(path) as client:
        client.attach()
        client.getattr(ROOT)
    assert process.wait(5) == 0
    assert not os.path.exists(path)


def test_without_once_it_stays(daemon: Daemon) -> None:
    for _ in range(2):
        with Client(daemon.socket) as client:
            client.attach()
    assert daemon.process.poll() is None


def test_front_end_that_comes_right_behind_another(daemon: Daemon) -> None:
    """One that has left already, such as a probe of the socket, is no reason to be refused."""
    daemon.process.send_signal(signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(daemon.socket)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(daemon.socket)
        daemon.process.send_signal(signal.SIGCONT)
        with Client(sock) as client:
            client.attach()


# Sockets


def test_socket_is_for_its_user_only(daemon: Daemon) -> None:
    mode = os.stat(daemon.socket).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) & 0o077 == 0


def test_socket_that_exists_accepts(tmp_path: Path, export: Path) -> None:
    """Who waits for the path to appear, as libvirt does, must not be refused a moment later."""
    for number in range(10):
        path = str(tmp_path / f"{number}.sock")
        command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", path]
        process = subprocess.Popen([*command, "--export", str(export), "--tag", "t"])
        deadline = time.monotonic() + 20
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                while True:
                    assert time.monotonic() < deadline
                    try:
                        sock.connect(path)
                    except FileNotFoundError:
                        continue
                    break
        finally:
            process.terminate()
            process.wait()


def test_stale_socket_is_replaced(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    with Client(start_daemon(socket=path).socket) as client:
        client.attach()


def test_killed_daemon_leaves_a_socket_that_the_next_replaces(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = str(tmp_path / "killed.sock")
    first = start_daemon("--sandbox", "none", socket=path)  # else another process removes it
    first.process.kill()
    first.process.wait()
    assert os.path.exists(path)
    with Client(start_daemon(socket=path).socket) as client:
        client.attach()


@pytest.mark.parametrize("once", [False, True])
def test_listening_descriptor(launch: Launch, tmp_path: Path, export: Path, once: bool) -> None:
    """As systemd's socket activation hands it over."""
    path = str(tmp_path / "activated.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        options = ["--once"] if once else []
        process = launch(
            "--fd", str(fd), "--export", str(export), "--tag", "t", *options, pass_fds=(fd,)
        )
        for _ in range(1 if once else 3):
            with Client(path) as client:
                client.attach()
        if once:
            assert process.wait(5) == 0
        else:
            process.terminate()
            assert process.wait(5) == 0
    assert os.path.exists(path)  # not ours to remove


def test_connected_descriptor(launch: Launch, export: Path) -> None:
    """As QEMU's conventions for back ends have it; such a daemon ends with its front end."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = launch("--fd", str(fd), "--export", str(export), "--tag", "t", pass_fds=(fd,))
    client = Client(ours)
    client.attach()
    client.getattr(ROOT)
    client.close()
    assert process.wait(5) == 0


# Users of front ends

_ENDING = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    print(os.getpid(), flush=True)
    try:
        # VHOST_USER_GET_FEATURES, version 1
        sock.sendall(bytes([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))
        print(len(sock.recv(100)))
    except (BrokenPipeError, ConnectionResetError):
        print(0)
"""
"""Connect and ask for something; print the process number and the length of the answer."""


def ask(path: str, launcher: tuple[str, ...] = ()) -> tuple[int, int]:
    command = [*launcher, sys.executable, "-c", _ENDING, path]
    pid, length = subprocess.check_output(command, text=True, timeout=20).split()
    return int(pid), int(length)


OPEN_TO_ALL = ("--socket-mode", "0666", "--allow-unsafe-export")
"""For the other user, who may enter the folders of the test."""


@pytest.mark.threat("t_peer")
def test_users_that_are_not_allowed(start_daemon: StartDaemon, other_user: tuple[str, ...]) -> None:
    """One line for each; those that are allowed feel nothing of it."""
    uid = os.geteuid()
    options = ("--allow-uid", "1", "--allow-uid", str(uid), "--once")
    daemon = start_daemon(*options, *OPEN_TO_ALL)
    pids = []
    for _ in range(2):
        pid, length = ask(daemon.socket, other_user)
        assert length == 0
        pids.append(pid)
    with Client(daemon.socket) as client:
        client.attach()
        pid, length = ask(daemon.socket, other_user)
        assert length == 0
        pids.append(pid)
        client.getattr(ROOT)
    assert daemon.process.wait(10) == 0  # who was refused was not the one of --once
    assert daemon.stop() == 0
    assert daemon.log.splitlines() == [
        f"ninepd: test: a front end (pid {pid}, uid {OTHER_USER}) was refused: "
        "--allow-uid names other users"
        for pid in pids
    ]


def test_user_that_is_allowed(start_daemon: StartDaemon, other_user: tuple[str, ...]) -> None:
    daemon = start_daemon("--allow-uid", str(OTHER_USER), *OPEN_TO_ALL)
    assert ask(daemon.socket, other_user)[1] > 0
    assert ask(daemon.socket)[1] == 0


def test_without_a_choice_all_users_are_served(
    start_daemon: StartDaemon, other_user: tuple[str, ...]
) -> None:
    daemon = start_daemon(*OPEN_TO_ALL)
    assert ask(daemon.socket, other_user)[1] > 0
    assert daemon.stop() == 0
    assert daemon.log == ""


def test_user_at_a_listening_descriptor(
    launch: Launch, tmp_path: Path, export: Path, other_user: tuple[str, ...]
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen()
        options = ("--fd", str(listener.fileno()), "--export", str(export), "--tag", "t")
        launch(
            *options,
            "--allow-unsafe-export",
            "--allow-uid",
            str(os.geteuid()),
            pass_fds=(listener.fileno(),),
        )
    assert ask(path, other_user)[1] == 0
    assert ask(path)[1] > 0


@pytest.mark.threat("t_peer")
@pytest.mark.parametrize("allowed", [False, True])
def test_user_of_a_connected_descriptor(launch: Launch, export: Path, allowed: bool) -> None:
    """Whoever made the pair. There is nobody else to wait for: the daemon ends."""
    ours, theirs = socket.socketpair()
    uid = os.geteuid()
    options = ("--fd", str(theirs.fileno()), "--export", str(export), "--tag", "t")
    with ours, theirs:
        process = launch(
            *options, "--allow-uid", str(uid if allowed else uid + 1), pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        if allowed:
            with Client(ours) as client:
                client.attach()
        else:
            assert ours.recv(1) == b""
        assert process.wait(10) == 0
    assert process.stderr is not None
    line = f"ninepd: t: a front end (pid {os.getpid()}, uid {uid}) was refused: --allow-uid"
    assert process.stderr.read() == ("" if allowed else f"{line} names other users\n")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("connected", [False, True])
def test_termination(daemon: Daemon, number: signal.Signals, connected: bool) -> None:
    client = Client(daemon.socket) if connected else None
    if client is not None:
        client.attach()
        client.create(ROOT, 1, b"f")
    with in_time(2):
        daemon.process.send_signal(number)
        assert daemon.process.wait(5) == 0
    assert not os.path.exists(daemon.socket)
    if client is not None:
        client.close()


def test_termination_answers_what_is_in_flight(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.attach()
        for fid in range(1, 33):
            client.create(ROOT, fid, b"%d" % fid)
            client.write(fid, 0, b"x" * 60_000)
        heads = [
            client.driver.submit([encode(tag, Tfsync(tag, 0))], [4096]) for tag in range(1, 33)
        ]
        client.driver.kick()
        done = client.driver.wait_used(count=1)  # so it has taken them
        with in_time(2):
            daemon.process.terminate()
            assert daemon.process.wait(5) == 0
        done += client.driver.take_used()
        assert sorted(head for head, _ in done) == sorted(heads)
        for head, used in done:
            assert isinstance(decode(client.driver.reply(head, used))[1], Rfsync)


def test_termination_under_load(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.attach()
        timer = threading.Timer(0.2, daemon.process.terminate)
        timer.start()
        served = 0
        try:
            while True:
                client.finish(client.submit(encode(1, Tgetattr(ROOT, 0))), 1)
                served += 1
        except TimeoutError:
            pass
        assert served
        assert daemon.process.wait(5) == 0
        timer.join()


def test_hangup_is_harmless(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.attach()
        for _ in range(3):
            daemon.process.send_signal(signal.SIGHUP)
            client.getattr(ROOT)
    assert daemon.process.poll() is None


def test_closed_standard_error_is_harmless(launch: Launch, tmp_path: Path, export: Path) -> None:
    path = str(tmp_path / "socket")
    process = launch("--socket-path", path, "--export", str(export), "--tag", "t", "-v")
    assert process.stderr is not None
    process.stderr.close()
    for _ in range(3):
        with Client(path) as client:
            client.attach()
    process.terminate()
    assert process.wait(5) == 0


def test_closed_standard_error_when_it_cannot_start(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ninepd", "serve", "--export", "/nowhere", "--tag", "t"]
    assert subprocess.run(command, stderr=write, timeout=20).returncode == 2
    os.close(write)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors(
    start_daemon: StartDaemon, tmp_path: Path, export: Path, closed: tuple[int, ...]
) -> None:
    """Their numbers are not given to anything else, which would be written to."""
    shell = "".join(f" {fd}<&-" for fd in closed)
    launcher = ["sh", "-c", f'exec "$@"{shell}', "sh"]
    daemon = start_daemon("-v", "--sandbox", "none", launcher=launcher)
    with Client(daemon.socket) as client:
        client.attach()
        for fd in closed:
            assert os.readlink(f"/proc/{daemon.pid}/fd/{fd}") == "/dev/null"
    assert daemon.stop() == 0


# Several exports


def test_two_exports(start_daemon: StartDaemon, tmp_path: Path, export: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = tmp_path / "config.toml"
    paths = [tmp_path / "one.sock", tmp_path / "two.sock"]
    config.write_text(
        f'[[export]]\nexport = "{export}"\ntag = "one"\nsocket-path = "{paths[0]}"\n'
        f'[[export]]\nexport = "{other}"\ntag = "two"\nsocket-path = "{paths[1]}"\n'
        "readonly = true\nmsize-max = 8192\n"
    )
    daemon = start_daemon(config=str(config))
    with Client(str(paths[0])) as one, Client(str(paths[1])) as two:
        one.attach()
        two.attach(msize=8192)
        assert one.front_end.get_config(5) == b"\x03\0one"
        assert two.front_end.get_config(5) == b"\x03\0two"
        one.create(ROOT, 1, b"f")
        assert two.error(Tgetattr(1, 0)) == "ENOENT"
        with pytest.raises(OSError, match="Read-only"):
            two.create(ROOT, 1, b"f")
    assert os.listdir(export) == ["f"]
    assert os.listdir(other) == []
    with in_time(2):
        assert daemon.stop() == 0
    assert not any(path.exists() for path in paths)


def test_one_socket_in_use_leaves_none_behind(tmp_path: Path, export: Path) -> None:
    """If the second export cannot start, the first one's socket is removed again."""
    config = tmp_path / "config.toml"
    first, second = tmp_path / "first.sock", tmp_path / "second.sock"
    config.write_text(
        f'[[export]]\nexport = "{export}"\ntag = "a"\nsocket-path = "{first}"\n'
        f'[[export]]\nexport = "{export}"\ntag = "b"\nsocket-path = "{second}"\n'
    )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(second))
        sock.listen()
        command = [sys.executable, "-m", "ninepd", "serve", "--config", str(config)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not first.exists()


def test_tag_in_config_space(start_daemon: StartDaemon) -> None:
    tag = "t" * 254
    with Client(start_daemon(tag=tag).socket) as client:
        assert client.front_end.get_config(256) == b"\xfe\0" + tag.encode()
