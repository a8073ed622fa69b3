"""Daemons that are told to break out as soon as they are shut in: prints what came of each probe.

``python -m tests.support.prisoner WALL serve ...``: without one wall of WALLS, or "-" for with all
of them. What is shut in is the real daemon; only what it does next is not serving.
"""

import ctypes
import errno
import fcntl
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from typing import Any, Final

from ninepd import cli, daemon, sandbox, supervisor, walls
from ninepd.offer import Offer
from ninepd.stats import Stats

_libc: Final = ctypes.CDLL(None, use_errno=True)
_PTRACE_SEIZE: Final = 0x4206  # which does not stop it
_SYS_INIT_MODULE: Final = {"x86_64": 175, "aarch64": 105}[os.uname().machine]
_WHERE: Final = os.getppid()
_PROGRAM: Final = os.stat("/proc/self/exe")


def _nothing(*_arguments: Any, **_keywords: Any) -> None:
    """In the place of a wall."""


WALLS: Final[dict[str, Callable[[], None]]] = {
    "-": _nothing,
    "mounts": lambda: setattr(sandbox, "_move", _nothing),
    "landlock": lambda: setattr(sandbox, "_restrict", _nothing),
    "capabilities": lambda: setattr(sandbox, "give_up", _nothing),
    "calls": lambda: setattr(walls, "filter_calls", _nothing),
}


def _checked(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _read_passwd() -> None:
    with open("/etc/passwd", "rb") as file:
        file.read(1)


def _list_root() -> None:
    names = set(os.listdir("/"))
    if names <= {"proc", "export"}:
        raise OSError(errno.ENOENT, "nothing of the host is there")


def _write_outside() -> None:
    with open("/tmp/ninepd-was-here", "wb"):
        os.unlink("/tmp/ninepd-was-here")


def _climb() -> None:
    """From the root of the export, the way that a working directory leads."""
    fd = os.open("/proc/self/fd", os.O_PATH)
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.open(f"{name}/../../../../../../etc/passwd", os.O_RDONLY, dir_fd=fd)
        except OSError:
            continue
        os.close(found)
        return
    raise OSError(errno.ENOENT, "no descriptor leads out")


def _connect() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect(("127.0.0.1", int(os.environ["PROBE_PORT"])))


def _mount() -> None:
    _checked(_libc.mount(b"none", b"/proc", b"tmpfs", 0, None))
    _checked(_libc.umount2(b"/proc", 0))


def _change_program() -> None:
    os.chmod("/proc/self/exe", _PROGRAM.st_mode)


def _change_input() -> None:
    """/dev/null belongs to everybody."""
    found = os.fstat(0)
    if not stat.S_ISCHR(found.st_mode):
        raise OSError(errno.ENODEV, "it is no device")
    os.fchmod(0, found.st_mode)


def _set_signal() -> None:
    """A socket that has something to read sends a signal to whom it belongs to."""
    ours, its = socket.socketpair()
    with ours, its:
        fcntl.fcntl(ours, fcntl.F_SETOWN, _WHERE)


def _send_datagram() -> None:
    """A socket of the host's network, which has been there before; it may not be made any more."""
    ours, its = socket.socketpair(type=socket.SOCK_DGRAM)
    with ours, its:
        ours.sendto(b"out", "\0" + os.environ["PROBE_NAME"])


def _fork() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


PROBES: Final[dict[str, Callable[[], None]]] = {
    "read": _read_passwd,
    "list": _list_root,
    "write": _write_outside,
    "climb": _climb,
    "connect": _connect,
    "ptrace": lambda: _checked(_libc.ptrace(_PTRACE_SEIZE, _WHERE, None, None)),
    "signal": lambda: os.kill(_WHERE, 0),
    "owner": _set_signal,
    "affinity": lambda: os.sched_setaffinity(_WHERE, os.sched_getaffinity(0)),
    "datagram": _send_datagram,
    "program": _change_program,
    "input": _change_input,
    "truncate": lambda: os.truncate(os.environ["PROBE_FILE"], 0),
    "chmod": lambda: os.chmod(os.environ["PROBE_FILE"], 0o600),
    "fork": _fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "mount": _mount,
    "module": lambda: _checked(_libc.syscall(_SYS_INIT_MODULE, b"", 0, b"")),
}


def _imprison(probe: Callable[[], None], command: list[str]) -> str:
    """What came of a probe: "done", the name of an errno, "killed", or how else it ended."""

    async def instead_of_serving(
        offer: Offer, once: bool, report: Callable[[bool], None], stats: Stats, ends: object
    ) -> None:
        del offer, once, report, stats, ends
        try:
            probe()
        except OSError as error:
            answer = errno.errorcode.get(error.errno or 0, "?")
        else:
            answer = "done"
        os.write(writing, answer.encode())

    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        daemon._serve = instead_of_serving
        vars(supervisor)["close_inherited"] = _nothing  # it would take the pipe away
        cli.cli(command)
        os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGSYS:
        return "killed"
    if status:
        return f"status {status}"
    return answer or "done"  # by what it has executed


if __name__ == "__main__":
    WALLS[sys.argv[1]]()
    for name, probe in PROBES.items():
        os.write(1, f"{name} {_imprison(probe, sys.argv[2:])}\n".encode())
