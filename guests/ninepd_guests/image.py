"""The guest's root: an initramfs with busybox, the agent as init, and kernel modules."""

import hashlib
import os
import stat
from collections.abc import Iterable

from .cache import artefact
from .packages import command

FOLDERS = ("bin", "dev", "etc", "mnt", "modules", "proc", "root", "sys", "tmp", "var")
ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"
    "other:x:1001:1001:other:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "group": "root:x:0:\nuser:x:1000:\nother:x:1001:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost guest\n",
    "profile": "export PS1='guest:\\w\\$ ' TERM=${TERM:-linux}\n",
}


class Cpio:
    """A "newc" archive, as the kernel unpacks it at boot."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: int = 0) -> None:
        self.inode += 1
        path = name.encode() + b"\0"
        numbers = os.major(device), os.minor(device)
        fields = (self.inode, mode, 0, 0, 1, 0, len(content), 0, 0, *numbers, len(path), 0)
        self.data += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._pad()
        self.data += content
        self._pad()

    def _pad(self) -> None:
        self.data += bytes(-len(self.data) % 4)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self.data)


def initramfs(agent: str, busybox: str, modules: Iterable[str] = ()) -> str:
    """Path of the image made of these files."""
    image = Cpio()
    for name in FOLDERS:
        image.add(name, stat.S_IFDIR | 0o755)
    # The kernel opens this for init before anything is mounted.
    image.add("dev/console", stat.S_IFCHR | 0o600, device=os.makedev(5, 1))
    image.add("init", stat.S_IFREG | 0o755, _content(agent))
    image.add("bin/busybox", stat.S_IFREG | 0o755, _content(busybox))
    for applet in command([busybox, "--list"]).split():
        if applet != "busybox":
            image.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for name, text in ETC.items():
        image.add(f"etc/{name}", stat.S_IFREG | 0o644, text.encode())
    for path in modules:
        image.add(f"modules/{os.path.basename(path)}", stat.S_IFREG | 0o644, _content(path))
    data = image.finish()
    return artefact(
        f"initramfs-{hashlib.sha256(data).hexdigest()[:16]}.cpio",
        "writing the guest's root image",
        lambda result, _: _write(result, data),
    )


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
