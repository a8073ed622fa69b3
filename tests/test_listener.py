"""Sockets of the file system: who gets a path, and who removes what is there."""

import fcntl
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.listener import Listener, check_descriptor
from tests.conftest import OTHER_USER, Mount, StartDaemon
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


# Who may connect


def access(path: str | Path) -> tuple[int, int]:
    """Mode and group of a socket."""
    found = os.lstat(path)
    assert stat.S_ISSOCK(found.st_mode)
    return stat.S_IMODE(found.st_mode), found.st_gid


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0o600, os.getegid())),
        ({"socket_mode": "0660"}, (0o660, os.getegid())),
        ({"socket_mode": "777"}, (0o777, os.getegid())),
        ({"socket_mode": "0"}, (0, os.getegid())),
        ({"socket_group": str(os.getegid())}, (0o600, os.getegid())),
    ],
)
@pytest.mark.parametrize("umask", [0, 0o77, 0o777])
def test_mode_and_group(
    tmp_path: Path, options: dict[str, str], expected: tuple[int, int], umask: int
) -> None:
    """Whatever the umask is; and nothing else is left in the folder."""
    if umask == 0o777 and os.geteuid():
        pytest.skip("a folder of this mode is root's only")
    old = os.umask(umask)
    try:
        listener = Listener(Export("/", "t", str(tmp_path / "s"), **options))  # type: ignore[arg-type]
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert access(tmp_path / "s") == expected
    assert os.listdir(tmp_path) == ["s"]
    listener.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("group", ["daemon", "4321"])
def test_group_by_name_and_by_number(
    start_daemon: StartDaemon, as_root: None, tmp_path: Path, group: str
) -> None:
    daemon = start_daemon("--socket-group", group, "--socket-mode", "0660")
    assert access(daemon.socket) == (0o660, {"daemon": 1, "4321": 4321}[group])
    assert sorted(os.listdir(tmp_path)) == ["daemon0.sock", "export"]


def test_mode_and_group_from_a_file(
    start_daemon: StartDaemon, as_root: None, tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'[[export]]\nexport = "{tmp_path}"\ntag = "a"\nsocket-path = "{tmp_path}/a"\n'
        'socket-group = "4321"\nsocket-mode = "0620"\n'
        f'[[export]]\nexport = "{tmp_path}"\ntag = "b"\nsocket-path = "{tmp_path}/b"\n'
    )
    start_daemon(config=str(config))
    assert access(tmp_path / "a") == (0o620, 4321)
    assert access(tmp_path / "b") == (0o600, os.getegid())


def test_group_that_its_user_may_not_give(tmp_path: Path, other_user: tuple[str, ...]) -> None:
    program = (sys.executable, "-m", "ninepd", "serve", "--security-model", "none")
    options = ("--socket-path", tmp_path / "s", "--export", tmp_path, "--tag", "t")
    result = subprocess.run(
        [*other_user, *program, *options, "--socket-group", "0"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ninepd: --socket-group: this user may not give")
    assert os.listdir(tmp_path) == []


def test_group_of_its_own(
    start_daemon: StartDaemon, other_user: tuple[str, ...], tmp_path: Path, export: Path
) -> None:
    """A user may give files to the groups that he is a member of."""
    launcher = [word for word in other_user if word != "--clear-groups"] + ["--groups=4322"]
    options = ["--security-model", "none", "--socket-group", "4322", "--socket-mode", "0660"]
    daemon = start_daemon(*options, launcher=launcher)
    assert access(daemon.socket) == (0o660, 4322)


def test_access_list_of_the_folder_is_not_inherited(tmp_path: Path, mount_ext4: Mount) -> None:
    """It would let in user 4321, as soon as the mode lets in the group."""
    folder = mount_ext4(tmp_path / "m")
    user, group, mask, other = 1, 4, 0x10, 0x20
    entries = [(user, 7, -1), (2, 7, OTHER_USER), (group, 7, -1), (mask, 7, -1), (other, 7, -1)]
    packed = b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(folder, "system.posix_acl_default", struct.pack("<I", 2) + packed)
    listener = Listener(Export("/", "t", str(folder / "s"), socket_mode="0660"))
    try:
        assert os.listxattr(folder / "s") == []
        assert access(folder / "s") == (0o660, os.getegid())
    finally:
        listener.remove()


@pytest.mark.parametrize("target", ["file", "socket", "nothing"])
def test_link_at_the_path_is_not_followed(tmp_path: Path, target: str) -> None:
    path = tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as sock:
        match target:
            case "file":
                path.touch(0o600)
            case "socket":
                sock.bind(str(path))
                path.chmod(0o600)
        (tmp_path / "s").symlink_to(path)
        with pytest.raises(UsageError, match="is no socket"):
            Listener(Export("/", "t", str(tmp_path / "s"), socket_mode="0666"))
    assert (tmp_path / "s").is_symlink()
    assert path.exists() == (target != "nothing")
    if path.exists():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


_CONNECTING = """
import os, select, socket, sys
folder = sys.argv[1]
results = set()
print("running", flush=True)
while not (results and select.select([0], [], [], 0)[0]):
    for name in [*os.listdir(folder), "s"]:
        for path in (name, f"{name}/ninepd"):
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(f"{folder}/{path}")
                except OSError as error:
                    results.add(type(error).__name__)
                else:
                    results.add("connected")
print(*results)
"""
"""Until something comes on standard input, try whatever could be a socket there."""
_EXCHANGING = """
import os, select, sys
folder, victim = sys.argv[1:]
print("running", flush=True)
count = 0
while not select.select([0], [], [], 0)[0]:
    for name in os.listdir(folder):
        if name.startswith(".ninepd-"):
            try:
                os.rename(f"{folder}/{name}", f"{folder}/old{count}")
                os.symlink(victim, f"{folder}/{name}")
            except OSError:
                continue
            count += 1
print(count)
"""
"""Put a link to another folder into the place of each new one."""


@contextmanager
def stranger(
    launcher: tuple[str, ...], program: str, *arguments: str
) -> Iterator[Callable[[], str]]:
    """Another user who runs a program; the call ends it and returns what it says of itself."""
    process = subprocess.Popen(
        [*launcher, sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n"
        yield lambda: process.communicate("stop", timeout=20)[0].strip()
    finally:
        process.kill()
        process.communicate()


def test_stranger_never_connects(
    tmp_path: Path, other_user: tuple[str, ...], start_daemon: StartDaemon
) -> None:
    """Not even for a moment, whichever name the socket has."""
    with stranger(other_user, _CONNECTING, str(tmp_path)) as stop:
        for _ in range(10 * ROUNDS):
            Listener(Export("/", "t", str(tmp_path / "s"), socket_mode="0600")).remove()
        start_daemon("--allow-unsafe-export", "--socket-mode", "0600", socket=str(tmp_path / "s"))
        results = stop().split()
    assert "PermissionError" in results
    assert "connected" not in results


def test_members_of_the_group_connect(
    tmp_path: Path, other_user: tuple[str, ...], start_daemon: StartDaemon
) -> None:
    options = ("--socket-group", str(OTHER_USER), "--socket-mode", "0660")
    start_daemon("--allow-unsafe-export", *options, socket=str(tmp_path / "s"))
    with stranger(other_user, _CONNECTING, str(tmp_path)) as stop:
        assert "connected" in stop()


def test_socket_has_its_mode_from_its_first_moment(tmp_path: Path, as_root: None) -> None:
    """Of many, whenever looked at."""
    path = str(tmp_path / "s")
    child = os.fork()
    if not child:
        for _ in range(10 * ROUNDS):
            export = Export("/", "t", path, socket_group="4321", socket_mode="0666")
            Listener(export).remove()
        os._exit(0)
    seen = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            seen.add(access(path))
        except FileNotFoundError:
            continue
    assert seen == {(0o666, 4321)}


def test_stranger_who_exchanges_folders(tmp_path: Path, other_user: tuple[str, ...]) -> None:
    """In a folder of everybody nothing else is given a mode, and nothing is made elsewhere."""
    folder, victim = tmp_path / "open", tmp_path / "victim"
    folder.mkdir()
    folder.chmod(0o777)
    victim.mkdir(0o700)
    (victim / "ninepd").touch(0o600)
    refused = 0
    with stranger(other_user, _EXCHANGING, str(folder), str(victim)) as stop:
        for number in range(10 * ROUNDS):
            export = Export("/", "t", str(folder / f"s{number}"), socket_mode="0666")
            try:
                Listener(export).remove()
            except UsageError:
                refused += 1
        exchanged = int(stop())
    assert refused <= exchanged
    assert exchanged
    assert os.listdir(victim) == ["ninepd"]
    assert stat.S_IMODE((victim / "ninepd").stat().st_mode) == 0o600


def test_descriptor(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        check_descriptor(sock.fileno())
    with socket.socket(socket.AF_INET) as sock, pytest.raises(UsageError, match="no unix socket"):
        check_descriptor(sock.fileno())
    with (tmp_path / "f").open("w") as file, pytest.raises(UsageError, match="no unix socket"):
        check_descriptor(file.fileno())
    unused = os.dup(0)
    os.close(unused)
    for fd in (unused, 1 << 40):
        with pytest.raises(UsageError, match="--fd"):
            check_descriptor(fd)
