"""The cache folder: things that are slow to get are made once, whole, by one process at a time."""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator


def cache_dir() -> str:
    """$NINEPD_CACHE, else ninepd in the user's XDG cache folder; made if missing."""
    path = os.environ.get("NINEPD_CACHE")
    if not path:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = os.path.join(home, "ninepd")
    path = os.path.abspath(path)
    os.makedirs(path, exist_ok=True)
    return path


def say(text: str) -> None:
    sys.stderr.write(f"ninepd: {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Excludes other threads and processes that use the same name."""
    path = os.path.join(cache_dir(), f".lock-{name}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[str]:
    """A temporary folder inside the cache, so that what is made in it can be renamed into place.

    The caller holds the lock of this name, so an older folder is what a killed process left.
    """
    prefix = f".making-{name}-"
    for left in os.listdir(cache_dir()):
        if left.startswith(prefix):
            shutil.rmtree(os.path.join(cache_dir(), left))
    path = tempfile.mkdtemp(prefix=prefix, dir=cache_dir())
    os.chmod(path, 0o755)  # noqa: S103  # what is made here is used by other users too
    try:
        yield path
    finally:
        shutil.rmtree(path)


def artefact(name: str, what: str, make: Callable[[str, str], None]) -> str:
    """The file or folder ``name`` in the cache; ``make(result, scratch folder)`` if missing."""
    path = os.path.join(cache_dir(), name)
    if os.path.exists(path):
        return path
    with locked(name):
        if os.path.exists(path):
            return path
        start = time.monotonic()
        say(f"{what} ...")
        with scratch(name) as folder:
            result = os.path.join(folder, "result")
            make(result, folder)
            os.rename(result, path)
        say(f"{what}: done in {time.monotonic() - start:.1f} s")
    return path
