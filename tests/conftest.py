"""Fixtures of all tests: a live daemon on a fresh directory, and a client on it."""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["NINEPD_CHECKS"] = "1"  # read when ninepd is imported, and inherited by daemons

from tests.support.client import Client, Daemon

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_RECURSIVE, _PRIVATE, _SHARED = 1 << 14, 1 << 18, 1 << 20  # MS_REC and so on


def _have_own_mounts() -> None:
    """What tests mount nobody else sees; and as on a machine of systemd's, mounts are shared.

    So they appear in the mount namespaces of daemons that run already (mount_namespaces(7)).
    """
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_MOUNTS):
        return
    if libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None):
        _share_mounts_from_a_chroot(libc)
    else:
        assert libc.mount(None, b"/", None, _RECURSIVE | _SHARED, None) == 0


def _share_mounts_from_a_chroot(libc: ctypes.CDLL) -> None:
    """Where "/" is no mount itself: by way of the namespace's own root (setns(2))."""
    root, here = (os.open(path, os.O_PATH | os.O_CLOEXEC) for path in "/.")
    with open("/proc/self/ns/mnt") as own:
        assert libc.setns(own.fileno(), _NEW_MOUNTS) == 0
    for how in (_PRIVATE, _SHARED):
        assert libc.mount(None, b"/", None, _RECURSIVE | how, None) == 0
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(here)
    for fd in (root, here):
        os.close(fd)


_have_own_mounts()

StartDaemon = Callable[..., Daemon]
THREATS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("threats.toml").read_text()
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """``-k t_slash`` and ``-k CVE-2016-7116`` find the tests that are about these."""
    for mark in item.iter_markers("threat"):
        item.extra_keyword_matches.update(mark.args)
        for vulnerability, threats in THREATS["known"].items():
            if not set(threats).isdisjoint(mark.args):
                item.extra_keyword_matches.add(vulnerability)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The directory that is served."""
    path = tmp_path / "export"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def start_daemon(tmp_path: Path, export: Path) -> Iterator[StartDaemon]:
    """Start daemons with chosen options; all of them end with the test, without a stain."""
    started: list[Daemon] = []

    def start(*arguments: str, **keywords: Any) -> Daemon:
        socket = keywords.setdefault("socket", str(tmp_path / f"daemon{len(started)}.sock"))
        keywords.setdefault("export", str(export))
        daemon = Daemon(*arguments, **keywords)
        started.append(daemon)
        assert daemon.socket == socket
        return daemon

    yield start
    for daemon in started:
        daemon.stop()
        assert not re.search(r"\bbug\b", daemon.log), daemon.log
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """Attached as root: fid 0 is the root of the export."""
    with Client(daemon.socket) as client:
        client.attach()
        yield client


Mount = Callable[..., Path]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount something for the length of a test: ``mount(target, "-t", "tmpfs", "none")``."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    mounted: list[Path] = []

    def do(target: Path, *arguments: str | Path) -> Path:
        target.mkdir(exist_ok=True)
        subprocess.run(["mount", *arguments, target], check=True, capture_output=True)
        mounted.append(target)
        return target

    yield do
    for target in reversed(mounted):
        # Lazily: a daemon may still hold files there.
        subprocess.run(["umount", "--lazy", target], check=True)


@pytest.fixture
def mount_ext4(tmp_path: Path, mount: Mount) -> Mount:
    """Mount a fresh small ext4 file system: ``mount_ext4(target)``."""

    def do(target: Path, *options: str) -> Path:
        image = tmp_path / f"{target.name}.img"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, image], check=True)
        return mount(target, "-o", "loop", image)

    return do


@pytest.fixture
def as_root() -> None:
    """For tests of what only a privileged daemon can do."""
    if os.geteuid():
        pytest.skip("needs root")


OTHER_USER = 4321


@pytest.fixture
def other_user(as_root: None, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """A launcher that runs a command as user and group 4321, who may enter the test's folder."""
    launcher = ("setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups")
    probe = [*launcher, sys.executable, "-c", "import ninepd.cli"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("other users may not enter the folder of this checkout")
    tmp_path.chmod(0o777)
    parents = [path for path in tmp_path.parents if path.name.startswith("pytest-")]
    before = [parent.stat().st_mode for parent in parents]
    for parent in parents:
        parent.chmod(0o755)
    yield launcher
    for parent, mode in zip(parents, before, strict=True):
        parent.chmod(mode)  # else a daemon of root's would refuse what it exports in later tests


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory on tmpfs, in a folder that nobody else can enter."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "memory"
        path.mkdir(mode=0o755)
        yield path
