"""Descriptors that a front end sent: what they may be, and how they are let go.

A system call on a file of FUSE or of a network may wait for a server that never answers, and the
last close of a socket for its peer (SO_LINGER). The loop thread must not. So a descriptor is judged
by what the kernel knows without asking a file system: the name of its /proc link (an anonymous
inode's does not begin with "/", so no file can pose as one), F_GET_SEALS (shmem and hugetlbfs have
them, nothing else does: mm/memfd.c), and its mount. And whatever may take its time is closed on
a thread of its own.
"""

import contextlib
import fcntl
import os
import re
import socket
import stat
import threading
from functools import cache
from typing import Final

from ninepd.errors import Refused
from ninepd.syscalls import fd_path
from ninepd.vring import device_of
from ninepd.workers import Workers

_EVENTFD: Final = "anon_inode:[eventfd]"
_LOCAL: Final = frozenset(
    {
        "bcachefs",
        "btrfs",
        "devtmpfs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "ramfs",
        "tmpfs",
        "xfs",
        "zfs",
    }
)
"""File systems that answer fstat, fstatfs and mmap of an open file from memory."""
_MOUNT_ID: Final = re.compile(r"^mnt_id:\s*(\d+)$", re.MULTILINE)


def check_signal(fd: int) -> None:
    """Refused unless the descriptor can kick or call: an eventfd, or a unix socket."""
    if not _is_eventfd(fd) and not _is_unix_socket(fd):
        raise Refused(f"{_link(fd)!r} is no eventfd and no unix socket")


def check_channel(fd: int) -> None:
    """Refused unless the descriptor can carry requests to the front end."""
    if not _is_unix_socket(fd):
        raise Refused(f"{_link(fd)!r} is no unix socket")


def check_memory(fd: int) -> None:
    """Refused unless the descriptor can hold guest memory: no call on it may block from here on."""
    if _is_shared_memory(fd):
        return
    kind = _file_system(fd)
    if kind not in _LOCAL:
        raise Refused(f"{_link(fd)!r} is no guest memory: not a file of a local file system")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Refused(f"{_link(fd)!r} is no guest memory: not a regular file")


def _link(fd: int) -> str:
    return os.readlink(fd_path(fd))


def _is_eventfd(fd: int) -> bool:
    return _link(fd) == _EVENTFD


def _is_unix_socket(fd: int) -> bool:
    if not _link(fd).startswith("socket:["):
        return False
    # With all three given, nothing is asked of the socket.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_UNIX
    finally:
        sock.detach()


def _is_shared_memory(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


@cache
def remember_mounts() -> int:
    """The host's list of mounts, which goes on to tell of them where they cannot be reached."""
    return os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)


def _file_system(fd: int) -> str | None:
    """The type of the file system that a file is on, if that is mounted here.

    By the mount, of which the kernel tells without asking it. A front end in a mount namespace of
    its own, as libvirt gives to QEMU, has mounts with other numbers: there the device number tells.
    """
    if not _link(fd).startswith("/"):
        return None
    with open(f"/proc/self/fdinfo/{fd}") as info:
        found = _MOUNT_ID.search(info.read())
    mount_id = found[1] if found else ""
    types: dict[str, str] = {}
    mounts = remember_mounts()
    os.lseek(mounts, 0, os.SEEK_SET)
    with open(mounts, errors="replace", closefd=False) as listed:
        lines = listed.readlines()
    for line in lines:
        about, _, file_system = line.partition(" - ")
        number, _parent, device, *_ = about.split()
        kind = file_system.split()[0]
        if number == mount_id:
            return kind
        types[device] = kind
    number_of_device = device_of(fd)
    return types.get(f"{os.major(number_of_device)}:{os.minor(number_of_device)}")


def _close(fd: int) -> None:
    # What a file system has to say at close is no concern of ours.
    with contextlib.suppress(OSError):
        os.close(fd)


class _Closers:
    """Close what may take its time, each on a thread that hangs alone: up to so many of them."""

    def __init__(self, limit: int) -> None:
        self._workers = Workers("closer")
        self._limit = limit
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._running = 0

    def close(self, fd: int) -> None:
        with self._lock:
            self._fds.append(fd)
            if self._running == self._limit:
                return
            self._running += 1
        if not self._workers.start(self._run):
            with self._lock:  # no thread can be had; the next one to close tries again
                self._running -= 1

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._fds:
                    self._running -= 1
                    return
                fd = self._fds.pop()
            _close(fd)


_closers: Final = _Closers(32)


def close(fd: int) -> None:
    """Let a descriptor of a front end go, at once if that cannot block."""
    if _is_eventfd(fd) or _is_shared_memory(fd):
        _close(fd)
    else:
        _closers.close(fd)


class Held:
    """A descriptor whose number stays while what it names is replaced, and the ring runs."""

    def __init__(self, own: int) -> None:
        """``own`` is an eventfd of ours, which is meant while there is none of the front end's."""
        self._own = own
        self._fd = os.dup(own)
        self._given = False

    @property
    def number(self) -> int:
        """-1 if the front end gave none."""
        return self._fd if self._given else -1

    def replace(self, lent: int | None) -> None:
        """Take what is lent, or nothing, in the place of the old; OSError changes nothing."""
        old = None
        try:
            old = os.dup(self._fd)
        except OSError:
            if lent is not None:
                raise
            # With no number to spare it is closed here: going matters more than waiting.
        os.dup2(self._own if lent is None else lent, self._fd, inheritable=False)
        self._given = lent is not None
        if old is not None:
            close(old)

    def close(self) -> None:
        close(self._fd)
