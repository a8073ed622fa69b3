"""Storage that makes requests wait: a FUSE file system that is told to, and frozen ones.

A module of tests that wants the fixtures names them: ``fuse = storage.fuse``, and what that uses.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import Tread
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, send
from tests.support.waiting import eventually

TREE: dict[str, dict[str, Any]] = {
    "/slow": {"ino": 11, "text": "slow text"},
    "/quick": {"ino": 12, "text": "quick text"},
    "/dir": {"ino": 13, "text": None},
    "/dir/file": {"ino": 14, "text": "below"},
}


class Fuse:
    """tests/support/fuse_fs.py as a process of its own."""

    def __init__(
        self, target: Path, tree: dict[str, dict[str, Any]], folder: Path, *options: str
    ) -> None:
        target.mkdir(exist_ok=True)
        self.target = target
        path = folder / f"{target.name}.json"
        path.write_text(json.dumps(tree))
        program = Path(__file__).with_name("fuse_fs.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(target), str(path), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._held: queue.Queue[str] = queue.Queue()
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            assert self._answers.get(timeout=20) == "ready"
        except (queue.Empty, AssertionError) as error:
            self._process.kill()
            _, log = self._process.communicate()
            raise AssertionError(f"the FUSE file system did not start: {log}") from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            (self._held if line.startswith("held") else self._answers).put(line.strip())
        self._answers.put("ended")

    def _command(self, *words: object) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        assert self._answers.get(timeout=20) == "done"

    def hold(self, op: str, path: str) -> None:
        self._command("hold", op, path)

    def wait_held(self, op: str, path: str, times: int = 1) -> None:
        for _ in range(times):
            assert self._held.get(timeout=20) == f"held {op} {path}"

    def release(self) -> None:
        """All that waits goes on."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._command("release")

    def freeze(self) -> None:
        """It does not even take requests from the kernel, until ``release``."""
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        # "pid (name) state": a thread that still runs could answer one more request.
        eventually(
            lambda: all(
                (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                for task in tasks.iterdir()
            ),
            "the file system stops",
        )

    def fail(self, op: str, path: str, code: int) -> None:
        self._command("fail", op, path, code)

    def dirents(self, path: str, entries: list[tuple[str, int, int]]) -> None:
        self._command("dirents", path, json.dumps(entries))

    def kill(self) -> None:
        """As a server that crashes: all that waits for it fails."""
        self._process.kill()

    def close(self) -> None:
        self.kill()
        subprocess.run(["umount", "--lazy", self.target], check=True)
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process.wait()


StartFuse = Callable[..., Fuse]


@pytest.fixture
def fuses(as_root: None) -> Iterator[list[Fuse]]:
    """All that are mounted."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    started: list[Fuse] = []
    yield started
    for fuse in started:
        fuse.close()


@pytest.fixture
def start_fuse(fuses: list[Fuse], tmp_path: Path) -> StartFuse:
    """Mount the test file system: ``start_fuse(target, tree, *options)``."""

    def start(target: Path, tree: dict[str, dict[str, Any]] | None = None, *options: str) -> Fuse:
        fuse = Fuse(target, TREE if tree is None else tree, tmp_path, *options)
        fuses.append(fuse)
        return fuse

    return start


@pytest.fixture
def start_daemon(fuses: list[Fuse], start_daemon: StartDaemon) -> Iterator[StartDaemon]:
    """At the end nothing hangs any more, so that the daemons can be asked to end."""
    yield start_daemon
    for fuse in fuses:
        fuse.release()


@pytest.fixture
def fuse(start_fuse: StartFuse, export: Path) -> Fuse:
    """Mounted on ``m`` in the export."""
    return start_fuse(export / "m")


def hang(client: Client, fuse: Fuse) -> int:
    """A read that waits, by fid 1; the other fids are free."""
    client.open(ROOT, 1, b"m", b"slow")
    fuse.hold("read", "/slow")
    head = send(client, Tread(1, 0, 100))
    fuse.wait_held("read", "/slow")
    return head


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """All that writes to the file system waits."""
    subprocess.run(["fsfreeze", "--freeze", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)


def waits_for_storage(pid: int) -> bool:
    """Is one of the threads in a system call that nothing interrupts?"""
    states = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    return any(state.rpartition(")")[2].split()[0] == "D" for state in states)
