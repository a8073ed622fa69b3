"""Locks exclude two guests, and a guest and the host's processes, from each other."""

import fcntl
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ninepd_guests.abi import F_RDLCK, F_UNLCK, F_WRLCK
from ninepd_guests.boot import Share, boot_uml
from ninepd_guests.machine import Guest
from ninepd_guests.remote import Process
from tests.conftest import StartDaemon
from tests.support.client import Daemon
from tests.support.guest import TAG, Place
from tests.support.waiting import eventually

RETRY = "locktimeout=1"
"""Seconds until the client asks again for a lock that it waits for; its default is 30."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, Guest, Path]]:
    """Two guests, each with its own daemon on one directory."""
    folder = tmp_path_factory.mktemp("pair")
    export = folder / "export"
    export.mkdir()
    daemons = [Daemon(socket=str(folder / n), export=str(export), tag=TAG) for n in ("a", "b")]
    try:
        with (
            boot_uml([Share(TAG, daemons[0].socket)]) as one,
            boot_uml([Share(TAG, daemons[1].socket)]) as two,
        ):
            one.mount(TAG, options=RETRY)
            two.mount(TAG, options=RETRY)
            yield one, two, export
    finally:
        for daemon in daemons:
            daemon.stop()


@pytest.fixture
def processes(pair: tuple[Guest, Guest, Path]) -> Iterator[tuple[Process, Process]]:
    """One in each guest, with descriptor 3 on a file that both see."""
    one, two, export = pair
    (export / "file").write_bytes(bytes(100))
    with one.process() as first, two.process() as second:
        assert first.open("/mnt/file", os.O_RDWR) == 3
        assert second.open("/mnt/file", os.O_RDWR) == 3
        yield first, second
    (export / "file").unlink()


FD = 3


def take(process: Process, how: str) -> None:
    """Asks again and again, so that the turns of two are short."""
    limit = time.monotonic() + 60
    while refused(
        lambda: (
            process.setlk(FD, F_WRLCK)
            if how == "fcntl"
            else process.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB)
        )
    ):
        assert time.monotonic() < limit, "the lock is never free"


def refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except BlockingIOError:
        return True
    return False


class TestTwoGuests:
    def test_fcntl(self, processes: tuple[Process, Process]) -> None:
        first, second = processes
        first.setlk(FD, F_WRLCK)
        assert refused(lambda: second.setlk(FD, F_WRLCK))
        assert refused(lambda: second.setlk(FD, F_RDLCK))
        assert second.getlk(FD, F_RDLCK).type == F_WRLCK
        first.setlk(FD, F_UNLCK)
        assert second.getlk(FD, F_WRLCK).type == F_UNLCK
        second.setlk(FD, F_WRLCK)
        assert refused(lambda: first.setlk(FD, F_RDLCK))

    def test_shared(self, processes: tuple[Process, Process]) -> None:
        first, second = processes
        first.setlk(FD, F_RDLCK)
        second.setlk(FD, F_RDLCK)
        assert refused(lambda: second.setlk(FD, F_WRLCK))
        first.setlk(FD, F_UNLCK)
        second.setlk(FD, F_WRLCK)

    def test_ranges(self, processes: tuple[Process, Process]) -> None:
        first, second = processes
        first.setlk(FD, F_WRLCK, 10, 10)
        second.setlk(FD, F_WRLCK, 0, 10)
        second.setlk(FD, F_WRLCK, 20, 0)
        assert refused(lambda: second.setlk(FD, F_WRLCK, 19, 1))
        found = second.getlk(FD, F_WRLCK)
        assert (found.type, found.start, found.length) == (F_WRLCK, 10, 10)
        first.setlk(FD, F_UNLCK, 15, 5)
        second.setlk(FD, F_WRLCK, 15, 5)
        assert refused(lambda: second.setlk(FD, F_WRLCK, 14, 1))

    def test_flock(self, processes: tuple[Process, Process]) -> None:
        first, second = processes
        first.flock(FD, fcntl.LOCK_EX)
        assert refused(lambda: second.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB))
        assert refused(lambda: second.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB))
        first.flock(FD, fcntl.LOCK_UN)
        second.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB)
        first.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert refused(lambda: first.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB))

    def test_exclusive_flock_of_a_descriptor_for_reading(
        self, processes: tuple[Process, Process]
    ) -> None:
        first, second = processes
        fd = first.open("/mnt/file", os.O_RDONLY)
        first.flock(fd, fcntl.LOCK_EX)
        assert refused(lambda: second.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB))
        first.close(fd)
        second.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @pytest.mark.parametrize("how", ["close", "kill"])
    def test_release_at_the_end(self, processes: tuple[Process, Process], how: str) -> None:
        first, second = processes
        first.setlk(FD, F_WRLCK)
        assert refused(lambda: second.setlk(FD, F_WRLCK))
        if how == "close":
            first.close(FD)
        else:
            first.kill()
        second.setlk(FD, F_WRLCK)

    def test_one_descriptor_of_two_keeps_the_lock(
        self, pair: tuple[Guest, Guest, Path], processes: tuple[Process, Process]
    ) -> None:
        """Another process of the same guest opens and closes the file: nothing changes."""
        first, second = processes
        first.setlk(FD, F_WRLCK)
        with pair[0].process() as third:
            third.close(third.open("/mnt/file", os.O_RDWR))
        assert refused(lambda: second.setlk(FD, F_WRLCK))

    def test_a_waiter_gets_it(self, processes: tuple[Process, Process]) -> None:
        first, second = processes
        first.setlk(FD, F_WRLCK)
        waiting = second.setlkw(FD, F_WRLCK)
        time.sleep(0.3)
        assert not waiting.done
        # While it waits, the daemon of that guest serves others.
        assert first.fstat(FD).size == 100
        first.setlk(FD, F_UNLCK)
        assert waiting.result(10) == 0
        assert refused(lambda: first.setlk(FD, F_RDLCK))

    @pytest.mark.parametrize("how", ["fcntl", "flock"])
    def test_counting_together(self, processes: tuple[Process, Process], how: str) -> None:
        """Two guests that add to one number under a lock lose nothing."""
        wrong: list[BaseException] = []

        def count(process: Process) -> None:
            try:
                for _ in range(25):
                    take(process, how)
                    number = int.from_bytes(process.pread(FD, 8, 0), "little")
                    process.pwrite(FD, (number + 1).to_bytes(8, "little"), 0)
                    if how == "fcntl":
                        process.setlk(FD, F_UNLCK)
                    else:
                        process.flock(FD, fcntl.LOCK_UN)
            except BaseException as error:  # for the test's own thread
                wrong.append(error)

        threads = [threading.Thread(target=count, args=(process,)) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert processes[0].pread(FD, 8, 0) == (50).to_bytes(8, "little")


class TestOneGuest:
    """What its kernel settles must look settled to the others, too."""

    @pytest.fixture
    def family(
        self, pair: tuple[Guest, Guest, Path], processes: tuple[Process, Process]
    ) -> Iterator[tuple[Process, Process, int]]:
        """A process with descriptor 3 on the file, and a child with a copy of that descriptor."""
        parent = processes[0]
        with pair[0].process() as child:
            yield parent, child, child.inherit(parent, FD)

    def test_flock_is_shared_with_a_child(
        self,
        pair: tuple[Guest, Guest, Path],
        processes: tuple[Process, Process],
        family: tuple[Process, Process, int],
    ) -> None:
        _, elsewhere = processes
        parent, child, copy = family
        parent.flock(FD, fcntl.LOCK_EX)
        child.flock(copy, fcntl.LOCK_SH | fcntl.LOCK_NB)
        elsewhere.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB)
        elsewhere.flock(FD, fcntl.LOCK_UN)
        child.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert refused(lambda: elsewhere.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB))
        child.flock(copy, fcntl.LOCK_UN)
        with pair[0].process() as third, (pair[2] / "file").open("r+") as file:
            third.flock(third.open("/mnt/file", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert refused(lambda: fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB))
            third.kill()
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_UN)
        elsewhere.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_flock_outlives_a_copy_of_the_descriptor(
        self, processes: tuple[Process, Process], family: tuple[Process, Process, int]
    ) -> None:
        _, elsewhere = processes
        parent, child, copy = family
        parent.flock(FD, fcntl.LOCK_EX)
        child.close(copy)
        assert refused(lambda: elsewhere.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB))
        child.kill()
        assert refused(lambda: elsewhere.flock(FD, fcntl.LOCK_SH | fcntl.LOCK_NB))
        parent.flock(FD, fcntl.LOCK_UN)
        elsewhere.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_fcntl_is_not_shared_with_a_child(
        self, processes: tuple[Process, Process], family: tuple[Process, Process, int]
    ) -> None:
        _, elsewhere = processes
        parent, child, copy = family
        parent.setlk(FD, F_WRLCK, 0, 10)
        assert refused(lambda: child.setlk(copy, F_RDLCK, 0, 10))
        child.setlk(copy, F_UNLCK, 0, 10)
        child.close(copy)
        assert refused(lambda: elsewhere.setlk(FD, F_RDLCK, 0, 10))

    @pytest.mark.parametrize("how", ["fcntl", "flock"])
    def test_turns(
        self, pair: tuple[Guest, Guest, Path], processes: tuple[Process, Process], how: str
    ) -> None:
        """One waits for the other in the guest's kernel, never for its next try here."""
        with pair[0].process() as other:
            assert other.open("/mnt/file", os.O_RDWR) == FD
            turns = [processes[0], other]
            if how == "flock":
                turns[0].flock(FD, fcntl.LOCK_EX)
            else:
                turns[0].setlk(FD, F_WRLCK)
            for _ in range(200):
                if how == "flock":
                    waiting = turns[1].submit("flock", FD, fcntl.LOCK_EX)
                    turns[0].flock(FD, fcntl.LOCK_UN)
                else:
                    waiting = turns[1].setlkw(FD, F_WRLCK)
                    turns[0].setlk(FD, F_UNLCK)
                waiting.result(10)
                assert refused(lambda: processes[1].setlk(FD, F_RDLCK))
                turns.reverse()

    def test_getlk_beside_another_reader(
        self, pair: tuple[Guest, Guest, Path], processes: tuple[Process, Process]
    ) -> None:
        first, elsewhere = processes
        with pair[0].process() as second:
            assert second.open("/mnt/file", os.O_RDWR) == FD
            first.setlk(FD, F_RDLCK, 0, 50)
            assert second.getlk(FD, F_RDLCK).type == F_UNLCK
            assert second.getlk(FD, F_WRLCK).type == F_RDLCK
            second.setlk(FD, F_RDLCK, 0, 50)
            assert first.getlk(FD, F_RDLCK).type == F_UNLCK
            elsewhere.setlk(FD, F_WRLCK, 60, 10)
            found = second.getlk(FD, F_RDLCK)
            assert (found.type, found.start, found.length) == (F_WRLCK, 60, 10)
            with (pair[2] / "file").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX, 10, 80)
                found = second.getlk(FD, F_RDLCK, 75, 20)
                assert (found.type, found.start, found.length) == (F_WRLCK, 80, 10)

    def test_hard_links(
        self, pair: tuple[Guest, Guest, Path], processes: tuple[Process, Process]
    ) -> None:
        """Two names are two inodes for the guest's kernel, so only the server excludes."""
        first = processes[0]
        other = pair[2] / "other"
        os.link(pair[2] / "file", other)
        try:
            with pair[0].process() as second:
                assert second.open("/mnt/other", os.O_RDWR) == FD
                first.setlk(FD, F_WRLCK)
                assert refused(lambda: second.setlk(FD, F_RDLCK))
                assert refused(lambda: second.flock(FD, fcntl.LOCK_EX | fcntl.LOCK_NB))
                assert second.getlk(FD, F_RDLCK).type == F_WRLCK
                first.setlk(FD, F_UNLCK)
                second.setlk(FD, F_WRLCK)
        finally:
            other.unlink()


def test_a_crash_of_the_guest_releases(start_daemon: StartDaemon, export: Path) -> None:
    (export / "file").write_bytes(b"x")
    guest = boot_uml([Share(TAG, start_daemon().socket)])
    try:
        guest.mount(TAG)
        process = guest.process()
        process.setlk(process.open("/mnt/file", os.O_RDWR), F_WRLCK)
        with (export / "file").open("r+") as file:
            assert refused(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
            guest.kill()
            eventually(
                lambda: not refused(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)),
                "the lock of a guest that is gone is free",
            )
    finally:
        guest.kill()


class TestGuestAndHost:
    def test_the_guest_excludes_the_host(self, place: Place) -> None:
        (place.host / "file").write_bytes(bytes(100))
        with place.guest.process() as process, (place.host / "file").open("r+") as file:
            fd = process.open(f"{place.path}/file", os.O_RDWR)
            process.setlk(fd, F_WRLCK, 0, 50)
            assert refused(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 50, 50)
            fcntl.lockf(file, fcntl.LOCK_UN)
            process.setlk(fd, F_UNLCK)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_the_host_excludes_the_guest(self, place: Place) -> None:
        (place.host / "file").write_bytes(bytes(100))
        with place.guest.process() as process, (place.host / "file").open("r+") as file:
            fd = process.open(f"{place.path}/file", os.O_RDWR)
            fcntl.lockf(file, fcntl.LOCK_EX, 20, 30)
            assert refused(lambda: process.setlk(fd, F_RDLCK))
            assert refused(lambda: process.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB))
            found = process.getlk(fd, F_WRLCK)
            assert (found.type, found.start, found.length) == (F_WRLCK, 30, 20)
            fcntl.lockf(file, fcntl.LOCK_UN)
            process.setlk(fd, F_WRLCK)

    @pytest.mark.parametrize("how", ["fcntl", "flock"])
    def test_the_host_runs_what_the_guest_has_locked(self, place: Place, how: str) -> None:
        program = place.host / "program"
        shutil.copy("/bin/true", program)
        with place.guest.process() as process:
            fd = process.open(f"{place.path}/program", os.O_RDONLY)
            if how == "flock":
                process.flock(fd, fcntl.LOCK_SH)
            else:
                process.setlk(fd, F_RDLCK)
            with program.open("rb") as file:
                # Nor is it open for writing in the eyes of who wants a lease.
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            subprocess.run([program], check=True)

    def test_flock_in_the_guest_is_fcntl_on_the_host(self, place: Place) -> None:
        (place.host / "file").touch()
        with place.guest.process() as process, (place.host / "file").open("r+") as file:
            fd = process.open(f"{place.path}/file", os.O_RDONLY)
            process.flock(fd, fcntl.LOCK_EX)
            assert refused(lambda: fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB))
            process.kill()
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
