"""The request engine in this process: a ring in memory, a tree on tmpfs, and no thread but workers.

An input is traffic (traffic.py). For coverage: the same code as a daemon's behind its device, at
some thousand requests a second, and one that can be counted line by line.
"""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

from ninepd.export.local import LocalHost
from ninepd.export.tree import Tree
from ninepd.limits import Limits
from ninepd.ops.guest import Service
from ninepd.ops.table import HEADER_LIMITS
from ninepd.p9.messages import NOFID, Tattach, Tversion
from ninepd.pipeline import Pipeline, RingSetup
from ninepd.vring import REQUEST, GuestMemory, Vring, Watch
from ninepd.workers import Workers
from tests.support.driver import Driver

from . import grammar
from .scene import SECRET, Scene
from .traffic import KICK, RESET, Record, check_answer, join, mutated, parse

Mutate = Callable[[bytes, int], bytes]

NUM: Final = 128
_SPARE: Final = 8
"""Descriptors: before fewer are left the guest collects what is answered."""
_PATIENCE: Final = 30
_BUDGET: Final = 32
"""Descriptors: so few that a case with many fids comes to their end."""
_LIMITS: Final = Limits(fids_max=64)
"""As few fids, for the same reason."""
_OPENING: Final = (
    Record(grammar.encoded(0xFFFF, Tversion(1 << 16, b"9P2000.L"))),
    KICK,
    Record(grammar.encoded(1, Tattach(0, NOFID, b"", b"", 0))),
    KICK,
)


class _Bugs(logging.Handler):
    """What the engine says of itself: each is a failure of ours, though the guest is answered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


class Engine:
    """One guest's ring, session and export."""

    def __init__(self, folder: Path) -> None:
        self.scene = Scene(folder)
        self.bugs = _Bugs()
        logging.getLogger("ninepd").addHandler(self.bugs)
        root = os.open(self.scene.export, os.O_PATH | os.O_DIRECTORY)
        self._service = Service(Tree(root, LocalHost(), budget=_BUDGET), _LIMITS, "fuzz")
        self._driver = Driver(NUM)
        self._memory = GuestMemory()
        for region in self._driver.regions:
            self._memory.add(*region, self._driver.fd)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._workers = Workers("fuzz")
        self._pipeline = self._started()
        self._out: dict[int, Record] = {}

    def _started(self) -> Pipeline:
        driver, watch = self._driver, Watch(1000)
        vring = Vring(
            self._memory,
            num=NUM,
            desc=driver.user_addr(driver.desc),
            used=driver.user_addr(driver.used),
            avail=driver.user_addr(driver.avail),
            base=driver.avail_idx,
            event_idx=True,
            indirect=True,
            kick=driver.kick_fd,
            call=-1,
            wake=self._wake,
            header_limits=HEADER_LIMITS,
            watch=watch,
        )
        setup = RingSetup(NUM, indirect=True, poll_us=0, name="fuzz")
        pipeline = Pipeline(self._service, vring, watch, self._workers, setup)
        self._vring = vring
        return pipeline

    def run(self, records: list[Record]) -> None:
        """All of a case, and that it is answered."""
        self.scene.reset()
        for record in (*_OPENING, *records, KICK, *_OPENING):
            if record == RESET:
                self._reset()
            elif record.is_request:
                if len(self._out) * 2 > NUM - _SPARE:
                    self._kick()
                self._out[self._driver.submit([record.raw], [record.room] * bool(record.room))] = (
                    record
                )
            else:
                self._kick()
        self.scene.check()
        assert not self.bugs.found, "\n".join(self.bugs.found)

    def _kick(self) -> None:
        """Serve what is there, until all of it is answered."""
        pipeline, answers = self._pipeline, self._pipeline._answers
        while self._out:
            self._vring.wake()
            count = self._vring.wait(0)
            pipeline._batch = REQUEST.iter_unpack(self._vring.batch[: count * REQUEST.size])
            assert pipeline._serve_batch(pipeline._turn)
            answers.publish()
            if pipeline.jobs:
                jobs = list(pipeline._jobs.completed(_PATIENCE))
                assert jobs, "a job does not end"
                for job in jobs:
                    pipeline._complete(job)
                answers.publish()
            self._collect()

    def _collect(self) -> None:
        for head, length in self._driver.take_used():
            request = self._out.pop(head)
            assert self._driver.guards_intact(head)
            reply = self._driver.reply(head, length)
            check_answer(request, reply)
            assert SECRET not in reply

    def _reset(self) -> None:
        """As when the guest resets its device: what is out gets no answer, the session ends."""
        for head in self._out:
            self._driver.free(head)
        self._out.clear()
        self._pipeline.close()
        self._service.renew().end()
        self._driver.next_avail = self._driver.last_used = self._driver.used_idx
        self._driver.avail_idx = self._driver.used_idx
        self._pipeline = self._started()


_engine: Engine | None = None


def one_input(data: bytes) -> None:
    global _engine
    if _engine is None:
        os.umask(0)
        folder = tempfile.mkdtemp(prefix="ninepd-fuzz-", dir="/dev/shm")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _engine = Engine(Path(folder))
    _engine.run(parse(data))


def mutator(data: bytes, max_size: int, seed: int, mutate: Mutate) -> bytes:
    """By requests, and now and then as bytes."""
    rng = Random(seed)
    records = parse(data)
    if not records:
        return join([Record(grammar.encoded(1, grammar.message(rng, grammar.REQUESTS)))])
    if rng.randrange(16) == 0:
        return mutate(data, max_size)
    return join(mutated(rng, records, records))[:max_size]
