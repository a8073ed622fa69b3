"""Treaddir: entries, cookies, types, and what happens when the directory changes meanwhile."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.limits import CHOICES
from ninepd.listing import RUN_MAX, Cookies
from ninepd.p9.messages import Treaddir, Tunlinkat
from tests.conftest import OTHER_USER, Mount, StartDaemon
from tests.support.client import ROOT, Client, Entry, entries
from tests.support.raw_fuse import RawFuse

MSIZE = 1 << 17


@pytest.fixture
def many(export: Path) -> set[bytes]:
    """A thousand files, names of all lengths."""
    names = {b"%d" % number + b"x" * (number % 200) for number in range(1000)}
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(export), name), os.O_CREAT, 0o644))
    return names


def names_of(entries: list[Entry]) -> list[bytes]:
    return [entry.name for entry in entries]


@pytest.mark.parametrize("count", [281, 512, 4096, MSIZE - 24])
def test_thousand_entries(client: Client, many: set[bytes], count: int) -> None:
    client.open(ROOT, 1)
    found = names_of(client.listing(1, count))
    assert len(found) == len(set(found))
    assert set(found) == many | {b".", b".."}


@pytest.mark.parametrize("count", [128, 256, 512])
def test_small_counts(client: Client, export: Path, count: int) -> None:
    names = {b"file%d" % number for number in range(100)}
    for name in names:
        (export / os.fsdecode(name)).write_text("")
    client.open(ROOT, 1)
    assert set(names_of(client.listing(1, count))) == names | {b".", b".."}


@pytest.mark.threat("t_readdir_count")
def test_entries_are_whole_and_within_count(client: Client, many: set[bytes]) -> None:
    client.open(ROOT, 1)
    for count in range(300, 600):
        _, data = client.rpc_with_data(Treaddir(1, 0, count))
        assert 0 < len(data) <= count
        assert sum(24 + len(entry.name) for entry in client.readdir(1, 0, count)) == len(data)


@pytest.mark.threat("t_readdir_count")
@pytest.mark.parametrize("count", [0, 1, 24])
def test_count_too_small_for_one_entry(client: Client, export: Path, count: int) -> None:
    """0 bytes would mean the end."""
    client.open(ROOT, 1)
    assert client.error(Treaddir(1, 0, count)) == "EINVAL"


def test_count_too_small_for_the_next_entry(client: Client, export: Path) -> None:
    (export / ("x" * 255)).write_text("")
    client.open(ROOT, 1)
    found = client.listing(1)
    before = found[names_of(found).index(b"x" * 255) - 1]
    offset = 0 if found[0].name == b"x" * 255 else before.offset
    assert client.error(Treaddir(1, offset, 24 + 254)) == "EINVAL"
    assert client.readdir(1, offset, 24 + 255)[0].name == b"x" * 255


@pytest.mark.threat("t_readdir_count")
def test_count_is_clipped_to_the_room_for_it(client: Client, many: set[bytes]) -> None:
    client.open(ROOT, 1)
    _, data = client.rpc_with_data(Treaddir(1, 0, 2**32 - 1), room=1000)
    assert 0 < len(data) <= 989


def test_end_is_said_again(client: Client, export: Path) -> None:
    client.open(ROOT, 1)
    last = client.listing(1)[-1].offset
    assert client.readdir(1, last) == []
    assert client.readdir(1, last) == []


def test_cookies_resume_behind_their_entry(client: Client, many: set[bytes]) -> None:
    client.open(ROOT, 1)
    found = client.listing(1)
    assert len({entry.offset for entry in found}) == len(found)
    for index in range(0, len(found) - 1, 37):
        following = client.readdir(1, found[index].offset, 1000)
        assert following == found[index + 1 : index + 1 + len(following)]
        assert following


def test_cookies_serve_other_fids_of_the_directory(client: Client, many: set[bytes]) -> None:
    """seekdir(3) after a reopen; a guest's readdir may come through any open fid of it."""
    client.open(ROOT, 1)
    client.open(ROOT, 2)
    found = client.listing(1)
    assert client.readdir(2, found[500].offset, 1000)[0] == found[501]


def test_cookies_are_small(client: Client, many: set[bytes]) -> None:
    """32-bit guests fail with EOVERFLOW above 2^31 - 1 (glibc's readdir)."""
    client.open(ROOT, 1)
    assert max(entry.offset for entry in client.listing(1)) < 1 << 31


def test_rewind_shows_what_is_new(client: Client, export: Path) -> None:
    client.open(ROOT, 1)
    assert set(names_of(client.listing(1))) == {b".", b".."}
    (export / "new").write_text("")
    assert set(names_of(client.listing(1))) == {b".", b"..", b"new"}


@pytest.mark.threat("t_readdir_count")
def test_random_cookies_do_no_harm(client: Client, many: set[bytes]) -> None:
    client.open(ROOT, 1)
    for offset in (1, 2, 12345, 1 << 31, 1 << 40, (1 << 63) - 1):
        code = client.error(Treaddir(1, offset, 4096))
        assert code in {"", "EINVAL", "ENOENT"}
    assert client.error(Treaddir(1, 1 << 63, 4096)) == "EINVAL"
    assert set(names_of(client.listing(1))) >= many


@pytest.mark.threat("t_readdir_big")
def test_removal_while_reading(client: Client, many: set[bytes]) -> None:
    """rm -r: each batch is removed before the next is read, and nothing is missed."""
    client.open(ROOT, 1)
    seen: set[bytes] = set()
    offset = 0
    while batch := client.readdir(1, offset, 2000):
        offset = batch[-1].offset
        for entry in batch:
            if entry.name not in {b".", b".."}:
                seen.add(entry.name)
                client.rpc(Tunlinkat(ROOT, entry.name, 0))
    assert seen == many
    assert client.names(ROOT) == set()


@pytest.mark.threat("t_readdir_big")
def test_host_creates_and_removes_in_a_loop(client: Client, export: Path) -> None:
    """No listing fails, and what stays is in each of them, once."""
    stable = {b"stable%d" % number for number in range(200)}
    for name in stable:
        (export / os.fsdecode(name)).write_text("")
    script = """
import os, sys
os.chdir(sys.argv[1])
while True:
    for number in range(50):
        open(f"churn{number}", "w").close()
    for number in range(50):
        os.unlink(f"churn{number}")
"""
    process = subprocess.Popen([sys.executable, "-c", script, export])
    try:
        client.open(ROOT, 1)
        for _ in range(100):
            found = names_of(client.listing(1, 2000))
            assert sorted(name for name in found if name in stable) == sorted(stable)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("by_guest", [True, False])
def test_removed_directory(client: Client, export: Path, by_guest: bool) -> None:
    (export / "d").mkdir()
    client.walk(ROOT, 1, b"d")
    client.open(1, 2)
    if by_guest:
        client.rpc(Tunlinkat(ROOT, b"d", 0x200))
    else:
        (export / "d").rmdir()
    assert client.readdir(2) == []
    client.open(1, 3)
    assert client.readdir(3) == []
    assert client.getattr(1).nlink == 0


def test_types_and_numbers_are_those_of_a_walk(client: Client, export: Path) -> None:
    (export / "f").write_text("")
    (export / "d").mkdir()
    (export / "link").symlink_to("f")
    os.link(export / "f", export / "twin")
    os.mkfifo(export / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(export / "socket"))
    client.open(ROOT, 1)
    for fid, entry in enumerate(client.listing(1), 100):
        (qid,) = client.walk(ROOT, fid, entry.name)
        assert entry.shows(qid)
        assert entry.type == stat.S_IFMT(client.getattr(fid).mode) >> 12


def test_dots_at_the_root_are_the_root(client: Client, export: Path) -> None:
    """The parent's inode number is no business of the guest's."""
    (export / "d").mkdir()
    root = client.getattr(ROOT).qid.path
    client.open(ROOT, 1)
    at_root = {entry.name: entry.qid.path for entry in client.listing(1)}
    assert (at_root[b"."], at_root[b".."]) == (root, root)
    client.open(ROOT, 2, b"d")
    below = {entry.name: entry.qid.path for entry in client.listing(2)}
    assert (below[b"."], below[b".."]) == (at_root[b"d"], root)


def test_mount_points_show_what_is_mounted(client: Client, export: Path, mount: Mount) -> None:
    """In each of two file systems, inodes may have the same numbers; qids may not."""
    mount(export / "a", "-t", "tmpfs", "none")
    mount(export / "b", "-t", "tmpfs", "none")
    (export / "a/f").write_text("")
    (export / "b/f").write_text("")
    assert (export / "a/f").stat().st_ino == (export / "b/f").stat().st_ino
    client.open(ROOT, 1)
    listed = {entry.name: entry.qid for entry in client.listing(1)}
    paths = set()
    for fid, name in enumerate((b"a", b"b"), 2):
        mounted, inside = client.walk(ROOT, fid, name, b"f")
        assert listed[name].path == mounted.path
        paths |= {mounted.path, inside.path}
        client.open(ROOT, fid + 10, name)
        (entry,) = [entry for entry in client.listing(fid + 10) if entry.name == b"f"]
        assert entry.shows(inside)
        (up,) = [entry for entry in client.listing(fid + 10) if entry.name == b".."]
        assert up.qid.path == client.getattr(ROOT).qid.path
    assert len(paths) == 4


def test_listing_before_any_walk_into_the_mount(client: Client, export: Path, mount: Mount) -> None:
    """The numbers of files below a mount that only a listing has seen so far are final."""
    mount(export / "m", "-t", "tmpfs", "none")
    for number in range(300):
        (export / f"m/{number}").write_text("")
    client.open(ROOT, 1)
    (mounted,) = [entry for entry in client.listing(1) if entry.name == b"m"]
    client.open(ROOT, 2, b"m")
    listed = {entry.name: entry for entry in client.listing(2)}
    assert len(listed) == 302
    for name in (b"0", b"299"):
        above, found = client.walk(ROOT, 3, b"m", name)
        assert mounted.shows(above)
        assert listed[name].shows(found)
        client.clunk(3)


def test_directory_on_tmpfs(client: Client, export: Path, mount: Mount) -> None:
    mount(export / "m", "-t", "tmpfs", "none")
    names = {b"%d" % number for number in range(500)}
    for name in names:
        (export / "m" / os.fsdecode(name)).write_text("")
    client.walk(ROOT, 1, b"m")
    assert client.names(1) == names


def test_open_descriptor_survives_a_rename(client: Client, export: Path) -> None:
    (export / "d").mkdir()
    (export / "d/f").write_text("")
    client.open(ROOT, 1, b"d")
    (export / "d").rename(export / "e")
    assert set(names_of(client.listing(1))) == {b".", b"..", b"f"}


def test_directory_that_may_be_read_and_not_searched(
    start_daemon: StartDaemon, other_user: tuple[str, ...], export: Path
) -> None:
    """The names are there to be read by a daemon without privileges, as by any process."""
    (export / "d/sub").mkdir(parents=True)
    (export / "d/f").write_text("")
    for path in (export / "d", export):
        os.chown(path, OTHER_USER, OTHER_USER)
    (export / "d").chmod(0o400)
    daemon = start_daemon(launcher=other_user)
    with Client(daemon.socket) as client:
        client.attach(OTHER_USER)
        client.open(ROOT, 1, b"d")
        found = {entry.name: entry.type for entry in client.listing(1)}
    assert found == {b".": 4, b"..": 4, b"sub": 4, b"f": 8}


# Cookies


def entries_at(positions: range) -> bytes:
    """Rreaddir entries as C makes them, with positions of the host's."""
    return b"".join([bytes(13) + at.to_bytes(8, "little") + b"\x08\x01\x00x" for at in positions])


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def test_cookies_of_a_directory_that_churns_are_bounded() -> None:
    """Two million names come and go; who reads on, or seeks back a little, does not care."""
    cookies = Cookies(1 << 20)
    step = 1 << 12
    before = resident()
    previous, known = b"", 0
    for first in range(1 << 40, (1 << 40) + (2 << 20), step):
        run = entries_at(range(first, first + step))
        numbers = [entry.offset for entry in entries(cookies.shorten(run))]
        assert max(numbers) < 1 << 31
        assert cookies.position(numbers[-1]) == first + step - 1
        if previous:
            assert next(iter(entries(cookies.shorten(previous)))).offset == known
        previous, known = run, numbers[0]
    assert resident() - before < 32 << 20
    with pytest.raises(OSError, match="Invalid"):
        cookies.position(1 << 30)  # the first of all


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("model", ["passthrough", "mapped-file"])
def test_nameless_entries_are_left_out(start_daemon: StartDaemon, export: Path, model: str) -> None:
    """The kernel lets a FUSE server's names begin with a NUL, and clients give up a listing."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    nameless = [b"\0nobody"] * 2000  # more than one getdents64 takes
    entries = [b".", b"..", *nameless, b"good", *nameless]
    with RawFuse(export, entries, b"good"):
        daemon = start_daemon("--security-model", model)
        with Client(daemon.socket) as client:
            client.attach()
            client.open(ROOT, 1)
            assert [entry.name for entry in client.listing(1)] == [b".", b"..", b"good"]


@pytest.mark.parametrize("most", [CHOICES["cookies_max"].least, 8193, 10_000])
def test_cookies_are_as_many_as_was_said(most: int) -> None:
    """All of a reply lead back, however small its entries; of what came before, some do."""
    reply = RUN_MAX // len(entries_at(range(1)))
    cookies = Cookies(most)
    seen: list[tuple[int, int]] = []
    for first in range(1 << 40, (1 << 40) + 2 * most, reply):
        positions = range(first, first + reply)
        numbers = [entry.offset for entry in entries(cookies.shorten(entries_at(positions)))]
        assert [cookies.position(number) for number in numbers] == list(positions)
        seen += zip(numbers, positions, strict=True)
        base, known = cookies.dump()
        assert len(known) <= min(most, len(seen))
        assert len(known) >= min(most // 2, len(seen))
        assert list(enumerate(known, (1 << 30) + base)) == seen[-len(known) :]
    for number, _ in (seen[0], seen[-len(known) - 1]):
        with pytest.raises(OSError, match="Invalid"):
            cookies.position(number)


def test_many_cookies_are_handed_over() -> None:
    """So many that their memory is the kernel's again as soon as nobody holds it."""
    positions = list(range(1 << 40, (1 << 40) + 40_000))
    cookies = Cookies(len(positions))
    cookies.load(7, positions)
    assert cookies.dump() == (7, positions)


def test_small_positions_are_their_own_cookies() -> None:
    cookies = Cookies(2)
    run = entries_at(range(1000))
    assert cookies.shorten(run) == run
    assert cookies.position((1 << 30) - 1) == (1 << 30) - 1


def test_seeks_see_what_has_changed(client: Client, many: set[bytes], export: Path) -> None:
    """Entries that were sent once are sent again only as long as they are right."""
    client.open(ROOT, 1)
    found = client.listing(1, MSIZE - 24)
    cookie = found[10].offset
    assert client.readdir(1, cookie, MSIZE - 24)[0] == found[11]
    few = client.readdir(1, cookie, 600)
    assert 0 < len(few) < 30
    assert few == found[11 : 11 + len(few)]
    (export / os.fsdecode(found[11].name)).unlink()
    assert client.readdir(1, cookie, MSIZE - 24)[0] == found[12]


# Numbers


def test_overlay(client: Client, export: Path, mount: Mount, memory_dir: Path) -> None:
    """Its directory entries show numbers of the layers, its files others."""
    for name in ("lower", "upper", "work", "lower/d"):
        (memory_dir / name).mkdir()
    (export / "more").mkdir()
    for folder in (memory_dir / "lower", memory_dir / "upper", memory_dir / "lower/d"):
        (folder / f"in-{folder.name}").write_text("")
    (export / "more/third").write_text("")
    (memory_dir / "lower/copied").write_text("")
    options = f"lowerdir={memory_dir}/lower:{export}/more,upperdir={memory_dir}/upper"
    mount(export / "m", "-t", "overlay", "-o", f"{options},workdir={memory_dir}/work", "none")
    (export / "m/copied").write_text("up")
    client.open(ROOT, 1, b"m")
    for fid, entry in enumerate(client.listing(1), 100):
        (_, qid) = client.walk(ROOT, fid, b"m", entry.name)
        assert entry.shows(qid), entry.name


def test_mount_point_with_an_odd_name(client: Client, export: Path, mount: Mount) -> None:
    """As /proc/self/mountinfo writes it, with octal numbers. It comes while the daemon runs."""
    name = "a b\\\n\t#\u00e9"
    client.open(ROOT, 1)
    (export / name).mkdir()
    client.listing(1)
    mount(export / name, "-t", "tmpfs", "none")
    (entry,) = [entry for entry in client.listing(1) if entry.name == os.fsencode(name)]
    assert entry.shows(client.walk(ROOT, 2, os.fsencode(name))[0])
