"""What the README says of installing: by pip alone, in an environment that has nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.client import ROOT, Client, Daemon

SOURCE: Final = Path(__file__).parent.parent
IGNORED: Final = (".git", ".venv", ".*_cache", "build", "__pycache__", "*.egg-info", "*.so")


def test_pip_install(tmp_path: Path, export: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "environment"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns(*IGNORED))
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = f"{place}/bin/pip --disable-pip-version-check install --quiet".split()
    subprocess.run([*pip, str(source)], check=True, timeout=600)
    version = subprocess.check_output([place / "bin/ninepd", "--version"], text=True)
    assert version.startswith("ninepd, version ")
    demo = subprocess.run(
        [place / "bin/ninepd", "demo"], check=False, capture_output=True, text=True
    )
    assert demo.returncode == 2
    assert "pip install ./guests" in demo.stderr
    assert demo.stderr.count("\n") == 1
    # Elsewhere, for the interpreter looks into its working directory first.
    daemon = Daemon(
        socket=str(tmp_path / "socket"),
        export=str(export),
        launcher=("env", "--chdir", str(tmp_path)),
        python=str(place / "bin/python"),
    )
    try:
        with Client(daemon.socket) as client:
            client.attach()
            (export / "f").write_text("installed")
            client.open(ROOT, 1, b"f")
            assert client.read(1, 0, 100) == b"installed"
    finally:
        assert daemon.stop() == 0
