"""Sockets that systemd has made and hands over."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.activation import take_activated
from ninepd.errors import UsageError
from tests.conftest import StartDaemon
from tests.support.activating import activating
from tests.support.client import ROOT, Client, Daemon, children
from tests.support.waiting import eventually


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Exports by their tags; each has a file of that name."""
    found = {tag: tmp_path / f"folder-{tag}" for tag in ("one", "two")}
    for tag, folder in found.items():
        folder.mkdir()
        (folder / tag).touch()
    return found


def write_config(tmp_path: Path, folders: dict[str, Path], more: str = "") -> str:
    path = tmp_path / "config.toml"
    tables = (f'[[export]]\nexport = "{at}"\ntag = "{tag}"\n{more}' for tag, at in folders.items())
    path.write_text("".join(tables))
    return str(path)


def served(path: str) -> set[bytes]:
    with Client(path) as client:
        client.attach()
        return client.names(ROOT)


def refusal(sockets: list[str], *arguments: str) -> str:
    """What the daemon says, in one line, when it does not start."""
    result = subprocess.run(
        [*activating(*sockets), sys.executable, "-m", "ninepd", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("name", ["", "ninepd@one.socket", "two"])
def test_one_socket_and_one_export_need_no_name(
    start_daemon: StartDaemon, tmp_path: Path, folders: dict[str, Path], name: str
) -> None:
    path = str(tmp_path / "s")
    config = write_config(tmp_path, {"one": folders["one"]})
    daemon = start_daemon(config=config, launcher=activating(f"{name}={path}"))
    for _ in range(2):
        assert served(path) == {b"one"}
    assert daemon.stop() == 0
    assert daemon.log == ""
    assert os.path.exists(path)  # it is systemd's


def test_options_of_the_command_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = str(tmp_path / "s")
    options = ("--export", str(folders["one"]), "--tag", "one", "--once")
    command = [*activating(f"={path}"), sys.executable, "-m", "ninepd", "serve", *options]
    process = subprocess.Popen(command)
    try:
        eventually(lambda: os.path.exists(path), "listening")
        assert served(path) == {b"one"}
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def supervisor(
    start_daemon: StartDaemon, tmp_path: Path, folders: dict[str, Path]
) -> tuple[Daemon, str, str]:
    """And its sockets, which are handed over in another order than that of the exports."""
    one, two = str(tmp_path / "1"), str(tmp_path / "2")
    launcher = activating(f"two={two}", f"one={one}")
    return start_daemon(config=write_config(tmp_path, folders), launcher=launcher), one, two


def test_sockets_go_by_their_names(supervisor: tuple[Daemon, str, str]) -> None:
    daemon, one, two = supervisor
    assert (served(one), served(two)) == ({b"one"}, {b"two"})
    assert daemon.stop() == 0
    assert daemon.log == ""
    assert os.path.exists(one)
    assert os.path.exists(two)


def test_process_that_dies(supervisor: tuple[Daemon, str, str]) -> None:
    """The next goes on with the same socket."""
    daemon, one, _ = supervisor
    first = children(daemon.pid)[0]
    assert served(one) == {b"one"}
    os.kill(first, signal.SIGKILL)
    eventually(lambda: first not in children(daemon.pid), "its end")
    assert served(one) == {b"one"}
    assert os.path.exists(one)


def test_beside_a_socket_of_its_own(
    start_daemon: StartDaemon, tmp_path: Path, folders: dict[str, Path]
) -> None:
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    config = Path(write_config(tmp_path, folders))
    config.write_text(config.read_text() + f'socket-path = "{ours}"\n')  # of the last
    daemon = start_daemon(config=str(config), launcher=activating(f"one={theirs}"))
    assert (served(ours), served(theirs)) == ({b"two"}, {b"one"})
    daemon.stop()
    assert not os.path.exists(ours)
    assert os.path.exists(theirs)


def test_socket_that_is_named_by_its_number(
    start_daemon: StartDaemon, tmp_path: Path, folders: dict[str, Path]
) -> None:
    path = str(tmp_path / "s")
    config = write_config(tmp_path, {"one": folders["one"]}, "fd = 3\n")
    daemon = start_daemon("-v", config=config, launcher=activating(f"else={path}"))
    assert served(path) == {b"one"}
    daemon.stop()
    assert f"as one at {path} " in daemon.log


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["one"], r"line 6 \(export 2\): --tag: systemd has no sockets named 'two'"),
        (["one", "tow"], r"export 2\): .*FileDescriptorName=two"),
        (["one", "two", "three"], r"^ninepd: LISTEN_FDNAMES: no export takes the socket 'three'"),
        (["one", "two", "two"], r"export 2\): --tag: systemd has 2 sockets named 'two'"),
        (["", ""], r"line 3 \(export 1\): --tag: systemd has no sockets named 'one'"),
    ],
)
def test_names_that_do_not_fit(
    tmp_path: Path, folders: dict[str, Path], names: list[str], words: str
) -> None:
    sockets = [f"{name}={tmp_path}/{number}" for number, name in enumerate(names)]
    line = refusal(sockets, "--config", write_config(tmp_path, folders))
    assert re.search(words, line)


def test_socket_that_no_export_takes(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Whoever connected would wait for ever."""
    config = write_config(tmp_path, {"one": folders["one"]}, f'socket-path = "{tmp_path}/mine"\n')
    line = refusal([f"one={tmp_path}/s"], "--config", config)
    assert line.startswith("ninepd: LISTEN_FDNAMES: no export takes the socket 'one'")
    assert not os.path.exists(f"{tmp_path}/mine")


def test_socket_that_cannot_be_served(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = write_config(tmp_path, {"one": folders["one"]})
    line = refusal([f"one=DGRAM@{tmp_path}/s"], "--config", config)
    assert line.startswith("ninepd: LISTEN_FDS: descriptor 3, 'one', is no unix socket")


@pytest.mark.parametrize("key", ["socket-mode", "socket-group"])
def test_group_and_mode_are_systemds(tmp_path: Path, folders: dict[str, Path], key: str) -> None:
    config = write_config(tmp_path, {"one": folders["one"]}, f'{key} = "0"\n')
    line = refusal([f"one={tmp_path}/s"], "--config", config)
    assert f"line 4 (export 1): --{key}:" in line
    assert "systemd" in line


VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def activation(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("count", ["", "x", "-1", "1.5", "٣"])
def test_number_of_sockets_that_is_none(monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    activation(monkeypatch, str(os.getpid()), count, "a")
    with pytest.raises(UsageError, match=r"^LISTEN_FDS: "):
        take_activated()


@pytest.mark.parametrize(("count", "names"), [("1", "a:b"), ("2", "a"), ("0", "a")])
def test_as_many_names_as_sockets(monkeypatch: pytest.MonkeyPatch, count: str, names: str) -> None:
    activation(monkeypatch, str(os.getpid()), count, names)
    with pytest.raises(UsageError, match=r"^LISTEN_FDNAMES: "):
        take_activated()


def test_descriptors_that_are_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    activation(monkeypatch, str(os.getpid()), "1000000000", "")
    monkeypatch.delenv("LISTEN_FDNAMES")
    with pytest.raises(UsageError, match=r"^LISTEN_FDS: descriptor \d+, 'unknown', is no unix"):
        take_activated()


@pytest.mark.parametrize("pid", ["1", "", "x"])
def test_sockets_of_another_process(monkeypatch: pytest.MonkeyPatch, pid: str) -> None:
    """Of a parent's that does not clean up its environment."""
    activation(monkeypatch, pid, "1", "a")
    assert take_activated() == ()
    assert not set(VARIABLES) & set(os.environ)
