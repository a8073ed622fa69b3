"""What the README says of installing, in an environment that has nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from tests.support.client import ROOT, Client, Daemon

SOURCE: Final = Path(__file__).parent.parent
IGNORED: Final = (".git", ".venv", ".*_cache", "build", "dist", "__pycache__", "*.egg-info", "*.so")
TOOLS: Final = Path(sys.executable).parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout in which nothing is built."""
    path = tmp_path / "source"
    shutil.copytree(SOURCE, path, ignore=shutil.ignore_patterns(*IGNORED))
    return path


def test_wheel(source: Path, tmp_path: Path, export: Path) -> None:
    """Built for this Python, tagged with the glibc that it needs, installed without a compiler."""
    subprocess.run(
        ["contrib/wheels.sh", TOOLS, sys.executable], cwd=source, check=True, timeout=900
    )
    (wheel,) = (source / "dist").glob("ninepd-*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-manylinux" in wheel.name
    shown = subprocess.check_output([TOOLS / "auditwheel", "show", wheel], text=True)
    tag = wheel.stem.rpartition("-")[2]
    assert any(part in shown for part in tag.split(".")), shown

    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    bare = {**os.environ, "PATH": str(tmp_path / "no programs"), "CC": "no-compiler"}
    pip = [str(place / "bin/pip"), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--only-binary=:all:", str(wheel)], check=True, timeout=600, env=bare)
    for page in ("man1/ninepd.1", "man1/vhost-user-9p.1", "man5/ninepd.toml.5"):
        assert (place / "share/man" / page).exists()
    version = subprocess.check_output([place / "bin/ninepd", "--version"], text=True)
    assert version.startswith("ninepd, version ")
    demo = subprocess.run(
        [place / "bin/ninepd", "demo"], check=False, capture_output=True, text=True
    )
    assert demo.returncode == 2
    assert "pip install ./guests" in demo.stderr
    assert demo.stderr.count("\n") == 1
    serves(place / "bin/python", tmp_path, export)


def serves(python: Path, folder: Path, export: Path) -> None:
    # Elsewhere, for the interpreter looks into its working directory first.
    daemon = Daemon(
        socket=str(folder / "socket"),
        export=str(export),
        launcher=("env", "--chdir", str(folder)),
        python=str(python),
    )
    try:
        with Client(daemon.socket) as client:
            client.attach()
            (export / "f").write_text("installed")
            client.open(ROOT, 1, b"f")
            assert client.read(1, 0, 100) == b"installed"
    finally:
        assert daemon.stop() == 0


SETUP: Final = f"exec {sys.executable} setup.py build_ext --inplace"


@pytest.mark.parametrize(
    ("missing", "script"),
    [
        ("no-compiler", f"CC=no-compiler {SETUP}"),
        ("Python.h", f"mount -t tmpfs none {sysconfig.get_path('include')}; {SETUP}"),
    ],
    ids=["compiler", "headers"],
)
def test_what_a_build_lacks_is_one_sentence(source: Path, missing: str, script: str) -> None:
    """And it is said before anything is compiled."""
    launcher = []
    if missing == "Python.h":
        launcher = ["unshare", "--mount"]
        if subprocess.run([*launcher, "true"], check=False, capture_output=True).returncode:
            pytest.skip("hiding the headers needs root, and no chroot")
    result = subprocess.run(
        [*launcher, "sh", "-c", script],
        cwd=source,
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert missing in result.stderr
    assert "apt-get install gcc libc6-dev python3-dev" in result.stderr
    assert not (source / "build").exists()
