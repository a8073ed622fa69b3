"""The table of messages: what each row says is true of what its handler does."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from ninepd.export.host import Host
from ninepd.export.local import LocalHost
from ninepd.export.mapped_xattr import MappedXattrHost
from ninepd.export.readonly import ReadonlyHost
from ninepd.export.tree import Tree
from ninepd.limits import Limits
from ninepd.ops.fid import Fid
from ninepd.ops.guest import Guest
from ninepd.ops.replies import Later, Reply
from ninepd.ops.table import ROWS, Row
from ninepd.p9 import messages as p9
from ninepd.p9.session import Dialect
from ninepd.p9.stat import UNTOUCHED_32, UNTOUCHED_64, LegacyStat, encode_stat
from ninepd.payload import Buffers, PrivatePayload

ROOT, FILE, LINK, READING, LISTING = range(5)
"""Fids: unopened ones, and two that are open for reading."""
NEW: Final = 9
RENAMED: Final = LegacyStat(
    p9.Qid(0xFF, UNTOUCHED_32, UNTOUCHED_64),
    UNTOUCHED_32,
    UNTOUCHED_32,
    UNTOUCHED_32,
    UNTOUCHED_64,
    b"new",
    b"",
    b"",
    b"",
)
SAMPLES: Final[dict[type[Any], Any]] = {
    p9.Tattach: p9.Tattach(NEW, p9.NOFID, b"", b"", 0),
    p9.Tauth: p9.Tauth(NEW, b"", b"", 0),
    p9.Tclunk: p9.Tclunk(FILE),
    p9.Tcreate: p9.Tcreate(ROOT, b"new", 0o600, 0),
    p9.Tfsync: p9.Tfsync(READING),
    p9.Tgetattr: p9.Tgetattr(FILE, 0),
    p9.Tgetlock: p9.Tgetlock(READING, p9.LockType.RDLCK, 0, 0, 1, b"guest"),
    p9.Tlcreate: p9.Tlcreate(ROOT, b"new", 0, 0o600, 0),
    p9.Tlink: p9.Tlink(ROOT, FILE, b"new"),
    p9.Tlock: p9.Tlock(READING, p9.LockType.RDLCK, 0, 0, 0, 1, b"guest"),
    p9.Tlopen: p9.Tlopen(FILE, 0),
    p9.Tmkdir: p9.Tmkdir(ROOT, b"new", 0o700, 0),
    p9.Tmknod: p9.Tmknod(ROOT, b"new", 0o10600, 0, 0, 0),
    p9.Topen: p9.Topen(FILE, 0),
    p9.Tread: p9.Tread(READING, 0, 10),
    p9.Treaddir: p9.Treaddir(LISTING, 0, 4096),
    p9.Treadlink: p9.Treadlink(LINK),
    p9.Tremove: p9.Tremove(FILE),
    p9.Trename: p9.Trename(FILE, ROOT, b"new"),
    p9.Trenameat: p9.Trenameat(ROOT, b"file", ROOT, b"new"),
    p9.Tsetattr: p9.Tsetattr(FILE, p9.SetattrValid.MODE, 0o600, 0, 0, 0, 0, 0, 0, 0),
    p9.Tstat: p9.Tstat(FILE),
    p9.Tstatfs: p9.Tstatfs(ROOT),
    p9.Tsymlink: p9.Tsymlink(ROOT, b"new", b"target", 0),
    p9.Tunlinkat: p9.Tunlinkat(ROOT, b"file", 0),
    p9.Twalk: p9.Twalk(ROOT, NEW, (b"file",)),
    p9.Twrite: p9.Twrite(READING, 0, 0),
    p9.Twstat: p9.Twstat(FILE, encode_stat(RENAMED, True)),
    p9.Txattrcreate: p9.Txattrcreate(FILE, b"user.new", 0, 0),
    p9.Txattrwalk: p9.Txattrwalk(FILE, NEW, b""),
}
OPENS: Final[dict[type[Any], list[Any]]] = {
    p9.Tlopen: [p9.Tlopen(FILE, flags) for flags in (1, 2, 0o1000, 0o2001)],
    p9.Topen: [p9.Topen(FILE, mode) for mode in (1, 2, 0x10)],
}
"""The same messages when they ask to change the file."""
CASES: Final = [
    (dialect, row, message)
    for dialect in (Dialect.L, Dialect.U)
    for row in ROWS[dialect].values()
    if row.handler is not None
    for message in [SAMPLES[row.message], *OPENS.get(row.message, [])]
]
each_case: Final = pytest.mark.parametrize(
    ("dialect", "row", "message"), CASES, ids=[f"{c[0].name}-{c[2]!r:.60}" for c in CASES]
)
Made = Callable[[Host, Dialect], Guest]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes the guest of a session on a small export, with all fids that SAMPLES use."""
    guests: list[Guest] = []
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")

    def make(host: Host, dialect: Dialect) -> Guest:
        guest = Guest(Tree(os.open(tmp_path, os.O_PATH), host), Limits())
        guests.append(guest)
        guest.version(p9.Tversion(1 << 16, dialect.value), 1 << 20)
        tree = guest.tree
        guest.add(ROOT, tree.handles.share(tree.root), 0)
        for number, name in {FILE: b"file", LINK: b"link", READING: b"file"}.items():
            guest.add(number, tree.existing(tree.root, name, [])[0], 0)
        guest.add(LISTING, tree.handles.share(tree.root), 0)
        for number in (READING, LISTING):
            fid = guest.session.get(number)
            fid.opened = tree.open(fid.handle, os.O_RDONLY)
        return guest

    yield make
    for guest in guests:
        guest.end()
        guest.tree.close()


def payload() -> PrivatePayload:
    return PrivatePayload(4096, Buffers())


def outcome(call: Callable[[], Reply]) -> str:
    """The name of the errno, or "ok"."""
    try:
        reply = call()
        while isinstance(reply, Later):
            reply = reply.work(payload())
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


Fids = tuple[Fid | None, Fid | None]


def resolved(row: Row, guest: Guest, message: Any) -> Fids:
    return row.fid(guest.session, message), row.other(guest.session, message)


def handled(guest: Guest, row: Row, message: Any, fids: Fids) -> str:
    """What the handler says, nobody having asked the row before."""
    handler = row.handler
    assert handler is not None
    said = outcome(lambda: handler(guest, message, payload(), *filter(None, fids)))
    if row.message is p9.Txattrcreate and said == "ok":  # it takes effect here
        clunk = ROWS[Dialect.L][p9.NUMBERS[p9.Tclunk]]
        said = outcome(lambda: clunk.serve(guest, p9.Tclunk(message.fid), payload(), *fids))
    return said


def test_every_row_has_a_sample() -> None:
    rows = [row for rows in ROWS.values() for row in rows.values()]
    assert {row.message for row in rows if row.handler} == set(SAMPLES)


@each_case
def test_a_row_changes_the_export_if_it_says_so(
    made: Made, dialect: Dialect, row: Row, message: Any
) -> None:
    """The host refuses what the row says changes it, and nothing else."""
    guest = made(ReadonlyHost(LocalHost()), dialect)
    fids = resolved(row, guest, message)
    refused = handled(guest, row, message, fids) == "EROFS"
    assert refused == row.changes(message)


@each_case
def test_changes_of_a_read_only_export_are_refused_at_once(
    made: Made, dialect: Dialect, row: Row, message: Any
) -> None:
    guest = made(ReadonlyHost(LocalHost()), dialect)
    fids = resolved(row, guest, message)
    said = outcome(lambda: row.serve(guest, message, payload(), *fids))
    assert (said == "EROFS") == row.changes(message)
    if row.clunks:
        assert guest.session.fids.get(message.fid) is None


@each_case
@pytest.mark.parametrize("host", [LocalHost(), MappedXattrHost(0o600, 0o700)])
def test_every_sample_is_served_otherwise(
    made: Made, dialect: Dialect, row: Row, message: Any, host: Host
) -> None:
    guest = made(host, dialect)
    fids = resolved(row, guest, message)
    expected = "ENOTSUP" if row.message is p9.Tauth else "ok"
    assert outcome(lambda: row.serve(guest, message, payload(), *fids)) == expected


@each_case
def test_fids_that_a_row_names_must_exist(
    made: Made, dialect: Dialect, row: Row, message: Any
) -> None:
    """In the order of the fields; and a fid that was clunked meanwhile is no fid any more."""
    guest = made(LocalHost(), dialect)
    fids = resolved(row, guest, message)
    if not any(fids):
        return
    for number in (ROOT, FILE, LINK, READING, LISTING):
        guest.retire(guest.remove(number, guest.session.get(number)))
    assert outcome(lambda: resolved(row, guest, message)) == "ENOENT"
    assert outcome(lambda: row.serve_held(guest, message, *fids, payload())) == "ENOENT"
