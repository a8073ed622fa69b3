"""mapped-xattr: which extended attributes mean what, and who may see them."""

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.p9.messages import NOFID, Tattach, Txattrwalk
from tests.conftest import OTHER_USER, Mount, StartDaemon
from tests.support.client import ROOT, Client, P9Error
from tests.support.mapped import KINDS, make

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
ACL = struct.pack("<I", 2) + b"".join(
    [struct.pack("<HHI", *entry, 0xFFFFFFFF) for entry in ((1, 7), (4, 5), (0x20, 0))]
)
USER = 50


@pytest.fixture
def client(
    start_daemon: StartDaemon, export: Path, other_user: tuple[str, ...]
) -> Iterator[Client]:
    """Of a daemon without privileges; fid 1 is a file of the guest's root, 50 a user's attach."""
    os.chown(export, OTHER_USER, OTHER_USER)
    daemon = start_daemon("--security-model", "mapped-xattr", launcher=other_user)
    with Client(daemon.socket) as client:
        client.attach()
        client.rpc(Tattach(USER, NOFID, b"", b"", 1000))
        client.create(ROOT, 1, b"file", mode=0o2775)
        client.clunk(1)
        client.walk(ROOT, 1, b"file")
        yield client


def refused(client: Client, name: bytes, value: bytes, flags: int = 0) -> str:
    with pytest.raises(P9Error) as caught:
        client.set_xattr(1, name, value, flags)
    return os.strerror(caught.value.errno or 0)


@pytest.mark.threat("t_virtfs_xattr")
@pytest.mark.parametrize(
    "name",
    [
        b"uid",
        b"mode",
        b"rdev",
        b"anything",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ],
)
def test_forging(client: Client, export: Path, name: bytes) -> None:
    before = {n: os.getxattr(export / "file", n) for n in os.listxattr(export / "file")}
    full = b"user.virtfs." + name
    assert client.error(Txattrwalk(1, 2, full)) == "ENODATA"
    assert refused(client, full, b"\0\0\0\0") == "Permission denied"
    assert refused(client, full, b"", 2) == "Permission denied"
    assert client.get_xattr(1, b"") == b""
    after = {n: os.getxattr(export / "file", n) for n in os.listxattr(export / "file")}
    assert after == before
    assert set(before) == {"user.virtfs.uid", "user.virtfs.gid", "user.virtfs.mode"}


def test_names_that_only_look_alike(client: Client) -> None:
    for name in (b"user.virtfs", b"user.virtfsx.uid", b"user.Virtfs.uid"):
        client.set_xattr(1, name, b"x")
        assert client.get_xattr(1, name) == b"x"


@pytest.mark.threat("t_acl_list")
def test_acls(client: Client, export: Path) -> None:
    for name in (ACCESS, DEFAULT):
        assert client.error(Txattrwalk(1, 2, name)) == "ENODATA"
        client.set_xattr(1, name, b"")  # removes what is not there
        client.set_xattr(1, name, ACL)
        assert client.get_xattr(1, name) == ACL
        assert os.getxattr(export / "file", b"user.virtfs." + name) == ACL
    client.set_xattr(1, b"user.mine", b"")
    assert client.get_xattr(1, b"") == ACCESS + b"\0" + DEFAULT + b"\0user.mine\0"
    assert not [name for name in os.listxattr(export / "file") if name.startswith("system.")]
    for name in (ACCESS, DEFAULT):
        client.set_xattr(1, name, b"")
        client.set_xattr(1, name, b"")
    assert client.get_xattr(1, b"") == b"user.mine\0"


@pytest.mark.threat("t_sgid")
def test_acl_of_somebody_outside_the_group(client: Client) -> None:
    client.set_xattr(1, ACCESS, ACL)
    assert client.getattr(1).mode == stat.S_IFREG | 0o2775
    client.walk(USER, 2, b"file")
    client.set_xattr(2, ACCESS, ACL)
    assert client.getattr(1).mode == stat.S_IFREG | 0o775


@pytest.mark.threat("t_acl_list")
def test_acls_of_the_host_are_its_own(
    start_daemon: StartDaemon, export: Path, mount_ext4: Mount
) -> None:
    top = mount_ext4(export / "m")
    (top / "f").write_text("")
    os.setxattr(top / "f", "user.mine", b"x")
    try:
        os.setxattr(top, ACCESS, ACL)
        os.setxattr(top / "f", ACCESS, ACL)
    except OSError:
        pytest.skip("no ACLs here")
    daemon = start_daemon("--security-model", "mapped-xattr", export=str(top))
    with Client(daemon.socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"f")
        assert client.get_xattr(1, b"") == b"user.mine\0"
        assert client.error(Txattrwalk(1, 2, ACCESS)) == "ENODATA"


@pytest.mark.parametrize("value", [b"", b"\1", b"\1\2\3", bytes(5), bytes(8)])
def test_values_of_another_size_mean_nothing(client: Client, export: Path, value: bytes) -> None:
    for name in ("uid", "gid", "mode", "rdev"):
        os.setxattr(export / "file", f"user.virtfs.{name}", value)
    os.setxattr(export / "file", "user.virtfs.rdev", bytes(4))
    found, host = client.getattr(1), (export / "file").stat()
    assert (found.uid, found.gid, found.mode) == (host.st_uid, host.st_gid, host.st_mode)
    assert found.rdev == 0


def test_creating_where_there_are_no_attributes(
    start_daemon: StartDaemon, export: Path, mount: Mount
) -> None:
    """Nothing is left of it."""
    top = mount(export / "m", "-t", "ramfs", "none")
    daemon = start_daemon("--security-model", "mapped-xattr", export=str(top))
    with Client(daemon.socket) as client:
        client.attach()
        for kind in KINDS:
            with pytest.raises(P9Error, match="not supported"):
                make(client, ROOT, kind, b"x", 0o700, 0)
        assert os.listdir(top) == []
