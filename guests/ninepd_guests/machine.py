"""A running guest: commands, processes, mounts, and its end."""

import contextlib
import shlex
import tempfile
from dataclasses import dataclass
from typing import Any

from .channel import Channel, Job, Sink
from .errors import GuestError
from .host import HostProgram
from .qmp import Qmp
from .remote import Process
from .terminal import interact

BOOT_LIMIT = 180.0  # seconds; TCG on a busy machine takes a while
FAREWELL_LIMIT = 20.0
MOUNTS_ESCAPES = str.maketrans({char: f"\\{ord(char):03o}" for char in " \t\n\\"})


@dataclass(frozen=True)
class Result:
    status: int
    output: bytes

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


class Running:
    """A command that may still run."""

    def __init__(self, channel: Channel, job: Job, command: str) -> None:
        self._channel = channel
        self._job = job
        self.command = command

    @property
    def done(self) -> bool:
        return self._job.status.done()

    @property
    def output(self) -> bytes:
        """What it has said so far."""
        return bytes(self._job.output)

    def wait(self, timeout: float = 60) -> Result:
        status = self._channel.result(self._job.status, timeout, f"in the guest: {self.command!r}")
        return Result(status, self.output)

    def kill(self, signal: int = 9) -> None:
        """Sends a signal to all of its process group."""
        self._channel.send("sig", self._job.ident, signal)


class Guest:
    """Made by ``boot_qemu`` or ``boot_uml``; a context manager that ends it."""

    def __init__(
        self,
        program: HostProgram,
        channel: Channel,
        *,
        qmp: Qmp | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._program = program
        self._channel = channel
        self._qmp = qmp
        self._folder = folder
        self._ended = False

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The first error is the one to see.
        with contextlib.suppress(GuestError) if kind else contextlib.nullcontext():
            self.close()

    @property
    def pid(self) -> int:
        """Of the host program."""
        return self._program.pid

    @property
    def console(self) -> str:
        """The guest's kernel log and the host program's messages so far."""
        return self._program.output.decode(errors="replace")

    def wait_up(self, timeout: float = BOOT_LIMIT) -> None:
        self._channel.wait_boot(1, timeout)

    def run(
        self,
        command: str,
        *,
        timeout: float = 60,
        check: bool = True,
        on_output: Sink | None = None,
    ) -> Result:
        """A shell command to its end, at which what it left in the background is not waited for.

        With ``on_output`` the output goes there as it comes, and is not kept.
        """
        result = self.start(command, on_output=on_output).wait(timeout)
        if check and result.status:
            raise GuestError(
                f"in the guest, {command!r} ended with status {result.status}: {result.text}"
            )
        return result

    def start(self, command: str, *, on_output: Sink | None = None) -> Running:
        job = self._channel.start("run", command.encode(), sink=on_output)
        return Running(self._channel, job, command)

    def process(self, uid: int | None = None, gid: int | None = None) -> Process:
        return Process(self._channel, uid, gid)

    def mount(
        self,
        tag: str,
        path: str = "/mnt",
        *,
        cache: str = "none",
        msize: int | None = None,
        options: str = "",
        timeout: float = 60,
    ) -> None:
        chosen = ["trans=virtio", "version=9p2000.L", f"cache={cache}"]
        if msize is not None:
            chosen.append(f"msize={msize}")
        if options:
            chosen.append(options)
        where = shlex.quote(path)
        seen = shlex.quote(f" {path.translate(MOUNTS_ESCAPES)} 9p ")
        self.run(
            f"mkdir -p {where} && mount -t 9p -o {shlex.quote(','.join(chosen))} "
            f"{shlex.quote(tag)} {where} && grep -qF {seen} /proc/mounts",
            timeout=timeout,
        )

    def umount(self, path: str = "/mnt", *, timeout: float = 60) -> None:
        self.run(f"umount {shlex.quote(path)}", timeout=timeout)

    def shell(self, command: str = "") -> int:
        """Lends this terminal to a shell (or the command) in the guest; returns its status."""
        return interact(self._channel, command)

    def qmp(self, name: str, **arguments: object) -> Any:
        """A command of QEMU's monitor."""
        if self._qmp is None:
            raise GuestError("user-mode Linux has no monitor: use a QEMU guest")
        return self._qmp.command(name, **arguments)

    def reboot(self, *, hard: bool = False, timeout: float = BOOT_LIMIT) -> None:
        """Boots again in the same host program; ``hard`` is QEMU's reset, without a farewell."""
        number = self._channel.boots + 1
        if self._qmp is not None:
            # A reset that nobody asked for, such as a panic's, ends QEMU: see boot.py.
            self.qmp("set-action", reboot="reset")
        if hard:
            self.qmp("system_reset")
        else:
            self._channel.farewell("boot", FAREWELL_LIMIT)
        self._channel.wait_boot(number, timeout)
        if self._qmp is not None:
            self.qmp("set-action", reboot="shutdown")

    def close(self) -> None:
        """Unmounts, powers off, and forces what does not follow; then says what went wrong."""
        if self._ended:
            return
        try:
            if self._channel.boots:
                self._channel.farewell("off", FAREWELL_LIMIT)
        finally:
            self._end(10)

    def kill(self) -> None:
        """Ends the guest as a power cut does."""
        if not self._ended:
            self._program.kill()
            self._end(10)

    def _end(self, patience: float) -> None:
        self._ended = True
        self._program.end(patience)
        self._channel.close()
        if self._qmp is not None:
            self._qmp.close()
        if self._folder is not None:
            self._folder.cleanup()
