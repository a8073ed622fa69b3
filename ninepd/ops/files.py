"""Opening, reading, writing: Tlopen, Tlcreate, Tread, Twrite, Tfsync, locks.

Data goes straight between files and guest memory. Reads ask with RWF_NOWAIT first: what is in the
page cache is answered at once, and only what must come from a disk goes to a worker (preadv2(2)).
"""

import errno
import os
import stat as st
from contextlib import suppress
from functools import partial
from typing import Final

from ninepd.export.handles import Opened
from ninepd.export.host import Host
from ninepd.export.tree import check_name
from ninepd.ops import setid, xattrs
from ninepd.ops.fid import Fid, XattrValue, XattrWriter
from ninepd.ops.guest import Guest
from ninepd.ops.ranges import Owner
from ninepd.ops.replies import Later, Payload, Reply
from ninepd.p9.messages import (
    LOCK_FLAG_BLOCK,
    LOCK_FLAG_RECLAIM,
    LockStatus,
    LockType,
    OpenFlag,
    Rfsync,
    Rgetlock,
    Rlcreate,
    Rlock,
    Rlopen,
    Rread,
    Rwrite,
    Tfsync,
    Tgetlock,
    Tlcreate,
    Tlock,
    Tlopen,
    Tread,
    Twrite,
)
from ninepd.tuples import made

_HOST_FLAGS: Final = {
    OpenFlag.WRONLY: os.O_WRONLY,
    OpenFlag.RDWR: os.O_RDWR,
    OpenFlag.TRUNC: os.O_TRUNC,
    OpenFlag.APPEND: os.O_APPEND,
    OpenFlag.DSYNC: os.O_DSYNC,
    OpenFlag.SYNC: os.O_SYNC,
    OpenFlag.NOATIME: os.O_NOATIME,
}
"""What a guest's flag asks of the host. All others mean something to the guest's kernel only, or
would be dangerous here (FASYNC), or pointless (DIRECT: the guest bypasses its own cache)."""


def is_for_change(flags: int) -> bool:
    """May a file that is opened with these Tlopen flags be changed?"""
    return bool(flags & (OpenFlag.WRONLY | OpenFlag.RDWR | OpenFlag.TRUNC | OpenFlag.APPEND))


def host_flags(flags: int) -> int:
    """Translate Tlopen flags; EINVAL without a valid access mode."""
    if flags & OpenFlag.NOACCESS == OpenFlag.NOACCESS:
        raise OSError(errno.EINVAL, "an open needs an access mode")
    host = 0
    for guest_flag, host_flag in _HOST_FLAGS.items():
        if flags & guest_flag:
            host |= host_flag
    return host


def lopen(guest: Guest, message: Tlopen, _payload: Payload, fid: Fid) -> Reply:
    """Open the fid; a failed open leaves it as it was."""
    fid.check_unopened()
    flags = host_flags(message.flags)
    is_directory = fid.handle.is_directory
    if is_directory and flags & (os.O_ACCMODE | os.O_TRUNC | os.O_APPEND):
        raise IsADirectoryError(errno.EISDIR, "a directory is only opened for reading")
    try:
        return _opened(guest, fid, flags, wait=False)
    except BlockingIOError:  # a host process holds a lease (fcntl(2)), which is being called back
        return Later(lambda _payload: _opened(guest, fid, flags, wait=True))


def _opened(guest: Guest, fid: Fid, flags: int, wait: bool) -> Reply:
    guest.host.act_for(fid.uid)  # it may be truncated
    file = guest.tree.open(fid.handle, flags, wait)
    try:
        qid = guest.tree.qid(fid.handle)
    except OSError:
        with suppress(OSError):
            file.close()
        raise
    fid.opened = file
    return Rlopen(qid, 0 if fid.handle.is_directory else guest.iounit())


def lcreate(guest: Guest, message: Tlcreate, payload: Payload, fid: Fid) -> Reply:
    """Create and open a file; the fid moves from its directory to the file."""
    try:
        return _created(guest, message, payload, fid, wait=False)
    except BlockingIOError:  # it exists, and a host process holds a lease on it
        return Later(lambda payload: _created(guest, message, payload, fid, wait=True))


def _created(guest: Guest, message: Tlcreate, payload: Payload, fid: Fid, wait: bool) -> Reply:
    """Always tried with O_EXCL first. If the file exists and the guest did not ask for EXCL (its
    cache was behind), it is opened as it is: an existing object is never given an owner or a mode.
    """
    fid.check_unopened()
    directory = fid.directory()
    check_name(message.name)
    flags = host_flags(message.flags)
    tree = guest.tree
    mode = setid.mode_to_create(
        guest.host, fid.uid, message.gid, directory, st.S_IMODE(message.mode)
    )
    tree.handles.budget.check(2)
    try:
        fd = guest.host.create(directory.fd, message.name, flags, mode, fid.uid, message.gid)
    except FileExistsError:
        if message.flags & OpenFlag.EXCL:
            raise
        handle, stat = tree.existing(directory, message.name, payload.pins)
        try:
            if handle.is_directory:
                raise IsADirectoryError(errno.EISDIR, "a directory has that name") from None
            guest.host.act_for(fid.uid)
            file = tree.open(handle, flags, wait)
        except OSError:
            tree.handles.release(handle)
            raise
    else:
        handle, stat, file = tree.adopt_created(fd, flags, directory, message.name, payload.pins)
    guest.move(fid, handle, directory, message.name)
    fid.opened = file
    return Rlcreate(tree.qids.qid(stat), guest.iounit())


def _check_offset(offset: int, count: int) -> None:
    if offset + count >> 63:
        raise OSError(errno.EINVAL, "the range lies beyond the largest file")


def read(_guest: Guest, message: Tread, payload: Payload, fid: Fid) -> Reply:
    """Data from the page cache at once, else on a worker."""
    if isinstance(fid.opened, XattrValue):
        return xattrs.read(fid.opened, message, payload)
    file = fid.open_file()
    count = min(message.nbytes, payload.room)
    _check_offset(message.offset, count)
    if fid.handle.in_memory or fid.handle.remote:
        return _read_rest(file, message.offset, count, 0, payload)
    fd = file.fd
    done = 0
    while done < count:
        try:
            got = payload.read(fd, done, count - done, message.offset + done, os.RWF_NOWAIT)
        except BlockingIOError:  # not in the page cache
            return Later(partial(_read_rest, file, message.offset, count, done))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # this file system cannot tell
                raise
            return _read_rest(file, message.offset, count, done, payload)
        if not got:
            break
        done += got
    return made(Rread, (done,))


def _read_rest(file: Opened, offset: int, count: int, done: int, payload: Payload) -> Reply:
    fd = file.fd
    while done < count:
        got = payload.read(fd, done, count - done, offset + done)
        if not got:
            break
        done += got
    return made(Rread, (done,))


def write(_guest: Guest, message: Twrite, payload: Payload, fid: Fid) -> Reply:
    """Data into the page cache; on a worker if it is to go to the disk as well."""
    if message.nbytes > payload.available:
        raise OSError(errno.EINVAL, f"{message.nbytes} bytes announced, {payload.available} came")
    if isinstance(fid.opened, XattrWriter):
        return xattrs.write(fid.opened, message, payload)
    file = fid.open_file()
    _check_offset(message.offset, message.nbytes)
    if file.writes_through and not fid.handle.in_memory:
        return Later(partial(_write_through, fid.uid, file, message))
    return _write_all(fid.uid, file, message, payload)


def _write_all(uid: int, file: Opened, message: Twrite, payload: Payload) -> Reply:
    fd = file.fd
    done = 0
    if uid and file.handle.table.host.watches_writes:
        file.handle.table.host.before_write(fd)
    while done < message.nbytes:
        try:
            got = payload.write(fd, done, message.nbytes - done, message.offset + done, uid)
        except OSError:
            if not done:
                raise
            break  # what was written counts; the error comes again with the rest (write(2))
        if not got:
            raise OSError(errno.EIO, "the file took no data")
        done += got
    return made(Rwrite, (done,))


def _write_through(uid: int, file: Opened, message: Twrite, payload: Payload) -> Reply:
    reply = _write_all(uid, file, message, payload)
    host = file.handle.table.host
    if host.writes_out and reply.nbytes:
        host.write_out(file.fd, message.offset, reply.nbytes)
    return reply


def fsync(guest: Guest, message: Tfsync, payload: Payload, fid: Fid) -> Reply:
    """On a worker, unless the file is in memory only. Directories too."""
    flush = partial(_flush, guest.host, fid.open_object(), bool(message.datasync))
    return flush(payload) if fid.handle.in_memory else Later(flush)


def _flush(host: Host, file: Opened, data_only: bool, _payload: Payload) -> Reply:
    if data_only:
        host.fdatasync(file.fd)
    else:
        host.fsync(file.fd)
    return Rfsync()


def lock(guest: Guest, message: Tlock, _payload: Payload, fid: Fid) -> Reply:
    """Take or release a byte-range lock; never waits for it: who would is told BLOCKED."""
    fid.open_file()
    if message.flags & ~(LOCK_FLAG_BLOCK | LOCK_FLAG_RECLAIM):
        raise OSError(errno.EINVAL, f"lock flags {message.flags:#x} are not known")
    try:
        return _locked(guest, fid, message, wait=False)
    except BlockingIOError:  # as in lopen: it is opened for that
        return Later(lambda _payload: _locked(guest, fid, message, wait=True))


def _locked(guest: Guest, fid: Fid, message: Tlock, wait: bool) -> Reply:
    taken = guest.locks.lock(
        fid,
        _lock_type(message.type),
        message.start,
        message.length,
        Owner(message.proc_id, message.client_id),
        block=bool(message.flags & LOCK_FLAG_BLOCK),
        wait=wait,
    )
    return Rlock(LockStatus.SUCCESS if taken else LockStatus.BLOCKED)


def getlock(guest: Guest, message: Tgetlock, _payload: Payload, fid: Fid) -> Reply:
    """Who is in the way of a lock, or UNLCK if nobody is."""
    file = fid.open_file()
    owner = Owner(message.proc_id, message.client_id)
    kind = _lock_type(message.type)
    found = guest.locks.conflict(fid, file, kind, message.start, message.length, owner)
    if found is None:
        answer = message._replace(type=LockType.UNLCK)
        return Rgetlock._make(answer[1:])
    held, start, length, holder = found
    return Rgetlock(held, start, length, holder.proc_id, holder.client_id)


def _lock_type(number: int) -> LockType:
    try:
        return LockType(number)
    except ValueError:
        raise OSError(errno.EINVAL, f"lock type {number} is not known") from None
