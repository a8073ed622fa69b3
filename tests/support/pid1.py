"""systemd itself as process 1, in namespaces of its own.

Its root holds the host's programs, a few files of /etc, this checkout with the units of
contrib/systemd, and nothing else that could be started; so it is up in a second. Or it is a copy of
a Debian's. It needs root and a cgroup2 hierarchy, and no network.
"""

import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.support.waiting import eventually

CHECKOUT: Final = Path(__file__).parents[2]
UNITS: Final = CHECKOUT / "contrib/systemd"
SYSTEMD: Final = "/usr/lib/systemd/systemd"
_TARGETS: Final = ("basic", "default", "multi-user", "shutdown", "sockets", "sysinit")
_PROGRAM: Final = """#!/bin/sh
export PYTHONHOME=/ninepd/python PYTHONPATH=/ninepd/checkout:/ninepd/packages
export LD_LIBRARY_PATH=/ninepd/python/lib PYTHONDONTWRITEBYTECODE=1
exec /ninepd/python/bin/python3 -m ninepd "$@"
"""
_HOST: Final = """
set -e
root=$1 files=$2 python=$3 checkout=$4 packages=$5
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$root"
cd "$root"
mkdir dev etc home ninepd proc root run srv sys tmp usr var
for entry in /bin /lib* /sbin; do
    if [ -L "$entry" ]; then
        cp -a "$entry" .
    else
        mkdir ".$entry"
        mount --bind "$entry" ".$entry"
    fi
done
mount --bind /usr usr
for name in alternatives group ld.so.cache nsswitch.conf passwd shadow; do
    cp -a "/etc/$name" etc
done
cp -r "$files/." .
mkdir ninepd/python ninepd/checkout ninepd/packages
mount --bind "$python" ninepd/python
mount --bind "$checkout" ninepd/checkout
mount --bind "$packages" ninepd/packages
units=SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/system
"""
"""Arguments: an empty folder, one with what comes on top, and where to find what is bound."""
_COPY: Final = """
set -e
root=$1 image=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$root"
cd "$root"
mkdir upper work copy
mount -t overlay -o "lowerdir=$image,upperdir=upper,workdir=work" none copy
cd copy
while [ $# != 0 ]; do
    mkdir -p ".$1"
    mount --bind -o ro "$2" ".$1"
    shift 2
done
units= PATH=/usr/sbin:/usr/bin:/sbin:/bin
"""
"""Arguments: an empty folder, the Debian's root, and pairs: a place, and what is seen there."""
_BOOT: Final = """
mount --rbind /dev dev
mount -t proc none proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys # the settings of the host's kernel, some of which systemd raises
mount -t sysfs none sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none run
mount -t tmpfs none tmp
mkdir run/old
pivot_root . run/old
umount -l /run/old
mount --make-rshared /
systemd-sysusers
exec env -i container=test PATH="$PATH" $units \
    /usr/lib/systemd/systemd --system --show-status=no --log-target=console
"""


def missing() -> str:
    """Why it cannot be had here; empty if it can."""
    if os.geteuid():
        return "needs root"
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if all(line.split()[4] != "/" for line in mounts):
        return "the root of this chroot is no mount, which pivot_root(2) needs"
    if not os.path.exists(SYSTEMD):
        return "there is no systemd"
    if _hierarchy() is None:
        return "there is no cgroup2 hierarchy to write to"
    return ""


def _hierarchy() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[words.index("-") + 1] == "cgroup2" and os.access(words[4], os.W_OK):
            return Path(words[4])
    return None


class Systemd:
    """A running one."""

    def __init__(
        self, folder: Path, image: str | None = None, binds: Mapping[str, str] | None = None
    ) -> None:
        """``folder`` is its own, and empty; ``image`` the root of a Debian, which is not changed,
        and ``binds`` are folders to be seen there.
        """
        root, files, self._log = folder / "root", folder / "files", folder / "log"
        root.mkdir()
        if image is None:
            _install(files)
            places = (root, files, sys.base_prefix, CHECKOUT, sysconfig.get_path("purelib"))
            script, arguments = _HOST + _BOOT, [str(place) for place in places]
        else:
            pairs = itertools.chain.from_iterable((binds or {}).items())
            script, arguments = _COPY + _BOOT, [str(root), image, *pairs]
        hierarchy = _hierarchy()
        assert hierarchy is not None
        self._group = hierarchy / f"ninepd-test-{os.getpid()}-{folder.name}"
        self._group.mkdir()
        enter = 'echo 0 > "$1/cgroup.procs"; shift; exec "$@"'
        namespaces = ("--cgroup", "--mount", "--pid", "--ipc", "--uts", "--net")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *("sh", "-c", enter, "sh", self._group),
                    *("unshare", *namespaces, "--fork", "--kill-child"),
                    *("sh", "-c", script, "sh", *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = 0
        try:
            eventually(self._is_up, "systemd is up", 20)
        except BaseException:
            self.stop()
            raise

    def _is_up(self) -> bool:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        assert self._process.poll() is None, self.log
        for pid in children.read_text().split():
            self.pid = int(pid)
            return self.path("/run/systemd/private").exists()
        return False

    def stop(self) -> None:
        """All of it ends."""
        self._process.kill()
        self._process.wait()
        eventually(self._has_no_processes, "the end of its processes")
        for folder, _, _ in os.walk(self._group, topdown=False):
            os.rmdir(folder)

    def _has_no_processes(self) -> bool:
        return "populated 0" in (self._group / "cgroup.events").read_text()

    @property
    def log(self) -> str:
        """What systemd says, and what its services do."""
        return self._log.read_text()

    def path(self, path: str) -> Path:
        """Where its file is for us."""
        return Path(f"/proc/{self.pid}/root{path}")

    def run(self, *command: str) -> str:
        """Run a program there; its output."""
        enter = ("nsenter", f"--target={self.pid}", "--all")
        result = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=120)
        assert not result.returncode, result.stderr + self.log
        return result.stdout

    def control(self, *arguments: str) -> str:
        """Systemctl."""
        return self.run("systemctl", *arguments)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.control("show", "--value", f"--property={name}", unit).strip()


def _install(files: Path) -> None:
    """As an administrator does, but for the place of the program."""
    (files / "etc").mkdir(parents=True)
    shutil.copytree(UNITS / "sysusers.d", files / "etc/sysusers.d")
    for source, place in ((UNITS, "system"), (UNITS / "user", "user")):
        folder = files / "etc/systemd" / place
        folder.mkdir(parents=True)
        for unit in [*source.glob("*.service"), *source.glob("*.socket")]:
            text = unit.read_text()
            (folder / unit.name).write_text(text.replace("=/usr/bin/ninepd ", "=/ninepd/program "))
        for name in _TARGETS:
            (folder / f"{name}.target").write_text(f"[Unit]\nDescription={name}\n")
    (files / "etc/ninepd").mkdir()
    program = files / "ninepd/program"
    program.parent.mkdir()
    program.write_text(_PROGRAM)
    program.chmod(0o755)
