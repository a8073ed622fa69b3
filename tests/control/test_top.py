"""The live table: its numbers, and its picture on a terminal of 80 by 24."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("rich")

from rich.console import Console

from ninepd.control import metrics
from ninepd.control.top import Row, rows, sample, screen, short
from ninepd.p9.messages import Tgetattr, Twalk
from ninepd.stats import BOUNDS, Stats
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client
from tests.support.vring_rig import RREAD, TREAD, TWRITE, Rig, answered, message
from tests.support.waiting import eventually

TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def text(stats: Stats) -> str:
    return metrics.text(metrics.registry({"one": stats})).decode()


def test_rows_are_what_has_happened_in_between() -> None:
    stats = Stats()
    rig = Rig(stats=stats)
    answered(rig, message(), RREAD, bytes(4))
    before = sample(text(stats))
    for _ in range(6):
        answered(rig, message(b"x" * 16), RREAD, bytes(4), 500)
    answered(rig, message(message_type=TWRITE), 7, (28).to_bytes(4, "little"))
    rig.close()
    reads, writes = rows(before, sample(text(stats)), 2.0)
    assert (reads.export, reads.message, reads.requests, reads.errors) == ("one", "Tread", 3, 0)
    assert (reads.received, reads.sent) == (6 * 23 / 2, 6 * 511 / 2)
    assert reads.p50 in BOUNDS
    assert reads.p50 <= reads.p99
    assert (writes.message, writes.requests, writes.errors) == ("Twrite", 0.5, 0.5)


def test_a_daemon_that_was_started_anew_counts_from_nothing() -> None:
    old, new = Stats(), Stats()
    for stats, count in ((old, 5), (new, 2)):
        rig = Rig(stats=stats)
        for _ in range(count):
            answered(rig, message(message_type=TREAD), RREAD, bytes(4))
        rig.close()
    [row] = rows(sample(text(old)), sample(text(new)), 1.0)
    assert row.requests == 2
    assert rows(sample(text(new)), sample(text(new)), 1.0) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1.024e-6, "1.02us"), (0.25, "250ms"), (137.4, "137s"), (4000, "4000s")],
)
def test_numbers_are_short(value: float, words: str) -> None:
    assert short(value, TIMES) == words


def shown(found: list[Row], lines: int = 24) -> list[str]:
    console = Console(width=80, height=lines)
    with console.capture() as captured:
        console.print(screen(found, 2, lines))
    return captured.get().splitlines()


def test_it_fits() -> None:
    wide = Row("x" * 60, "Txattrcreate", 123456.0, 123456.0, 137.4, 137.4, 123.4e9, 123.4e9)
    lines = shown([wide] * 100)
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "and 82 more"
    row = lines[4]
    assert row.split()[1:] == ["Txattrcreate", "123k", "123k", "137s", "137s", "123G", "123G"]
    assert shown([])[-1] == "no requests"


@contextmanager
def terminal(folder: Path, command: str) -> Iterator[list[str]]:
    """A command on 80 by 24; the list is how to talk to it."""
    tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
    subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "24", command], check=True)
    try:
        yield tmux
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)


def busy(client: Client, stop: threading.Event) -> None:
    while not stop.wait(0.01):
        client.rpc(Tgetattr(ROOT, 0x3FFF))
        client.error(Twalk(ROOT, 1, (b"nothing",)))


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_its_screen(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    daemon = start_daemon("--control-path", path)
    command = f"{sys.executable} -m ninepd top --interval 0.2 --control-path {path}"
    stop = threading.Event()
    with Client(daemon.socket) as client:
        client.attach()
        worker = threading.Thread(target=busy, args=(client, stop))
        worker.start()
        try:
            with terminal(tmp_path, command) as tmux:
                lines: list[str] = []

                def look() -> bool:
                    capture = [*tmux, "capture-pane", "-p"]
                    lines[:] = subprocess.check_output(capture, text=True).splitlines()
                    return any("Twalk" in line for line in lines)

                eventually(look, "the table", 60)
        finally:
            stop.set()
            worker.join()
    assert lines[0].startswith("ninepd: 1 export, ")
    heads = next(line for line in lines if "req/s  " in line).split()
    assert heads == ["export", "message", "req/s", "err/s", "p50", "p99", "in/s", "out/s"]
    [walk] = [line.split() for line in lines if "Twalk" in line]
    assert walk[:2] == ["test", "Twalk"]
    assert walk[2] == walk[3] != "0"
