"""The host, or the guest, renames and removes what the guest holds: inode semantics.

Where QEMU's built-in server behaves otherwise, the same steps run on it too, in the same guest, so
that the difference is shown.
"""

import os
from collections.abc import Callable

import pytest

from ninepd_guests.remote import Process
from tests.support.guest import Place, Station, outcomes

DEPTHS = {"top": ".", "deep": "a/b/c/d"}
WITH_PEER = ("qemu-7.2", "qemu-6.12")
Steps = dict[str, Callable[[], object]]


def on_moved_directory(place: Place, depth: str, target: str = "dir2") -> dict[str, str]:
    """The guest sits in dir1 and holds descriptors of it when the host moves it to ``target``."""
    host = place.host / DEPTHS[depth]
    host.mkdir(parents=True, exist_ok=True)
    (host / "dir1").mkdir()
    (host / "elsewhere").mkdir()
    (host / "dir1" / "file").write_text("before")
    (host / "dir1" / "other").touch()
    (host / "dir1" / "gone").touch()
    with place.guest.process() as process:
        process.chdir(f"{place.path}/{DEPTHS[depth]}/dir1")
        directory = process.open(".", os.O_RDONLY | os.O_DIRECTORY)
        handle = process.open("file", os.O_PATH)
        identity = process.stat(".").ino

        (host / "dir1").rename(host / target)

        def ls() -> None:
            assert sorted(process.listdir(".")) == ["file", "gone", "other"]

        def stat() -> None:
            assert process.stat(".").ino == identity

        def reopen() -> None:
            fd = process.open(f"/proc/self/fd/{handle}", os.O_RDWR)
            assert process.read(fd, 100) == b"before"
            process.pwrite(fd, b"REOPEN", 0)

        result = outcomes(
            {
                "ls .": ls,
                "stat .": stat,
                "create": lambda: process.write(
                    process.open("created", os.O_CREAT | os.O_EXCL | os.O_WRONLY), b"new"
                ),
                "openat": lambda: process.openat(directory, "other", os.O_RDONLY),
                "openat to create": lambda: process.openat(
                    directory, "by-fd", os.O_CREAT | os.O_WRONLY
                ),
                "fstat of a directory descriptor": lambda: process.fstat(directory),
                "fstat of an O_PATH descriptor": lambda: process.fstat(handle),
                "reopen an O_PATH descriptor": reopen,
                "mkdir": lambda: process.mkdir("made"),
                "rename": lambda: process.rename("other", "renamed"),
                "unlink": lambda: process.unlink("gone"),
            }
        )
    if set(result.values()) == {"ok"}:
        names = sorted(path.name for path in (host / target).iterdir())
        assert names == ["by-fd", "created", "file", "made", "renamed"]
        assert (host / target / "file").read_text() == "REOPEN"
        assert (host / target / "created").read_text() == "new"
        assert not (host / "dir1").exists()
    return result


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("cache", ["none", "mmap", "loose"])
@pytest.mark.parametrize("target", ["dir2", "elsewhere/dir2"])
def test_host_moves_the_working_directory(
    station: Station, depth: str, cache: str, target: str
) -> None:
    with station.mounted(cache) as place:
        found = on_moved_directory(place, depth, target)
        assert set(found.values()) == {"ok"}, found


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("front", WITH_PEER, indirect=True)
def test_where_qemus_own_server_fails(station: Station, depth: str) -> None:
    with station.mounted(peer=True) as place:
        theirs = on_moved_directory(place, depth)
    with station.mounted() as place:
        ours = on_moved_directory(place, depth)
    assert set(ours.values()) == {"ok"}, ours
    # A descriptor that is open for reading is the one thing that it does not find by a path.
    assert theirs.pop("fstat of a directory descriptor") in ("ok", "ENOENT")
    assert set(theirs.values()) == {"ENOENT"}, theirs


def test_host_moves_a_file(place: Place) -> None:
    (place.host / "file").write_text("data")
    (place.host / "sub").mkdir()
    with place.guest.process() as process:
        handle = process.open(f"{place.path}/file", os.O_PATH)
        fd = process.open(f"{place.path}/file", os.O_RDWR)
        (place.host / "file").rename(place.host / "sub" / "moved")
        assert process.fstat(handle).nlink == 1
        again = process.open(f"/proc/self/fd/{handle}", os.O_RDONLY)
        assert process.read(again, 100) == b"data"
        process.pwrite(fd, b"D", 0)
        process.ftruncate(fd, 3)
        process.fchmod(fd, 0o600)
    moved = place.host / "sub" / "moved"
    assert moved.read_text() == "Dat"
    assert moved.stat().st_mode & 0o7777 == 0o600


def test_guest_moves_a_directory_with_open_files_below(place: Place) -> None:
    (place.host / "d" / "e").mkdir(parents=True)
    (place.host / "d" / "e" / "f").write_text("data")
    with place.guest.process() as process, place.guest.process() as other:
        process.chdir(f"{place.path}/d/e")
        fd = process.open("f", os.O_RDWR)
        other.rename(f"{place.path}/d", f"{place.path}/d2")
        assert process.listdir(".") == ["f"]
        assert process.pread(fd, 10, 0) == b"data"
        process.close(process.open("new", os.O_CREAT | os.O_WRONLY))
        assert process.stat(f"{place.path}/d2/e/f").ino == process.fstat(fd).ino
    assert (place.host / "d2" / "e" / "new").exists()


def use_open_file(process: Process, fd: int) -> dict[str, str]:
    """Everything that goes on with a descriptor alone."""
    value = b"value"

    def fstat() -> None:
        assert process.fstat(fd).nlink == 0

    def read() -> None:
        assert process.pread(fd, 100, 0) == b"content"

    def write() -> None:
        assert process.pwrite(fd, b"CONT", 0) == 4

    def reopen() -> None:
        again = process.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        assert process.pread(again, 100, 0) == b"CONT"
        process.close(again)

    return outcomes(
        {
            "fstat": fstat,
            "read": read,
            "write": write,
            "ftruncate": lambda: process.ftruncate(fd, 4),
            "fsync": lambda: process.fsync(fd),
            "fchmod": lambda: process.fchmod(fd, 0o600),
            "fchown": lambda: process.fchown(fd, 1000, 1001),
            "fsetxattr": lambda: process.syscall(
                "fsetxattr", fd, b"user.name\0", value, len(value), 0
            ),
            "reopen": reopen,
        }
    )


def on_unlinked_file(place: Place, by: str, depth: str) -> dict[str, str]:
    folder = place.host / DEPTHS[depth]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("content")
    witness = os.open(folder / "file", os.O_RDWR)
    try:
        with place.guest.process() as process:
            path = f"{place.path}/{DEPTHS[depth]}/file"
            fd = process.open(path, os.O_RDWR)
            if by == "host":
                (folder / "file").unlink()
            else:
                process.unlink(path)
            result = use_open_file(process, fd)
            process.close(fd)  # as long as it is open the client finds it by its name too
            with pytest.raises(FileNotFoundError):
                process.open(path)
        if set(result.values()) == {"ok"}:
            status = os.fstat(witness)
            assert os.pread(witness, 100, 0) == b"CONT"
            assert (status.st_mode & 0o7777, status.st_nlink) == (0o600, 0)
            assert (status.st_uid, status.st_gid) == (1000, 1001)
            assert os.getxattr(witness, "user.name") == b"value"
        assert list(folder.iterdir()) == []
    finally:
        os.close(witness)
    return result


@pytest.mark.parametrize("by", ["host", "guest"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("cache", ["none", "mmap"])
def test_an_unlinked_file_goes_on(station: Station, by: str, depth: str, cache: str) -> None:
    with station.mounted(cache) as place:
        found = on_unlinked_file(place, by, depth)
        assert set(found.values()) == {"ok"}, found


@pytest.mark.parametrize("by", ["host", "guest"])
@pytest.mark.parametrize("front", WITH_PEER, indirect=True)
def test_an_unlinked_file_with_qemus_own_server(station: Station, by: str) -> None:
    with station.mounted(peer=True) as place:
        theirs = on_unlinked_file(place, by, "top")
    assert theirs["fsetxattr"] == theirs["reopen"] == "ENOENT", theirs


@pytest.mark.parametrize("by", ["host", "guest"])
def test_removed_working_directory(place: Place, by: str) -> None:
    (place.host / "d").mkdir()
    with place.guest.process() as process:
        process.chdir(f"{place.path}/d")
        held = process.open(".", os.O_DIRECTORY)
        if by == "host":
            (place.host / "d").rmdir()
        else:
            process.rmdir(f"{place.path}/d")
        assert process.fstat(held).nlink == 0
        if by == "host":
            assert process.stat(".").nlink == 0
            assert process.getdents(held) == []
        else:  # the guest's own kernel knows, and answers as it does for any file system
            with pytest.raises(FileNotFoundError):
                process.getdents(held)
        with pytest.raises(FileNotFoundError):
            process.open("new", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(FileNotFoundError):
            process.mkdir("new")


def on_replaced_file(place: Place, by: str) -> dict[str, bool]:
    """The guest holds "b" open when "a" takes its name; what it then does must not reach "a"."""
    (place.host / "a").write_text("the new file")
    (place.host / "a").chmod(0o640)
    (place.host / "b").write_text("the old file")
    witness = os.open(place.host / "b", os.O_RDONLY)
    try:
        with place.guest.process() as process:
            fd = process.open(f"{place.path}/b", os.O_RDWR)
            if by == "host":
                (place.host / "a").rename(place.host / "b")
            else:
                process.rename(f"{place.path}/a", f"{place.path}/b")
            outcomes(
                {
                    "ftruncate": lambda: process.ftruncate(fd, 3),
                    "fchmod": lambda: process.fchmod(fd, 0),
                    "fchown": lambda: process.fchown(fd, 1000, 1000),
                }
            )
        new, old = (place.host / "b").stat(), os.fstat(witness)
        return {
            "new file's content is kept": (place.host / "b").read_text() == "the new file",
            "new file's mode is kept": new.st_mode & 0o7777 == 0o640,
            "new file's owner is kept": new.st_uid == 0,
            "old file is truncated": os.pread(witness, 100, 0) == b"the",
            "old file's mode is changed": old.st_mode & 0o7777 == 0,
            "old file's owner is changed": (old.st_uid, old.st_gid) == (1000, 1000),
        }
    finally:
        os.close(witness)


@pytest.mark.parametrize("by", ["host", "guest"])
@pytest.mark.parametrize("cache", ["none", "mmap", "loose"])
def test_a_replaced_file_is_not_the_new_one(station: Station, by: str, cache: str) -> None:
    with station.mounted(cache) as place:
        found = on_replaced_file(place, by)
        assert all(found.values()), found


@pytest.mark.parametrize("by", ["host", "guest"])
@pytest.mark.parametrize("front", WITH_PEER, indirect=True)
def test_a_replaced_file_with_qemus_own_server(station: Station, by: str) -> None:
    with station.mounted(peer=True) as place:
        theirs = on_replaced_file(place, by)
    assert not theirs["new file's mode is kept"], theirs
    assert not theirs["new file's owner is kept"], theirs


def test_after_an_atomic_save_the_name_gives_the_new_file(place: Place) -> None:
    (place.host / "f").write_text("old")
    with place.guest.process() as process:
        fd = process.open(f"{place.path}/f")
        (place.host / "new").write_text("new")
        (place.host / "new").rename(place.host / "f")
        assert process.pread(fd, 10, 0) == b"old"
        assert process.fstat(fd).nlink == 0
        process.close(fd)
        again = process.open(f"{place.path}/f")
        assert process.pread(again, 10, 0) == b"new"
        assert process.fstat(again).nlink == 1
