"""Guests of every kind in front of a daemon, for many tests to mount and unmount in."""

import contextlib
import errno
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ninepd_guests.boot import Share, Virtfs, boot_qemu, boot_uml
from ninepd_guests.machine import Guest
from tests.support.client import Daemon

TAG = "test"
PEER = "peer"
"""The tag of QEMU's own server, where there is one."""
_TAIL = 3000  # characters of the console beside a failure


def boot(front: str, shares: Sequence[Share] = (), virtfs: Sequence[Virtfs] = ()) -> Guest:
    """``front`` is "uml", or "qemu-" and a kernel's series."""
    if front == "uml":
        return boot_uml(shares)
    return boot_qemu(shares, kernel=front.removeprefix("qemu-"), virtfs=virtfs)


def check(guest: Guest, export: Path, name: str) -> None:
    """The share works in both directions."""
    guest.run(f"echo guest > /mnt/{name}")
    assert (export / name).read_text() == "guest\n"
    (export / name).write_text("host")
    assert guest.run(f"cat /mnt/{name}").text == "host"


def outcomes(steps: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """What each step came to: "ok", or the name of its errno."""
    result = {}
    for name, step in steps.items():
        try:
            step()
        except OSError as error:
            result[name] = errno.errorcode[error.errno or 0]
        else:
            result[name] = "ok"
    return result


@dataclass(frozen=True)
class Place:
    """A directory of one test, seen from both sides."""

    guest: Guest
    path: str
    host: Path


class Station:
    """A guest that many tests use, one after the other; one that a test broke is replaced."""

    def __init__(self, front: str, folder: Path) -> None:
        self.front = front
        self.export = folder / "export"
        self.peer = folder / "peer"
        self.export.mkdir()
        self.peer.mkdir()
        self.daemon = Daemon(socket=str(folder / "s"), export=str(self.export), tag=TAG)
        self._names = (f"place{number}" for number in itertools.count())
        self._guest: Guest | None = None

    @property
    def has_peer(self) -> bool:
        return self.front != "uml"

    @property
    def guest(self) -> Guest:
        if self._guest is None:
            virtfs = [Virtfs(PEER, str(self.peer))] if self.has_peer else []
            self._guest = boot(self.front, [Share(TAG, self.daemon.socket)], virtfs)
        return self._guest

    @contextlib.contextmanager
    def mounted(
        self,
        cache: str = "none",
        msize: int | None = None,
        options: str = "",
        *,
        peer: bool = False,
    ) -> Iterator[Place]:
        """A fresh directory on a fresh mount; ``peer`` asks for QEMU's own server."""
        root = self.peer if peer else self.export
        where = "/peer" if peer else "/mnt"
        name = next(self._names)
        host = root / name
        host.mkdir(mode=0o755)
        guest = self.guest
        try:
            tag = PEER if peer else TAG
            guest.mount(tag, where, cache=cache, msize=msize, options=options)
            yield Place(guest, f"{where}/{name}", host)
            guest.umount(where)
        except BaseException as error:
            error.add_note(f"--- the guest's console:\n{guest.console[-_TAIL:]}")
            self.discard()
            raise
        finally:
            shutil.rmtree(host)

    def discard(self) -> None:
        if self._guest is not None:
            self._guest.kill()
            self._guest = None

    def close(self) -> None:
        """Ends both; the daemon must have had no trouble of its own, whatever the guest did."""
        try:
            if self._guest is not None:
                self._guest.close()
        finally:
            status = self.daemon.stop()
        log = self.daemon.log
        assert status == 0, log
        assert "bug" not in log, log
        assert "Traceback" not in log, log
