"""Setuid and setgid bits: they go where a local kernel would take them from the user of a fid.

Who writes to a program that runs as somebody else, or shortens it, must not make it his own; only
root may (write(2)). The host's kernel sees to that, once the thread has put CAP_FSETID aside
(CVE-2023-1386). Whether a user is in a file's group, only the guest's kernel knows: it has taken
the bit already from the mode that somebody else sets. Not so from a program that is created in a
setgid directory, whose group it sends as the user's own (CVE-2022-0358), nor by an ACL: there the
bit goes, unless the group has the number of the user, as most users' own have. Directories keep
theirs: it gives no rights.
"""

import stat as st
from typing import Final

from ninepd.export.handles import Handle
from ninepd.export.host import Host

ROOT: Final = 0
_GROUP_PROGRAM: Final = st.S_ISGID | st.S_IXGRP


def act_on_group(host: Host, uid: int, handle: Handle) -> None:
    """As ``Host.act_for``, for a change of ACL, which concerns the group of a file."""
    host.act_for(uid if _is_foreign(host, uid, handle) else ROOT)


def mode_to_create(host: Host, uid: int, gid: int, directory: Handle, mode: int) -> int:
    """What is left of the mode that a user creates a file with; that stays, whatever the group."""
    if (
        mode & _GROUP_PROGRAM == _GROUP_PROGRAM
        and uid not in {ROOT, gid}
        and host.stat_at(directory.fd, b"").mode & st.S_ISGID
    ):
        mode &= ~st.S_ISGID
    if mode & st.S_ISGID:
        host.act_for(ROOT)
    return mode


def _is_foreign(host: Host, uid: int, handle: Handle) -> bool:
    """Is it a regular file whose group is not known to be one of the user's?"""
    return uid != ROOT and handle.kind == st.S_IFREG and host.attributes(handle.fd).st_gid != uid
