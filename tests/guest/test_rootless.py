"""An ordinary user's project in a guest: its owner there is root, or a user of choice."""

import os
import stat
from pathlib import Path

import pytest

from ninepd_guests.boot import Share
from ninepd_guests.remote import Process
from tests.conftest import OTHER_USER, StartDaemon
from tests.support.guest import boot

ME = OTHER_USER
OWNERS = (0, 1000)
"""Whose the project is in the guest, at /mnt0 and at /mnt1000."""
STRANGER = 1001


@pytest.fixture
def projects(tmp_path: Path, other_user: tuple[str, ...]) -> list[Path]:
    """The user's own directories, each with a private file and a folder in it."""
    paths = [tmp_path / f"project{guest}" for guest in OWNERS]
    for path in paths:
        path.mkdir(mode=0o755)
        (path / "private").write_text("mine")
        (path / "private").chmod(0o600)
        (path / "src").mkdir(mode=0o755)
        for made in (path, *path.iterdir()):
            os.chown(made, ME, ME)
    return paths


def work(process: Process) -> None:
    """What a build does."""
    fd = process.open("private", os.O_RDWR)
    process.write(fd, b"more")
    process.close(fd)
    process.mkdir("src/out")
    fd = process.open("src/out/new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    process.write(fd, b"built")
    process.close(fd)
    process.chmod("src/out/new", 0o750)
    process.rename("src/out/new", "src/out/run")
    process.symlink("run", "src/out/link")
    process.mkdir("src/gone")
    process.rmdir("src/gone")


def test_the_two_wishes(
    start_daemon: StartDaemon, projects: list[Path], other_user: tuple[str, ...]
) -> None:
    shares = []
    for guest_id, path in zip(OWNERS, projects, strict=True):
        maps = ("--map-uid", f"{guest_id}:{ME}:1", "--map-gid", f"{guest_id}:{ME}:1")
        tag = f"tag{guest_id}"
        daemon = start_daemon(*maps, export=str(path), tag=tag, launcher=other_user)
        shares.append(Share(tag, daemon.socket))
    with boot("uml", shares) as guest:
        for owner, path in zip(OWNERS, projects, strict=True):
            top = f"/mnt{owner}"
            guest.mount(f"tag{owner}", top)
            with guest.process(owner, owner) as process:
                process.chdir(top)
                for name in (".", "private", "src"):
                    found = process.lstat(name)
                    assert (found.uid, found.gid) == (owner, owner)
                work(process)
                for name in ("src/out", "src/out/link", "src/out/run"):
                    found = process.lstat(name)
                    assert (found.uid, found.gid) == (owner, owner)
            assert {info.st_uid for info in map(Path.lstat, path.rglob("*"))} == {ME}
            assert {info.st_gid for info in map(Path.lstat, path.rglob("*"))} == {ME}
            assert (path / "src/out/run").read_text() == "built"
            assert (path / "private").read_text() == "more"
            with guest.process(STRANGER, STRANGER) as process:
                process.chdir(top)
                for refused in (lambda: process.open("private"), lambda: process.mkdir("theirs")):
                    with pytest.raises(PermissionError):
                        refused()
                assert process.lstat("src/out/run").mode == stat.S_IFREG | 0o750
