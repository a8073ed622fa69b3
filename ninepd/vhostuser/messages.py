"""The vhost-user wire: numbers, payload codecs, and what a message must look like.

``REQUESTS`` has one row per front-end request, and ``decode`` checks a message against its row:
flags, negotiated feature, payload size, number of descriptors. That is all the syntax there is;
what a message means is decided in ``session``. Integers are in host byte order and structs have
their natural C layout (QEMU docs/interop/vhost-user.rst).
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ninepd.errors import Refused

VERSION = 1
REPLY = 1 << 2
NEED_REPLY = 1 << 3

# SET_VRING_{KICK,CALL,ERR}: the message carries no descriptor.
NOFD = 1 << 8

# SET_VRING_ADDR: writes to the used ring are logged, too (VHOST_VRING_F_LOG).
LOG_USED = 1 << 0


class Request(IntEnum):
    """What a front end may ask."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class VirtioFeature(IntFlag):
    """The virtio feature bits this back end offers."""

    MOUNT_TAG = 1 << 0
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


class ProtocolFeature(IntFlag):
    """The vhost-user feature bits this back end offers."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5  # User-Mode Linux sets up no interrupt without it
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15


T = TypeVar("T")


class PayloadCodec(Protocol[T]):
    """A payload's bytes and its Python value; ``unpack`` raises Refused."""

    def pack(self, value: T, /) -> bytes: ...
    def unpack(self, payload: bytes, /) -> T: ...


class Fixed(Generic[T]):
    """A payload of one size: ``make`` builds its value from the fields of the struct."""

    def __init__(self, layout: str, make: Callable[..., T]) -> None:
        self._struct = struct.Struct(layout)
        self._make = make
        self.size = self._struct.size

    def pack(self, value: T) -> bytes:
        return self._struct.pack(*(value if isinstance(value, tuple) else (value,)))

    def unpack(self, payload: bytes) -> T:
        if len(payload) != self.size:
            raise Refused(f"payload has {len(payload)} bytes instead of {self.size}")
        return self._make(*self._struct.unpack(payload))


class Header(NamedTuple):
    request: int
    flags: int
    size: int


class VringState(NamedTuple):
    queue: int
    num: int


class VringAddr(NamedTuple):
    """Where the parts of a ring are, in user addresses; on the wire used precedes avail."""

    queue: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


class MemoryRegion(NamedTuple):
    """``size`` bytes of guest memory at ``offset`` in the file of its descriptor."""

    gpa: int
    size: int
    ua: int
    offset: int


class LogArea(NamedTuple):
    """The dirty log: ``size`` bytes at ``offset`` in the file of its descriptor."""

    size: int
    offset: int


class ConfigSpace(NamedTuple):
    """A piece of the device's configuration space."""

    offset: int
    flags: int
    data: bytes


class _MemoryTable:
    """SET_MEM_TABLE: u32 count, u32 padding, then exactly that many regions."""

    _count = struct.Struct("=I4x")
    _region = struct.Struct("=QQQQ")

    def pack(self, regions: tuple[MemoryRegion, ...]) -> bytes:
        return self._count.pack(len(regions)) + b"".join(self._region.pack(*r) for r in regions)

    def unpack(self, payload: bytes) -> tuple[MemoryRegion, ...]:
        if len(payload) < self._count.size:
            raise Refused(f"payload of {len(payload)} bytes has no region count")
        (count,) = self._count.unpack_from(payload)
        if len(payload) != self._count.size + count * self._region.size:
            raise Refused(f"payload of {len(payload)} bytes does not hold {count} regions")
        regions = self._region.iter_unpack(payload[self._count.size :])
        return tuple(MemoryRegion(*fields) for fields in regions)


class _Config:
    """GET_CONFIG, SET_CONFIG: u32 offset, size, flags, then exactly ``size`` bytes."""

    _head = struct.Struct("=III")

    def pack(self, value: ConfigSpace) -> bytes:
        return self._head.pack(value.offset, len(value.data), value.flags) + value.data

    def unpack(self, payload: bytes) -> ConfigSpace:
        if len(payload) < self._head.size:
            raise Refused(f"payload of {len(payload)} bytes has no offset, size and flags")
        offset, size, flags = self._head.unpack_from(payload)
        data = payload[self._head.size :]
        if len(data) != size:
            raise Refused(f"payload has {len(data)} configuration bytes instead of {size}")
        return ConfigSpace(offset, flags, data)


MESSAGE_HEADER = Fixed("=III", Header)
NOTHING: Fixed[tuple[()]] = Fixed("=", lambda: ())
UINT64: Fixed[int] = Fixed("=Q", int)
VRING_STATE = Fixed("=II", VringState)
VRING_ADDR = Fixed("=IIQQQQ", VringAddr)
REGION = Fixed("=8xQQQQ", MemoryRegion)
LOG_AREA = Fixed("=QQ", LogArea)
MEMORY_TABLE = _MemoryTable()
CONFIG = _Config()


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came. ``fault`` says why the transport could not deliver all of it."""

    header: Header
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    fault: str | None = None

    @property
    def name(self) -> str:
        request = self.header.request
        return Request(request).name if request in REQUESTS else f"request {request}"

    @property
    def disturbs(self) -> bool:
        """Must the ring be at rest while this message is handled?"""
        rule = REQUESTS.get(self.header.request)
        return rule is not None and rule.disturbs


def reply(request: int, body: bytes) -> bytes:
    """QEMU and User-Mode Linux compare a reply's flags for equality: NEED_REPLY must be clear."""
    return MESSAGE_HEADER.pack(Header(request, VERSION | REPLY, len(body))) + body


def _surplus(_body: Any) -> None:
    """Takes no descriptor; surplus ones do no harm."""


def _one(_body: Any) -> int:
    return 1


def _one_unless_nofd(body: int) -> int:
    return 0 if body & NOFD else 1


def _one_each(body: tuple[MemoryRegion, ...]) -> int:
    return len(body)


class Rule(NamedTuple):
    """What one request must look like, and how it is answered when it cannot be served."""

    # None: depends on something that is not offered, hence always refused.
    payload: PayloadCodec[Any] | None = None
    # The exact number of descriptors for a body, or None for any.
    fds: Callable[[Any], int | None] = _surplus
    # The protocol feature that must have been negotiated.
    feature: ProtocolFeature | None = None
    # The body that says "no" where the front end waits for one; None: a u64, if asked for.
    refusal: bytes | None = None
    # The ring must be at rest meanwhile.
    disturbs: bool = False
    # Without the feature, the front end waits for no body.
    silent_without: ProtocolFeature | None = None

    def refusal_with(self, protocol_features: int) -> bytes | None:
        """The body of a refusal that the front end waits for, if it does."""
        if self.silent_without is not None and not protocol_features & self.silent_without:
            return None
        return self.refusal


_ZERO, _ONE = UINT64.pack(0), UINT64.pack(1)
_NO_STATE = VRING_STATE.pack(VringState(0, 0))
_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
_LOG = ProtocolFeature.LOG_SHMFD

REQUESTS: Mapping[int, Rule] = {
    Request.GET_FEATURES: Rule(NOTHING, refusal=_ZERO),
    Request.SET_FEATURES: Rule(UINT64, disturbs=True),
    Request.SET_OWNER: Rule(NOTHING, disturbs=True),
    Request.RESET_OWNER: Rule(NOTHING, disturbs=True),
    Request.SET_MEM_TABLE: Rule(MEMORY_TABLE, _one_each, disturbs=True),
    # Its reply is the payload; the rust-vmm front end blocks for all 16 bytes of it.
    Request.SET_LOG_BASE: Rule(
        LOG_AREA, _one, _LOG, refusal=bytes(16), disturbs=True, silent_without=_LOG
    ),
    Request.SET_LOG_FD: Rule(NOTHING, _one, disturbs=True),
    Request.SET_VRING_NUM: Rule(VRING_STATE, disturbs=True),
    Request.SET_VRING_ADDR: Rule(VRING_ADDR, disturbs=True),
    Request.SET_VRING_BASE: Rule(VRING_STATE, disturbs=True),
    Request.GET_VRING_BASE: Rule(VRING_STATE, refusal=_NO_STATE, disturbs=True),
    Request.SET_VRING_KICK: Rule(UINT64, _one_unless_nofd, disturbs=True),
    Request.SET_VRING_CALL: Rule(UINT64, _one_unless_nofd),
    Request.SET_VRING_ERR: Rule(UINT64, _one_unless_nofd),
    Request.GET_PROTOCOL_FEATURES: Rule(NOTHING, refusal=_ZERO),
    Request.SET_PROTOCOL_FEATURES: Rule(UINT64),
    Request.GET_QUEUE_NUM: Rule(NOTHING, feature=ProtocolFeature.MQ, refusal=_ZERO),
    Request.SET_VRING_ENABLE: Rule(VRING_STATE, disturbs=True),
    Request.SEND_RARP: Rule(),
    Request.NET_SET_MTU: Rule(),
    Request.SET_BACKEND_REQ_FD: Rule(NOTHING, _one, ProtocolFeature.BACKEND_REQ),
    Request.IOTLB_MSG: Rule(refusal=_ONE),
    Request.SET_VRING_ENDIAN: Rule(),
    # Both without a feature: serving them is harmless, refusing them makes cloud-hypervisor panic.
    Request.GET_CONFIG: Rule(CONFIG, refusal=b""),
    Request.SET_CONFIG: Rule(CONFIG),
    Request.CREATE_CRYPTO_SESSION: Rule(),
    Request.CLOSE_CRYPTO_SESSION: Rule(),
    Request.POSTCOPY_ADVISE: Rule(refusal=b""),
    Request.POSTCOPY_LISTEN: Rule(refusal=_ONE),
    Request.POSTCOPY_END: Rule(refusal=_ONE),
    Request.GET_INFLIGHT_FD: Rule(refusal=bytes(24)),
    Request.SET_INFLIGHT_FD: Rule(),
    Request.GPU_SET_SOCKET: Rule(),
    Request.RESET_DEVICE: Rule(NOTHING, feature=ProtocolFeature.RESET_DEVICE, disturbs=True),
    Request.VRING_KICK: Rule(),
    Request.GET_MAX_MEM_SLOTS: Rule(NOTHING, feature=_SLOTS, refusal=_ZERO),
    Request.ADD_MEM_REG: Rule(REGION, _one, _SLOTS, disturbs=True),
    Request.REM_MEM_REG: Rule(REGION, feature=_SLOTS, disturbs=True),
    Request.SET_STATUS: Rule(),
    Request.GET_STATUS: Rule(refusal=_ZERO),
    Request.GET_SHARED_OBJECT: Rule(refusal=b""),
    Request.SET_DEVICE_STATE_FD: Rule(refusal=UINT64.pack(0x101)),  # bit 8: no descriptor of ours
    Request.CHECK_DEVICE_STATE: Rule(refusal=_ONE),
    Request.GET_SHMEM_CONFIG: Rule(refusal=bytes(2056)),
    Request.GET_VRING_BASE_SKIP_DRAIN: Rule(refusal=_NO_STATE),
}


def decode(message: Message, protocol_features: int) -> Any:
    """The body of a message that agrees with its row of ``REQUESTS``; Refused otherwise."""
    if message.fault is not None:
        raise Refused(message.fault)
    if message.header.flags & ~NEED_REPLY != VERSION:
        raise Refused(f"flags {message.header.flags:#x} are not those of a request")
    rule = REQUESTS.get(message.header.request)
    if rule is None or rule.payload is None:
        raise Refused("not offered")
    if rule.feature is not None and not protocol_features & rule.feature:
        raise Refused(f"{rule.feature.name} was not negotiated")
    body = rule.payload.unpack(message.payload)
    expected = rule.fds(body)
    if expected is not None and len(message.fds) != expected:
        raise Refused(f"{len(message.fds)} descriptors came instead of {expected}")
    return body
