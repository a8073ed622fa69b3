"""Records what a guest's kernel sends: ``python -m fuzz.record FOLDER``

Writes a file of traffic for each of the workloads below, run in User-Mode Linux on the scene that
is fuzzed.

It is read out of the daemon's trace. The data of a write is not in it: zeros, and no more of them
than matters, take its place. Each batch of requests that no reply came between was one kick.
"""

import ast
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ninepd.p9 import messages
from ninepd.p9.messages import Twrite
from ninepd_guests.boot import Share, boot_uml
from ninepd_guests.remote import Process

from . import grammar
from .live import started
from .scene import Scene
from .traffic import KICK, RECORDS_MAX, Record, default_room, join

_LINE: Final = re.compile(r"tag (\d+) ([TR]\w+)(\(.*\))$")
_DATA_MAX: Final = 256
_NEW: Final = os.O_CREAT | os.O_EXCL | os.O_RDWR


def _files(guest: Process) -> None:
    fd = guest.open("new", _NEW)
    guest.write(fd, b"x" * 5000)
    guest.pread(fd, 100, 4096)
    guest.fsync(fd)
    guest.ftruncate(fd, 10)
    guest.fchmod(fd, 0o600)
    guest.fstat(fd)
    guest.unlink("new")
    guest.pwrite(fd, b"gone", 0)
    guest.close(fd)
    fd = guest.open("f", os.O_RDWR | os.O_APPEND)
    guest.write(fd, b"more")
    guest.close(fd)
    guest.truncate("f", 3)


def _names(guest: Process) -> None:
    guest.mkdir("d/sub")
    guest.symlink("below", "d/to")
    guest.readlink("d/to")
    guest.link("f", "d/hard")
    guest.rename("d/hard", "d/sub/moved")
    guest.mknod("d/pipe", 0o010600)
    guest.chown("f", 1000, 1000)
    guest.chmod("d", 0o2775)
    guest.utimens("f", 1, 2)
    guest.stat("d/sub/moved")
    guest.statfs("d")
    for name in ("d/sub/moved", "d/pipe", "d/to"):
        guest.unlink(name)
    guest.rmdir("d/sub")


def _listing(guest: Process) -> None:
    for number in range(12):
        guest.close(guest.open(f"d/{number}", _NEW))
    guest.listdir("d")
    guest.listdir(".")
    fd = guest.open("d", os.O_RDONLY | os.O_DIRECTORY)
    guest.getdents(fd, 512)
    guest.getdents(fd, 512)
    guest.lseek(fd, 0)
    guest.getdents(fd)
    guest.close(fd)


def _locks(guest: Process) -> None:
    read_lock, write_lock, unlock = 0, 1, 2
    fd = guest.open("f", os.O_RDWR)
    guest.setlk(fd, write_lock, 0, 10)
    guest.setlk(fd, read_lock, 5, 10)
    guest.getlk(fd, write_lock)
    guest.setlk(fd, unlock)
    guest.flock(fd, 2)
    guest.flock(fd, 8)
    guest.close(fd)


def _xattrs(guest: Process) -> None:
    guest.setxattr("f", "user.name", b"value" * 20)
    guest.getxattr("f", "user.name")
    guest.listxattr("f")
    guest.setxattr("d", "user.other", b"")
    guest.removexattr("f", "user.name")


WORKLOADS: Final[dict[str, tuple[Callable[[Process], None], str, str]]] = {
    "files": (_files, "none", ""),
    "files-loose": (_files, "loose", ""),
    "names": (_names, "none", ""),
    "listing": (_listing, "none", ""),
    "locks": (_locks, "none", ""),
    "xattrs": (_xattrs, "none", ""),
    "files-u": (_files, "none", "version=9p2000.u"),
    "names-loose": (_names, "loose", ""),
}
"""What is done, and how it is mounted."""


def traffic_of(trace: str) -> Iterator[Record]:
    """The requests in a daemon's trace, and kicks."""
    asked = False
    for line in trace.splitlines():
        found = _LINE.search(line)
        if found is None:
            continue
        tag, name, fields = found.groups()
        if name.startswith("R"):
            if asked:
                yield KICK
            asked = False
            continue
        asked = True
        yield _request(int(tag), name, fields)


def _request(tag: int, name: str, fields: str) -> Record:
    call = ast.parse(f"f{fields}", mode="eval").body
    assert isinstance(call, ast.Call)
    values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    message: Any = getattr(messages, name)(**values)
    data = b""
    if isinstance(message, Twrite):
        message = message._replace(nbytes=min(message.nbytes, _DATA_MAX))
        data = bytes(message.nbytes)
    raw = grammar.encoded(tag, message, data)
    return Record(raw, default_room(raw))


def record(name: str, target: Path, folder: Path) -> None:
    """Boot a guest, run a workload, write its traffic."""
    work, cache, options = WORKLOADS[name]
    scene, log, socket = Scene(folder), folder / "log", str(folder / "socket")
    arguments = ("--socket-path", socket, "--export", str(scene.export), "--tag", "fuzz", "--trace")
    daemon = started(log, *arguments)
    try:
        with boot_uml([Share("fuzz", socket)]) as guest:
            guest.mount("fuzz", cache=cache, options=options)
            with guest.process() as process:
                process.chdir("/mnt")
                try:
                    work(process)
                except OSError as error:  # an old dialect cannot do all of it
                    print(f"{name}: {error}")
            guest.umount()
    finally:
        daemon.terminate()
        daemon.wait()
    records = list(traffic_of(log.read_text()))[:RECORDS_MAX]
    (target / f"uml-{name}").write_bytes(join(records))
    print(f"{name}: {sum(record.is_request for record in records)} requests")


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name in WORKLOADS:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            record(name, target, Path(folder))


if __name__ == "__main__":
    main()
