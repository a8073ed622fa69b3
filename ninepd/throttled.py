"""The request engine of an export whose guests may only read and write so fast (throttle.py).

A read or write of file data that would be too fast is set aside as it came, and begun when its time
has come as if it had come only then. Until then it takes part in nothing: it uses no fid, no worker
and no memory, and all other requests pass it. Those that go in the same direction do not, so that
order is kept. A Tflush takes it back, and a Tversion does; if the ring is reset or the front end
leaves it is dropped, for it has not begun, and a ring that pauses does not wait for it. So a guest
cannot get around the limits by resetting its device.

Who serves the ring looks for what is due before each batch, and sleeps no longer than until the
next is: no thread waits for one request.
"""

import time
from struct import Struct
from typing import Any, Final

from ninepd.export.handles import Opened
from ninepd.ops.guest import Service
from ninepd.p9.messages import HEADER_SIZE, IO_HEADER, NUMBERS, WRITE_HEADER, Tflush, Tread, Twrite
from ninepd.pipeline import Pipeline, RingSetup
from ninepd.throttle import Throttle
from ninepd.turns import Turn
from ninepd.vring import Vring, Watch
from ninepd.workers import Workers

_WRITE: Final = NUMBERS[Twrite]
_GATED: Final = frozenset({NUMBERS[Tread], _WRITE})
_FID_OFFSET_COUNT: Final = Struct("<IQI")
"""With what both messages begin."""
_NEVER: Final = 0


class Aside:
    """A request that waits for its time, as it came from the ring."""

    __slots__ = ("entry", "nbytes", "tag", "writes")

    def __init__(self, entry: tuple[int, ...], tag: int, writes: bool, nbytes: int) -> None:
        self.entry = entry
        self.tag = tag
        self.writes = writes
        self.nbytes = nbytes


class ThrottledPipeline(Pipeline):
    """All but ``jobs`` runs on the thread that serves the ring."""

    def __init__(
        self,
        service: Service,
        vring: Vring,
        watch: Watch,
        workers: Workers,
        setup: RingSetup,
        throttle: Throttle,
    ) -> None:
        super().__init__(service, vring, watch, workers, setup)
        self._throttle = throttle
        self._aside: dict[int, Aside] = {}
        """By slot, in the order in which they came."""
        self._alarm = _NEVER
        """When to look at them, as the ring knows it; never only if there are none."""

    @property
    def jobs(self) -> int:
        return len(self._jobs) + len(self._aside)

    def _serve_batch(self, turn: Turn) -> bool:
        return self._serve_due(turn) and super()._serve_batch(turn)

    def _serve_due(self, turn: Turn) -> bool:
        """Begin with what may begin by now; False if the ring was lost over one."""
        if self._alarm == _NEVER:
            return True
        now = time.monotonic_ns()
        if now < self._alarm:
            return True
        waits = {False: 0, True: 0}
        for slot, aside in list(self._aside.items()):
            if waits[aside.writes]:
                continue
            waits[aside.writes] = self._throttle.admit(aside.writes, aside.nbytes, now)
            if waits[aside.writes]:
                continue
            del self._aside[slot]
            head, readable, writable, copied, fault, size, number, tag = aside.entry
            if not super()._request(
                turn, head, readable, writable, copied, fault, size, number, tag
            ):
                return False  # who has the ring now finds the alarm as it was
        due = [now + wait for wait in waits.values() if wait]
        self._set_alarm(min(due) if due else _NEVER)
        return True

    def _set_alarm(self, at: int) -> None:
        self._alarm = at
        self._vring.set_alarm(at)

    def _request(
        self,
        turn: Turn,
        head: int,
        readable: int,
        writable: int,
        copied: int,
        fault: int,
        size: int,
        number: int,
        tag: int,
    ) -> bool:
        # One that loses the ring while room is made for it (turns.py) comes again: it counts twice.
        if number in _GATED and copied >= WRITE_HEADER and not fault:
            writes = number == _WRITE
            room = readable - WRITE_HEADER if writes else writable - IO_HEADER
            nbytes = self._file_bytes(head, room)
            if nbytes >= 0 and not self._admit(writes, nbytes):
                entry = (head, readable, writable, copied, fault, size, number, tag)
                self._aside[head] = Aside(entry, tag, writes, nbytes)
                return True
        return super()._request(turn, head, readable, writable, copied, fault, size, number, tag)

    def _file_bytes(self, slot: int, room: int) -> int:
        """How many bytes of a file a Tread or Twrite may move; -1 if they are none of a file.

        As QEMU, which limits files but neither directories nor extended attributes
        (hw/9pfs/cofile.c, v9fs_co_preadv and v9fs_co_pwritev).
        """
        at = slot * self._header_stride + HEADER_SIZE
        number, _, count = _FID_OFFSET_COUNT.unpack_from(self._vring.headers, at)
        fid = self._guest.session.fids.get(number)
        if fid is None or fid.handle.is_directory or not isinstance(fid.opened, Opened):
            return -1
        wanted: int = min(count, room, self._msize)
        return max(wanted, 0)

    def _admit(self, writes: bool, nbytes: int) -> bool:
        """May it begin? Not before others of its kind."""
        for aside in self._aside.values():
            if aside.writes == writes:
                return False
        now = time.monotonic_ns()
        wait = self._throttle.admit(writes, nbytes, now)
        if not wait:
            return True
        if self._alarm == _NEVER or now + wait < self._alarm:
            self._set_alarm(now + wait)
        return False

    def _session_message(self, head: int, tag: int, message: Any) -> None:
        """What waits has not begun: a flush takes it back, without a reply (flush(5)), and a new
        session does (version(5)). The chain goes back empty, which is how QEMU drops one
        (hw/9pfs/9p.c, pdu_complete).
        """
        for slot, aside in list(self._aside.items()):
            if not isinstance(message, Tflush) or aside.tag == message.oldtag:
                del self._aside[slot]
                self._answers.drop(slot)
        super()._session_message(head, tag, message)
