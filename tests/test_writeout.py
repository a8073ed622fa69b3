"""``--writeout immediate``: the disk begins with what is written at once, as with QEMU's server."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from ninepd.p9.messages import Rgetattr, Rwrite, Tgetattr, Twrite, decode
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client, receive, send
from tests.support.tracing import traced
from tests.support.waiting import eventually

BEGIN = "SYNC_FILE_RANGE_WAIT_BEFORE|SYNC_FILE_RANGE_WRITE"
DATA = b"x" * 5000


@pytest.fixture
def disk(export: Path, mount_ext4: Mount) -> Path:
    """A file system that has dirty pages: the export."""
    return mount_ext4(export)


def ranges(calls: list[str]) -> list[tuple[int, int]]:
    """(offset, length) of what was handed to the disk."""
    found = [re.match(r"sync_file_range\(\d+, (\d+), (\d+), ([A-Z_|]+)", call) for call in calls]
    assert all(match and match[3] == BEGIN for match in found)
    return [(int(match[1]), int(match[2])) for match in found if match]


@pytest.mark.parametrize("model", ["passthrough", "mapped-xattr", "mapped-file"])
def test_each_write_goes_out(
    start_daemon: StartDaemon, disk: Path, tmp_path: Path, model: str
) -> None:
    daemon = start_daemon("--writeout", "immediate", "--security-model", model)
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"f")
        with traced(daemon.pid, tmp_path / "log", "-e", "trace=sync_file_range") as tracer:
            assert client.write(1, 0, DATA) == len(DATA)
            assert client.write(1, 70000, b"text") == 4
            assert client.write(1, 3, b"") == 0
            client.read(1, 0, 10)
            assert ranges(tracer.calls()) == [(0, len(DATA)), (70000, 4)]
        assert client.read(1, 70000, 10) == b"text"


@pytest.mark.parametrize("options", [(), ("--writeout", "immediate", "--readonly")])
def test_nothing_goes_out_unasked(
    start_daemon: StartDaemon, disk: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (disk / "f").write_bytes(DATA)
    daemon = start_daemon(*options)
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=os.O_RDONLY if options else os.O_RDWR)
        with traced(daemon.pid, tmp_path / "log", "-e", "trace=sync_file_range") as tracer:
            client.error(Twrite(1, 0, len(DATA)), DATA)
            assert tracer.calls() == []


def test_no_dirty_pages_stay(start_daemon: StartDaemon, disk: Path) -> None:
    """As the kernel sees it: the file's blocks are allocated, which ext4 puts off until then."""
    path = disk / "f"
    for options, blocks in (((), False), (("--writeout", "immediate"), True)):
        path.unlink(missing_ok=True)
        daemon = start_daemon(*options)
        with Client(daemon.socket) as client:
            client.attach()
            client.create(ROOT, 1, b"f")
            client.write(1, 0, DATA)
            assert written_out(path) == blocks


def written_out(path: Path) -> bool:
    """Has ext4 found places on the disk for all of a file? Else it says so of its extents."""
    command = ["filefrag", "-v", str(path)]
    extents = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "eof" in extents
    return "delalloc" not in extents


def test_lost_data_is_told(start_daemon: StartDaemon, disk: Path, tmp_path: Path) -> None:
    """The kernel tells the error of an earlier write once, and here it is that we ask."""
    daemon = start_daemon("--writeout", "immediate")
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"f")
        options = ("-e", "inject=sync_file_range:error=EIO")
        with traced(daemon.pid, tmp_path / "log", *options):
            assert client.error(Twrite(1, 0, len(DATA)), DATA) == "EIO"
        assert client.write(1, 0, DATA) == len(DATA)


def test_slow_disk_holds_up_nothing_else(
    start_daemon: StartDaemon, disk: Path, tmp_path: Path
) -> None:
    """Neither the ring nor a front end that wants it to rest: the data is out of guest memory."""
    daemon = start_daemon("--writeout", "immediate")
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"f")
        log = tmp_path / "log"
        with traced(daemon.pid, log, "-e", "inject=sync_file_range:delay_enter=3600s") as tracer:
            late = send(client, Twrite(1, 0, len(DATA)), DATA)
            eventually(lambda: "sync_file_range" in log.read_text(), "the disk is asked")
            quick = send(client, Tgetattr(1, 0x3FFF), tag=7)
            (first,) = client.driver.wait_used(10)
            assert first[0] == quick
            assert isinstance(decode(client.driver.reply(*first))[1], Rgetattr)
            client.start(client.front_end.stop())
            tracer.close()  # who lets go of those that wait
            assert receive(client, late) == Rwrite(len(DATA))
