"""Fixtures of all tests: a live daemon on a fresh directory, and a client on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client import Client, Daemon

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The directory that is served."""
    path = tmp_path / "export"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def start_daemon(tmp_path: Path, export: Path) -> Iterator[StartDaemon]:
    """Start daemons with chosen options; all of them end with the test, without a stain."""
    started: list[Daemon] = []

    def start(*arguments: str, **keywords: str) -> Daemon:
        socket = keywords.setdefault("socket", str(tmp_path / f"daemon{len(started)}.sock"))
        keywords.setdefault("export", str(export))
        daemon = Daemon(*arguments, **keywords)
        started.append(daemon)
        assert daemon.socket == socket
        return daemon

    yield start
    for daemon in started:
        daemon.stop()
        assert "bug" not in daemon.log, daemon.log
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """Attached as root: fid 0 is the root of the export."""
    with Client(daemon.socket) as client:
        client.attach()
        yield client
