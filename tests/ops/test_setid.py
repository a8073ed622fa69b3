"""Setuid and setgid bits: the server takes them away, whatever the guest's kernel does."""

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ninepd.p9.messages import NOFID, SetattrValid, Tattach, Tlcreate, Tmknod, Tsetattr
from tests.conftest import Mount
from tests.support.client import ROOT, Client

pytestmark = pytest.mark.usefixtures("as_root")

UID, FOREIGN = 1000, 4321
USER = 50  # the fid of that user's attach
NO_SIZE, SIZE, MODE = 0, int(SetattrValid.SIZE), int(SetattrValid.MODE)


@pytest.fixture
def user(client: Client) -> Client:
    """Fid 50 is the root of the export for the guest's user 1000."""
    client.rpc(Tattach(USER, NOFID, b"", b"", UID))
    return client


@pytest.fixture
def program(export: Path) -> Path:
    """Of another user and group, and it runs as these."""
    path = export / "program"
    path.write_text("text")
    os.chown(path, FOREIGN, FOREIGN)
    path.chmod(0o6755)
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def change(fid: int, valid: int, mode: int = 0, size: int = 0) -> Tsetattr:
    return Tsetattr(fid, valid, mode, 0, 0, size, 0, 0, 0, 0)


def write(client: Client, root: int) -> None:
    client.open(root, 1, b"program", flags=1)
    client.write(1, 0, b"mine")


def write_through(client: Client, root: int) -> None:
    client.open(root, 1, b"program", flags=1 | 0x1000)
    client.write(1, 0, b"mine")


def truncate(client: Client, root: int) -> None:
    client.walk(root, 1, b"program")
    client.rpc(change(1, SIZE, size=1))


def truncate_open(client: Client, root: int) -> None:
    client.open(root, 1, b"program", flags=1)
    client.rpc(change(1, SIZE, size=1))


def open_truncating(client: Client, root: int) -> None:
    client.open(root, 1, b"program", flags=1 | 0x200)


def create_over(client: Client, root: int) -> None:
    client.walk(root, 1)
    client.rpc(Tlcreate(1, b"program", 0x42 | 0x200, 0o644, UID))


WAYS = (write, write_through, truncate, truncate_open, open_truncating, create_over)


@pytest.mark.threat("t_suid")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("root", "left"), [(USER, 0o755), (ROOT, 0o6755)])
def test_change_of_a_program(
    user: Client, program: Path, way: Callable[[Client, int], None], root: int, left: int
) -> None:
    way(user, root)
    assert mode_of(program) == left
    # ... and the thread goes on as whoever comes next
    program.chmod(0o6755)
    user.open(ROOT, 2, b"program", flags=1)
    user.write(2, 0, b"root")
    assert mode_of(program) == 0o6755
    user.open(USER, 3, b"program", flags=1)
    user.write(3, 0, b"mine")
    assert mode_of(program) == 0o755


def test_reading_changes_nothing(user: Client, program: Path) -> None:
    user.open(USER, 1, b"program")
    user.read(1, 0, 10)
    assert mode_of(program) == 0o6755


@pytest.mark.parametrize("mode", [0o2775, 0o2664, 0o4755])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_mode_is_what_the_guest_says(user: Client, export: Path, kind: str, mode: int) -> None:
    """Whether the user is in the group, only the guest's kernel knows, and it has asked."""
    path = export / "f"
    path.touch() if kind == "file" else path.mkdir()
    os.chown(path, UID, FOREIGN)
    user.walk(USER, 1, b"f")
    user.rpc(change(1, MODE, mode=mode))
    assert mode_of(path) == mode


@pytest.mark.threat("t_sgid")
@pytest.mark.parametrize(("root", "left"), [(USER, 0o775), (ROOT, 0o2775)])
def test_created_in_a_setgid_directory(user: Client, export: Path, root: int, left: int) -> None:
    """The guest sends the directory's group, as it has to."""
    (export / "d").mkdir()
    os.chown(export / "d", 0, FOREIGN)
    (export / "d").chmod(0o2777)
    user.walk(root, 1, b"d")
    user.walk(1, 2)
    user.rpc(Tlcreate(2, b"f", 0x42, 0o2775, FOREIGN))
    user.rpc(Tmknod(1, b"node", stat.S_IFREG | 0o2775, 0, 0, FOREIGN))
    for name in ("f", "node"):
        assert mode_of(export / "d" / name) == left
        assert (export / "d" / name).stat().st_gid == FOREIGN


def test_what_is_created_does_not_depend_on_what_was_written_before(
    user: Client, program: Path, export: Path
) -> None:
    (export / "d").mkdir()
    os.chown(export / "d", 0, FOREIGN)
    (export / "d").chmod(0o2777)
    user.walk(ROOT, 2, b"d")
    for name in (b"before", b"after"):
        user.walk(2, 3)
        user.rpc(Tlcreate(3, name, 0x42, 0o2775, 0))
        assert mode_of(export / "d" / name.decode()) == 0o2775
        write(user, USER)
        user.clunk(1, 3)


@pytest.mark.threat("t_sgid")
@pytest.mark.parametrize(("root", "left"), [(USER, 0o775), (ROOT, 0o2775)])
def test_acl(user: Client, export: Path, mount_ext4: Mount, root: int, left: int) -> None:
    """As setting a mode, which it is."""
    mount_ext4(export / "m", "-O", "^has_journal")
    path = export / "m/f"
    path.write_text("")
    os.chown(path, UID, FOREIGN)
    path.chmod(0o2775)
    entries = ((0x01, 7, 0xFFFFFFFF), (0x04, 7, 0xFFFFFFFF), (0x20, 5, 0xFFFFFFFF))
    acl = struct.pack("<I", 2) + b"".join([struct.pack("<HHI", *entry) for entry in entries])
    user.walk(root, 1, b"m", b"f")
    user.set_xattr(1, b"system.posix_acl_access", acl)
    assert mode_of(path) == left


CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""CAP_NET_BIND_SERVICE as linux/capability.h has it, revision 2."""


def other_owner(client: Client, root: int) -> None:
    client.walk(root, 1, b"program")
    client.rpc(Tsetattr(1, int(SetattrValid.UID), 0, 7, 0, 0, 0, 0, 0, 0))


@pytest.mark.threat("t_filecap")
@pytest.mark.parametrize("way", [*WAYS, other_owner])
@pytest.mark.parametrize("root", [USER, ROOT])
@pytest.mark.parametrize("by_guest", [True, False])
def test_capabilities_of_a_program_that_is_changed(
    user: Client, program: Path, way: Callable[[Client, int], None], root: int, by_guest: bool
) -> None:
    """They go, for root as well: whoever has replaced the program has not been trusted."""
    if by_guest:
        user.walk(ROOT, 9, b"program")
        user.set_xattr(9, b"security.capability", CAPABILITY)
    else:
        os.setxattr(program, "security.capability", CAPABILITY)
    user.open(root, 2, b"program")
    user.read(2, 0, 10)
    assert "security.capability" in os.listxattr(program)
    way(user, root)
    assert "security.capability" not in os.listxattr(program)
