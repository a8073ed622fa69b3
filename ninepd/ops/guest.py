"""One guest: its session with an export, and all that the session consists of.

Fids, opened files, locks and values of extended attributes: what a guest relies on is here or
reached from here, nowhere else.

Threads: any. Requests that use one fid in ways that do not go together come one after the other
(jobs.py); fids that are in use outlast their clunk.
"""

import errno
import logging
import time
from functools import partial
from typing import Final

from ninepd.errors import words_for
from ninepd.export.descriptors import Holder
from ninepd.export.handles import Handle, Hint, Opened
from ninepd.export.tree import Tree
from ninepd.limits import Limits
from ninepd.listing import Run
from ninepd.ops.fid import DOOMED, RELEASED, Fid
from ninepd.ops.locks import LockTable
from ninepd.p9.messages import IO_HEADER, Rversion, Tversion
from ninepd.p9.session import Session
from ninepd.statelock import GUEST, state_lock
from ninepd.stats import Stats
from ninepd.throttle import Throttle

log = logging.getLogger(__name__)
trace = logging.getLogger("ninepd.trace")

END_SLICE: Final = 512
"""Fids that are let go in one step, at 2.3 us each."""


class Guest:
    """One guest's fids, locks, values of extended attributes, and session on an export."""

    def __init__(self, tree: Tree, limits: Limits, tag: str = "") -> None:
        """``tag`` is what the export is called in the log."""
        self.tag = tag
        self.tree = tree
        self.host = tree.host
        self.readonly = tree.host.readonly
        self.limits = limits
        self.session: Session[Fid] = Session(words_for, limits.fids_max)
        self.locks = LockTable(tree, limits.locks_max)
        self.xattr_fids = 0
        self.last_run: Run | None = None
        """Of directory entries: the last one that was sent."""
        self._lock = state_lock(GUEST)
        self._ended = False

    # Session

    def version(self, request: Tversion, msize_limit: int) -> Rversion:
        """Begin the session; EMSGSIZE for an impossible msize."""
        return self.session.negotiate(request, min(self.limits.msize_max, msize_limit))

    def end(self) -> None:
        """Drop the session as if the client had clunked everything, without committing xattrs.

        Closing files may take as long as their storage takes.
        """
        while not self.end_some():
            time.sleep(0)  # the interpreter goes to whoever waits for it

    def end_some(self, count: int = END_SLICE) -> bool:
        """The same for so many fids; True when none is left. New ones are refused from now on."""
        with self._lock:
            self._ended = True
            fids = self.session.end_some(count)
        self.locks.end()
        for fid in fids:
            self.retire(fid)
        return not fids

    def keep(self, fids: list[Fid]) -> None:
        """A request will use these fids on another thread: they stay until ``let_go``."""
        with self._lock:
            for fid in fids:
                fid.users += 1

    def let_go(self, fids: list[Fid]) -> None:
        """It has ended. A fid that was clunked meanwhile goes with its last user."""
        with self._lock:
            for fid in fids:
                fid.users -= 1
            done = [fid for fid in fids if fid.fate == DOOMED and not fid.users]
            for fid in done:
                fid.fate = RELEASED
        for fid in done:
            self._release(fid)

    def pin(self, fids: list[Fid], pins: list[Holder]) -> None:
        """Keep the descriptors open that a request on these fids may use, until ``unpin``."""
        self.tree.handles.pin([holder for fid in fids for holder in fid.holders()], pins)

    def unpin(self, pins: list[Holder]) -> None:
        """The request needs them no more."""
        self.tree.handles.unpin(pins)

    def _release(self, fid: Fid) -> None:
        opened, fid.opened = fid.opened, None
        if isinstance(opened, Opened):
            for close in (partial(self.locks.drop, fid), opened.close):
                try:
                    close()
                except OSError as error:  # of a late write
                    log.warning("closing a file: %s", error)
        elif opened is not None:
            self.xattr_fids -= 1
        self.tree.handles.release(fid.handle)
        if fid.own_hint is not None:
            self.tree.handles.release(fid.own_hint[0])

    def retire(self, fid: Fid) -> None:
        """Close what a fid holds, whose number is free: now, or when its last user is done."""
        with self._lock:
            if fid.fate == RELEASED:
                return
            fid.fate = DOOMED if fid.users else RELEASED
            if fid.users:
                return
        self._release(fid)

    def close_file(self, fid: Fid, uses: int) -> None:
        """Close the file of a fid that is being clunked, if no other request uses it.

        The request itself is among its users ``uses`` times. OSError is the result
        of the guest's close(2). It is closed all the same.
        """
        with self._lock:
            if fid.users > uses or not isinstance(fid.opened, Opened):
                return
            opened, fid.opened = fid.opened, None
        try:
            self.locks.drop(fid)
        finally:
            opened.close()

    # Fids

    def add(self, number: int, handle: Handle, uid: int, own_hint: Hint | None = None) -> Fid:
        """A new fid; takes over its references, see ``Fid``."""
        fid = Fid(handle, uid, own_hint)
        try:
            with self._lock:
                if self._ended:
                    raise FileNotFoundError(errno.ENOENT, "the session has ended")
                self.session.add(number, fid)
        except OSError:
            self._release(fid)
            raise
        return fid

    def remove(self, number: int, fid: Fid) -> Fid:
        """Take a fid's number back; ENOENT if another thread was faster."""
        with self._lock:
            if self.session.fids.get(number) is not fid:
                raise FileNotFoundError(errno.ENOENT, "the fid was clunked meanwhile")
            return self.session.remove(number)

    def move(self, fid: Fid, handle: Handle, directory: Handle, name: bytes) -> None:
        """A fid becomes one of what is at this place. Takes over the reference to ``handle``."""
        own_hint = self.tree.handles.hint_for(handle, directory, name)
        self.replace(fid, handle, own_hint)
        fid.attached = False

    def replace(self, fid: Fid, handle: Handle, own_hint: Hint | None) -> None:
        """A fid becomes another; takes over the references, as a new one would."""
        handle, fid.handle = fid.handle, handle
        own_hint, fid.own_hint = fid.own_hint, own_hint
        self.tree.handles.release(handle)
        if own_hint is not None:
            self.tree.handles.release(own_hint[0])

    def check_xattr_room(self) -> None:
        """ENOSPC, as QEMU's max_xattr, when too many extended attributes are open."""
        if self.xattr_fids >= self.limits.xattrs_max:
            raise OSError(errno.ENOSPC, f"{self.xattr_fids} extended attributes are open")

    # Answers

    def iounit(self) -> int:
        """Largest I/O size in whole pages, so that big transfers stay aligned; 0 if below one."""
        return (self.session.msize - IO_HEADER - 13) & ~4095


class Service:
    """An export, and whatever session a guest has with it now."""

    def __init__(
        self,
        tree: Tree,
        limits: Limits,
        tag: str,
        throttle: Throttle | None = None,
        stats: Stats | None = None,
    ) -> None:
        """``stats`` is where it counts, if somebody shall see it."""
        self.stats: Final = Stats() if stats is None else stats
        self.limits: Final = limits
        self.throttle: Final = throttle
        """How fast guests may read and write, if that is limited."""
        self._tree = tree
        self._tag = tag
        self.traced = False
        """Is each message to be logged? That may change between two batches."""
        self.follow_log()
        self.guest = self._fresh()

    def renew(self) -> Guest:
        """The session is over, and a new one may begin. Returns the old guest, for its ``end``,
        which may take as long as the storage of its files takes.
        """
        old, self.guest = self.guest, self._fresh()
        return old

    def follow_log(self) -> None:
        """Somebody may have asked for the trace, or nobody does any more."""
        self.traced = trace.isEnabledFor(logging.DEBUG)

    def take_stock(self) -> None:
        """Tell whoever watches what the guest holds now."""
        budget = self._tree.handles.budget
        stats = self.stats
        stock = (len(self.guest.session.fids), budget.files, budget.used, budget.reclaimed)
        if stock != stats.stock:
            stats.stock = stock
            numbers = stats.numbers
            numbers.fids, numbers.files, numbers.descriptors, numbers.reclaimed = stock
        if budget.reclaims:
            stats.numbers.reclaims += budget.take_reclaims()

    def _fresh(self) -> Guest:
        return Guest(self._tree, self.limits, self._tag)
