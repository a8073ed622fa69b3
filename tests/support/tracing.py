"""What system calls a process makes, and what becomes of them: strace(1) on a live daemon."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Tracer:
    """Attached to a process and its threads from now on; skips the test where that cannot be."""

    def __init__(self, pid: int, log: Path, *options: str) -> None:
        command = ["strace", "-f", *options, "-o", str(log), "-p", str(pid)]
        self._log = log
        try:
            self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            pytest.skip("no strace")
        assert self._strace.stderr is not None
        first = self._strace.stderr.readline()
        if "attached" not in first:
            self._strace.communicate()
            pytest.skip(f"strace: {first.strip()}")

    def calls(self) -> list[str]:
        """Detach, and tell the calls so far, each with its arguments as far as it had begun."""
        self._strace.send_signal(signal.SIGINT)
        self._strace.communicate(timeout=20)
        calls = [line.split(maxsplit=1)[1] for line in self._log.read_text().splitlines()]
        return [call for call in calls if not call.startswith(("---", "+++", "<..."))]

    def close(self) -> None:
        """Let go of the process, and of calls that it delays."""
        self._strace.kill()
        self._strace.wait()
        assert self._strace.stderr is not None
        self._strace.stderr.close()


@contextlib.contextmanager
def traced(pid: int, log: Path, *options: str) -> Iterator[Tracer]:
    tracer = Tracer(pid, log, *options)
    try:
        yield tracer
    finally:
        tracer.close()
