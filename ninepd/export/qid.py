"""From (device, inode) to qid, without collisions.

qid.path, 64 bits:

    0 | device index, 15 bits | inode, 48 bits      the ordinary case
    1 | slot, 63 bits                               inodes of 2^48 and more, and surplus devices

The export's own device has index 0, so its files show the host's inode numbers. The index of
another device and the slot of a big inode start from a hash of what they stand for and move on
when taken: the same after a restart unless two hashes met. Devices are remembered, so their files
never collide. Of big inodes the last CLAIMS_MAX are, and those for good whose hashes met, which in
63 bits nobody will see: so two of them collide only if their hashes do, and they are not seen near
one another.
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
CLAIMS_MAX: Final = 1 << 14
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
        self._claims: dict[int, tuple[int, int]] = {}
        """Slot to device and inode, the oldest first."""
        self._moved: dict[tuple[int, int], int] = {}
        """Those that are not in the slot of their hash."""
        self._lock = threading.Lock()
        self._add_device(root.dev, 0)

    def _add_device(self, dev: int, index: int) -> None:
        self._index[dev] = index
        self._used.add(index)
        self.devices.append(dev, index << INODE_BITS)

    def dump(self) -> dict[int, int]:
        """The index of each device."""
        return dict(self._index)

    def load(self, indices: dict[int, int]) -> None:
        """Number devices as they were numbered elsewhere; before any other is seen."""
        with self._lock:
            for dev, index in indices.items():
                if dev not in self._index:
                    self._add_device(dev, index)

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
            return _LARGE | self._claim((stat.dev, stat.ino))

    def _claim(self, key: tuple[int, int]) -> int:
        home = _hash(*key) % _LARGE
        slot = self._moved.get(key, home)
        while self._claims.get(slot, key) != key:
            slot = (slot + 1) % _LARGE
        if slot != home:
            self._moved[key] = slot
        self._claims.pop(slot, None)
        self._claims[slot] = key
        if len(self._claims) > CLAIMS_MAX:
            del self._claims[next(iter(self._claims))]
        return slot

    def qid(self, stat: Stat) -> Qid:
        """The whole qid of a file."""
        return made(Qid, (_TYPES.get(stat.mode & _S_IFMT, 0), stat.version, self.path(stat)))
