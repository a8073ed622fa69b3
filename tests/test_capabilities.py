"""What the process of an export can still do while it serves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.p9.messages import Tmkdir
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, children

CREATING = {0, 1, 3, 4, 6, 7, 27, 31}
"""CHOWN DAC_OVERRIDE FOWNER FSETID SETGID SETUID MKNOD SETFCAP (capabilities(7))."""
DAC_READ_SEARCH, SETPCAP, SYS_CHROOT, SYS_ADMIN = 2, 8, 18, 21


def status(task: Path) -> dict[str, str]:
    lines = (task / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def check(pid: int, expected: set[int]) -> None:
    """Every thread has these capabilities at most, can get no others, and nothing else."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    assert len(tasks) > 1  # one serves a ring
    for task in tasks:
        found = status(task)
        sets = {
            name: {bit for bit in range(64) if int(found[name], 16) >> bit & 1}
            for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")
        }
        assert sets["CapPrm"] == expected
        assert expected - sets["CapEff"] <= {4}  # FSETID comes and goes with the guest's user
        assert sets["CapEff"] <= expected
        assert sets["CapInh"] == sets["CapAmb"] == set()
        assert found["NoNewPrivs"] == "1"
        if not os.geteuid():
            assert sets["CapBnd"] <= expected
            assert found["Groups"].strip() == ""
    assert (
        "Max core file size        1                    1"
        in Path(f"/proc/{pid}/limits").read_text()
    )


OPTIONS: dict[str, tuple[tuple[str, ...], set[int]]] = {
    "default": ((), CREATING | {DAC_READ_SEARCH}),
    "names": (("--reclaim", "names"), CREATING),
    "none": (("--security-model", "none", "--reclaim", "names"), CREATING),
    "mapped": (("--security-model", "mapped-xattr", "--reclaim", "names"), {1, 3}),
    "xattrs": (("--trusted-xattrs", "--reclaim", "names"), CREATING | {SYS_ADMIN}),
}


@pytest.mark.threat("t_caps")
@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("how", OPTIONS)
def test_of_root(start_daemon: StartDaemon, how: str) -> None:
    options, expected = OPTIONS[how]
    daemon = start_daemon(*options)
    with Client(daemon.socket) as client:
        client.attach()
        client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
        check(daemon.pid, expected)


@pytest.mark.threat("t_caps")
def test_of_an_ordinary_user(
    start_daemon: StartDaemon, export: Path, other_user: tuple[str, ...]
) -> None:
    export.chmod(0o777)
    daemon = start_daemon(launcher=other_user)
    with Client(daemon.socket) as client:
        client.attach()
        tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
        for task in tasks:
            found = status(task)
            assert int(found["CapPrm"], 16) == int(found["CapEff"], 16) == 0
            assert found["NoNewPrivs"] == "1"


@pytest.mark.threat("t_caps")
@pytest.mark.usefixtures("as_root")
def test_of_root_with_two_exports(start_daemon: StartDaemon, export: Path, tmp_path: Path) -> None:
    """Each process for itself, and one that was started again as well."""
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{export}"\ntag = "{tag}"\nsocket-path = "{tmp_path / tag}"\n'
            for tag in ("one", "two")
        )
    )
    daemon: Daemon = start_daemon(config=str(config))
    with Client(str(tmp_path / "one")) as one, Client(str(tmp_path / "two")) as two:
        for client in (one, two):
            client.attach()
        for pid in children(daemon.pid):
            check(pid, CREATING | {DAC_READ_SEARCH})
    found = status(Path(f"/proc/{daemon.pid}"))
    kept = {bit for bit in range(64) if int(found["CapPrm"], 16) >> bit & 1}
    assert kept == CREATING | {DAC_READ_SEARCH, SETPCAP, SYS_CHROOT, SYS_ADMIN}
    assert found["CapPrm"] == found["CapEff"] == found["CapBnd"]
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_of_root_in_a_user_namespace(start_daemon: StartDaemon) -> None:
    """Where groups cannot be given up, and there are none to lose (user_namespaces(7))."""
    launcher = ("unshare", "--user", "--map-root-user")
    if subprocess.run([*launcher, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make user namespaces here")
    daemon = start_daemon("--reclaim", "names", launcher=launcher)
    with Client(daemon.socket) as client:
        client.attach()
        client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
        assert int(status(Path(f"/proc/{daemon.pid}"))["CapPrm"], 16) == sum(
            1 << bit for bit in CREATING
        )


@pytest.mark.usefixtures("as_root")
def test_of_root_where_bits_are_locked(start_daemon: StartDaemon) -> None:
    """As systemd's SecureBits= locks them."""
    daemon = start_daemon(launcher=("setpriv", "--securebits=+noroot,+noroot_locked"))
    with Client(daemon.socket) as client:
        client.attach()


@pytest.mark.usefixtures("as_root")
def test_of_root_where_a_needed_bit_is_locked(export: Path) -> None:
    line = refusal(export, launcher=("setpriv", "--securebits=+no_setuid_fixup_locked"))
    assert "SecureBits=" in line


@pytest.mark.parametrize(
    "arguments",
    [("--security-model", "none"), ("--security-model", "mapped-xattr")],
    ids=["none", "mapped"],
)
def test_trusted_attributes_are_of_passthrough(export: Path, arguments: tuple[str, ...]) -> None:
    assert "it goes with passthrough" in refusal(export, "--trusted-xattrs", *arguments)


def test_trusted_attributes_need_a_capability(export: Path) -> None:
    launcher = ("setpriv", "--bounding-set=-sys_admin") if not os.geteuid() else ()
    line = refusal(export, "--trusted-xattrs", "--security-model", "passthrough", launcher=launcher)
    assert "CAP_SYS_ADMIN" in line


def refusal(export: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """The one line on standard error of a daemon that does not start."""
    program = [*launcher, sys.executable, "-m", "ninepd", "serve", "--export", str(export)]
    result = subprocess.run(
        [*program, "--tag", "t", "--socket-path", str(export / "s"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert not (export / "s").exists()
    (line,) = result.stderr.splitlines()
    return line
