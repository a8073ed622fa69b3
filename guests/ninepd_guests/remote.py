"""A process in the guest, driven from here: one method call is one system call of the guest.

The methods are called as in ``os`` and raise OSError with the guest's errno.
"""

import contextlib
import os
import signal
import struct
from base64 import b64encode
from concurrent.futures import Future

from .abi import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_REMOVEDIR,
    AT_SYMLINK_NOFOLLOW,
    F_GETLK,
    F_SETLK,
    F_SETLKW,
    NR,
    Argument,
    Entry,
    InOut,
    Lock,
    Out,
    Read,
    Stat,
    StatFs,
)
from .channel import Answer, Channel
from .errors import GuestError

LIMIT = 60.0  # seconds for one call

Path = str | bytes


class Pending:
    """A system call that may still run."""

    def __init__(self, channel: Channel, future: Future[Answer], what: str, path: Path) -> None:
        self._channel = channel
        self._future = future
        self._what = what
        self._path = path

    @property
    def done(self) -> bool:
        return self._future.done()

    def answer(self, timeout: float = LIMIT) -> Answer:
        answer = self._channel.result(self._future, timeout, f"{self._what} in the guest")
        if answer.errno:
            about = (os.fsdecode(self._path),) if self._path else ()
            raise OSError(answer.errno, os.strerror(answer.errno), *about)
        return answer

    def result(self, timeout: float = LIMIT) -> int:
        return self.answer(timeout).result


def _word(argument: Argument) -> str:
    match argument:
        case bytes():
            return "<" + _base64(argument)
        case Out(size):
            return f">{size}"
        case Read(size):
            return f"~{size}"
        case InOut(data):
            return "=" + _base64(data)
        case _:
            return str(argument & 0xFFFFFFFFFFFFFFFF)


class Process:
    def __init__(self, channel: Channel, uid: int | None = None, gid: int | None = None) -> None:
        self._channel = channel
        self._job = channel.start("new")
        if gid is not None:
            self.syscall("setgroups", 0, 0)
            self.syscall("setresgid", gid, gid, gid)
        if uid is not None:
            self.syscall("setresuid", uid, uid, uid)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The first error is the one to see.
        with contextlib.suppress(GuestError) if kind else contextlib.nullcontext():
            self.kill()

    def submit(self, call: str | int, *arguments: Argument, path: Path = "") -> Pending:
        """Starts a call that may block; ``path`` is for the message of an error."""
        number = NR[call] if isinstance(call, str) else call
        future = self._channel.ask(self._job, "sys", str(number), *map(_word, arguments))
        return Pending(self._channel, future, str(call), path)

    def syscall(self, call: str | int, *arguments: Argument, path: Path = "") -> int:
        return self.submit(call, *arguments, path=path).result()

    def fill(self, call: str | int, *arguments: Argument, path: Path = "") -> bytes:
        """For a call with one buffer to fill: that buffer."""
        return self.submit(call, *arguments, path=path).answer().buffers[0]

    def interrupt(self) -> None:
        """Makes a blocked call return EINTR."""
        self.signal(signal.SIGUSR1)

    def signal(self, number: int) -> None:
        self._channel.send("sig", self._job.ident, number)

    def kill(self, timeout: float = LIMIT) -> None:
        """Ends the process; its descriptors are closed when this returns."""
        if not self._job.status.done():
            self.signal(signal.SIGKILL)
        self._channel.result(self._job.status, timeout, "the end of a guest process")

    # memory

    def peek(self, address: int, size: int) -> bytes:
        """Loads from the process's memory; EFAULT stands for a SIGBUS or SIGSEGV."""
        future = self._channel.ask(self._job, "peek", str(address), str(size))
        return Pending(self._channel, future, "a load", "").answer().buffers[0]

    def poke(self, address: int, data: bytes) -> None:
        future = self._channel.ask(self._job, "poke", str(address), _base64(data))
        Pending(self._channel, future, "a store", "").answer()

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> int:
        return self.syscall("mmap", 0, length, prot, flags, fd, offset)

    def munmap(self, address: int, length: int) -> None:
        self.syscall("munmap", address, length)

    def msync(self, address: int, length: int, flags: int = 4) -> None:
        self.syscall("msync", address, length, flags)

    # descriptors

    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
        return self.openat(AT_FDCWD, path, flags, mode)

    def openat(self, dirfd: int, path: Path, flags: int, mode: int = 0o666) -> int:
        return self.syscall("openat", dirfd, _path(path), flags, mode, path=path)

    def close(self, fd: int) -> None:
        self.syscall("close", fd)

    def inherit(self, other: "Process", fd: int) -> int:
        """A descriptor of the same open file as another process's, as fork(2) leaves to a child."""
        pidfd = self.syscall("pidfd_open", other.syscall("getpid"), 0)
        try:
            return self.syscall("pidfd_getfd", pidfd, fd, 0)
        finally:
            self.close(pidfd)

    def read(self, fd: int, size: int) -> bytes:
        return self.fill("read", fd, Read(size), size)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return self.fill("pread64", fd, Read(size), size, offset)

    def write(self, fd: int, data: bytes) -> int:
        return self.syscall("write", fd, data, len(data))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self.syscall("pwrite64", fd, data, len(data), offset)

    def lseek(self, fd: int, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.syscall("lseek", fd, offset, whence)

    def fsync(self, fd: int) -> None:
        self.syscall("fsync", fd)

    def fdatasync(self, fd: int) -> None:
        self.syscall("fdatasync", fd)

    def ftruncate(self, fd: int, size: int) -> None:
        self.syscall("ftruncate", fd, size)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.syscall("fallocate", fd, mode, offset, length)

    def fchmod(self, fd: int, mode: int) -> None:
        self.syscall("fchmod", fd, mode)

    def fchown(self, fd: int, uid: int, gid: int) -> None:
        self.syscall("fchown", fd, uid, gid)

    def fchdir(self, fd: int) -> None:
        self.syscall("fchdir", fd)

    def getdents(self, fd: int, size: int = 65536) -> list[Entry]:
        """The entries that one call gives: none at the end."""
        data = self.fill("getdents64", fd, Read(size), size)
        entries, at = [], 0
        while at < len(data):
            ino, offset, length, kind = struct.unpack_from("=QqHB", data, at)
            name = data[at + 19 : at + length].split(b"\0")[0]
            entries.append(Entry(os.fsdecode(name), ino, kind, offset))
            at += length
        return entries

    # locks

    def setlk(self, fd: int, kind: int, start: int = 0, length: int = 0) -> None:
        self.syscall("fcntl", fd, F_SETLK, _flock(kind, start, length))

    def setlkw(self, fd: int, kind: int, start: int = 0, length: int = 0) -> Pending:
        """Waits for the lock: take the result when it is due."""
        return self.submit("fcntl", fd, F_SETLKW, _flock(kind, start, length))

    def getlk(self, fd: int, kind: int, start: int = 0, length: int = 0) -> Lock:
        """Who stands in the way; its type is F_UNLCK if nobody does."""
        found = self.fill("fcntl", fd, F_GETLK, InOut(_flock(kind, start, length)))
        return Lock(*struct.unpack("hh4xqqi4x", found))

    def flock(self, fd: int, operation: int) -> None:
        self.syscall("flock", fd, operation)

    # names

    def fstat(self, fd: int) -> Stat:
        return self._stat(fd, "", AT_EMPTY_PATH)

    def stat(self, path: Path) -> Stat:
        return self._stat(AT_FDCWD, path, 0)

    def lstat(self, path: Path) -> Stat:
        return self._stat(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW)

    def _stat(self, fd: int, path: Path, flags: int) -> Stat:
        raw = self.fill("newfstatat", fd, _path(path), Out(144), flags, path=path)
        *numbers, at, at_ns, mt, mt_ns, ct, ct_ns = struct.unpack("QQQIII4xQqqqqqqqqq24x", raw)
        times = (seconds * 10**9 + ns for seconds, ns in ((at, at_ns), (mt, mt_ns), (ct, ct_ns)))
        return Stat(*numbers, *times)

    def listdir(self, path: Path) -> list[str]:
        """All names but . and .., in the order in which they come."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        names = []
        while entries := self.getdents(fd):
            names += [entry.name for entry in entries if entry.name not in (".", "..")]
        self.close(fd)
        return names

    def access(self, path: Path, mode: int) -> None:
        self.syscall("faccessat", AT_FDCWD, _path(path), mode, path=path)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self.syscall("mkdirat", AT_FDCWD, _path(path), mode, path=path)

    def rmdir(self, path: Path) -> None:
        self.syscall("unlinkat", AT_FDCWD, _path(path), AT_REMOVEDIR, path=path)

    def unlink(self, path: Path) -> None:
        self.syscall("unlinkat", AT_FDCWD, _path(path), 0, path=path)

    def rename(self, old: Path, new: Path, flags: int = 0) -> None:
        self.syscall("renameat2", AT_FDCWD, _path(old), AT_FDCWD, _path(new), flags, path=old)

    def link(self, old: Path, new: Path) -> None:
        self.syscall("linkat", AT_FDCWD, _path(old), AT_FDCWD, _path(new), 0, path=new)

    def symlink(self, target: Path, path: Path) -> None:
        self.syscall("symlinkat", _path(target), AT_FDCWD, _path(path), path=path)

    def readlink(self, path: Path) -> str:
        found = self.fill("readlinkat", AT_FDCWD, _path(path), Read(4096), 4096, path=path)
        return os.fsdecode(found)

    def mknod(self, path: Path, mode: int, device: int = 0) -> None:
        self.syscall("mknodat", AT_FDCWD, _path(path), mode, device, path=path)

    def chmod(self, path: Path, mode: int) -> None:
        self.syscall("fchmodat", AT_FDCWD, _path(path), mode, path=path)

    def chown(self, path: Path, uid: int, gid: int, *, follow: bool = True) -> None:
        flags = 0 if follow else AT_SYMLINK_NOFOLLOW
        self.syscall("fchownat", AT_FDCWD, _path(path), uid, gid, flags, path=path)

    def truncate(self, path: Path, size: int) -> None:
        self.syscall("truncate", _path(path), size, path=path)

    def utimens(self, path: Path, atime_ns: int, mtime_ns: int, *, follow: bool = True) -> None:
        times = struct.pack("qqqq", *divmod(atime_ns, 10**9), *divmod(mtime_ns, 10**9))
        flags = 0 if follow else AT_SYMLINK_NOFOLLOW
        self.syscall("utimensat", AT_FDCWD, _path(path), times, flags, path=path)

    def statfs(self, path: Path) -> StatFs:
        raw = self.fill("statfs", _path(path), Out(120), path=path)
        return StatFs(*struct.unpack("qqQQQQQQqqq32x", raw))

    def chdir(self, path: Path) -> None:
        self.syscall("chdir", _path(path), path=path)

    def umask(self, mask: int) -> int:
        return self.syscall("umask", mask)

    # extended attributes, of the file itself if it is a symbolic link

    def getxattr(self, path: Path, name: str, size: int = 65536) -> bytes:
        return self.fill("lgetxattr", _path(path), _path(name), Read(size), size, path=path)

    def setxattr(self, path: Path, name: str, value: bytes, flags: int = 0) -> None:
        self.syscall("lsetxattr", _path(path), _path(name), value, len(value), flags, path=path)

    def listxattr(self, path: Path, size: int = 65536) -> list[str]:
        raw = self.fill("llistxattr", _path(path), Read(size), size, path=path)
        return [os.fsdecode(name) for name in raw.split(b"\0")[:-1]]

    def removexattr(self, path: Path, name: str) -> None:
        self.syscall("lremovexattr", _path(path), _path(name), path=path)


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _path(path: Path) -> bytes:
    return os.fsencode(path) + b"\0"


def _flock(kind: int, start: int, length: int) -> bytes:
    return struct.pack("hh4xqqi4x", kind, os.SEEK_SET, start, length, 0)
