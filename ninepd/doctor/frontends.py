"""The other side of the socket: QEMU, its user, and what confines it."""

import os
import platform
import pwd
import re
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Final

from ninepd.config import Export
from ninepd.doctor.finding import Finding, Level
from ninepd.doctor.trying import trouble
from ninepd.errors import UsageError
from ninepd.qemu import DEVICE, OLDEST

_SECONDS: Final = 30
_USERS: Final = ("libvirt-qemu", "qemu")
"""As whom libvirt runs QEMU, on Debian and on Fedora."""
_APPARMOR: Final = "/sys/module/apparmor/parameters/enabled"
_SELINUX: Final = "/sys/fs/selinux/enforce"


def findings(exports: tuple[Export, ...], qemu: str | None, user: str | None) -> Iterator[Finding]:
    """``qemu``: the program, looked for if None; ``user``: as whom it runs, libvirt's if None.

    UsageError if there is none like that.
    """
    yield from _qemu(qemu)
    yield _kvm()
    yield from _user(exports, user)
    yield from _confinement(exports)


def _qemu(given: str | None) -> Iterator[Finding]:
    name = given or f"qemu-system-{platform.machine()}"
    path = shutil.which(name)
    if path is None:
        if given:
            raise UsageError(f"--qemu: there is no program {given}")
        yield Finding(
            Level.WARNING,
            f"no {name} in PATH",
            "only front ends of another kind can use ninepd, such as User-Mode Linux",
            f"install QEMU {_dotted(OLDEST)} or newer (Debian 13: from backports), or name it by "
            "--qemu",
        )
        return
    cure = (
        f"install {_dotted(OLDEST)} or newer (Debian 13: from backports), or name another by --qemu"
    )
    printed = _output([path, "--version"])
    found = re.search(r"version (\d+)\.(\d+)", printed)
    if found is None:
        yield Finding(Level.ERROR, path, f"it does not say its version ({_first(printed)})", cure)
        return
    version = (int(found[1]), int(found[2]))
    what = f"{path}, QEMU {_dotted(version)}"
    devices = _output([path, "-device", "help"])
    known = set(re.findall(r'^name "([^"]+)"', devices, re.MULTILINE))
    usable = known & {DEVICE, f"{DEVICE}-pci"}
    if not usable:
        yield Finding(Level.ERROR, what, f"no {DEVICE}-pci, so that no guest can be served", cure)
        return
    yield Finding(Level.OK, what, f"has {' and '.join(sorted(usable))}")
    if not re.search(
        r"^\s*memory-backend-memfd$", _output([path, "-object", "help"]), re.MULTILINE
    ):
        yield Finding(
            Level.WARNING,
            what,
            "no memory-backend-memfd: the arguments of ninepd qemu-args do not work",
            "use memory-backend-file with share=on and a mem-path in /dev/shm",
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _first(printed: str) -> str:
    return printed.strip().partition("\n")[0] or "it printed nothing"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _kvm() -> Finding:
    what = "/dev/kvm"
    try:
        os.close(os.open(what, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(
            Level.NOTE,
            what,
            f"{error.strerror} for this user: QEMU emulates guests' processors, which is slow",
            "load kvm_intel or kvm_amd, and put QEMU's user into the group kvm",
        )
    return Finding(Level.OK, what, "this user may use it: QEMU need not emulate processors")


def _user(exports: tuple[Export, ...], name: str | None) -> Iterator[Finding]:
    """May QEMU's user connect?"""
    sockets = [export for export in exports if export.socket_path is not None]
    if name is None:
        found = [known for known in _USERS if _is_user(known)]
        if not found:
            return
        name = found[0]
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"--qemu-user: this host has no user {name!r}") from None
    for export in sockets:
        yield _may_connect(export, user)


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _may_connect(export: Export, user: pwd.struct_passwd) -> Finding:
    path = str(export.socket_path)
    who = f"{path}, user {user.pw_name}"
    if export.allow_uid and user.pw_uid not in export.allow_uid:
        return Finding(
            Level.WARNING,
            who,
            "refused by --allow-uid: a QEMU of that user cannot connect",
            f"add --allow-uid {user.pw_uid}",
        )
    if os.geteuid() not in {0, user.pw_uid}:
        return Finding(
            Level.NOTE, who, "only root can try whether that user may connect", "run this as root"
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return Finding(
            Level.WARNING, who, f"{folder} does not exist", "make it before ninepd starts"
        )
    if _tried_as(user, folder, os.X_OK):
        return Finding(
            Level.WARNING,
            who,
            f"may not enter {folder}, so that its QEMU cannot connect",
            "choose a folder such as /run/ninepd, mode 0755",
        )
    if _socket_trouble(export, user):
        return Finding(
            Level.WARNING,
            who,
            f"may not write to a socket with mode {export.socket_permissions:04o} and that group, "
            "so that its QEMU cannot connect",
            "give --socket-mode 0660 and as --socket-group a group of that user (libvirt: the one "
            "of qemu.conf)",
        )
    return Finding(Level.OK, who, "may connect")


def _socket_trouble(export: Export, user: pwd.struct_passwd) -> str:
    """Of a socket like that of the export, or of the one that is there."""
    there = str(export.socket_path)
    if os.path.exists(there) and stat.S_ISSOCK(os.stat(there).st_mode):
        return _tried_as(user, there, os.W_OK)
    with tempfile.TemporaryDirectory(prefix="ninepd-doctor-") as folder:
        os.chmod(folder, 0o711)  # noqa: S103 - the user shall get as far as the socket
        path = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        try:
            os.chown(path, -1, -1 if export.socket_gid is None else export.socket_gid)
        except PermissionError:
            return "this user may not give it to that group"
        os.chmod(path, export.socket_permissions)
        return _tried_as(user, "socket", os.W_OK, folder)


def _tried_as(user: pwd.struct_passwd, path: str, mode: int, start: str = "/") -> str:
    """Why that user has not this access, which for a socket is to connect (unix(7)).

    ``start`` is where a relative path begins, whoever may get there.
    """

    def attempt() -> None:
        os.chdir(start)
        if not os.geteuid():
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
        if not os.access(path, mode):
            raise PermissionError("access denied")

    return trouble(attempt)


def _confinement(exports: tuple[Export, ...]) -> Iterator[Finding]:
    """Profiles that stand around QEMU, not around ninepd: a hint is all that can be given."""
    places = [export.socket_path for export in exports if export.socket_path is not None]
    place = places[0] if places else "/run/ninepd/*.sock"
    if _read(_APPARMOR) == "Y":
        yield Finding(
            Level.NOTE,
            "AppArmor is on",
            f"a QEMU of libvirt's may connect to sockets that its profile names, {place} not among "
            "them unless somebody has added it",
            f'put "{place} rw," into /etc/apparmor.d/local/abstractions/libvirt-qemu',
        )
    enforcing = _read(_SELINUX)
    if enforcing:
        yield Finding(
            Level.NOTE,
            f"SELinux is {'enforcing' if enforcing == '1' else 'permissive'}",
            f"a QEMU of libvirt's (svirt_t) needs its policy's leave to connect to {place}",
            "look for denials (ausearch -m avc -c qemu-system-x86), and allow them by a module "
            "(audit2allow)",
        )


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
