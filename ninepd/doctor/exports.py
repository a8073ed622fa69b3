"""What an export is good for, on the file system where it lies, for this user."""

import os
from collections.abc import Iterator
from typing import Final

from ninepd.capabilities import CAP_DAC_READ_SEARCH, has_capabilities, privileged
from ninepd.config import MAPPED, Export, Reclaim, Sandbox
from ninepd.doctor.finding import Finding, Level
from ninepd.errors import UsageError
from ninepd.export.tree import Tree
from ninepd.offer import Candidate
from ninepd.syscalls import file_handle

MSIZE_OF_LINUX: Final = 512000
"""The most that Linux's client takes by virtio (net/9p/trans_virtio.c): 125 pages of 4 KiB."""


def findings(export: Export, file_limit: int) -> Iterator[Finding]:
    """All of it, each with the export's tag."""
    try:
        candidate = Candidate(export, file_limit)
    except UsageError as error:
        yield Finding(Level.ERROR, export.tag, f"it cannot be served: {error}")
        return
    try:
        yield Finding(Level.OK, export.tag, f"it can be served: {candidate}")
        for found in _look(candidate):
            yield found._replace(what=f"{export.tag}, {found.what}")
    finally:
        candidate.close_directory()


def _look(candidate: Candidate) -> Iterator[Finding]:
    export = candidate.export
    tree = candidate.open_tree()
    try:
        yield _model(candidate)
        yield _handles(export, tree)
        yield _storage(tree)
        yield from _space(export)
    finally:
        tree.close()
    yield _sandbox(candidate)
    yield _mounting(export)


def _model(candidate: Candidate) -> Finding:
    model = candidate.model
    what = f"security model {model}"
    if model == "mapped-file":
        return Finding(
            Level.NOTE,
            what,
            "each file in a listing costs a look at its metadata, and what the host renames loses "
            "them",
            "a file system with extended attributes for users has mapped-xattr",
        )
    if model in MAPPED:
        return Finding(Level.OK, what, "what guests create belongs to this user on the host")
    if privileged():
        return Finding(Level.OK, what, "what guests create belongs to the guest's users")
    if model == "passthrough":
        return Finding(
            Level.WARNING,
            what,
            "without privileges guests create files as this user only (EPERM for their others)",
            "run as root, or use mapped-xattr",
        )
    return Finding(
        Level.NOTE,
        what,
        "what guests create belongs to this user, whoever creates it there",
        "mapped-xattr keeps the owners that guests set",
    )


def _handles(export: Export, tree: Tree) -> Finding:
    what = "file handles"
    root = tree.root
    kind = root.volume.kind or "this file system"
    if root.volume.by_handle:
        return Finding(Level.OK, what, "idle files are closed, and found wherever they have gone")
    lack = f"not used on {kind}, which may keep any call waiting" if root.remote else ""
    try:
        file_handle(root.fd)
    except OSError as error:
        lack = f"{kind} has none ({error.strerror})"
    if lack:
        return Finding(
            Level.WARNING,
            what,
            f"{lack}: each file that a guest refers to keeps its descriptor, and when they run out "
            "it gets EMFILE",
            "raise LimitNOFILE=, or export from ext4, XFS, btrfs or tmpfs",
        )
    if export.reclaim == Reclaim.NAMES:
        why, cure = "not used (--reclaim names)", "leave that option out"
    elif not has_capabilities(CAP_DAC_READ_SEARCH):
        why, cure = "this user may not open files by them (CAP_DAC_READ_SEARCH)", "run as root"
    else:
        why, cure = "the kernel refuses to open files by them", "see what ninepd serve -v logs"
    return Finding(
        Level.NOTE,
        what,
        f"{why}: when descriptors run short, idle files are found again by name, and one that the "
        "host has moved is lost to the guest (ESTALE)",
        cure,
    )


def _storage(tree: Tree) -> Finding:
    volume = tree.root.volume
    what = f"storage {volume.kind or 'of unknown kind'}"
    if volume.in_memory:
        return Finding(Level.OK, what, "in memory: no request waits")
    if volume.remote:
        return Finding(
            Level.NOTE,
            what,
            "any call may wait for a network or another process: requests run on workers, which "
            "costs time for each",
            "a directory on a local disk is faster",
        )
    return Finding(Level.OK, what, "local: only data that is not cached waits for the disk")


def _space(export: Export) -> Iterator[Finding]:
    found = os.statvfs(export.export)
    if found.f_flag & os.ST_RDONLY and not export.readonly:
        yield Finding(
            Level.WARNING,
            "read-only mount",
            "guests can change nothing there (EROFS)",
            "mount it for writing, or say --readonly",
        )
    elif not export.readonly and found.f_blocks and not found.f_bavail:
        yield Finding(
            Level.WARNING, "no space", "guests can write nothing new (ENOSPC)", "make room"
        )
    elif not export.readonly and found.f_files and not found.f_favail:
        yield Finding(
            Level.WARNING, "no inodes", "guests can create nothing (ENOSPC)", "remove files"
        )


def _sandbox(candidate: Candidate) -> Finding:
    choice = candidate.sandbox
    what = f"sandbox {choice.mode}"
    lacks = "; ".join(choice.lacks)
    if choice.mode is Sandbox.NONE and not choice.filtered:
        return Finding(
            Level.WARNING,
            what,
            f"a daemon that a guest takes over can do what this user may ({lacks or 'asked for'})",
            "use --sandbox auto, on a kernel with Landlock",
        )
    if lacks:
        return Finding(Level.NOTE, what, lacks, "docs/confinement.md has what each wall needs")
    return Finding(Level.OK, what, "with all walls")


def _mounting(export: Export) -> Finding:
    """How a guest should mount it (docs/linux-client.md)."""
    msize = min(export.msize_max, MSIZE_OF_LINUX)
    options = f"trans=virtio,version=9p2000.L,msize={msize}"
    if export.readonly:
        options = f"ro,{options}"
    command = f"mount -t 9p -o {options} {export.tag} /mnt"
    if msize < MSIZE_OF_LINUX:
        return Finding(
            Level.WARNING,
            "mount options",
            f"--msize-max keeps messages below what Linux guests take: large reads take more of "
            f"them; in the guest: {command}",
            f"give at least {MSIZE_OF_LINUX}",
        )
    return Finding(
        Level.NOTE,
        "mount options",
        f"in the guest: {command}",
        "add cache=loose if nobody else changes it meanwhile, noxattr if writes shall cost half",
    )
