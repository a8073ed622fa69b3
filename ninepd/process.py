"""What the process has from the kernel: its name, its standard descriptors, its limits."""

import contextlib
import os
import resource
import select
import stat
import sys
from collections.abc import Collection
from typing import Final, Protocol, cast

import ninepd._libvring as _libvring


class _Lib(Protocol):
    def nd_name_process(self, name: bytes) -> int: ...


_lib: Final = cast("_Lib", _libvring.lib)
_NULL: Final = os.makedev(1, 3)


def open_standard_descriptors() -> None:
    """Whatever of 0 to 2 is closed becomes /dev/null, before something else gets that number.

    Else the number of an epoll descriptor or a front end is where errors are written to.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(fd, True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def close_inherited(keep: Collection[int]) -> None:
    """What whoever started us has left open by mistake must not be in reach of a guest."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the one that has listed them
                os.close(fd)


def hold_standard_descriptors() -> None:
    """Have what leads nowhere in place of standard input and output, and of /dev/null as errors.

    Who may change the modes of files could do so to what they are.
    """
    errors = os.fstat(2)
    at_end, without_writer = os.pipe()
    without_reader, into_nothing = os.pipe()
    os.close(without_writer)
    os.close(without_reader)
    os.dup2(at_end, 0)
    os.dup2(into_nothing, 1)
    if stat.S_ISCHR(errors.st_mode) and errors.st_rdev == _NULL:
        os.dup2(into_nothing, 2)
    os.close(at_end)
    os.close(into_nothing)


def write_error(line: str) -> None:
    """A line to standard error, in one piece; whether somebody reads it or not.

    Where there is no room for it, because somebody has a pipe and does not read, it is lost, or
    what is left of it: a pipe that is ready takes PIPE_BUF bytes without waiting (pipe(7)).
    """
    ready = select.poll()
    ready.register(2, select.POLLOUT)
    data = f"{line}\n".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        for at in range(0, len(data), select.PIPE_BUF):
            if not ready.poll(0):
                return
            os.write(2, data[at : at + select.PIPE_BUF])


def raise_file_limit() -> int:
    """A fid is a descriptor: take all that is allowed, and say how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def name_process(name: str) -> None:
    """What ps(1) and top(1) show, if the kernel lets us; cut to the room that there is."""
    _lib.nd_name_process(os.fsencode(f"ninepd: {name}"))
