"""Directories that something is mounted on as soon as they are entered."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.p9.messages import NOFID, Rwalk, Tattach, Twalk, decode, encode
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client

pytestmark = pytest.mark.usefixtures("as_root")


def test_automount_point(start_daemon: StartDaemon, export: Path, mount: Mount) -> None:
    """debugfs/tracing is one: it is mounted by the walk, which shows what is there then."""
    mount(export / "m", "-t", "debugfs", "none")
    daemon = start_daemon("--allow-kernel-filesystems")
    with Client(daemon.socket) as client:
        client.attach()
        (above, qid) = client.walk(ROOT, 1, b"m", b"tracing")
        assert b"available_tracers" in client.names(1)
        assert client.walk(1, 2) == ()
        client.open(ROOT, 3, b"m")
        (entry,) = [entry for entry in client.listing(3) if entry.name == b"tracing"]
        assert entry.shows(qid)
        assert client.walk(1, 4, b"..")[0].path == above.path
        client.open(ROOT, 5, b"m", b"tracing", b"available_tracers")
        assert b"nop" in client.read(5, 0, 1000)


def test_attach_to_an_automount_point(
    start_daemon: StartDaemon, export: Path, mount: Mount
) -> None:
    mount(export / "m", "-t", "debugfs", "none")
    daemon = start_daemon("--allow-kernel-filesystems")
    with Client(daemon.socket) as client:
        client.attach()
        client.rpc(Tattach(1, NOFID, b"", b"m/tracing", 0))
        assert b"available_tracers" in client.names(1)


class Automounter:
    """tests/support/autofs_mount.py as a process of its own."""

    def __init__(self, target: Path) -> None:
        target.mkdir()
        self.target = target
        program = Path(__file__).parents[1] / "support/autofs_mount.py"
        self._process = subprocess.Popen(
            [sys.executable, program, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.expect("ready")

    def expect(self, line: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == line + "\n"

    def go_on(self) -> None:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        # The tmpfs, if it was mounted, and autofs.
        while subprocess.run(["umount", "--lazy", self.target], check=False).returncode == 0:
            pass


@pytest.fixture
def automounter(export: Path) -> Iterator[Automounter]:
    """For ``auto`` in the export."""
    started = Automounter(export / "auto")
    yield started
    started.close()


def test_autofs(automounter: Automounter, client: Client, export: Path) -> None:
    """The walk waits for the mount, and others do not wait for the walk."""
    (export / "d").mkdir()
    (export / "d/f").write_text("")
    client.open(ROOT, 1)
    assert b"auto" in {entry.name for entry in client.listing(1)}  # mounts nothing
    head = client.submit(encode(7, Twalk(ROOT, 2, (b"auto", b"inside"))))
    automounter.expect("asked")
    for _ in range(10):
        client.getattr(ROOT)
    client.walk(ROOT, 5, b"d")
    assert client.names(5) == {b"f"}
    automounter.go_on()
    _, reply = decode(client.finish(head))
    assert isinstance(reply, Rwalk)
    assert client.walk(ROOT, 3, b"auto", b"inside") == reply.qids
    client.open(ROOT, 4, b"auto")
    assert b"inside" in {entry.name for entry in client.listing(4)}
    (entry,) = [entry for entry in client.listing(1) if entry.name == b"auto"]
    assert entry.shows(reply.qids[0])
