"""A program of the host that carries a guest: what it says, and its sure end."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Mapping

from .errors import GuestError

TAIL = 4000  # bytes of the console in the message of an error

# The kernel ends a child when the *thread* that started it ends, so one thread starts them all.
_starter = concurrent.futures.ThreadPoolExecutor(1, "ninepd-guest-start")


class HostProgram:
    """The program's output and errors, which hold the guest's console too, are kept."""

    def __init__(
        self,
        command: Iterable[str],
        *,
        env: Mapping[str, str],
        pass_fds: Iterable[int],
        last_words: Iterable[bytes] = (),
    ) -> None:
        """A program that says one of its ``last_words`` is ended: no more is to be had from it."""
        self._arguments = list(command)
        self._last_words = tuple(last_words)
        self._output = bytearray()
        self._process = _starter.submit(self._start, env, tuple(pass_fds)).result()
        self._thread = threading.Thread(target=self._read, name="ninepd-console", daemon=True)
        self._thread.start()

    def _start(self, env: Mapping[str, str], pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        try:
            # The guest must not outlive us, however we end; its session keeps ^C from it.
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._arguments],
                env={**os.environ, **env}, pass_fds=pass_fds, start_new_session=True, bufsize=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise GuestError("setpriv is missing: install the package util-linux") from error

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None  # noqa: S101  # Popen was told so
        with pipe:
            while data := pipe.read(1 << 16):
                self._output += data
                if any(words in self._output for words in self._last_words):
                    self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> bytes:
        return bytes(self._output)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def evidence(self) -> str:
        """The last words, for a message."""
        if self.wait(0.2):  # it may be on its way out, with more to say
            self._thread.join(1)
        tail = bytes(self._output[-TAIL:]).decode(errors="replace").strip()
        status = self._process.poll()
        state = "runs" if status is None else f"has ended with status {status}"
        name = os.path.basename(self._arguments[0])
        return f"--- {name} (pid {self.pid}) {state}; it said:\n{tail}"

    def wait(self, timeout: float) -> bool:
        """Whether it has ended within the time."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it without warning."""
        # User-mode Linux has helpers in its group. None is left where it has ended before.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self, patience: float) -> None:
        """Waits for the end, then asks for it, then forces it."""
        if not self.wait(patience):
            os.kill(self.pid, signal.SIGTERM)
        if not self.wait(5):
            self.kill()
            self._process.wait()
        self._thread.join(5)
