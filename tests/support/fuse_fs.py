"""A file system whose every call can be made to wait or to fail: storage that is slow or broken.

``python tests/support/fuse_fs.py MOUNTPOINT TREE`` serves the tree in the JSON file TREE, which
maps paths to ``{"ino": N, "text": "..."}`` (text is null for a directory). It listens on standard
input:

    hold OP PATH         calls of OP on PATH wait from now on, until "release"; those that wait
                         already go on
    fail OP PATH ERRNO   ... fail from now on; ERRNO 0: no longer
    release              all go on, and no more wait
    dirents PATH JSON    what a listing of PATH holds, true or not: [[name, mode, inode], ...]

and says on standard output: ``ready``, ``held OP PATH`` when a call waits, ``done`` per command.
"""

import errno
import fcntl
import json
import os
import stat
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import mfusepy  # type: ignore[import-untyped]


class Node:
    def __init__(self, ino: int, mode: int, data: bytes = b"") -> None:
        self.ino = ino
        self.mode = mode
        self.data = bytearray(data)
        self.uid = self.gid = 0
        self.times = [0, 0, 0]
        self.xattrs: dict[str, bytes] = {}

    def attributes(self) -> dict[str, int]:
        return {
            "st_ino": self.ino,
            "st_mode": self.mode,
            "st_nlink": 1,
            "st_size": len(self.data),
            "st_blocks": -(-len(self.data) // 512),
            "st_uid": self.uid,
            "st_gid": self.gid,
            "st_atime": self.times[0],
            "st_mtime": self.times[1],
            "st_ctime": self.times[2],
        }


class Troubled(mfusepy.Operations):  # type: ignore[misc]
    use_ns = True

    def __init__(self, tree: dict[str, dict[str, Any]]) -> None:
        self._nodes = {"/": Node(1, stat.S_IFDIR | 0o755)}
        for path, entry in tree.items():
            text = entry["text"]
            mode = stat.S_IFDIR | 0o755 if text is None else stat.S_IFREG | 0o644
            self._nodes[path] = Node(entry["ino"], mode, (text or "").encode())
        self._next_ino = 1000
        self._dirents: dict[str, list[tuple[str, int, int]]] = {}
        self._errors: dict[tuple[str, str], int] = defaultdict(int)
        self._holds: dict[tuple[str, str], threading.Event] = {}
        self._lock = threading.Lock()

    # What tests say

    def say(self, *words: str) -> None:
        with self._lock:
            print(*words, flush=True)  # noqa: T201

    def listen(self) -> None:
        for line in sys.stdin:
            match line.split(maxsplit=3 if line.startswith("fail") else 2):
                case "hold", op, path:
                    key = op, path.rstrip()
                    before = self._holds.get(key)
                    self._holds[key] = threading.Event()
                    if before is not None:
                        before.set()
                case "fail", op, path, code:
                    self._errors[op, path] = int(code)
                case ("release",):
                    holds, self._holds = self._holds, {}
                    for event in holds.values():
                        event.set()
                case "dirents", path, text:
                    self._dirents[path] = json.loads(text)
            self.say("done")

    def _meet(self, op: str, path: str) -> None:
        event = self._holds.get((op, path))
        if event is not None:
            self.say("held", op, path)
            event.wait()
        if code := self._errors[op, path]:
            raise OSError(code, os.strerror(code))

    def _node(self, op: str, path: str) -> Node:
        self._meet(op, path)
        try:
            return self._nodes[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, path) from None

    def _add(self, op: str, path: str, mode: int) -> None:
        self._meet(op, path)
        uid, gid, _ = mfusepy.fuse_get_context()
        self._next_ino += 1
        node = self._nodes[path] = Node(self._next_ino, mode)
        node.uid, node.gid = uid, gid

    # What the kernel asks

    def init(self, _path: str) -> None:
        self.say("ready")

    def getattr(self, path: str, _fh: int | None = None) -> dict[str, int]:
        return self._node("getattr", path).attributes()

    def readdir(self, path: str, _fh: int) -> list[tuple[str, dict[str, int], int]]:
        self._meet("readdir", path)
        entries: list[tuple[str, int, int]] = [(".", stat.S_IFDIR, 1), ("..", stat.S_IFDIR, 1)]
        inside = path.rstrip("/") + "/"
        for name, node in list(self._nodes.items()):
            if name.startswith(inside) and name != "/" and "/" not in name[len(inside) :]:
                entries.append((name[len(inside) :], node.mode, node.ino))
        entries = self._dirents.get(path, entries)
        return [(name, {"st_mode": mode, "st_ino": ino}, 0) for name, mode, ino in entries]

    def link(self, new: str, old: str) -> int:
        self._meet("link", new)
        self._nodes[new] = self._nodes[old]
        return 0

    def symlink(self, path: str, target: str) -> int:
        self._add("symlink", path, stat.S_IFLNK | 0o777)
        self._nodes[path].data[:] = target.encode()
        return 0

    def readlink(self, path: str) -> str:
        return self._node("readlink", path).data.decode()

    def mknod(self, path: str, mode: int, _dev: int) -> int:
        self._add("mknod", path, mode)
        return 0

    def getxattr(self, path: str, name: str, _position: int = 0) -> bytes:
        try:
            return self._node("getxattr", path).xattrs[name]
        except KeyError:
            raise OSError(errno.ENODATA, name) from None

    def listxattr(self, path: str) -> list[str]:
        return list(self._node("listxattr", path).xattrs)

    def setxattr(
        self, path: str, name: str, value: bytes, _options: int, _position: int = 0
    ) -> int:
        self._node("setxattr", path).xattrs[name] = value
        return 0

    def open(self, path: str, _flags: int) -> int:
        self._node("open", path)
        return 0

    def create(self, path: str, mode: int, _fi: Any = None) -> int:
        self._add("create", path, stat.S_IFREG | stat.S_IMODE(mode))
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._add("mkdir", path, stat.S_IFDIR | stat.S_IMODE(mode))
        return 0

    def unlink(self, path: str) -> int:
        self._node("unlink", path)
        del self._nodes[path]
        return 0

    def rmdir(self, path: str) -> int:
        self._node("rmdir", path)
        del self._nodes[path]
        return 0

    def rename(self, old: str, new: str) -> int:
        self._node("rename", old)
        self._nodes[new] = self._nodes.pop(old)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        node = self._node("chmod", path)
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        node = self._node("chown", path)
        node.uid = uid if uid >= 0 else node.uid
        node.gid = gid if gid >= 0 else node.gid
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._node("utimens", path).times[:2] = times or (0, 0)
        return 0

    def truncate(self, path: str, length: int, _fh: int | None = None) -> int:
        data = self._node("truncate", path).data
        data[length:] = bytes(max(length - len(data), 0))
        return 0

    def read(self, path: str, size: int, offset: int, _fh: int) -> bytes:
        return bytes(self._node("read", path).data[offset : offset + size])

    def write(self, path: str, data: bytes, offset: int, _fh: int) -> int:
        node = self._node("write", path)
        node.data += bytes(max(offset - len(node.data), 0))
        node.data[offset : offset + len(data)] = data
        return len(data)

    def flush(self, path: str, _fh: int) -> int:
        self._meet("flush", path)
        return 0

    def fsync(self, path: str, _datasync: int, _fh: int) -> int:
        self._meet("fsync", path)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        self._meet("statfs", path)
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 12345, "f_namemax": 255}


class WithLocks(Troubled):
    """The kernel asks it about locks, instead of keeping them itself; it grants them all."""

    def lock(self, path: str, _fh: int, command: int, lock: Any) -> int:
        self._meet("lock", path)
        if command == fcntl.F_GETLK:
            lock.contents.l_type = fcntl.F_UNLCK
        return 0


def main() -> None:
    target, tree, *options = sys.argv[1:]
    kind = WithLocks if "locks" in options else Troubled
    operations = kind(json.loads(Path(tree).read_text()))
    threading.Thread(target=operations.listen, daemon=True).start()
    mfusepy.FUSE(
        operations,
        target,
        foreground=True,
        allow_other=True,
        use_ino=True,
        direct_io=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
    )


if __name__ == "__main__":
    main()
