"""Which function serves which T-message. Tversion and Tflush are the device's own business."""

from collections.abc import Callable
from typing import Any, Final

from ninepd.fs import attributes, files, names, walking, xattrs
from ninepd.fs.server import Payload, Reply, Server
from ninepd.p9 import messages as p9

Handler = Callable[[Server, Any, Payload], Reply]

HANDLERS: Final[dict[type[Any], Handler]] = {
    p9.Tattach: walking.attach,
    p9.Tauth: walking.auth,
    p9.Tclunk: walking.clunk,
    p9.Tfsync: files.fsync,
    p9.Tgetattr: attributes.getattr,
    p9.Tgetlock: files.getlock,
    p9.Tlcreate: files.lcreate,
    p9.Tlink: names.link,
    p9.Tlock: files.lock,
    p9.Tlopen: files.lopen,
    p9.Tmkdir: names.mkdir,
    p9.Tmknod: names.mknod,
    p9.Tread: files.read,
    p9.Treaddir: files.readdir,
    p9.Treadlink: names.readlink,
    p9.Tremove: names.remove,
    p9.Trename: names.rename,
    p9.Trenameat: names.renameat,
    p9.Tsetattr: attributes.setattr,
    p9.Tstatfs: attributes.statfs,
    p9.Tsymlink: names.symlink,
    p9.Tunlinkat: names.unlinkat,
    p9.Twalk: walking.walk,
    p9.Twrite: files.write,
    p9.Txattrcreate: xattrs.xattrcreate,
    p9.Txattrwalk: xattrs.xattrwalk,
}

FID_FIELDS: Final[dict[type[Any], tuple[int, ...]]] = {
    message: tuple(
        index
        for index, name in enumerate(message._fields)
        if name in {"fid", "dfid", "olddirfid", "newdirfid", "dirfid"}
    )
    for message in HANDLERS
}
"""Positions of the fields of a message that name fids which must exist already."""
