"""Tauth, Tattach, Twalk, Tclunk: how fids come and go."""

import errno
import logging
from functools import partial
from typing import Final

from ninepd.export.handles import Handle, HandleTable
from ninepd.ops.fid import Fid, XattrWriter
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Later, Payload, Reply
from ninepd.ops.xattrs import commit
from ninepd.p9.messages import (
    IO_HEADER,
    NO_NUMERIC_ID,
    NOFID,
    QID,
    Qid,
    Rattach,
    Rclunk,
    Rwalk,
    Tattach,
    Tauth,
    Tclunk,
    Twalk,
)
from ninepd.p9.session import Dialect
from ninepd.tuples import made

log = logging.getLogger(__name__)

_CLUNKED: Final = Rclunk()
_QID_SIZE: Final = int(QID.size)
_RWALK_FIXED: Final = 9


def number_of(text: bytes) -> int:
    """A decimal number of 32 bits, as old dialects send them; EINVAL for anything else."""
    if not text.isdigit() or len(text) > len(str(NO_NUMERIC_ID)) or int(text) > NO_NUMERIC_ID:
        raise OSError(errno.EINVAL, "that is no number of 32 bits")
    return int(text)


def auth(_guest: Guest, _message: Tauth, _payload: Payload) -> Reply:
    """No authentication: whoever owns the guest's memory owns the mount (as QEMU answers)."""
    raise OSError(errno.EOPNOTSUPP, "this server needs no authentication")


def attach(guest: Guest, message: Tattach, payload: Payload) -> Reply:
    """A fid on the root of the export, or on the directory below it that ``aname`` names.

    The Linux client attaches once for each guest user; ``n_uname`` is that user (fs/9p/fid.c).
    """
    guest.session.check_free(message.fid)
    if message.afid != NOFID:
        raise OSError(errno.EINVAL, "there is no authentication fid")
    uid = message.n_uname
    if guest.session.dialect is Dialect.PLAIN and message.uname.isdigit():
        uid = number_of(message.uname)
    tree, handles = guest.tree, guest.tree.handles
    handle = handles.share(tree.root)
    try:
        for name in filter(None, message.aname.split(b"/")):
            step = tree.existing(handle, name, payload.pins)
            if tree.awaits_mount(*step):
                step = tree.mounted(handle, name, step[0], payload.pins)
            handles.release(handle)
            handle = step[0]
        qid = tree.qid(handle)
    except OSError:
        handles.release(handle)
        raise
    guest.add(message.fid, handle, uid).attached = True
    _log_mount(guest, uid)
    return Rattach(qid)


def _log_mount(guest: Guest, uid: int) -> None:
    session = guest.session
    log.info(
        "%s: mounted, version %s, msize %d, user %s",
        guest.tag,
        session.dialect.value.decode(),
        session.msize,
        "unknown" if uid == NO_NUMERIC_ID else uid,
    )


def walk(guest: Guest, message: Twalk, payload: Payload, start: Fid) -> Reply:
    """Follow names one by one; ``newfid`` comes to be only if all of them were found.

    If a later name fails, the answer holds the qids so far and nothing changes (walk(5)).
    """
    start.held()
    names = message.names
    if _QID_SIZE * len(names) > payload.room + IO_HEADER - _RWALK_FIXED:
        raise OSError(errno.EMSGSIZE, "the reply does not fit")
    replaces = message.newfid == message.fid
    if not replaces:
        guest.session.check_free(message.newfid)
    elif start.opened is not None:
        raise OSError(errno.EINVAL, "an open fid cannot be walked onto itself")
    tree, handles = guest.tree, guest.tree.handles
    handle, own_hint = start.handle, start.own_hint
    found: list[Handle] = []
    qids: list[Qid] = []
    try:
        for name in names:
            if handle.remote and not payload.uses:
                _release(handles, found)
                return Later(partial(_walk_on, guest, message, start))
            step = tree.walk(handle, name, payload.pins)
            if step is None:
                break
            entered, stat = step
            if tree.awaits_mount(entered, stat):
                entered, stat = tree.mounted(handle, name, entered, payload.pins)
            handle = entered
            found.append(handle)
            qids.append(tree.qids.qid(stat))
    except OSError:
        _release(handles, found)
        if not qids:
            raise
        return made(Rwalk, (tuple(qids),))
    if len(qids) < len(names):
        _release(handles, found)
        return made(Rwalk, (tuple(qids),)) if qids else guest.session.error(errno.ENOENT)
    if found:
        found.pop()
        own_hint = handles.hint_for(handle, found[-1] if found else start.handle, names[-1])
        _release(handles, found)
    else:
        handles.share(handle)
        handles.share_hint(own_hint)
    if replaces:
        guest.replace(start, handle, own_hint)
        start.attached &= not names
    else:
        fid = guest.add(message.newfid, handle, start.uid, own_hint)
        fid.attached = start.attached and not names
    return made(Rwalk, (tuple(qids),))


def _walk_on(guest: Guest, message: Twalk, start: Fid, payload: Payload) -> Reply:
    # No lambda in ``walk``: mypyc would keep the variables of each call in an object.
    return walk(guest, message, payload, start)


def _release(handles: HandleTable, found: list[Handle]) -> None:
    for handle in found:
        handles.release(handle)


def clunk(guest: Guest, message: Tclunk, payload: Payload, fid: Fid) -> Reply:
    """The number is free afterwards, whatever the answer.

    An announced xattr is set now; a file is closed, which may bring an error of a late write.
    """
    guest.remove(message.fid, fid)
    try:
        if isinstance(fid.opened, XattrWriter):
            commit(guest.host, fid, fid.opened)
        elif fid.opened is not None:
            guest.close_file(fid, payload.uses)
    finally:
        guest.retire(fid)
    return _CLUNKED
