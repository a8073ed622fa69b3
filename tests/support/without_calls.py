"""A kernel without some system calls: ``python without_calls.py NAME[,NAME...] COMMAND...``.

They answer ENOSYS, by a filter as a container engine or a service manager may have it (seccomp(2)).
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final

_X86: Final = platform.machine() == "x86_64"
NUMBERS: Final = {
    "landlock_create_ruleset": 444,
    "memfd_create": 319 if _X86 else 279,
    "mount_setattr": 442,
    "openat2": 437,
    "statx": 332 if _X86 else 291,
    "unshare": 272 if _X86 else 97,
}
"""As in the kernel's tables for x86-64 and 64-bit Arm."""
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SECCOMP_RET_*
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2  # PR_SET_*, SECCOMP_MODE_FILTER


def install(names: list[str]) -> None:
    lines = [(_LOAD, 0, 0, 0)]  # the number, at offset 0 of struct seccomp_data
    for name in names:
        lines += [(_EQUAL, 0, 1, NUMBERS[name]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    lines.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("@HP", len(lines), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for words in ((_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, program, 0, 0)):
        if libc.prctl(*words):
            raise OSError(ctypes.get_errno(), "no filter of system calls")


if __name__ == "__main__":
    install(sys.argv[1].split(","))
    os.execvp(sys.argv[2], sys.argv[2:])
