"""``ninepd check-config``: what would be served, or all that is wrong; and nothing else happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.support.client import Client


def check(path: Path, *launcher: str) -> "subprocess.CompletedProcess[str]":
    command = [*launcher, sys.executable, "-m", "ninepd", "check-config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


@pytest.fixture
def file(tmp_path: Path, export: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(
        f"[defaults]\nexport = '{export}'\nsecurity-model = 'none'\nsandbox = 'none'\n"
        f"[[export]]\ntag = 'one'\nsocket-path = '{tmp_path}/one'\n"
        "[[export]]\ntag = 'two'\nsocket-path = '/run/not/there/yet'\nreadonly = true\n"
        "[[export]]\ntag = 'three'\nfd = 9\n"
    )
    return path


def test_summary(file: Path, tmp_path: Path, export: Path) -> None:
    before = os.listdir(tmp_path)
    result = check(file)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{file}: OK, 3 exports",
        f"  {export} as one at {tmp_path}/one (none, reclaim auto, sandbox none)",
        f"  {export} as two at /run/not/there/yet (none, reclaim auto, read-only, sandbox none)",
        f"  {export} as three at descriptor 9 (none, reclaim auto, sandbox none)",
    ]
    assert os.listdir(tmp_path) == before


def test_daemon_that_serves_the_file(
    start_daemon: StartDaemon, file: Path, tmp_path: Path, export: Path
) -> None:
    file.write_text(
        f"[[export]]\nexport = '{export}'\ntag = 't'\nsocket-path = '{tmp_path}/daemon0.sock'\n"
    )
    daemon = start_daemon(config=str(file))
    socket = os.stat(daemon.socket)
    with Client(daemon.socket) as client:
        client.attach()
        result = check(file)
        assert (result.returncode, result.stderr) == (0, "")
        client.create(0, 1, b"f")
    assert os.path.samestat(os.stat(daemon.socket), socket)
    assert os.listdir(export) == ["f"]


def test_all_that_is_wrong(file: Path) -> None:
    """What the file says, and what only a look at the host tells."""
    text = file.read_text().replace("readonly = true", "host-mounts = 'ignore'\ncolour = 1")
    file.write_text(text + "msize-max = 5\n[[export]]\nhost-mounts = 'ignore'\ntag = 'x'\nfd = 7\n")
    result = check(file)
    assert (result.returncode, result.stdout) == (2, "")
    lines = [line.removeprefix(f"ninepd: {file}, ") for line in result.stderr.splitlines()]
    assert [": ".join(line.split(": ")[:2]) for line in lines] == [
        "line 12 (export 2): --colour",
        "line 16 (export 3): --msize-max",
        "line 18 (export 4): --host-mounts",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("[[export", "is not valid TOML"), ("", "there is no [[export]]")],
)
def test_file_in_which_there_is_nothing(file: Path, text: str | None, words: str) -> None:
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    result = check(file)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ninepd: {file}")
    assert words in line


def test_as_another_user(file: Path, export: Path, other_user: tuple[str, ...]) -> None:
    """It is about the user who runs it."""
    file.write_text(file.read_text().replace("'none'", "'auto'"))
    file.chmod(0o644)
    export.chmod(0o700)
    result = check(file, *other_user)
    assert result.returncode == 2
    assert "cannot be read by this user" in result.stderr
