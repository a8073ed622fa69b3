"""A fake front end for tests: it speaks vhost-user over a real socket, well or badly on request.

The sequences are those of QEMU (hw/virtio/vhost-user.c) and User-Mode Linux
(arch/um/drivers/virtio_uml.c). Descriptors stay the caller's.
"""

import array
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple, Self

from ninepd.vhostuser.messages import (
    CONFIG,
    MEMORY_TABLE,
    MESSAGE_HEADER,
    NEED_REPLY,
    NOFD,
    REGION,
    REPLY,
    REQUESTS,
    UINT64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    ConfigSpace,
    Header,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VirtioFeature,
    VringAddr,
    VringState,
)

ALL_FEATURES = sum(VirtioFeature)
ALL_PROTOCOL_FEATURES = sum(ProtocolFeature)


class SharedRegion(NamedTuple):
    """A piece of guest memory and the descriptor of the file that holds it."""

    gpa: int
    size: int
    ua: int
    offset: int
    fd: int

    @property
    def wire(self) -> MemoryRegion:
        return MemoryRegion(*self[:4])


class Ring(NamedTuple):
    """Where the guest has its ring, in user addresses, and the eventfds of the front end."""

    num: int
    desc: int
    avail: int
    used: int
    kick: int | None
    call: int | None


class FakeFrontEnd:
    """Connects to ``peer``, a path or a connected socket. Nothing waits over ten seconds."""

    def __init__(self, peer: str | socket.socket) -> None:
        if isinstance(peer, str):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.connect(peer)
        else:
            self.socket = peer
        self.socket.settimeout(10)
        # Our end of the back-end channel, once SET_BACKEND_REQ_FD was sent.
        self.channel: socket.socket | None = None
        self._regions: dict[MemoryRegion, SharedRegion] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        if self.channel is not None:
            self.channel.close()

    # Single messages.

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """One message, which may lie about its size."""
        header = Header(request, flags, len(payload) if size is None else size)
        self.send_bytes(MESSAGE_HEADER.pack(header) + payload, fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        sent = self.socket.sendmsg([data], ancillary)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def receive(self, request: int) -> bytes:
        """The body of the next reply, which must be one to ``request``."""
        header = MESSAGE_HEADER.unpack(self._exactly(MESSAGE_HEADER.size))
        assert header[:2] == (request, VERSION | REPLY), header
        return self._exactly(header.size)

    def request(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        need_reply: bool = False,
    ) -> bytes | None:
        """One message and the body of its reply, or None if none is due."""
        self.send(request, payload, fds, flags=VERSION | (NEED_REPLY if need_reply else 0))
        rule = REQUESTS.get(request)
        if need_reply or (rule is not None and rule.refusal is not None):
            return self.receive(request)
        return None

    def ack(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """One message with NEED_REPLY: 0 for done, anything else for refused."""
        reply = self.request(request, payload, fds, need_reply=True)
        assert reply is not None
        return UINT64.unpack(reply)

    def get(self, request: int) -> int:
        """What a request without payload answers."""
        reply = self.request(request)
        assert reply is not None
        return UINT64.unpack(reply)

    def done(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """One message that must not be refused."""
        assert self.ack(request, payload, fds) == 0, Request(request).name

    def get_config(self, size: int, offset: int = 0) -> bytes:
        reply = self.request(Request.GET_CONFIG, CONFIG.pack(ConfigSpace(offset, 0, bytes(size))))
        assert reply is not None
        config = CONFIG.unpack(reply)
        assert (config.offset, len(config.data)) == (offset, size)
        return config.data

    def set_vring_fd(self, request: Request, fd: int | None) -> None:
        self.done(request, UINT64.pack(NOFD if fd is None else 0), () if fd is None else (fd,))

    def enable(self, on: bool) -> int:
        return self.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(VringState(0, int(on))))

    def add_region(self, region: SharedRegion) -> int:
        return self.ack(Request.ADD_MEM_REG, REGION.pack(region.wire), [region.fd])

    def remove_region(self, region: SharedRegion) -> int:
        return self.ack(Request.REM_MEM_REG, REGION.pack(region.wire))

    def set_mem_table(self, regions: Sequence[SharedRegion]) -> int:
        table = MEMORY_TABLE.pack(tuple(region.wire for region in regions))
        return self.ack(Request.SET_MEM_TABLE, table, [region.fd for region in regions])

    # QEMU.

    def connect(self, protocol_features: int = ALL_PROTOCOL_FEATURES) -> None:
        """As QEMU does when the device is realized."""
        self.get(Request.GET_FEATURES)
        offered = self.get(Request.GET_PROTOCOL_FEATURES)
        self.done(Request.SET_PROTOCOL_FEATURES, UINT64.pack(offered & protocol_features))
        assert self.get(Request.GET_QUEUE_NUM) == 1
        assert self.get(Request.GET_MAX_MEM_SLOTS) >= 509
        self.set_channel()
        self.done(Request.SET_OWNER)
        self._regions = {}
        self.get(Request.GET_FEATURES)
        dummy = os.eventfd(0)
        self.set_vring_fd(Request.SET_VRING_CALL, dummy)
        self.set_vring_fd(Request.SET_VRING_ERR, dummy)
        os.close(dummy)

    def start(
        self,
        regions: Sequence[SharedRegion],
        ring: Ring,
        base: int = 0,
        features: int = ALL_FEATURES,
    ) -> int:
        """As QEMU does at DRIVER_OK; the answer to ENABLE. Only changes of memory are sent."""
        self.done(Request.SET_FEATURES, UINT64.pack(features))
        wanted = {region.wire: region for region in regions}
        for wire, region in reversed(self._regions.items()):
            if wire not in wanted:
                assert self.remove_region(region) == 0
        for wire, region in wanted.items():
            if wire not in self._regions:
                assert self.add_region(region) == 0
        self._regions = wanted
        self._set_up(ring, base)
        self.set_vring_fd(Request.SET_VRING_KICK, ring.kick)
        self.set_vring_fd(Request.SET_VRING_CALL, ring.call)
        answer = self.enable(True)
        self.set_vring_fd(Request.SET_VRING_CALL, ring.call)
        return answer

    def stop(self) -> int:
        """As QEMU does when the guest resets the device; the base to go on from."""
        assert self.enable(False) == 0
        state = VRING_STATE.pack(VringState(0, 0))
        reply = self.request(Request.GET_VRING_BASE, state)
        assert reply is not None
        return VRING_STATE.unpack(reply).num

    # User-Mode Linux.

    def connect_uml(self) -> None:
        """As UML does when its platform device is probed."""
        self.done(Request.SET_OWNER)
        self.get(Request.GET_FEATURES)
        offered = self.get(Request.GET_PROTOCOL_FEATURES)
        uml = ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
        self.done(Request.SET_PROTOCOL_FEATURES, UINT64.pack(offered & (uml | ProtocolFeature.MQ)))
        self.set_channel()
        assert self.get(Request.GET_QUEUE_NUM) == 1

    def start_uml(self, region: SharedRegion, ring: Ring, features: int = ALL_FEATURES) -> int:
        """As UML does when the 9P driver binds; the answer to ENABLE. Its log address is ~0."""
        self.done(Request.SET_FEATURES, UINT64.pack(features))
        assert self.set_mem_table([region]) == 0
        self.set_vring_fd(Request.SET_VRING_CALL, ring.call)
        self._set_up(ring, 0, log=(1 << 64) - 1)
        self.set_vring_fd(Request.SET_VRING_KICK, ring.kick)
        return self.enable(True)

    def stop_uml(self) -> None:
        """As UML does when the driver unbinds; it frees the ring after the barrier."""
        assert self.enable(False) == 0
        self.get(Request.GET_FEATURES)

    # Parts of sequences.

    def set_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.done(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def _set_up(self, ring: Ring, base: int, log: int = 0) -> None:
        address = VringAddr(0, 0, ring.desc, ring.used, ring.avail, log)
        self.done(Request.SET_VRING_NUM, VRING_STATE.pack(VringState(0, ring.num)))
        self.done(Request.SET_VRING_BASE, VRING_STATE.pack(VringState(0, base)))
        self.done(Request.SET_VRING_ADDR, VRING_ADDR.pack(address))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            assert piece, "the back end closed the connection"
            data += piece
        return data
