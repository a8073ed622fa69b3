"""What a guest of a daemon that is root could leave for other users of the host."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.export.models import choose_model
from ninepd.exposure import refuse_unsafe
from ninepd.p9.messages import SetattrValid, Tsetattr
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client

SAFE = "nosuid,nodev"


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that everybody can enter, as can be all above it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture
def public(as_root: None, reachable: Path, mount: Mount) -> Path:
    """A mount without restrictions where everybody can get."""
    return mount(reachable / "m", "-t", "tmpfs", "-o", "mode=755", "none")


def refuse(path: Path | str, **options: Any) -> None:
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        export = Export(str(path), "t", "/s", **options)
        refuse_unsafe(export, choose_model(export, directory), directory)
    finally:
        os.close(directory)


def is_refused(path: Path | str, **options: Any) -> bool:
    try:
        refuse(path, **options)
    except UsageError:
        return True
    return False


@pytest.mark.threat("t_unsafe_export")
@pytest.mark.parametrize("model", ["passthrough", "none"])
def test_daemon_that_is_refused(tmp_path: Path, public: Path, model: str) -> None:
    """One line that says what to do, and no socket."""
    command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", str(tmp_path / "s")]
    result = subprocess.run(
        [*command, "--export", str(public), "--tag", "t", "--security-model", model],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ninepd: --export: other users can reach {public}, ")
    assert "0700" in line
    assert f"mount {public} with nosuid,nodev" in line
    assert "--allow-unsafe-export" in line
    assert os.listdir(tmp_path) == []


def test_option_that_allows_it(start_daemon: StartDaemon, public: Path) -> None:
    daemon = start_daemon("--allow-unsafe-export", export=str(public))
    with Client(daemon.socket) as client:
        client.attach()
    assert daemon.stop() == 0
    assert daemon.log == ""


def test_key_that_allows_it(start_daemon: StartDaemon, tmp_path: Path, public: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'[[export]]\nexport = "{public}"\ntag = "a"\nsocket-path = "{tmp_path}/a"\n'
        "allow-unsafe-export = true\n"
    )
    start_daemon(config=str(config))


@pytest.mark.parametrize("options", ["nosuid", "nodev", "dev,suid", SAFE])
def test_options_of_the_mount(public: Path, mount: Mount, options: str) -> None:
    path = mount(public / "m", "-t", "tmpfs", "-o", options, "none")
    assert is_refused(path) == (options != SAFE)
    (path / "below").mkdir()
    assert is_refused(path / "below") == (options != SAFE)


def test_mount_on_itself(public: Path, mount: Mount) -> None:
    """As the README has it."""
    path = public / "export"
    path.mkdir()
    assert is_refused(path)
    mount(path, "--bind", "-o", SAFE, path)
    assert not is_refused(path)


@pytest.mark.parametrize("name", ["plain", "with a blank", "börk\\040"])
def test_mounts_below(public: Path, mount: Mount, name: str) -> None:
    path = mount(public / "m", "-t", "tmpfs", "-o", SAFE, "none")
    mount(path / "safe", "-t", "tmpfs", "-o", SAFE, "none")
    mount(public / "m2", "-t", "tmpfs", "none")  # its name begins the same
    assert not is_refused(path)
    mount(path / name, "-t", "tmpfs", "none")
    with pytest.raises(UsageError) as caught:
        refuse(path)
    assert f"mount {path / name} with" in str(caught.value)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o766, 0o1776])
def test_folder_that_keeps_others_out(public: Path, mode: int) -> None:
    path = public / "a/b/export"
    path.mkdir(parents=True)
    assert is_refused(path)
    for folder in (public, public / "a", public / "a/b"):
        folder.chmod(mode)
        assert not is_refused(path)
        folder.chmod(0o711)
        assert is_refused(path)


def test_folder_above_a_mount(reachable: Path, public: Path) -> None:
    reachable.chmod(0o700)
    assert not is_refused(public)


def test_own_mode_keeps_nobody_out(public: Path) -> None:
    """The guest may change it."""
    public.chmod(0o700)
    assert is_refused(public)


def test_links_are_followed_first(public: Path) -> None:
    """What counts is where the directory is."""
    (public / "private").mkdir(mode=0o700)
    (public / "private/export").mkdir()
    (public / "link").symlink_to("private/export")
    assert not is_refused(public / "link")
    (public / "private/back").symlink_to(public)
    assert is_refused(public / "private/back")


def test_directory_mounted_below_itself(public: Path, mount: Mount) -> None:
    """The same inode above and below is not yet the root of all."""
    (public / "private").mkdir(mode=0o700)
    (public / "private/d").mkdir()
    (public / "private/d/e").mkdir()
    mount(public / "private/d/e", "--bind", public / "private/d")
    assert not is_refused(public / "private/d/e")


def test_root_of_all(as_root: None) -> None:
    if os.statvfs("/").f_flag & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV:
        pytest.skip("the root is mounted with nosuid,nodev")
    assert is_refused("/")


def test_readonly(public: Path) -> None:
    """Nothing can be left there."""
    assert not is_refused(public, readonly=True)


_CHECK = """
import ctypes, os, sys
from ninepd.config import Export
from ninepd.errors import UsageError
from ninepd.exposure import refuse_unsafe
path, where = sys.argv[1:]
uid = os.geteuid()
if where == "namespace":
    CLONE_NEWUSER = 0x10000000
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER):
        sys.exit("no user namespace")
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"0 {uid} 1")
    assert os.geteuid() == 0
try:
    refuse_unsafe(Export(path, "t", "/s"), "passthrough", os.open(path, os.O_PATH))
except UsageError:
    print("refused")
else:
    print("served")
"""


def is_refused_to(launcher: tuple[str, ...], path: Path, where: str) -> bool:
    command = [*launcher, sys.executable, "-c", _CHECK, str(path), where]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no user namespace" in result.stderr:
        pytest.skip("this user may not make user namespaces here")
    return {"refused\n": True, "served\n": False}[result.stdout]


@pytest.mark.parametrize("where", ["host", "namespace"])
def test_who_is_root(public: Path, where: str) -> None:
    """Root's root in a user namespace is root, too."""
    assert is_refused_to((), public, where)


def test_root_without_capabilities(public: Path) -> None:
    """What he makes is his all the same."""
    assert is_refused_to(("setpriv", "--bounding-set=-all", "--inh-caps=-all"), public, "host")


@pytest.mark.parametrize("where", ["host", "namespace"])
def test_who_is_not_root(public: Path, other_user: tuple[str, ...], where: str) -> None:
    """Nor is the root of a user namespace that another user made."""
    assert not is_refused_to(other_user, public, where)


@pytest.mark.parametrize("options", ["suid", SAFE])
def test_what_it_is_about(
    public: Path,
    mount: Mount,
    start_daemon: StartDaemon,
    other_user: tuple[str, ...],
    options: str,
) -> None:
    """Another user runs a program that the guest has made setuid."""
    path = mount(public / "m", "-t", "tmpfs", "-o", f"mode=755,{options}", "none")
    shutil.copy("/usr/bin/id", path / "id")
    allow = () if options == SAFE else ("--allow-unsafe-export",)
    with Client(start_daemon(*allow, export=str(path)).socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"id")
        client.rpc(Tsetattr(1, int(SetattrValid.MODE), 0o4755, 0, 0, 0, 0, 0, 0, 0))
    shown = subprocess.check_output([*other_user, path / "id", "-u"], text=True)
    assert shown == {"suid": "0\n", SAFE: "4321\n"}[options]
