"""What files are: owners, modes, times, links, special files, attributes, data, names."""

import errno
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ninepd_guests.remote import Process
from tests.support.guest import Place, Station

USER, OTHER = 1000, 1001
NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR
PROT_WRITE, MAP_SHARED = 3, 1


def put(process: Process, path: str, data: bytes = b"", mode: int = 0o666) -> None:
    fd = process.open(path, NEW, mode)
    assert process.write(fd, data) == len(data)
    process.close(fd)


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


class TestOwners:
    def test_new_objects_are_the_users(self, place: Place) -> None:
        place.host.chmod(0o1777)
        with place.guest.process(USER, OTHER) as user:
            user.chdir(place.path)
            put(user, "file", b"mine")
            user.mkdir("dir")
            user.symlink("file", "link")
            user.mknod("fifo", stat.S_IFIFO | 0o600)
            for name in ("file", "dir", "link", "fifo"):
                assert owner(place.host / name) == (USER, OTHER), name
                status = user.lstat(name)
                assert (status.uid, status.gid) == (USER, OTHER), name

    def test_each_of_two_users_at_a_time(self, place: Place) -> None:
        place.host.chmod(0o1777)
        with place.guest.process(USER, USER) as user, place.guest.process(OTHER, OTHER) as other:
            for number in range(10):
                put(user, f"{place.path}/user{number}")
                put(other, f"{place.path}/other{number}")
        for number in range(10):
            assert owner(place.host / f"user{number}") == (USER, USER)
            assert owner(place.host / f"other{number}") == (OTHER, OTHER)

    def test_private_files_stay_private(self, place: Place) -> None:
        (place.host / "secret").write_text("secret")
        (place.host / "secret").chmod(0o600)
        (place.host / "closed").mkdir(mode=0o700)
        place.host.chmod(0o1777)
        with place.guest.process(USER, USER) as user:
            with pytest.raises(PermissionError):
                user.open(f"{place.path}/secret")
            with pytest.raises(PermissionError):
                put(user, f"{place.path}/closed/new")
            with pytest.raises(PermissionError):
                user.chmod(f"{place.path}/secret", 0o666)
            with pytest.raises(PermissionError):  # sticky
                user.unlink(f"{place.path}/secret")
        assert mode(place.host / "secret") == 0o600

    def test_group_of_a_setgid_directory(self, place: Place) -> None:
        folder = place.host / "shared"
        folder.mkdir()
        os.chown(folder, 0, OTHER)
        folder.chmod(0o2777)
        with place.guest.process(USER, USER) as user:
            put(user, f"{place.path}/shared/file")
            user.mkdir(f"{place.path}/shared/dir")
        assert owner(folder / "file") == (USER, OTHER)
        assert owner(folder / "dir") == (USER, OTHER)
        assert mode(folder / "dir") & stat.S_ISGID

    def test_chown(self, place: Place) -> None:
        with place.guest.process() as root:
            put(root, f"{place.path}/file")
            root.symlink("file", f"{place.path}/link")
            root.chown(f"{place.path}/file", USER, OTHER)
            root.chown(f"{place.path}/link", OTHER, USER, follow=False)
            assert owner(place.host / "file") == (USER, OTHER)
            assert owner(place.host / "link") == (OTHER, USER)
            root.chown(f"{place.path}/link", 7, 0xFFFFFFFF)
            assert owner(place.host / "file") == (7, OTHER)
            # The host's owners are the guest's.
            os.chown(place.host / "file", 12, 34)
            status = root.stat(f"{place.path}/file")
            assert (status.uid, status.gid) == (12, 34)


class TestModesAndTimes:
    def test_umask_is_the_guests(self, place: Place) -> None:
        with place.guest.process() as process:
            process.chdir(place.path)
            for mask in (0, 0o027, 0o077):
                process.umask(mask)
                put(process, f"file{mask}", mode=0o666)
                process.mkdir(f"dir{mask}", 0o777)
                assert mode(place.host / f"file{mask}") == 0o666 & ~mask
                assert mode(place.host / f"dir{mask}") == 0o777 & ~mask

    @pytest.mark.parametrize("bits", [0, 0o400, 0o4755, 0o2755, 0o1777, 0o7777])
    def test_chmod(self, place: Place, bits: int) -> None:
        with place.guest.process() as process:
            put(process, f"{place.path}/file")
            process.chmod(f"{place.path}/file", bits)
            assert mode(place.host / "file") == bits
            assert stat.S_IMODE(process.stat(f"{place.path}/file").mode) == bits

    def test_a_new_file_without_write_permission_can_be_written(self, place: Place) -> None:
        place.host.chmod(0o777)
        with place.guest.process(USER, USER) as process:
            fd = process.open(f"{place.path}/object", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444)
            assert process.write(fd, b"data") == 4
            process.ftruncate(fd, 2)
        assert (place.host / "object").read_bytes() == b"da"
        assert mode(place.host / "object") == 0o444

    def test_writing_clears_setuid(self, place: Place) -> None:
        (place.host / "program").write_text("x")
        os.chown(place.host / "program", USER, USER)
        (place.host / "program").chmod(0o6777)
        with place.guest.process(OTHER, OTHER) as process:
            fd = process.open(f"{place.path}/program", os.O_WRONLY)
            process.write(fd, b"y")
        assert mode(place.host / "program") & stat.S_ISUID == 0

    @pytest.mark.parametrize("kind", ["file", "dir", "link"])
    def test_times(self, place: Place, kind: str) -> None:
        path, host = f"{place.path}/x", place.host / "x"
        make: dict[str, Callable[[], None]] = {
            "file": host.touch,
            "dir": host.mkdir,
            "link": lambda: host.symlink_to("nowhere"),
        }
        make[kind]()
        with place.guest.process() as process:
            # The client rounds what it sets to seconds (its s_time_gran), not what it is told.
            atime, mtime = 1_234_567_890 * 10**9, 5_000_000_000 * 10**9
            process.utimens(path, atime, mtime, follow=False)
            status = host.lstat()
            assert (status.st_atime_ns, status.st_mtime_ns) == (atime, mtime)
            atime, mtime = 1_234_567_890_123_456_789, 987_654_321_987_654_321
            os.utime(host, ns=(atime, mtime), follow_symlinks=False)
            seen = process.lstat(path)
            assert (seen.atime_ns, seen.mtime_ns) == (atime, mtime)
            assert seen.ctime_ns == host.lstat().st_ctime_ns

    def test_a_write_moves_mtime(self, place: Place) -> None:
        with place.guest.process() as process:
            put(process, f"{place.path}/file")
            process.utimens(f"{place.path}/file", 0, 0)
            fd = process.open(f"{place.path}/file", os.O_WRONLY)
            process.write(fd, b"x")
            assert abs(process.fstat(fd).mtime_ns / 1e9 - time.time()) < 60


class TestLinksAndSpecialFiles:
    @pytest.mark.parametrize("target", ["file", "/etc/passwd", "../..", "x" * 4000, "ä\n b"])
    def test_symbolic_link(self, place: Place, target: str) -> None:
        with place.guest.process() as process:
            process.symlink(target, f"{place.path}/link")
            assert os.readlink(place.host / "link") == target
            assert process.readlink(f"{place.path}/link") == target
            assert process.lstat(f"{place.path}/link").size == len(os.fsencode(target))

    def test_a_link_leads_through_the_guest_never_the_host(self, place: Place) -> None:
        outside = place.host.parent.parent / "outside"
        outside.write_text("the host's")
        (place.host / "absolute").symlink_to(outside)
        (place.host / "hostname").symlink_to("/etc/passwd")
        (place.host / "up").symlink_to("../../../etc/passwd")
        with place.guest.process() as process:
            with pytest.raises(FileNotFoundError):
                process.open(f"{place.path}/absolute")
            theirs = process.read(process.open("/etc/passwd"), 4096)
            for name in ("hostname", "up"):
                assert process.read(process.open(f"{place.path}/{name}"), 4096) == theirs
            assert theirs != Path("/etc/passwd").read_bytes()

    def test_hard_link(self, place: Place) -> None:
        with place.guest.process() as process:
            process.chdir(place.path)
            put(process, "one", b"data")
            process.mkdir("sub")
            process.link("one", "sub/two")
            assert process.stat("one").ino == process.stat("sub/two").ino
            assert process.stat("one").nlink == 2
            assert (place.host / "one").samefile(place.host / "sub" / "two")
            with pytest.raises(FileExistsError):
                process.link("one", "sub/two")
            process.unlink("one")
            assert process.stat("sub/two").nlink == 1
        assert (place.host / "sub" / "two").read_bytes() == b"data"

    def test_fifo_is_the_guests(self, place: Place) -> None:
        guest = place.guest
        fifo = f"{place.path}/fifo"
        result = guest.run(f"mkfifo {fifo}; (echo through > {fifo}) & cat {fifo}; wait")
        assert result.text == "through\n"
        assert stat.S_ISFIFO((place.host / "fifo").stat().st_mode)

    def test_a_host_fifo_blocks_nobody(self, place: Place) -> None:
        os.mkfifo(place.host / "fifo")
        with place.guest.process() as process:
            waiting = process.submit("openat", -100, f"{place.path}/fifo\0".encode(), os.O_RDONLY)
            with place.guest.process() as other:
                put(other, f"{place.path}/meanwhile")
            assert not waiting.done

    @pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFREG])
    def test_mknod(self, place: Place, kind: int) -> None:
        number = os.makedev(1, 3) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        with place.guest.process() as process:
            process.umask(0)
            process.mknod(f"{place.path}/node", kind | 0o642, number)
            status = (place.host / "node").lstat()
            assert status.st_mode == kind | 0o642
            assert status.st_rdev == number
            seen = process.lstat(f"{place.path}/node")
            assert (seen.mode, seen.rdev) == (status.st_mode, status.st_rdev)
            if kind == stat.S_IFCHR:  # the guest's own /dev/null
                fd = process.open(f"{place.path}/node", os.O_RDWR)
                assert process.read(fd, 10) == b""

    def test_large_device_number(self, place: Place) -> None:
        number = os.makedev(0xABC, 0xABCDE)
        with place.guest.process() as process:
            process.mknod(f"{place.path}/node", stat.S_IFCHR | 0o600, number)
            assert (place.host / "node").lstat().st_rdev == number
            assert process.lstat(f"{place.path}/node").rdev == number


class TestAttributes:
    def test_set_get_list_remove(self, place: Place) -> None:
        path, host = f"{place.path}/file", place.host / "file"
        host.touch()
        with place.guest.process() as process:
            process.setxattr(path, "user.one", b"\0value")
            process.setxattr(path, "user.empty", b"")
            process.setxattr(path, "user.two", b"2")
            assert os.getxattr(host, "user.one") == b"\0value"
            assert os.getxattr(host, "user.empty") == b""
            assert os.getxattr(host, "user.two") == b"2"
            assert sorted(process.listxattr(path)) == ["user.empty", "user.one", "user.two"]
            for name in os.listxattr(host):
                assert process.getxattr(path, name) == os.getxattr(host, name)
            process.removexattr(path, "user.one")
            assert "user.one" not in os.listxattr(host)
            with pytest.raises(OSError, match="No data") as caught:
                process.getxattr(path, "user.one")
            assert caught.value.errno == errno.ENODATA

    def test_create_and_replace(self, place: Place) -> None:
        (place.host / "file").touch()
        path = f"{place.path}/file"
        with place.guest.process() as process:
            with pytest.raises(OSError, match="No data"):
                process.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
            process.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
            with pytest.raises(FileExistsError):
                process.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
            process.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
            assert process.getxattr(path, "user.a") == b"3"
            process.setxattr(path, "user.long", b"12345")
            with pytest.raises(OSError, match="out of range") as caught:
                process.getxattr(path, "user.long", 2)
            assert caught.value.errno == errno.ERANGE

    def test_of_a_directory_and_a_large_value(self, place: Place) -> None:
        value = os.urandom(3000)
        with place.guest.process() as process:
            process.setxattr(place.path, "user.large", value)
            assert os.getxattr(place.host, "user.large") == value
            assert process.getxattr(place.path, "user.large") == value

    def test_capability(self, place: Place) -> None:
        capability = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)
        (place.host / "program").touch()
        with place.guest.process() as process:
            process.setxattr(f"{place.path}/program", "security.capability", capability)
            assert os.getxattr(place.host / "program", "security.capability") == capability


def acl(*entries: tuple[int, int, int]) -> bytes:
    """(tag, permissions, id) in the kernel's form, acl(5)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
ACL = acl((1, 6, NOBODY), (2, 4, USER), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY))
"""u::rw-, u:1000:r--, g::---, m::r--, o::---"""


class TestAcls:
    def test_one_user_more(self, station: Station) -> None:
        with station.mounted(options="posixacl") as place:
            (place.host / "file").write_text("data")
            (place.host / "file").chmod(0o600)
            path = f"{place.path}/file"
            with place.guest.process() as root, place.guest.process(USER, USER) as user:
                with pytest.raises(PermissionError):
                    user.open(path)
                root.setxattr(path, "system.posix_acl_access", ACL)
                assert os.getxattr(place.host / "file", "system.posix_acl_access") == ACL
                assert root.getxattr(path, "system.posix_acl_access") == ACL
                assert user.read(user.open(path), 10) == b"data"
                with pytest.raises(PermissionError):
                    user.open(path, os.O_WRONLY)
                with place.guest.process(OTHER, OTHER) as other, pytest.raises(PermissionError):
                    other.open(path)
                root.removexattr(path, "system.posix_acl_access")
                assert "system.posix_acl_access" not in os.listxattr(place.host / "file")

    def test_default_is_inherited(self, station: Station) -> None:
        with station.mounted(options="posixacl") as place:
            with place.guest.process() as root:
                root.setxattr(place.path, "system.posix_acl_default", ACL)
                put(root, f"{place.path}/file")
                root.mkdir(f"{place.path}/dir")
            inherited = os.getxattr(place.host / "file", "system.posix_acl_access")
            assert struct.pack("<HHI", 2, 4, USER) in inherited
            assert os.getxattr(place.host / "dir", "system.posix_acl_default") == ACL
            assert mode(place.host / "file") & 0o077 == 0o040


class TestData:
    def test_append(self, place: Place) -> None:
        with place.guest.process() as one, place.guest.process() as two:
            flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
            fds = [process.open(f"{place.path}/log", flags) for process in (one, two)]
            for number in range(20):
                one.write(fds[0], b"one %d\n" % number)
                two.write(fds[1], b"two %d\n" % number)
        expected = "".join(f"one {n}\ntwo {n}\n" for n in range(20))
        assert (place.host / "log").read_text() == expected

    @pytest.mark.parametrize("cache", ["none", "mmap", "loose"])
    def test_append_after_the_host(self, station: Station, cache: str) -> None:
        with station.mounted(cache) as place:
            place.guest.run(f"echo guest > {place.path}/log")
            with (place.host / "log").open("a") as file:
                file.write("host\n")
            if cache == "loose":  # which trusts what it has seen: a new file is a new start
                place.guest.run("echo 3 > /proc/sys/vm/drop_caches")
            place.guest.run(f"echo again >> {place.path}/log")
            assert (place.host / "log").read_text() == "guest\nhost\nagain\n"

    def test_direct(self, place: Place) -> None:
        """O_DIRECT is the guest's to honour; here its transfers are ordinary ones."""
        data = os.urandom(65536)
        (place.host / "source").write_bytes(data)
        place.guest.run(
            f"cd {place.path} && dd if=source of=copy bs=4096 iflag=direct oflag=direct"
        )
        assert (place.host / "copy").read_bytes() == data
        with place.guest.process() as process:
            fd = process.open(f"{place.path}/copy", os.O_RDWR | os.O_DIRECT | os.O_SYNC)
            assert process.pread(fd, 100, 1000) == data[1000:1100]

    def test_sparse(self, place: Place) -> None:
        far = 5 << 30
        with place.guest.process() as process:
            fd = process.open(f"{place.path}/sparse", NEW)
            process.pwrite(fd, b"end", far)
            assert process.fstat(fd).size == far + 3
            assert process.fstat(fd).blocks < 100
            assert process.pread(fd, 8, far - 5) == bytes(5) + b"end"
            assert process.pread(fd, 4096, 1 << 30) == bytes(4096)
            assert process.pread(fd, 10, far + 3) == b""
        status = (place.host / "sparse").stat()
        assert (status.st_size, status.st_blocks < 100) == (far + 3, True)

    def test_truncate_and_grow(self, place: Place) -> None:
        with place.guest.process() as process:
            put(process, f"{place.path}/file", b"0123456789")
            process.truncate(f"{place.path}/file", 4)
            process.truncate(f"{place.path}/file", 6)
            assert (place.host / "file").read_bytes() == b"0123\0\0"
            process.close(process.open(f"{place.path}/file", os.O_WRONLY | os.O_TRUNC))
            assert (place.host / "file").read_bytes() == b""

    @pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000, 1_000_003])
    @pytest.mark.parametrize("cache", ["none", "mmap"])
    def test_any_size_at_any_offset(self, station: Station, size: int, cache: str) -> None:
        data = os.urandom(size)
        with station.mounted(cache, msize=65536) as place, place.guest.process() as process:
            fd = process.open(f"{place.path}/file", NEW)
            done = 0
            while done < size:
                done += process.pwrite(fd, data[done:], 777 + done)
            process.fsync(fd)
            assert (place.host / "file").read_bytes() == bytes(777) + data
            assert process.pread(fd, size, 777) == data

    @pytest.mark.parametrize("cache", ["mmap", "loose"])
    def test_mapped_writes_arrive(self, station: Station, cache: str) -> None:
        with station.mounted(cache) as place, place.guest.process() as process:
            put(process, f"{place.path}/file", bytes(3 * 4096))
            fd = process.open(f"{place.path}/file", os.O_RDWR)
            address = process.mmap(fd, 3 * 4096, PROT_WRITE, MAP_SHARED)
            process.poke(address + 4090, b"across pages")
            process.msync(address, 3 * 4096)
            wanted = bytes(4090) + b"across pages"
            assert (place.host / "file").read_bytes() == wanted.ljust(3 * 4096, b"\0")
            process.poke(address, b"late")
            process.munmap(address, 3 * 4096)
            process.fsync(fd)
            assert (place.host / "file").read_bytes()[:4] == b"late"

    def test_fsync(self, place: Place) -> None:
        with place.guest.process() as process:
            fd = process.open(f"{place.path}/file", NEW)
            process.write(fd, b"data")
            process.fsync(fd)
            process.fdatasync(fd)
            process.fsync(process.open(place.path, os.O_DIRECTORY))
            process.fsync(process.open(f"{place.path}/file", os.O_RDONLY))

    def test_host_changes_are_seen_at_once(self, place: Place) -> None:
        with place.guest.process() as process:
            for number in range(20):
                (place.host / "file").write_text(f"{number}" * (number + 1))
                fd = process.open(f"{place.path}/file")
                assert process.read(fd, 100).decode() == f"{number}" * (number + 1)
                process.close(fd)
                (place.host / f"new{number}").touch()
                assert len(process.listdir(place.path)) == number + 2

    def test_a_program_runs_from_the_share(self, place: Place) -> None:
        guest = place.guest
        guest.run(f"cp /bin/busybox {place.path}/busybox")
        assert guest.run(f"{place.path}/busybox echo it runs").text == "it runs\n"

    @pytest.mark.parametrize("name", [".", "file"])
    def test_statfs(self, place: Place, name: str) -> None:
        (place.host / "file").touch()
        wanted = os.statvfs(place.host)
        with place.guest.process() as process:
            found = process.statfs(f"{place.path}/{name}")
        assert found.blocks * found.bsize == wanted.f_blocks * wanted.f_frsize
        assert found.files == wanted.f_files
        assert found.namelen == wanted.f_namemax
        slack = 4 << 30  # others write on this file system too
        assert abs(found.bavail * found.bsize - wanted.f_bavail * wanted.f_frsize) < slack

    def test_overlay_with_the_share_below(self, place: Place) -> None:
        (place.host / "lower").mkdir()
        (place.host / "lower" / "file").write_text("lower\n")
        text = place.guest.run(
            f"""
            mkdir -p /tmp/over
            mount -t tmpfs none /tmp/over && mkdir /tmp/over/up /tmp/over/work /tmp/over/merged
            mount -t overlay -o lowerdir={place.path}/lower,upperdir=/tmp/over/up,workdir=/tmp/over/work \\
                none /tmp/over/merged || exit 1
            echo upper >> /tmp/over/merged/file; cat /tmp/over/merged/file
            umount /tmp/over/merged; umount /tmp/over
            """  # noqa: E501
        ).text
        assert text == "lower\nupper\n"
        assert (place.host / "lower" / "file").read_text() == "lower\n"


class TestNames:
    def test_longest(self, place: Place) -> None:
        with place.guest.process() as process:
            put(process, f"{place.path}/{'n' * 255}")
            assert process.listdir(place.path) == ["n" * 255]
            with pytest.raises(OSError, match="name too long"):
                put(process, f"{place.path}/{'n' * 256}")

    @pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"-rf *", "ä€😀".encode(), b"..."])
    def test_any_bytes(self, place: Place, name: bytes) -> None:
        with place.guest.process() as process:
            put(process, os.fsdecode(place.path.encode() + b"/" + name))
            assert os.listdir(os.fsencode(place.host)) == [name]
            assert process.listdir(place.path) == [os.fsdecode(name)]

    def test_forty_directories_deep(self, place: Place) -> None:
        path = "/".join(["deeper"] * 40)
        (place.host / path).mkdir(parents=True)
        with place.guest.process() as process:
            put(process, f"{place.path}/{path}/file", b"down here")
            process.chdir(f"{place.path}/{path}")
            assert process.read(process.open("file"), 10) == b"down here"
            up = "../" * 40
            assert process.stat(up).ino == process.stat(place.path).ino
        assert (place.host / path / "file").read_bytes() == b"down here"

    def test_types_in_a_directory(self, place: Place) -> None:
        (place.host / "file").touch()
        (place.host / "dir").mkdir()
        (place.host / "link").symlink_to("file")
        os.mkfifo(place.host / "fifo")
        with place.guest.process() as process:
            found = process.getdents(process.open(place.path, os.O_DIRECTORY))
            types = {entry.name: entry.type for entry in found}
            expected = {"file": 8, "dir": 4, "link": 10, "fifo": 1, ".": 4, "..": 4}
            assert types == expected
            for entry in found:
                if entry.name not in (".", ".."):
                    assert entry.ino == process.lstat(f"{place.path}/{entry.name}").ino

    def test_a_directory_is_read_while_it_changes(self, place: Place) -> None:
        for number in range(2000):
            (place.host / f"{number:04}").touch()
        with place.guest.process() as process:
            fd = process.open(place.path, os.O_DIRECTORY)
            names = [entry.name for entry in process.getdents(fd, 4096)]
            for number in range(0, 2000, 2):
                (place.host / f"{number:04}").unlink()
            while entries := process.getdents(fd):
                names += [entry.name for entry in entries]
            assert len(names) == len(set(names))
            assert {f"{n:04}" for n in range(1, 2000, 2)} <= set(names)
            process.lseek(fd, 0)
            names = []
            while entries := process.getdents(fd):
                names += [entry.name for entry in entries]
            assert len(names) == 1002

    def test_rename(self, place: Place) -> None:
        with place.guest.process() as process:
            process.chdir(place.path)
            put(process, "file", b"file")
            put(process, "other", b"other")
            for name in ("empty", "full", "full/sub"):
                process.mkdir(name)
            inode = process.stat("file").ino
            refused = {
                ("file", "empty"): errno.EISDIR,
                ("empty", "file"): errno.ENOTDIR,
                ("empty", "full"): errno.ENOTEMPTY,
                ("full", "full/sub/below"): errno.EINVAL,
                ("absent", "x"): errno.ENOENT,
                ("file", "absent/x"): errno.ENOENT,
                ("file", "other/x"): errno.ENOTDIR,
            }
            for (old, new), number in refused.items():
                with pytest.raises(OSError, match=r"\w") as caught:
                    process.rename(old, new)
                assert caught.value.errno == number, (old, new)
            process.rename("file", "other")
            assert process.stat("other").ino == inode
            process.rename("other", "full/sub/other")
            assert (place.host / "full" / "sub" / "other").read_bytes() == b"file"
            process.rename("full", "empty")
            assert sorted(process.listdir(".")) == ["empty"]
            assert process.stat("empty/sub/other").ino == inode

    def test_what_exists_stays(self, place: Place) -> None:
        (place.host / "file").write_text("kept")
        (place.host / "dir").mkdir()
        (place.host / "dir" / "x").touch()
        with place.guest.process() as process:
            process.chdir(place.path)
            for name in ("file", "dir"):
                with pytest.raises(FileExistsError):
                    process.open(name, NEW)
                with pytest.raises(FileExistsError):
                    process.mkdir(name)
                with pytest.raises(FileExistsError):
                    process.symlink("x", name)
            with pytest.raises(OSError, match="not empty"):
                process.rmdir("dir")
            with pytest.raises(NotADirectoryError):
                process.rmdir("file")
            with pytest.raises(IsADirectoryError):
                process.unlink("dir")
        assert (place.host / "file").read_text() == "kept"
