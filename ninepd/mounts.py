"""Which names in the directories of a mount are covered: something else is mounted on them.

A directory entry shows the number of what lies below, a walk that of what is mounted. Asking the
kernel for its list of mounts takes one poll(2) while that does not change (proc(5),
/proc/pid/mountinfo), where looking up each entry takes a system call for each.
"""

import os
import re
import select
import threading
from typing import Final

NAMES_MAX: Final = 64
"""More names than these take longer to compare with than to look everything up."""
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class Mounts:
    """The mounts that this process sees. Safe to use from several threads."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._changes = select.poll()
        self._changes.register(self._fd, select.POLLPRI)
        self._lock = threading.Lock()
        self._stale = False
        """Has there been a change that could not be read yet? The kernel tells of it once."""
        self._covered = self._read()

    def close(self) -> None:
        os.close(self._fd)

    def covered(self, mnt_id: int) -> bytes | None:
        """Names that something is mounted on, each ended by a NUL byte.

        Each may be covered in some directories of the mount and be free in others. None if nothing
        is known: the root of a chroot is not listed, for example.
        """
        with self._lock:
            self._stale |= bool(self._changes.poll(0))
            if self._stale:
                self._covered = self._read()
                self._stale = False
            return self._covered.get(mnt_id)

    def _read(self) -> dict[int, bytes | None]:
        names: dict[int, set[bytes]] = {}
        listed = []
        os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as lines:
            for line in lines:
                mnt_id, parent, _, _, point, _ = line.split(b" ", 5)
                listed.append(int(mnt_id))
                names.setdefault(int(parent), set()).add(unescaped(point.rpartition(b"/")[2]))
        return {mnt_id: _joined(names.get(mnt_id, set())) for mnt_id in listed}


def unescaped(name: bytes) -> bytes:
    """A name of the kernel's list, as it is."""
    return _OCTAL.sub(lambda found: bytes((int(found[1], 8),)), name)


def _joined(names: set[bytes]) -> bytes | None:
    if len(names) > NAMES_MAX:
        return None
    return b"".join([name + b"\0" for name in names if name])
