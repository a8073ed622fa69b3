"""Messages of a live export, as somebody follows them."""

import asyncio
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from ninepd.control.client import Client as ControlClient
from ninepd.control.pairs import Pairs
from ninepd.control.questions import Questions
from ninepd.control.trace import Trace
from ninepd.p9.messages import Twalk
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, children
from tests.support.waiting import eventually

FOREVER = 20
LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{6} +\d+ us  tag \d+ (.*)")

Follow = Callable[..., "Follower"]


class Follower:
    """``ninepd trace`` in a process of its own; its lines, without their times."""

    def __init__(self, path: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "ninepd", "trace", "test", "--control-path", path]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def close(self) -> None:
        self.process.kill()
        self._reader.join()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.append(line)

    def begin(self, client: Client) -> None:
        """It follows from now on: something was seen."""

        def seen() -> bool:
            client.getattr(ROOT)
            return bool(self.take())

        eventually(seen, "the first line", FOREVER)
        eventually(lambda: not self.take(), "the last of them")

    def take(self) -> list[str]:
        """Those that have come since."""
        taken = self._lines[:]
        del self._lines[: len(taken)]
        return taken

    def rest(self) -> list[str]:
        """When it has ended."""
        self._reader.join()
        return self.take()

    def until(self, text: str) -> list[str]:
        """All lines from the last call on, to the first that has this text."""
        found: list[str] = []

        def there() -> bool:
            found.extend(self.take())
            return any(text in line for line in found)

        eventually(there, text, FOREVER)
        parts = [LINE.fullmatch(line.rstrip("\n")) for line in found]
        assert None not in parts, found
        return [part[1] for part in parts if part is not None]


class Beating:
    """Requests all the time, from another thread, as long as the context lasts."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        while not self._end.wait(0.01):
            self._client.getattr(ROOT)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def control(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def daemon(start_daemon: StartDaemon, control: str) -> Daemon:
    return start_daemon("--control-path", control)


@pytest.fixture
def follow(control: str) -> Iterator[Follow]:
    with ExitStack() as stack:

        def do(*arguments: str) -> Follower:
            follower = Follower(control, arguments)
            stack.callback(follower.close)
            return follower

        yield do


def test_each_request_with_its_reply(
    follow: Follow, client: Client, daemon: Daemon, export: Path
) -> None:
    (export / "folder").mkdir()
    (export / "folder/file").write_text("content")
    follower = follow()
    follower.begin(client)
    client.walk(ROOT, 1, b"folder", b"file")
    client.open(1, 2)
    assert client.read(2, 0, 100) == b"content"
    assert client.error(Twalk(ROOT, 3, (b"\x1b[31mabsent",))) == "ENOENT"
    lines = [line for line in follower.until("absent") if not line.startswith("Tgetattr")]
    walked, cloned, opened, read, failed = lines
    assert walked.startswith("Twalk fid=0 newfid=1 names=[folder, file] / -> Rwalk qids=[(type=")
    assert cloned.startswith("Twalk fid=1 newfid=2 names=[] /folder/file -> Rwalk")
    assert opened.startswith("Tlopen fid=2 flags=0 /folder/file -> Rlopen qid=(")
    assert read == "Tread fid=2 offset=0 nbytes=100 /folder/file -> Rread nbytes=7"
    assert failed == (r'Twalk fid=0 newfid=3 names=["\u001b[31mabsent"] / -> ENOENT')
    assert daemon.stop() == 0
    assert daemon.log == ""  # which was not asked for the trace


def test_filters(follow: Follow, client: Client, export: Path) -> None:
    for name in "ab":
        (export / name).mkdir()
        (export / name / "file").touch()
    narrow = follow("--type", "Tgetattr", "--type", "walk", "--path", "/a", "--count", "2")
    everything = follow()
    everything.begin(client)
    client.walk(ROOT, 1, b"a")
    client.walk(ROOT, 2, b"b")

    def ended() -> bool:
        for fid in (1, 2):
            client.getattr(fid)
            client.walk(fid, 3, b"file")
            client.clunk(3)
        return narrow.process.poll() is not None

    eventually(ended, "two lines", FOREVER)
    first, second = narrow.rest()
    assert {first.split()[5], second.split()[5]} == {"Tgetattr", "Twalk"}
    for line in first, second:
        assert "fid=1 " in line
        assert " /a -> R" in line


def test_next_process_is_followed_too(
    follow: Follow, client: Client, daemon: Daemon, control: str
) -> None:
    """As soon as it is there, or at least a second later."""
    follower = follow()
    follower.begin(client)
    [pid] = [
        pid
        for pid in children(daemon.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ninepd: test")
    ]
    os.kill(pid, signal.SIGKILL)
    with Client(daemon.socket) as another:
        another.attach()

        def told() -> bool:
            assert another.error(Twalk(ROOT, 3, (b"absent",))) == "ENOENT"
            return any("absent" in line for line in follower.take())

        eventually(told, "a line of the next process", FOREVER)
    assert daemon.stop() == 0
    assert "its process was killed by SIGKILL" in daemon.log


def test_who_does_not_read_loses_lines(follow: Follow, client: Client, control: str) -> None:
    """And is told how many; the guest and others do not wait for him."""
    other = follow()
    other.begin(client)
    with ControlClient(control) as slow:
        lines = slow.follow("exports", "test", "trace")
        with Beating(client):
            next(lines)
        for _ in range(8000):  # of 250 bytes and more
            client.getattr(ROOT)
        with Beating(client):
            assert next(told["lost"] for told in map(json.loads, lines) if "lost" in told) > 0


def test_nobody_is_told_when_all_have_left(follow: Follow, client: Client, daemon: Daemon) -> None:
    """Messages cost what they did before."""
    follower = follow()
    follower.begin(client)
    follower.close()
    [pid] = [
        pid
        for pid in children(daemon.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ninepd: test")
    ]

    def sent() -> int:
        """System calls that write, of the export's process."""
        return int(re.findall(r"syscw: (\d+)", Path(f"/proc/{pid}/io").read_text())[0])

    def silent() -> bool:
        before = sent()
        for _ in range(100):
            client.getattr(ROOT)
        return sent() - before < 100

    eventually(silent, "nothing is told", FOREVER)


def test_nobody_is_left_who_tells() -> None:
    """A reader waits on, and costs nothing."""

    async def scene() -> bool:
        following, telling = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with following, socket.socket() as closed:
            closed.close()
            following.setblocking(False)
            trace = Trace(following, Questions(closed))
            reader = trace.follow()
            telling.send(b"{}")
            assert await reader.read(100) == b"{}\n"
            telling.close()
            await asyncio.sleep(0.1)
            watched = asyncio.get_running_loop().remove_reader(following)
            reader.close()
            return watched

    assert not asyncio.run(scene())


def entry(tag: int, kind: str, clock: int, **fields: object) -> bytes:
    path = {"path": fields.pop("path")} if "path" in fields else {}
    told = {"time": 0.5, "clock": clock, "tag": tag, "type": kind, "fields": fields}
    return json.dumps(told | path).encode()


def said(pairs: Pairs, *entries: bytes) -> list[str]:
    found = [line.split("  tag ", 1) for each in entries for line in pairs.lines(each)]
    return [parts[-1] for parts in found]


def test_replies_out_of_order() -> None:
    assert said(
        Pairs(),
        entry(1, "Tread", 0, fid=5),
        entry(2, "Tclunk", 10, fid=6),
        entry(2, "Rclunk", 20),
        entry(1, "Rread", 5_000, nbytes=3),
        entry(7, "Rread", 6_000, nbytes=3),  # of before anybody looked
    ) == ["2 Tclunk fid=6 -> Rclunk", "1 Tread fid=5 -> Rread nbytes=3"]


def test_how_long_it_took() -> None:
    pairs = Pairs()
    assert list(pairs.lines(entry(1, "Tread", 1_000, fid=5))) == []
    [line] = pairs.lines(entry(1, "Rread", 43_500, nbytes=3))
    assert re.match(r"\d\d:\d\d:\d\d\.500000       42 us  tag 1 ", line)


def test_flushed_request() -> None:
    assert said(
        Pairs(types=["Tlock"]),
        entry(1, "Tlock", 0, fid=5),
        entry(2, "Tflush", 10, oldtag=1),
        entry(2, "Rflush", 20),
    ) == ["1 Tlock fid=5 -> flushed"]


def test_reasons_and_losses() -> None:
    pairs = Pairs()
    because = json.dumps({"time": 0, "clock": 0, "tag": 1, "because": "no such\nfile"}).encode()
    lost = json.loads(entry(2, "Tclunk", 1, fid=1)) | {"lost": 9}
    assert said(
        pairs,
        entry(1, "Tread", 0, fid=5),
        because,
        entry(1, "Rlerror", 5, ecode=errno.EOPNOTSUPP),
        json.dumps(lost).encode(),
        json.dumps({"lost": 3}).encode(),
    ) == [
        r'1 Tread fid=5 -> EOPNOTSUPP ("no such\nfile")',
        "... 9 requests and replies were lost, for nobody read them",
        "... 3 requests and replies were lost, for nobody read them",
    ]


@pytest.mark.parametrize(
    ("filters", "seen"),
    [
        ({}, [1, 2, 3]),
        ({"types": ["tgetattr"]}, [1, 2]),
        ({"fids": [2, 3]}, [2, 3]),
        ({"path": "/a"}, [1, 3]),
        ({"path": "/"}, [1, 2, 3]),
        ({"path": "/a/b/", "types": ["clunk"]}, [3]),
    ],
)
def test_what_is_wanted(filters: dict[str, object], seen: list[int]) -> None:
    pairs = Pairs(**filters)  # type: ignore[arg-type]
    requests = (("Tgetattr", "/a"), ("Tgetattr", "/ab"), ("Tclunk", "/a/b"))
    found = []
    for number, (kind, path) in enumerate(requests, 1):
        told = (
            entry(number, kind, 0, fid=number, path=path),
            entry(number, f"R{kind[1:]}", 1),
        )
        found += [number for _ in said(pairs, *told)]
    assert found == seen
