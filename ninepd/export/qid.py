"""From (device, inode) to qid, without collisions.

qid.path, 64 bits:

    0 | device index, 15 bits | inode, 48 bits      the ordinary case
    1 | slot, 63 bits                               inodes of 2^48 and more, and surplus devices

The export's own device has index 0, so its files show the host's inode numbers. The index of
another device and the slot of a big inode start from a hash of what they stand for and move on
when taken: injective always, and the same after a restart unless two hashes met.
"""

import threading
from hashlib import blake2b
from stat import S_IFDIR, S_IFLNK
from typing import Final

from ninepd.p9.messages import Qid, QidType
from ninepd.syscalls import QidDevices, Stat
from ninepd.tuples import made

INODE_BITS: Final = 48
DEVICE_BITS: Final = 15
_LARGE: Final = 1 << 63
_S_IFMT: Final = 0o170000
_TYPES: Final = {S_IFDIR: QidType.DIR, S_IFLNK: QidType.SYMLINK}


def _hash(*numbers: int) -> int:
    data = b"".join([number.to_bytes(8, "little") for number in numbers])
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class QidMap:
    """The numbers of one export. Safe to use from several threads."""

    def __init__(self, root: Stat, one_device: bool = False) -> None:
        """``one_device``: other devices get no index of their own; their numbers may collide."""
        self._one_device = one_device
        self.devices = QidDevices()
        self._index: dict[int, int] = {}
        self._used: set[int] = set()
        self._large: dict[tuple[int, int], int] = {}
        self._slots: set[int] = set()
        self._lock = threading.Lock()
        self._add_device(root.dev, 0)

    def _add_device(self, dev: int, index: int) -> None:
        self._index[dev] = index
        self._used.add(index)
        self.devices.append(dev, index << INODE_BITS)

    def path(self, stat: Stat) -> int:
        """qid.path of a file, a new device being given its index on the way."""
        index = self._index.get(stat.dev)
        if index is None and self._one_device:
            return stat.ino
        if index is None or stat.ino >> INODE_BITS:
            return self._slow_path(stat)
        return index << INODE_BITS | stat.ino

    def _slow_path(self, stat: Stat) -> int:
        with self._lock:
            if stat.dev not in self._index and len(self._used) < 1 << DEVICE_BITS:
                index = _hash(stat.dev) % (1 << DEVICE_BITS)
                while index in self._used:
                    index = (index + 1) % (1 << DEVICE_BITS)
                self._add_device(stat.dev, index)
            known = self._index.get(stat.dev)
            if known is not None and not stat.ino >> INODE_BITS:
                return known << INODE_BITS | stat.ino
            key = (stat.dev, stat.ino)
            slot = self._large.get(key)
            if slot is None:
                slot = _hash(*key) % _LARGE
                while slot in self._slots:
                    slot = (slot + 1) % _LARGE
                self._large[key] = slot
                self._slots.add(slot)
            return _LARGE | slot

    def qid(self, stat: Stat) -> Qid:
        """The whole qid of a file."""
        return made(Qid, (_TYPES.get(stat.mode & _S_IFMT, 0), stat.version, self.path(stat)))
