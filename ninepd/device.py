"""One virtio-9p device behind one vhost-user connection: applies what the session decided.

A message that could disturb the ring is applied when the ring has come to rest, however long that
takes: what a system call is just moving between a file and guest memory cannot be called back. The
loop goes on meanwhile. Afterwards the ring runs again if it is wanted: one rule for all messages.

    SERVING ---- disturbing message ----> PARKING ---- rested ----> PARKED
       ^                                                              |
       +------------ the ring is wanted, and sound -------------------+

Runs on the loop thread; the requests themselves are served by ``Pipeline`` on threads of its own.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from ninepd import foreign
from ninepd.errors import Refused, RingBroken
from ninepd.ops.guest import Guest, Service
from ninepd.ops.table import HEADER_LIMITS
from ninepd.pipeline import Pipeline, RingSetup
from ninepd.throttled import ThrottledPipeline
from ninepd.vhostuser.messages import MemoryRegion, Message, Request, VirtioFeature
from ninepd.vhostuser.session import (
    AddRegion,
    BackendSession,
    DropLog,
    Effect,
    RemoveRegion,
    ResetDevice,
    ResetSession,
    RingFault,
    SetCall,
    SetChannel,
    SetErr,
    SetKick,
    SetLog,
    SetLogSignal,
    SetMemory,
    Step,
    StopRing,
)
from ninepd.vhostuser.state import State
from ninepd.vring import DirtyLog, GuestMemory, Vring, Watch, signal_err
from ninepd.workers import Workers

log = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 1.0
_DRAINED: Final = frozenset({Request.GET_VRING_BASE, Request.SET_VRING_ENABLE})
"""Before these the requests that are out get a moment to end, for a snapshot of the guest may be
about to be taken. They stay out if they do not, and are answered when the ring goes on."""
_WATCH_TICK_US: Final = 3000
"""A request that holds up the ring for one to two of these makes way for the others."""


class Parking(Enum):
    """Where the ring stands; see above."""

    SERVING = auto()
    PARKING = auto()
    PARKED = auto()


def _layout(state: State) -> tuple[int, ...]:
    """What makes a ring the same ring; whether it is logged does not."""
    ring = state.ring
    features = state.features & ~VirtioFeature.LOG_ALL
    return ring.num, ring.desc, ring.avail, ring.used, features


class Device:
    """Owns guest memory, the ring's eventfds, the pipeline, and the 9P session of a connection."""

    def __init__(
        self,
        name: str,
        config_space: bytes,
        service: Service,
        poll_us: int,
        call_soon: Callable[[Callable[[], None]], None],
    ) -> None:
        """``call_soon`` runs a function on the loop thread, from any thread."""
        self._name = name
        self._service = service
        self._poll_us = poll_us
        self._call_soon = call_soon
        self._session = BackendSession(config_space)
        self._memory = GuestMemory()
        self._log: DirtyLog | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._workers = Workers(f"{name} worker")
        self._kick, self._call, self._err = (foreign.Held(self._wake) for _ in range(3))
        self._channel, self._log_signal = (foreign.Held(self._wake) for _ in range(2))
        self._pipeline: Pipeline | None = None
        self._layout: tuple[int, ...] = ()
        self._parking = Parking.PARKED
        self._parked: Callable[[], None] | None = None
        """What is to be done as soon as the ring rests."""
        self._position: int | None = None
        """Where the ring stood when it was parked, while its 9P session lives."""

    def handle(self, message: Message, answer: Callable[[bytes | None], None]) -> None:
        """Apply one control message; then ``answer`` is called with the reply, if one is due.

        Perhaps later: until then no other message may come, and this one keeps its descriptors.
        """
        log.debug("%s: %s", self._name, message.name)
        if message.disturbs:
            grace = _GRACE_SECONDS if message.header.request in _DRAINED else 0.0
            self._park(grace, lambda: answer(self._perform(message)))
        else:
            answer(self._perform(message))

    def close(self, answer: bool, closed: Callable[[], None]) -> None:
        """Let everything go once the ring rests; then ``closed`` is called, perhaps later.

        ``answer``: the guest is still there, and requests that are out get a moment to end. A
        message that still waits gets no answer.
        """
        self._park(_GRACE_SECONDS if answer else 0.0, lambda: self._let_go(closed))

    def _let_go(self, closed: Callable[[], None]) -> None:
        self._end_session()
        self._memory.close()
        self._workers.close()
        for held in (self._kick, self._call, self._err, self._channel, self._log_signal):
            held.close()
        os.close(self._wake)
        closed()

    def _perform(self, message: Message) -> bytes | None:
        """Apply a message; if it disturbs the ring, that rests."""
        step = self._session.handle(message)
        try:
            if step.effect is not None:
                self._apply(step.effect)
        except (OSError, Refused) as error:
            step = self._session.refuse(step, str(error))
        if message.disturbs and self._session.state.runnable:
            step = self._run_or_refuse(step)
        if step.refusal is not None:
            log.warning("%s: %s refused: %s", self._name, message.name, step.refusal)
        return step.reply

    # The ring

    def _park(self, grace: float, parked: Callable[[], None]) -> None:
        """Call ``parked`` as soon as nothing in the ring or in guest memory is touched any more."""
        pipeline = self._pipeline
        if self._parking is Parking.PARKED or pipeline is None:
            parked()
            return
        self._parked = parked
        if self._parking is Parking.SERVING:
            self._parking = Parking.PARKING
            pipeline.pause(grace)

    def _rested(self, pipeline: Pipeline) -> None:
        """The ring came to rest: because it was told to, or because it broke."""
        if pipeline is not self._pipeline or self._parking is Parking.PARKED:
            return
        self._parking = Parking.PARKED
        self._position = pipeline.next_avail
        self._session.parked_at(self._position)
        if pipeline.broken is not None:
            self._break(pipeline.broken)
        parked, self._parked = self._parked, None
        if parked is not None:
            parked()

    def _run_or_refuse(self, step: Step) -> Step:
        """Let the wanted ring go on, or start anew: then with a new 9P session as well."""
        try:
            self._run(self._session.state)
        except (OSError, Refused, RingBroken) as error:
            step = self._session.refuse(step, str(error))
            self._break(str(error))
        return step

    def _run(self, state: State) -> None:
        layout = (*_layout(state), self._kick.number)
        if state.ring.base != self._position or not self._continues(layout):
            # The guest has reset the device. At the same position it may have, too: then its
            # Tversion will end the session.
            self._end_session()
        elif self._layout != layout:
            self._forget_ring()
        if self._pipeline is None:
            self._pipeline = self._make_pipeline(state)
            self._layout = layout
        self._pipeline.set_log(self._log if state.logging else None, state.ring.log)
        self._pipeline.start()
        self._parking = Parking.SERVING

    def _continues(self, layout: tuple[int, ...]) -> bool:
        """If the ring lies where it did: is it the one that we left?"""
        pipeline = self._pipeline
        return pipeline is None or layout != self._layout or pipeline.continues()

    def _relocate(self) -> None:
        """Guest memory changed. A ring that is not there now waits for its region to return."""
        if self._pipeline is not None:
            with contextlib.suppress(RingBroken):
                self._pipeline.relocate(self._memory)

    def _make_pipeline(self, state: State) -> Pipeline:
        ring = state.ring
        indirect = bool(state.features & VirtioFeature.INDIRECT_DESC)
        watch = Watch(_WATCH_TICK_US)
        vring = Vring(
            self._memory,
            num=ring.num,
            desc=ring.desc,
            used=ring.used,
            avail=ring.avail,
            base=ring.base,
            event_idx=bool(state.features & VirtioFeature.EVENT_IDX),
            indirect=indirect,
            kick=self._kick.number,
            call=self._call.number,
            wake=self._wake,
            header_limits=HEADER_LIMITS,
            watch=watch,
            stats=self._service.stats,
        )
        setup = RingSetup(ring.num, indirect, self._poll_us, self._name)
        throttle = self._service.throttle
        pipeline = (
            Pipeline(self._service, vring, watch, self._workers, setup)
            if throttle is None
            else ThrottledPipeline(self._service, vring, watch, self._workers, setup, throttle)
        )
        pipeline.on_rest = lambda: self._call_soon(lambda: self._rested(pipeline))
        return pipeline

    def _forget_ring(self) -> None:
        """Its memory or its meaning is about to go. Requests that are still out get no answer."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            self._service.stats.numbers.in_flight = 0
            if pipeline.jobs:
                log.warning("%s: %d requests were dropped", self._name, pipeline.jobs)
            pipeline.close()

    def _end_session(self) -> None:
        """The guest has gone, or begins anew."""
        self._position = None
        self._forget_ring()
        old = self._service.renew()
        if not self._workers.start(lambda: self._end_guest(old)):
            self._end_guest(old)

    def _end_guest(self, guest: Guest) -> None:
        guest.end()
        self._service.take_stock()

    def _break(self, reason: str) -> None:
        log.error("%s: ring stopped until the guest resets it: %s", self._name, reason)
        self._session.mark_broken()
        self._position = None
        self._forget_ring()
        self._signal_err()

    def _signal_err(self) -> None:
        signal_err(self._err.number)

    def _drop_log(self) -> None:
        """The front end reads it no more: after this the device does not write to it, either."""
        dirty, self._log = self._log, None
        if dirty is not None and dirty.skipped:
            log.warning("%s: the dirty log was too small for %d pages", self._name, dirty.skipped)
        if self._pipeline is not None:
            self._pipeline.set_log(None, None)

    # Effects

    def _apply(self, effect: Effect) -> None:
        match effect:
            case SetMemory(regions, fds):
                memory = GuestMemory()
                try:
                    for region, fd in zip(regions, fds, strict=True):
                        _map(memory, region, fd)
                except (OSError, Refused):
                    memory.close()
                    raise
                old, self._memory = self._memory, memory
                self._relocate()
                old.close()
            case AddRegion(region, fd):
                _map(self._memory, region, fd)
                self._relocate()
            case RemoveRegion(region):
                self._memory.remove(region.gpa, region.size, region.ua)
                self._relocate()
            case SetKick(kick):
                _hold(self._kick, kick)
            case SetCall(call):
                _hold(self._call, call)
                if self._pipeline is not None:
                    self._pipeline.set_call(self._call.number)
                # A notification may have gone to the old one just before.
                signal_err(self._call.number)
            case SetErr(err):
                _hold(self._err, err)
            case SetChannel(fd):
                # User-Mode Linux needs it for its interrupts; there is nothing to say on it.
                foreign.check_channel(fd)
                self._channel.replace(fd)
            case SetLog(area, fd):
                foreign.check_memory(fd)
                self._log = DirtyLog(area.size, area.offset, fd)
                self._log.set_signal(self._log_signal.number)
            case DropLog():
                self._drop_log()
            case SetLogSignal(fd):
                _hold(self._log_signal, fd)
                if self._log is not None:
                    self._log.set_signal(self._log_signal.number)
            case RingFault():
                self._signal_err()
            case StopRing():
                # It is parked. It keeps its descriptors: the same ring may go on with them.
                pass
            case ResetSession():
                self._end_session()
                self._memory.close()
                self._drop_log()
                for held in (self._kick, self._call, self._err, self._log_signal):
                    held.replace(None)
            case ResetDevice():
                self._end_session()


def _map(memory: GuestMemory, region: MemoryRegion, fd: int) -> None:
    foreign.check_memory(fd)
    memory.add(region.gpa, region.size, region.ua, region.offset, fd)


def _hold(held: foreign.Held, lent: int | None) -> None:
    if lent is not None:
        foreign.check_signal(lent)
    held.replace(lent)
