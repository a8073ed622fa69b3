"""Tversion, Tattach, Twalk, Tclunk, Tflush: sessions and how fids come and go."""

import errno
import os
from pathlib import Path

import pytest

from ninepd.p9.messages import (
    HEADER,
    NOFID,
    NUMBERS,
    Rflush,
    Rlerror,
    Rversion,
    Rwalk,
    Tattach,
    Tauth,
    Tclunk,
    Tcreate,
    Tflush,
    Tfsync,
    Tgetattr,
    Tlcreate,
    Tlock,
    Tlopen,
    Tmkdir,
    Topen,
    Tread,
    Treaddir,
    Treadlink,
    Tremove,
    Tstat,
    Tstatfs,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
    Txattrcreate,
    Txattrwalk,
    decode,
    encode,
)
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon


@pytest.mark.threat("t_version_mid")
def test_version_takes_the_smaller_msize(client: Client) -> None:
    assert client.rpc(Tversion(8192, b"9P2000.L")) == Rversion(8192, b"9P2000.L")
    ring = 1024 - 3  # descriptors of an indirect table, less request, reply and slop
    assert client.rpc(Tversion(2**32 - 1, b"9P2000.L")).msize == min(1 << 20, ring * 4096)


@pytest.mark.threat("t_version_mid")
@pytest.mark.parametrize("msize", [0, 1, 4095])
def test_version_with_a_tiny_msize(client: Client, msize: int) -> None:
    assert client.error(Tversion(msize, b"9P2000.L")) == "EMSGSIZE"


@pytest.mark.parametrize("version", [b"9P1999", b"9P2000L", b"", b"\xff"])
def test_unknown_version_leaves_no_session(client: Client, version: bytes) -> None:
    assert client.rpc(Tversion(8192, version)).version == b"unknown"
    assert client.error(Tattach(ROOT, NOFID, b"", b"", 0)) == "EINVAL"


def test_msize_max_is_an_option(start_daemon: StartDaemon) -> None:
    with Client(start_daemon("--msize-max", "8192").socket) as client:
        assert client.rpc(Tversion(1 << 20, b"9P2000.L")).msize == 8192


@pytest.mark.threat("t_version_mid")
def test_version_drops_every_fid(daemon: Daemon, client: Client) -> None:
    idle = daemon.descriptors()
    for fid in range(1, 100):
        client.create(ROOT, fid, b"%d" % fid)
    assert daemon.descriptors() >= idle + 198
    client.attach()
    assert daemon.descriptors() == idle
    assert client.error(Tgetattr(1, 0)) == "ENOENT"


@pytest.mark.threat("t_order")
def test_requests_before_version(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        assert client.error(Tattach(0, NOFID, b"", b"", 0)) == "EINVAL"
        assert client.error(Tgetattr(0, 0)) == "EINVAL"
        assert client.error(Tclunk(0)) == "EINVAL"
        client.attach()


@pytest.mark.threat("t_order")
def test_requests_before_attach(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        client.rpc(Tversion(8192, b"9P2000.L"))
        assert client.error(Tgetattr(0, 0)) == "ENOENT"
        assert client.error(Twalk(0, 1, ())) == "ENOENT"


def test_auth_is_not_needed(client: Client) -> None:
    assert client.error(Tauth(7, b"u", b"", 0)) == "EOPNOTSUPP"


@pytest.mark.threat("t_order", "t_fid_reuse")
def test_attach_errors(client: Client) -> None:
    assert client.error(Tattach(ROOT, NOFID, b"", b"", 0)) == "EINVAL"
    assert client.error(Tattach(NOFID, NOFID, b"", b"", 0)) == "EINVAL"
    assert client.error(Tattach(1, 5, b"", b"", 0)) == "EINVAL"
    assert client.error(Tattach(1, NOFID, b"", b"missing", 0)) == "ENOENT"
    assert client.error(Tgetattr(1, 0)) == "ENOENT"


def test_attach_several_times(client: Client) -> None:
    root = client.rpc(Tattach(10, NOFID, b"user", b"", 1000)).qid
    assert client.walk(ROOT, 11, b"..") == (root,)


def test_attach_below_the_root(client: Client, export: Path) -> None:
    (export / "a/b").mkdir(parents=True)
    below = client.rpc(Tattach(1, NOFID, b"", b"/a/b", 0)).qid
    assert client.walk(ROOT, 2, b"a", b"b")[-1] == below


@pytest.mark.threat("t_order", "t_dotdot_root")
def test_attach_does_not_leave_the_export(client: Client, export: Path) -> None:
    (export / "link").symlink_to("/")
    assert client.error(Tattach(1, NOFID, b"", b"link/etc", 0)) in {"ELOOP", "ENOTDIR", "ENOENT"}
    root = client.rpc(Tattach(2, NOFID, b"", b"../../..", 0)).qid
    assert client.walk(ROOT, 3, b"..") == (root,)


# Walks


@pytest.mark.threat("t_nwname")
def test_walk_of_sixteen_names(client: Client, export: Path) -> None:
    names = [b"%d" % depth for depth in range(16)]
    path = export.joinpath(*map(os.fsdecode, names))
    path.mkdir(parents=True)
    qids = client.walk(ROOT, 1, *names)
    assert len({qid.path for qid in qids}) == 16
    assert client.getattr(1).qid == qids[-1]


@pytest.mark.threat("t_nwname")
def test_walk_of_seventeen_names(client: Client) -> None:
    body = bytes(4) + (1).to_bytes(4, "little") + (17).to_bytes(2, "little") + b"\x01\0a" * 17
    raw = HEADER.pack(7 + len(body), NUMBERS[Twalk], 5) + body
    assert decode(client.exchange(raw)) == (5, Rlerror(errno.EINVAL))
    assert client.error(Tgetattr(1, 0)) == "ENOENT"


def test_first_name_missing(client: Client) -> None:
    assert client.error(Twalk(ROOT, 1, (b"missing", b"x"))) == "ENOENT"
    assert client.error(Tclunk(1)) == "ENOENT"


def test_later_name_missing_is_a_partial_walk(client: Client, export: Path) -> None:
    (export / "a/b").mkdir(parents=True)
    qids = client.walk(ROOT, 1, b"a", b"b")
    assert client.rpc(Twalk(ROOT, 2, (b"a", b"b", b"c"))) == Rwalk(qids)
    assert client.error(Tgetattr(2, 0)) == "ENOENT"


def test_partial_walk_onto_itself_changes_nothing(client: Client, export: Path) -> None:
    (export / "a").mkdir()
    client.walk(ROOT, 1)
    before = client.getattr(1).qid.path
    assert len(client.rpc(Twalk(1, 1, (b"a", b"missing"))).qids) == 1
    assert client.getattr(1).qid.path == before


def test_walk_through_a_file(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    assert len(client.rpc(Twalk(ROOT, 1, (b"f", b"x"))).qids) == 1
    client.walk(ROOT, 1, b"f")
    assert client.error(Twalk(1, 2, (b"x",))) == "ENOTDIR"
    assert client.error(Twalk(1, 2, (b".",))) == "ENOTDIR"
    assert client.error(Twalk(1, 2, (b"..",))) == "ENOTDIR"


@pytest.mark.threat("t_symlink_mid")
def test_walk_through_a_symlink(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "link").symlink_to("d")
    (export / "d/f").write_text("")
    assert len(client.rpc(Twalk(ROOT, 1, (b"link", b"f"))).qids) == 1
    (qid,) = client.walk(ROOT, 1, b"link")
    assert qid.type == 0x02
    assert client.error(Twalk(1, 2, (b"f",))) == "ENOTDIR"


def test_walk_without_names_clones(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.walk(ROOT, 1, b"f")
    assert client.walk(1, 2) == ()
    client.clunk(1)
    assert client.getattr(2).size == 4


def test_clone_of_an_open_fid_is_not_open(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.open(ROOT, 1, b"f")
    client.walk(1, 2)
    assert client.error(Tread(2, 0, 4)) == "EBADF"
    client.rpc(Tlopen(2, 0))
    assert client.read(2, 0, 10) == b"text"


# Served, though walk(5) forbids it: Linux clones open fids, and the open one stays as it is.
@pytest.mark.threat("t_fid_reuse")
def test_walk_from_an_open_directory(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "d/f").write_text("text")
    client.open(ROOT, 1, b"d")
    client.walk(1, 2, b"f")
    assert client.getattr(2).size == 4


@pytest.mark.threat("t_fid_reuse")
def test_walk_onto_itself(client: Client, export: Path) -> None:
    (export / "a/b").mkdir(parents=True)
    client.walk(ROOT, 1)
    (_, qid) = client.walk(1, 1, b"a", b"b")
    assert client.getattr(1).qid == qid
    client.rpc(Tlopen(1, 0))
    assert client.error(Twalk(1, 1, ())) == "EINVAL"
    assert client.error(Twalk(1, 1, (b"..",))) == "EINVAL"


@pytest.mark.threat("t_fid_reuse")
def test_new_fid_must_be_free(client: Client, export: Path) -> None:
    (export / "f").write_text("text")
    client.walk(ROOT, 1, b"f")
    client.walk(ROOT, 2)
    assert client.error(Twalk(ROOT, 1, ())) == "EINVAL"
    assert client.error(Twalk(ROOT, NOFID, ())) == "EINVAL"
    assert client.getattr(1).size == 4


@pytest.mark.threat("t_dot")
def test_dot_is_the_directory_itself(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    first, dot = client.walk(ROOT, 1, b"d", b".")
    assert dot == first


@pytest.mark.threat("t_dotdot_root")
def test_dotdot_at_the_root_is_the_root(client: Client, export: Path) -> None:
    root = client.getattr(ROOT).qid
    assert client.walk(ROOT, 1, *[b".."] * 16) == (root,) * 16


@pytest.mark.threat("t_dotdot_root")
def test_dotdot_from_below(client: Client, export: Path) -> None:
    (export / "a/b").mkdir(parents=True)
    root = client.getattr(ROOT).qid
    a, b, up, top, above = client.walk(ROOT, 1, b"a", b"b", b"..", b"..", b"..")
    assert (up, top, above) == (a, root, root)
    assert b != a


@pytest.mark.threat("t_moved_out")
def test_dotdot_of_a_directory_moved_out(client: Client, export: Path, tmp_path: Path) -> None:
    (export / "d/child").mkdir(parents=True)
    (export / "d/child/f").write_text("text")
    client.walk(ROOT, 1, b"d")
    client.walk(1, 2, b"child")
    (export / "d").rename(tmp_path / "outside")
    assert client.error(Twalk(1, 3, (b"..",))) == "ENOENT"
    assert client.error(Twalk(2, 3, (b"..", b".."))) == "ENOENT"
    client.walk(1, 5, b"child", b"f")  # what was held stays usable, as an open descriptor would
    assert client.getattr(5).size == 4


def test_dotdot_of_a_directory_moved_inside(client: Client, export: Path) -> None:
    (export / "a/d").mkdir(parents=True)
    (export / "b").mkdir()
    client.walk(ROOT, 1, b"a", b"d")
    (export / "a/d").rename(export / "b/d")
    assert client.walk(1, 2, b"..") == client.walk(ROOT, 3, b"b")


BAD_NAMES = {
    b"": "ENOENT",
    b"/": "ENOENT",
    b"a/b": "ENOENT",
    b"/etc": "ENOENT",
    b"../x": "ENOENT",
    b"a\0b": "EINVAL",
    b"\0": "EINVAL",
    b"x" * 256: "ENAMETOOLONG",
    b"x" * 65000: "ENAMETOOLONG",
}


@pytest.mark.threat("t_slash", "t_empty", "t_string", "t_long")
def test_bad_names(client: Client, export: Path) -> None:
    (export / "a").mkdir()
    (export / "a/b").mkdir()
    found = {name: client.error(Twalk(ROOT, 1, (name,))) for name in BAD_NAMES if len(name) < 8000}
    assert found == {name: code for name, code in BAD_NAMES.items() if len(name) < 8000}


@pytest.mark.threat("t_string")
def test_name_longer_than_the_header_arena(client: Client) -> None:
    assert client.error(Twalk(ROOT, 1, (b"x" * 65000,))) == "ENAMETOOLONG"


@pytest.mark.parametrize("name", [b"x" * 255, b"\xff\xfe", b" ", b"...", b"\n", b"\\", b"-"])
def test_odd_names_are_fine(client: Client, name: bytes) -> None:
    client.rpc(Tmkdir(ROOT, name, 0o755, 0))
    assert len(client.walk(ROOT, 1, name)) == 1
    assert client.names(ROOT) == {name}


# Clunks and states of a fid


def test_clunk_frees_the_number(client: Client) -> None:
    client.walk(ROOT, 1)
    client.clunk(1)
    assert client.error(Tclunk(1)) == "ENOENT"
    client.walk(ROOT, 1)


def test_clunked_root_can_be_attached_again(client: Client) -> None:
    client.clunk(ROOT)
    assert client.error(Tgetattr(ROOT, 0)) == "ENOENT"
    client.rpc(Tattach(ROOT, NOFID, b"", b"", 0))


UNKNOWN = 12345


@pytest.mark.parametrize(
    "message",
    [
        Twalk(UNKNOWN, 1, ()),
        Tclunk(UNKNOWN),
        Tremove(UNKNOWN),
        Tgetattr(UNKNOWN, 0),
        Tlopen(UNKNOWN, 0),
        Tlcreate(UNKNOWN, b"x", 2, 0o644, 0),
        Tread(UNKNOWN, 0, 1),
        Twrite(UNKNOWN, 0, 0),
        Treaddir(UNKNOWN, 0, 100),
        Tfsync(UNKNOWN, 0),
        Tstatfs(UNKNOWN),
        Treadlink(UNKNOWN),
        Tmkdir(UNKNOWN, b"x", 0o755, 0),
        Tlock(UNKNOWN, 0, 0, 0, 0, 1, b""),
        Txattrwalk(UNKNOWN, 1, b""),
        Tgetattr(NOFID, 0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_unknown_fid(client: Client, message: object) -> None:
    assert client.error(message) == "ENOENT"


# What each message says to a fid in each state; "" means that it is served.
STATES = ("unopened", "file", "directory", "xattr", "writer")
EXPECTED = {
    "Tgetattr": ("", "", "", "EINVAL", "EINVAL"),
    "Tstatfs": ("", "", "", "EINVAL", "EINVAL"),
    "Twalk": ("", "", "", "EINVAL", "EINVAL"),
    "Tlopen": ("", "EINVAL", "EINVAL", "EINVAL", "EINVAL"),
    "Tlcreate": ("ENOTDIR", "EINVAL", "EINVAL", "EINVAL", "EINVAL"),
    "Tread": ("EBADF", "", "EISDIR", "", "EBADF"),
    "Twrite": ("EBADF", "", "EISDIR", "EBADF", ""),
    "Treaddir": ("EBADF", "ENOTDIR", "", "EBADF", "EBADF"),
    "Tfsync": ("EBADF", "", "", "EBADF", "EBADF"),
    "Tlock": ("EBADF", "", "EISDIR", "EBADF", "EBADF"),
    "Txattrwalk": ("", "", "", "EINVAL", "EINVAL"),
    "Treadlink": ("EINVAL", "EINVAL", "EINVAL", "EINVAL", "EINVAL"),
}


@pytest.mark.threat("t_fid_type")
@pytest.mark.parametrize("state", STATES)
def test_every_message_in_every_state(client: Client, export: Path, state: str) -> None:
    (export / "f").write_text("text")
    (export / "d").mkdir()
    found = {}
    for name in EXPECTED:
        fid = 1
        match state:
            case "unopened":
                client.walk(ROOT, fid, b"f")
            case "file":
                client.open(ROOT, fid, b"f", flags=2)
            case "directory":
                client.open(ROOT, fid, b"d")
            case "xattr":
                client.walk(ROOT, 3, b"f")
                client.rpc(Txattrwalk(3, fid, b""))
                client.clunk(3)
            case "writer":
                client.walk(ROOT, fid, b"f")
                client.rpc(Txattrcreate(fid, b"user.x", 4, 0))
        message = {
            "Tgetattr": Tgetattr(fid, 0),
            "Tstatfs": Tstatfs(fid),
            "Twalk": Twalk(fid, 2, ()),
            "Tlopen": Tlopen(fid, 0),
            "Tlcreate": Tlcreate(fid, b"new", 2, 0o644, 0),
            "Tread": Tread(fid, 0, 1),
            "Twrite": Twrite(fid, 0, 1),
            "Treaddir": Treaddir(fid, 0, 1000),
            "Tfsync": Tfsync(fid, 0),
            "Tlock": Tlock(fid, 0, 0, 0, 0, 1, b""),
            "Txattrwalk": Txattrwalk(fid, 2, b""),
            "Treadlink": Treadlink(fid),
        }[name]
        found[name] = client.error(message, b"x" if name == "Twrite" else b"")
        client.error(Tclunk(fid))
        client.error(Tclunk(2))
    assert found == {name: codes[STATES.index(state)] for name, codes in EXPECTED.items()}


# Tags and flushes


@pytest.mark.threat("t_flush")
def test_flush_of_anything_that_is_not_out(client: Client) -> None:
    own = client.tag + 1
    for oldtag in (own, 0xFFFF, 777, client.tag):
        assert client.rpc(Tflush(oldtag)) == Rflush()


# What is flushed is answered all the same, just before: Linux waits for either.
@pytest.mark.threat("t_flush")
def test_flush_comes_behind_the_flushed_request(client: Client) -> None:
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"x" * 100_000)
    driver = client.driver
    fsync = driver.submit([encode(1, Tfsync(1, 0))], [4096])
    flushes = [driver.submit([encode(tag, Tflush(1))], [4096]) for tag in (2, 3)]
    driver.kick()
    done = driver.wait_used(count=3)
    assert [head for head, _ in done] == [fsync, *flushes]
    answers = [decode(driver.reply(head, used))[1] for head, used in done]
    assert answers[1:] == [Rflush(), Rflush()]


@pytest.mark.threat("t_dup_tag")
def test_tag_in_use(client: Client) -> None:
    """The second request is refused, the first answered as ever."""
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"x" * 100_000)
    driver = client.driver
    fsync = driver.submit([encode(1, Tfsync(1, 0))], [4096])
    twin = driver.submit([encode(1, Tgetattr(ROOT, 0))], [4096])
    driver.kick()
    done = dict(driver.wait_used(count=2))
    assert decode(driver.reply(twin, done[twin])) == (1, Rlerror(errno.EINVAL))
    assert done[fsync] == 7
    driver.reply(fsync)
    client.getattr(ROOT)


@pytest.mark.threat("t_version_mid")
def test_version_waits_for_what_is_out(client: Client) -> None:
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"x" * 100_000)
    driver = client.driver
    fsync = driver.submit([encode(1, Tfsync(1, 0))], [4096])
    version = driver.submit([encode(0xFFFF, Tversion(8192, b"9P2000.L"))], [4096])
    driver.kick()
    done = driver.wait_used(count=2)
    assert [head for head, _ in done] == [fsync, version]
    assert done[0][1] == 7
    for head, _ in done:
        driver.reply(head)
    client.attach()


@pytest.mark.threat("t_type")
def test_every_type_number(client: Client) -> None:
    """R-messages and numbers that nobody uses are told EOPNOTSUPP, as unknown messages are."""
    old = {Topen, Tcreate, Tstat, Twstat}
    served = {
        number
        for message, number in NUMBERS.items()
        if message.__name__.startswith("T") and message not in old
    }
    refused = set()
    for number in range(256):
        raw = HEADER.pack(7, number, 9)
        _, reply = decode(client.exchange(raw))
        assert isinstance(reply, Rlerror | Rversion)
        if isinstance(reply, Rlerror) and reply.ecode == errno.EOPNOTSUPP:
            refused.add(number)
    assert refused == set(range(256)) - served
    client.getattr(ROOT)
