"""The files in which ``mapped-file`` keeps what guests set, in QEMU's format.

For ``DIR/NAME`` that is ``DIR/.virtfs_metadata/NAME``, for the root of the export
``.virtfs_metadata_root`` in itself: lines ``virtfs.uid=N``, ``gid``, ``mode`` (with the type of the
file) and ``rdev``, decimal numbers of 32 bits with a sign, each only if it was set.
"""

import errno
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ninepd import syscalls
from ninepd.owners import NO_DEVICE, Owner
from ninepd.syscalls import NO_ID

DIRECTORY: Final = b".virtfs_metadata"
OF_ROOT: Final = b".virtfs_metadata_root"
ITSELF: Final = b""
"""In the place of a name: the directory, which is the root of the export."""
_NAMES: Final = frozenset({DIRECTORY, OF_ROOT})
_FIELDS: Final = (b"virtfs.uid", b"virtfs.gid", b"virtfs.mode", b"virtfs.rdev")
_SIZE_MAX: Final = 4096
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EISDIR})
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
_CHANGE: Final = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW


def is_metadata(name: bytes) -> bool:
    """Is it a name of these files, also for a directory that ignores case (ext4's casefold)?"""
    if name.isascii():
        return name.lower() in _NAMES
    folded = unicodedata.normalize("NFD", name.decode(errors="replace").casefold())
    plain = "".join([char for char in folded if unicodedata.category(char) not in {"Cf", "Mn"}])
    return plain.encode(errors="replace") in _NAMES


def _path(name: bytes) -> bytes:
    return OF_ROOT if name == ITSELF else DIRECTORY + b"/" + name


def _number(text: bytes) -> int:
    """As atoi(3), in 32 bits."""
    digits = text.strip()
    sign = digits[:1] == b"-"
    digits = digits[1:] if sign else digits
    end = 0
    while end < len(digits) and digits[end : end + 1].isdigit():
        end += 1
    number = int(digits[:end] or b"0")
    return (-number if sign else number) & 0xFFFFFFFF


def parse(text: bytes) -> Owner:
    """What the lines say."""
    found = dict.fromkeys(_FIELDS, NO_ID)
    for line in text.split(b"\n"):
        key, separator, value = line.partition(b"=")
        if separator and key in found:
            found[key] = _number(value)
    uid, gid, mode, rdev = found.values()
    return Owner(uid, gid, mode, NO_DEVICE if rdev == NO_ID else rdev)


def compose(owner: Owner) -> bytes:
    """The lines that say it."""
    rdev = NO_ID if owner.rdev == NO_DEVICE else owner.rdev & 0xFFFFFFFF
    lines = []
    for key, number in zip(_FIELDS, (owner.uid, owner.gid, owner.mode, rdev), strict=True):
        if number != NO_ID:
            signed = number - (1 << 32) if number >> 31 else number
            lines.append(b"%s=%d\n" % (key, signed))
    return b"".join(lines)


def merge(old: Owner, new: Owner) -> Owner:
    """The new fields that say something, else the old ones."""
    return Owner(
        old.uid if new.uid == NO_ID else new.uid,
        old.gid if new.gid == NO_ID else new.gid,
        old.mode if new.mode == NO_ID else new.mode,
        old.rdev if new.rdev == NO_DEVICE else new.rdev,
    )


def read(directory: int, name: bytes) -> Owner:
    """What is kept of a name."""
    text = _text(directory, name)
    return Owner() if text is None else parse(text)


def exists(directory: int, name: bytes) -> bool:
    """Is anything kept of it?"""
    return _text(directory, name) is not None


def _text(directory: int, name: bytes) -> bytes | None:
    try:
        fd = syscalls.open_scoped(directory, _path(name), _READ)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    try:
        return os.read(fd, _SIZE_MAX)
    except (BlockingIOError, IsADirectoryError):
        return None
    finally:
        os.close(fd)


def write(directory: int, name: bytes, owner: Owner) -> None:
    """Keep those fields that say something, beside what is kept already.

    In place, because the file may have other names, as its file has; and so that a reader finds the
    old or the new lines.
    """
    try:
        fd = syscalls.open_scoped(directory, _path(name), _CHANGE)
    except FileNotFoundError:
        fd = _create(directory, name)
    try:
        old = os.read(fd, _SIZE_MAX)
        new = compose(merge(parse(old), owner))
        os.pwrite(fd, new.ljust(len(old), b"\n"), 0)
        os.ftruncate(fd, len(new))
    finally:
        os.close(fd)


def _create(directory: int, name: bytes) -> int:
    if name == ITSELF:
        return syscalls.create(directory, OF_ROOT, os.O_RDWR, 0o600, NO_ID, NO_ID)
    make_directory(directory)
    kept = open_directory(directory)
    try:
        return syscalls.create(kept, name, os.O_RDWR, 0o600, NO_ID, NO_ID)
    finally:
        os.close(kept)


def make_directory(directory: int) -> None:
    """Where the files of a directory's names are; it may be there already."""
    with suppress(FileExistsError):
        syscalls.mkdir(directory, DIRECTORY, 0o700, NO_ID, NO_ID)


def open_directory(directory: int) -> int:
    """A descriptor of it; ENOENT."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    return syscalls.open_scoped(directory, DIRECTORY, flags)


def remove(directory: int, name: bytes) -> None:
    """Keep nothing of a name."""
    try:
        kept = open_directory(directory)
    except OSError as error:
        if error.errno in _ABSENT:
            return
        raise
    try:
        os.unlink(name, dir_fd=kept)
    except FileNotFoundError:
        pass
    finally:
        os.close(kept)


@contextmanager
def _both(old: int, new: int) -> Iterator[tuple[int, int]]:
    source = open_directory(old)
    try:
        target = open_directory(new)
        try:
            yield source, target
        finally:
            os.close(target)
    finally:
        os.close(source)


def move(old: int, old_name: bytes, new: int, new_name: bytes) -> None:
    """What is kept of one name becomes what is kept of another, whose directory is there."""
    with _both(old, new) as (source, target):
        os.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)


def link(old: int, old_name: bytes, new: int, new_name: bytes) -> None:
    """Another name for what is kept, if anything is; whatever was kept of that name is gone."""
    remove(new, new_name)
    if not exists(old, old_name):
        return
    make_directory(new)
    with _both(old, new) as (source, target):
        os.link(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)
