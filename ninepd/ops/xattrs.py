"""Extended attributes: Txattrwalk, Txattrcreate, and reading and writing the fids they make.

An attribute is read whole at the walk and set whole at the clunk, so the guest never sees half of
one. Through the magic link of the handle this reaches every kind of file, symbolic links included.
"""

import errno
from typing import Final

from ninepd.export.host import ACLS, Host
from ninepd.ops import setid
from ninepd.ops.fid import Fid, XattrValue, XattrWriter
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Payload, Reply
from ninepd.p9.messages import (
    XATTR_CREATE,
    XATTR_REPLACE,
    Rread,
    Rwrite,
    Rxattrcreate,
    Rxattrwalk,
    Tread,
    Twrite,
    Txattrcreate,
    Txattrwalk,
)
from ninepd.syscalls import XATTR_SIZE_MAX

XATTR_NAME_MAX: Final = 255


def _check_name(guest: Guest, name: bytes) -> None:
    if not name or 0 in name:
        raise OSError(errno.EINVAL, "no name for an extended attribute")
    if len(name) > XATTR_NAME_MAX:
        raise OSError(errno.ERANGE, f"a name of an attribute has at most {XATTR_NAME_MAX} bytes")
    guest.host.check_xattr(name)


def xattrwalk(guest: Guest, message: Txattrwalk, _payload: Payload, fid: Fid) -> Reply:
    """``newfid`` reads the value of an attribute, or, for an empty name, the list of names."""
    handle = fid.held()
    guest.session.check_free(message.newfid)
    if message.name:
        _check_name(guest, message.name)
        found = guest.host.getxattr(handle.fd, message.name)
        if found is None:
            return guest.session.error(errno.ENODATA)
        value = found
    else:
        value = b"".join([name + b"\0" for name in guest.host.listxattr(handle.fd)])
    guest.check_xattr_room()
    reader = guest.add(message.newfid, guest.tree.handles.share(handle), fid.uid)
    reader.opened = XattrValue(value)
    guest.xattr_fids += 1
    return Rxattrwalk(len(value))


def xattrcreate(guest: Guest, message: Txattrcreate, _payload: Payload, fid: Fid) -> Reply:
    """The fid becomes the writer of an attribute: Twrite fills it, Tclunk sets it."""
    fid.check_unopened()
    _check_name(guest, message.name)
    if message.attr_size > XATTR_SIZE_MAX:
        raise OSError(errno.E2BIG, f"an extended attribute has at most {XATTR_SIZE_MAX} bytes")
    if message.flags & ~(XATTR_CREATE | XATTR_REPLACE):
        raise OSError(errno.EINVAL, f"flags {message.flags:#x} are not known")
    guest.check_xattr_room()
    guest.xattr_fids += 1
    fid.opened = XattrWriter(message.name, message.attr_size, message.flags)
    return Rxattrcreate()


def read(value: XattrValue, message: Tread, payload: Payload) -> Reply:
    """Tread of the fid that a Txattrwalk made."""
    count = min(message.nbytes, payload.room)
    data = value.data[message.offset : message.offset + count]
    payload.put(data)
    return Rread(len(data))


def write(writer: XattrWriter, message: Twrite, payload: Payload) -> Reply:
    """Twrite of the fid that a Txattrcreate made; ENOSPC past the announced size."""
    if message.offset > len(writer.data):
        raise OSError(errno.EINVAL, "the value of an attribute is written without gaps")
    if message.offset + message.nbytes > writer.size:
        raise OSError(errno.ENOSPC, "more than the announced size")
    data = payload.take(message.nbytes)
    writer.data[message.offset : message.offset + len(data)] = data
    return Rwrite(len(data))


def commit(host: Host, fid: Fid, writer: XattrWriter) -> None:
    """Set or remove the attribute: the result of the guest's setxattr or removexattr.

    Linux asks for a removal as size 0 with REPLACE, and for that of an ACL as size 0 alone
    (fs/9p/xattr.c, fs/9p/acl.c); otherwise size 0 sets an empty value.
    """
    handle, acl = fid.handle, writer.name in ACLS
    if writer.size == 0 and (acl or writer.flags == XATTR_REPLACE):
        try:
            host.removexattr(handle.fd, writer.name)
        except OSError as error:
            if not (acl and error.errno == errno.ENODATA):
                raise
        return
    if len(writer.data) != writer.size:
        raise OSError(errno.EINVAL, "fewer bytes were written than announced")
    if acl:
        setid.act_on_group(host, fid.uid, handle)
    host.setxattr(handle.fd, writer.name, bytes(writer.data), writer.flags)
