"""An ordinary user's daemon: whose his files are for the guest, and whose the guest's are here."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import NOFID, SetattrValid, Tattach, Tsetattr, Tunlinkat
from tests.conftest import OTHER_USER, StartDaemon
from tests.support.client import ROOT, Client, P9Error
from tests.support.mapped import KEPT, KINDS, make

ME = OTHER_USER
MINE = (ME, ME)
USER, WEB = 50, 51
"""Fids of the guest's users 1000 and 33."""
MODELS = ["auto", "mapped-file", "passthrough", "none"]
REAL = ["passthrough", "none"]
Serve = Callable[..., Client]


@pytest.fixture
def project(export: Path) -> Path:
    """The user's own directory, with a few files in it."""
    (export / "src").mkdir()
    (export / "src/main.c").write_text("text")
    (export / "run").write_text("text")
    (export / "link").symlink_to("run")
    for path in (export, *export.rglob("*")):
        os.chown(path, *MINE, follow_symlinks=False)
    (export / "run").chmod(0o755)
    return export


@pytest.fixture
def serve(start_daemon: StartDaemon, project: Path, other_user: tuple[str, ...]) -> Iterator[Serve]:
    clients: list[Client] = []

    def do(model: str, guest: int, *more: str) -> Client:
        maps = ("--map-uid", f"{guest}:{ME}:1", "--map-gid", f"{guest}:{ME}:1")
        daemon = start_daemon("--security-model", model, *maps, *more, launcher=other_user)
        client = Client(daemon.socket)
        clients.append(client)
        client.attach()
        client.rpc(Tattach(USER, NOFID, b"", b"", 1000))
        client.rpc(Tattach(WEB, NOFID, b"", b"", 33))
        return client

    yield do
    for client in clients:
        client.close()


def shown(client: Client, *names: bytes) -> tuple[int, int]:
    client.walk(ROOT, 997, *names)
    found = client.getattr(997)
    client.clunk(997)
    return found.uid, found.gid


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


# My directory is the guest's root's, or its user 1000's, and all is mine here


@pytest.mark.parametrize("guest", [0, 1000])
@pytest.mark.parametrize("model", MODELS)
def test_all_is_mine(serve: Serve, project: Path, model: str, guest: int) -> None:
    """Whoever is meant, he makes, changes and removes as on a file system of his own."""
    client, fid = serve(model, guest), USER if guest else ROOT
    for names in ((), (b"src",), (b"src", b"main.c"), (b"run",), (b"link",)):
        assert shown(client, *names) == (guest, guest)
    for kind in set(KINDS) - ({"char", "block"} if model in REAL else set()):
        name = kind.encode()
        make(client, fid, kind, name, 0o750, guest)
        assert owner(project / kind) == MINE
        assert shown(client, name) == (guest, guest)
    client.walk(fid, 1, b"file")
    client.rpc(Tsetattr(1, SetattrValid.MODE, 0o711, 0, 0, 0, 0, 0, 0, 0))
    client.rpc(Tsetattr(1, SetattrValid.UID | SetattrValid.GID, 0, guest, guest, 0, 0, 0, 0, 0))
    assert client.getattr(1).mode == stat.S_IFREG | 0o711
    assert owner(project / "file") == MINE
    if model in REAL:  # so is the mode, and the link
        assert (project / "file").stat().st_mode == stat.S_IFREG | 0o711
        assert (project / "symlink").is_symlink()
    client.rpc(Tunlinkat(fid, b"file", 0))
    assert not (project / "file").exists()


@pytest.mark.parametrize("guest", [0, 1000])
@pytest.mark.parametrize("model", ["auto", "mapped-file"])
def test_others_in_mapped_models(serve: Serve, project: Path, model: str, guest: int) -> None:
    """All the guest's users make files, and are kept beside them as the guest says, like QEMU."""
    client = serve(model, guest)
    for fid, uid in ((ROOT, 0), (USER, 1000), (WEB, 33)):
        name = f"of{uid}"
        make(client, fid, "file", name.encode(), 0o640, uid + 1)
        assert shown(client, name.encode()) == (uid, uid + 1)
        assert owner(project / name) == MINE
        kept = KEPT["mapped-xattr" if model == "auto" else model](project / name, project)
        assert (kept["uid"], kept["gid"]) == (uid, uid + 1)
    client.walk(ROOT, 1, b"run")
    client.rpc(Tsetattr(1, SetattrValid.UID, 0, 33, 0, 0, 0, 0, 0, 0))
    assert shown(client, b"run") == (33, guest)
    assert owner(project / "run") == MINE


@pytest.mark.parametrize("guest", [0, 1000])
@pytest.mark.parametrize("model", REAL)
def test_others_with_real_owners(serve: Serve, project: Path, model: str, guest: int) -> None:
    """They are nobody on the host; unless --squash-to makes them its user."""
    client = serve(model, guest)
    before = sorted(os.listdir(project))
    for fid, uid in ((ROOT, 0), (USER, 1000), (WEB, 33)):
        if uid == guest:
            continue
        with pytest.raises(P9Error, match="Value too large"):
            make(client, fid, "file", b"x", 0o640, guest)
    client.walk(ROOT, 1, b"run")
    chown = Tsetattr(1, SetattrValid.UID, 0, 33, 0, 0, 0, 0, 0, 0)
    assert client.error(chown) == "EOVERFLOW"
    assert sorted(os.listdir(project)) == before

    squashing = serve(model, guest, "--squash-to", f"{ME}:{ME}")
    for fid, uid in ((ROOT, 0), (USER, 1000), (WEB, 33)):
        name = f"of{uid}"
        make(squashing, fid, "file", name.encode(), 0o640, uid + 1)
        assert shown(squashing, name.encode()) == (guest, guest)
        assert owner(project / name) == MINE
    squashing.walk(ROOT, 1, b"run")
    squashing.rpc(chown)
    assert shown(squashing, b"run") == (guest, guest)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_others(serve: Serve, project: Path, model: str) -> None:
    """Nobody's for the guest, and theirs here, where their permissions decide: the kernel sees to
    that, for the daemon has no privileges.
    """
    theirs = project / "theirs"
    theirs.write_text("text")
    client = serve(model, 0)
    assert shown(client, b"theirs") == (65534, 65534)
    client.walk(ROOT, 1, b"theirs")
    with pytest.raises(P9Error, match=r"denied|not permitted"):
        client.open(1, 2, flags=1)
    theirs.chmod(0o666)
    client.open(1, 3, flags=1)
    client.write(3, 0, b"more")
    assert theirs.read_text() == "more"


def test_acls_in_files(serve: Serve, project: Path) -> None:
    """mapped-file keeps none itself: they are the host's, so their ids are."""
    client = serve("mapped-file", 1000)
    name = "system.posix_acl_access"

    def acl(user: int) -> bytes:
        no_id = 0xFFFFFFFF
        entries: list[Any] = [(1, 6, no_id), (2, 4, user), (4, 4, no_id), (16, 4, no_id)]
        packed = [
            tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + number.to_bytes(4, "little")
            for tag, mode, number in [*entries, (32, 0, no_id)]
        ]
        return b"".join([b"\2\0\0\0", *packed])

    client.walk(ROOT, 1, b"run")
    client.set_xattr(1, name.encode(), acl(1000))
    assert os.getxattr(project / "run", name) == acl(ME)
    assert client.get_xattr(1, name.encode()) == acl(1000)
    with pytest.raises(P9Error, match="Invalid argument"):
        client.set_xattr(1, name.encode(), acl(33))
