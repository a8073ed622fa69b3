"""What the host's kernel has, and what it lets this user do, whatever is served."""

import mmap
import os
import resource
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Final

from ninepd import capabilities, pipeline, syscalls, walls
from ninepd.doctor.finding import Finding, Level
from ninepd.doctor.trying import trouble
from ninepd.export.descriptors import SPARE, budget_of
from ninepd.sandbox import LEAST_LANDLOCK

_FEW: Final = 65536
"""A guest that unpacks a kernel's sources refers to more files."""
_PAGE: Final = mmap.PAGESIZE


def findings(file_limit: int) -> Iterator[Finding]:
    """All of it; ``file_limit`` is how many descriptors the process may have."""
    yield from _looking_up()
    yield _shared_memory()
    yield from _address_space()
    yield _descriptors(file_limit)
    yield _privileges()
    yield _mounts()
    yield _landlock()
    yield _user_namespaces()
    yield _compiled()


def _looking_up() -> Iterator[Finding]:
    """openat2(2) and statx(2), which every walk takes."""
    release = f"Linux {os.uname().release}"
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(syscalls.open_scoped(root, b".", os.O_PATH | os.O_CLOEXEC))
        mnt_id = syscalls.stat(root).mnt_id
    except OSError as error:
        yield Finding(
            Level.ERROR,
            f"{release}, openat2",
            f"{error.strerror}: no file can be looked up",
            "it takes Linux 5.15 without a filter on that call (RestrictSUIDSGID= of systemd is "
            "one, and so are those of old container engines)",
        )
        return
    finally:
        os.close(root)
    if mnt_id:
        yield Finding(Level.OK, release, "openat2 and statx are there: files can be looked up")
    else:  # 5.8 and later number mounts from 1 on; without the call the C library makes it up
        yield Finding(
            Level.WARNING,
            f"{release}, statx",
            "it does not tell mounts apart: files on those below an export may be taken for others",
            "it takes Linux 5.15 without a filter on that call",
        )


def _shared_memory() -> Finding:
    """A memfd, as QEMU makes it for guests (memory-backend-memfd), seen through two mappings."""
    what = "shared memory"
    try:
        fd = os.memfd_create("ninepd-doctor")
        try:
            os.truncate(fd, _PAGE)
            with mmap.mmap(fd, _PAGE) as guest, mmap.mmap(fd, _PAGE) as ours:
                guest[:4] = b"seen"
                shared = ours[:4] == b"seen"
        finally:
            os.close(fd)
    except OSError as error:
        return Finding(
            Level.ERROR,
            what,
            f"no memfd can be made and mapped ({os.strerror(error.errno or 0)}): guests' memory "
            "could not be reached",
            "allow memfd_create where ninepd and QEMU run",
        )
    assert shared  # noqa: S101 - the kernel's promise (memfd_create(2))
    return Finding(Level.OK, what, "a memfd can be mapped twice, as guest memory is")


def _address_space() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield Finding(
            Level.WARNING,
            "address space",
            f"limited to {limit >> 20} MiB, which all memory of a guest has to fit into: a larger "
            "guest is refused",
            "lift it (ulimit -v unlimited, LimitAS=infinity)",
        )


def _descriptors(file_limit: int) -> Finding:
    room = budget_of(file_limit)
    what = f"{file_limit} descriptors"
    cure = "raise the hard limit (LimitNOFILE= of a unit; /etc/security/limits.conf)"
    if room < SPARE:
        return Finding(Level.ERROR, what, "too few for a single request", cure)
    if room < _FEW:
        return Finding(
            Level.WARNING,
            what,
            f"a guest that refers to more than {room} files has idle ones closed and found again, "
            "which takes time and where the file system has no handles fails",
            cure,
        )
    return Finding(Level.OK, what, f"a guest may refer to {room} files before any is put aside")


def _privileges() -> Finding:
    if capabilities.privileged():
        return Finding(
            Level.OK,
            "privileges of root",
            "files can be made as any user of the guest (passthrough)",
        )
    who = "root without some capabilities" if not os.geteuid() else f"user {os.geteuid()}"
    return Finding(
        Level.NOTE,
        who,
        "owners and modes that guests set are kept beside the files (mapped-xattr, mapped-file); "
        "with passthrough the guest could create files as this user only",
        "run as root for files that belong to guests' users on the host",
    )


def _mounts() -> Finding:
    """A mount of its own and its attributes, of which the sandbox of root is made."""
    what = "mount_setattr"
    if not capabilities.has_capabilities(capabilities.CAP_SYS_ADMIN):
        return Finding(
            Level.NOTE,
            what,
            "not for this user, who has no CAP_SYS_ADMIN: no mount namespace around the export, "
            "unless --sandbox namespace asks for one by a user namespace",
        )

    def restrict() -> None:
        walls.unshare(walls.Unshare.MOUNTS)
        tree = walls.clone_tree(walls.AT_FDCWD, b"/", recursive=False)
        walls.restrict_tree(tree, walls.Attributes.RDONLY | walls.Attributes.NOSUID)

    error = trouble(restrict)
    if error:
        return Finding(
            Level.WARNING,
            what,
            f"{error}: no mount namespace around the export, so that a daemon taken over by a "
            "guest sees the host's files",
            "allow unshare, open_tree and mount_setattr (Linux 5.12), as contrib/systemd does",
        )
    return Finding(Level.OK, what, "the export can be put into a mount namespace of its own")


def _landlock() -> Finding:
    version = walls.landlock_version()
    what = "Landlock"
    if version < LEAST_LANDLOCK:
        return Finding(
            Level.WARNING,
            what,
            "not there (or without renames, before Linux 5.19): one wall less around the daemon, "
            "and for an ordinary user the only one but the filter of system calls",
            "boot the host with landlock in lsm=, on a kernel that has it",
        )
    return Finding(Level.OK, what, f"version {version}")


def _user_namespaces() -> Finding:
    what = "user namespaces"
    error = trouble(lambda: walls.unshare(walls.Unshare.USERS))
    if not error:
        return Finding(Level.OK, what, "--sandbox namespace works without privileges")
    return Finding(
        Level.NOTE,
        what,
        f"{error}: as an ordinary user there is no --sandbox namespace, only landlock",
        "allow them, if that is wanted (user.max_user_namespaces, kernel.unprivileged_userns_clone "
        "and kernel.apparmor_restrict_unprivileged_userns of sysctl(8))",
    )


def _compiled() -> Finding:
    what = "ninepd itself"
    if pipeline.__file__.endswith(tuple(EXTENSION_SUFFIXES)):
        return Finding(Level.OK, what, "compiled")
    return Finding(
        Level.NOTE,
        what,
        "interpreted: a request takes two to three times the processor time",
        "install a wheel, or build without NINEPD_MYPYC=0",
    )
