"""A Linux kernel mounts the control tree: 9P2000, which its client speaks without extensions.

The socket is on the host, the kernel in a guest: a serial line joins them.
"""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ninepd.control.client import Client as ControlClient
from ninepd_guests.boot import boot_uml
from ninepd_guests.machine import Guest
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client

TREE = "/tmp/tree"
MOUNT = (
    f"mkdir {TREE} && (exec 3<>/dev/ttyS1 && stty raw -echo <&3 && "
    f"mount -t 9p -o trans=fd,rfdno=3,wfdno=3,version=9p2000,msize=4096 none {TREE}) && true"
)
"""In a shell of its own: the line must not become the terminal of one that leads a session."""

READ = f"dd bs=1024 2>/dev/null < {TREE}/{{}}"
"""In pieces that the line takes: it loses what comes when there are some 4096 bytes in it."""


@pytest.fixture
def control(start_daemon: StartDaemon, tmp_path: Path) -> Iterator[str]:
    """Its socket. A client holds more than goes into one message."""
    path = str(tmp_path / "control.sock")
    daemon = start_daemon("--control-path", path, "--log-level", "info")
    with Client(daemon.socket) as client:
        client.attach()
        for fid in range(1, 200):
            client.walk(ROOT, fid)
        yield path


@pytest.fixture
def guest(control: str) -> Iterator[Guest]:
    with closing(socket.socket(socket.AF_UNIX)) as line:
        line.connect(control)
        with boot_uml(lines=[line.fileno()]) as guest:
            guest.run(MOUNT)
            yield guest
            guest.run(f"umount {TREE}")


def test_linux_mounts_it(guest: Guest, control: str) -> None:
    found = guest.run(f"cd {TREE} && find . | sort").text.split()
    names = ("clients", "config", "fids", "locks", "stats", "trace")
    files = [f"./exports/test/{name}" for name in names]
    assert found == [".", "./ctl", "./exports", "./exports/test", *files, "./metrics"]
    with ControlClient(control) as client:
        for name in ("config", "fids"):
            here = client.read("exports", "test", name)
            assert guest.run(READ.format(f"exports/test/{name}")).output == here
    assert len(here.splitlines()) == 201
    assert 'ninepd_fids{export="test"} 200.0' in guest.run(READ.format("metrics")).text
    guest.run(f"echo reload > {TREE}/ctl")
    assert guest.run(f"cat {TREE}/ctl").text == "reload: the supervisor has been told\n"
    for wrong, words in (
        (f"echo nonsense > {TREE}/ctl", "Invalid argument"),
        (f"echo x > {TREE}/metrics", "Permission denied"),
        (f"rm -f {TREE}/metrics", "Permission denied"),
        (f"cat {TREE}/nothing", "No such file or directory"),
    ):
        result = guest.run(wrong, check=False)
        assert result.status
        assert words in result.text, result.text
