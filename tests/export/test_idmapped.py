"""Users and groups with other numbers in the guest, with real owners on the host."""

import itertools
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.config import Export
from ninepd.export.idmapped import IdMappedHost
from ninepd.export.local import LocalHost
from ninepd.export.models import make_host
from ninepd.idranges import IdRange, IdRanges
from ninepd.ids import Ids
from ninepd.p9.messages import (
    NOFID,
    Rerror,
    SetattrValid,
    Tattach,
    Tcreate,
    Tlcreate,
    Tlink,
    Tlopen,
    Tmkdir,
    Tmknod,
    Tremove,
    Trenameat,
    Tsetattr,
    Tsymlink,
    Tunlinkat,
    Twalk,
    Twstat,
    Txattrwalk,
)
from ninepd.p9.stat import encode_stat
from ninepd.syscalls import GETATTR_BODY, view
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, P9Error
from tests.support.legacy import DIALECTS, NOTHING, attach, stat_of
from tests.support.mapped import KINDS, make

pytestmark = pytest.mark.usefixtures("as_root")

BASE = 100000
MAPS = ("--map-uid", f"0:{BASE}:65536", "--map-uid", "70000:5:10", "--map-gid", f"0:{BASE}:65536")
USER, STRANGER, NOBODY = 50, 51, 52
"""Fids of attaches: of the guest's user 1000, of one whom the host does not know, of no user."""
NO_ID = 0xFFFFFFFF
OVERFLOW = 65534
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
CAPABILITY = b"security.capability"
DIRECTORY = 0x80000000


@pytest.fixture(params=["passthrough", "none"])
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def client(start_daemon: StartDaemon, export: Path, model: str) -> Iterator[Client]:
    os.chown(export, BASE, BASE)
    daemon = start_daemon("--security-model", model, *MAPS)
    with Client(daemon.socket) as client:
        client.attach()
        client.rpc(Tattach(USER, NOFID, b"", b"", 1000))
        client.rpc(Tattach(STRANGER, NOFID, b"", b"", 66000))
        client.rpc(Tattach(NOBODY, NOFID, b"", b"", NO_ID))
        yield client


@pytest.fixture
def with_xattrs(start_daemon: StartDaemon, export: Path) -> Iterator[Client]:
    """Of passthrough; fid 1 is a file of the guest's root."""
    os.chown(export, BASE, BASE)
    (export / "f").write_text("")
    os.chown(export / "f", BASE, BASE)
    with Client(start_daemon(*MAPS).socket) as client:
        client.attach()
        client.walk(ROOT, 1, b"f")
        yield client


def put(path: Path, uid: int, gid: int) -> Path:
    path.write_text("text")
    os.chown(path, uid, gid)
    return path


def ids(found: Any) -> tuple[int, int]:
    """Of a host's stat, or of an Rgetattr."""
    if isinstance(found, os.stat_result):
        return found.st_uid, found.st_gid
    return found.uid, found.gid


def look(client: Client, name: str) -> tuple[int, int]:
    client.walk(ROOT, 997, name.encode())
    found = ids(client.getattr(997))
    client.clunk(997)
    return found


def chown(fid: int, uid: int = NO_ID, gid: int = NO_ID) -> Tsetattr:
    valid = (uid != NO_ID and SetattrValid.UID) | (gid != NO_ID and SetattrValid.GID)
    return Tsetattr(fid, valid, 0, uid, gid, 0, 0, 0, 0, 0)


# What the guest makes


def test_made(client: Client, export: Path) -> None:
    makers = ((ROOT, 0, 0), (USER, 1000, 65535))
    for kind, (fid, uid, gid) in itertools.product(KINDS, makers):
        name = f"{kind}{uid}"
        make(client, fid, kind, name.encode(), 0o640, gid)
        assert ids((export / name).lstat()) == (BASE + uid, BASE + gid)
        assert look(client, name) == (uid, gid)


def test_ranges_are_many(client: Client, export: Path) -> None:
    client.rpc(Tattach(60, NOFID, b"", b"", 70009))
    make(client, 60, "file", b"f", 0o640, 0)
    assert ids((export / "f").stat()) == (14, BASE)
    assert look(client, "f") == (70009, 0)


@pytest.mark.parametrize(
    ("fid", "gid"), [(STRANGER, 0), (USER, 66000)], ids=["user", "group"]
)  # fmt: skip
def test_made_by_whom_the_host_does_not_know(
    client: Client, export: Path, fid: int, gid: int
) -> None:
    for kind in KINDS:
        with pytest.raises(P9Error, match="Value too large"):
            make(client, fid, kind, b"x", 0o640, gid)
    assert os.listdir(export) == []
    (export / "x").write_text("")
    for kind in KINDS:
        with pytest.raises(P9Error, match="File exists"):
            make(client, fid, kind, b"x", 0o640, gid, 0x80C2)


def test_made_by_nobody_in_particular(client: Client, export: Path) -> None:
    """That is the guest's root, and never the host's."""
    for kind in KINDS:
        make(client, NOBODY, kind, kind.encode(), 0o640, NO_ID)
        assert ids((export / kind).lstat()) == (BASE, BASE)


@pytest.mark.parametrize(
    ("option", "fid", "gid"), [("--map-uid", NOBODY, 0), ("--map-gid", USER, NO_ID)]
)
def test_made_by_nobody_where_the_guest_has_no_root(
    start_daemon: StartDaemon, export: Path, option: str, fid: int, gid: int
) -> None:
    os.chown(export, 7, 7)
    with Client(start_daemon(option, "1000:7:1").socket) as client:
        client.attach()
        client.rpc(Tattach(USER, NOFID, b"", b"", 1000))
        client.rpc(Tattach(NOBODY, NOFID, b"", b"", NO_ID))
        for kind in KINDS:
            with pytest.raises(P9Error, match="Value too large"):
                make(client, fid, kind, b"x", 0o640, gid)
    assert os.listdir(export) == []


def test_create_opens_what_exists(client: Client, export: Path) -> None:
    """As open(2) with O_CREAT but not O_EXCL, for a client whose cache was behind."""
    put(export / "x", BASE, BASE)
    client.walk(STRANGER, 1)
    client.rpc(Tlcreate(1, b"x", 0x8042, 0o600, 0))
    assert client.read(1, 0, 10) == b"text"


# Whom files belong to


def test_owners_of_the_host(client: Client, export: Path) -> None:
    for number, (host, guest) in enumerate(
        [(BASE, 0), (BASE + 65535, 65535), (5, 70000), (0, OVERFLOW), (4, OVERFLOW),
         (15, OVERFLOW), (BASE - 1, OVERFLOW), (BASE + 65536, OVERFLOW)]
    ):  # fmt: skip
        put(export / str(number), host, BASE + 7)
        assert look(client, str(number)) == (guest, 7)
        os.chown(export / str(number), BASE + 7, host)
        assert look(client, str(number)) == (7, guest if guest != 70000 else OVERFLOW)


def test_owners_of_a_file_with_a_big_inode_number(export: Path) -> None:
    """Its Rgetattr is written by another function, since the number does not fit a qid."""
    fd = os.open(put(export / "f", 5, 0), os.O_PATH)
    body = bytearray(GETATTR_BODY)
    users = IdRanges((IdRange(70000, 5, 10),))
    IdMappedHost(Ids(users, users)).getattr_body_as(fd, 1, 0, view(body))
    os.close(fd)
    assert struct.unpack_from("<2I", body, 25) == (70000, OVERFLOW)


def test_chown(client: Client, export: Path) -> None:
    path = put(export / "f", BASE, BASE)
    client.walk(ROOT, 1, b"f")
    client.rpc(chown(1, 70001, 9))
    assert ids(path.stat()) == (6, BASE + 9)
    client.rpc(chown(1, uid=3))
    client.rpc(chown(1, gid=4))
    assert ids(path.stat()) == (BASE + 3, BASE + 4)
    assert client.error(chown(1, uid=66000)) == "EOVERFLOW"
    assert client.error(chown(1, gid=70000)) == "EOVERFLOW"
    assert client.error(chown(1, 5, 66000)) == "EOVERFLOW"
    assert ids(path.stat()) == (BASE + 3, BASE + 4)
    client.rpc(Tsetattr(1, SetattrValid.CTIME, 0, 0, 0, 0, 0, 0, 0, 0))


def test_set_id_bits_are_the_guests_matter(client: Client, export: Path) -> None:
    """They go when somebody else than the guest's root writes, whoever that is on the host."""
    program = put(export / "f", BASE, BASE)
    for fid, mode in ((ROOT, 0o6755), (USER, 0o755)):
        program.chmod(0o6755)
        client.open(fid, 1, b"f", flags=1)
        client.write(1, 0, b"x")
        client.clunk(1)
        assert stat.S_IMODE(program.stat().st_mode) == mode


# Old clients


@pytest.mark.parametrize("dialect", DIALECTS)
def test_old_clients(client: Client, export: Path, dialect: bytes) -> None:
    extended = dialect == b"9P2000.u"
    path = put(export / "f", BASE + 7, 0)
    attach(client, dialect, b"3", 3)
    client.walk(ROOT, 1, b"f")
    found = stat_of(client, 1, extended)
    assert (found.uid, found.gid) == (b"7", b"65534")
    if extended:
        assert (found.n_uid, found.n_gid) == (7, OVERFLOW)
    os.chown(path, BASE, BASE)
    client.rpc(Twstat(1, given_to(5, extended)))
    refused(client, Twstat(1, given_to(66000, extended)))
    assert path.stat().st_uid == BASE + 5


def given_to(uid: int, extended: bool) -> bytes:
    change = NOTHING._replace(n_uid=uid) if extended else NOTHING._replace(uid=b"%d" % uid)
    return encode_stat(change, extended)


def refused(client: Client, message: Any) -> None:
    """By EOVERFLOW, of which 9P2000 has only the words."""
    with pytest.raises(P9Error) as caught:
        client.rpc(message)
    reply = caught.value.reply
    assert isinstance(reply, Rerror)
    assert b"Value too large" in reply.ename


@pytest.mark.parametrize(
    ("options", "owners"),
    [
        (MAPS, (BASE + 3, BASE)),
        (("--map-uid", f"0:{BASE}:9", "--map-gid", "8:0:1"), (BASE + 3, 0)),
        (("--map-uid", f"0:{BASE}:9"), (BASE + 3, 0)),
        (("--map-uid", f"0:{BASE}:9", "--squash-to", "1:2"), (BASE + 3, 2)),
        (("--squash-to", "1:2"), (1, 2)),
    ],
)
def test_old_clients_create(
    start_daemon: StartDaemon, export: Path, options: Any, owners: Any
) -> None:
    os.chown(export, BASE, owners[1])
    daemon = start_daemon(*options)
    for dialect in DIALECTS:
        with Client(daemon.socket) as client:
            attach(client, dialect, b"3", 3)
            for fid, kind in enumerate((0, DIRECTORY), 1):
                client.walk(ROOT, fid)
                name = b"%s %d" % (dialect, fid)
                client.rpc(Tcreate(fid, name, 0o640 | kind, 0))
                assert ids((export / os.fsdecode(name)).stat()) == owners


# One option alone, and --squash-to


@pytest.mark.parametrize(
    ("options", "owners", "shown"),
    [
        (("--map-uid", "1000:7:1"), (7, 2000), (1000, 2000)),
        (("--map-gid", "2000:7:1"), (1000, 7), (1000, 2000)),
        (("--squash-to", "7"), (7, 7), (7, 7)),
        (("--squash-to", "7:8"), (7, 8), (7, 8)),
        (("--map-uid", "0:7:1", "--map-gid", "0:8:1", "--squash-to", "7:8"), (7, 8), (0, 0)),
        (("--map-uid", "1000:9:1", "--squash-to", "7:8"), (9, 8), (1000, 8)),
        (("--map-gid", "2000:9:1", "--squash-to", "7:8"), (7, 9), (7, 2000)),
    ],
)
def test_options(
    start_daemon: StartDaemon, export: Path, model: str, options: Any, owners: Any, shown: Any
) -> None:
    os.chown(export, *owners)
    with Client(start_daemon("--security-model", model, *options).socket) as client:
        client.attach()
        client.rpc(Tattach(USER, NOFID, b"", b"", 1000))
        for kind in KINDS:
            make(client, USER, kind, kind.encode(), 0o640, 2000)
            assert ids((export / kind).lstat()) == owners
            assert look(client, kind) == shown
        path = put(export / "given", *owners)
        client.walk(ROOT, 1, b"given")
        client.rpc(chown(1, 1000, 2000))
        assert ids(path.stat()) == owners


def test_squash_shows_the_host_as_it_is(start_daemon: StartDaemon, export: Path) -> None:
    put(export / "f", 5, 6)
    with Client(start_daemon("--squash-to", "7").socket) as client:
        client.attach()
        assert look(client, "f") == (5, 6)
        client.walk(ROOT, 1, b"f")
        client.rpc(chown(1, uid=33))
        assert ids((export / "f").stat()) == (7, 6)


# Files of whom the guest does not know

THEIRS = [(0, BASE), (BASE, 0), (0, 0)]


@pytest.fixture(params=THEIRS, ids=["user", "group", "both"])
def theirs(request: pytest.FixtureRequest, client: Client, export: Path) -> Path:
    """A file, fid 1, beside a directory, fid 2, with a file in it."""
    path = put(export / "f", *request.param)
    path.chmod(0o666)
    (export / "d").mkdir()
    (export / "empty").mkdir()
    put(export / "d/g", BASE, BASE)
    put(export / "mine", BASE, BASE)
    for name in ("d", "empty"):
        os.chown(export / name, *request.param)
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2, b"d")
    return path


def snapshot(top: Path) -> list[tuple[str, Any]]:
    return [
        (str(path.relative_to(top)), tuple(path.lstat())[:7]) for path in sorted(top.rglob("*"))
    ]


def test_theirs_is_read(client: Client, export: Path, theirs: Path) -> None:
    """But only what the mode lets others read."""
    os.setxattr(theirs, "user.x", b"1")
    client.open(1, 3)
    assert client.read(3, 0, 10) == b"text"
    assert client.get_xattr(1, b"user.x") == b"1"
    assert client.names(2) == {b"g"}
    theirs.chmod(0)
    (export / "d").chmod(0)
    for message in (Tlopen(1, 0), Txattrwalk(1, 4, b"user.x"), Tlopen(2, 0), Twalk(2, 4, (b"g",))):
        assert client.error(message) == "EACCES"
    assert client.error(Tmkdir(2, b"g", 0o700, 0)) == "EACCES"


SIZE, MODE, TIMES = SetattrValid.SIZE, SetattrValid.MODE, SetattrValid.MTIME
REFUSED: list[tuple[Any, str]] = [
    (Tlopen(1, 1), "EACCES"),
    (Tlopen(1, 2), "EACCES"),
    (Tlopen(1, 0x200), "EACCES"),
    (Tsetattr(1, SIZE, 0, 0, 0, 1, 0, 0, 0, 0), "EACCES"),
    (Tsetattr(1, MODE, 0o4777, 0, 0, 0, 0, 0, 0, 0), "EOVERFLOW"),
    (chown(1, 0, 0), "EOVERFLOW"),
    (Tsetattr(1, TIMES, 0, 0, 0, 0, 0, 0, 0, 0), "EOVERFLOW"),
    (Tlink(ROOT, 1, b"l"), "EOVERFLOW"),
    (Tunlinkat(ROOT, b"f", 0), "EOVERFLOW"),
    (Tunlinkat(ROOT, b"empty", 0x200), "EOVERFLOW"),
    (Tremove(1), "EOVERFLOW"),
    (Trenameat(ROOT, b"f", ROOT, b"n"), "EOVERFLOW"),
    (Trenameat(ROOT, b"mine", ROOT, b"f"), "EOVERFLOW"),
    (Tlcreate(2, b"n", 0x8042, 0o600, 0), "EACCES"),
    (Tmkdir(2, b"n", 0o700, 0), "EACCES"),
    (Tsymlink(2, b"n", b"t", 0), "EACCES"),
    (Tmknod(2, b"n", stat.S_IFIFO | 0o600, 0, 0, 0), "EACCES"),
    (Tmkdir(2, b"g", 0o700, 0), "EEXIST"),
    (Tlink(2, 3, b"l"), "EACCES"),
    (Tunlinkat(2, b"g", 0), "EACCES"),
    (Trenameat(2, b"g", ROOT, b"n"), "EACCES"),
    (Trenameat(ROOT, b"mine", 2, b"n"), "EACCES"),
]


def test_theirs_is_not_changed(client: Client, export: Path, theirs: Path) -> None:
    """The same as on an idmapped mount, but that there the guest's root may take it over."""
    os.setxattr(theirs, "user.x", b"1")
    client.walk(ROOT, 3, b"mine")
    before = snapshot(export)
    for message, error in REFUSED:
        client.error(Twalk(ROOT, 1, (b"f",)))  # the last message may have clunked it
        assert (message, client.error(message)) == (message, error)
    for value, flags in ((b"2", 0), (b"", 2)):
        with pytest.raises(P9Error, match="not permitted"):
            client.set_xattr(1, b"user.x", value, flags)
    assert snapshot(export) == before
    assert os.getxattr(theirs, "user.x") == b"1"


def test_what_is_missing_is_missing(client: Client) -> None:
    assert client.error(Tunlinkat(ROOT, b"none", 0)) == "ENOENT"
    assert client.error(Trenameat(ROOT, b"none", ROOT, b"n")) == "ENOENT"


# ACLs


def acl(user: int, group: int) -> bytes:
    entries = [(1, 6, NO_ID), (2, 4, user), (4, 4, NO_ID), (8, 5, group), (16, 5, NO_ID)]
    packed = [struct.pack("<HHI", *entry) for entry in [*entries, (32, 0, NO_ID)]]
    return struct.pack("<I", 2) + b"".join(packed)


@pytest.mark.parametrize("name", [ACCESS, DEFAULT])
def test_acls(with_xattrs: Client, export: Path, name: bytes) -> None:
    client = with_xattrs
    path = export if name == DEFAULT else export / "f"
    if name == DEFAULT:
        client.clunk(1)
        client.walk(ROOT, 1)
    client.set_xattr(1, name, acl(70001, 8))
    assert os.getxattr(path, name) == acl(6, BASE + 8)
    assert client.get_xattr(1, name) == acl(70001, 8)
    for bad in (acl(66000, 8), acl(7, 70000)):
        with pytest.raises(P9Error, match="Invalid argument"):
            client.set_xattr(1, name, bad)
    assert os.getxattr(path, name) == acl(6, BASE + 8)
    os.setxattr(path, name, acl(0, 6))
    assert client.get_xattr(1, name) == acl(OVERFLOW, OVERFLOW)
    client.set_xattr(1, name, b"")
    assert client.error(Txattrwalk(1, 2, name)) == "ENODATA"


@pytest.mark.parametrize(
    "value",
    [b"\2\0\0", b"\3\0\0\0" + b"\2\0\4\0\5\0\0\0", acl(1, 2)[:-1], acl(1, 2) + b"x"],
)
def test_what_is_no_acl(with_xattrs: Client, export: Path, value: bytes) -> None:
    """The kernel says so."""
    with pytest.raises(P9Error, match=r"Invalid argument|not supported"):
        with_xattrs.set_xattr(1, ACCESS, value)
    assert os.listxattr(export / "f") == []


# File capabilities


def capability(root: int = 0) -> bytes:
    """CAP_NET_BIND_SERVICE, effective, of the root of a user namespace, or of the host's."""
    sets = (1 << 10, 0, 0, 0)
    if not root:
        return struct.pack("<5I", 0x02000001, *sets)
    return struct.pack("<6I", 0x03000001, *sets, root)


@pytest.mark.parametrize("root", [0, 1, 70001])
def test_capabilities(with_xattrs: Client, export: Path, root: int) -> None:
    """As on an idmapped mount: they are those of the guest's root, whoever that is here."""
    with_xattrs.set_xattr(1, CAPABILITY, capability(root))
    host = 6 if root == 70001 else BASE + root
    assert os.getxattr(export / "f", CAPABILITY) == capability(host)
    assert with_xattrs.get_xattr(1, CAPABILITY) == capability(root)


def test_capabilities_of_whom_the_host_does_not_know(with_xattrs: Client, export: Path) -> None:
    with pytest.raises(P9Error, match="Invalid argument"):
        with_xattrs.set_xattr(1, CAPABILITY, capability(66000))
    assert os.listxattr(export / "f") == []


@pytest.mark.parametrize("root", [0, 1])
def test_capabilities_of_whom_the_guest_does_not_know(
    with_xattrs: Client, export: Path, root: int
) -> None:
    """Not shown, so that its kernel executes the file without them, as here (cap_get_file())."""
    os.setxattr(export / "f", CAPABILITY, capability(root))
    assert with_xattrs.error(Txattrwalk(1, 2, CAPABILITY)) == "ENODATA"


def test_what_is_no_capability(with_xattrs: Client, export: Path) -> None:
    for value in (b"x", bytes(20), bytes(24), capability()[:-1]):
        with pytest.raises(P9Error, match="Invalid argument"):
            with_xattrs.set_xattr(1, CAPABILITY, value)
    assert os.listxattr(export / "f") == []


def test_capabilities_of_the_hosts_own_root(start_daemon: StartDaemon, export: Path) -> None:
    put(export / "f", 0, 0)
    with Client(start_daemon("--map-uid", "5:0:1", "--map-gid", "0:0:9").socket) as client:
        client.attach(5)
        client.walk(ROOT, 1, b"f")
        client.set_xattr(1, CAPABILITY, capability(5))
        assert os.getxattr(export / "f", CAPABILITY) == capability()
        assert client.get_xattr(1, CAPABILITY) == capability(5)
        with pytest.raises(P9Error, match="Invalid argument"):
            client.set_xattr(1, CAPABILITY, capability())


# With other options


def test_read_only(start_daemon: StartDaemon, export: Path) -> None:
    put(export / "f", BASE, 0)
    with Client(start_daemon(*MAPS, "--readonly").socket) as client:
        client.attach()
        assert look(client, "f") == (0, OVERFLOW)
        assert client.error(Tmkdir(ROOT, b"d", 0o700, 66000)) == "EROFS"
        client.walk(ROOT, 1, b"f")
        assert client.error(chown(1, 66000)) == "EROFS"


def test_nothing_is_in_the_way_without_them(export: Path, model: str) -> None:
    """The class that translates is not even made."""
    directory = os.open(export, os.O_PATH)
    said = Export(str(export), "t", socket_path="s")
    assert type(make_host(said, model, directory)) is LocalHost
    said = Export(str(export), "t", socket_path="s", map_gid=("0:5:1",))
    assert type(make_host(said, model, directory)) is IdMappedHost
    os.close(directory)
