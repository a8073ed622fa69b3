"""Treaddir: the entries of a directory."""

import errno
import stat as st

from ninepd.listing import RUN_MAX, LookUp, Run
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Payload, Reply
from ninepd.p9.messages import QID, Rreaddir, Treaddir


def readdir(guest: Guest, message: Treaddir, payload: Payload, fid: Fid) -> Reply:
    """Entries behind the one that had cookie ``offset``; none means the end.

    It moves the position of the open directory, so it has the fid to itself.
    """
    directory = fid.open_object()
    if not fid.handle.is_directory:
        raise NotADirectoryError(errno.ENOTDIR, "the fid is no directory")
    cookies = directory.cookies or fid.handle.begin_listing(guest.limits.cookies_max)
    size = min(message.nbytes, payload.room)
    tree, fd = guest.tree, directory.fd
    look_up, covered = tree.covered(fid.handle)
    # A client that seeks, or reads little at a time, asks for the same entries again and again.
    # Where looking up is needed, the version of the directory does not tell whether they are.
    version = guest.host.stat_at(fd, b"").version if look_up is LookUp.COVERED else 0
    run = guest.last_run
    if message.offset and version and run is not None and run[:3] == (cookies, version, covered):
        data = run.behind(message.offset, size)
        if data:
            payload.put(data)
            return Rreaddir(len(data))
    offset = cookies.position(message.offset)
    at_root = fid.handle is tree.root
    devices = tree.qids.devices
    try:
        data = guest.host.readdir(fd, offset, at_root, look_up, covered, devices, cookies, size)
    except OSError as error:
        if error.errno == errno.ENOENT:  # a removed directory is empty, as on a local file system
            data = b""
        elif error.errno == errno.EDOM:
            data = cookies.shorten(_readdir_slowly(guest, fid, fd, offset, size))
        else:
            raise
    if data:
        guest.last_run = Run(cookies, version, covered, data)
    payload.put(data)
    return Rreaddir(len(data))


def _readdir_slowly(guest: Guest, fid: Fid, fd: int, offset: int, size: int) -> bytes:
    """One run that meets files without a number in the table that C reads."""
    tree = guest.tree
    size = min(size, RUN_MAX)
    out = bytearray()
    while not out and (listed := guest.host.getdents(fd, offset)):
        for position, name in listed:
            itself = name == b".." and fid.handle is tree.root
            offset = position
            try:
                stat = guest.host.stat_at(fd, b"" if itself else name)
            except OSError:  # gone meanwhile, or not to be looked at
                continue
            if not tree.shows(stat):
                continue
            kind = st.S_IFMT(stat.mode) >> 12
            entry = QID.pack(*tree.qids.qid(stat)) + position.to_bytes(8, "little")
            entry += bytes((kind,)) + len(name).to_bytes(2, "little") + name
            if len(out) + len(entry) > size:
                if not out:
                    raise OSError(errno.EINVAL, "not even one entry fits")
                return bytes(out)
            out += entry
    return bytes(out)
