"""SIGHUP: the file is read again, and what guests use stays as it is."""

import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ninepd.activation import Activated
from ninepd.config import Config, Export
from ninepd.p9.messages import Tlcreate
from ninepd.reload import Plan, compare, sockets
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, children
from tests.support.waiting import eventually

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="owners of files are root's to choose")


class Scene:
    """A file of exports, each with a folder and a socket of its own, and who serves it."""

    def __init__(self, folder: Path, start: StartDaemon) -> None:
        self._folder = folder
        self._path = folder / "exports.toml"
        self._start = start
        self.above = ""
        """What the file says of the daemon."""
        self.exports: dict[str, str] = {}
        """Of each tag, what the file says besides."""
        self.daemon: Daemon

    def socket(self, tag: str) -> str:
        return str(self._folder / f"{tag}.sock")

    def write(self) -> None:
        text = self.above
        for tag, options in self.exports.items():
            folder = self._folder / tag
            folder.mkdir(exist_ok=True)
            text += f'[[export]]\nexport = "{folder}"\ntag = "{tag}"\n'
            if "socket-path" not in options:
                text += f'socket-path = "{self.socket(tag)}"\n'
            text += options + "\n"
        self._path.write_text(text)

    def start(self, *arguments: str, **exports: str) -> None:
        self.exports = exports
        self.write()
        self.daemon = self._start("--verbose", *arguments, config=str(self._path))

    def reload(self) -> None:
        self.write()
        self.daemon.reload()

    @property
    def processes(self) -> dict[str, int]:
        """Those that serve, by tag, as soon as all of them have their names."""
        found: dict[str, int] = {}

        def named() -> bool:
            found.clear()
            for pid in children(self.daemon.pid):
                name = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
                if name:  # else it has ended
                    found[name.removeprefix("ninepd: ")] = pid
            return "supervisor" not in found

        eventually(named, "processes have their names")
        return found

    def use(self, tag: str) -> set[bytes]:
        """What a guest sees in an export."""
        with Client(self.socket(tag)) as client:
            client.attach()
            return client.names(ROOT)

    def log(self) -> str:
        """All of it: the daemon has ended then."""
        assert self.daemon.stop() == 0
        return self.daemon.log


@pytest.fixture
def scene(tmp_path: Path, start_daemon: StartDaemon) -> Scene:
    return Scene(tmp_path, start_daemon)


@pytest.fixture
def one_file(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        return tmp_path / name

    return make


def test_added(scene: Scene, one_file: Callable[[str], Path]) -> None:
    """To a daemon of one export, too; and the guest of that notices nothing."""
    one_file("b")
    scene.start(a="")
    with Client(scene.socket("a")) as guest:
        guest.attach()
        before = scene.processes
        scene.exports["b"] = ""
        scene.reload()
        guest.getattr(ROOT)
        assert scene.use("b") == {b"file"}
        assert scene.processes["a"] == before["a"]
    assert set(scene.processes) == {"a", "b"}


@needs_root
def test_added_with_more_privileges(scene: Scene) -> None:
    """As if it had been there at the start."""
    scene.start(a='security-model = "mapped-xattr"')
    scene.exports["b"] = 'security-model = "passthrough"\nallow-unsafe-export = true'
    scene.reload()
    with Client(scene.socket("b")) as client:
        client.attach(uid=1234)
        client.walk(ROOT, 1)
        client.rpc(Tlcreate(1, b"made", os.O_RDWR, 0o640, 1234))
    found = os.stat(Path(scene.socket("b")).parent / "b" / "made")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 1234, 0o640)


def test_removed(scene: Scene) -> None:
    scene.start(a="", b="", c="")
    before = scene.processes
    del scene.exports["b"]
    scene.reload()
    assert not os.path.exists(scene.socket("b"))
    eventually(lambda: "b" not in scene.processes, "its process ends")
    assert scene.processes == {"a": before["a"], "c": before["c"]}
    scene.use("c")
    log = scene.log()
    assert "b: served no more" in log
    assert "its process" not in log


def test_changed(scene: Scene) -> None:
    """The socket stays, so that who is about to connect gets through."""
    scene.start(a="", b="")
    inode, before = os.stat(scene.socket("a")), scene.processes
    scene.exports["a"] = "readonly = true"
    scene.reload()
    eventually(lambda: scene.processes.get("a") not in {None, before["a"]}, "another process")
    assert os.path.samestat(os.stat(scene.socket("a")), inode)
    with Client(scene.socket("a")) as client:
        client.attach()
        client.walk(ROOT, 1)
        assert client.error(Tlcreate(1, b"new", os.O_RDWR, 0o600, 0)) == "EROFS"
    assert scene.processes["b"] == before["b"]
    assert "its process" not in scene.log()


def test_unchanged(scene: Scene) -> None:
    scene.start(a="readonly = true", b='map-uid = ["0:1000:1"]')
    before = scene.processes
    with Client(scene.socket("b")) as guest:
        guest.attach()
        for _ in range(3):
            scene.reload()
            guest.getattr(ROOT)
    assert scene.processes == before
    assert "reload: " not in scene.log()


def test_what_a_guest_uses_stays_until_it_leaves(scene: Scene) -> None:
    scene.start(a="", b="")
    before = scene.processes
    with Client(scene.socket("a")) as first, Client(scene.socket("b")) as second:
        first.attach()
        second.attach()
        scene.exports = {"b": "readonly = true"}
        scene.reload()
        scene.reload()
        assert not os.path.exists(scene.socket("a"))
        for client in first, second:
            client.getattr(ROOT)
            client.create(ROOT, 1, b"new")
        assert scene.processes == before
    eventually(lambda: set(scene.processes) == {"b"}, "one is left")
    with Client(scene.socket("b")) as client:
        client.attach()
        client.walk(ROOT, 1)
        assert client.error(Tlcreate(1, b"other", os.O_RDWR, 0o600, 0)) == "EROFS"
    log = scene.log()
    for tag in "ab":
        assert log.count(f"reload: {tag}: its guest is connected, and keeps this export") == 1
    assert "its process" not in log


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[export]\n", "is not valid TOML"),
        ('surprise = 1\n[[export]]\ntag = "a"\n', "line 1: --surprise: this option is unknown"),
        ("", "there is no [[export]] in it"),
        (None, "No such file or directory"),
    ],
)
def test_file_that_is_wrong_changes_nothing(
    scene: Scene, tmp_path: Path, text: str | None, complaint: str
) -> None:
    scene.start(a="", b="")
    before = scene.processes
    (tmp_path / "exports.toml").unlink()
    if text is not None:
        (tmp_path / "exports.toml").write_text(text)
    scene.daemon.reload()
    assert scene.processes == before
    assert scene.use("a") == set()
    log = scene.log()
    assert "reload: nothing was changed: " in log
    assert complaint in log


def test_export_that_is_wrong_leaves_the_others(scene: Scene) -> None:
    """Only as it starts all of them have to be right."""
    scene.start(a="")
    Path(scene.socket("b")).write_text("no socket")
    scene.exports |= {"b": "", "c": ""}
    scene.reload()
    scene.use("c")
    assert set(scene.processes) == {"a", "c"}
    assert "(export 2): --socket-path:" in scene.log()


def test_descriptor_that_nobody_has_handed_over(scene: Scene) -> None:
    scene.start(a="")
    with open(os.devnull) as file:
        scene.exports["b"] = f"fd = {file.fileno()}\n#socket-path"
        scene.reload()
    assert set(scene.processes) == {"a"}
    assert "--fd: a descriptor can be handed over at the start only; restart" in scene.log()


def test_socket_elsewhere(scene: Scene, tmp_path: Path) -> None:
    scene.start(a="")
    scene.exports["a"] = f'socket-path = "{tmp_path}/other.sock"'
    scene.reload()
    assert not os.path.exists(scene.socket("a"))
    with Client(f"{tmp_path}/other.sock") as client:
        client.attach()


def test_mode_of_the_socket(scene: Scene) -> None:
    scene.start(a="")
    scene.exports["a"] = 'socket-mode = "0660"'
    scene.reload()
    assert stat.S_IMODE(os.stat(scene.socket("a")).st_mode) == 0o660
    scene.use("a")


def test_option_of_the_daemon(scene: Scene) -> None:
    scene.start(a="")
    scene.above = 'log-format = "json"\n'
    scene.exports["b"] = ""
    scene.reload()
    scene.use("b")
    assert "reload: --log-format is changed by a restart only" in scene.log()


def test_removed_and_added_again(scene: Scene, one_file: Callable[[str], Path]) -> None:
    """Before the process that has served it is gone."""
    one_file("b")
    scene.start(a="", b="")
    before = scene.processes["b"]
    os.kill(before, signal.SIGSTOP)
    del scene.exports["b"]
    scene.reload()
    scene.exports["b"] = "readonly = true"
    scene.reload()
    assert scene.processes["b"] == before
    os.kill(before, signal.SIGCONT)
    assert scene.use("b") == {b"file"}
    assert scene.processes["b"] != before
    assert "its process" not in scene.log()


def test_changed_while_it_waits_to_be_started(scene: Scene) -> None:
    """What makes its process die may be what was changed."""
    scene.start(a="", b="")
    for _ in range(6):
        eventually(lambda: "b" in scene.processes, "the next one starts")
        pid = scene.processes["b"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "it dies")  # type: ignore[misc]
    scene.exports["b"] = "readonly = true"
    started = time.monotonic()
    scene.reload()
    scene.use("b")
    assert time.monotonic() - started < 4  # of 5 that it would have waited


def test_plan(tmp_path: Path) -> None:
    """What stays is not in it."""
    exports = {
        tag: Export(export=str(tmp_path), tag=tag, socket_path=f"/run/{tag}") for tag in "abc"
    }
    before = Config(tuple(exports.values()))
    other = replace(exports["b"], readonly=True)
    new = replace(exports["a"], tag="d", socket_path="/run/d")
    wanted = Config((exports["a"], other, new), log_level="error")
    assert compare(before, exports, wanted) == Plan(
        removed=["c"], changed=[(2, other)], added=[(3, new)], settings=["log-level"]
    )
    assert compare(before, exports, before) == Plan()


def test_sockets_of_the_service_manager(tmp_path: Path) -> None:
    """They have the tags as names now, whatever they were called."""
    handed = Export(export=str(tmp_path), tag="a", fd=3)
    own = Export(export=str(tmp_path), tag="b", socket_path="/run/b")
    assert sockets([handed, own]) == [Activated("a", 3)]
