"""The typed face of the C file's rings: guest memory, and the virtqueue of one device.

Contract. ``wait`` and ``push`` are called by one thread at a time, the device thread, which may
be another one later. Between the two a request's slot belongs to one thread, which alone calls
the bulk functions on it. ``wake`` and ``set_call`` may come from anywhere. All else, and every
change to the memory, needs the ring parked and nobody in a bulk function; after such a change
comes ``relocate``.
"""

import errno
import mmap
import os
from collections.abc import Mapping
from importlib import import_module
from struct import Struct
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, cast

from mypy_extensions import i64

from ninepd.errors import RingBroken
from ninepd.stats import Stats

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from cffi import FFI

    CData: TypeAlias = FFI.CData
    Ring: TypeAlias = CData | None  # None once closed: cffi refuses it


class Counters(Protocol):
    """Where the device thread stands; reading it is free."""

    in_flight: int
    last_avail: int
    used_index: int


class _Lib(Protocol):
    NP_READABLE: int
    NP_WRITABLE: int
    NP_REGIONS_MAX: int
    NP_RING_MAX: int
    NP_MESSAGE_TYPES: int
    NP_LOG_PAGE: int
    NP_USED_BITS: int
    NP_COPY_BITS: int
    NP_TYPE_BITS: int
    NP_SLOT_BITS: int

    def np_memory_new(self) -> "CData": ...
    def np_memory_add(
        self, memory: "CData", gpa: int, size: int, ua: int, offset: int, fd: int, /
    ) -> int: ...
    def np_memory_remove(self, memory: "CData", gpa: int, size: int, ua: int, /) -> int: ...
    def np_memory_clear(self, memory: "CData", /) -> None: ...
    def np_memory_free(self, memory: "CData", /) -> None: ...
    def np_device(self, fd: int, /) -> int: ...
    def np_log_new(self) -> "CData": ...
    def np_log_map(self, log: "CData", size: int, offset: int, fd: int, /) -> int: ...
    def np_log_set_signal(self, log: "CData", fd: int, /) -> None: ...
    def np_log_skipped(self, log: "CData", /) -> int: ...
    def np_log_free(self, log: "CData", /) -> None: ...
    def np_vring_new(self, memory: "CData", config: "CData", /) -> "CData": ...
    def np_vring_free(self, ring: "Ring", /) -> None: ...
    def np_vring_broken(self, ring: "Ring", /) -> "CData": ...
    def np_vring_relocate(self, ring: "Ring", memory: "CData", /) -> int: ...
    def np_vring_continues(self, ring: "Ring", /) -> bool: ...
    def np_vring_set_call(self, ring: "Ring", fd: int, /) -> None: ...
    def np_vring_set_log(
        self, ring: "Ring", log: "CData", log_used: bool, used_gpa: int, /
    ) -> None: ...
    def np_vring_wait(self, ring: "Ring", spin_us_max: int, /) -> int: ...
    def np_vring_wake(self, ring: "Ring", /) -> None: ...
    def np_vring_set_alarm(self, ring: "Ring", at_ns: int, /) -> None: ...
    def np_vring_push(self, ring: "Ring", count: int, /) -> int: ...
    def np_vring_copy(
        self, ring: "Ring", stream: int, slot: int, skip: int, data: "CData", size: int, /
    ) -> int: ...
    def np_vring_move(
        self,
        ring: "Ring",
        stream: int,
        slot: int,
        skip: int,
        fd: int,
        count: int,
        offset: int,
        flags: int,
        /,
    ) -> int: ...
    def np_vring_write(
        self,
        ring: "Ring",
        slot: int,
        skip: int,
        fd: int,
        count: int,
        offset: int,
        keep_set_ids: bool,
        /,
    ) -> int: ...
    def np_signal(self, fd: int, /) -> None: ...
    def np_watch_new(self, tick_us: int, /) -> "CData": ...
    def np_watch_free(self, watch: "CData", /) -> None: ...
    def np_watch_wait(self, watch: "CData", /) -> int: ...
    def np_watch_rest(self, watch: "CData", /) -> None: ...
    def np_watch_stop(self, watch: "CData", /) -> None: ...


_module = import_module("ninepd._libvring")
_lib: _Lib = _module.lib
_ffi: "FFI" = _module.ffi
_uncleared = _ffi.new_allocator(should_clear_after_alloc=False)

REQUEST: Final = Struct(f"={_ffi.sizeof('np_request') // 4}I")
"""slot, readable, writable, header length, fault (an errno or 0), and what the header says, as it
came: size, type, tag."""
_USED_BITS: Final[i64] = _lib.NP_USED_BITS
_COPY_BITS: Final[i64] = _lib.NP_COPY_BITS
_TYPE_AT: Final[i64] = _USED_BITS + _COPY_BITS
_TYPE_BITS: Final[i64] = _lib.NP_TYPE_BITS
_SLOT_AT: Final[i64] = _TYPE_AT + _TYPE_BITS
_SLOT_BITS: Final[i64] = _lib.NP_SLOT_BITS
_DONE_SIZE: Final[int] = _ffi.sizeof("np_done")
# "n" is the one kind of 64 bits for which struct does not go through a copy of the bytes.
_PACK_DONE: Final = [Struct(f"{count}n").pack_into for count in range(65)]
RING_MAX: Final[int] = _lib.NP_RING_MAX
"""Entries of a ring (virtio 1.3, 2.7)."""
REGIONS_MAX: Final[int] = _lib.NP_REGIONS_MAX
LOG_PAGE: Final[int] = _lib.NP_LOG_PAGE
"""Bytes of guest memory for each bit of a dirty log."""


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _zeros(size: int) -> mmap.mmap:
    """Memory that costs nothing until it is used."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def done_entry(slot: i64, number: i64, copy: i64, used: i64) -> i64:
    """What ``Vring.push`` is told of a reply of type ``number`` and ``used`` bytes in all.

    ``copy`` of them stand in the slot's reply buffer. C writes the header, whose tag is the
    request's; of none if the type is 0.
    """
    if used >> _USED_BITS or copy >> _COPY_BITS or number >> _TYPE_BITS or slot >> _SLOT_BITS:
        raise ValueError("no push takes a reply like that")
    return used | copy << _USED_BITS | number << _TYPE_AT | slot << _SLOT_AT


def signal_err(fd: int) -> None:
    """Tell the front end that a ring broke; never blocks, never fails."""
    _lib.np_signal(fd)


def device_of(fd: int) -> int:
    """The device number of a file, without asking its file system, which might not answer."""
    return _check(_lib.np_device(fd))


class GuestMemory:
    """What the front end shared: regions found by guest physical or by user address."""

    def __init__(self) -> None:
        self._memory = _ffi.gc(_lib.np_memory_new(), _lib.np_memory_free)

    def add(self, gpa: int, size: int, user_addr: int, mmap_offset: int, fd: int) -> None:
        """Map a region; the descriptor stays the caller's and may be closed.

        An equal region is replaced. EINVAL: no size, or a wrap. EEXIST: overlaps another. ENOSPC:
        too many. ENXIO: the file is too short. Else what fstat or mmap said. An error changes
        nothing.
        """
        _check(_lib.np_memory_add(self._memory, gpa, size, user_addr, mmap_offset, fd))

    def remove(self, gpa: int, size: int, user_addr: int) -> None:
        """Unmap exactly this region, or ENOENT."""
        _check(_lib.np_memory_remove(self._memory, gpa, size, user_addr))

    def close(self) -> None:
        """Unmap everything; the object is empty then, and usable."""
        _lib.np_memory_clear(self._memory)


class Watch:
    """Tells when the thread that serves a ring does not come back from a batch (_watch.c)."""

    def __init__(self, tick_us: int) -> None:
        """How long one batch may take before it is reported; to be given to the ring."""
        self.watch = _ffi.gc(_lib.np_watch_new(tick_us), _lib.np_watch_free)

    def wait(self) -> bool:
        """Block until a batch has been under way for a whole tick; False after ``stop``.

        Without a time-out while the ring is quiet.
        """
        return bool(_lib.np_watch_wait(self.watch))

    def rest(self) -> None:
        """The serving thread leaves the ring, which is not watched until its next batch."""
        _lib.np_watch_rest(self.watch)

    def stop(self) -> None:
        """Let ``wait`` return False, now and from now on."""
        _lib.np_watch_stop(self.watch)


class DirtyLog:
    """A bitmap that the front end shares: each page of guest memory that the device wrote to."""

    def __init__(self, size: int, offset: int, fd: int) -> None:
        """Map ``size`` bytes of a file, or raise OSError as ``GuestMemory.add``."""
        self._log = _ffi.gc(_lib.np_log_new(), _lib.np_log_free)
        _check(_lib.np_log_map(self._log, size, offset, fd))

    def set_signal(self, fd: int) -> None:
        """Tell of new marks through this descriptor, or not at all (-1)."""
        _lib.np_log_set_signal(self._log, fd)

    @property
    def skipped(self) -> int:
        """How often a page was written to that the log is too small for."""
        return _lib.np_log_skipped(self._log)


class Vring:
    """A started split ring.

    ``batch``: the requests of the last ``wait``, to be read with ``REQUEST.iter_unpack``. A slot is
    the number of a request while it is in flight; they are given out from 0 on.
    ``headers``, ``replies``: private arenas, ``header_stride`` and ``reply_stride`` bytes a slot.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        num: int,
        desc: int,
        used: int,
        avail: int,
        base: int,
        event_idx: bool,
        indirect: bool,
        kick: int,
        call: int,
        wake: int,
        header_limits: Mapping[int, int] | None = None,
        watch: Watch | None = None,
        stats: Stats | None = None,
        header_stride: int = 8704,
        reply_stride: int = 256,
        batch: int = 64,
    ) -> None:
        """Translate and check the three parts, or raise RingBroken.

        Addresses are user addresses. ``base`` is the available index to go on from; the used index
        is taken from guest memory. The three descriptors stay the caller's and must outlive the
        ring. ``header_limits`` says, by message type, how much of a request is header (at least 7
        bytes); other types are copied up to the stride. ``stats`` is where it counts, if that is
        not for itself only.
        """
        limits = [header_stride] * _lib.NP_MESSAGE_TYPES
        for message_type, limit in (header_limits or {}).items():
            limits[message_type] = min(max(limit, 7), header_stride)
        # The arenas are Python's own objects, so that views of them outlive the ring. What no slot
        # used yet takes no memory.
        slots = min(max(num, 1), RING_MAX)  # a size that is refused needs no arenas
        headers = _ffi.from_buffer("uint8_t[]", _zeros(slots * header_stride))
        replies = _ffi.from_buffer("uint8_t[]", _zeros(slots * reply_stride))
        requests = _ffi.new("np_request[]", batch)
        done = _ffi.new("np_done[]", slots)
        counters = _ffi.new("np_counters *")
        self.stats: Final = Stats() if stats is None else stats
        config = _ffi.new(
            "np_vring_config *",
            {
                "num": num,
                "desc": desc,
                "used": used,
                "avail": avail,
                "base": base,
                "event_idx": event_idx,
                "indirect": indirect,
                "kick": kick,
                "call": call,
                "wake": wake,
                "header_stride": header_stride,
                "reply_stride": reply_stride,
                "batch": batch,
                "watch": _ffi.NULL if watch is None else watch.watch,
                "headers": headers,
                "replies": replies,
                "requests": requests,
                "done": done,
                "counters": counters,
                "stats": self.stats.address,
                "limits": limits,
            },
        )
        self.header_stride = header_stride
        self.reply_stride = reply_stride
        self.headers = memoryview(_ffi.buffer(headers)).toreadonly()
        self.replies = memoryview(_ffi.buffer(replies))
        self.batch = memoryview(_ffi.buffer(requests)).toreadonly()
        self._done = memoryview(_ffi.buffer(done))
        self.counters = cast("Counters", counters)
        self._watch = watch
        self._memory = memory  # mapped for as long as the ring points into it
        self._log: DirtyLog | None = None
        ring = _lib.np_vring_new(memory._memory, config)  # noqa: SLF001
        if ring == _ffi.NULL:
            raise MemoryError
        self._ring: Ring = _ffi.gc(ring, _lib.np_vring_free)
        self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        reason = cast("bytes", _ffi.string(_lib.np_vring_broken(self._ring)))
        if reason:
            raise RingBroken(reason.decode())

    def close(self) -> None:
        """Free the ring once no call is under way; counters and arenas stay readable."""
        self._ring = None

    def relocate(self, memory: GuestMemory) -> None:
        """Find the ring and what is in flight again, in memory that changed or is another.

        RingBroken if the ring is not there; a later change may bring it back. A request whose
        buffers are gone cannot be answered: data functions say EFAULT, and ``push`` returns it
        with length 0, unless a later change brings them back.
        """
        self._memory = memory
        if _lib.np_vring_relocate(self._ring, memory._memory) < 0:  # noqa: SLF001
            self._raise_if_broken()

    def continues(self) -> bool:
        """Does the used ring in guest memory stand where we left it? Otherwise it is a new one."""
        return bool(_lib.np_vring_continues(self._ring))

    def set_call(self, fd: int) -> None:
        """Notify through another descriptor, or none (-1).

        While the ring runs, a number must stay open: replace by dup2 what it names, and signal it
        once after this.
        """
        _lib.np_vring_set_call(self._ring, fd)

    def set_log(self, log: DirtyLog | None, used_gpa: int | None = None) -> None:
        """Log what is written to guest memory, or nothing more.

        ``used_gpa``: where the log has the used ring, if writes to it are logged, too.
        """
        self._log = log
        pointer = _ffi.NULL if log is None else log._log  # noqa: SLF001
        _lib.np_vring_set_log(self._ring, pointer, used_gpa is not None, used_gpa or 0)

    def wait(self, spin_us_max: int) -> int:
        """Block until there are requests or a wake; return how many are in ``batch``.

        A wake is consumed by whichever return comes next, so look for the cause of one after each.
        """
        count = _lib.np_vring_wait(self._ring, spin_us_max)
        if count < 0:
            self._raise_if_broken()
        return count

    def wake(self) -> None:
        """Make ``wait`` return soon; cheap while the device thread is awake."""
        _lib.np_vring_wake(self._ring)

    def set_alarm(self, at_ns: int) -> None:
        """Wake whoever waits, or is about to, at this time of CLOCK_MONOTONIC; 0: never.

        For the device thread. It stays set: one that has passed wakes again and again.
        """
        _lib.np_vring_set_alarm(self._ring, at_ns)

    def push(self, replies: list[i64]) -> None:
        """Return requests, each of which ``done_entry`` describes, with at most one notification.

        An entry that names no request in flight, or does not fit, is the caller's bug: those before
        it are returned. RingBroken if the ring is gone from guest memory.
        """
        count = len(replies)
        if count * _DONE_SIZE > len(self._done):
            raise ValueError("push of more than the ring holds")
        most = len(_PACK_DONE) - 1
        for first in range(0, count, most):
            some = replies[first : first + most]
            _PACK_DONE[len(some)](self._done, first * _DONE_SIZE, *some)
        result = _lib.np_vring_push(self._ring, count)
        if result == -errno.EFAULT:
            self._raise_if_broken()
        if result < 0:
            raise ValueError("push of a request that is not in flight, or of more than fits")

    def scatter(self, slot: int, skip: int, data: "ReadableBuffer") -> None:
        """Copy data into the writable stream, wholly or (EMSGSIZE) not at all."""
        source = _ffi.from_buffer(data)
        _check(_lib.np_vring_copy(self._ring, _lib.NP_WRITABLE, slot, skip, source, len(source)))

    def gather_into(self, slot: int, skip: int, target: memoryview) -> None:
        """Fill the target with as many bytes of the readable stream, or EMSGSIZE."""
        size = len(target)
        to = _ffi.from_buffer(target)
        _check(_lib.np_vring_copy(self._ring, _lib.NP_READABLE, slot, skip, to, size))

    def gather(self, slot: int, skip: int, count: int) -> bytes:
        """Copy exactly count bytes of the readable stream, or EMSGSIZE."""
        target = _uncleared("uint8_t[]", count)
        _check(_lib.np_vring_copy(self._ring, _lib.NP_READABLE, slot, skip, target, count))
        return bytes(_ffi.buffer(target))

    def readv(self, slot: int, skip: int, fd: int, count: int, offset: int, flags: int = 0) -> int:
        """preadv2 from a file into the writable stream; offset -1 is the file's own position.

        Fewer bytes than asked for is a success. EINTR is reported, so that a worker can be stopped.
        """
        return _check(
            _lib.np_vring_move(self._ring, _lib.NP_WRITABLE, slot, skip, fd, count, offset, flags)
        )

    def writev(
        self, slot: int, skip: int, fd: int, count: int, offset: int, keep_set_ids: bool = True
    ) -> int:
        """pwritev2 from the readable stream to a file; otherwise as readv.

        ``keep_set_ids`` as for ``syscalls.keep_set_ids``.
        """
        return _check(_lib.np_vring_write(self._ring, slot, skip, fd, count, offset, keep_set_ids))
