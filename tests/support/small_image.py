"""An initramfs with a script of one's own as init, for guests without our agent."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ninepd_guests.image import Cpio

APPLETS = ("cat", "insmod", "mount", "poweroff", "sh", "switch_root", "umount", "uname")


def small_image(init: str, busybox: str, modules: Iterable[str]) -> bytes:
    image = Cpio()
    for folder in ("bin", "dev", "mnt", "modules", "proc"):
        image.add(folder, stat.S_IFDIR | 0o755)
    image.add("dev/console", stat.S_IFCHR | 0o600, device=os.makedev(5, 1))
    image.add("init", stat.S_IFREG | 0o755, init.encode())
    image.add("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    for applet in APPLETS:
        image.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for module in map(Path, modules):
        image.add(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
    return image.finish()
