"""``ninepd demo``: a throw-away guest, to look around in or to see what ninepd is for."""

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ninepd.errors import UsageError

from .boot import Share, boot_qemu, boot_uml
from .errors import GuestError
from .machine import Guest

TAG: Final = "demo"
MSIZE: Final = 512_000
LARGE: Final = 64 << 20
_START_SECONDS: Final = 60.0
_KVM_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 5.0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _daemon(directory: str) -> Iterator[str]:
    """Serve a directory; the result is the path of the socket."""
    with tempfile.TemporaryDirectory(prefix="ninepd-demo-") as folder:
        path = os.path.join(folder, "demo.sock")
        command = [sys.executable, "-m", "ninepd", "serve", "--socket-path", path]
        command += ["--export", directory, "--tag", TAG]
        command.append("--allow-unsafe-export")  # the guest does what its user says, here as there
        process = subprocess.Popen(command)
        try:
            limit = time.monotonic() + _START_SECONDS
            while not os.path.exists(path):
                if process.poll() is not None or time.monotonic() > limit:
                    raise GuestError("ninepd did not start; its message is above")
                time.sleep(0.01)
            yield path
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _boot_fastest(shares: Sequence[Share]) -> Guest:
    """Under KVM if a guest comes up there: where /dev/kvm is, it need not run Debian's kernel."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        try:
            guest = boot_qemu(shares, accel="kvm", timeout=_KVM_SECONDS)
        except GuestError:
            _say("No guest comes up under KVM here: QEMU emulates it (TCG), which is slower.")
        else:
            _say("The guest runs under KVM.")
            return guest
    else:
        _say("/dev/kvm is not there or not ours: QEMU emulates the guest (TCG), which is slower.")
    return boot_qemu(shares)


@contextlib.contextmanager
def _guest(directory: str, uml: bool) -> Iterator[Guest]:
    with _daemon(directory) as path:
        boot = boot_uml if uml else _boot_fastest
        with boot([Share(TAG, path)]) as guest:
            guest.mount(TAG, msize=MSIZE)
            yield guest
            guest.umount()


def visit(directory: str, command: Sequence[str], uml: bool) -> int:
    """A shell in a guest with ``directory`` on /mnt, or one command; returns its exit status."""
    try:
        with _guest(os.path.abspath(directory), uml) as guest:
            return guest.shell(
                f"cd /mnt && {shlex.join(command)}" if command else "cd /mnt; exec sh"
            )
    except GuestError as error:
        raise UsageError(str(error)) from error


class _Failed(Exception):
    """Something that the tour shows did not hold."""


def _expect(held: bool, what: str) -> None:
    if not held:
        raise _Failed(what)
    _say(f"   ok: {what}")


def tour(uml: bool) -> int:
    """Show the main uses in a guest; 0 if all of them held."""
    with tempfile.TemporaryDirectory(prefix="ninepd-tour-") as directory:
        try:
            _say("Booting a Linux guest; a host directory will be on its /mnt ...")
            with _guest(directory, uml) as guest:
                for step in _STEPS:
                    _say(f"\n{step.__doc__}")
                    step(guest, directory)
        except (GuestError, _Failed) as error:
            _say(f"\nFAILED: {error}")
            return 1
    _say("\nAll of it held.")
    return 0


def _in_guest(guest: Guest, command: str) -> str:
    _say(f"   guest# {command}")
    text = guest.run(command).text
    for line in text.splitlines():
        _say(f"      {line}")
    return text


def _on_host(action: str) -> None:
    _say(f"   host#  {action}")


def _list(guest: Guest, directory: str) -> None:
    """1. The guest lists and reads what the host has."""
    os.mkdir(os.path.join(directory, "docs"))
    with open(os.path.join(directory, "hello.txt"), "w", encoding="utf-8") as file:
        file.write("written on the host\n")
    listing = _in_guest(guest, "ls -l /mnt")
    _expect("docs" in listing and "hello.txt" in listing, "both files are there")
    text = _in_guest(guest, "cat /mnt/hello.txt")
    _expect(text == "written on the host\n", "the content is the host's")


def _write(guest: Guest, directory: str) -> None:
    """2. The guest writes; the host sees it."""
    _in_guest(guest, "echo 'written in the guest' > /mnt/docs/from-guest.txt")
    with open(os.path.join(directory, "docs", "from-guest.txt"), encoding="utf-8") as file:
        _expect(file.read() == "written in the guest\n", "the host reads what the guest wrote")


def _rename(guest: Guest, directory: str) -> None:
    """3. The host renames a directory while the guest sits in it."""
    with guest.process() as shell:
        shell.chdir("/mnt/docs")
        _say("   guest# cd /mnt/docs")
        _on_host("mv docs papers")
        os.rename(os.path.join(directory, "docs"), os.path.join(directory, "papers"))
        names = shell.listdir(".")
        _say(f"   guest# ls\n      {' '.join(sorted(names))}")
        _expect("from-guest.txt" in names, "the guest still lists its working directory")
        shell.close(shell.open("still-here.txt", os.O_CREAT | os.O_WRONLY))
    created = os.path.join(directory, "papers", "still-here.txt")
    _expect(os.path.exists(created), "a file made there is in the renamed directory")


def _checksum(guest: Guest, directory: str) -> None:
    """4. 64 MiB from the host to the guest and back, compared by checksum."""
    here = os.path.join(directory, "large")
    with open(here, "wb") as file:
        file.write(os.urandom(LARGE))
    with open(here, "rb") as file:
        wanted = hashlib.file_digest(file, "sha256").hexdigest()
    text = _in_guest(guest, "sha256sum < /mnt/large")
    _expect(text.split()[0] == wanted, "the guest reads what the host wrote")
    _in_guest(guest, "cp /mnt/large /tmp/copy && cp /tmp/copy /mnt/back && rm /tmp/copy")
    with open(os.path.join(directory, "back"), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _expect(found == wanted, "the host reads what the guest wrote")


_STEPS: Final[tuple[Callable[[Guest, str], None], ...]] = (_list, _write, _rename, _checksum)
