"""Asks a vhost-user session message by message, without a socket."""

import struct

from ninepd.vhostuser.messages import (
    CONFIG,
    MEMORY_TABLE,
    MESSAGE_HEADER,
    NEED_REPLY,
    REGION,
    REPLY,
    UINT64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    ConfigSpace,
    Header,
    MemoryRegion,
    Message,
    Request,
    VringAddr,
    VringState,
)
from ninepd.vhostuser.session import (
    OFFERED_FEATURES,
    OFFERED_PROTOCOL_FEATURES,
    BackendSession,
    Effect,
)
from ninepd.vhostuser.state import State

CONFIG_SPACE = struct.pack("<H", 4) + b"home"

# The low and the high part of a q35 guest: one file, a hole between them.
LOW = MemoryRegion(gpa=0, size=1 << 31, ua=0x7F00_0000_0000, offset=0)
HIGH = MemoryRegion(gpa=1 << 32, size=1 << 31, ua=0x7F00_8000_0000, offset=1 << 31)
RING = VringAddr(
    queue=0, flags=0, desc=LOW.ua + 0x1000, used=LOW.ua + 0x3000, avail=LOW.ua + 0x2000, log=0
)
TOP = (1 << 64) - 1


class Dialogue:
    """Talks to a session; every effect succeeds; the last one is in ``effect``."""

    def __init__(self, negotiated: bool = True) -> None:
        self.session = BackendSession(CONFIG_SPACE)
        self.effect: Effect | None = None
        self.refusal: str | None = None
        if negotiated:
            self.ack(Request.SET_PROTOCOL_FEATURES, UINT64.pack(OFFERED_PROTOCOL_FEATURES))

    @property
    def state(self) -> State:
        return self.session.state

    def send(
        self, request: int, payload: bytes = b"", *fds: int, flags: int = VERSION
    ) -> bytes | None:
        """The body of the reply."""
        message = Message(Header(request, flags, len(payload)), payload, fds)
        step = self.session.handle(message)
        self.effect, self.refusal = step.effect, step.refusal
        if step.reply is None:
            return None
        header = MESSAGE_HEADER.unpack(step.reply[:12])
        assert header == (request, VERSION | REPLY, len(step.reply) - 12)
        return step.reply[12:]

    def ack(self, request: int, payload: bytes = b"", *fds: int) -> int:
        body = self.send(request, payload, *fds, flags=VERSION | NEED_REPLY)
        assert body is not None
        verdict = UINT64.unpack(body)
        assert bool(verdict) == (self.refusal is not None)
        return verdict

    def get(self, request: int) -> int:
        body = self.send(request)
        assert body is not None
        return UINT64.unpack(body)

    def config(self, offset: int, size: int, flags: int = 0) -> bytes:
        body = self.send(
            Request.GET_CONFIG, CONFIG.pack(ConfigSpace(offset, flags, b"\xff" * size))
        )
        assert body is not None
        config = CONFIG.unpack(body)
        assert config[:2] == (offset, flags)
        return config.data

    def num(self, num: int, queue: int = 0) -> int:
        return self.ack(Request.SET_VRING_NUM, VRING_STATE.pack(VringState(queue, num)))

    def base(self, num: int, queue: int = 0) -> int:
        return self.ack(Request.SET_VRING_BASE, VRING_STATE.pack(VringState(queue, num)))

    def addr(self, addr: VringAddr = RING) -> int:
        return self.ack(Request.SET_VRING_ADDR, VRING_ADDR.pack(addr))

    def kick(self, fd: int = 10) -> int:
        return self.ack(Request.SET_VRING_KICK, UINT64.pack(0), fd)

    def enable(self, on: int, queue: int = 0) -> int:
        return self.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(VringState(queue, on)))

    def table(self, *regions: MemoryRegion) -> int:
        fds = range(20, 20 + len(regions))
        return self.ack(Request.SET_MEM_TABLE, MEMORY_TABLE.pack(regions), *fds)

    def add(self, region: MemoryRegion, *fds: int) -> int:
        return self.ack(Request.ADD_MEM_REG, REGION.pack(region), *(fds or (20,)))

    def remove(self, region: MemoryRegion, *fds: int) -> int:
        return self.ack(Request.REM_MEM_REG, REGION.pack(region), *fds)

    def stop(self, queue: int = 0) -> VringState:
        body = self.send(Request.GET_VRING_BASE, VRING_STATE.pack(VringState(queue, 0)))
        assert body is not None
        return VRING_STATE.unpack(body)

    def set_up(self, base: int = 0) -> None:
        """All but KICK and ENABLE."""
        assert self.ack(Request.SET_FEATURES, UINT64.pack(OFFERED_FEATURES)) == 0
        assert self.table(LOW, HIGH) == 0
        assert self.num(128) == 0
        assert self.base(base) == 0
        assert self.addr() == 0

    def run(self, base: int = 0) -> None:
        self.set_up(base)
        assert self.kick() == 0
        assert self.enable(1) == 0
        assert self.state.runnable
