"""The host's end of the line to the guest's agent (agent.c has the protocol).

A thread reads the line, so any number of threads can wait for any number of jobs and answers.
"""

import contextlib
import itertools
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TypeVar

from .errors import GuestError, GuestTimeout

LINE_MAX = 8 << 20  # as in agent.c

SEND_LIMIT = 60.0  # seconds until an agent that reads nothing counts as dead

T = TypeVar("T")
Sink = Callable[[bytes], object]


@dataclass(frozen=True)
class Answer:
    result: int
    errno: int
    buffers: tuple[bytes, ...]


class Job:
    """Something that runs in the guest, from the host's point of view."""

    def __init__(self, ident: int, sink: Sink | None) -> None:
        self.ident = ident
        self.output = bytearray()
        self.status: Future[int] = Future()
        self._sink = sink

    def feed(self, data: bytes) -> None:
        if self._sink:
            self._sink(data)
        else:
            self.output += data


class Channel:
    def __init__(
        self, line: socket.socket, evidence: Callable[[], str], *, window: int | None = None
    ) -> None:
        """``evidence`` tells what the guest said last, for the messages of errors.

        ``window`` bounds the bytes that the agent has not read yet.
        """
        self._line = line
        self._window = window
        self._evidence = evidence
        self._numbers = itertools.count(1)
        self._state = threading.Condition()  # guards all below
        self._jobs: dict[int, Job] = {}
        self._questions: dict[int, tuple[int, Future[Answer]]] = {}
        self._boots = 0
        self._farewells = 0
        self._unread = 0
        self._closed = False
        self._sending = threading.Lock()
        line.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="ninepd-guest-line", daemon=True)
        self._thread.start()

    def failure(self, what: str) -> GuestError:
        return GuestError(f"{what}\n{self._evidence()}")

    @property
    def boots(self) -> int:
        with self._state:
            return self._boots

    def wait_boot(self, number: int, timeout: float) -> None:
        """Until the guest has come up for the given time, counted from 1."""
        self._wait(lambda: self._boots >= number, timeout, "the guest did not come up")

    def farewell(self, verb: str, timeout: float) -> None:
        """Asks the guest to stop, and waits until it has let go of everything."""
        with self._state:
            number = self._farewells + 1
        self.send(verb)
        what = "the guest did not unmount its shares"
        self._wait(lambda: self._farewells >= number or self._closed, timeout, what)

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        with self._state:
            self._state.wait_for(lambda: done() or self._closed, timeout)
            if done():
                return
            ended = self._closed
        if ended:
            raise self.failure(f"{what}: it has ended")
        raise GuestTimeout(f"{what} within {timeout:.0f} s\n{self._evidence()}")

    def start(self, verb: str, *arguments: bytes | int, sink: Sink | None = None) -> Job:
        job = Job(next(self._numbers), sink)
        with self._state:
            self._alive()
            self._jobs[job.ident] = job
        self.send(verb, job.ident, *arguments)
        return job

    def ask(self, job: Job, *arguments: str) -> Future[Answer]:
        number = next(self._numbers)
        future: Future[Answer] = Future()
        with self._state:
            self._alive()
            if job.ident not in self._jobs:
                raise GuestError("the guest process has ended: start another one")
            self._questions[number] = (job.ident, future)
        self.send("do", job.ident, number, *arguments)
        return future

    def _alive(self) -> None:
        if self._closed:
            raise self.failure("the guest has ended")

    def send(self, *words: bytes | int | str) -> None:
        line = b" ".join(_word(word) for word in words) + b"\n"
        if len(line) > LINE_MAX:
            raise ValueError(f"{len(line)} bytes are too much for one request to the guest")
        step = self._window or len(line)
        with self._sending:
            for at in range(0, len(line), step):
                part = line[at : at + step]
                self._reserve(len(part))
                try:
                    self._line.sendall(part)
                except OSError as error:
                    raise self.failure("the guest has ended") from error

    def _reserve(self, size: int) -> None:
        if self._window is None:
            return
        room = self._window - size
        self._wait(lambda: self._unread <= room, SEND_LIMIT, "the guest's agent reads nothing")
        with self._state:
            self._unread += size

    def _read(self) -> None:
        pending = b""
        try:
            while data := self._line.recv(1 << 18):
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self._take(line.split(b" "))
        except OSError:
            pass  # the other end is gone, or we closed: the end of the line either way
        finally:
            with self._state:
                self._closed = True
                self._abandon("the guest has ended")

    def _take(self, words: list[bytes]) -> None:
        match words:
            case [b"out", ident, data]:
                with self._state:
                    job = self._jobs.get(int(ident))
                if job:
                    job.feed(b64decode(data))
            case [b"ret", number, result, code, *buffers]:
                with self._state:
                    question = self._questions.pop(int(number), None)
                if question:
                    answer = Answer(int(result), int(code), tuple(map(b64decode, buffers)))
                    question[1].set_result(answer)
            case [b"end", ident, status]:
                self._end(int(ident), int(status))
            case [b"ack", size]:
                with self._state:
                    self._unread -= int(size)
                    self._state.notify_all()
            case [b"up"]:
                with self._state:
                    self._unread = 0
                    self._boots += 1
                    self._abandon("the guest has rebooted")
            case [b"bye"]:
                with self._state:
                    self._farewells += 1
                    self._state.notify_all()
            case _:
                pass  # what a firmware or a dying kernel left on the line

    def _end(self, ident: int, status: int) -> None:
        with self._state:
            job = self._jobs.pop(ident, None)
            lost = [n for n, (owner, _) in self._questions.items() if owner == ident]
            orphans = [self._questions.pop(number)[1] for number in lost]
        if job:
            job.status.set_result(status)
        for future in orphans:
            future.set_exception(GuestError(f"the guest process has ended with status {status}"))

    def _abandon(self, why: str) -> None:
        """With the state locked: nothing that was asked will be answered."""
        jobs, questions = self._jobs, self._questions
        self._jobs, self._questions = {}, {}
        if jobs or questions:
            text = str(self.failure(why))
            for job in jobs.values():
                job.status.set_exception(GuestError(text))
            for _, future in questions.values():
                future.set_exception(GuestError(text))
        self._state.notify_all()

    def result(self, future: Future[T], timeout: float | None, what: str) -> T:
        try:
            return future.result(timeout)
        except FutureTimeout as error:
            raise GuestTimeout(f"{what} took more than {timeout} s\n{self._evidence()}") from error

    def close(self) -> None:
        """Ends the line; everything that still waits fails."""
        with contextlib.suppress(OSError):  # the guest may have been faster
            self._line.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._line.close()


def _word(word: bytes | int | str) -> bytes:
    return b64encode(word) if isinstance(word, bytes) else str(word).encode()
