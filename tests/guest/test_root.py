"""A guest whose root is a share, as contrib/launchers/root-on-9p.sh starts it."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd_guests.kernels import SERIES, kernel
from ninepd_guests.tools import busybox, qemu, qemu_command
from tests.support.small_image import small_image

LAUNCHER = str(Path(__file__).parents[2] / "contrib/launchers/root-on-9p.sh")
INIT = """#!/bin/sh
mount -t proc proc /proc
grep ' / 9p ' /proc/mounts > /mounted
echo 'the root is a share' > /dev/console
sync
poweroff -f
"""
FIRST_INIT = """#!/bin/sh
mount -t proc proc /proc
for module in /modules/*; do insmod $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose root /mnt
exec switch_root /mnt /init
"""


@pytest.fixture
def root(as_root: None, export: Path) -> Path:
    """What a guest needs to come up."""
    for folder in ("bin", "dev", "proc"):
        (export / folder).mkdir()
    os.mknod(export / "dev/console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    shutil.copy(busybox(), export / "bin/busybox")
    for applet in ("grep", "mount", "poweroff", "sh", "sync"):
        (export / "bin" / applet).symlink_to("busybox")
    (export / "init").write_text(INIT)
    (export / "init").chmod(0o755)
    return export


def test_root_by_debians_kernel(root: Path, tmp_path: Path) -> None:
    """Its 9p comes as modules: an initrd loads them, and mounts the root."""
    linux = kernel(SERIES[-1])
    initrd = tmp_path / "initrd"
    initrd.write_bytes(small_image(FIRST_INIT, busybox(), linux.modules))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, command in (
        ("ninepd", [sys.executable, "-m", "ninepd"]),
        ("qemu-system-x86_64", qemu_command()),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (programs / name).chmod(0o755)
    settings = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "INITRD": str(initrd),
        "ACCEL": "tcg",
    }
    result = subprocess.run(
        [LAUNCHER, linux.image, str(root), "quiet"],
        env=os.environ | qemu().env | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        text=True,
        errors="replace",
    )
    assert "the root is a share" in result.stdout, result.stdout
    assert (root / "mounted").read_text().split()[:3] == ["root", "/", "9p"], result.stdout
