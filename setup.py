"""What pyproject.toml cannot say: the C parts, and the modules that mypyc compiles.

Compiled are those that every request passes through: the same Python, typed, at two to three times
the speed of the interpreter (a getattr took 1.3 us instead of 2.9, a walk and a clunk 7.5, not 20).
NINEPD_MYPYC=0 leaves them to the interpreter: a build of seconds, for a demo.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

HOT = [
    "ninepd/answers.py",
    "ninepd/framing.py",
    "ninepd/ids.py",
    "ninepd/jobs.py",
    "ninepd/listing.py",
    "ninepd/mounts.py",
    "ninepd/payload.py",
    "ninepd/pipeline.py",
    "ninepd/syscalls.py",
    "ninepd/throttled.py",
    "ninepd/tuples.py",
    "ninepd/turns.py",
    "ninepd/vring.py",
    "ninepd/p9/codecs.py",
    "ninepd/p9/fids.py",
    "ninepd/p9/session.py",
    *sorted(glob("ninepd/export/*.py")),
    *sorted(glob("ninepd/ops/*.py")),
]
DESCRIBING = {"dist_info", "egg_info", "sdist"}
"""Commands that compile nothing: pip asks for them first."""


def missing() -> list[str]:
    """What a build needs besides Python packages, and this machine has not."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    found = {
        f"the C compiler {compiler}": shutil.which(compiler),
        header: os.path.exists(header),
    }
    return [what for what, there in found.items() if not there]


def compiled() -> list[Extension]:
    from mypyc.build import mypycify

    extensions: list[Extension] = mypycify(["--strict", *HOT], group_name="ninepd")
    for extension in extensions:
        # What mypyc writes is not ours: no warning of a future compiler may keep anybody from
        # building.
        flags = extension.extra_compile_args
        extension.extra_compile_args = [flag for flag in flags if flag != "-Werror"]
    return extensions


if "sdist" not in sys.argv and missing():
    sys.exit(
        f"ninepd cannot be built: {' and '.join(missing())} not found; on Debian, as root: "
        "apt-get install gcc libc6-dev python3-dev"
    )
hot = not DESCRIBING & set(sys.argv) and os.environ.get("NINEPD_MYPYC") != "0"
setup(
    cffi_modules=["ninepd/_vring_build.py:ffibuilder"],
    ext_modules=compiled() if hot else [],
)
