"""Says how far a download is while it goes on."""

import contextlib
import os
import threading
from collections.abc import Iterator

from .cache import say

INTERVAL = 3.0  # seconds between two lines


@contextlib.contextmanager
def fetching(folder: str, total: int) -> Iterator[None]:
    """Meanwhile something else puts ``total`` bytes into the folder."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL):
            say(f"  {_size(folder) / 1e6:.1f} of {total / 1e6:.1f} MB")

    say(f"  {total / 1e6:.1f} MB to fetch")
    watcher = threading.Thread(target=watch, name="ninepd-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _size(folder: str) -> int:
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed when it was whole
                size += os.stat(os.path.join(path, name)).st_size
    return size
