"""Operations on directory entries: make, link, rename, remove.

Names are single components relative to the directory a fid holds. Where the protocol names a file
by its own fid only (Tremove, Trename), the place where it was found is a hint that must still be
true: else ESTALE, never another file.
"""

import errno
import stat as st
from collections.abc import Iterator
from contextlib import contextmanager

from ninepd.export.descriptors import Holder
from ninepd.export.handles import Handle, Hint
from ninepd.export.tree import check_name
from ninepd.ops import setid
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Payload, Reply
from ninepd.p9.messages import (
    UNLINK_REMOVEDIR,
    Qid,
    Rlink,
    Rmkdir,
    Rmknod,
    Rreadlink,
    Rremove,
    Rrename,
    Rrenameat,
    Rsymlink,
    Runlinkat,
    Tlink,
    Tmkdir,
    Tmknod,
    Treadlink,
    Tremove,
    Trename,
    Trenameat,
    Tsymlink,
    Tunlinkat,
)


def _new_qid(guest: Guest, directory: Handle, name: bytes) -> Qid:
    return guest.tree.qids.qid(guest.host.stat_at(directory.fd, name))


def mkdir(guest: Guest, message: Tmkdir, _payload: Payload, fid: Fid) -> Reply:
    """Make a directory, owned by the fid's user and the message's group."""
    parent = fid.directory()
    check_name(message.name)
    mode = st.S_IMODE(message.mode)
    guest.host.mkdir(parent.fd, message.name, mode, fid.uid, message.gid)
    return Rmkdir(_new_qid(guest, parent, message.name))


def symlink(guest: Guest, message: Tsymlink, _payload: Payload, fid: Fid) -> Reply:
    """Make a symbolic link; its target is the guest's business and is never followed here."""
    parent = fid.directory()
    check_name(message.name)
    if 0 in message.target:
        raise OSError(errno.EINVAL, "a link's target must not contain a NUL byte")
    guest.host.symlink(message.target, parent.fd, message.name, fid.uid, message.gid)
    return Rsymlink(_new_qid(guest, parent, message.name))


def mknod(guest: Guest, message: Tmknod, _payload: Payload, fid: Fid) -> Reply:
    """Make a file of any kind but directory and link; the host never opens special ones."""
    parent = fid.directory()
    check_name(message.name)
    mode = message.mode & (st.S_IFMT(0o170000) | 0o7777)
    if st.S_ISREG(mode):
        mode = setid.mode_to_create(guest.host, fid.uid, message.gid, parent, mode)
    guest.host.mknod(
        parent.fd,
        message.name,
        mode,
        message.major,
        message.minor,
        fid.uid,
        message.gid,
    )
    return Rmknod(_new_qid(guest, parent, message.name))


def readlink(guest: Guest, _message: Treadlink, _payload: Payload, fid: Fid) -> Reply:
    """Target of a symbolic link, byte for byte."""
    handle = fid.held()
    if not handle.is_symlink:
        raise OSError(errno.EINVAL, "the fid is no symbolic link")
    return Rreadlink(guest.host.readlink(handle.fd))


def link(guest: Guest, message: Tlink, _payload: Payload, into: Fid, fid: Fid) -> Reply:
    """Another name for what ``fid`` holds, a symbolic link itself included."""
    parent, source = into.directory(), fid.held()
    check_name(message.name)
    guest.host.link(source.fd, parent.fd, message.name)
    return Rlink()


def renameat(guest: Guest, message: Trenameat, payload: Payload, old: Fid, new: Fid) -> Reply:
    """rename(2) between two directories; fids follow their inodes, so there is nothing to mend."""
    source, target = old.directory(), new.directory()
    check_name(message.oldname, errno.EISDIR)
    check_name(message.newname, errno.EISDIR)
    _rename(guest, (source, message.oldname), (target, message.newname), payload.pins)
    return Rrenameat()


def _rename(guest: Guest, old: Hint, new: Hint, pins: list[Holder]) -> None:
    handles = guest.tree.handles
    held = handles.before_change(*old, pins)
    try:
        replaced = handles.before_change(*new, pins)
        try:
            guest.host.rename(old[0].fd, old[1], new[0].fd, new[1])
            # Two names of one file both stay, for rename(2) does nothing then.
            if held is not None and held is not replaced:
                handles.moved(held, old, new)
        finally:
            handles.after_change(replaced)
    finally:
        handles.after_change(held)


@contextmanager
def _hint(guest: Guest, fid: Fid, pins: list[Holder]) -> Iterator[Hint]:
    """Where the fid's file is to be found by name: EBUSY for the root, ESTALE if unknown.

    The directory is kept meanwhile: another thread may be renaming the file.
    """
    tree, handles = guest.tree, guest.tree.handles
    if fid.handle is tree.root:
        raise OSError(errno.EBUSY, "the root of an export stays where it is")
    hint = handles.pinned_hint(fid.handle, pins, fid.own_hint)
    try:
        if hint is None or not handles.is_at(fid.handle, *hint):
            known, hint = hint, tree.find(fid.handle, pins)
            if known is not None:
                handles.release(known[0])
            guest.replace(fid, handles.share(fid.handle), handles.share_hint(hint))
        yield hint
    finally:
        if hint is not None:
            handles.release(hint[0])


def rename(guest: Guest, message: Trename, payload: Payload, fid: Fid, into: Fid) -> Reply:
    """Rename what a fid holds; Linux sends this only to servers without Trenameat."""
    fid.held()
    target = into.directory()
    check_name(message.name, errno.EISDIR)
    rename_to(guest, fid, target, message.name, payload.pins)
    return Rrename()


def rename_here(guest: Guest, fid: Fid, name: bytes, pins: list[Holder]) -> None:
    """Give what a fid holds another name in the directory that it is in."""
    with _hint(guest, fid, pins) as old:
        if name != old[1]:
            _move(guest, fid, old, (old[0], name), pins)


def rename_to(guest: Guest, fid: Fid, directory: Handle, name: bytes, pins: list[Holder]) -> None:
    """Give what a fid holds another name; ESTALE if it is not where it was found."""
    with _hint(guest, fid, pins) as old:
        _move(guest, fid, old, (directory, name), pins)


def _move(guest: Guest, fid: Fid, old: Hint, new: Hint, pins: list[Holder]) -> None:
    _rename(guest, old, new, pins)
    guest.move(fid, guest.tree.handles.share(fid.handle), *new)


def _remove_name(
    guest: Guest, directory: Handle, name: bytes, is_directory: bool, pins: list[Holder]
) -> None:
    handles = guest.tree.handles
    held = handles.before_change(directory, name, pins)
    try:
        if is_directory:
            guest.host.rmdir(directory.fd, name)
        else:
            guest.host.unlink(directory.fd, name)
    finally:
        handles.after_change(held)


def unlinkat(guest: Guest, message: Tunlinkat, payload: Payload, fid: Fid) -> Reply:
    """Remove a name; what fids hold of the file stays usable."""
    parent = fid.directory()
    check_name(message.name, errno.EINVAL if message.name == b"." else errno.ENOTEMPTY)
    if message.flags & ~UNLINK_REMOVEDIR:
        raise OSError(errno.EINVAL, f"flags {message.flags:#x} are not known")
    is_directory = bool(message.flags & UNLINK_REMOVEDIR)
    _remove_name(guest, parent, message.name, is_directory, payload.pins)
    return Runlinkat()


def remove(guest: Guest, message: Tremove, payload: Payload, fid: Fid) -> Reply:
    """Remove the file and clunk the fid, the latter whatever happens (remove(5))."""
    guest.remove(message.fid, fid)
    try:
        with _hint(guest, fid, payload.pins) as (directory, name):
            _remove_name(guest, directory, name, fid.handle.is_directory, payload.pins)
    finally:
        guest.retire(fid)
    return Rremove()
