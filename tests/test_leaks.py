"""Whatever a guest asks for again and again, served or refused, leaves nothing behind."""

import re
import stat
from pathlib import Path
from typing import Any

import pytest

from ninepd.export.mapped_file import REMEMBERED_MAX
from ninepd.p9 import messages as p9
from ninepd.p9.messages import LockType, SetattrValid
from ninepd.p9.stat import UNTOUCHED_32, UNTOUCHED_64, LegacyStat, encode_stat
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, P9Error

FILE, LINK, OPENED, DIRECTORY, NEW, MISSING = 1, 2, 3, 4, 5, 99
EVERY_FIELD = int(SetattrValid.MODE | SetattrValid.MTIME | SetattrValid.CTIME | SetattrValid.SIZE)
WARM, ROUNDS, PERIODS = 40, 60, 4
GROWTH_MAX = ROUNDS << 10
"""Bytes: one KiB for each round."""


def stat_with(name: bytes) -> bytes:
    nothing = LegacyStat(
        p9.Qid(0xFF, UNTOUCHED_32, UNTOUCHED_64), UNTOUCHED_32, UNTOUCHED_32, UNTOUCHED_32,
        UNTOUCHED_64, name, b"", b"", b"",
    )  # fmt: skip
    return encode_stat(nothing, extended=True)


def served() -> list[Any]:
    """One of each message; in the end all is as it was before."""
    return [
        p9.Tattach(NEW, p9.NOFID, b"user", b"d", 1000),
        p9.Tclunk(NEW),
        p9.Tgetattr(FILE, 0x3FFF),
        p9.Tsetattr(FILE, EVERY_FIELD, 0o600, 0, 0, 3, 0, 0, 0, 0),
        p9.Tstatfs(FILE),
        p9.Treadlink(LINK),
        p9.Tread(OPENED, 0, 1000),
        (p9.Twrite(OPENED, 0, 1000), bytes(1000)),
        p9.Tfsync(OPENED, 1),
        p9.Tlock(OPENED, LockType.WRLCK, 0, 5, 10, 1, b"guest"),
        p9.Tgetlock(OPENED, LockType.WRLCK, 0, 0, 2, b"guest"),
        p9.Tlock(OPENED, LockType.UNLCK, 0, 0, 0, 1, b"guest"),
        p9.Treaddir(DIRECTORY, 0, 4000),
        p9.Twalk(ROOT, NEW, (b"d", b"..", b"f")),
        p9.Tlopen(NEW, 2),
        p9.Tclunk(NEW),
        p9.Twalk(ROOT, NEW, ()),
        p9.Tlcreate(NEW, b"new", 0x42, 0o600, 0),
        p9.Tremove(NEW),
        p9.Tmkdir(ROOT, b"new", 0o700, 0),
        p9.Trenameat(ROOT, b"new", ROOT, b"other"),
        p9.Tunlinkat(ROOT, b"other", 0x200),
        p9.Tsymlink(ROOT, b"new", b"target", 0),
        p9.Tunlinkat(ROOT, b"new", 0),
        p9.Tmknod(ROOT, b"new", stat.S_IFIFO | 0o600, 0, 0, 0),
        p9.Twalk(ROOT, NEW, (b"new",)),
        p9.Trename(NEW, ROOT, b"other"),
        p9.Tremove(NEW),
        p9.Tlink(ROOT, FILE, b"new"),
        p9.Tunlinkat(ROOT, b"new", 0),
        p9.Twalk(FILE, NEW, ()),
        p9.Txattrcreate(NEW, b"user.x", 4, 0),
        (p9.Twrite(NEW, 0, 4), b"text"),
        p9.Tclunk(NEW),
        p9.Txattrwalk(FILE, NEW, b"user.x"),
        p9.Tread(NEW, 0, 100),
        p9.Tclunk(NEW),
        p9.Txattrwalk(FILE, NEW, b""),
        p9.Tclunk(NEW),
        p9.Tflush(7),
    ]


def refused() -> list[Any]:
    return [
        p9.Tattach(ROOT, p9.NOFID, b"", b"", 0),
        p9.Tattach(NEW, p9.NOFID, b"", b"d/missing", 0),
        p9.Tattach(NEW, p9.NOFID, b"", b"link/x", 0),
        p9.Tauth(NEW, b"", b"", 0),
        p9.Twalk(ROOT, NEW, (b"missing",)),
        p9.Twalk(ROOT, FILE, (b"d",)),
        p9.Twalk(LINK, NEW, (b"x",)),
        p9.Tlopen(LINK, 0),
        p9.Tlopen(OPENED, 0),
        p9.Tlcreate(FILE, b"x", 0x42, 0o600, 0),
        p9.Tread(FILE, 0, 10),
        p9.Tread(OPENED, 1 << 63, 10),
        (p9.Twrite(FILE, 0, 4), b"text"),
        (p9.Twrite(OPENED, 0, 100), b"text"),
        p9.Treaddir(OPENED, 0, 100),
        p9.Treaddir(DIRECTORY, 0, 1),
        p9.Treadlink(FILE),
        p9.Tmkdir(ROOT, b"d", 0o700, 0),
        p9.Tmkdir(FILE, b"x", 0o700, 0),
        p9.Tsymlink(ROOT, b"f", b"x", 0),
        p9.Tmknod(ROOT, b"f", stat.S_IFIFO, 0, 0, 0),
        p9.Tlink(ROOT, FILE, b"f"),
        p9.Tlink(ROOT, 4, b"new"),
        p9.Trename(FILE, ROOT, b"d"),
        p9.Trename(ROOT, ROOT, b"x"),
        p9.Trenameat(ROOT, b"f", ROOT, b"d"),
        p9.Tunlinkat(ROOT, b"d", 0),
        p9.Tunlinkat(ROOT, b"missing", 0),
        p9.Tsetattr(FILE, 8, 0, 0, 0, 1 << 63, 0, 0, 0, 0),
        p9.Tsetattr(LINK, 1, 0o600, 0, 0, 0, 0, 0, 0, 0),
        p9.Txattrwalk(FILE, NEW, b"user.none"),
        p9.Txattrwalk(FILE, FILE, b"user.x"),
        p9.Txattrcreate(FILE, b"system.x", 4, 0),
        p9.Txattrcreate(FILE, b"user.x", 1 << 40, 0),
        p9.Tlock(FILE, LockType.WRLCK, 0, 0, 0, 1, b"guest"),
        p9.Tlock(OPENED, LockType.WRLCK, 0, 1 << 63, 1 << 63, 1, b"guest"),
        p9.Tclunk(MISSING),
        p9.Tremove(MISSING),
    ]


LEGACY_SERVED = [
    p9.Tstat(FILE),
    p9.Twstat(FILE, stat_with(b"")),
    p9.Twstat(FILE, stat_with(b"other")),
    p9.Twstat(FILE, stat_with(b"f")),
    p9.Twalk(ROOT, NEW, ()),
    p9.Tcreate(NEW, b"new", 0o600, 2),
    p9.Tremove(NEW),
    p9.Twalk(ROOT, NEW, (b"f",)),
    p9.Topen(NEW, 2),
    p9.Tclunk(NEW),
]
LEGACY_REFUSED = [
    p9.Twstat(FILE, stat_with(b"d")),
    p9.Twstat(FILE, b"rubbish"),
    p9.Tcreate(FILE, b"x", 0o600, 2),
    p9.Topen(LINK, 0),
    p9.Tstat(MISSING),
]


def anonymous(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"RssAnon:\s*(\d+) kB", status)
    assert found
    return int(found[1]) << 10


def rounds(client: Client, count: int, good: list[Any], bad: list[Any]) -> None:
    for _ in range(count):
        for request in good:
            message, data = request if type(request) is tuple else (request, b"")
            client.rpc(message, data)
        for request in bad:
            message, data = request if type(request) is tuple else (request, b"")
            with pytest.raises(P9Error):
                client.rpc(message, data)


@pytest.mark.threat("t_leak")
@pytest.mark.parametrize("model", ["none", "mapped-xattr", "mapped-file"])
@pytest.mark.parametrize("dialect", [b"9P2000.L", b"9P2000.u"])
def test_nothing_grows(start_daemon: StartDaemon, export: Path, model: str, dialect: bytes) -> None:
    (export / "f").write_text("text")
    (export / "d").mkdir()
    (export / "link").symlink_to("d")
    daemon = start_daemon("--security-model", model)
    legacy = dialect != b"9P2000.L"
    good, bad = (LEGACY_SERVED, LEGACY_REFUSED) if legacy else (served(), refused())
    with Client(daemon.socket) as client:
        client.rpc(p9.Tversion(8192, dialect))
        client.rpc(p9.Tattach(ROOT, p9.NOFID, b"", b"", 0))
        client.walk(ROOT, FILE, b"f")
        client.walk(ROOT, LINK, b"link")
        if not legacy:
            client.open(ROOT, OPENED, b"f", flags=2)
            client.open(ROOT, DIRECTORY, b"d")
        if model == "mapped-file" and not legacy:
            # What was kept of files that are removed is remembered, of so many at most.
            for _ in range(REMEMBERED_MAX):
                client.rpc(p9.Tmkdir(ROOT, b"new", 0o700, 0))
                client.rpc(p9.Tunlinkat(ROOT, b"new", 0x200))
        rounds(client, WARM, good, bad)
        descriptors = daemon.descriptors()
        for _ in range(PERIODS):  # a leak grows in each; a table that is laid out anew, in one
            before = anonymous(daemon)
            rounds(client, ROUNDS, good, bad)
            growth = anonymous(daemon) - before
            if growth < GROWTH_MAX:
                break
        assert growth < GROWTH_MAX
        assert daemon.descriptors() == descriptors
