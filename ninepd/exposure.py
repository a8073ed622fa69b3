"""Could users of this host become root by what a guest leaves in an export?

A daemon that is root serves real owners and modes: its guest can make a setuid program of root's,
or a device node. They give the guest nothing that it has not got, but root to everybody on the host
who can reach them. So a folder above the export must keep other users out, for the mode of its own
directory is the guest's to change; or its mounts must ignore setuid bits and device nodes.
"""

import os
from typing import Final

from ninepd.capabilities import privileged
from ninepd.config import MAPPED, Export
from ninepd.errors import UsageError
from ninepd.mounts import unescaped
from ninepd.syscalls import fd_path, open_parent, stat_at

_HARMLESS: Final = {b"nosuid": os.ST_NOSUID, b"nodev": os.ST_NODEV}
_OTHERS_ENTER: Final = 0o001


def refuse_unsafe(export: Export, model: str, directory: int) -> None:
    """UsageError if an export, held as ``directory``, lays its host open to its users."""
    if export.readonly or export.allow_unsafe_export:
        return
    if model in MAPPED or not _is_root():
        return
    place = _harmful_mount(directory) if _is_open_to_others(directory) else None
    if place is not None:
        raise UsageError(
            f"--export: other users can reach {export.export}, and become root by a setuid program "
            "or a device node that a guest makes there; move it below a folder of mode 0700, mount "
            f"{place} with nosuid,nodev, or accept this by --allow-unsafe-export"
        )


def _is_root() -> bool:
    """Is what we make as root the host's root's?"""
    if os.geteuid() and not privileged():
        return False
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        return any(line.split()[1] == "0" for line in lines)  # in a user namespace it need not be


def _is_open_to_others(directory: int) -> bool:
    """May everybody enter all folders above it? By climbing, since names may be links."""
    at = os.dup(directory)
    try:
        place = stat_at(at, b"")
        while True:
            below, at = at, open_parent(at)
            os.close(below)
            above = stat_at(at, b"")
            if (above.mnt_id, above.dev, above.ino) == (place.mnt_id, place.dev, place.ino):
                return True
            if not above.mode & _OTHERS_ENTER:
                return False
            place = above
    finally:
        os.close(at)


def _harmful_mount(directory: int) -> str | None:
    """The directory, or a place below it, if it has a mount that is not harmless."""
    path = os.fsencode(os.readlink(fd_path(directory)))
    flags = os.fstatvfs(directory).f_flag
    if not all(flags & flag for flag in _HARMLESS.values()):
        return os.fsdecode(path)
    below = path.rstrip(b"/") + b"/"
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            place, options = map(unescaped, line.split(b" ", 6)[4:6])
            if place.startswith(below) and not _HARMLESS.keys() <= set(options.split(b",")):
                return os.fsdecode(place)
    return None
