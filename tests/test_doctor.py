"""``ninepd doctor``: each probe finds what it looks for, made so for real."""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import ninepd.pipeline
from tests.conftest import Mount
from tests.support.client import Client, Daemon
from tests.support.raw_fuse import RawFuse

WITHOUT = str(Path(__file__).parent / "support/without_calls.py")


class Report:
    """What it said."""

    def __init__(self, result: "subprocess.CompletedProcess[str]") -> None:
        assert result.stderr == "", result.stderr
        self.status = result.returncode
        self.lines = result.stdout.splitlines()

    def line(self, start: str) -> tuple[str, str]:
        """Level and the rest of the one line whose finding begins so."""
        (found,) = [line.split(None, 1) for line in self.lines if line[9:].startswith(start)]
        level, rest = found
        return level, rest

    def level(self, start: str) -> str:
        return self.line(start)[0]


Doctor = Callable[..., Report]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """What is in PATH, beside the usual: QEMU that can be used."""
    folder = tmp_path / "programs"
    folder.mkdir(mode=0o755)
    fake_qemu(folder, "10.2.0", "vhost-user-test-device-pci")
    return folder


def fake_qemu(folder: Path, version: str, device: str, backend: str = "memfd") -> None:
    program = folder / f"qemu-system-{os.uname().machine}"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'QEMU emulator version {version} (Debian)';;\n"
        f"""-device) echo 'name "{device}", bus PCI';;\n"""
        f"-object) printf 'List of user creatable objects:\\n  memory-backend-{backend}\\n';;\n"
        "esac\n"
    )
    program.chmod(0o755)


@pytest.fixture
def doctor(programs: Path) -> Doctor:
    def run(*options: str | Path, launcher: tuple[str, ...] = (), path: str = "") -> Report:
        command = [*launcher, sys.executable, "-m", "ninepd", "doctor", *map(str, options)]
        search = path or f"{programs}:{os.environ['PATH']}"
        return Report(
            subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env=os.environ | {"PATH": search},
            )
        )

    return run


@pytest.fixture
def options(export: Path, tmp_path: Path) -> list[str | Path]:
    return ["--export", export, "--tag", "share", "--socket-path", tmp_path / "s"]


def test_export_that_can_be_served(doctor: Doctor, options: list[str | Path], export: Path) -> None:
    before = os.listdir(export.parent), os.listdir(export)
    report = doctor(*options, launcher=("prlimit", "--nofile=16384:16384"))
    assert (report.status, [line for line in report.lines if line.startswith("error")]) == (0, [])
    _, served = report.line("share: ")
    assert f"{export} as share at {export.parent}/s" in served
    release = os.uname().release
    assert report.level(f"Linux {release}") == report.level("shared memory") == "ok"
    assert (os.listdir(export.parent), os.listdir(export)) == before
    assert all(line[:9].strip() in {"ok", "note", "warning", "error"} for line in report.lines)
    compiled = ninepd.pipeline.__file__.endswith(tuple(EXTENSION_SUFFIXES))
    assert report.level("ninepd itself") == ("ok" if compiled else "note")


def test_a_daemon_that_serves_is_not_disturbed(
    doctor: Doctor, options: list[str | Path], daemon: Daemon
) -> None:
    options[-1] = daemon.socket
    with Client(daemon.socket) as client:
        client.attach()
        assert doctor(*options).status == 0
        client.create(0, 1, b"f")


def test_kernel_that_cannot_look_up(doctor: Doctor) -> None:
    report = doctor(launcher=(sys.executable, WITHOUT, "openat2"))
    level, line = report.line(f"Linux {os.uname().release}, openat2")
    assert (level, report.status) == ("error", 1)
    assert "Function not implemented" in line


def test_kernel_that_lacks_the_rest(doctor: Doctor) -> None:
    calls = "statx,memfd_create,landlock_create_ruleset,unshare"
    report = doctor(launcher=(sys.executable, WITHOUT, calls))
    assert report.level(f"Linux {os.uname().release}, statx") == "warning"
    assert report.level("shared memory") == "error"
    assert report.level("Landlock") == "warning"
    assert report.level("user namespaces") == "note"
    assert report.status == 1


def test_kernel_without_mount_attributes(
    as_root: None, doctor: Doctor, options: list[str | Path]
) -> None:
    launcher = (sys.executable, WITHOUT, "mount_setattr")
    report = doctor(*options, launcher=launcher)
    level, line = report.line("mount_setattr")
    assert (level, report.status) == ("warning", 0)
    assert "Function not implemented" in line
    assert report.line("share, sandbox")[1].startswith("share, sandbox landlock: ")


def test_small_limits(doctor: Doctor) -> None:
    report = doctor(launcher=("prlimit", "--nofile=80:80", f"--as={8 << 30}"))
    assert (report.level("80 descriptors"), report.status) == ("error", 1)
    level, line = report.line("address space")
    assert level == "warning"
    assert "8192 MiB" in line
    report = doctor(launcher=("prlimit", "--nofile=1024:1024"))
    level, line = report.line("1024 descriptors")
    assert (level, report.status) == ("warning", 0)
    assert "more than 768 files" in line


# QEMU


@pytest.mark.parametrize(
    ("version", "device", "level"),
    [
        ("7.2.22", "vhost-user-fs-pci", "error"),
        ("10.1.0", "vhost-user-device-pci", "error"),
        ("11.0.50", "vhost-user-test-device", "ok"),
        ("none", "vhost-user-test-device", "error"),
    ],
)
def test_qemu(doctor: Doctor, programs: Path, version: str, device: str, level: str) -> None:
    fake_qemu(programs, version, device)
    report = doctor()
    assert report.level(str(programs)) == level
    assert report.status == (level == "error")


def test_qemu_without_memory_that_can_be_shared(doctor: Doctor, programs: Path) -> None:
    fake_qemu(programs, "10.2.0", "vhost-user-test-device-pci", backend="file")
    levels = [line.split()[0] for line in doctor().lines if str(programs) in line]
    assert levels == ["ok", "warning"]


def test_qemu_by_name(doctor: Doctor, programs: Path, tmp_path: Path) -> None:
    """And none that is found by itself."""
    (qemu,) = programs.iterdir()
    elsewhere = shutil.move(qemu, tmp_path / "my-qemu")
    assert doctor(path=str(programs)).level("no qemu-system-") == "warning"
    assert doctor("--qemu", elsewhere, path=str(programs)).level(str(elsewhere)) == "ok"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--qemu", "/no/such"], "--qemu: there is no program /no/such"),
        (["--qemu-user", "no-such-user"], "--qemu-user: this host has no user 'no-such-user'"),
        (["--config", "/no/such"], "/no/such: No such file"),
    ],
)
def test_wrong_options(arguments: list[str], words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ninepd", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert words in line


# QEMU's user


@pytest.fixture
def nobody(other_user: tuple[str, ...], export: Path) -> pwd.struct_passwd:
    """A user who may get as far as the test's folder."""
    export.parent.chmod(0o755)
    return pwd.getpwnam("nobody")


def test_qemu_user(
    doctor: Doctor,
    options: list[str | Path],
    nobody: pwd.struct_passwd,
    export: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = ["--qemu-user", "nobody"]
    place = f"{options[-1]}, user nobody"
    level, line = doctor(*options, *user).line(place)
    assert level == "warning"
    assert "mode 0600" in line
    monkeypatch.setenv("TMPDIR", str(export))  # where that user cannot go: it does not matter
    export.chmod(0o700)
    group = ["--socket-mode", "0660", "--socket-group", str(nobody.pw_gid)]
    assert doctor(*options, *user, *group).level(place) == "ok"
    level, line = doctor(*options, *user, *group, "--allow-uid", "0").line(place)
    assert level == "warning"
    assert "--allow-uid" in line
    export.parent.chmod(0o700)
    level, line = doctor(*options, *user, *group).line(place)
    assert level == "warning"
    assert f"may not enter {export.parent}" in line


def test_socket_that_is_there(
    doctor: Doctor, options: list[str | Path], daemon: Daemon, nobody: pwd.struct_passwd
) -> None:
    """Its own mode counts, whatever the options would make."""
    options[-1] = daemon.socket
    user = ["--qemu-user", "nobody", "--socket-mode", "0666"]
    assert doctor(*options, *user).level(f"{daemon.socket}, user nobody") == "warning"
    os.chmod(daemon.socket, 0o666)
    assert doctor(*options, *user).level(f"{daemon.socket}, user nobody") == "ok"


def test_qemu_user_that_only_root_can_be(
    doctor: Doctor, options: list[str | Path], other_user: tuple[str, ...]
) -> None:
    report = doctor(*options, "--qemu-user", "nobody", launcher=other_user)
    assert report.level(f"{options[-1]}, user nobody") == "note"


@pytest.mark.parametrize(
    ("place", "file", "text", "finding"),
    [
        ("/sys/module", "apparmor/parameters/enabled", "Y", "AppArmor is on"),
        ("/sys/fs", "selinux/enforce", "1", "SELinux is enforcing"),
        ("/sys/fs", "selinux/enforce", "0", "SELinux is permissive"),
    ],
)
def test_confinement(
    as_root: None, doctor: Doctor, place: str, file: str, text: str, finding: str
) -> None:
    """The kernel's own files, as they are where these are on."""
    script = (  # not by unshare(1), which cannot where the root of a chroot is no mount
        f"mount --make-rprivate /sys && mount -t tmpfs none {place} && "
        f"mkdir -p {place}/{os.path.dirname(file)} && "
        f'echo {text} > {place}/{file} && exec "$@"'
    )
    own_mounts = ("unshare", "--mount", "--propagation", "unchanged")
    report = doctor(launcher=(*own_mounts, "sh", "-ec", script, "sh"))
    assert report.level(finding) == "note"


# Exports


def test_ordinary_user(
    doctor: Doctor, options: list[str | Path], export: Path, other_user: tuple[str, ...]
) -> None:
    export.chmod(0o777)
    report = doctor(*options, "--security-model", "passthrough", launcher=other_user)
    assert report.status == 0
    assert report.level("user 4321") == report.level("mount_setattr") == "note"
    assert report.level("share, security model passthrough") == "warning"
    level, line = report.line("share, file handles")
    assert level == "note"
    assert "CAP_DAC_READ_SEARCH" in line
    report = doctor(*options, "--security-model", "none", launcher=other_user)
    assert report.level("share, security model none") == "note"
    export.chmod(0o700)
    report = doctor(*options, launcher=other_user)
    level, line = report.line("configuration")
    assert (level, report.status) == ("error", 1)
    assert "cannot be read by this user" in line


def test_file_system_without_handles(
    doctor: Doctor, options: list[str | Path], export: Path, mount: Mount
) -> None:
    mount(export, "-t", "ramfs", "none")
    level, line = doctor(*options).line("share, file handles")
    assert level == "warning"
    assert "ramfs has none" in line


def test_storage_that_may_hang(
    as_root: None, doctor: Doctor, options: list[str | Path], export: Path
) -> None:
    with RawFuse(export, [], b""):
        report = doctor(*options, "--security-model", "none", "--allow-unsafe-export")
        assert report.level("share, storage fuse") == "note"
        level, line = report.line("share, file handles")
        assert level == "warning"
        assert "keeps its descriptor" in line
        assert report.level("share, security model none") == "ok"


def test_disk(doctor: Doctor, options: list[str | Path], export: Path, mount_ext4: Mount) -> None:
    mount_ext4(export)
    report = doctor(*options)
    assert report.level("share, storage ext4") == report.level("share, file handles") == "ok"
    assert report.level("share, file handles") == "ok"
    assert (
        "not used (--reclaim names)"
        in doctor(*options, "--reclaim", "names").line("share, file handles")[1]
    )


def test_space(doctor: Doctor, options: list[str | Path], export: Path, mount: Mount) -> None:
    mount(export, "-t", "tmpfs", "-o", "size=64k,nr_inodes=4", "none")
    for number in range(3):
        (export / f"f{number}").touch()
    assert doctor(*options).level("share, no inodes") == "warning"
    (export / "f0").write_bytes(bytes(64 << 10))
    assert doctor(*options).level("share, no space") == "warning"
    subprocess.run(["mount", "-o", "remount,ro", export], check=True)
    assert doctor(*options).level("share, read-only mount") == "warning"
    quiet = doctor(*options, "--readonly")
    assert not [line for line in quiet.lines if "share, read-only mount" in line]
    assert "-o ro,trans=virtio" in quiet.line("share, mount options")[1]


def test_options_that_cost(doctor: Doctor, options: list[str | Path]) -> None:
    report = doctor(*options, "--sandbox", "none", "--msize-max", "8192")
    assert report.level("share, sandbox none") == "warning"
    level, line = report.line("share, mount options")
    assert level == "warning"
    assert "msize=8192 share" in line


def test_configuration_file(doctor: Doctor, export: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    table = f"[[export]]\nexport = '{export}'\nsocket-path = '{tmp_path}"
    file.write_text(f"{table}/1'\ntag = 'one'\n{table}/2'\ntag = 'two'\n")
    report = doctor("--config", file)
    assert report.status == 0
    assert report.level("one, storage") == report.level("two, storage")
    with file.open("a") as more:
        more.write("colour = 1\n")
    report = doctor("--config", file)
    assert report.status == 1
    level, line = report.line("configuration")
    assert level == "error"
    assert f"{file}, line 9 (export 2): --colour" in line
    assert [line for line in report.lines if line[9:].startswith("one, storage")]
