"""What the daemon says on standard error: little, whole lines, and not as often as guests like."""

import logging
import os
import re
import select
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.capabilities import privileged
from ninepd.logs import BURST, LineHandler
from ninepd.p9.messages import Tgetattr, Tread, Tversion, Twrite
from ninepd.vhostuser.messages import Request
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client
from tests.support.frontend import FakeFrontEnd

Capture = pytest.CaptureFixture[str]


def lines(capfd: Capture) -> list[str]:
    """What was written to standard error since the last call."""
    return capfd.readouterr().err.splitlines()


def record(message: str, *args: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("test", level, __file__, 1, message, args, None)


@pytest.mark.threat("t_log")
def test_lines_of_a_kind_are_limited(capfd: Capture) -> None:
    handler = LineHandler()
    for number in range(BURST + 500):
        handler.handle(record("%d is wrong", number))
    handler.handle(record("another kind"))
    handler.flush()
    *first, other, last = lines(capfd)
    assert first == [f"{number} is wrong" for number in range(BURST)]
    assert other == "another kind"
    assert last == f"{BURST + 499} is wrong (and 500 more like this)"


def test_few_lines_have_no_summary(capfd: Capture) -> None:
    handler = LineHandler()
    for _ in range(BURST):
        handler.handle(record("wrong"))
    handler.flush()
    assert lines(capfd) == ["wrong"] * BURST


def test_debugging_is_not_limited(capfd: Capture) -> None:
    handler = LineHandler()
    for _ in range(5 * BURST):
        handler.handle(record("x", level=logging.DEBUG))
    assert len(lines(capfd)) == 5 * BURST


def test_record_that_cannot_be_written(capfd: Capture) -> None:
    """Bytes that are no text, and a reader that has gone."""
    handler = LineHandler()
    handler.handle(record("%s", os.fsdecode(b"\xff")))
    assert lines(capfd) == ["\\udcff"]
    null = os.open(os.devnull, os.O_RDONLY)
    saved = os.dup(2)
    os.dup2(null, 2)  # any write fails
    handler.handle(record("lost"))
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)


@pytest.mark.threat("t_log")
def test_refused_control_messages_are_limited(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    front_end = FakeFrontEnd(daemon.socket)
    for _ in range(300):
        front_end.send(Request.SET_FEATURES, struct.pack("<Q", 1 << 63))
    front_end.get(Request.GET_FEATURES)
    front_end.close()
    assert daemon.stop() == 0
    refused = [line for line in daemon.log.splitlines() if "SET_FEATURES refused" in line]
    assert len(refused) == BURST + 1
    assert refused[-1].endswith(f"(and {300 - BURST} more like this)")


def test_quiet_by_default(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--security-model", "none")
    with Client(daemon.socket) as client:
        client.attach()
    assert daemon.stop() == 0
    assert daemon.log == ""


def test_what_is_served_where(start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon("-v", "--readonly", "--security-model", "none", "--sandbox", "none")
    with Client(daemon.socket) as client:
        client.attach(uid=1000, msize=16384)
    assert daemon.stop() == 0
    first, *others = daemon.log.splitlines()
    assert first == (
        f"ninepd: serving {export} as test at {daemon.socket} "
        "(none, reclaim auto, read-only, sandbox none)"
    )
    (mounted,) = [line for line in others if "mounted" in line]
    assert mounted == "ninepd: test: mounted, version 9P2000.L, msize 16384, user 1000"


def test_passthrough_without_privileges(
    start_daemon: StartDaemon, other_user: tuple[str, ...], export: Path
) -> None:
    export.chmod(0o777)
    daemon = start_daemon("--security-model", "passthrough", launcher=other_user)
    assert daemon.stop() == 0
    (line,) = daemon.log.splitlines()
    assert "as a user other than 4321" in line
    assert "--security-model mapped-xattr" in line


def test_passthrough_with_privileges(start_daemon: StartDaemon, as_root: None) -> None:
    assert privileged()
    daemon = start_daemon()
    assert daemon.stop() == 0
    assert daemon.log == ""


def test_running_out_of_descriptors_is_said_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--reclaim", "names", launcher=["prlimit", "--nofile=256:256"])
    with Client(daemon.socket) as client:
        client.attach()
        fid = 1
        refused = 0
        while refused < 5 * BURST:
            client.walk(ROOT, fid)
            try:
                client.create(ROOT, 10_000 + fid, b"%d" % fid)
            except OSError:
                refused += 1
            fid += 1
    assert daemon.stop() == 0
    (line,) = daemon.log.splitlines()
    assert "descriptors are in use" in line
    assert "LimitNOFILE" in line


def test_every_reply_is_decoded_in_the_trace(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--trace")
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"f")
        client.write(1, 0, b"text")
        client.rpc(Tgetattr(1, 0x3FFF))
        client.read(1, 0, 100)
        client.open(ROOT, 2)
        client.readdir(2)
    assert daemon.stop() == 0
    for kind in (Tversion, Twrite, Tread, Tgetattr):
        assert re.search(rf"tag \d+ {kind.__name__}\(", daemon.log)
    for words in ("Rwrite(nbytes=4)", "Rread(nbytes=4)", "Rreaddir(nbytes="):
        assert words in daemon.log
    (attributes,) = re.findall(r"Rgetattr\(.*", daemon.log)
    assert "size=4" in attributes
    assert not re.search(r"message \d+, \d+ bytes", daemon.log)


def test_standard_error_that_nobody_reads() -> None:
    """Lines get lost, also long ones for which there is not enough room; nobody waits."""
    program = (
        "from ninepd.process import write_error\n"
        "for _ in range(100): write_error('x' * 9999)\n"
        "print('done')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert select.select([process.stdout], [], [], 20)[0]
            assert process.stdout.read() == b"done\n"
        finally:
            process.kill()
        assert process.stderr.read(9999) == 9999 * b"x"
