"""9P2000.u and 9P2000 beside a host that changes things, and with strings that are no numbers."""

import errno
import os
from pathlib import Path

import pytest

from ninepd.p9.messages import NOFID, RerrorPlain, Tattach, Topen, Tversion, Twstat, encode
from ninepd.p9.stat import decode_stat, encode_stat
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client, Daemon
from tests.support.legacy import DIALECTS, NOTHING, attach, stat_of


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


def test_name_after_the_host_moved_the_file(daemon: Daemon, export: Path) -> None:
    """Tstat shows the name that it is known by; a Twstat finds out the one it has."""
    (export / "f").write_text("")
    with Client(daemon.socket) as client:
        attach(client, b"9P2000.u")
        client.walk(ROOT, 1, b"f")
        (export / "f").rename(export / "g")
        assert stat_of(client, 1, True).name == b"f"
        client.rpc(Twstat(1, encode_stat(NOTHING._replace(name=b"g"), True)))
        assert stat_of(client, 1, True).name == b"g"
    assert os.listdir(export) == ["g"]


def test_the_root_of_an_attach_has_no_name(daemon: Daemon, export: Path) -> None:
    """Nor have its clones; the same directory found by its name has."""
    (export / "d" / "e").mkdir(parents=True)
    with Client(daemon.socket) as client:
        attach(client, b"9P2000.u")
        client.rpc(Tattach(1, NOFID, b"", b"d/e", 0))
        client.walk(1, 2)
        client.walk(ROOT, 3, b"d", b"e")
        client.walk(1, 4)
        client.walk(4, 4, b".")
        names = [stat_of(client, fid, True).name for fid in (ROOT, 1, 2, 3, 4)]
    assert names == [b"/", b"/", b"/", b"e", b"e"]


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
