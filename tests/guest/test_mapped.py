"""The mapped models beside QEMU's server, on one directory: what one keeps, the other shows."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd_guests.boot import Share, Virtfs
from ninepd_guests.machine import Guest
from ninepd_guests.remote import Process
from tests.support.client import Daemon
from tests.support.guest import PEER, TAG, boot
from tests.support.mapped import KEPT, META, META_ROOT

OURS, QEMUS = "/mnt", "/peer"
SIDES = (OURS, QEMUS)
NODES = {
    "fifo": (stat.S_IFIFO | 0o640, 0),
    "socket": (stat.S_IFSOCK | 0o755, 0),
    "char": (stat.S_IFCHR | 0o600, os.makedev(4, 64)),
    "block": (stat.S_IFBLK | 0o660, os.makedev(259, 0x12345)),
    "plain": (stat.S_IFREG | 0o444, 0),
}
MODES = (0o4755, 0o2711, 0o6777, 0o1777, 0o000, 0o640)
TARGET = "../no such/place \u00e4"


@pytest.fixture(scope="module", params=["mapped-xattr", "mapped-file"])
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def top(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mapped") / "export"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(scope="module")
def guest(model: str, top: Path) -> Iterator[Guest]:
    daemon = Daemon(
        "--security-model", model, socket=str(top.parent / "s"), export=str(top), tag=TAG
    )
    try:
        with boot(
            "qemu-7.2", [Share(TAG, daemon.socket)], [Virtfs(PEER, str(top), model)]
        ) as guest:
            guest.mount(TAG, OURS)
            guest.mount(PEER, QEMUS)
            yield guest
    finally:
        daemon.stop()
    assert "Traceback" not in daemon.log
    assert "bug" not in daemon.log


@pytest.fixture
def process(guest: Guest) -> Iterator[Process]:
    with guest.process() as process:
        process.umask(0)
        yield process


def fill(process: Process, top: str) -> None:
    """Something of every kind, mode and owner."""
    process.mkdir(top, 0o755)
    for mode in MODES:
        fd = process.open(f"{top}/file{mode:o}", os.O_CREAT | os.O_RDWR, mode & 0o777)
        process.write(fd, b"text" * (mode % 7))
        process.close(fd)
        process.chown(f"{top}/file{mode:o}", mode, 70_000 + mode)
        process.chmod(f"{top}/file{mode:o}", mode)
        process.mkdir(f"{top}/dir{mode:o}", mode)
        process.chown(f"{top}/dir{mode:o}", 5, (1 << 32) - 3)
        process.chmod(f"{top}/dir{mode:o}", mode)
    for name, (mode, device) in NODES.items():
        process.mknod(f"{top}/{name}", mode, device)
    process.chown(f"{top}/fifo", 12, 34)
    process.symlink(TARGET, f"{top}/link")
    process.chown(f"{top}/link", 56, 78, follow=False)
    process.link(f"{top}/file4755", f"{top}/dir1777/other")
    process.chmod(f"{top}/file4755", 0o751)
    process.rename(f"{top}/char", f"{top}/dir1777/moved")
    process.rename(f"{top}/dir640", f"{top}/dir2711/deep")
    process.symlink("x", f"{top}/replaced")
    process.rename(f"{top}/plain", f"{top}/replaced")
    process.unlink(f"{top}/file0")


def look(process: Process, path: str) -> tuple[Any, ...]:
    found = process.lstat(path)
    content: object = None
    if stat.S_ISLNK(found.mode):
        content = process.readlink(path)
    elif stat.S_ISREG(found.mode):
        fd = process.open(path)
        content = process.pread(fd, 4096, 0)
        process.close(fd)
    size = -1 if stat.S_ISDIR(found.mode) else found.size
    return oct(found.mode), found.nlink, found.uid, found.gid, found.rdev, size, content


def tree(process: Process, top: str) -> dict[str, object]:
    found: dict[str, object] = {}
    paths = [""]
    while paths:
        path = paths.pop()
        found[path] = look(process, top + path)
        if stat.S_ISDIR(process.lstat(top + path).mode):
            paths += [f"{path}/{name}" for name in process.listdir(top + path)]
    return found


def kept(model: str, root: Path, top: Path) -> dict[str, object]:
    """All that lies on the host: modes, contents, and what is kept."""
    found: dict[str, object] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        if path.name not in {META, META_ROOT} and path.parent.name != META:
            info = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(info.st_mode) else None
            name = str(path.relative_to(top))
            found[name] = oct(info.st_mode), content, KEPT[model](path, root)
        elif path.parent.name == META:
            found[str(path.relative_to(top))] = path.read_text()
    return found


def test_what_one_writes_the_other_shows(process: Process, model: str, top: Path) -> None:
    """Both ways; and both leave the same on the host."""
    for side, name in zip(SIDES, ("ours", "theirs"), strict=True):
        fill(process, f"{side}/{name}")
    for name in ("ours", "theirs"):
        assert tree(process, f"{OURS}/{name}") == tree(process, f"{QEMUS}/{name}")
    assert tree(process, f"{OURS}/ours") == tree(process, f"{OURS}/theirs")
    ours, theirs = kept(model, top, top / "ours"), kept(model, top, top / "theirs")
    assert set(ours) == set(theirs)
    assert {path: (ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]} == {}
    assert len(ours) > 15


def test_types_in_listings(process: Process) -> None:
    """True here; QEMU's server says that it does not know them."""
    for side, name in zip(SIDES, ("listed", "listed too"), strict=True):
        fill(process, f"{side}/{name}")
        fd = process.open(f"{OURS}/{name}", os.O_RDONLY | os.O_DIRECTORY)
        for entry in process.getdents(fd):
            if entry.name not in {".", ".."}:
                info = process.lstat(f"{OURS}/{name}/{entry.name}")
                assert entry.type == stat.S_IFMT(info.mode) >> 12
        process.close(fd)


def test_changes_of_what_the_other_has_made(process: Process) -> None:
    """Attributes, names and removal, each by the one and then seen by the other."""
    for number, (one, other) in enumerate((SIDES, SIDES[::-1])):
        name = f"changed{number}"
        fill(process, f"{one}/{name}")
        process.chmod(f"{other}/{name}/fifo", 0o4711)
        process.chown(f"{other}/{name}/dir1777/moved", 1, 2)
        process.rename(f"{other}/{name}/socket", f"{other}/{name}/dir1777/socket")
        process.link(f"{other}/{name}/fifo", f"{other}/{name}/dir1777/fifo")
        process.unlink(f"{other}/{name}/link")
        process.symlink("elsewhere", f"{other}/{name}/link")
        assert tree(process, f"{one}/{name}") == tree(process, f"{other}/{name}")
        for path in sorted(tree(process, f"{other}/{name}"), reverse=True):
            whole = f"{other}/{name}{path}"
            if stat.S_ISDIR(process.lstat(whole).mode):
                process.rmdir(whole)
            else:
                process.unlink(whole)
        assert name not in process.listdir(one)


def test_attributes_of_the_root(process: Process, guest: Guest) -> None:
    for one, other in (SIDES, SIDES[::-1]):
        process.chown(one, len(one), 5)
        process.chmod(one, 0o1777 if one == OURS else 0o755)
        guest.umount(other)
        guest.mount(TAG if other == OURS else PEER, other)
        found = [look(process, side)[:4] for side in SIDES]
        assert found[0] == found[1]
        assert found[0][2] == len(one)


def test_extended_attributes(process: Process, model: str) -> None:
    for number, (one, other) in enumerate((SIDES, SIDES[::-1])):
        name = f"attributes{number}"
        process.close(process.open(f"{one}/{name}", os.O_CREAT | os.O_RDWR, 0o640))
        process.setxattr(f"{one}/{name}", "user.mine", b"value")
        assert process.getxattr(f"{other}/{name}", "user.mine") == b"value"
        assert process.listxattr(f"{one}/{name}") == process.listxattr(f"{other}/{name}")
        if model == "mapped-xattr":
            results: list[object] = []
            for side in SIDES:
                with pytest.raises(OSError) as refused:  # noqa: PT011
                    process.setxattr(f"{side}/{name}", "user.virtfs.uid", bytes(4))
                results.append(refused.value.errno)
                with contextlib.suppress(OSError):
                    results.append(process.getxattr(f"{side}/{name}", "user.virtfs.uid"))
            assert results[0] == results[1]
            assert len(results) == 2


def test_hidden_names(process: Process, model: str) -> None:
    if model != "mapped-file":
        pytest.skip("nothing is hidden")
    for name in (META, META_ROOT):
        results = []
        for side in SIDES:
            path = f"{side}/{name}"
            assert name not in process.listdir(side)
            for call in (process.lstat, process.mkdir, process.unlink, process.rmdir, process.open):
                with pytest.raises(OSError) as refused:  # noqa: PT011
                    call(path)
                results.append(refused.value.errno)
        assert results[:5] == results[5:]
