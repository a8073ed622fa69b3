"""File systems that are the kernel's own controls: guests do not enter them unasked."""

import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.p9.messages import NOFID, Tattach, Tmkdir, Twalk
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client

pytestmark = pytest.mark.usefixtures("as_root")

KINDS = ("proc", "sysfs", "debugfs", "tracefs", "cgroup2", "securityfs", "bpf", "devpts")


@pytest.mark.threat("t_magic")
@pytest.mark.parametrize("kind", KINDS)
def test_refused(client: Client, export: Path, mount: Mount, kind: str) -> None:
    """The name is listed, as something that one may not enter; its neighbours are not touched."""
    mount(export / "m", "-t", kind, "none")
    (export / "d").mkdir()
    assert client.error(Twalk(ROOT, 1, (b"m",))) == "EACCES"
    assert client.error(Tattach(1, NOFID, b"", b"m", 0)) == "EACCES"
    assert client.error(Tmkdir(ROOT, b"m", 0o755, 0)) == "EEXIST"
    assert client.names(ROOT) == {b"m", b"d"}
    client.walk(ROOT, 1, b"d")


@pytest.mark.threat("t_magic")
def test_one_of_its_files(client: Client, export: Path, mount: Mount) -> None:
    (export / "f").write_text("")
    subprocess.run(["mount", "--bind", "/proc/version", export / "f"], check=True)
    try:
        assert client.error(Twalk(ROOT, 1, (b"f",))) == "EACCES"
    finally:
        subprocess.run(["umount", export / "f"], check=True)


def test_the_log_says_so_once(start_daemon: StartDaemon, export: Path, mount: Mount) -> None:
    for place in ("a", "b"):
        mount(export / place, "-t", "proc", "none")
    daemon = start_daemon()
    with Client(daemon.socket) as client:
        client.attach()
        for walked in (b"a", b"b", b"a"):
            assert client.error(Twalk(ROOT, 1, (walked,))) == "EACCES"
    daemon.stop()
    assert daemon.log.count("--allow-kernel-filesystems") == 1
    assert "proc" in daemon.log


def test_allowed(start_daemon: StartDaemon, export: Path, mount: Mount) -> None:
    mount(export / "m", "-t", "proc", "none")
    daemon = start_daemon("--allow-kernel-filesystems")
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"m", b"version")
        assert client.read(1, 0, 100).startswith(b"Linux version")


def test_root_of_an_export(tmp_path: Path) -> None:
    """Said in one sentence, at start."""
    socket = str(tmp_path / "s")
    command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", socket, "--tag", "t"]
    ended = subprocess.run(
        [*command, "--export", "/proc"], capture_output=True, text=True, check=False, timeout=20
    )
    assert ended.returncode
    assert "--export: /proc" in ended.stderr
    assert "--allow-kernel-filesystems" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()
