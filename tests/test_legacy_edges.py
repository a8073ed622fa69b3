"""9P2000.u and 9P2000 beside a host that changes things, and with strings that are no numbers."""

import errno
import os
from pathlib import Path

import pytest

from ninepd.p9.messages import NOFID, RerrorPlain, Tattach, Topen, Tversion, Twstat, encode
from ninepd.p9.stat import decode_stat, encode_stat
from tests.client import ROOT, Client, Daemon
from tests.conftest import Mount, StartDaemon
from tests.test_legacy import DIALECTS, NOTHING, attach


def listing(client: Client, fid: int, extended: bool) -> set[bytes]:
    """The names in a directory, which the fid is then open on."""
    client.rpc(Topen(fid, 0))
    found, offset = set(), 0
    while data := client.read(fid, offset, 4096):
        offset += len(data)
        while data:
            size = 2 + int.from_bytes(data[:2], "little")
            found.add(decode_stat(data[:size], extended).name)
            data = data[size:]
    return found


@pytest.mark.parametrize("version", DIALECTS)
def test_rename_after_the_host_moved_the_file(daemon: Daemon, export: Path, version: bytes) -> None:
    """It gets its new name where it is now."""
    for name in ("old", "new"):
        (export / name).mkdir()
    (export / "old" / "f").write_text("moved")
    with Client(daemon.socket) as client:
        attach(client, version)
        client.walk(ROOT, 1, b"old", b"f")
        (export / "old" / "f").rename(export / "new" / "f")
        (export / "old" / "f").write_text("another")
        new = encode_stat(NOTHING._replace(name=b"g"), version == b"9P2000.u")
        client.rpc(Twstat(1, new))
    assert os.listdir(export / "old") == ["f"]
    assert (export / "old" / "f").read_text() == "another"
    assert os.listdir(export / "new") == ["g"]
    assert (export / "new" / "g").read_text() == "moved"


def test_user_name_of_5000_digits(daemon: Daemon, export: Path) -> None:
    """More than Python makes a number of."""
    refusal = encode(1, RerrorPlain(os.strerror(errno.EINVAL).encode()))
    with Client(daemon.socket) as client:
        client.rpc(Tversion(16384, b"9P2000"))
        before = daemon.descriptors()
        for number in range(20):
            (export / f"{number}").mkdir()
            request = encode(1, Tattach(number, NOFID, b"9" * 5000, b"%d" % number, 0))
            assert client.exchange(request) == refusal
        assert daemon.descriptors() == before
        client.rpc(Tattach(ROOT, NOFID, b"4294967294", b"", 0))


@pytest.mark.parametrize("version", DIALECTS)
def test_forbidden_mounts_are_not_listed(
    start_daemon: StartDaemon, export: Path, mount: Mount, version: bytes
) -> None:
    (export / "f").touch()
    mount(export / "m", "-t", "tmpfs", "none")
    with Client(start_daemon("--multidevs", "forbid").socket) as client:
        attach(client, version)
        client.walk(ROOT, 1)
        assert listing(client, 1, version == b"9P2000.u") == {b"f"}
