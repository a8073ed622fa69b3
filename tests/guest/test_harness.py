"""The guest harness by itself: QEMU with its built-in 9p server, and user-mode Linux."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd_guests import abi
from ninepd_guests.boot import Share, Virtfs, boot_qemu, boot_uml
from ninepd_guests.errors import GuestError, GuestTimeout
from ninepd_guests.image import Cpio
from ninepd_guests.machine import Guest
from ninepd_guests.packages import natural


@pytest.fixture(scope="module", params=["qemu", "uml"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:  # noqa: E501  # fmt: skip
    """With something writable on /mnt."""
    if request.param == "uml":
        with boot_uml() as machine:
            machine.run("mount -t tmpfs none /mnt")
            yield machine
    else:
        folder = tmp_path_factory.mktemp("virtfs")
        with boot_qemu(virtfs=[Virtfs("share", str(folder))]) as machine:
            machine.mount("share", cache="none", msize=131072)
            yield machine


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestRun:
    def test_output_and_status(self, guest: Guest) -> None:
        result = guest.run("echo out; echo err >&2; exit 3", check=False)
        assert (result.status, result.text) == (3, "out\nerr\n")

    def test_check_tells_the_output(self, guest: Guest) -> None:
        with pytest.raises(GuestError, match=r"status 1: .*No such file"):
            guest.run("cat /missing")

    def test_killed_by_a_signal(self, guest: Guest) -> None:
        assert guest.run("kill -9 $$", check=False).status == 128 + 9

    def test_a_broken_pipe_kills_as_it_does_in_a_shell(self, guest: Guest) -> None:
        assert guest.run("yes | head -n 1; echo end").text == "y\nend\n"

    def test_large_output_is_whole(self, guest: Guest) -> None:
        result = guest.run("seq 1 200000")
        assert result.text == "".join(f"{n}\n" for n in range(1, 200001))

    def test_large_command(self, guest: Guest) -> None:
        assert guest.run(f"echo {'x' * 20000} | wc -c").text == "20001\n"

    def test_time_limit(self, guest: Guest) -> None:
        running = guest.start("sleep 100")
        with pytest.raises(GuestTimeout, match="sleep 100"):
            running.wait(0.2)
        running.kill()
        assert running.wait().status == 128 + 9

    def test_background_child_does_not_hold_the_command(self, guest: Guest) -> None:
        start = time.monotonic()
        assert guest.run("sleep 50 & echo started").text == "started\n"
        assert time.monotonic() - start < 20

    def test_concurrent(self, guest: Guest) -> None:
        guest.run("mkfifo /tmp/gate")
        waiting = [guest.start(f"echo {n}; cat /tmp/gate; exit {n}") for n in range(20)]
        assert guest.run("echo meanwhile").text == "meanwhile\n"
        assert not any(running.done for running in waiting)
        guest.run("sleep 1; echo > /tmp/gate; rm /tmp/gate")
        for number, running in enumerate(waiting):
            result = running.wait()
            assert result.status == number
            assert result.text.split()[0] == str(number)

    def test_from_many_threads(self, guest: Guest) -> None:
        wrong: list[str] = []

        def work(number: int) -> None:
            for turn in range(10):
                text = guest.run(f"echo {number} {turn}").text
                if text != f"{number} {turn}\n":
                    wrong.append(text)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_output_as_it_comes(self, guest: Guest) -> None:
        seen = io.BytesIO()
        assert guest.run("echo one; echo two", on_output=seen.write).output == b""
        assert seen.getvalue() == b"one\ntwo\n"


class TestProcess:
    def test_files(self, guest: Guest) -> None:
        with guest.process() as process:
            process.mkdir("/mnt/d", 0o750)
            fd = process.open("/mnt/d/f", os.O_CREAT | os.O_RDWR, 0o640)
            assert fd == 3
            assert process.write(fd, b"hello") == 5
            assert process.pwrite(fd, b"J", 0) == 1
            assert process.pread(fd, 100, 0) == b"Jello"
            status = process.fstat(fd)
            assert (status.size, status.mode & 0o7777, status.nlink) == (5, 0o640, 1)
            process.rename("/mnt/d/f", "/mnt/d/g")
            process.symlink("g", "/mnt/d/link")
            assert process.readlink("/mnt/d/link") == "g"
            assert process.lstat("/mnt/d/link").mode & 0o170000 == 0o120000
            assert process.stat("/mnt/d/link").ino == status.ino
            process.link("/mnt/d/g", "/mnt/d/h")
            assert sorted(process.listdir("/mnt/d")) == ["g", "h", "link"]
            process.utimens("/mnt/d/g", 10**18, 2 * 10**18)
            assert process.stat("/mnt/d/g").mtime_ns == 2 * 10**18
            process.ftruncate(fd, 2)
            process.fsync(fd)
            process.chdir("/mnt/d")
            assert process.stat("g").size == 2
            assert process.statfs(".").bsize > 0
            for name in ("g", "h", "link"):
                process.unlink(name)
            process.chdir("/")
            process.rmdir("/mnt/d")

    def test_errno(self, guest: Guest) -> None:
        with guest.process() as process:
            with pytest.raises(FileNotFoundError) as caught:
                process.open("/mnt/missing")
            assert caught.value.filename == "/mnt/missing"
            with pytest.raises(OSError, match="Bad file descriptor") as caught_other:
                process.read(77, 1)
            assert caught_other.value.errno == errno.EBADF

    def test_one_call_moves_a_megabyte(self, guest: Guest) -> None:
        data = os.urandom(1 << 20)
        with guest.process() as process:
            fd = process.open("/tmp/big", os.O_CREAT | os.O_RDWR)
            assert process.write(fd, data) == len(data)
            assert process.pread(fd, len(data), 0) == data
            process.unlink("/tmp/big")

    def test_too_much_for_one_request(self, guest: Guest) -> None:
        with guest.process() as process, pytest.raises(ValueError, match="too much"):
            process.write(1, bytes(8 << 20))

    def test_credentials(self, guest: Guest) -> None:
        with guest.process() as root, guest.process(1000, 1000) as user:
            root.mkdir("/tmp/private", 0o700)
            with pytest.raises(PermissionError):
                user.mkdir("/tmp/private/x")
            user.mkdir("/tmp/mine")
            assert root.stat("/tmp/mine").uid == 1000
            root.rmdir("/tmp/mine")
            root.rmdir("/tmp/private")

    def test_a_blocked_call_blocks_nobody(self, guest: Guest) -> None:
        with guest.process() as first, guest.process() as second:
            one = first.open("/tmp/locked", os.O_CREAT | os.O_RDWR)
            two = second.open("/tmp/locked", os.O_RDWR)
            first.setlk(one, abi.F_WRLCK)
            with pytest.raises(BlockingIOError):
                second.setlk(two, abi.F_WRLCK)
            assert second.getlk(two, abi.F_WRLCK).type == abi.F_WRLCK
            waiting = second.setlkw(two, abi.F_WRLCK)
            assert first.lseek(one, 0) == 0
            assert not waiting.done
            first.setlk(one, abi.F_UNLCK)
            assert waiting.result() == 0

    def test_interrupt(self, guest: Guest) -> None:
        with guest.process() as process:
            process.mknod("/tmp/fifo", 0o010600)
            waiting = process.submit("openat", abi.AT_FDCWD, b"/tmp/fifo\0", os.O_RDONLY)
            with pytest.raises(GuestTimeout):
                waiting.result(0.3)
            process.interrupt()
            with pytest.raises(InterruptedError):
                waiting.result()
            process.unlink("/tmp/fifo")

    def test_killed_while_blocked(self, guest: Guest) -> None:
        process = guest.process()
        process.mknod("/tmp/fifo", 0o010600)
        waiting = process.submit("openat", abi.AT_FDCWD, b"/tmp/fifo\0", os.O_RDONLY)
        process.kill()
        with pytest.raises(GuestError, match="ended with status 137"):
            waiting.result()
        with pytest.raises(GuestError, match="has ended"):
            process.stat("/")
        guest.run("rm /tmp/fifo")

    def test_mapped_memory(self, guest: Guest) -> None:
        with guest.process() as process:
            fd = process.open("/tmp/mapped", os.O_CREAT | os.O_RDWR)
            process.write(fd, b"abc")
            address = process.mmap(fd, 8192, 3, 1)
            assert process.peek(address, 4) == b"abc\0"
            process.poke(address + 1, b"X")
            assert process.pread(fd, 3, 0) == b"aXc"
            with pytest.raises(OSError, match="Bad address"):
                process.peek(address + 4096, 1)  # past the end of the file: SIGBUS
            assert process.peek(address, 1) == b"a"
            process.munmap(address, 8192)
            process.unlink("/tmp/mapped")

    def test_extended_attributes(self, guest: Guest) -> None:
        with guest.process() as process:
            process.close(process.open("/tmp/x", os.O_CREAT))
            process.setxattr("/tmp/x", "trusted.a", b"\0value")
            assert process.getxattr("/tmp/x", "trusted.a") == b"\0value"
            assert process.listxattr("/tmp/x") == ["trusted.a"]
            process.removexattr("/tmp/x", "trusted.a")
            with pytest.raises(OSError, match="No data"):
                process.getxattr("/tmp/x", "trusted.a")


class TestMachine:
    @pytest.mark.parametrize("kernel", ["6.12", "7.2"])
    def test_kernels(self, kernel: str, tmp_path: Path) -> None:
        with boot_qemu(kernel=kernel, virtfs=[Virtfs("share", str(tmp_path))]) as guest:
            assert guest.run("uname -r").text.startswith(kernel)
            guest.mount("share", "/a b", msize=65536)
            guest.run("echo hello > '/a b/file'")
            assert (tmp_path / "file").read_text() == "hello\n"
            guest.umount("/a b")
            pid = guest.pid
        assert not alive(pid)

    def test_microvm(self, tmp_path: Path) -> None:
        with boot_qemu(machine="microvm", virtfs=[Virtfs("share", str(tmp_path))]) as guest:
            guest.mount("share")
            guest.run("touch /mnt/x")
        assert (tmp_path / "x").exists()

    def test_power_off_unmounts(self, tmp_path: Path) -> None:
        with boot_qemu(virtfs=[Virtfs("share", str(tmp_path))]) as guest:
            guest.mount("share", cache="loose")
            guest.start("cd /mnt && exec sleep 1000")
            guest.run("echo data > /mnt/late")
        assert (tmp_path / "late").read_text() == "data\n"
        assert "Power down" in guest.console

    @pytest.mark.parametrize("hard", [False, True])
    def test_reboot(self, hard: bool) -> None:
        with boot_qemu() as guest:
            pid = guest.pid
            waiting = guest.start("sleep 1000")
            guest.run("touch /tmp/before")
            guest.reboot(hard=hard)
            with pytest.raises(GuestError, match="rebooted"):
                waiting.wait()
            assert guest.run("ls /tmp").text == ""
            assert guest.pid == pid

    def test_reboot_of_user_mode_linux(self) -> None:
        with boot_uml() as guest:
            guest.run("touch /tmp/before")
            guest.reboot()
            assert guest.run("ls /tmp").text == ""

    def test_a_panic_is_told_with_the_console(self) -> None:
        guest = boot_qemu()
        with pytest.raises(GuestError, match=r"(?s)has ended.*sysrq triggered crash"):
            guest.run("echo c > /proc/sysrq-trigger")
        with pytest.raises(GuestError, match="has ended"):
            guest.close()
        guest.close()  # a second time does nothing

    def test_qemu_that_does_not_start(self) -> None:
        with pytest.raises(GuestError, match=r"(?s)did not come up.*no-such-device"):
            boot_qemu(extra_args=["-device", "no-such-device"])

    def test_a_share_that_nobody_serves(self, tmp_path: Path) -> None:
        with pytest.raises(GuestError, match=r"(?s)did not come up.*Failed to connect"):
            boot_qemu([Share("tag", str(tmp_path / "no.sock"))])

    def test_shell_on_a_pipe(self) -> None:
        code = """
            import sys
            from ninepd_guests.boot import boot_uml
            with boot_uml() as guest:
                sys.exit(guest.shell())
        """
        child = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            input=b"echo $((40 + 2))\nexit 5\n", stdout=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
        assert child.returncode == 5
        assert b"\r\n42\r\n" in child.stdout

    def test_kill(self) -> None:
        guest = boot_uml()
        pid = guest.pid
        guest.kill()
        assert not alive(pid)
        with pytest.raises(GuestError, match="has ended"):
            guest.run("true")

    def test_monitor(self) -> None:
        with boot_qemu() as guest:
            assert guest.qmp("query-status")["status"] == "running"
            with pytest.raises(GuestError, match="QEMU refuses no-such"):
                guest.qmp("no-such")

    @pytest.mark.parametrize("how", ["boot_qemu", "boot_uml"])
    def test_the_guest_does_not_outlive_us(self, how: str) -> None:
        code = f"""
            import os, signal
            from ninepd_guests.boot import {how}
            print({how}().pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        child = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, check=False
        )
        assert child.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while alive(int(child.stdout)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(int(child.stdout))

    def test_shell_on_this_terminal(self) -> None:
        code = """
            import sys
            from ninepd_guests.boot import boot_uml
            with boot_uml() as guest:
                sys.exit(guest.shell())
        """
        ours, theirs = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdin=theirs, stdout=theirs
        )
        os.close(theirs)
        seen = _read_until(ours, b"# ")
        os.write(ours, b"sh -c 'tty; exec sleep 100'\r")
        seen = _read_until(ours, b"/dev/pts/0")
        os.write(ours, b"\x03")  # ^C is the guest's
        os.write(ours, b"echo $((40 + 2)); exit 7\r")
        seen = _read_until(ours, b"42\r\n")
        assert child.wait(30) == 7, seen
        os.close(ours)


def _read_until(fd: int, what: bytes) -> bytes:
    seen = b""
    while what not in seen:
        seen += os.read(fd, 4096)
    return seen


def test_natural_order() -> None:
    assert sorted(["a-6.12.9", "a-6.9.1", "a-6.12.10"], key=natural) == [
        "a-6.9.1",
        "a-6.12.9",
        "a-6.12.10",
    ]


def test_image_is_a_cpio_archive(tmp_path: Path) -> None:
    image = Cpio()
    image.add("folder", 0o040755)
    image.add("folder/file", 0o100644, b"content")
    data = image.finish()
    assert data.startswith(b"070701")
    assert len(data) % 4 == 0
    assert b"folder/file\0" in data
    assert b"content" in data
