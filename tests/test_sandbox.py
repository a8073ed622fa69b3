"""What a process can still do that is shut in: nothing, even if one of its walls falls."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ninepd.p9.messages import Treadlink
from tests.conftest import OTHER_USER, Mount, StartDaemon
from tests.support.client import ROOT, Client
from tests.support.prisoner import PROBES, WALLS

NAME = f"ninepd-probe-{os.getpid()}"
"""Of an abstract socket (unix(7))."""


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server on the host that whoever has its network can reach; beside it is NAME."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        other.bind("\0" + NAME)
        yield server.getsockname()[1]


@pytest.fixture
def user_namespaces() -> None:
    """The kernel gives none to who is in a chroot(2), and some hosts to nobody."""
    command = ["unshare", "--user", "true"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("user namespaces cannot be made here")


def attempt(
    tmp_path: Path, port: int, wall: str, *options: str, launcher: Sequence[str] = ()
) -> dict[str, str]:
    """What came of each probe: "done", the name of an errno, or "killed"."""
    (tmp_path / "export").mkdir(mode=0o755)
    outside = tmp_path / "outside"
    outside.touch(mode=0o666)
    if launcher:
        os.chown(outside, OTHER_USER, OTHER_USER)
    program = [*launcher, sys.executable, "-m", "tests.support.prisoner", wall]
    serve = ["serve", "--export", str(tmp_path / "export"), "--socket-path", str(tmp_path / "s")]
    result = subprocess.run(
        [*program, *serve, "--tag", "t", *options],
        env=os.environ | {"PROBE_PORT": str(port), "PROBE_NAME": NAME, "PROBE_FILE": str(outside)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    answers = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert answers.keys() == PROBES.keys(), result.stderr
    return answers


def successful(answers: dict[str, str]) -> set[str]:
    for answer in answers.values():
        assert answer in {"done", "killed"} or hasattr(errno, answer), answers
    return {probe for probe, answer in answers.items() if answer == "done"}


WITHOUT_FILTER = {"fork", "owner"}
"""What goes on behind the same walls, and what is done but has no effect beyond Landlock."""
WITHOUT = {"calls": WITHOUT_FILTER, "mounts": {"chmod", "program"}}
"""Landlock knows no modes."""


@pytest.mark.threat("t_syscalls", "t_fsview")
@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("wall", WALLS)
def test_no_way_out(tmp_path: Path, port: int, wall: str) -> None:
    answers = attempt(tmp_path, port, wall, "--sandbox", "namespace")
    assert successful(answers) == WITHOUT.get(wall, set())


OF_AN_ORDINARY_USER = {
    "-": {"chmod"},
    "calls": {"chmod", *WITHOUT_FILTER},
    "landlock": {"chmod", "climb", "list", "read", "truncate", "write"},
}
"""What gets through without a wall: he asks for no user namespace, and Landlock knows no modes."""


@pytest.mark.parametrize("wall", OF_AN_ORDINARY_USER)
def test_no_way_out_for_an_ordinary_user(
    tmp_path: Path, port: int, wall: str, other_user: tuple[str, ...]
) -> None:
    answers = attempt(tmp_path, port, wall, launcher=other_user)
    assert successful(answers) == OF_AN_ORDINARY_USER[wall]


@pytest.mark.usefixtures("user_namespaces")
@pytest.mark.parametrize("wall", ["-", "landlock"])
def test_no_way_out_of_a_user_namespace(
    tmp_path: Path, port: int, wall: str, other_user: tuple[str, ...]
) -> None:
    answers = attempt(tmp_path, port, wall, "--sandbox", "namespace", launcher=other_user)
    assert not successful(answers)


@pytest.mark.usefixtures("as_root")
def test_without_walls(tmp_path: Path, port: int) -> None:
    """The probes themselves would get out."""
    answers = attempt(tmp_path, port, "capabilities", "--sandbox", "none")
    assert answers.pop("module") in {"ENOEXEC", "ENOSYS"}  # it is empty, or there are none at all
    assert successful(answers) == PROBES.keys() - {"module"}


NAMESPACES = ("mnt", "net", "ipc", "uts")


def attributes(pid: int) -> set[str]:
    """Of the only mount of the host's that it has beside what procfs says of itself."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    found = {line.split()[4]: set(line.split()[5].split(",")) for line in lines}
    own = {f"/proc/self/{name}" for name in ("fd", "fdinfo", "mountinfo")}
    assert found.keys() == {"/", "/export", *own}
    return found["/export"]


@pytest.mark.threat("t_fsview")
@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("options", [(), ("--readonly",)], ids=["writable", "readonly"])
def test_the_export_is_all_there_is(start_daemon: StartDaemon, options: tuple[str, ...]) -> None:
    daemon = start_daemon("--sandbox", "namespace", *options)
    own, its = (Path(f"/proc/{pid}/ns") for pid in ("self", daemon.pid))
    assert all(os.readlink(own / name) != os.readlink(its / name) for name in NAMESPACES)
    found = attributes(daemon.pid)
    assert {"nosuid", "nodev", "noexec", "nosymfollow"} <= found
    assert ("ro" in found) == bool(options)


def test_readonly_changes_no_access_time(
    start_daemon: StartDaemon, tmp_path: Path, mount_ext4: Mount
) -> None:
    """Not even of a symbolic link, which the kernel updates for whoever reads it."""
    export = mount_ext4(tmp_path / "disk")
    subprocess.run(["mount", "-o", "remount,strictatime,nosuid,nodev", export], check=True)
    (export / "link").symlink_to("somewhere")
    os.utime(export / "link", (1, 1), follow_symlinks=False)
    daemon = start_daemon("--sandbox", "namespace", "--readonly", export=str(export))
    with Client(daemon.socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"link")
        assert client.rpc(Treadlink(1)).target == b"somewhere"
    assert (export / "link").lstat().st_atime == 1


@pytest.mark.parametrize(("choice", "expected"), [("follow", {b"file"}), ("ignore", set())])
def test_mounts_of_the_host(
    start_daemon: StartDaemon, export: Path, mount: Mount, choice: str, expected: set[bytes]
) -> None:
    """Those that are there stay; those that come later appear if they shall. All can go."""
    mount(export / "there", "-t", "tmpfs", "none")
    (export / "there" / "old").touch()
    (export / "later").mkdir()
    daemon = start_daemon("--sandbox", "namespace", "--host-mounts", choice)
    mount(export / "later", "-t", "tmpfs", "none")
    (export / "later" / "file").touch()
    with Client(daemon.socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"there")
        client.walk(ROOT, 2, b"later")
        assert client.names(1) == {b"old"}
        assert client.names(2) == expected
        client.clunk(1, 2)
    subprocess.run(["umount", export / "later"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", export / "later"], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--sandbox", "jail"),
            "--sandbox: 'jail' is unknown; use one of auto, namespace, landlock, none",
        ),
        (("--host-mounts", "some"), "--host-mounts: 'some' is unknown; use one of follow, ignore"),
        (
            ("--sandbox", "none", "--host-mounts", "ignore"),
            "--host-mounts: sandbox none leaves the host's mounts; ignore goes with namespace",
        ),
    ],
)
def test_bad_options(export: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    where = ("--export", str(export), "--tag", "t", "--socket-path", str(tmp_path / "s"))
    command = [sys.executable, "-m", "ninepd", "serve", *where, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, f"ninepd: {message}\n")
    assert not (tmp_path / "s").exists()


NO_NAMESPACES = ("unshare", "--user", "--map-root-user", "sh", "-c")
FORBID = 'echo 0 >/proc/sys/user/max_mnt_namespaces; exec "$@"'


@pytest.mark.threat("t_failclosed")
@pytest.mark.usefixtures("as_root", "user_namespaces")
def test_what_was_asked_for_must_be_there(export: Path, tmp_path: Path) -> None:
    where = ("--export", str(export), "--tag", "t", "--socket-path", str(tmp_path / "s"))
    command = [sys.executable, "-m", "ninepd", "serve", *where, "--sandbox", "namespace"]
    result = subprocess.run(
        [*NO_NAMESPACES, FORBID, "sh", *command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == (
        "ninepd: --sandbox: namespace cannot be had here (namespaces: No space left on device); "
        "use auto\n"
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("as_root", "user_namespaces")
def test_auto_takes_what_there_is(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("-v", launcher=(*NO_NAMESPACES, FORBID, "sh"))
    daemon.stop()
    trouble = "namespaces: No space left on device"
    assert f"sandbox landlock, no namespaces with Landlock: {trouble}\n" in daemon.log
    assert f"sandbox landlock, no namespaces: {trouble}\n" in daemon.log
    assert "sandbox landlock)\n" in daemon.log


@pytest.fixture
def other_root(tmp_path: Path, mount: Mount) -> Path:
    """The host's tree once more, below a folder that is no mount itself."""
    root = tmp_path / "root"
    root.mkdir()
    for entry in Path("/").iterdir():
        place = root / entry.name
        if entry.is_symlink():
            place.symlink_to(entry.readlink())
        elif entry.is_dir():
            mount(place, "--bind", entry)
    return root


def test_several_exports_in_a_chroot(
    start_daemon: StartDaemon, other_root: Path, tmp_path: Path
) -> None:
    """Its root is no mount, and who starts the processes has given up most capabilities."""
    config = tmp_path / "config.toml"
    sockets = [str(tmp_path / tag) for tag in ("one", "two")]
    for path in sockets:
        os.mkdir(f"{path}.d")
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{path}.d"\ntag = "t{at}"\nsocket-path = "{path}"\n'
            for at, path in enumerate(sockets)
        )
    )
    daemon = start_daemon("-v", config=str(config), launcher=("chroot", str(other_root)))
    for path in sockets:
        with Client(path) as client:
            client.attach()
            client.create(ROOT, 1, b"f")
    daemon.stop()
    assert daemon.log.count("sandbox namespace)\n") == 2


def test_nothing_inherited_is_kept(start_daemon: StartDaemon) -> None:
    """What a launcher has left open by mistake."""
    daemon = start_daemon(launcher=("sh", "-c", 'exec 9</etc; exec "$@"', "sh"))
    found = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{daemon.pid}/fd")]
    assert "/etc" not in found


def test_says_what_it_is_shut_in_with(
    start_daemon: StartDaemon, other_user: tuple[str, ...], export: Path
) -> None:
    export.chmod(0o777)
    daemon = start_daemon("-v", launcher=other_user)
    daemon.stop()
    assert "sandbox landlock)" in daemon.log
    assert (
        "sandbox landlock, no namespaces: they need CAP_SYS_ADMIN, or --sandbox namespace and a "
        "user namespace" in daemon.log
    )
