"""Programs from the harnesses in C, and a tree in which no module of ninepd is compiled."""

import shutil
import subprocess
from enum import Enum
from pathlib import Path
from typing import Final

from ninepd._vring_build import SOURCES

from .harnesses import HERE, ROOT

_WARNINGS: Final = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-function", "-Werror")
_SANITIZE: Final = ("-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class Purpose(Enum):
    """How to compile a harness."""

    FUZZ = ("clang", "-O2", "-DFUZZ_MUTATOR", "-fsanitize=fuzzer,address,undefined", *_SANITIZE)
    REPLAY = ("gcc", "-O0", "-fsanitize=address,undefined", *_SANITIZE)
    COVERAGE = ("gcc", "-O0", "--coverage")


def program(name: str, purpose: Purpose, folder: Path) -> Path:
    """Compile a harness in C; all that comes with it is left in the folder, too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sources.h").write_text("".join(f'#include "{name}"\n' for name in SOURCES))
    output = folder / name
    sources = [HERE / f"{name}.c"]
    if purpose is not Purpose.FUZZ:  # libFuzzer brings a main() of its own
        sources.append(HERE / "replay.c")
    include = [f"-I{path}" for path in (ROOT / "ninepd", folder, HERE)]
    compiler, *flags = purpose.value
    command = [compiler, "-std=c11", "-g", *_WARNINGS, *flags, *include, *sources, "-o", output]
    subprocess.run(command, cwd=folder, check=True)
    return output


def interpreted_tree(folder: Path) -> Path:
    """A copy of the sources to run from: what mypyc compiles cannot be counted."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in ("ninepd", "fuzz", "tests/support"):
        shutil.copytree(
            ROOT / package,
            folder / package,
            ignore=lambda _, names: [
                n for n in names if not n.endswith((".py", ".c", ".h")) and "." in n
            ],
        )
    for library in (ROOT / "ninepd").glob("_libvring.*.so"):
        shutil.copy(library, folder / "ninepd")
    return folder
