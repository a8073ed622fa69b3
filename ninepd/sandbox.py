"""Shut the process of an export in, before it meets anybody: what it has not it cannot lose.

With ``namespace`` the export is the only tree that it can reach: a copy of its mount in a mount
namespace of its own, whose root is otherwise empty but for what procfs shows of the process itself.
With ``landlock`` the host's tree stays there to be looked at, and only what lies in the export can
be read or written (landlock(7)); that needs no privileges, and it comes on top of ``namespace``
where it does no harm. Both end with a filter of system calls (_seccomp.c).

``auto`` takes the strongest that changes nothing for guests. An ordinary user can have namespaces
by a user namespace only. In that the files of others belong to nobody (user_namespaces(7)), and
nothing can be given to a group; so there they must be asked for.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple

from ninepd import walls
from ninepd.capabilities import CAP_SYS_ADMIN, has_capabilities
from ninepd.config import Sandbox
from ninepd.errors import UsageError
from ninepd.syscalls import fd_path
from ninepd.walls import Access, Attributes, Unshare

_LEAST_LANDLOCK: Final = 2
"""The first version in which a file can be renamed into another directory."""
_ERRATUM_DISCONNECTED: Final = 1 << 2
"""Mended: what is below a directory that was opened by handle is refused (landlock errata, 3)."""
_PROC: Final = b"proc"
_EXPORT: Final = b"export"
_TREE: Final = Attributes.NOSUID | Attributes.NODEV | Attributes.NOEXEC | Attributes.NOSYMFOLLOW
_ROOT: Final = _TREE | Attributes.RDONLY
_SELF: Final = Attributes.RDONLY | Attributes.NOSUID | Attributes.NODEV | Attributes.NOEXEC
"""Its links lead to what descriptors hold, and are followed."""
_LOOK: Final = Access.READ_FILE | Access.READ_DIR
_NEVER: Final = Access.EXECUTE | Access.IOCTL_DEV | Access.RESOLVE_UNIX
"""Not in the export either: the guest's kernel does these itself."""


class Choice(NamedTuple):
    """What an export is shut in with."""

    mode: Sandbox
    """Any but AUTO."""
    landlock: bool = False
    users: bool = False
    """By a user namespace?"""
    lacks: tuple[str, ...] = ()
    """Sentences on what would be stronger, and why it is not there."""


class Rooms(NamedTuple):
    """What a process is shut in with: descriptors, which lead to the same places afterwards."""

    directory: int
    """The root of the export."""
    folder: int | None
    """Of its socket, whose name is to be removed at the end."""
    readonly: bool
    follow: bool
    """Shall what the host mounts below the export later appear?"""


class _WallError(Exception):
    """A wall that cannot be built here; says which, and why."""


@contextlib.contextmanager
def _wall(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _WallError(f"{name}: {error.strerror}") from error


def choose(wanted: Sandbox, rooms: Rooms, by_handle: bool) -> Choice:
    """What can be had here of what is wanted; UsageError if that is not enough.

    ``by_handle``: shall files be opened by handle?
    """
    if wanted is Sandbox.NONE:
        return Choice(wanted)
    lacks = []
    landlock = _landlock_trouble(by_handle and has_capabilities(CAP_SYS_ADMIN))
    if landlock:
        lacks.append(f"Landlock is left out: {landlock}")
    if not walls.can_filter_calls():
        lacks.append("system calls are not filtered: nobody has tried it on this architecture")
    if wanted is not Sandbox.LANDLOCK:
        users = not has_capabilities(CAP_SYS_ADMIN)
        choice = Choice(Sandbox.NAMESPACE, not landlock, users, tuple(lacks))
        if users and wanted is Sandbox.AUTO:
            trouble = "they need CAP_SYS_ADMIN, or --sandbox namespace and a user namespace"
        else:
            trouble = _trouble(choice, rooms)
        if not trouble:
            return choice
        if wanted is Sandbox.NAMESPACE:
            raise UsageError(f"--sandbox: namespace cannot be had here ({trouble}); use auto")
        lacks.insert(0, f"no namespaces: {trouble}")
    if not landlock:
        choice = Choice(Sandbox.LANDLOCK, landlock=True, lacks=tuple(lacks))
        landlock = _trouble(choice, rooms)
        if not landlock:
            return choice
        lacks.append(f"no Landlock: {landlock}")
    if wanted is Sandbox.LANDLOCK:
        raise UsageError(f"--sandbox: landlock cannot be had here ({landlock}); use auto")
    return Choice(Sandbox.NONE, lacks=tuple(lacks))


def _landlock_trouble(by_handle: bool) -> str:
    if walls.landlock_version() < _LEAST_LANDLOCK:
        return "this kernel has none that lets files be renamed into other directories"
    if by_handle and not walls.landlock_errata() & _ERRATUM_DISCONNECTED:
        return "in this kernel it refuses what is opened by handle (--reclaim names goes with it)"
    return ""


@cache
def _trouble(choice: Choice, rooms: Rooms) -> str:
    """Why that cannot be done, found out by a process that does it; empty if it can."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        answer = "a bug"
        try:
            enter(choice, rooms)
            finish(choice)
            answer = ""
        except _WallError as error:
            answer = str(error)
        finally:
            os.write(writing, answer.encode() or b"\0")
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    return answer.rstrip("\0") if answer else "the attempt was killed"


def enter(choice: Choice, rooms: Rooms) -> None:
    """Before this process has other threads. All that it opens by name it has opened by now."""
    if choice.mode is Sandbox.NAMESPACE:
        _move(choice.users, rooms)
    if choice.landlock:
        with _wall("Landlock"):
            _restrict(rooms)


def finish(choice: Choice) -> None:
    """When there is nothing more to set up. For all threads."""
    if choice.mode is Sandbox.NONE:
        return
    with _wall("memory of its own"):
        walls.hide_memory()
    _filter(watches=False)


def watch() -> None:
    """This process will start others, which shut themselves in, and do nothing else any more."""
    _filter(watches=True)


def _filter(watches: bool) -> None:
    with _wall("memory that is never executed"):
        walls.never_execute()
    if walls.can_filter_calls():
        with _wall("the filter of system calls"):
            walls.filter_calls(watches)


def _move(users: bool, rooms: Rooms) -> None:
    """Into namespaces, and a root that holds the export and nothing else of the host."""
    uid, gid = os.geteuid(), os.getegid()
    # A working directory comes along into a new mount namespace; other descriptors do not.
    with _wall("the export"):
        os.fchdir(rooms.directory)
    with _wall("user namespace" if users else "namespaces"):
        what = Unshare.MOUNTS | Unshare.NETWORK | Unshare.IPC | Unshare.UTS
        walls.unshare(what | Unshare.USERS if users else what)
    if users:
        with _wall("user namespace"):
            _map_self(uid, gid)
    with _wall("mounts"):
        walls.follow_host()
        export = walls.clone_tree(walls.AT_FDCWD, b".", recursive=True)
        readonly = Attributes.RDONLY if rooms.readonly else Attributes(0)
        walls.restrict_tree(export, _TREE | readonly, recursive=True)
        own = walls.clone_tree(walls.AT_FDCWD, b"/proc/self", recursive=False)
        walls.restrict_tree(own, _SELF)
        folder = _copied(rooms.folder)
        root = walls.new_tmpfs()
        for name in (_PROC, _PROC + b"/self", _EXPORT):
            os.mkdir(name, 0o755, dir_fd=root)
    with _wall("an empty root"):
        walls.change_root(root)
        walls.attach_tree(own, root, _PROC + b"/self")
        if rooms.follow:
            walls.attach_tree(export, root, _EXPORT)
        walls.restrict_tree(root, _ROOT)
    os.dup2(export, rooms.directory, inheritable=False)
    if rooms.folder is not None:
        os.dup2(root if folder is None else folder, rooms.folder, inheritable=False)
    for fd in (root, own, export, folder):
        if fd is not None:
            os.close(fd)


def _map_self(uid: int, gid: int) -> None:
    """Be in the new user namespace who one was outside: all that an ordinary user may do."""
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _copied(folder: int | None) -> int | None:
    """The folder alone, so that nothing above it can be reached by it; None if it has moved."""
    if folder is None:
        return None
    path = os.readlink(os.fsencode(fd_path(folder)))
    try:
        copy = walls.clone_tree(walls.AT_FDCWD, path, recursive=False)
    except FileNotFoundError:
        return None
    if os.path.samestat(os.fstat(copy), os.fstat(folder)):
        walls.restrict_tree(copy, _TREE)
        return copy
    os.close(copy)
    return None


def _restrict(rooms: Rooms) -> None:
    ruleset, known = walls.landlock_ruleset(walls.landlock_version())
    walls.landlock_allow(ruleset, rooms.directory, _LOOK if rooms.readonly else known & ~_NEVER)
    if rooms.folder is not None:
        walls.landlock_allow(ruleset, rooms.folder, Access.REMOVE_FILE)
    own = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    walls.landlock_allow(ruleset, own, _LOOK)
    walls.landlock_enforce(ruleset)
    os.close(own)
    os.close(ruleset)
