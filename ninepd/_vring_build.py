"""Builds ninepd._libvring from the C files beside it; setup.py names ``ffibuilder``.

Each C file declares what Python may call between ``/* cdef-begin */`` and ``/* cdef-end */``. The
compiler and cffi read the same lines, so the two cannot disagree. Environment: NINEPD_WERROR makes
warnings errors (a git checkout does so by itself), NINEPD_CFLAGS adds flags, such as a sanitizer's.
"""

import os
import shlex
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "_setids.c",
    "_memory.c",
    "_signals.c",
    "_dirty.c",
    "_chains.c",
    "_watch.c",
    "_stats.c",
    "_vring.c",
    "_requests.c",
    "_waiting.c",
    "_syscalls.c",
    "_owners.c",
    "_ids.c",
    "_listing.c",
    "_process.c",
    "_privileges.c",
    "_walls.c",
    "_seccomp.c",
)
"""In this order: each uses what stands before it."""


def interface(source: str) -> str:
    text = (HERE / source).read_text()
    return text.partition("/* cdef-begin */")[2].partition("/* cdef-end */")[0]


def compile_flags() -> list[str]:
    # The wrappers that cffi writes take a self they do not use.
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if os.environ.get("NINEPD_WERROR") or (HERE.parent / ".git").exists():
        flags.append("-Werror")
    return flags


extra = shlex.split(os.environ.get("NINEPD_CFLAGS", ""))
ffibuilder = FFI()
for name in SOURCES:
    ffibuilder.cdef(interface(name))
ffibuilder.set_source(
    "ninepd._libvring",
    "".join(f'#include "{name}"\n' for name in SOURCES),
    include_dirs=[str(HERE)],
    depends=[str(HERE / name) for name in SOURCES],
    extra_compile_args=compile_flags() + extra,
    extra_link_args=extra,
    py_limited_api=False,  # direct calls into CPython are measurably cheaper than the stable ABI
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent), verbose=True)
