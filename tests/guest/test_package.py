"""Debian's package, installed in a Debian that has libvirt, under its systemd."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ninepd_guests.machine import BOOT_LIMIT, FAREWELL_LIMIT
from ninepd_guests.roots import debian_root
from ninepd_guests.tools import debian_qemu
from tests.support.client import ROOT, Client
from tests.support.libvirt import NAME, QEMU_PLACE, Domain
from tests.support.pid1 import CHECKOUT, Systemd, missing

PACKAGES: Final = (
    *("dbus", "libvirt-clients", "libvirt-daemon-system", "lintian", "systemd-sysv"),
    # What the package depends on.
    *("python3-cffi-backend", "python3-click", "python3-mypy-extensions"),
    *("python3-prometheus-client", "python3-rich", "python3-uvloop"),
)
IGNORED: Final = (".git", ".venv", ".*_cache", "build", "dist", "__pycache__", "*.egg-info", "*.so")
MOUNT: Final = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000"


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, but for mypyc's part, which takes minutes."""
    if why := missing():
        pytest.skip(why)
    source = tmp_path_factory.mktemp("deb") / "source"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(*IGNORED))
    subprocess.run(
        ["contrib/deb.sh", Path(sys.executable).parent],
        cwd=source,
        check=True,
        env=os.environ | {"NINEPD_MYPYC": "0"},
        timeout=600,
    )
    (deb,) = (source / "dist").glob("*.deb")
    return deb


@contextlib.contextmanager
def debian(folder: Path, deb: Path) -> Iterator[Systemd]:
    """As it was before the package is installed; that is /root/ninepd.deb."""
    machine = Systemd(folder, debian_root(PACKAGES), {QEMU_PLACE: debian_qemu()})
    try:
        machine.control("is-system-running", "--wait")  # libvirt makes folders for itself
        shutil.copy(deb, machine.path("/root/ninepd.deb"))
        for name in ("share", "tools"):
            exported = machine.path(f"/srv/guests/{name}")
            exported.mkdir(parents=True)
            exported.parent.chmod(0o700)
            (exported / "file").write_text(name)
        yield machine
    finally:
        machine.stop()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, deb: Path) -> Iterator[Systemd]:
    """With the package; what a test starts there it also ends."""
    with debian(tmp_path_factory.mktemp("debian"), deb) as machine:
        machine.run("dpkg", "--install", "/root/ninepd.deb")
        machine.control("restart", "libvirtd.service")  # which looks for hooks then
        yield machine


def serve_example(machine: Systemd) -> None:
    """By the commands of the documentation."""
    machine.run("cp", "/usr/share/doc/ninepd/examples/share.toml", "/etc/ninepd/")
    machine.control("enable", "--now", "ninepd@share.socket")


def files(machine: Systemd) -> set[str]:
    """All there are, but for dpkg's own, logs and caches."""
    apart = ("/var/lib/dpkg", "/var/log", "/var/cache", "/var/lib/systemd")
    left_out = " -o ".join(f"-path {path}" for path in apart)
    found = machine.run("sh", "-c", f"find / -xdev \\( {left_out} \\) -prune -o -print")
    return set(found.splitlines())


def units(machine: Systemd) -> str:
    return machine.control("list-units", "--all", "--plain", "--no-legend", "ninepd*")


def test_life_of_the_package(tmp_path: Path, deb: Path) -> None:
    with debian(tmp_path, deb) as machine:
        before = files(machine)
        machine.run("dpkg", "--install", "/root/ninepd.deb")
        serve_example(machine)
        with Client(str(machine.path("/run/ninepd/share.sock"))) as client:
            client.attach()
            client.open(ROOT, 1, b"file")
            assert client.read(1, 0, 100) == b"share"
            machine.run("dpkg", "--remove", "ninepd")
        machine.run("dpkg", "--purge", "ninepd")
        assert files(machine) == before
        assert not machine.path("/run/ninepd").exists()
        assert units(machine) == ""


def test_lintian_finds_no_errors(machine: Systemd) -> None:
    machine.run("lintian", "--allow-root", "--fail-on=error", "/root/ninepd.deb")


def test_what_the_package_brings_for_its_own_test(machine: Systemd) -> None:
    shutil.copy(CHECKOUT / "contrib/debian/tests/smoke", machine.path("/root/smoke"))
    machine.run("env", "--unset=TMPDIR", "/root/smoke")


def test_domain_by_systemd_alone(machine: Systemd) -> None:
    serve_example(machine)
    domain = Domain(machine, "one-export.xml")
    with domain.started() as guest:
        guest.run(f"{MOUNT} share /mnt")
        assert guest.run("cat /mnt/file") == "share"
    domain.virsh("undefine", NAME)
    machine.control("disable", "--now", "ninepd@share.socket", "ninepd@share.service")


def nothing_is_left(machine: Systemd) -> bool:
    return (
        units(machine) == ""
        and not list(machine.path("/run/ninepd/domains").iterdir())
        and not list(machine.path("/run/ninepd").glob("*.sock"))
    )


def test_domain_with_its_own_exports(machine: Systemd) -> None:
    domain = Domain(machine, "own-exports.xml")
    tools = machine.path("/srv/guests/tools")
    tools.rename(tools.with_name("later"))
    with pytest.raises(AssertionError, match="/srv/guests/tools does not exist"):
        domain.virsh("start", NAME)
    assert nothing_is_left(machine)

    tools.with_name("later").rename(tools)
    with domain.started() as guest:
        for boot in (1, 2):
            guest.channel.wait_boot(boot, BOOT_LIMIT)
            for tag in ("share", "tools"):
                guest.run(f"mkdir /mnt/{tag} && {MOUNT} {tag} /mnt/{tag}")
                assert guest.run(f"cat /mnt/{tag}/file") == tag
            assert units(machine).startswith("ninepd-domain@my\\x20guest\\x2d2.service")
            guest.channel.farewell("boot", FAREWELL_LIMIT)
    assert nothing_is_left(machine)
    domain.virsh("undefine", NAME)
