"""System call numbers, structures and argument kinds of x86_64 Linux, as remote.py needs them."""

from dataclasses import dataclass

NR = {
    "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "pread64": 17, "pwrite64": 18, "msync": 26, "dup": 32, "getpid": 39, "fcntl": 72, "flock": 73,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getcwd": 79, "chdir": 80,
    "fchdir": 81, "rename": 82, "fchmod": 91, "fchown": 93, "umask": 95, "setgroups": 116,
    "setresuid": 117, "setresgid": 119, "statfs": 137, "chroot": 161, "lsetxattr": 189,
    "setxattr": 188, "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193,
    "listxattr": 194, "llistxattr": 195, "removexattr": 197, "lremovexattr": 198,
    "getdents64": 217, "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260,
    "newfstatat": 262, "unlinkat": 263, "renameat2": 316, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "utimensat": 280, "fallocate": 285,
    "copy_file_range": 326, "statx": 332, "pidfd_open": 434, "pidfd_getfd": 438,
}  # fmt: skip
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_REMOVEDIR = 0x200
F_GETLK, F_SETLK, F_SETLKW = 5, 6, 7
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2


@dataclass(frozen=True)
class Out:
    """An argument: a buffer that the call fills."""

    size: int


@dataclass(frozen=True)
class Read:
    """An argument: a buffer of which the call fills as much as its result says."""

    size: int


@dataclass(frozen=True)
class InOut:
    """An argument: a buffer that the call reads and changes."""

    data: bytes


Argument = int | bytes | Out | Read | InOut


@dataclass(frozen=True)
class Stat:
    dev: int
    ino: int
    nlink: int
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Entry:
    """One directory entry; ``type`` is a DT_ number."""

    name: str
    ino: int
    type: int
    offset: int


@dataclass(frozen=True)
class StatFs:
    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    fsid: int
    namelen: int
    frsize: int
    flags: int


@dataclass(frozen=True)
class Lock:
    """A POSIX lock as F_GETLK tells it."""

    type: int
    whence: int
    start: int
    length: int
    pid: int
