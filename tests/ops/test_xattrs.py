"""Txattrwalk and Txattrcreate: extended attributes, as a Linux guest's system calls use them."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    XATTR_CREATE,
    XATTR_REPLACE,
    Tclunk,
    Tgetattr,
    Tread,
    Tunlinkat,
    Tversion,
    Twrite,
    Txattrcreate,
    Txattrwalk,
)
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client, P9Error

ACCESS = b"system.posix_acl_access"
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""CAP_NET_BIND_SERVICE as linux/capability.h has it, revision 2."""
DEFAULT = b"system.posix_acl_default"
ACL = b"".join(
    [
        (2).to_bytes(4, "little"),
        b"\x01\0\x06\0\xff\xff\xff\xff",  # user::rw-
        b"\x02\0\x04\0\x39\x05\0\0",  # user:1337:r--
        b"\x04\0\x04\0\xff\xff\xff\xff",  # group::r--
        b"\x10\0\x04\0\xff\xff\xff\xff",  # mask::r--
        b"\x20\0\x00\0\xff\xff\xff\xff",  # other::---
    ]
)


@pytest.fixture
def file(client: Client, export: Path) -> Path:
    """A file on fid 1."""
    path = export / "f"
    path.write_text("text")
    client.walk(ROOT, 1, b"f")
    return path


@pytest.fixture
def wide(client: Client, export: Path, mount: Mount) -> Path:
    """The same on tmpfs, whose attributes may be as long as Linux allows."""
    mount(export / "m", "-t", "tmpfs", "none")
    path = export / "m/f"
    path.write_text("text")
    client.walk(ROOT, 1, b"m", b"f")
    try:
        os.setxattr(path, "user.probe", b"")
    except OSError:
        pytest.skip("tmpfs has no user attributes here")
    os.removexattr(path, "user.probe")
    return path


def remove(client: Client, fid: int, name: bytes) -> str:
    """As removexattr(2) in a Linux guest."""
    try:
        client.set_xattr(fid, name, b"", XATTR_REPLACE)
    except P9Error as error:
        return os.strerror(error.errno or 0)
    return ""


@pytest.mark.parametrize("value", [b"v", b"\0\xff\0", b"x" * 1000])
def test_set_and_get(client: Client, file: Path, value: bytes) -> None:
    client.set_xattr(1, b"user.name", value)
    assert os.getxattr(file, "user.name") == value
    assert client.get_xattr(1, b"user.name") == value


def test_absent(client: Client, file: Path) -> None:
    assert client.error(Txattrwalk(1, 2, b"user.none")) == "ENODATA"
    assert client.error(Tgetattr(2, 0)) == "ENOENT"
    assert client.error(Txattrwalk(1, 2, b"security.capability")) == "ENODATA"


def test_list(client: Client, file: Path) -> None:
    assert client.get_xattr(1, b"") == b""
    os.setxattr(file, "user.a", b"1")
    os.setxattr(file, "user.b", b"2")
    assert set(client.get_xattr(1, b"").split(b"\0")) == {b"user.a", b"user.b", b""}


def test_empty_value_is_not_a_removal(client: Client, file: Path) -> None:
    client.set_xattr(1, b"user.empty", b"")
    assert os.getxattr(file, "user.empty") == b""
    assert client.get_xattr(1, b"user.empty") == b""
    client.set_xattr(1, b"user.new", b"", XATTR_CREATE)
    assert os.getxattr(file, "user.new") == b""


def test_remove(client: Client, file: Path) -> None:
    os.setxattr(file, "user.name", b"v")
    assert remove(client, 1, b"user.name") == ""
    assert os.listxattr(file) == []
    assert remove(client, 1, b"user.name") == "No data available"


def test_create_and_replace(client: Client, file: Path) -> None:
    with pytest.raises(P9Error, match="No data"):
        client.set_xattr(1, b"user.a", b"v", XATTR_REPLACE)
    client.set_xattr(1, b"user.a", b"v", XATTR_CREATE)
    with pytest.raises(P9Error, match="File exists"):
        client.set_xattr(1, b"user.a", b"w", XATTR_CREATE)
    client.set_xattr(1, b"user.a", b"x", XATTR_REPLACE)
    assert os.getxattr(file, "user.a") == b"x"


def test_unknown_flags(client: Client, file: Path) -> None:
    assert client.error(Txattrcreate(1, b"user.a", 1, 4)) == "EINVAL"
    assert client.error(Txattrcreate(1, b"user.a", 1, 0x80000000)) == "EINVAL"


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 2000])
def test_values_of_all_sizes(client: Client, file: Path, size: int) -> None:
    value = os.urandom(size)
    os.setxattr(file, "user.sized", value)
    assert client.get_xattr(1, b"user.sized") == value


def test_value_of_64_kib(client: Client, wide: Path) -> None:
    value = os.urandom(65536)
    client.set_xattr(1, b"user.big", value)
    assert os.getxattr(wide, "user.big") == value
    assert client.get_xattr(1, b"user.big") == value


@pytest.mark.threat("t_xattr_offset")
@pytest.mark.parametrize("size", [65537, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_value_that_is_too_long(client: Client, file: Path, size: int) -> None:
    assert client.error(Txattrcreate(1, b"user.big", size, 0)) == "E2BIG"
    client.rpc(Txattrcreate(1, b"user.small", 1, 0))


@pytest.mark.threat("t_xattr_offset")
def test_incomplete_value_is_not_set(client: Client, file: Path) -> None:
    os.setxattr(file, "user.a", b"old value")
    client.walk(1, 2)
    client.rpc(Txattrcreate(2, b"user.a", 9, 0))
    client.write(2, 0, b"new")
    assert client.error(Tclunk(2)) == "EINVAL"
    assert client.error(Tclunk(2)) == "ENOENT"
    assert os.getxattr(file, "user.a") == b"old value"


@pytest.mark.threat("t_xattr_offset")
def test_writing_past_the_announced_size(client: Client, file: Path) -> None:
    client.rpc(Txattrcreate(1, b"user.a", 4, 0))
    assert client.error(Twrite(1, 0, 5), b"12345") == "ENOSPC"
    client.write(1, 0, b"12")
    assert client.error(Twrite(1, 2, 3), b"345") == "ENOSPC"
    assert client.error(Twrite(1, 3, 1), b"4") == "EINVAL"  # a gap
    assert client.error(Twrite(1, (1 << 64) - 1, 1), b"4") in {"EINVAL", "ENOSPC"}
    client.write(1, 2, b"34")
    client.clunk(1)
    assert os.getxattr(file, "user.a") == b"1234"


def test_written_parts_may_be_written_again(client: Client, file: Path) -> None:
    client.rpc(Txattrcreate(1, b"user.a", 4, 0))
    client.write(1, 0, b"1234")
    client.write(1, 1, b"xx")
    client.clunk(1)
    assert os.getxattr(file, "user.a") == b"1xx4"


def test_value_is_read_in_parts(client: Client, file: Path) -> None:
    os.setxattr(file, "user.a", b"0123456789")
    assert client.rpc(Txattrwalk(1, 2, b"user.a")).size == 10
    assert client.read(2, 0, 4) == b"0123"
    assert client.read(2, 4, 100) == b"456789"
    assert client.read(2, 10, 5) == b""
    assert client.read(2, 1 << 40, 5) == b""
    assert client.rpc(Tread(2, (1 << 64) - 1, 2**32 - 1)).nbytes == 0


def test_value_stays_as_it_was_walked(client: Client, file: Path) -> None:
    """Read once: a value that changes meanwhile is never seen half, nor beyond its end."""
    os.setxattr(file, "user.a", b"long value")
    client.rpc(Txattrwalk(1, 2, b"user.a"))
    os.setxattr(file, "user.a", b"x")
    assert client.read(2, 0, 100) == b"long value"


def test_reset_commits_nothing(client: Client, file: Path) -> None:
    client.rpc(Txattrcreate(1, b"user.a", 1, 0))
    client.write(1, 0, b"x")
    client.rpc(Tversion(8192, b"9P2000.L"))
    assert os.listxattr(file) == []


def test_new_fid_must_be_free(client: Client, file: Path) -> None:
    os.setxattr(file, "user.a", b"v")
    client.walk(ROOT, 2)
    assert client.error(Txattrwalk(1, 2, b"user.a")) == "EINVAL"
    assert client.error(Txattrwalk(1, 1, b"user.a")) == "EINVAL"
    assert client.error(Txattrwalk(1, 0xFFFFFFFF, b"user.a")) == "EINVAL"
    client.getattr(2)


@pytest.mark.threat("t_xattr_ns")
def test_bad_names(client: Client, file: Path) -> None:
    expected = {
        b"user.a\0b": "EINVAL",
        b"user." + b"x" * 251: "ERANGE",
        b"noprefix": "EOPNOTSUPP",
        b"system.x": "EOPNOTSUPP",
        b"/etc": "EOPNOTSUPP",
    }
    assert {name: client.error(Txattrwalk(1, 2, name)) for name in expected} == expected
    expected[b""] = "EINVAL"
    assert {name: client.error(Txattrcreate(1, name, 1, 0)) for name in expected} == expected
    longest = b"user." + b"x" * 250
    client.set_xattr(1, longest, b"v")
    assert client.get_xattr(1, b"") == longest + b"\0"


@pytest.mark.usefixtures("as_root")
def test_namespaces_of_passthrough(start_daemon: StartDaemon, file: Path) -> None:
    """Everything that the host's file system keeps, as overlayfs and setcap(8) need it."""
    with Client(start_daemon("--trusted-xattrs").socket) as client:
        client.attach()
        client.walk(ROOT, 1, os.fsencode(file.name))
        for name in (b"user.x", b"trusted.x", b"security.x", b"security.capability"):
            value = CAPABILITY if name == b"security.capability" else b"v"
            client.set_xattr(1, name, value)
            assert os.getxattr(os.fsencode(file), name) == value
            assert client.get_xattr(1, name) == value
        found = set(client.get_xattr(1, b"").split(b"\0"))
        assert {b"user.x", b"trusted.x", b"security.x", b"security.capability"} <= found


# With passthrough EPERM is the host's own answer, as for a local program.
@pytest.mark.threat("t_xattr_ns")
@pytest.mark.usefixtures("as_root")
def test_namespaces_that_need_no_rights_over_the_host(client: Client, file: Path) -> None:
    for name, value in ((b"user.x", b"v"), (b"security.capability", CAPABILITY)):
        client.set_xattr(1, name, value)
        assert os.getxattr(os.fsencode(file), name) == value
    for name in (b"trusted.x", b"security.x"):
        with pytest.raises(P9Error, match="not permitted"):
            client.set_xattr(1, name, b"v")


@pytest.mark.threat("t_xattr_ns")
@pytest.mark.usefixtures("as_root")
def test_namespaces_of_model_none(start_daemon: StartDaemon, export: Path) -> None:
    path = export / "f"
    path.write_text("")
    for name in ("user.x", "trusted.x", "security.x"):
        os.setxattr(path, name, b"v")
    with Client(start_daemon("--security-model", "none").socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"f")
        assert client.get_xattr(1, b"") == b"user.x\0"
        for refused in (b"trusted.x", b"security.x", ACCESS):
            assert client.error(Txattrwalk(1, 2, refused)) == "EOPNOTSUPP"
            assert client.error(Txattrcreate(1, refused, 1, 0)) == "EOPNOTSUPP"


def test_acl_round_trip(client: Client, file: Path) -> None:
    client.set_xattr(1, ACCESS, ACL)
    assert client.get_xattr(1, ACCESS) == ACL
    assert os.getxattr(file, ACCESS) == ACL
    assert ACCESS in client.get_xattr(1, b"").split(b"\0")


def test_acl_removal_is_size_zero(client: Client, file: Path) -> None:
    client.set_xattr(1, ACCESS, ACL)
    client.set_xattr(1, ACCESS, b"")
    assert client.error(Txattrwalk(1, 2, ACCESS)) == "ENODATA"
    client.set_xattr(1, ACCESS, b"")  # removing what is not there succeeds


def test_acl_that_is_none(client: Client, file: Path) -> None:
    with pytest.raises(P9Error):
        client.set_xattr(1, ACCESS, b"rubbish")
    with pytest.raises(P9Error):
        client.set_xattr(1, DEFAULT, ACL)  # on a file


@pytest.mark.threat("t_symlink_abs", "t_xattr_link")
def test_symlinks_have_their_own(client: Client, export: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    (export / "link").symlink_to(target)
    client.walk(ROOT, 1, b"link")
    with pytest.raises(P9Error, match="not permitted"):
        client.set_xattr(1, b"user.a", b"v")
    assert os.listxattr(target) == []


@pytest.mark.threat("t_xattr_link")
@pytest.mark.usefixtures("as_root")
def test_trusted_attributes_of_a_symlink(
    start_daemon: StartDaemon, export: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("")
    (export / "link").symlink_to(target)
    with Client(start_daemon("--trusted-xattrs").socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"link")
        client.set_xattr(1, b"trusted.a", b"v")
        assert os.getxattr(export / "link", "trusted.a", follow_symlinks=False) == b"v"
    assert os.listxattr(target) == []


def test_on_an_unlinked_file(client: Client, file: Path) -> None:
    client.open(1, 3, flags=2)
    client.rpc(Tunlinkat(ROOT, b"f", 0))
    client.set_xattr(3, b"user.a", b"v")
    assert client.get_xattr(1, b"user.a") == b"v"
    assert client.get_xattr(3, b"") == b"user.a\0"


@pytest.mark.threat("t_xattr_flood")
@pytest.mark.parametrize(("options", "most"), [((), 1024), (("--xattrs-max", "16"), 16)])
def test_too_many_at_once(
    start_daemon: StartDaemon, file: Path, options: tuple[str, ...], most: int
) -> None:
    """A guest cannot pin values without end; QEMU's max_xattr has the same limit and errno."""
    os.setxattr(file, "user.a", b"v")
    with Client(start_daemon(*options).socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"f")
        for fid in range(1000, 1000 + most):
            client.rpc(Txattrwalk(1, fid, b"user.a"))
        assert client.error(Txattrwalk(1, 5000, b"user.a")) == "ENOSPC"
        assert client.error(Txattrcreate(1, b"user.b", 1, 0)) == "ENOSPC"
        client.clunk(1000)
        client.rpc(Txattrwalk(1, 5000, b"user.a"))
        client.attach()
        client.walk(ROOT, 1, b"f")
        client.rpc(Txattrwalk(1, 5000, b"user.a"))


@pytest.mark.threat("t_xattr_shrink")
def test_value_changed_by_the_host_in_a_loop(client: Client, wide: Path) -> None:
    """However the value grows and shrinks, what is read was the value at some time."""
    script = """
import os, sys
while True:
    for byte, size in ((b"a", 10), (b"b", 60000), (b"c", 100)):
        os.setxattr(sys.argv[1], "user.a", byte * size)
"""
    os.setxattr(wide, "user.a", b"a" * 10)
    process = subprocess.Popen([sys.executable, "-c", script, wide])
    try:
        for _ in range(500):
            value = client.get_xattr(1, b"user.a")
            assert value in (b"a" * 10, b"b" * 60000, b"c" * 100)
    finally:
        process.kill()
        process.wait()
