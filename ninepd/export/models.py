"""Security models: whose the files of an export are, on the host and for the guest.

Names and meaning are QEMU's (``-fsdev local,security_model=``). ``auto`` takes the best that this
process and the file system allow.
"""

import logging

from ninepd.capabilities import CAP_SYS_ADMIN, has_capabilities, privileged
from ninepd.config import AUTO, Export
from ninepd.errors import UsageError
from ninepd.export.host import Host
from ninepd.export.idmapped import IdMappedHost
from ninepd.export.local import LocalHost
from ninepd.export.mapped_file import MappedFileHost
from ninepd.export.mapped_xattr import MappedXattrHost, takes_xattrs
from ninepd.export.readonly import ReadonlyHost
from ninepd.ids import Ids

log = logging.getLogger(__name__)


def choose_model(export: Export, directory: int) -> str:
    """The security model of an export, which ``directory`` is the root of; or UsageError."""
    if export.trusted_xattrs and not has_capabilities(CAP_SYS_ADMIN):
        raise UsageError("--trusted-xattrs: that needs CAP_SYS_ADMIN; run as root, or leave it out")
    if export.security_model != AUTO:
        return export.security_model
    if privileged():
        model, reason = "passthrough", "this process may create files as any user"
    elif takes_xattrs(directory):
        model, reason = "mapped-xattr", "this process may not create files as other users"
    else:
        model, reason = "mapped-file", "the file system has no extended attributes for owners"
    export.check_model(model)
    log.info("%s: security model %s, because %s", export.tag, model, reason)
    return model


def make_host(export: Export, model: str, directory: int) -> Host:
    """The host as a security model shows it. ``directory``, the root of the export, stays open."""
    host = _host(export, model, directory)
    host.writes_out = export.writeout is not None
    return ReadonlyHost(host) if export.readonly else host


def _host(export: Export, model: str, directory: int) -> Host:
    fmode, dmode = export.file_permissions
    ids = Ids(*export.id_ranges) if export.maps_ids else None
    if model == "mapped-xattr":
        return MappedXattrHost(fmode, dmode, ids)
    if model == "mapped-file":
        return MappedFileHost(fmode, dmode, directory, ids)
    strict = model != "none"
    return LocalHost(strict) if ids is None else IdMappedHost(ids, strict)
