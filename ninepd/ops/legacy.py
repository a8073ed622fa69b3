"""9P2000.u and 9P2000 for old clients: Topen, Tcreate, Tstat, Twstat, and reading directories.

The other messages are those of 9P2000.L. Names and numbers are as QEMU's server has them; uids
are numeric in both dialects.
"""

import errno
import os
import stat as st
from collections.abc import Callable
from functools import partial
from typing import Final

from ninepd import listing
from ninepd.export.handles import Handle, Opened
from ninepd.export.host import Host
from ninepd.export.tree import check_name
from ninepd.ops import attributes, files, names
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Later, Payload, Reply
from ninepd.ops.walking import number_of
from ninepd.p9.messages import (
    OpenFlag,
    Rcreate,
    Ropen,
    Rread,
    Rstat,
    Rwstat,
    SetattrValid,
    Tcreate,
    Tlcreate,
    Tlink,
    Tlopen,
    Tmkdir,
    Tmknod,
    Topen,
    Tread,
    Tsetattr,
    Tstat,
    Tsymlink,
    Twstat,
)
from ninepd.p9.session import Dialect
from ninepd.p9.stat import (
    UNTOUCHED_32,
    UNTOUCHED_64,
    LegacyStat,
    Mode,
    decode_stat,
    encode_stat,
)
from ninepd.syscalls import NO_ID

_KINDS: Final = {
    st.S_IFDIR: Mode.DIR,
    st.S_IFLNK: Mode.SYMLINK,
    st.S_IFBLK: Mode.DEVICE,
    st.S_IFCHR: Mode.DEVICE,
    st.S_IFIFO: Mode.PIPE,
    st.S_IFSOCK: Mode.SOCKET,
}
_DEVICES: Final = {b"b": st.S_IFBLK, b"c": st.S_IFCHR}
_SPECIAL_BITS: Final = {
    st.S_ISUID: Mode.SETUID,
    st.S_ISGID: Mode.SETGID,
    st.S_ISVTX: Mode.STICKY,
}
_OPEN_FLAGS: Final = {0x10: OpenFlag.TRUNC, 0x80: OpenFlag.APPEND}
"""Bits of the open mode above the access; the others (OCEXEC, ORCLOSE) mean nothing here."""
_OEXEC: Final = 3


def open_flags(mode: int) -> int:
    """The flags of a Tlopen that say what an open mode does."""
    access = mode & 3
    flags = 0 if access == _OEXEC else access
    for bit, flag in _OPEN_FLAGS.items():
        if mode & bit:
            flags |= flag
    return flags


def open(guest: Guest, message: Topen, payload: Payload, fid: Fid) -> Reply:  # noqa: A001
    """Tlopen with the old flags."""
    reply = files.lopen(guest, Tlopen(message.fid, open_flags(message.mode)), payload, fid)
    if isinstance(reply, Later):
        wait = reply.work
        return Later(lambda payload: Ropen._make(wait(payload)))
    return Ropen._make(reply)


def create(guest: Guest, message: Tcreate, payload: Payload, fid: Fid) -> Reply:
    """Make an object of any kind; the fid moves to it, and is open if it can be."""
    fid.check_unopened()
    perm, name, here = message.perm, message.name, message.fid
    guest.tree.handles.budget.check(2)
    mode = _host_mode(perm)
    if not perm & (Mode.DIR | Mode.SYMLINK | Mode.LINK | Mode.DEVICE | Mode.PIPE | Mode.SOCKET):
        created = files.lcreate(
            guest,
            Tlcreate(here, name, open_flags(message.mode) | OpenFlag.EXCL, mode, NO_ID),
            payload,
            fid,
        )
        return Rcreate(created.qid, created.iounit)
    if perm & Mode.DIR:
        names.mkdir(guest, Tmkdir(here, name, mode, NO_ID), payload, fid)
    elif perm & Mode.SYMLINK:
        names.symlink(guest, Tsymlink(here, name, message.extension, NO_ID), payload, fid)
    elif perm & Mode.LINK:
        number = number_of(message.extension)
        source = guest.session.get(number)
        guest.pin([source], payload.pins)
        names.link(guest, Tlink(here, number, name), payload, fid, source)
    else:
        kind, major, minor = _device(perm, message.extension)
        names.mknod(guest, Tmknod(here, name, kind | mode, major, minor, NO_ID), payload, fid)
    handle, stat = guest.tree.existing(fid.handle, name, payload.pins)
    try:
        opened = guest.tree.open(handle, os.O_RDONLY) if handle.is_directory else None
    except OSError:
        guest.tree.handles.release(handle)
        raise
    guest.move(fid, handle, fid.handle, name)
    fid.opened = opened
    return Rcreate(guest.tree.qids.qid(stat), 0)


def _device(perm: int, extension: bytes) -> tuple[int, int, int]:
    if perm & Mode.PIPE:
        return st.S_IFIFO, 0, 0
    if perm & Mode.SOCKET:
        return st.S_IFSOCK, 0, 0
    try:
        kind, major, minor = extension.split()
        return _DEVICES[kind], number_of(major), number_of(minor)
    except (ValueError, KeyError):
        raise OSError(errno.EINVAL, "the extension names no device") from None


def _host_mode(mode: int) -> int:
    host = mode & 0o777
    for bit, flag in _SPECIAL_BITS.items():
        if mode & flag:
            host |= bit
    return host


def _extension(guest: Guest, fd: int, host: os.stat_result) -> bytes:
    if st.S_ISLNK(host.st_mode):
        return guest.host.readlink(fd)
    if st.S_ISBLK(host.st_mode) or st.S_ISCHR(host.st_mode):
        kind = "b" if st.S_ISBLK(host.st_mode) else "c"
        return f"{kind} {os.major(host.st_rdev)} {os.minor(host.st_rdev)}".encode()
    if host.st_nlink > 1 and not st.S_ISDIR(host.st_mode):
        return f"HARDLINKCOUNT {host.st_nlink}".encode()
    return b""


def _describe(guest: Guest, fd: int, name: bytes) -> bytes:
    host = guest.host.attributes(fd)
    mode = int(_KINDS.get(st.S_IFMT(host.st_mode), 0)) | host.st_mode & 0o777
    for bit, flag in _SPECIAL_BITS.items():
        if host.st_mode & bit:
            mode |= flag
    uid, gid = str(host.st_uid).encode(), str(host.st_gid).encode()
    stat = LegacyStat(
        qid=guest.tree.qids.qid(guest.host.stat_at(fd, b"")),
        mode=mode,
        atime=int(host.st_atime) & UNTOUCHED_32,
        mtime=int(host.st_mtime) & UNTOUCHED_32,
        length=0 if st.S_ISDIR(host.st_mode) else host.st_size,
        name=name,
        uid=uid,
        gid=gid,
        muid=uid,
        extension=_extension(guest, fd, host),
        n_uid=host.st_uid,
        n_gid=host.st_gid,
        n_muid=host.st_uid,
    )
    return encode_stat(stat, guest.session.dialect is Dialect.U)


def stat(guest: Guest, _message: Tstat, _payload: Payload, fid: Fid) -> Reply:
    """All that an old client can know of a file."""
    handle = fid.held()
    hint = fid.hint
    name = b"/" if fid.attached or hint is None else hint[1]
    return Rstat(_describe(guest, handle.fd, name))


def wstat(guest: Guest, message: Twstat, payload: Payload, fid: Fid) -> Reply:
    """Change what is not left untouched; with nothing to change, flush the file (stat(5))."""
    handle = fid.held()
    new = decode_stat(message.stat, guest.session.dialect is Dialect.U)
    change = _setattr(message.fid, handle, new)
    if new.name:
        check_name(new.name, errno.EISDIR)
    if change is None and not new.name:
        if fid.opened is None:
            return Rwstat()
        return Later(partial(_flush, guest.host, fid.open_object()))
    rest = partial(_rename, guest, fid, new.name)
    if change is not None:
        changed = attributes.setattr(guest, change, payload, fid)
        if isinstance(changed, Later):
            return Later(partial(_wait_and, changed, rest))
    return rest(payload)


def _rename(guest: Guest, fid: Fid, name: bytes, payload: Payload) -> Reply:
    if name:
        names.rename_here(guest, fid, name, payload.pins)
    return Rwstat()


def _wait_and(first: Later, rest: Callable[[Payload], Reply], payload: Payload) -> Reply:
    first.work(payload)
    return rest(payload)


def _flush(host: Host, file: Opened, _payload: Payload) -> Reply:
    host.fsync(file.fd)
    return Rwstat()


def _setattr(number: int, handle: Handle, new: LegacyStat) -> Tsetattr | None:
    valid = 0
    mode = 0
    if new.mode != UNTOUCHED_32:
        wanted = new.mode & ~(0o777 | Mode.SETUID | Mode.SETGID | Mode.STICKY)
        if wanted & ~Mode.LINK != _KINDS.get(handle.kind, 0):
            raise OSError(errno.EIO, "the kind of a file cannot be changed")
        valid |= SetattrValid.MODE
        mode = _host_mode(new.mode)
    if new.length != UNTOUCHED_64:
        valid |= SetattrValid.SIZE
    if new.atime != UNTOUCHED_32:
        valid |= SetattrValid.ATIME | SetattrValid.ATIME_SET
    if new.mtime != UNTOUCHED_32:
        valid |= SetattrValid.MTIME | SetattrValid.MTIME_SET
    # Plain 9P2000 has its numbers in the strings.
    uid = number_of(new.uid) if new.n_uid == NO_ID and new.uid.isdigit() else new.n_uid
    gid = number_of(new.gid) if new.n_gid == NO_ID and new.gid.isdigit() else new.n_gid
    if uid != NO_ID:
        valid |= SetattrValid.UID
    if gid != NO_ID:
        valid |= SetattrValid.GID
    if not valid:
        return None
    return Tsetattr(number, valid, mode, uid, gid, new.length, new.atime, 0, new.mtime, 0)


def read(guest: Guest, message: Tread, payload: Payload, fid: Fid) -> Reply:
    """Tread reads directories too, which 9P2000.L does by Treaddir."""
    opened = fid.opened
    if isinstance(opened, Opened) and fid.handle.is_directory:
        return _read_directory(guest, opened, message, payload)
    return files.read(guest, message, payload, fid)


def _read_directory(guest: Guest, directory: Opened, message: Tread, payload: Payload) -> Reply:
    """Whole stat structures. Offset 0 starts again, any other goes on where the last read ended."""
    position = 0
    if message.offset:
        if message.offset != directory.read_offset:
            raise OSError(errno.EINVAL, "directories are read from the start or onwards")
        position = directory.read_position
    room = min(message.nbytes, payload.room, listing.RUN_MAX)
    out = bytearray()
    fd = directory.fd
    while entries := guest.host.getdents(fd, position):
        for after, name in entries:
            if name not in {b".", b".."}:
                record = _entry(guest, fd, name)
                if len(out) + len(record) > room:
                    if not out:
                        raise OSError(errno.EINVAL, "not even one entry fits")
                    return _entries(directory, message, payload, out, position)
                out += record
            position = after
    return _entries(directory, message, payload, out, position)


def _entry(guest: Guest, directory_fd: int, name: bytes) -> bytes:
    """The stat structure of one entry; nothing if it has gone meanwhile, or may not be shown."""
    found = guest.host.walk(directory_fd, name)
    if found is None:
        return b""
    fd, stat = found
    try:
        return _describe(guest, fd, name) if guest.tree.shows(stat) else b""
    except FileNotFoundError:  # a file system in user space may say so of what it showed before
        return b""
    finally:
        guest.host.close(fd)


def _entries(
    directory: Opened, message: Tread, payload: Payload, out: bytearray, position: int
) -> Reply:
    directory.read_offset, directory.read_position = message.offset + len(out), position
    payload.put(bytes(out))
    return Rread(len(out))
