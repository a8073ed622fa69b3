"""Idmapped mounts by bare system calls (mount_setattr(2)), which Python has not."""

import ctypes
import os
import subprocess
from pathlib import Path

from ninepd.idranges import IdRange

OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
"""Numbers that all architectures share (linux/unistd.h)."""
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOUNT_ATTR_IDMAP = 1, 4, 0x100000

_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _user_namespace(users: tuple[IdRange, ...], groups: tuple[IdRange, ...]) -> int:
    """A descriptor of one with these maps: inside are the file system's ids, outside the shown."""
    program = ["unshare", "--user", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is in there
        proc = Path(f"/proc/{process.pid}")
        for name, ranges in (("uid_map", users), ("gid_map", groups)):
            lines = [f"{r.host} {r.guest} {r.length}\n" for r in ranges]
            (proc / name).write_text("".join(lines))
        return os.open(proc / "ns/user", os.O_RDONLY | os.O_CLOEXEC)


def mount_idmapped(
    source: Path, target: Path, users: tuple[IdRange, ...], groups: tuple[IdRange, ...]
) -> None:
    """Show a directory in another place, with ids as a guest shall see them."""
    tree = _call(OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        namespace = _user_namespace(users, groups)
        try:
            attributes = _Attributes(MOUNT_ATTR_IDMAP, 0, 0, namespace)
            size = ctypes.sizeof(attributes)
            _call(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, ctypes.byref(attributes), size)
        finally:
            os.close(namespace)
        _call(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)
