"""Whose file is it? Owners, groups and modes of what guests create; and which file is which."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    NOFID,
    SetattrValid,
    Tattach,
    Tclunk,
    Tgetattr,
    Tlcreate,
    Tmkdir,
    Tmknod,
    Tsetattr,
    Tsymlink,
    Tversion,
    Twalk,
)
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client

pytestmark = pytest.mark.usefixtures("as_root")

UID, GID, NO_ID = 4321, 8765, 0xFFFFFFFF
USER = 50  # the fid of that user's attach


def make_file(client: Client, fid: int, name: bytes, mode: int, gid: int) -> None:
    client.walk(fid, 999)
    client.rpc(Tlcreate(999, name, 0x8042, mode, gid))
    client.clunk(999)


Maker = Callable[[Client, int, bytes, int, int], object]
MAKERS: dict[str, Maker] = {
    "file": make_file,
    "directory": lambda client, fid, name, mode, gid: client.rpc(
        Tmkdir(fid, name, stat.S_IFDIR | mode, gid)
    ),
    "fifo": lambda client, fid, name, mode, gid: client.rpc(
        Tmknod(fid, name, stat.S_IFIFO | mode, 0, 0, gid)
    ),
    "node": lambda client, fid, name, mode, gid: client.rpc(
        Tmknod(fid, name, stat.S_IFREG | mode, 0, 0, gid)
    ),
}


@pytest.fixture
def user(client: Client) -> Client:
    """Fid 50 is the root of the export for the guest's user 4321."""
    client.rpc(Tattach(USER, NOFID, b"", b"", UID))
    return client


# Creating as somebody


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("mode", [0o640, 0o7777, 0o000, 0o777])
def test_owner_group_and_mode(user: Client, export: Path, kind: str, mode: int) -> None:
    MAKERS[kind](user, USER, b"x", mode, GID)
    info = (export / "x").lstat()
    # mkdir(2) takes no setuid and setgid bits from the mode, here as on a local file system.
    wanted = mode & 0o1777 if kind == "directory" else mode
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (UID, GID, wanted)


def test_owner_of_a_symlink(user: Client, export: Path) -> None:
    user.rpc(Tsymlink(USER, b"link", b"target", GID))
    info = (export / "link").lstat()
    assert (info.st_uid, info.st_gid) == (UID, GID)


def test_owner_is_inherited_by_walks(user: Client, export: Path) -> None:
    (export / "d/e").mkdir(parents=True)
    user.walk(USER, 1, b"d", b"e")
    user.walk(1, 2)
    make_file(user, 2, b"f", 0o600, GID)
    assert (export / "d/e/f").stat().st_uid == UID


def test_users_of_one_session_do_not_mix(user: Client, export: Path) -> None:
    for number in range(20):
        make_file(user, (ROOT, USER)[number % 2], b"%d" % number, 0o644, number)
    owners = {number: (export / str(number)).stat() for number in range(20)}
    assert [owners[n].st_uid for n in range(20)] == [0, UID] * 10
    assert [owners[n].st_gid for n in range(20)] == list(range(20))


def test_nobody_in_particular(client: Client, export: Path) -> None:
    """n_uname of the mount itself is -1: the daemon's own identity stays."""
    client.rpc(Tattach(USER, NOFID, b"", b"", NO_ID))
    make_file(client, USER, b"f", 0o640, NO_ID)
    info = (export / "f").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, 0, 0o640)


def test_user_may_create_where_the_guest_lets_it(user: Client, export: Path) -> None:
    """The guest's kernel has checked already, with groups and ACLs that nobody here knows."""
    export.chmod(0o700)
    make_file(user, USER, b"f", 0o600, GID)
    assert (export / "f").stat().st_uid == UID
    assert user.error(Tmkdir(USER, b"d", 0o755, GID)) == ""


def test_identity_is_put_back(user: Client, export: Path) -> None:
    """After a creation for a user, also a failed one, root's own work is root's again."""
    (export / "x").write_text("")
    assert user.error(Tmkdir(USER, b"x", 0o755, GID)) == "EEXIST"
    make_file(user, ROOT, b"after", 0o600, 0)
    assert (export / "after").stat().st_uid == 0


def test_setgid_directory(user: Client, export: Path) -> None:
    """The guest sends the directory's group; a new directory inherits the bit as well."""
    (export / "d").mkdir()
    os.chown(export / "d", 0, 777)
    (export / "d").chmod(0o2775)
    user.walk(USER, 1, b"d")
    make_file(user, 1, b"f", 0o644, 777)
    user.rpc(Tmkdir(1, b"sub", stat.S_IFDIR | 0o2755, 777))
    assert (export / "d/f").stat().st_gid == 777
    info = (export / "d/sub").stat()
    assert (info.st_gid, stat.S_IMODE(info.st_mode)) == (777, 0o2755)


@pytest.mark.parametrize("umask", ["0", "077", "0777"])
def test_umask_of_the_daemon_does_not_matter(
    start_daemon: StartDaemon, export: Path, umask: str
) -> None:
    before = os.umask(int(umask, 8))
    try:
        daemon = start_daemon()
    finally:
        os.umask(before)
    with Client(daemon.socket) as client:
        client.attach(UID)
        for kind, maker in MAKERS.items():
            maker(client, ROOT, kind.encode(), 0o666, GID)
            assert stat.S_IMODE((export / kind).lstat().st_mode) == 0o666


@pytest.mark.threat("t_acl_default")
@pytest.mark.parametrize("mode", [0o666, 0o600, 0o444])
def test_default_acl_of_the_host(user: Client, export: Path, mode: int) -> None:
    """As on a local file system: the ACL takes the place of the umask, the mode limits it."""
    acl = b"".join(
        [
            (2).to_bytes(4, "little"),
            b"\x01\0\x07\0\xff\xff\xff\xff",  # user::rwx
            b"\x02\0\x06\0\x39\x05\0\0",  # user:1337:rw-
            b"\x04\0\x05\0\xff\xff\xff\xff",  # group::r-x
            b"\x10\0\x07\0\xff\xff\xff\xff",  # mask::rwx
            b"\x20\0\x00\0\xff\xff\xff\xff",  # other::---
        ]
    )
    (export / "d").mkdir()
    os.setxattr(export / "d", "system.posix_acl_default", acl)
    user.walk(USER, 1, b"d")
    make_file(user, 1, b"guest", mode, 0)
    os.close(os.open(export / "d/host", os.O_CREAT | os.O_RDWR, mode))
    for name in ("system.posix_acl_access",):
        assert os.getxattr(export / "d/guest", name) == os.getxattr(export / "d/host", name)
    assert (export / "d/guest").stat().st_mode == (export / "d/host").stat().st_mode


@pytest.mark.threat("t_create_atomic")
def test_never_another_owner_for_a_moment(user: Client, export: Path) -> None:
    """A process of the host looks as fast as it can: each new name is right from the start."""
    (export / "d").mkdir()
    script = """
import os, sys
directory = os.open(sys.argv[1], os.O_RDONLY)
seen, wrong = 0, set()
print("watching", flush=True)
os.set_blocking(0, False)
while True:
    for name in os.listdir(directory):
        try:
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            continue
        seen += 1
        if (info.st_uid, info.st_gid, info.st_mode & 0o7777) != (4321, 8765, 0o1751):
            wrong.add((info.st_uid, info.st_gid, oct(info.st_mode)))
    try:
        if os.read(0, 1) == b"":
            break
    except BlockingIOError:
        pass
print(seen > 0, wrong)
"""
    user.walk(USER, 1, b"d")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(export / "d")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdin is not None
        assert watcher.stdout.readline() == "watching\n"
        for number in range(300):
            for kind, maker in MAKERS.items():
                maker(user, 1, b"%s%d" % (kind.encode(), number), 0o1751, GID)
        watcher.stdin.close()
        assert watcher.stdout.read() == "True set()\n"


# Without privileges


@pytest.fixture
def as_user(
    start_daemon: StartDaemon, other_user: tuple[str, ...], export: Path
) -> Iterator[Callable[..., Client]]:
    """Start a daemon that runs as user and group 4321; a client on it, attached as ``uid``."""
    os.chown(export, UID, UID)
    with ExitStack() as stack:

        def start(*arguments: str, uid: int = UID) -> Client:
            daemon = start_daemon(
                "--security-model", "passthrough", *arguments, launcher=other_user
            )
            client = stack.enter_context(Client(daemon.socket))
            client.attach(uid)
            return client

        yield start


def test_passthrough_without_privileges(as_user: Callable[..., Client], export: Path) -> None:
    """Its own user can work; nobody else can, rather than getting a file with a wrong owner."""
    client = as_user()
    make_file(client, ROOT, b"mine", 0o640, UID)
    info = (export / "mine").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (UID, UID, 0o640)
    assert client.error(Tmkdir(ROOT, b"d", 0o755, GID)) == "EPERM"
    client.rpc(Tattach(1, NOFID, b"", b"", 0))
    assert client.error(Tmkdir(1, b"d", 0o755, 0)) == "EPERM"
    assert os.listdir(export) == ["mine"]


def test_model_none_without_privileges(as_user: Callable[..., Client], export: Path) -> None:
    client = as_user("--security-model", "none", uid=0)
    for kind, maker in MAKERS.items():
        maker(client, ROOT, kind.encode(), 0o750, 0)
        info = (export / kind).lstat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (UID, UID, 0o750)


def test_write_only_file_of_an_unprivileged_daemon(
    as_user: Callable[..., Client], export: Path
) -> None:
    """git's objects: created with mode 0444, written through the descriptor that created them."""
    client = as_user()
    client.create(ROOT, 1, b"f", mode=0o444, flags=0x40 | 0x80 | 1, gid=UID)
    client.write(1, 0, b"text")
    assert (export / "f").read_text() == "text"
    assert client.getattr(1).size == 4


def test_truncation_by_an_open_fid_of_an_unprivileged_daemon(
    as_user: Callable[..., Client], export: Path
) -> None:
    client = as_user()
    client.create(ROOT, 1, b"f", mode=0o400, gid=UID)
    client.write(1, 0, b"text")
    client.rpc(Tsetattr(1, int(SetattrValid.SIZE), 0, 0, 0, 1, 0, 0, 0, 0))
    assert (export / "f").stat().st_size == 1


def test_noatime_where_it_is_not_allowed(as_user: Callable[..., Client], export: Path) -> None:
    (export / "f").write_text("text")  # root's
    (export / "f").chmod(0o644)
    client = as_user()
    client.open(ROOT, 1, b"f", flags=0x40000)
    assert client.read(1, 0, 10) == b"text"


# Which file is which


def test_hard_links_are_one_file(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "f").write_text("")
    os.link(export / "f", export / "d/g")
    (first,) = client.walk(ROOT, 1, b"f")
    (_, second) = client.walk(ROOT, 2, b"d", b"g")
    assert first == second
    assert client.getattr(1).gen == client.getattr(2).gen


def test_held_inode_is_not_recycled(client: Client, export: Path, mount_ext4: Mount) -> None:
    """While a fid holds the file, no new file can have its number."""
    mount_ext4(export / "m")
    (export / "m/f").write_text("")
    (_, held) = client.walk(ROOT, 1, b"m", b"f")
    (export / "m/f").unlink()
    client.walk(ROOT, 2, b"m")
    for number in range(200):
        client.create(2, 3, b"g%d" % number)
        assert client.getattr(3).qid.path != held.path
        client.clunk(3)
    assert client.getattr(1).nlink == 0


@pytest.mark.threat("t_inode_recycle")
def test_recycled_inode_is_another_file(client: Client, export: Path, mount_ext4: Mount) -> None:
    """ext4 gives the number to the very next file: then the generation tells them apart."""
    mount_ext4(export / "m")
    client.walk(ROOT, 1, b"m")
    seen: set[tuple[int, int]] = set()
    paths = set()
    for number in range(50):
        client.create(1, 2, b"f")
        found = client.getattr(2)
        paths.add(found.qid.path)
        seen.add((found.qid.path, found.gen))
        client.clunk(2)
        (export / "m/f").unlink()
        assert len(seen) == number + 1
    assert len(paths) < 50, "the file system recycled nothing: the test shows nothing"


@pytest.mark.threat("t_submount", "t_qid_stable")
def test_colliding_inode_numbers(client: Client, export: Path, mount_ext4: Mount) -> None:
    """Two file systems made alike have the same numbers; the guest sees different files."""
    mount_ext4(export / "a")
    mount_ext4(export / "b")
    for name in ("a", "b"):
        (export / name / "f").write_text("")
        os.link(export / name / "f", export / name / "g")
    assert (export / "a/f").stat().st_ino == (export / "b/f").stat().st_ino
    (a, in_a) = client.walk(ROOT, 1, b"a", b"f")
    (b, in_b) = client.walk(ROOT, 2, b"b", b"f")
    root = client.getattr(ROOT).qid
    assert len({root.path, a.path, b.path, in_a.path, in_b.path}) == 5
    assert client.walk(ROOT, 3, b"a", b"g")[1] == in_a
    client.rpc(Tversion(8192, b"9P2000.L"))
    client.rpc(Tattach(ROOT, NOFID, b"", b"", 0))
    assert client.walk(ROOT, 1, b"a", b"f") == (a, in_a)
    assert client.walk(ROOT, 2, b"b", b"f") == (b, in_b)


@pytest.mark.threat("t_qid_stable")
def test_numbers_are_the_same_after_a_restart(
    start_daemon: StartDaemon, export: Path, mount: Mount
) -> None:
    mount(export / "m", "-t", "tmpfs", "none")
    (export / "m/f").write_text("")
    (export / "f").write_text("")
    seen = []
    for order in ((b"m", b"f"), (b"f",), (b"m", b"f")):
        with Client(start_daemon().socket) as client:
            client.attach()
            client.walk(ROOT, 1, *order)
            seen.append((client.walk(ROOT, 2, b"m", b"f"), client.walk(ROOT, 3, b"f")))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.threat("t_submount")
def test_bind_mount_shows_the_same_file(client: Client, export: Path, mount: Mount) -> None:
    """One inode, two places: one qid."""
    (export / "d").mkdir()
    (export / "d/f").write_text("")
    mount(export / "m", "--bind", export / "d")
    (_, first) = client.walk(ROOT, 1, b"d", b"f")
    (_, second) = client.walk(ROOT, 2, b"m", b"f")
    assert first == second


def test_dotdot_of_a_mount_below(client: Client, export: Path, mount: Mount) -> None:
    mount(export / "m", "-t", "tmpfs", "none")
    (export / "m/d").mkdir()
    root = client.getattr(ROOT).qid
    (_, _, up, top) = client.walk(ROOT, 1, b"m", b"d", b"..", b"..")
    assert top.path == root.path
    assert up.path == client.walk(ROOT, 2, b"m")[0].path


@pytest.mark.threat("t_magic")
def test_magic_links_of_a_mounted_procfs(
    start_daemon: StartDaemon, export: Path, mount: Mount
) -> None:
    """Even there no link leads out of the export."""
    mount(export / "proc", "-t", "proc", "none")
    daemon = start_daemon("--allow-kernel-filesystems")
    with Client(daemon.socket) as client:
        client.attach()
        _follow_magic_links(client)


def _follow_magic_links(client: Client) -> None:
    for names in ((b"proc", b"self", b"root", b"etc"), (b"proc", b"1", b"root", b"etc")):
        try:
            reply = client.rpc(Twalk(ROOT, 1, names))
        except OSError:
            continue
        assert len(reply.qids) < len(names)
        assert client.error(Tgetattr(1, 0)) == "ENOENT"


@pytest.mark.threat("t_rename_storm", "t_dotdot_storm")
def test_many_threads_of_a_host_beside_one_guest(client: Client, export: Path) -> None:
    """Walks during a rename storm on the host find the file or ENOENT, never anything else."""
    for name in ("a", "b"):
        (export / name / "x/y").mkdir(parents=True)
        (export / name / "x/y/f").write_text(name)
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            os.rename(export / "a", export / "c")
            os.rename(export / "b", export / "a")
            os.rename(export / "c", export / "b")

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        found = 0
        for _ in range(2000):
            reply = None
            try:
                reply = client.rpc(Twalk(ROOT, 1, (b"a", b"x", b"y", b"..", b"y", b"f")))
            except OSError as error:
                assert error.errno in {2, 11}  # noqa: PT017 - in a loop
            if reply is not None and len(reply.qids) == 6:
                found += 1
                client.rpc(Tclunk(1))
        assert found
    finally:
        stop.set()
        thread.join()
