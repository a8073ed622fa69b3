"""A host user swaps directories, files and links at full speed while a guest uses their names.

Outside the export lie files that nobody may read or change: inotify tells of every access to them,
no reply may hold what is in them, and in the end they and their attributes are as they were. Others
may list their directories, as find(1) does; that no guest has, the replies tell.

NINEPD_RACES is how many attempts there are, in all models together: 10,000 unless it says so.
"""

import itertools
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from ninepd.p9 import messages as p9
from ninepd.p9.messages import decode, encode
from tests.conftest import StartDaemon
from tests.support.attempts import BELOW, DEEP, HOW_MANY, KINDS, MANY, WAYS
from tests.support.client import ROOT, Client, entries
from tests.support.watching import CHANGES, Watch

SECRET = b"secret-5b1c"
UID = 77_777
CONTENT = b"virtfs.uid=%d\nvirtfs.gid=%d\n%s\n" % (UID, UID, SECRET)
"""What mapped-file would take for owners, if it read it."""
SIZE = len(CONTENT)
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "passthrough": ("--security-model", "passthrough"),
    "none, names": ("--security-model", "none", "--reclaim", "names"),
    "mapped-xattr": ("--security-model", "mapped-xattr"),
    "mapped-file": ("--security-model", "mapped-file"),
}
ATTEMPTS = int(os.environ.get("NINEPD_RACES", "10000")) // len(CONFIGURATIONS)
AT_ONCE = 24
"""Attempts in one kick; each has fids of its own."""


# What is outside


class Fact(NamedTuple):
    """All that could be changed of a file."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    atime: int
    mtime: int
    ctime: int
    xattrs: tuple[str, ...]


class Outside:
    """A directory beside the export, with files that hold a secret."""

    def __init__(self, top: Path) -> None:
        self.top = top
        (top / "sub").mkdir(parents=True)
        (top / "pit").mkdir()
        directories = [top, top / "sub"]
        self.secrets = [top / "f", top / "sub/f", top / "pit/f"]
        for path in self.secrets:
            path.write_bytes(CONTENT)
            path.chmod(0o640)
        self._watched = [*self.secrets, *directories]
        self._before = self._facts()
        self.inodes = {path.lstat().st_ino for path in [*self._watched, top / "pit"]}
        self.watch = Watch(*self.secrets)
        self.watch.add(*directories, mask=CHANGES)

    def _facts(self) -> list[Fact]:
        found = []
        for path in self._watched:
            i = path.lstat()
            atime = 0 if path.is_dir() else i.st_atime_ns
            times = atime, i.st_mtime_ns, i.st_ctime_ns
            names = tuple(os.listxattr(path, follow_symlinks=False))
            found.append(Fact(i.st_mode, i.st_uid, i.st_gid, i.st_nlink, i.st_size, *times, names))
        return found

    def check(self) -> None:
        """Nothing has happened to them."""
        assert self.watch.events() == []
        assert self._facts() == self._before
        assert {*os.listdir(self.top / "pit"), "deep"} == {"f", "deep"}
        assert set(os.listdir(self.top)) == {"f", "sub", "pit"}
        assert os.listdir(self.top / "sub") == ["f"]
        assert all(path.read_bytes() == CONTENT for path in self.secrets)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    found = Outside(tmp_path / "outside")
    with found.watch:
        yield found


@pytest.fixture(scope="module")
def flipper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host user's program."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    program = tmp_path_factory.mktemp("flipper") / "flipper"
    source = Path(__file__).parent / "support/flipper.c"
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", "-std=gnu11", "-O2", *warnings, "-o", program, source], check=True)
    return program


class Flipping:
    """The host user at work, as long as the context lasts."""

    def __init__(self, program: Path, export: Path, outside: Path) -> None:
        self._process = subprocess.Popen(
            [program, export, outside], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def stop(self) -> int:
        """How often something was swapped."""
        self._process.terminate()
        said, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, said
        return int(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


# Races


def send_all(client: Client, requests: list[Any], tags: Iterator[int]) -> dict[int, Any]:
    heads = {}
    for message in requests:
        raw = encode(next(tags) % 60_000, message)
        data = b"mine" if isinstance(message, p9.Twrite) else b""
        raw = (len(raw) + len(data)).to_bytes(4, "little") + raw[4:] + data
        heads[client.driver.submit([raw], [4096])] = message
    client.driver.kick()
    return heads


def check_reply(raw: bytes, outside: Outside) -> Any:
    """No reply may tell of what is outside; but a link's target may be read."""
    _, reply = decode(raw)
    assert SECRET not in raw
    if hasattr(reply, "qid"):
        assert reply.qid.path not in outside.inodes, reply
    match reply:
        case p9.Rgetattr():
            assert (reply.size, reply.uid) != (SIZE, os.geteuid()), reply
            assert reply.uid != UID, reply
        case p9.Rwalk():
            assert not {qid.path for qid in reply.qids} & outside.inodes, reply
        case p9.Rreaddir():
            listed = {entry.qid.path for entry in entries(raw[11:]) if entry.name != b".."}
            assert not listed & outside.inodes
    return reply


def prepare(client: Client, export: Path) -> None:
    (export / "link").symlink_to("d")
    (export / "many").mkdir()
    for number in range(HOW_MANY):
        (export / f"many/{number}").touch()
    client.attach()
    client.walk(ROOT, DEEP, b"deep")
    client.walk(DEEP, BELOW, b"sub")
    for number in range(HOW_MANY):
        client.walk(ROOT, MANY + number, b"many", b"%d" % number)


@pytest.mark.threat("t_symlink_swap", "t_dotdot_storm", "t_rename_storm", "t_moved_out")
@pytest.mark.parametrize("how", CONFIGURATIONS)
def test_no_swap_leads_outside(
    start_daemon: StartDaemon, export: Path, outside: Outside, flipper: Path, how: str
) -> None:
    few = ("prlimit", "--nofile=256")
    if os.geteuid() and how == "passthrough":
        pytest.skip("needs root")
    daemon = start_daemon(*CONFIGURATIONS[how], launcher=few if "names" in how else ())
    said: Counter[tuple[str, str]] = Counter()
    (export / "deep/sub").mkdir(parents=True)
    with Client(daemon.socket, num=1024) as client:
        prepare(client, export)
        (export / "x").mkdir()
        (export / "deep").rename(export / "x/deep")
        choice = random.Random()  # a seed would bring nothing back: the host user decides
        tags = itertools.count()
        with Flipping(flipper, export, outside.top) as flipping:
            for _ in range(ATTEMPTS // AT_ONCE):
                requests = []
                for at in range(AT_ONCE):
                    kind, way = choice.choice(KINDS), choice.choice(WAYS)
                    requests += kind(10 + at, 100 + at, way)
                heads = send_all(client, requests, tags)
                for head, length in client.driver.wait_used(count=len(heads)):
                    reply = check_reply(client.driver.reply(head, length), outside)
                    said[type(heads[head]).__name__, type(reply).__name__] += 1
                assert outside.watch.events() == []
            swaps = flipping.stop()
        client.getattr(ROOT)
    outside.check()
    for sent in ("Twalk", "Tlcreate", "Tlopen", "Trenameat", "Tunlinkat", "Tattach"):
        assert {name for asked, name in said if asked == sent} == {"Rlerror", f"R{sent[1:]}"}
    assert swaps > ATTEMPTS
    print(f"{how}: {ATTEMPTS} attempts, {said.total()} requests, {swaps} swaps")  # noqa: T201


def test_whoever_follows_is_seen(outside: Outside, export: Path, flipper: Path) -> None:
    """The same host user, and a careless server that goes by paths."""
    seen = b""
    with Flipping(flipper, export, outside.top) as flipping:
        while not outside.watch.events():
            try:
                seen = (export / "d/f").read_bytes()
            except OSError:
                continue
        assert flipping.stop() > 0
    assert seen
