"""An idmapped mount of the kernel's and the class behind the seam give the same answers."""

import itertools
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.idranges import IdRange
from ninepd.p9.messages import (
    NOFID,
    SetattrValid,
    Tattach,
    Tclunk,
    Tlcreate,
    Tlink,
    Tlopen,
    Tmkdir,
    Tmknod,
    Trenameat,
    Tsetattr,
    Tsymlink,
    Tunlinkat,
    Twalk,
    Txattrwalk,
)
from tests.conftest import Mount, StartDaemon
from tests.support.client import ROOT, Client, P9Error
from tests.support.idmapped import mount_idmapped
from tests.support.mapped import KINDS, make

pytestmark = pytest.mark.usefixtures("as_root")

USERS = (IdRange(0, 100000, 65536), IdRange(70000, 5, 10))
GROUPS = (IdRange(0, 200000, 1000), IdRange(2000, 6, 1))
OPTIONS = [
    word
    for option, ranges in (("--map-uid", USERS), ("--map-gid", GROUPS))
    for said in ranges
    for word in (option, str(said))
]
OWNERS = [
    (100000, 200000),
    (165535, 200999),
    (14, 6),
    (0, 0),
    (100000, 0),
    (4, 200000),
    (7, 201000),
]
"""On the host."""
MAKERS = [(0, 0), (1000, 999), (70009, 2000), (65536, 0), (0, 1000), (1, 2001), (0xFFFFFFFF, 0)]
"""In the guest."""
NO_ID = 0xFFFFFFFF


@pytest.fixture(params=["tmpfs", "ext4"])
def tops(
    request: pytest.FixtureRequest, tmp_path: Path, mount: Mount, mount_ext4: Mount
) -> Iterator[tuple[Path, Path]]:
    """A directory, and another one that is seen through an idmapped mount."""
    plain = tmp_path / "plain"
    if request.param == "tmpfs":
        mount(plain, "-t", "tmpfs", "none")
    else:
        mount_ext4(plain)
    served, shown = plain / "served", tmp_path / "shown"
    for path in (served, plain / "idmapped"):
        path.mkdir()
        fill(path)
    shown.mkdir()
    try:
        mount_idmapped(plain / "idmapped", shown, USERS, GROUPS)
    except OSError as error:
        pytest.skip(f"no idmapped mounts of {request.param} here: {error.strerror}")
    yield served, shown
    subprocess.run(["umount", "--lazy", shown], check=True)


def fill(top: Path) -> None:
    """A file, fid 2n + 10, and a directory, fid 2n + 11, of each owner."""
    os.chown(top, *OWNERS[0])
    for number, owner in enumerate(OWNERS):
        for kind in ("file", "directory"):
            path = top / f"{kind}{number}"
            if kind == "file":
                path.write_text("")
            else:
                path.mkdir()
                (path / "inner").write_text("")
                os.chown(path / "inner", *OWNERS[0])
            os.chown(path, *owner)


@pytest.fixture
def both(start_daemon: StartDaemon, tops: tuple[Path, Path]) -> Iterator[list[Client]]:
    clients = []
    for top, options in zip(tops, (OPTIONS, []), strict=True):
        daemon = start_daemon("--security-model", "passthrough", *options, export=str(top))
        client = Client(daemon.socket)
        clients.append(client)
        client.attach()
        for number, (uid, _) in enumerate(MAKERS):
            client.rpc(Tattach(100 + number, NOFID, b"", b"", uid))
        for number in range(len(OWNERS)):
            client.walk(ROOT, 2 * number + 10, b"file%d" % number)
            client.walk(ROOT, 2 * number + 11, b"directory%d" % number)
    yield clients
    for client in clients:
        client.close()


def owners(client: Client, fid: int) -> tuple[int, int]:
    found = client.getattr(fid)
    return found.uid, found.gid


def test_owners(both: list[Client]) -> None:
    shown = [[owners(client, fid) for fid in range(10, 10 + 2 * len(OWNERS))] for client in both]
    assert shown[0] == shown[1]
    assert [pair for pair in shown[0][::2] if 65534 not in pair] == [
        (0, 0),
        (65535, 999),
        (70009, 2000),
    ]


def test_making(both: list[Client], tops: tuple[Path, Path]) -> None:
    answers: list[list[object]] = []
    for client, top in zip(both, (tops[0], tops[0].parent / "idmapped"), strict=True):
        answers.append([])
        for kind, (number, (_, gid)) in itertools.product(KINDS, enumerate(MAKERS)):
            name = f"{kind}-{number}"
            try:
                make(client, 100 + number, kind, name.encode(), 0o640, gid)
            except P9Error as error:
                answers[-1].append(error.errno)
                continue
            host = (top / name).lstat()
            client.walk(ROOT, 1, name.encode())
            answers[-1].append(((host.st_uid, host.st_gid), owners(client, 1)))
            client.clunk(1)
    assert answers[0] == answers[1]
    made = [answer for answer in answers[0] if isinstance(answer, tuple)]
    assert len(made) == 4 * len(KINDS)
    assert len(set(made)) == 3


def change(fid: int, valid: int, mode: int = 0, uid: int = 0, gid: int = 0) -> Tsetattr:
    return Tsetattr(fid, valid, mode, uid, gid, 0, 0, 0, 0, 0)


CHANGES: dict[str, Any] = {
    "write": lambda file, _: Tlopen(file, 1),
    "read": lambda file, _: Tlopen(file, 0),
    "get an attribute": lambda file, _: Txattrwalk(file, 3, b"user.none"),
    "list there": lambda _, directory: Tlopen(directory, 0),
    "walk there": lambda _, directory: Twalk(directory, 3, (b"inner",)),
    "truncate": lambda file, _: change(file, SetattrValid.SIZE),
    "chmod": lambda file, _: change(file, SetattrValid.MODE, 0o600),
    "utimes": lambda file, _: change(file, SetattrValid.MTIME | SetattrValid.MTIME_SET),
    "chown away": lambda file, _: change(file, SetattrValid.UID, uid=65536),
    "chgrp away": lambda file, _: change(file, SetattrValid.GID, gid=1000),
    "link": lambda file, _: Tlink(ROOT, file, b"name"),
    "create there": lambda _, directory: Tlcreate(directory, b"name", 0x8042, 0o600, 0),
    "mkdir there": lambda _, directory: Tmkdir(directory, b"name", 0o700, 0),
    "mkdir of what is": lambda _, directory: Tmkdir(directory, b"inner", 0o700, 0),
    "mknod there": lambda _, directory: Tmknod(directory, b"name", stat.S_IFIFO, 0, 0, 0),
    "symlink there": lambda _, directory: Tsymlink(directory, b"name", b"t", 0),
    "unlink there": lambda _, directory: Tunlinkat(directory, b"inner", 0),
    "rename from there": lambda _, directory: Trenameat(directory, b"inner", ROOT, b"name"),
}
BY_NAME: dict[str, Any] = {
    "unlink": lambda number: Tunlinkat(ROOT, b"file%d" % number, 0),
    "rmdir": lambda number: Tunlinkat(ROOT, b"directory%d" % number, 0x200),
    "rename": lambda number: Trenameat(ROOT, b"file%d" % number, ROOT, b"name"),
    "mkdir of what is": lambda _: Tmkdir(ROOT, b"victim", 0o700, 65536),
    "replace": lambda number: Trenameat(ROOT, b"victim", ROOT, b"file%d" % number),
}


def restore(top: Path, number: int, mode: int) -> None:
    """What ``fill`` has made, with these permissions, and nothing else."""
    directory = top / f"directory{number}"
    for made in (top / "name", directory / "name"):
        if made.is_dir():
            made.rmdir()
        else:
            made.unlink(missing_ok=True)
    if not (directory / "inner").exists():
        (directory / "inner").write_text("")
        os.chown(directory / "inner", *OWNERS[0])
    for path in (top / f"file{number}", directory):
        path.chmod(mode)


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o705])
def test_changes(both: list[Client], tops: tuple[Path, Path], mode: int) -> None:
    answers: list[dict[tuple[str, int], str]] = []
    for client, top in zip(both, (tops[0], tops[0].parent / "idmapped"), strict=True):
        answers.append({})
        for what, number in itertools.product(CHANGES, range(len(OWNERS))):
            restore(top, number, mode)
            client.walk(2 * number + 10, 1)
            client.walk(2 * number + 11, 2)
            answers[-1][what, number] = client.error(CHANGES[what](1, 2))
            client.clunk(1, 2)
            client.error(Tclunk(3))
    assert answers[0] == answers[1]
    assert set(answers[0].values()) >= {"", "EACCES", "EOVERFLOW", "EEXIST"}


def test_taking_over(both: list[Client], tops: tuple[Path, Path]) -> None:
    """What the kernel lets a process with CAP_CHOWN do (Linux, fs/attr.c, chown_ok)."""
    both_ids = SetattrValid.UID | SetattrValid.GID
    answers = [
        [client.error(change(2 * at + 10, both_ids, uid=1, gid=1)) for at in range(len(OWNERS))]
        for client in both
    ]
    assert answers[0] == ["", "", "", *["EOVERFLOW"] * 4]
    assert answers[1] == ["", "", "", "", *["EPERM"] * 3]
    assert (tops[0] / "file3").stat().st_uid == 0


def test_changes_by_name(both: list[Client]) -> None:
    answers: list[dict[tuple[str, int], str]] = []
    for client in both:
        answers.append({})
        for what, number in itertools.product(BY_NAME, range(len(OWNERS))):
            client.create(ROOT, 1, b"victim", flags=0x8042)
            client.clunk(1)
            answers[-1][what, number] = client.error(BY_NAME[what](number))
            client.error(Tunlinkat(ROOT, b"name", 0))
    assert answers[0] == answers[1]
    assert set(answers[0].values()) >= {"", "EOVERFLOW"}
