"""Shut the process of an export in, before it meets anybody: what it has not it cannot lose.

With ``namespace`` the export is the only tree that it can reach: a copy of its mount in a mount
namespace of its own, whose root is otherwise empty but for what procfs shows of the process itself.
With ``landlock`` the host's tree stays there to be looked at, and only what lies in the export can
be read or written, though modes and owners elsewhere can be changed by whoever may (landlock(7));
that needs no privileges, and it comes on top of ``namespace`` where it does no harm. Both end with
a filter of system calls (_seccomp.c).

``auto`` takes the strongest that changes nothing for guests. An ordinary user can have namespaces
by a user namespace only. In that the files of others belong to nobody (user_namespaces(7)), and
nothing can be given to a group; so there they must be asked for.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

from ninepd import syscalls, walls
from ninepd.capabilities import CAP_SYS_ADMIN, give_up, has_capabilities, may_set_groups
from ninepd.config import Sandbox
from ninepd.errors import UsageError
from ninepd.process import hold_standard_descriptors
from ninepd.walls import Access, Attributes, Unshare

log = logging.getLogger(__name__)

LEAST_LANDLOCK: Final = 2
"""The first version in which a file can be renamed into another directory."""
_ERRATUM_DISCONNECTED: Final = 1 << 2
"""Mended: what is below a directory that was opened by handle is refused (landlock errata, 3)."""
_EXPORT: Final = b"export"
_OWN: Final = (b"proc/self/fd", b"proc/self/fdinfo", b"proc/self/mountinfo")
"""Not the rest of it: its links lead to the program's own files, where they lie on the host."""
_FOLDERS: Final = (b"proc", b"proc/self", *_OWN[:2])
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
    filtered: bool = False
    """Are system calls, and what memory may be, restricted?"""
    landlock: bool = False
    users: bool = False
    """By a user namespace?"""
    lacks: tuple[str, ...] = ()
    """Sentences on what would be stronger, and why it is not there."""


class Rooms(NamedTuple):
    """What a process needs that is shut in."""

    directory: int
    """The root of the export: a descriptor, which leads there afterwards, too."""
    readonly: bool
    follow: bool
    """Shall what the host mounts below the export later appear?"""
    by_handle: bool
    """Shall files be opened by handle?"""
    keep: frozenset[int]
    """Capabilities."""


class _WallError(UsageError):
    """A wall that cannot be built here; says which, and why."""


@contextlib.contextmanager
def _wall(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _WallError(f"{name}: {error.strerror}") from error


def choose(wanted: Sandbox, rooms: Rooms) -> Choice:
    """What can be had here of what is wanted; UsageError if that is not enough."""
    if wanted is Sandbox.NONE:
        return Choice(wanted)
    lacks = []
    users = not has_capabilities(CAP_SYS_ADMIN)
    landlock = _landlock_trouble(rooms.by_handle)
    if landlock:
        lacks.append(f"no Landlock: {landlock}")
    if not walls.can_filter_calls():
        lacks.append("no filter of system calls: nobody has tried it on this architecture")
    if users and wanted is Sandbox.AUTO:
        lacks.append(
            "no namespaces: they need CAP_SYS_ADMIN, or --sandbox namespace and a user namespace"
        )
    trouble = landlock
    for what, choice in _choices(wanted, not landlock, users):
        trouble = _trouble(choice, rooms)
        if not trouble:
            return choice._replace(lacks=tuple(lacks))
        lacks.append(f"no {what}: {trouble}")
    if wanted is not Sandbox.AUTO:
        raise UsageError(f"--sandbox: {wanted} cannot be had here ({trouble}); use auto")
    return Choice(Sandbox.NONE, lacks=tuple(lacks))


def _choices(wanted: Sandbox, landlock: bool, users: bool) -> Iterator[tuple[str, Choice]]:
    """The strongest first, and what it is called."""
    if wanted is Sandbox.NAMESPACE or (wanted is Sandbox.AUTO and not users):
        if landlock:
            choice = Choice(Sandbox.NAMESPACE, filtered=True, landlock=True, users=users)
            yield "namespaces with Landlock", choice
        yield "namespaces", Choice(Sandbox.NAMESPACE, filtered=True, users=users)
    if wanted is not Sandbox.NAMESPACE and landlock:
        yield "Landlock", Choice(Sandbox.LANDLOCK, filtered=True, landlock=True)
    if wanted is Sandbox.AUTO:
        yield "filter of system calls", Choice(Sandbox.NONE, filtered=True)


def _landlock_trouble(by_handle: bool) -> str:
    if walls.landlock_version() < LEAST_LANDLOCK:
        return "this kernel has none that lets files be renamed into other directories"
    if by_handle and not walls.landlock_errata() & _ERRATUM_DISCONNECTED:
        return "in this kernel it refuses what is opened by handle (--reclaim names goes with it)"
    return ""


_tried: Final[dict[tuple[Choice, Rooms], str]] = {}
"""What came of it, with the mount in place of a directory on it: all on one are alike."""


def _trouble(choice: Choice, rooms: Rooms) -> str:
    """Why that cannot be done, found out by a process that does it; empty if it can."""
    mount = syscalls.stat_at(rooms.directory, b"").mnt_id
    key = choice, rooms._replace(directory=mount)
    if key not in _tried:
        _tried[key] = _try(choice, rooms)
    return _tried[key]


def _try(choice: Choice, rooms: Rooms) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        answer = "a bug"
        try:
            enter(choice, rooms)
            finish(choice, rooms)
            answer = ""
        except _WallError as error:
            answer = str(error)
        except UsageError:
            answer = ""  # no wall is at fault; it is said when it happens again
        except BaseException:
            log.exception("a bug kept walls from being built")
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
    may_set_groups()  # that is asked a file which will be out of reach
    if choice.mode is Sandbox.NAMESPACE:
        _move(choice.users, rooms)
    if choice.landlock:
        with _wall("Landlock"):
            _restrict(rooms)


def finish(choice: Choice, rooms: Rooms) -> None:
    """When there is nothing more to set up. For all threads."""
    give_up(rooms.keep)
    if choice.filtered:
        hold_standard_descriptors()
        with _wall("memory of its own"):
            walls.hide_memory()
        _filter(watches=False, by_handle=rooms.by_handle)


def watch(users: bool) -> None:
    """This process will start others, which shut themselves in, and do nothing else any more.

    ``users``: by user namespaces, for which they have to write files that are root's if hidden.
    """
    if not users:
        with _wall("memory of its own"):
            walls.hide_memory()
    _filter(watches=True, by_handle=True)


def isolate() -> None:
    """This process needs nothing of the host but the descriptors that it has, and no rights.

    Before it has other threads, and a loop. What cannot be had here of this it does without.
    """
    if has_capabilities(CAP_SYS_ADMIN):
        _try_wall("namespaces", _leave)
    if walls.landlock_version():
        _try_wall("Landlock", _forbid_files)
    give_up(frozenset())
    hold_standard_descriptors()
    _try_wall("memory of its own", walls.hide_memory)
    _try_wall("filter of system calls", partial(_filter, watches=False, by_handle=False))


def _try_wall(name: str, build: Callable[[], None]) -> None:
    try:
        build()
    except (OSError, _WallError) as error:
        log.warning("control: no %s: %s", name, error)


def _leave() -> None:
    """Into namespaces, and a root that is empty."""
    os.chdir("/")
    walls.unshare(Unshare.MOUNTS | Unshare.NETWORK | Unshare.IPC | Unshare.UTS)
    root = walls.new_tmpfs()
    walls.follow_host()
    walls.change_root(root)
    walls.restrict_tree(root, _ROOT)
    os.close(root)


def _forbid_files() -> None:
    ruleset, _ = walls.landlock_ruleset(walls.landlock_version())
    walls.landlock_enforce(ruleset)
    os.close(ruleset)


def _filter(watches: bool, by_handle: bool) -> None:
    with _wall("memory that is never executed"):
        walls.never_execute()
    if walls.can_filter_calls():
        with _wall("the filter of system calls"):
            walls.filter_calls(watches, by_handle)


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
        export = walls.clone_tree(walls.AT_FDCWD, b".", recursive=True)
        readonly = Attributes.RDONLY if rooms.readonly else Attributes(0)
        walls.restrict_tree(export, _TREE | readonly, recursive=True)
        own = {name: walls.clone_tree(walls.AT_FDCWD, b"/" + name, False) for name in _OWN}
        for mount in own.values():
            walls.restrict_tree(mount, _SELF)
        root = walls.new_tmpfs()
        _make_places(root)
        for mount in (export, *own.values()):
            walls.follow_tree(mount)
        walls.follow_host()
    with _wall("an empty root"):
        walls.change_root(root)
        for name, mount in own.items():
            walls.attach_tree(mount, root, name)
        if rooms.follow:
            walls.attach_tree(export, root, _EXPORT)
        walls.restrict_tree(root, _ROOT)
    os.dup2(export, rooms.directory, inheritable=False)
    for fd in (root, export, *own.values()):
        os.close(fd)


def _make_places(root: int) -> None:
    """For what is mounted there."""
    for name in (*_FOLDERS, _EXPORT):
        os.mkdir(name, 0o755, dir_fd=root)
    for name in _OWN:
        if name not in _FOLDERS:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=root))


def _map_self(uid: int, gid: int) -> None:
    """Be in the new user namespace who one was outside: all that an ordinary user may do."""
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _restrict(rooms: Rooms) -> None:
    ruleset, known = walls.landlock_ruleset(walls.landlock_version())
    walls.landlock_allow(ruleset, rooms.directory, _LOOK if rooms.readonly else known & ~_NEVER)
    for name in _OWN:
        own = os.open(b"/" + name, os.O_PATH | os.O_CLOEXEC)
        is_folder = name in _FOLDERS
        walls.landlock_allow(ruleset, own, _LOOK if is_folder else Access.READ_FILE)
        os.close(own)
    walls.landlock_enforce(ruleset)
    os.close(ruleset)
