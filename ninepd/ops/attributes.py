"""Tgetattr, Tsetattr, Tstatfs: metadata of whatever a fid holds, open or not, named or not."""

import errno
import os
import stat as st
from collections.abc import Callable
from functools import partial
from typing import Final

from ninepd.export.handles import Handle, Opened
from ninepd.export.host import Host
from ninepd.ops import setid
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Encoded, Later, Payload, Reply
from ninepd.p9.messages import (
    NUMBERS,
    Rgetattr,
    Rsetattr,
    Rstatfs,
    SetattrValid,
    Tgetattr,
    Tsetattr,
    Tstatfs,
)
from ninepd.syscalls import GETATTR_BODY, NO_ID, UTIME_NOW, UTIME_OMIT

_ENCODED = Encoded(NUMBERS[Rgetattr], GETATTR_BODY)
_FUSE_SUPER_MAGIC: Final = 0x65735546
"""f_type of every mount, as virtiofs shows it. By the host's own, programs would think that they
see all changes of a file, but in the guest inotify(7) does not tell what the host does. The same
goes for that of 9P, 0x01021997, which coreutils take for a local one (their src/stat.c)."""
_KNOWN = 0x1FF
_OWNER = SetattrValid.UID | SetattrValid.GID
_TIMES = SetattrValid.ATIME | SetattrValid.MTIME


def getattr(guest: Guest, _message: Tgetattr, payload: Payload, fid: Fid) -> Reply:  # noqa: A001
    """All attributes, whatever was asked for: one statx(2) brings them anyway."""
    handle = fid.held()
    host, qids = guest.host, guest.tree.qids
    if not host.getattr_body(handle.fd, qids.devices, handle.generation, payload.body):
        path = qids.path(guest.tree.stat(handle))
        host.getattr_body_as(handle.fd, path, handle.generation, payload.body)
    return _ENCODED


def _time(valid: int, changes: int, explicit: int, sec: int, nsec: int) -> tuple[int, int]:
    if not valid & changes:
        return 0, UTIME_OMIT
    if not valid & explicit:
        return 0, UTIME_NOW
    if nsec >= 1_000_000_000:
        raise OSError(errno.EINVAL, f"{nsec} nanoseconds are more than a second")
    return sec - (1 << 64) if sec >> 63 else sec, nsec


def setattr(guest: Guest, message: Tsetattr, _payload: Payload, fid: Fid) -> Reply:  # noqa: A001
    """Size, owner, mode, times, in this order: chown clears setuid, truncate touches mtime."""
    handle, valid = fid.held(), message.valid
    if valid & ~_KNOWN:
        raise OSError(errno.EINVAL, f"attributes {valid & ~_KNOWN:#x} are not known")
    if valid & SetattrValid.MODE and handle.is_symlink:
        raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode of its own")
    atime = _time(
        valid,
        SetattrValid.ATIME,
        SetattrValid.ATIME_SET,
        message.atime_sec,
        message.atime_nsec,
    )
    mtime = _time(
        valid,
        SetattrValid.MTIME,
        SetattrValid.MTIME_SET,
        message.mtime_sec,
        message.mtime_nsec,
    )
    if valid & SetattrValid.SIZE and message.size >> 63:
        raise OSError(errno.EINVAL, "no file can be that large")
    rest = partial(_change, guest.host, message, handle, atime, mtime)
    if valid & SetattrValid.SIZE:
        guest.host.act_for(fid.uid)
        try:
            _truncate(guest, fid, message.size)
        except (
            BlockingIOError
        ):  # a host process holds a lease (fcntl(2)), which is being called back
            return Later(lambda _payload: _truncate_and(guest.host, rest, fid, message.size))
    return rest()


def _truncate(guest: Guest, fid: Fid, size: int) -> None:
    """BlockingIOError if that would have to wait for a lease."""
    host = guest.host
    # The guest's own descriptor, if it can write: it may where the mode no longer allows it.
    if isinstance(fid.opened, Opened) and fid.opened.writable:
        host.ftruncate(fid.opened.fd, size)
    elif fid.handle.kind == st.S_IFREG:
        fd = guest.tree.reopen(fid.handle, os.O_WRONLY)
        try:
            host.ftruncate(fd, size)
        finally:
            host.close(fd)
    else:
        host.truncate(fid.handle.fd, size)  # the kernel's own refusal


def _truncate_and(host: Host, rest: Callable[[], Reply], fid: Fid, size: int) -> Reply:
    host.act_for(fid.uid)
    host.truncate(fid.handle.fd, size)
    return rest()


def _change(
    host: Host,
    message: Tsetattr,
    handle: Handle,
    atime: tuple[int, int],
    mtime: tuple[int, int],
) -> Reply:
    valid = message.valid
    if valid & _OWNER:
        owner = message.uid if valid & SetattrValid.UID else NO_ID
        group = message.gid if valid & SetattrValid.GID else NO_ID
        host.chown(handle.fd, owner, group)
    if valid & SetattrValid.MODE:
        host.act_for(setid.ROOT)
        host.chmod(handle.fd, st.S_IMODE(message.mode))
    if valid & _TIMES:
        host.utimens(handle.fd, atime, mtime)
    elif valid == SetattrValid.CTIME:
        host.chown(handle.fd, NO_ID, NO_ID)
    return Rsetattr()


def statfs(guest: Guest, _message: Tstatfs, _payload: Payload, fid: Fid) -> Reply:
    """Of the file system that the fid's own file lies on, also below a mount."""
    return Rstatfs(_FUSE_SUPER_MAGIC, *guest.host.statfs(fid.held().fd)[1:])
