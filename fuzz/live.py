"""A whole daemon under a guest that misbehaves, and beside it an export that must not notice.

One supervisor, two exports. Traffic (traffic.py) goes to the first through a real ring, with resets
of the device and new sessions in its midst. After each case a new session must begin as if nothing
had been; now and then the second export's file must read as it was written, the processes must be
those of the beginning with no more descriptors than then, and what lies outside of the export
untouched. How long the second export takes for a read is kept, for a report.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support.client import ROOT, Client, Readiness, children

from .scene import SECRET, Scene
from .traffic import RESET, Record, check_answer

_NUM: Final = 128
_SPARE: Final = 8
_PATIENCE: Final = 60
_STEADY: Final = bytes(range(256)) * 64
_INSPECTION: Final = 32
"""So many cases between two looks at everything else."""
_SLACK: Final = 24
"""Descriptors that a process may have more than in the beginning: handles are kept for a while."""

Feature = tuple[int, int, int]


def started(log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """``ninepd serve`` as soon as it is ready; what it has to say goes to a file."""
    readiness = Readiness()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ninepd", "serve", *arguments],
            stderr=output,
            env=os.environ | {"NOTIFY_SOCKET": readiness.address},
        )
    try:
        assert readiness.wait(process.pid), log.read_text()
    except BaseException:
        end(process)
        raise
    finally:
        readiness.close()
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    """It would live on, with what it has inherited, and somebody may wait for the end of that."""
    process.terminate()
    process.wait()


class Live:
    """The daemon, and the two guests."""

    def __init__(self, folder: Path) -> None:
        self.latencies: list[float] = []
        """Seconds that reads of the second export took."""
        self.requests = 0
        self._cases = 0
        folder.chmod(0o700)
        (folder / "fuzzed").mkdir()
        self.scene = Scene(folder / "fuzzed")
        (folder / "steady").mkdir()
        (folder / "steady/file").write_bytes(_STEADY)
        self._log = folder / "log"
        self._sockets = (str(folder / "a.sock"), str(folder / "b.sock"))
        config = folder / "ninepd.toml"
        config.write_text(
            "".join(
                f'[[export]]\nexport = "{export}"\ntag = "{export.name}"\nsocket-path = "{sock}"\n'
                for export, sock in zip(
                    (self.scene.export, folder / "steady"), self._sockets, strict=True
                )
            )
        )
        self._process = started(self._log, "--config", str(config))
        try:
            self._meet()
        except BaseException:
            end(self._process)
            raise

    def _meet(self) -> None:
        """Both guests are there."""
        self._processes = children(self._process.pid)
        self._fuzzed = Client(self._sockets[0], num=_NUM)
        self._steady = Client(self._sockets[1])
        self._steady.attach()
        self._steady.open(ROOT, 1, b"file")
        self._fuzzed.attach()
        self._descriptors = self._count_descriptors()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._fuzzed.close()
            self._steady.close()
        end(self._process)

    # A case

    def run(self, records: Sequence[Record]) -> set[Feature]:
        """Send all of it; returns what the answers came to."""
        self.scene.reset()
        features: set[Feature] = set()
        out: dict[int, Record] = {}
        self._begin_session()
        for record in records:
            if record == RESET:
                self._fuzzed.reboot()
                out.clear()
                self._begin_session()
            elif record.is_request:
                if 2 * len(out) > _NUM - _SPARE:
                    self._collect(out, features, 1)
                room = [record.room] if record.room else []
                out[self._fuzzed.driver.submit([record.raw], room)] = record
                self.requests += 1
            else:
                self._fuzzed.driver.kick()
                self._collect(out, features, 0)
        self._collect(out, features, len(out))
        self._begin_session()
        self._cases += 1
        if self._cases % _INSPECTION == 0:
            self.inspect()
        return features

    def _begin_session(self) -> None:
        self._fuzzed.attach()

    def _collect(self, out: dict[int, Record], features: set[Feature], least: int) -> None:
        """What is answered, and ``least`` of it in any case: each once."""
        driver = self._fuzzed.driver
        if least:
            driver.kick()
        for head, length in driver.wait_used(_PATIENCE, least):
            request = out.pop(head)
            assert driver.guards_intact(head), "a reply goes beyond its room"
            reply = driver.reply(head, length)
            assert SECRET not in reply, "a reply shows what is outside the export"
            features.add(check_answer(request, reply))

    # All else

    def inspect(self) -> None:
        """The second export is right, and so is the host."""
        start = time.perf_counter()
        assert self._steady.read(1, 0, len(_STEADY)) == _STEADY, "the other export is wrong"
        self.latencies.append(time.perf_counter() - start)
        assert self._process.poll() is None
        assert children(self._process.pid) == self._processes, "a process ended"
        now = self._count_descriptors()
        assert all(
            n <= before + _SLACK for n, before in zip(now, self._descriptors, strict=True)
        ), f"{now} descriptors are open, {self._descriptors} were in the beginning"
        self.scene.check()
        log = self._log.read_text(errors="replace")
        assert "a bug" not in log, log
        assert "Traceback" not in log, log
        os.truncate(self._log, 0)

    def _count_descriptors(self) -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in self._processes]
