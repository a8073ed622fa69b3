"""Which function serves which T-message. Tversion and Tflush are the device's own business."""

from collections.abc import Callable
from typing import Any, Final

from ninepd.ops import attributes, files, legacy, names, walking, xattrs
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Payload, Reply
from ninepd.p9 import messages as p9
from ninepd.p9.session import Dialect

Handler = Callable[[Guest, Any, Payload], Reply]
Handlers = dict[type[Any], Handler]

_COMMON: Final[Handlers] = {
    p9.Tattach: walking.attach,
    p9.Tauth: walking.auth,
    p9.Tclunk: walking.clunk,
    p9.Tread: files.read,
    p9.Tremove: names.remove,
    p9.Twalk: walking.walk,
    p9.Twrite: files.write,
}
_LINUX: Final[Handlers] = {
    p9.Tfsync: files.fsync,
    p9.Tgetattr: attributes.getattr,
    p9.Tgetlock: files.getlock,
    p9.Tlcreate: files.lcreate,
    p9.Tlink: names.link,
    p9.Tlock: files.lock,
    p9.Tlopen: files.lopen,
    p9.Tmkdir: names.mkdir,
    p9.Tmknod: names.mknod,
    p9.Treaddir: files.readdir,
    p9.Treadlink: names.readlink,
    p9.Trename: names.rename,
    p9.Trenameat: names.renameat,
    p9.Tsetattr: attributes.setattr,
    p9.Tstatfs: attributes.statfs,
    p9.Tsymlink: names.symlink,
    p9.Tunlinkat: names.unlinkat,
    p9.Txattrcreate: xattrs.xattrcreate,
    p9.Txattrwalk: xattrs.xattrwalk,
}
_OLD: Final[Handlers] = {
    p9.Tcreate: legacy.create,
    p9.Topen: legacy.open,
    p9.Tread: legacy.read,
    p9.Tstat: legacy.stat,
    p9.Twstat: legacy.wstat,
}

HANDLERS: Final[dict[Dialect, Handlers]] = {
    Dialect.L: _COMMON | _LINUX,
    Dialect.U: _COMMON | _OLD,
    Dialect.PLAIN: _COMMON | _OLD,
}

_FID_NAMES: Final = frozenset({"fid", "dfid", "olddirfid", "newdirfid", "dirfid"})


def fid_fields(message: type[Any]) -> tuple[int, ...]:
    """Positions of the fields that name fids which must exist already."""
    return tuple(at for at, name in enumerate(message._fields) if name in _FID_NAMES)
