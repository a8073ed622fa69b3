"""Which security model serves an export, and which options go with it."""

import os
from pathlib import Path

import pytest

from tests.conftest import OTHER_USER, Mount, StartDaemon
from tests.support.client import ROOT, Client, Daemon
from tests.support.mapped import make


def chosen(daemon: Daemon) -> str:
    """The line that says so."""
    assert daemon.stop() == 0
    (line,) = [line for line in daemon.log.splitlines() if "security model" in line]
    return line


def test_root_serves_real_owners(start_daemon: StartDaemon, export: Path, as_root: None) -> None:
    daemon = start_daemon("-v")
    with Client(daemon.socket) as client:
        client.attach(1000)
        make(client, ROOT, "file", b"x", 0o640, 2000)
    assert (export / "x").stat().st_uid == 1000
    assert "security model passthrough, because" in chosen(daemon)


def test_others_map_owners(
    start_daemon: StartDaemon, export: Path, other_user: tuple[str, ...]
) -> None:
    os.chown(export, OTHER_USER, OTHER_USER)
    daemon = start_daemon("-v", launcher=other_user)
    assert os.listdir(export) == os.listxattr(export) == []
    with Client(daemon.socket) as client:
        client.attach(1000)
        make(client, ROOT, "file", b"x", 0o640, 2000)
        client.walk(ROOT, 1, b"x")
        assert client.getattr(1).uid == 1000
    assert (export / "x").stat().st_uid == OTHER_USER
    assert os.getxattr(export / "x", "user.virtfs.uid") == (1000).to_bytes(4, "little")
    assert "security model mapped-xattr, because" in chosen(daemon)


def test_where_nothing_may_be_written(
    start_daemon: StartDaemon, export: Path, other_user: tuple[str, ...]
) -> None:
    daemon = start_daemon("-v", launcher=other_user)
    assert "security model mapped-xattr, because" in chosen(daemon)


def test_without_extended_attributes(
    start_daemon: StartDaemon, export: Path, mount: Mount, other_user: tuple[str, ...]
) -> None:
    top = mount(export / "m", "-t", "ramfs", "none")
    top.chmod(0o777)
    daemon = start_daemon("-v", export=str(top), launcher=other_user)
    assert os.listdir(top) == []
    assert "security model mapped-file, because" in chosen(daemon)


@pytest.mark.parametrize("option", ["--fmode", "--dmode"])
@pytest.mark.parametrize("model", ["passthrough", "none", "auto"])
def test_modes_where_they_mean_nothing(
    start_daemon: StartDaemon, option: str, model: str, as_root: None
) -> None:
    with pytest.raises(AssertionError, match=f"{option}: with .* the guest's modes are the host's"):
        start_daemon(option, "0640", "--security-model", model)


def test_modes_in_a_file(start_daemon: StartDaemon, tmp_path: Path, export: Path) -> None:
    config, socket = tmp_path / "c.toml", str(tmp_path / "s")
    config.write_text(
        f'[[export]]\nexport = "{export}"\ntag = "x"\nsocket-path = "{socket}"\n'
        'security-model = "mapped-xattr"\nfmode = "0644"\ndmode = "755"\n'
    )
    start_daemon(config=str(config), socket=socket)
    with Client(socket) as client:
        client.attach()
        make(client, ROOT, "file", b"f", 0o600, 0)
        make(client, ROOT, "directory", b"d", 0o700, 0)
    assert [(export / name).stat().st_mode & 0o777 for name in "fd"] == [0o644, 0o755]
