"""Locks as a guest asks for them, and as processes of the host take them."""

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ninepd.p9.messages import LockStatus, LockType, Rgetlock, Tgetlock, Tlock
from tests.support.client import Client

READ, WRITE, UNLOCK = LockType.RDLCK, LockType.WRLCK, LockType.UNLCK
SUCCESS, BLOCKED = LockStatus.SUCCESS, LockStatus.BLOCKED
BLOCK = 1
FLOCK = struct.Struct("hhqqi4x")


def lock(
    client: Client,
    fid: int,
    kind: int,
    start: int = 0,
    length: int = 0,
    owner: int = 1,
    flags: int = 0,
) -> LockStatus:
    reply = client.rpc(Tlock(fid, kind, flags, start, length, owner, b"guest"))
    return LockStatus(reply.status)


def getlock(
    client: Client, fid: int, kind: int, start: int = 0, length: int = 0, owner: int = 1
) -> Rgetlock:
    reply: Rgetlock = client.rpc(Tgetlock(fid, kind, start, length, owner, b"guest"))
    return reply


def host_may(path: Path, kind: int, start: int = 0, length: int = 0) -> bool:
    """Could an open file description on the host take this lock now?"""
    fd = os.open(path, os.O_RDWR)
    try:
        request = FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


@contextlib.contextmanager
def host_holds(path: Path, kind: int, start: int = 0, length: int = 0) -> Iterator[int]:
    """A process of the host with a POSIX lock; yields its pid."""
    script = (
        "import fcntl, os, struct, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "numbers = map(int, sys.argv[2:])\n"
        "lock = struct.pack('hhqqi4x', next(numbers), 0, next(numbers), next(numbers), 0)\n"
        "fcntl.fcntl(fd, fcntl.F_SETLK, lock)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(path), str(kind), str(start), str(length)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
        process.stdin.close()


@contextlib.contextmanager
def host_leases(path: Path) -> Iterator[int]:
    """A descriptor on the host that has a read lease on a file (fcntl(2))."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    with path.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        yield file.fileno()
    signal.signal(signal.SIGIO, before)
