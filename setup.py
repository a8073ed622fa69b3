"""What pyproject.toml cannot say: the C parts, and the modules that mypyc compiles.

Compiled are those that every request passes through: the same Python, typed, at two to three times
the speed of the interpreter (a getattr took 1.3 us instead of 2.9, a walk and a clunk 7.5, not 20).
"""

from glob import glob

from mypyc.build import mypycify
from setuptools import setup

HOT = [
    "ninepd/jobs.py",
    "ninepd/payload.py",
    "ninepd/pipeline.py",
    "ninepd/syscalls.py",
    "ninepd/tuples.py",
    "ninepd/vring.py",
    "ninepd/p9/codecs.py",
    "ninepd/p9/fids.py",
    "ninepd/p9/session.py",
    *sorted(glob("ninepd/export/*.py")),
    *sorted(glob("ninepd/ops/*.py")),
]

compiled = mypycify(["--strict", *HOT], group_name="ninepd")
for extension in compiled:
    # What mypyc writes is not ours: no warning of a future compiler may keep anybody from building.
    flags = extension.extra_compile_args
    extension.extra_compile_args = [flag for flag in flags if flag != "-Werror"]

setup(cffi_modules=["ninepd/_vring_build.py:ffibuilder"], ext_modules=compiled)
