"""One virtio-9p device behind one vhost-user connection: applies what the session decided.

Every message that could disturb the ring is applied while the ring is parked, and afterwards the
ring runs again if it is wanted: one rule for all of them. Runs on the loop
thread; the requests themselves are served by ``Pipeline`` on a thread of their own.
"""

import logging
import os
from collections.abc import Callable
from typing import Final

from ninepd.errors import Refused, RingBroken
from ninepd.ops.guest import Service
from ninepd.ops.table import HEADER_LIMITS
from ninepd.pipeline import GRACE_SECONDS, Pipeline
from ninepd.vhostuser.messages import Message, Request, VirtioFeature
from ninepd.vhostuser.session import (
    AddRegion,
    Effect,
    RemoveRegion,
    ResetDevice,
    ResetSession,
    RingFault,
    Session,
    SetCall,
    SetChannel,
    SetErr,
    SetKick,
    SetMemory,
    StopRing,
)
from ninepd.vhostuser.state import State
from ninepd.vring import GuestMemory, Vring, signal_err

log = logging.getLogger(__name__)

_NONE: Final = -1
_WAIT_FOR_REQUESTS: Final = frozenset(
    {
        Request.SET_OWNER,
        Request.SET_MEM_TABLE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_ENABLE,
        Request.RESET_DEVICE,
        Request.REM_MEM_REG,
    }
)
"""After these the ring, or what it means, may be gone: requests that are out get time to end."""


def _layout(state: State) -> tuple[int, ...]:
    """What makes a ring the same ring."""
    ring = state.ring
    return ring.num, ring.desc, ring.avail, ring.used, state.features


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
        self._session = Session(config_space)
        self._memory = GuestMemory()
        # Each keeps its number when it is replaced, so that a ring can go on with it.
        self._kick = self._call = self._err = self._channel = _NONE
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pipeline: Pipeline | None = None
        self._layout: tuple[int, ...] = ()
        self._running = False
        self._position: int | None = None
        """Where the ring stood when it was parked, while its 9P session lives."""
        self._stuck = False
        """Does a thread that will not come back hold guest memory and the export?"""

    def handle(self, message: Message) -> bytes | None:
        """Apply one control message; returns the reply to send, if one is due."""
        log.debug("%s: %s", self._name, message.name)
        if message.disturbs:
            self._park(GRACE_SECONDS if message.header.request in _WAIT_FOR_REQUESTS else 0)
        step = self._session.handle(message)
        try:
            if message.disturbs and self._stuck:
                raise Refused("this device is given up; restart ninepd when its storage answers")
            if step.effect is not None:
                self._apply(step.effect)
        except (OSError, Refused) as error:
            step = self._session.refuse(step, str(error))
        if message.disturbs and self._session.state.runnable:
            try:
                self._run()
            except (OSError, Refused, RingBroken) as error:
                step = self._session.refuse(step, str(error))
                self._break(str(error))
        if step.refusal is not None:
            log.warning("%s: %s refused: %s", self._name, message.name, step.refusal)
        return step.reply

    def close(self) -> None:
        """Answer what is in flight, then let everything go."""
        self._park()
        self._forget_ring()
        self._service.restart()
        if not self._stuck:
            self._memory.close()
        for fd in (self._kick, self._call, self._err, self._channel, self._wake):
            if fd != _NONE:
                os.close(fd)

    # The ring

    def _park(self, grace: float = GRACE_SECONDS) -> None:
        """The ring stands still: nothing in it or in guest memory is touched from here on."""
        pipeline = self._pipeline
        if not self._running or pipeline is None:
            return
        pipeline.stop(grace)
        self._running = False
        self._position = pipeline.next_avail
        self._session.parked_at(self._position)
        if pipeline.stuck:
            self._stuck = True
            self._service.abandon()
        if pipeline.broken is not None:
            self._break(pipeline.broken)

    def _park_if_broken(self) -> None:
        if self._pipeline is not None and self._pipeline.broken is not None:
            self._park()

    def _run(self) -> None:
        """Let the wanted ring go on, or start anew: then with a new 9P session as well."""
        state = self._session.state
        layout = (*_layout(state), self._kick)
        if state.ring.base != self._position:
            # The guest has reset the device. At the same position it may have, too: then its
            # Tversion will end the session.
            self._forget_ring()
            self._service.restart()
        elif self._layout != layout:
            self._forget_ring()
        if self._pipeline is None:
            self._pipeline = self._make_pipeline(state)
            self._layout = layout
        self._pipeline.start(lambda: self._call_soon(self._park_if_broken))
        self._running = True

    def _make_pipeline(self, state: State) -> Pipeline:
        ring = state.ring
        indirect = bool(state.features & VirtioFeature.INDIRECT_DESC)
        vring = Vring(
            self._memory,
            num=ring.num,
            desc=ring.desc,
            used=ring.used,
            avail=ring.avail,
            base=ring.base,
            event_idx=bool(state.features & VirtioFeature.EVENT_IDX),
            indirect=indirect,
            kick=self._kick,
            call=self._call,
            wake=self._wake,
            header_limits=HEADER_LIMITS,
        )
        return Pipeline(self._service, vring, ring.num, indirect, self._poll_us, self._name)

    def _forget_ring(self) -> None:
        """Its memory or its meaning is about to go. Requests that are still out get no answer."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            if pipeline.jobs:
                log.warning("%s: %d requests were dropped", self._name, pipeline.jobs)
            pipeline.close()

    def _break(self, reason: str) -> None:
        log.error("%s: ring stopped until the guest resets it: %s", self._name, reason)
        self._session.mark_broken()
        self._position = None
        self._forget_ring()
        self._signal_err()

    def _signal_err(self) -> None:
        if self._err != _NONE:
            signal_err(self._err)

    # Effects

    def _apply(self, effect: Effect) -> None:
        match effect:
            case SetMemory(regions, fds):
                memory = GuestMemory()
                try:
                    for region, fd in zip(regions, fds, strict=True):
                        memory.add(region.gpa, region.size, region.ua, region.offset, fd)
                except OSError:
                    memory.close()
                    raise
                self._forget_ring()
                self._memory.close()
                self._memory = memory
            case AddRegion(region, fd):
                try:
                    self._memory.add(region.gpa, region.size, region.ua, region.offset, fd)
                except FileExistsError:
                    self._forget_ring()
                    self._memory.remove(region.gpa, region.size, region.ua)
                    self._memory.add(region.gpa, region.size, region.ua, region.offset, fd)
            case RemoveRegion(region):
                self._forget_ring()
                self._memory.remove(region.gpa, region.size, region.ua)
            case SetKick(kick):
                self._kick = _replace(self._kick, kick)
            case SetCall(call):
                self._call = _replace(self._call, call)
                if self._pipeline is not None:
                    self._pipeline.set_call(self._call)
                if self._call != _NONE:
                    # A notification may have gone to the old one just before.
                    signal_err(self._call)
            case SetErr(err):
                self._err = _replace(self._err, err)
            case SetChannel(fd):
                # User-Mode Linux needs it for its interrupts; there is nothing to say on it.
                self._channel = _replace(self._channel, fd)
            case RingFault():
                self._signal_err()
            case StopRing():
                # It is parked. It keeps its descriptors: the same ring may go on with them.
                pass
            case ResetSession():
                self._position = None
                self._forget_ring()
                self._service.restart()
                self._memory.close()
                self._kick = _replace(self._kick, None)
                self._call = _replace(self._call, None)
                self._err = _replace(self._err, None)
            case ResetDevice():
                self._position = None
                self._forget_ring()
                self._service.restart()


def _replace(old: int, new: int | None) -> int:
    """Take a lent descriptor in the place of an old one."""
    if new is None:
        if old != _NONE:
            os.close(old)
        return _NONE
    if old == _NONE:
        return os.dup(new)
    return os.dup2(new, old, inheritable=False)
