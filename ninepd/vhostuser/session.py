"""The vhost-user session of one connection: a message in, an effect and a reply out.

``Session.handle`` never raises and does no I/O. It moves ``state`` and returns a ``Step``: the
effect that the device has still to apply, and the reply to send after that, because a reply means
that the change is effective. An effect that fails goes to ``Session.refuse``, which takes the
state change back: the two sides change together or not at all, and the connection stays, since
QEMU and User-Mode Linux cannot survive losing it.

The device parks the ring before a message that ``disturbs`` it, telling ``parked_at`` or
``mark_broken``, and afterwards lets the ring run if ``state.runnable``.

Descriptors in effects are lent for the step: the device duplicates those that it keeps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ninepd.errors import Refused
from ninepd.vhostuser.messages import (
    CONFIG,
    LOG_AREA,
    LOG_USED,
    NEED_REPLY,
    NOFD,
    REQUESTS,
    UINT64,
    VRING_STATE,
    ConfigSpace,
    LogArea,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VirtioFeature,
    VringAddr,
    VringState,
    decode,
    reply,
)
from ninepd.vhostuser.state import MAX_MEM_SLOTS, MAX_QUEUE_SIZE, State, check_regions

OFFERED_FEATURES = sum(VirtioFeature)
OFFERED_PROTOCOL_FEATURES = sum(ProtocolFeature)
QUEUES = 1

_ACK, _NACK = UINT64.pack(0), UINT64.pack(1)


@dataclass(frozen=True, slots=True)
class SetMemory:
    """Replace the whole memory table."""

    regions: tuple[MemoryRegion, ...]
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AddRegion:
    """Map a region, in the place of an equal one if there is one."""

    region: MemoryRegion
    fd: int


@dataclass(frozen=True, slots=True)
class RemoveRegion:
    """Unmap the region, which is equal to the one that was added."""

    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class SetKick:
    """Replace the kick eventfd; None: no kicks will come."""

    fd: int | None


@dataclass(frozen=True, slots=True)
class SetCall:
    """Replace the call eventfd, or socket under User-Mode Linux; None: the guest polls."""

    fd: int | None


@dataclass(frozen=True, slots=True)
class SetErr:
    """Replace the eventfd that tells of a broken ring."""

    fd: int | None


@dataclass(frozen=True, slots=True)
class SetChannel:
    """Replace the back-end channel, the socket for requests to the front end."""

    fd: int


@dataclass(frozen=True, slots=True)
class SetLog:
    """Replace the dirty log."""

    area: LogArea
    fd: int


@dataclass(frozen=True, slots=True)
class DropLog:
    """Nothing is logged any more."""


@dataclass(frozen=True, slots=True)
class SetLogSignal:
    """Replace the eventfd that tells of new marks in the log."""

    fd: int


@dataclass(frozen=True, slots=True)
class RingFault:
    """The ring was told to run and cannot: signal the err eventfd. Comes with a refusal."""


@dataclass(frozen=True, slots=True)
class StopRing:
    """GET_VRING_BASE: finish or park what is in flight."""


@dataclass(frozen=True, slots=True)
class ResetSession:
    """SET_OWNER: drop memory, ring eventfds and the 9P session; keep the back-end channel."""


@dataclass(frozen=True, slots=True)
class ResetDevice:
    """RESET_DEVICE: drop the 9P session and whatever is in flight."""


Effect = (
    SetMemory
    | AddRegion
    | RemoveRegion
    | SetKick
    | SetCall
    | SetErr
    | SetChannel
    | SetLog
    | DropLog
    | SetLogSignal
    | RingFault
    | StopRing
    | ResetSession
    | ResetDevice
)


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one message. ``refusal`` is the reason, for the log, if the answer is no."""

    message: Message
    before: State
    effect: Effect | None = None
    reply: bytes | None = None
    refusal: str | None = None


class BackendSession:
    """``config_space`` is what the guest driver reads: le16 tag length, then the tag."""

    def __init__(self, config_space: bytes) -> None:
        self.state = State(config_space)

    def handle(self, message: Message) -> Step:
        step = Step(message, self.state)
        try:
            body = decode(message, self.state.protocol_features)
            done = _HANDLERS[message.header.request](self.state, body, message.fds)
        except _CannotRun as refusal:
            return replace(self.refuse(step, str(refusal)), effect=RingFault())
        except Refused as refusal:
            return self.refuse(step, str(refusal))
        self.state = done.state
        return replace(step, effect=done.effect, reply=self._answer(message, done.body))

    def refuse(self, step: Step, reason: str) -> Step:
        """The step that takes ``step`` back, for an effect that could not be applied."""
        self.state = step.before
        rule = REQUESTS.get(step.message.header.request)
        refusal = None if rule is None else rule.refusal_with(self.state.protocol_features)
        body = _NACK if refusal is None else refusal
        return Step(step.message, step.before, None, self._answer(step.message, body), reason)

    def _answer(self, message: Message, body: bytes) -> bytes | None:
        """A request with a body of its own is answered always, others if the message asks for it.

        The bit in the message counts, not REPLY_ACK: User-Mode Linux sets it on the very
        SET_PROTOCOL_FEATURES that negotiates it (arch/um/drivers/virtio_uml.c).
        """
        rule = REQUESTS.get(message.header.request)
        waits = rule is not None and rule.refusal_with(self.state.protocol_features) is not None
        if waits or message.header.flags & NEED_REPLY:
            return reply(message.header.request, body)
        return None

    def parked_at(self, base: int) -> None:
        """The device stopped the ring; ``base`` is the next available entry to take."""
        self.state = self.state.with_ring(base=base)

    def mark_broken(self) -> None:
        """Until GET_VRING_BASE, SET_OWNER, or new addresses with a KICK or ENABLE."""
        self.state = self.state.with_ring(broken=True, readdressed=False)


class _CannotRun(Refused):
    """The ring would run after this message, but is not set up soundly."""


class _Done(NamedTuple):
    """What a handler returns. The body is sent if one is due."""

    state: State
    effect: Effect | None = None
    body: bytes = _ACK


def _number(value: int) -> "_Handler":
    return lambda state, _body, _fds: _Done(state, body=UINT64.pack(value))


def _set_features(state: State, features: int, _fds: tuple[int, ...]) -> _Done:
    if extra := features & ~OFFERED_FEATURES:
        raise Refused(f"feature bits {extra:#x} were not offered")
    # Without PROTOCOL_FEATURES no SET_VRING_ENABLE will come.
    enabled = state.ring.enabled or not features & VirtioFeature.PROTOCOL_FEATURES
    changed = replace(state, features=features).with_ring(enabled=enabled)
    # A guest can take LOG_ALL, too, since QEMU shows it: harmless without a log.
    return _Done(changed, DropLog() if state.logging and not changed.logging else None)


def _set_protocol_features(state: State, features: int, _fds: tuple[int, ...]) -> _Done:
    if extra := features & ~OFFERED_PROTOCOL_FEATURES:
        raise Refused(f"protocol feature bits {extra:#x} were not offered")
    return _Done(replace(state, protocol_features=features))


def _set_owner(state: State, _body: tuple[()], _fds: tuple[int, ...]) -> _Done:
    # QEMU negotiates protocol features and the channel before this, User-Mode Linux after.
    fresh = State(state.config_space, protocol_features=state.protocol_features)
    return _Done(fresh, ResetSession())


def _reset_owner(state: State, _body: tuple[()], _fds: tuple[int, ...]) -> _Done:
    return _Done(state.with_ring(enabled=False))


def _reset_device(state: State, _body: tuple[()], _fds: tuple[int, ...]) -> _Done:
    return _Done(state.with_ring(enabled=False), ResetDevice())


def _set_backend_req_fd(state: State, _body: tuple[()], fds: tuple[int, ...]) -> _Done:
    return _Done(state, SetChannel(fds[0]))


def _get_config(state: State, piece: ConfigSpace, _fds: tuple[int, ...]) -> _Done:
    size = len(piece.data)
    data = state.config_space[piece.offset :][:size].ljust(size, b"\0")
    return _Done(state, body=CONFIG.pack(piece._replace(data=data)))


def _set_config(state: State, _piece: ConfigSpace, _fds: tuple[int, ...]) -> _Done:
    # Nothing in it can be written; a NACK would make cloud-hypervisor panic.
    return _Done(state)


def _set_mem_table(state: State, regions: tuple[MemoryRegion, ...], fds: tuple[int, ...]) -> _Done:
    check_regions(regions)
    return _Done(replace(state, regions=regions), SetMemory(regions, fds))


def _add_mem_reg(state: State, region: MemoryRegion, fds: tuple[int, ...]) -> _Done:
    # QEMU adds all regions again when the device is plugged in again on the same socket.
    if region not in state.regions:
        state = replace(state, regions=(*state.regions, region))
        check_regions(state.regions)
    return _Done(state, AddRegion(region, fds[0]))


def _rem_mem_reg(state: State, wanted: MemoryRegion, _fds: tuple[int, ...]) -> _Done:
    for region in state.regions:
        if region == wanted._replace(offset=region.offset):
            rest = tuple(r for r in state.regions if r != region)
            return _Done(replace(state, regions=rest), RemoveRegion(region))
    raise Refused(f"there is no memory region of {wanted.size:#x} bytes at {wanted.gpa:#x}")


def _set_log_base(state: State, area: LogArea, fds: tuple[int, ...]) -> _Done:
    return _Done(state, SetLog(area, fds[0]), LOG_AREA.pack(area))


def _set_log_fd(state: State, _body: tuple[()], fds: tuple[int, ...]) -> _Done:
    return _Done(state, SetLogSignal(fds[0]))


def _set_vring_num(state: State, vring: VringState, _fds: tuple[int, ...]) -> _Done:
    _check_queue(vring.queue)
    if not 0 < vring.num <= MAX_QUEUE_SIZE or vring.num & (vring.num - 1):
        raise Refused(f"ring size {vring.num} is not a power of two up to {MAX_QUEUE_SIZE}")
    return _Done(_sound(state.with_ring(num=vring.num)))


def _set_vring_addr(state: State, addr: VringAddr, _fds: tuple[int, ...]) -> _Done:
    _check_queue(addr.queue)
    # Without the flag the log address means nothing: User-Mode Linux sends ~0.
    log = addr.log if addr.flags & LOG_USED else None
    parts = {"desc": addr.desc, "avail": addr.avail, "used": addr.used, "log": log}
    return _Done(_sound(state.with_ring(**parts, addressed=True, readdressed=state.ring.broken)))


def _set_vring_base(state: State, vring: VringState, _fds: tuple[int, ...]) -> _Done:
    _check_queue(vring.queue)
    return _Done(state.with_ring(base=vring.num & 0xFFFF))


def _get_vring_base(state: State, vring: VringState, _fds: tuple[int, ...]) -> _Done:
    _check_queue(vring.queue)
    stopped = state.with_ring(started=False, broken=False, readdressed=False)
    return _Done(stopped, StopRing(), VRING_STATE.pack(vring._replace(num=state.ring.base)))


def _set_vring_kick(state: State, value: int, fds: tuple[int, ...]) -> _Done:
    # The message starts the ring, not the first kick: QEMU and User-Mode Linux write none.
    kick = _vring_fd(value, fds)
    return _Done(_sound(state.mended().with_ring(started=True)), SetKick(kick))


def _set_vring_call(state: State, value: int, fds: tuple[int, ...]) -> _Done:
    return _Done(state, SetCall(_vring_fd(value, fds)))


def _set_vring_err(state: State, value: int, fds: tuple[int, ...]) -> _Done:
    return _Done(state, SetErr(_vring_fd(value, fds)))


def _set_vring_enable(state: State, vring: VringState, _fds: tuple[int, ...]) -> _Done:
    # QEMU also enables rings that it never set up; those are not started, so all is well.
    _check_queue(vring.queue)
    if vring.num > 1:
        raise Refused(f"enable is 0 or 1, not {vring.num}")
    enabled = bool(vring.num)
    return _Done(_sound((state.mended() if enabled else state).with_ring(enabled=enabled)))


def _sound(state: State) -> State:
    if state.wanted and (fault := state.ring_fault()) is not None:
        raise _CannotRun(fault)
    return state


def _check_queue(queue: int) -> None:
    if queue >= QUEUES:
        raise Refused(f"there is no ring {queue}")


def _vring_fd(value: int, fds: tuple[int, ...]) -> int | None:
    _check_queue(value & ~NOFD)
    return fds[0] if fds else None


_Handler = Callable[[State, Any, tuple[int, ...]], _Done]

_HANDLERS: Mapping[int, _Handler] = {
    Request.GET_FEATURES: _number(OFFERED_FEATURES),
    Request.SET_FEATURES: _set_features,
    Request.SET_OWNER: _set_owner,
    Request.RESET_OWNER: _reset_owner,
    Request.SET_MEM_TABLE: _set_mem_table,
    Request.SET_LOG_BASE: _set_log_base,
    Request.SET_LOG_FD: _set_log_fd,
    Request.SET_VRING_NUM: _set_vring_num,
    Request.SET_VRING_ADDR: _set_vring_addr,
    Request.SET_VRING_BASE: _set_vring_base,
    Request.GET_VRING_BASE: _get_vring_base,
    Request.SET_VRING_KICK: _set_vring_kick,
    Request.SET_VRING_CALL: _set_vring_call,
    Request.SET_VRING_ERR: _set_vring_err,
    Request.GET_PROTOCOL_FEATURES: _number(OFFERED_PROTOCOL_FEATURES),
    Request.SET_PROTOCOL_FEATURES: _set_protocol_features,
    Request.GET_QUEUE_NUM: _number(QUEUES),
    Request.SET_VRING_ENABLE: _set_vring_enable,
    Request.SET_BACKEND_REQ_FD: _set_backend_req_fd,
    Request.GET_CONFIG: _get_config,
    Request.SET_CONFIG: _set_config,
    Request.RESET_DEVICE: _reset_device,
    Request.GET_MAX_MEM_SLOTS: _number(MAX_MEM_SLOTS),
    Request.ADD_MEM_REG: _add_mem_reg,
    Request.REM_MEM_REG: _rem_mem_reg,
}
