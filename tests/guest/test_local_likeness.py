"""The same calls on a share and on the guest's own tmpfs have the same results, one by one."""

import errno
import os
import random
import stat
import struct
from collections.abc import Callable
from typing import Any

import pytest

from ninepd_guests.abi import Read
from ninepd_guests.remote import Process
from tests.support.guest import Place, Station

STEPS = 500
USER, GROUP = 1000, 2000
NAMES = ("a", "b", "c")
PATHS = (*NAMES, *(f"{x}/{y}" for x in NAMES for y in NAMES), "a/b/c", "a/b/a", "b/a/c")
MODES = (0o600, 0o644, 0o755, 0o777, 0o4755, 0o2775, 0o1777, 0o400, 0o555)
SIZES = (0, 1, 100, 4095, 4096, 4097, 70_000)
FLAGS = (
    os.O_RDWR,
    os.O_RDONLY,
    os.O_WRONLY | os.O_TRUNC,
    os.O_RDWR | os.O_APPEND,
    os.O_CREAT | os.O_RDWR,
    os.O_CREAT | os.O_EXCL | os.O_RDWR,
    os.O_CREAT | os.O_TRUNC | os.O_WRONLY,
    os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDONLY | os.O_NOFOLLOW,
)

Step = tuple[str, tuple[Any, ...]]


def a_step(chance: random.Random) -> Step:
    pick = chance.choice
    path, other = pick(PATHS), pick(PATHS)
    steps: list[Step] = [
        ("open", (path, pick(FLAGS), pick(MODES))),
        ("open", (path, pick(FLAGS), pick(MODES))),
        ("mkdir", (path, pick(MODES))),
        ("mkdir", (path, 0o777)),
        ("rmdir", (path,)),
        ("unlink", (path,)),
        ("rename", (path, other)),
        ("rename", (path, other)),
        ("link", (path, other)),
        ("symlink", (pick(("a", "../b", "b/a", "nowhere", "c")), path)),
        ("readlink", (path,)),
        ("mknod", (path, stat.S_IFIFO | pick(MODES))),
        ("chmod", (path, pick(MODES))),
        ("chown", (path, pick((0, USER)), pick((0, USER, GROUP)))),
        ("truncate", (path, pick(SIZES))),
        ("stat", (path,)),
        ("lstat", (path,)),
        ("listdir", (path,)),
        ("access", (path, pick((0, os.R_OK, os.W_OK, os.X_OK)))),
        # In whole seconds: the Linux client cuts what a program sets (its s_time_gran).
        ("utimens", (path, *(chance.randrange(1 << 30) * 10**9 for _ in range(2)))),
        ("fstat", (chance.randrange(8),)),
        ("pwrite", (chance.randrange(8), pick(SIZES), pick(SIZES))),
        ("pread", (chance.randrange(8), pick(SIZES), pick(SIZES))),
        ("write", (chance.randrange(8), pick(SIZES))),
        ("ftruncate", (chance.randrange(8), pick(SIZES))),
        ("fchmod", (chance.randrange(8), pick(MODES))),
        ("close", (chance.randrange(8),)),
    ]
    return pick(steps)


def look(found: Any) -> tuple[Any, ...]:
    """What two file systems must agree on. Not: the numbers of inodes and devices, the size of
    directories, blocks, and times that were not set."""
    size = -1 if stat.S_ISDIR(found.mode) else found.size
    return oct(found.mode), found.nlink, found.uid, found.gid, size


class Side:
    """A process with up to eight files open, below one directory."""

    def __init__(self, process: Process, top: str) -> None:
        self.process = process
        process.chdir(top)
        self.files: list[int] = []

    def do(self, step: Step) -> Any:
        """The result, or the name of the errno."""
        name, arguments = step
        try:
            return getattr(self, "_" + name, getattr(self.process, name))(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def _fd(self, number: int) -> int:
        return self.files[number % len(self.files)] if self.files else 999

    def _open(self, path: str, flags: int, mode: int) -> object:
        fd = self.process.open(path, flags | os.O_NONBLOCK, mode)
        if len(self.files) == 8:
            self.process.close(self.files.pop(0))
        self.files.append(fd)
        return look(self.process.fstat(fd))

    def _close(self, number: int) -> None:
        self.process.close(self._fd(number))
        del self.files[number % len(self.files)]

    def _stat(self, path: str) -> object:
        return look(self.process.stat(path))

    def _lstat(self, path: str) -> object:
        return look(self.process.lstat(path))

    def _fstat(self, number: int) -> object:
        return look(self.process.fstat(self._fd(number)))

    def _utimens(self, path: str, atime: int, mtime: int) -> object:
        self.process.utimens(path, atime, mtime)
        return self.process.stat(path).mtime_ns

    def _listdir(self, path: str) -> object:
        fd = self.process.open(path, os.O_RDONLY | os.O_DIRECTORY)
        found = []
        try:
            while entries := self.process.getdents(fd):
                found += [(entry.name, entry.type) for entry in entries]
        finally:
            self.process.close(fd)
        return sorted(found)

    def _pwrite(self, number: int, size: int, offset: int) -> object:
        return self.process.pwrite(self._fd(number), b"%d" % (size % 7) * size, offset)

    def _write(self, number: int, size: int) -> object:
        return self.process.write(self._fd(number), b"w" * size)

    def _pread(self, number: int, size: int, offset: int) -> object:
        return self.process.pread(self._fd(number), size, offset)

    def _ftruncate(self, number: int, size: int) -> None:
        self.process.ftruncate(self._fd(number), size)

    def _fchmod(self, number: int, mode: int) -> None:
        self.process.fchmod(self._fd(number), mode)

    def tree(self, top: str = ".") -> dict[str, object]:
        found: dict[str, object] = {}
        for name in sorted(self.process.listdir(top)):
            path = f"{top}/{name}"
            info = self.process.lstat(path)
            content: object = None
            if stat.S_ISDIR(info.mode):
                found |= self.tree(path)
            elif stat.S_ISLNK(info.mode):
                content = self.process.readlink(path)
            elif stat.S_ISREG(info.mode):
                fd = self.process.open(path)
                content = self.process.pread(fd, info.size + 1, 0)
                self.process.close(fd)
            found[path] = look(info), content
        return found


@pytest.fixture
def control(place: Place) -> str:
    """A directory on the guest's own tmpfs."""
    place.guest.run("mkdir -p /control && mount -t tmpfs none /control && mkdir /control/top")
    return "/control/top"


@pytest.mark.parametrize("front", ["uml"], indirect=True)
@pytest.mark.parametrize("uid", [0, USER])
@pytest.mark.parametrize("seed", range(4))
def test_as_a_local_file_system(place: Place, control: str, uid: int, seed: int) -> None:
    guest = place.guest
    chance = random.Random(seed)
    history: list[str] = []
    results: set[str] = set()
    try:
        # One level down, because links lead to "..".
        tops = [f"{above}/top" for above in (place.path, control)]
        for top in tops:
            guest.run(f"mkdir {top} && chown 0:{GROUP} {top} && chmod 2777 {top}")
        with (
            guest.process(uid or None, uid or None) as one,
            guest.process(uid or None, uid or None) as two,
        ):
            share, local = Side(one, tops[0]), Side(two, tops[1])
            for side in (share, local):
                side.process.umask(0o022)
            for number in range(STEPS):
                step = a_step(chance)
                got, wanted = share.do(step), local.do(step)
                history.append(f"{number} {step} -> {str(wanted)[:60]}")
                results.add(wanted if isinstance(wanted, str) else "ok")
                assert got == wanted, "\n".join(history[-25:])
        with guest.process() as one, guest.process() as two:
            assert Side(one, tops[0]).tree() == Side(two, tops[1]).tree()
    finally:
        guest.run("umount -l /control")
    assert {"ok", "ENOENT", "EEXIST", "ENOTDIR"} <= results


@pytest.mark.parametrize("front", ["uml"], indirect=True)
@pytest.mark.parametrize("member", [True, False])
def test_setgid_and_membership(place: Place, control: str, member: bool) -> None:
    """The guest's kernel takes the bit from who is not in the group; the share keeps to that."""
    guest = place.guest
    looks = []
    try:
        for top in (place.path, control):
            guest.run(f"chmod 2777 {top} && chown 0:{GROUP} {top}")
            with guest.process(USER, GROUP if member else USER) as process:
                process.chdir(top)
                process.umask(0)
                for mode in (0o2775, 0o6755, 0o2665, 0o775):
                    name = f"{mode:o}"
                    process.close(process.open(f"file{name}", os.O_CREAT | os.O_RDWR, mode))
                    process.mkdir(f"dir{name}", mode)
                    process.chmod(f"file{name}", mode)
                looks.append([look(process.stat(n)) for n in sorted(process.listdir("."))])
    finally:
        guest.run("umount -l /control")
    assert looks[0] == looks[1]


# What programs do with descriptors

IN_CREATE, IN_DELETE, IN_MODIFY = 0x100, 0x200, 0x2
INOTIFY_INIT1, INOTIFY_ADD_WATCH = 294, 254


@pytest.mark.parametrize("front", ["uml"], indirect=True)
def test_inotify_tells_of_the_guests_own_changes(place: Place) -> None:
    """As long as something holds the directory: the Linux client forgets what nobody holds."""
    with place.guest.process() as process:
        process.chdir(place.path)
        watcher = process.syscall(INOTIFY_INIT1, os.O_NONBLOCK)
        process.syscall(INOTIFY_ADD_WATCH, watcher, b".\0", IN_CREATE | IN_DELETE | IN_MODIFY)
        fd = process.open("file", os.O_CREAT | os.O_WRONLY)
        process.write(fd, b"text")
        process.close(fd)
        process.unlink("file")
        data = process.fill("read", watcher, Read(4096), 4096)
        masks = []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            masks.append((mask, data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
        assert masks == [(IN_CREATE, b"file"), (IN_MODIFY, b"file"), (IN_DELETE, b"file")]


@pytest.mark.parametrize("front", ["uml"], indirect=True)
def test_reopening_by_proc_self_fd(place: Place) -> None:
    """Of a file that was moved and then removed on the host, with another access mode."""
    (place.host / "file").write_text("text")
    (place.host / "sub").mkdir()
    with place.guest.process() as process:
        fd = process.open(f"{place.path}/file", os.O_PATH)
        assert process.lstat(f"/proc/self/fd/{fd}").mode & 0o170000 == stat.S_IFLNK
        for change in (
            lambda: (place.host / "file").rename(place.host / "sub/other"),
            lambda: (place.host / "sub/other").unlink(),
        ):
            change()
            for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
                again = process.open(f"/proc/self/fd/{fd}", flags)
                if flags != os.O_RDONLY:
                    process.write(again, b"T")
                else:
                    assert process.read(again, 100)[1:4] == b"ext"
                process.close(again)
        assert process.fstat(fd).nlink == 0


# Containers


def overlay(place: Place, options: str) -> Callable[[], None]:
    place.guest.run(
        f"mkdir -p /merged && mount -t overlay -o {options} none /merged || "
        "{ dmesg | tail -n 5; exit 1; }"
    )
    return lambda: place.guest.umount("/merged")


@pytest.mark.parametrize("front", ["uml"], indirect=True)
def test_an_overlay_above_and_below(place: Place) -> None:
    """Lower, upper and work directory on the share, as a container's image and its changes."""
    for name in ("lower/dir/sub", "upper", "work"):
        (place.host / name).mkdir(parents=True)
    for number in range(20):
        (place.host / f"lower/dir/f{number}").write_text(f"lower {number}")
    top = place.path
    umount = overlay(
        place, f"userxattr,lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
    )
    try:
        with place.guest.process() as process:
            process.chdir("/merged")
            assert len(process.listdir("dir")) == 21
            fd = process.open("dir/f0", os.O_WRONLY | os.O_APPEND)
            process.write(fd, b" upper")
            process.close(fd)
            process.unlink("dir/f1")
            with pytest.raises(OSError, match="Invalid"):
                # It takes a rename with a flag, which the Linux client has no message for.
                process.rename("dir/f2", "dir/moved")
            process.chmod("dir/f3", 0o600)
            process.mkdir("new")
            process.symlink("dir/f0", "link")
            process.rmdir("dir/sub")
            names = set(process.listdir("dir"))
            assert names == {f"f{n}" for n in range(20)} - {"f1"}
            fd = process.open("link")
            assert process.read(fd, 100) == b"lower 0 upper"
            process.close(fd)
    finally:
        umount()
    assert (place.host / "upper/dir/f0").read_text() == "lower 0 upper"
    assert (place.host / "lower/dir/f0").read_text() == "lower 0"
    assert stat.S_ISCHR((place.host / "upper/dir/f1").lstat().st_mode)


# Landlock

CREATE_RULESET, ADD_RULE, RESTRICT_SELF, PRCTL = 444, 445, 446, 157
NO_NEW_PRIVS = 38
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG = 2, 4, 8, 256


@pytest.mark.parametrize("front", ["qemu-6.12"], indirect=True)
def test_landlock_survives_a_rename_on_the_host(station: Station) -> None:
    """A process confined to a directory keeps exactly its access when the host moves that."""
    with station.mounted() as place:
        (place.host / "mine").mkdir()
        (place.host / "others").mkdir()
        for name in ("mine", "others"):
            (place.host / name / "file").write_text(name)
        handled = WRITE_FILE | READ_FILE | READ_DIR | MAKE_REG
        with place.guest.process() as process:
            process.chdir(place.path)
            outside = process.open("others", os.O_PATH | os.O_DIRECTORY)
            mine = process.open("mine", os.O_PATH | os.O_DIRECTORY)
            try:
                ruleset = process.syscall(CREATE_RULESET, struct.pack("Q", handled), 8, 0)
            except OSError as error:
                pytest.skip(f"no Landlock in this kernel: {error}")
            rule = struct.pack("=Qi", handled, mine)
            process.syscall(ADD_RULE, ruleset, 1, rule, 0)
            process.syscall(PRCTL, NO_NEW_PRIVS, 1, 0, 0, 0)
            process.syscall(RESTRICT_SELF, ruleset, 0)
            for step in ("before", "moved", "moved again"):
                if step == "moved":
                    (place.host / "mine").rename(place.host / "elsewhere")
                elif step == "moved again":
                    (place.host / "elsewhere").rename(place.host / "others/deep")
                fd = process.openat(mine, "file", os.O_RDWR)
                assert process.read(fd, 10) == b"mine"
                process.close(fd)
                fd = process.openat(mine, f"new {step}", os.O_CREAT | os.O_WRONLY)
                process.close(fd)
                with pytest.raises(PermissionError):
                    process.openat(outside, "file", os.O_RDONLY)
                with pytest.raises(PermissionError):
                    process.openat(outside, "new", os.O_CREAT | os.O_WRONLY)
        found = set(os.listdir(place.host / "others/deep"))
        assert found == {"file", "new before", "new moved", "new moved again"}
