"""User-mode Linux, built from Debian's kernel source: a guest at nearly native speed."""

import glob
import hashlib
import os
import shutil

from .cache import artefact
from .errors import GuestError
from .packages import Archive, command, unpack

SERIES = "7.2"
# program: Debian package
NEEDED = {
    "bc": "bc", "bison": "bison", "flex": "flex", "gcc": "gcc", "ld": "binutils", "make": "make",
    "perl": "perl", "tar": "tar", "xz": "xz-utils",
}  # fmt: skip
# On top of allnoconfig: what a guest needs to be a 9p client and to test one. No SMP, no modules.
OPTIONS = """
    64BIT ADVISE_SYSCALLS AIO BINFMT_ELF BINFMT_SCRIPT BLK_DEV_INITRD BUG CROSS_MEMORY_ATTACH
    DEVTMPFS EPOLL EVENTFD FANOTIFY FILE_LOCKING FSNOTIFY FUSE_FS FUTEX HOSTFS INET INOTIFY_USER
    IO_URING MEMBARRIER MULTIUSER NET NETWORK_FILESYSTEMS NET_9P NET_9P_FD NET_9P_VIRTIO NULL_CHAN
    OVERLAY_FS POSIX_TIMERS PRINTK PROC_FS SHMEM SIGNALFD SSL STDERR_CONSOLE SYSFS TIMERFD TMPFS
    TMPFS_POSIX_ACL TMPFS_XATTR TTY UNIX UNIX98_PTYS VIRTIO_FS VIRTIO_MENU VIRTIO_UML 9P_FS
    9P_FS_POSIX_ACL 9P_FS_SECURITY
"""


def uml_kernel() -> str:
    """Path of the kernel, which is a program."""
    options = hashlib.sha256(" ".join(OPTIONS.split()).encode()).hexdigest()
    return artefact(
        f"uml-{SERIES}-{options[:8]}",
        f"building user-mode Linux {SERIES} from Debian's source (some minutes)",
        _make,
    )


def _make(result: str, folder: str) -> None:
    missing = sorted({package for program, package in NEEDED.items() if not shutil.which(program)})
    if not os.path.exists("/usr/include/stdio.h"):
        missing.append("libc6-dev")
    if missing:
        raise GuestError(f"user-mode Linux cannot be built: install {' '.join(missing)}")
    archive = Archive()
    package = archive.series(SERIES, r"linux-source-(\d+\.\d+)")[-1]
    unpack(archive.download([package], f"{folder}/debs"), f"{folder}/deb")
    packed = glob.glob(f"{folder}/deb/usr/src/linux-source-*.tar.*")[0]
    source = os.path.join(folder, "source")
    os.mkdir(source)
    command(["tar", "--extract", "--file", packed, "--directory", source, "--strip-components=1"])
    wanted = os.path.join(source, "wanted.config")
    with open(wanted, "w") as file:
        file.writelines(f"CONFIG_{name}=y\n" for name in OPTIONS.split())
    make = ["make", "--directory", source, "ARCH=um", f"--jobs={os.cpu_count() or 1}"]
    command([*make, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"])
    with open(os.path.join(source, ".config")) as file:
        made = set(file.read().split())
    lost = [name for name in OPTIONS.split() if f"CONFIG_{name}=y" not in made]
    if lost:
        raise GuestError(f"Linux {SERIES} does not know these options any more: {' '.join(lost)}")
    command([*make, "linux"], timeout=3600)
    command(["strip", "-o", result, os.path.join(source, "linux")])
