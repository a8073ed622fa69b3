"""What the daemon says on standard error: little, whole lines, and not as often as guests like."""

import json
import logging
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.capabilities import privileged
from ninepd.journal import Journal
from ninepd.jsonlog import JsonFormatter
from ninepd.logs import BURST, LimitedHandler, concerning, to_standard_error
from ninepd.p9.messages import Tgetattr, Tread, Tversion, Twrite
from ninepd.vhostuser.messages import Request
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client, children
from tests.support.frontend import FakeFrontEnd
from tests.support.journal import FakeJournal, fields_of

Capture = pytest.CaptureFixture[str]


def lines(capfd: Capture) -> list[str]:
    """What was written to standard error since the last call."""
    return capfd.readouterr().err.splitlines()


def record(message: str, *args: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("test", level, __file__, 1, message, args, None)


@pytest.mark.threat("t_log")
def test_lines_of_a_kind_are_limited(capfd: Capture) -> None:
    handler = LimitedHandler(to_standard_error(logging.Formatter()))
    for number in range(BURST + 500):
        handler.handle(record("%d is wrong", number))
    handler.handle(record("another kind"))
    handler.flush()
    *first, other, last = lines(capfd)
    assert first == [f"{number} is wrong" for number in range(BURST)]
    assert other == "another kind"
    assert last == f"{BURST + 499} is wrong (and 500 more like this)"


def test_few_lines_have_no_summary(capfd: Capture) -> None:
    handler = LimitedHandler(to_standard_error(logging.Formatter()))
    for _ in range(BURST):
        handler.handle(record("wrong"))
    handler.flush()
    assert lines(capfd) == ["wrong"] * BURST


def test_debugging_is_not_limited(capfd: Capture) -> None:
    handler = LimitedHandler(to_standard_error(logging.Formatter()))
    for _ in range(5 * BURST):
        handler.handle(record("x", level=logging.DEBUG))
    assert len(lines(capfd)) == 5 * BURST


def test_record_that_cannot_be_written(capfd: Capture) -> None:
    """Bytes that are no text, and a reader that has gone."""
    handler = LimitedHandler(to_standard_error(logging.Formatter()))
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


# Formats


def objects(daemon_log: str) -> list[dict[str, Any]]:
    """The objects on the lines of a log, which has nothing else."""
    return [json.loads(line) for line in daemon_log.splitlines()]


def test_levels(start_daemon: StartDaemon) -> None:
    """Each is silent about less."""
    seen = []
    for level in ("error", "warning", "info", "debug"):
        daemon = start_daemon("--log-level", level)
        front_end = FakeFrontEnd(daemon.socket)
        front_end.send(Request.SET_FEATURES, struct.pack("<Q", 1 << 63))
        front_end.get(Request.GET_FEATURES)
        front_end.close()
        assert daemon.stop() == 0
        seen.append([word in daemon.log for word in ("refused", "serving", "GET_FEATURES")])
    assert seen == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_json(start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon("-v", "--log-format", "json", "--security-model", "none")
    with Client(daemon.socket) as client:
        client.attach()
    assert daemon.stop() == 0
    lines = objects(daemon.log)
    serving = next(line for line in lines if line["message"].startswith("serving "))
    (mounted,) = [line for line in lines if "mounted" in line["message"]]
    assert serving.keys() == {"time", "level", "logger", "export", "message"}
    assert (serving["export"], serving["logger"]) == ("test", "ninepd.supervisor")
    assert mounted["guest_pid"] == os.getpid()
    assert (mounted["level"], mounted["export"]) == ("info", "test")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", mounted["time"])


def test_trace_in_json(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--trace", "--log-format", "json")
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"name \xff")
        with pytest.raises(OSError, match="No such"):
            client.walk(ROOT, 2, b"missing")
    assert daemon.stop() == 0
    requests = [line["p9"] for line in objects(daemon.log) if "p9" in line]
    by_type = {p9["type"]: p9 for p9 in requests if "type" in p9}
    assert by_type["Twalk"]["fields"]["names"] == ["missing"]
    assert by_type["Tlcreate"]["fields"]["name"] == r"name \xff"
    assert by_type["Rlcreate"]["tag"] == by_type["Tlcreate"]["tag"]
    assert by_type["Rlcreate"]["fields"]["qid"].keys() == {"type", "version", "path"}


def test_json_is_limited_and_keeps_to_a_line(capfd: Capture) -> None:
    handler = LimitedHandler(to_standard_error(JsonFormatter()))
    with concerning("a\nb\udcff"):
        for number in range(BURST + 2):
            handler.handle(record("%d\n\udcff", number))
    with concerning("another"):
        handler.handle(record("text"))
    handler.flush()
    *first, other, last = map(json.loads, lines(capfd))
    assert [line["message"] for line in first] == [f"{n}\n\\udcff" for n in range(BURST)]
    assert other["export"] == "another"
    assert last["message"] == f"{BURST + 1}\n\\udcff (and 2 more like this)"
    assert last["export"] == "a\nb\\udcff"


def test_exception_in_json(capfd: Capture) -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        failed = record("a bug")
        failed.exc_info = (type(error), error, error.__traceback__)
    LimitedHandler(to_standard_error(JsonFormatter())).handle(failed)
    (line,) = map(json.loads, lines(capfd))
    assert line["message"] == "a bug"
    assert line["exception"].endswith("ValueError: why")


# The journal


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Of a datagram socket: the daemon's, and the journal's, which takes a few at once."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield ours, theirs


Ends = tuple[socket.socket, socket.socket]


@pytest.mark.threat("t_log")
def test_a_line_cannot_add_fields(ends: Ends) -> None:
    handler = LimitedHandler(Journal(ends[0]).write)
    with concerning("tag\nPRIORITY=0"):
        handler.handle(record("%s", "text\nPRIORITY=0", level=logging.ERROR))
    assert fields_of(ends[1].recv(9999)) == {
        "MESSAGE": "text\nPRIORITY=0",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "ninepd",
        "LOGGER": "test",
        "EXPORT": "tag\nPRIORITY=0",
    }


@pytest.mark.threat("t_log")
def test_lines_in_the_journal_are_limited(ends: Ends) -> None:
    handler = LimitedHandler(Journal(ends[0]).write)
    for number in range(BURST + 5):
        handler.handle(record("%d is wrong", number))
        if number < BURST:
            assert fields_of(ends[1].recv(9999))["MESSAGE"] == f"{number} is wrong"
    handler.flush()
    last = fields_of(ends[1].recv(9999, socket.MSG_DONTWAIT))
    assert (last["MESSAGE"], last["PRIORITY"]) == ("14 is wrong (and 5 more like this)", "4")


def test_message_that_is_too_long_for_the_journal(ends: Ends) -> None:
    Journal(ends[0]).write(record("x" * (1 << 20)))
    assert fields_of(ends[1].recv(1 << 20, socket.MSG_DONTWAIT))["MESSAGE"] == "x" * (32 << 10)


def test_journal_that_takes_nothing(ends: Ends, capfd: Capture) -> None:
    """Nobody waits for it, and what it does not take is said on standard error."""
    write = Journal(ends[0]).write
    sent = 0
    while not (said := lines(capfd)):
        write(record("wrong"))
        sent += 1
    assert sent > 1
    assert said == ["ninepd: wrong"]
    ends[1].close()
    write(record("it has gone"))
    assert lines(capfd) == ["ninepd: it has gone"]


@pytest.fixture
def journal(mount: Mount) -> Iterator[FakeJournal]:
    """Where the daemons that a test starts look for it."""
    folder = mount(Path("/run"), "-t", "tmpfs", "none") / "systemd/journal"
    folder.mkdir(parents=True)
    journal = FakeJournal(folder / "socket")
    yield journal
    journal.close()


def test_daemon_and_journal(start_daemon: StartDaemon, journal: FakeJournal) -> None:
    """Also after it is shut in."""
    daemon = start_daemon("--trace", "--log-format", "journal")
    with Client(daemon.socket) as client:
        client.attach()
    assert daemon.stop() == 0
    assert daemon.log == ""
    entries = journal.entries()
    (mounted,) = [entry for entry in entries if "mounted" in entry["MESSAGE"]]
    assert (mounted["EXPORT"], mounted["GUEST_PID"]) == ("test", str(os.getpid()))
    assert mounted["PRIORITY"] == "6"
    (attach,) = [entry for entry in entries if entry.get("P9_TYPE") == "Tattach"]
    assert (attach["PRIORITY"], attach["P9_TAG"].isdigit()) == ("7", True)


def test_each_line_of_a_supervisor_names_its_export(
    start_daemon: StartDaemon, tmp_path: Path, export: Path, journal: FakeJournal
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{export}"\ntag = "{tag}"\nsocket-path = "{tmp_path}/{tag}"\n'
            for tag in ("one", "two")
        )
    )
    daemon = start_daemon("-v", "--log-format", "journal", config=str(config))
    _, second = children(daemon.pid)
    os.kill(second, signal.SIGKILL)
    Client(str(tmp_path / "two")).close()  # of its successor
    assert daemon.stop() == 0
    entries = journal.entries()
    assert {entry["EXPORT"] for entry in entries} == {"one", "two"}
    assert any("SIGKILL" in entry["MESSAGE"] for entry in entries)
    for entry in entries:
        assert re.search(rf"\b{entry['EXPORT']}\b", entry["MESSAGE"])


def test_standard_error_that_is_the_journal(
    start_daemon: StartDaemon, export: Path, mount: Mount, tmp_path: Path
) -> None:
    """Where its socket is out of reach, lines have their priorities in front (sd-daemon(3))."""
    mount(Path("/run"), "-t", "tmpfs", "none")
    script = 'export JOURNAL_STREAM=$(stat -L -c %d:%i /dev/fd/2); exec "$@"'
    daemon = start_daemon("-v", "--log-format", "journal", launcher=("sh", "-c", script, "sh"))
    assert daemon.stop() == 0
    assert re.search(r"^<6>serving .* as test", daemon.log, re.MULTILINE)
    assert all(line.startswith("<6>") for line in daemon.log.splitlines())


def test_no_journal_at_all(export: Path, mount: Mount, tmp_path: Path) -> None:
    mount(Path("/run"), "-t", "tmpfs", "none")
    command = [sys.executable, "-m", "ninepd", "serve", "--log-format", "journal"]
    command += ["--socket-path", str(tmp_path / "s"), "--export", str(export), "--tag", "t"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ninepd: --log-format: the journal cannot be reached (No such file")
