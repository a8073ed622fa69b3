"""An export to be fuzzed, and beside it what no guest may see or change."""

import os
import shutil
import stat
from pathlib import Path
from typing import Final

SECRET: Final = b"this is what no guest may ever see"
_LINKS: Final = {"up": "../canary", "out": "..", "loop": "loop", "link": "f"}


class Scene:
    """Below a folder that is its own: ``export``, and beside it a canary."""

    def __init__(self, folder: Path) -> None:
        self.export = folder / "export"
        self._canary = folder / "canary"
        self._folder = folder
        folder.chmod(0o700)
        self.export.mkdir()
        self._canary.write_bytes(SECRET)
        self._canary.chmod(0o600)
        self._before = self._look()
        self.reset()

    def _look(self) -> tuple[object, ...]:
        status = self._canary.lstat()
        identity = (status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_nlink)
        beside = sorted(path.name for path in self._folder.iterdir())
        xattrs = os.listxattr(self._canary)
        content = self._canary.read_bytes()
        return identity, status.st_mtime_ns, status.st_ctime_ns, beside, xattrs, content

    def check(self) -> None:
        """Nothing outside the export has changed."""
        assert self._look() == self._before, "what is outside the export has changed"

    def reset(self) -> None:
        """The export is as it was in the beginning."""
        for entry in list(os.scandir(self.export)):
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)
        self.export.chmod(0o755)
        for name in os.listxattr(self.export):
            os.removexattr(self.export, name)
        (self.export / "f").write_bytes(b"content of f\n" * 100)
        (self.export / "empty").touch()
        (self.export / "d").mkdir()
        (self.export / "d/below").write_bytes(b"below")
        for name, target in _LINKS.items():
            os.symlink(target, self.export / name)
        os.symlink(self._canary, self.export / "canary")
        os.mkfifo(self.export / "fifo")


def _remove(path: str) -> None:
    """A tree, whatever modes a guest has given to its directories."""
    if os.geteuid():
        for folder, names, _ in os.walk(path):
            for name in names:
                below = os.path.join(folder, name)
                if not stat.S_ISLNK(os.lstat(below).st_mode):
                    os.chmod(below, 0o700)
    shutil.rmtree(path)
