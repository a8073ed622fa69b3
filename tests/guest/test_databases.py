"""What databases and version control do to files, from two guests on one export at a time."""

import contextlib
import errno
import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ninepd_guests.abi import F_RDLCK, F_UNLCK, F_WRLCK
from ninepd_guests.boot import Share, boot_uml
from ninepd_guests.machine import Guest
from ninepd_guests.remote import Process
from tests.support.client import Daemon
from tests.support.guest import TAG

PAGE = 4096
LOCKED = 1 << 30, 512
"""The bytes that SQLite locks."""
USER = 1000
TURNS = 40
Pair = tuple[Guest, Guest, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
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
            one.mount(TAG, options="locktimeout=1")
            two.mount(TAG, options="locktimeout=1")
            yield one, two, export
    finally:
        for daemon in daemons:
            daemon.stop()
    for daemon in daemons:
        assert "bug" not in daemon.log, daemon.log
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def place(pair: Pair, request: pytest.FixtureRequest) -> tuple[Guest, Guest, Path, str]:
    """The two guests, and a fresh directory on the host and in both of them."""
    one, two, export = pair
    name = request.node.name.translate({ord("["): "-", ord("]"): None})
    (export / name).mkdir()
    (export / name).chmod(0o777)
    return one, two, export / name, f"/mnt/{name}"


Place = tuple[Guest, Guest, Path, str]


def at_once(*works: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


class Database:
    """Pages that all hold one number, changed by way of a journal as in SQLite's rollback mode."""

    PAGES = 3

    def __init__(self, process: Process, folder: str) -> None:
        self.process = process
        self.journal = f"{folder}/journal"
        self.folder = process.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.fd = process.open(f"{folder}/database", os.O_RDWR | os.O_CREAT, 0o644)

    def lock(self, kind: int) -> None:
        limit = time.monotonic() + 60
        while True:
            try:
                return self.process.setlk(self.fd, kind, *LOCKED)
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EACCES}:
                    raise
            assert time.monotonic() < limit, "the lock is never free"

    def unlock(self) -> None:
        self.process.setlk(self.fd, F_UNLCK, *LOCKED)

    def pages(self) -> list[int]:
        return [
            struct.unpack_from("<Q", self.process.pread(self.fd, PAGE, PAGE * number))[0]
            for number in range(self.PAGES)
        ]

    def put(self, page: int, value: int) -> None:
        data = struct.pack("<Q", value).ljust(PAGE, b"\xaa")
        assert self.process.pwrite(self.fd, data, PAGE * page) == PAGE

    def recover(self) -> None:
        """Under the lock: bring back what a writer that died has left half done."""
        try:
            fd = self.process.open(self.journal)
        except FileNotFoundError:
            return
        data = self.process.read(fd, 8 * self.PAGES)
        self.process.close(fd)
        for page, value in enumerate(struct.unpack(f"<{self.PAGES}Q", data)):
            self.put(page, value)
        self.process.fdatasync(self.fd)
        self.process.unlink(self.journal)

    def begin(self) -> list[int]:
        before = self.pages()
        fd = self.process.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.process.write(fd, struct.pack(f"<{self.PAGES}Q", *before))
        self.process.fsync(fd)
        self.process.close(fd)
        self.process.fsync(self.folder)
        return before

    def increment(self) -> None:
        self.lock(F_WRLCK)
        self.recover()
        before = self.begin()
        assert len(set(before)) == 1, before
        for page, value in enumerate(before):
            self.put(page, value + 1)
        self.process.fdatasync(self.fd)
        self.process.unlink(self.journal)
        self.process.fsync(self.folder)
        self.unlock()

    def look(self) -> int:
        self.lock(F_RDLCK)
        values = set(self.pages())
        self.unlock()
        assert len(values) == 1, values
        return int(values.pop())


def fresh(host: Path) -> None:
    (host / "database").write_bytes(bytes(PAGE * Database.PAGES))


def test_transactions_of_two_guests(place: Place) -> None:
    """All are counted, and readers never see half of one."""
    one, two, host, folder = place
    fresh(host)
    with one.process() as a, two.process() as b, two.process() as c:
        writers = Database(a, folder), Database(b, folder)
        reader = Database(c, folder)
        running = threading.Event()
        running.set()
        seen = []

        def read() -> None:
            while running.is_set():
                seen.append(reader.look())

        def write(database: Database) -> None:
            for _ in range(TURNS):
                database.increment()

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            try:
                at_once(lambda: write(writers[0]), lambda: write(writers[1]))
            finally:
                running.clear()
            reading.result()
        assert seen == sorted(seen)
        assert reader.look() == 2 * TURNS
    assert os.listdir(host) == ["database"]
    assert struct.unpack_from("<Q", (host / "database").read_bytes())[0] == 2 * TURNS


def test_a_writer_dies_in_the_middle(place: Place) -> None:
    """Its lock goes with it, its journal stays, and the other guest rolls back."""
    one, two, host, folder = place
    fresh(host)
    with one.process() as a, two.process() as b:
        dying, other = Database(a, folder), Database(b, folder)
        for _ in range(3):
            other.increment()
        dying.lock(F_WRLCK)
        dying.begin()
        dying.put(0, 999)
        with pytest.raises(BlockingIOError):
            b.setlk(other.fd, F_WRLCK, *LOCKED)
        a.kill()
        other.increment()
        assert other.look() == 4
    assert os.listdir(host) == ["database"]


def test_a_log_that_both_append_to(place: Place) -> None:
    """Records by O_APPEND stay whole and in each writer's order."""
    one, two, host, folder = place

    def write(guest: Guest, who: int) -> None:
        with guest.process() as process:
            fd = process.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            for number in range(200):
                record = struct.pack("<BI", who, number).ljust(100, b"%d" % who)
                assert process.write(fd, record) == 100

    at_once(lambda: write(one, 1), lambda: write(two, 2))
    data = (host / "log").read_bytes()
    assert len(data) == 400 * 100
    records = [data[at : at + 100] for at in range(0, len(data), 100)]
    for who in (1, 2):
        mine = [record for record in records if record[0] == who]
        assert [struct.unpack_from("<I", record, 1)[0] for record in mine] == list(range(200))
        assert all(record[5:] == b"%d" % who * 95 for record in mine)


def write_object(process: Process, folder: str, content: bytes, how: str) -> str:
    """As git does: a read-only file, written through the descriptor that made it, then named."""
    name = hashlib.sha1(content).hexdigest()
    shelf = f"{folder}/{name[:2]}"
    with contextlib.suppress(FileExistsError):
        process.mkdir(shelf, 0o777)
    temporary = f"{shelf}/tmp_obj_{process.syscall('getpid')}_{name[2:8]}{id(process)}"
    fd = process.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444)
    process.write(fd, content)
    process.fsync(fd)
    process.close(fd)
    final = f"{shelf}/{name[2:]}"
    if how == "rename":
        process.rename(temporary, final)
    else:
        with contextlib.suppress(FileExistsError):
            process.link(temporary, final)
        process.unlink(temporary)
    return final


@pytest.mark.parametrize("how", ["rename", "link"])
def test_objects_of_two_guests(place: Place, how: str) -> None:
    """Both write the same objects as an ordinary user; each is whole, read-only and there once."""
    one, two, host, folder = place
    contents = [b"object %d " % number * (number * 20) for number in range(40)]

    def write(guest: Guest, order: int) -> None:
        with guest.process(USER, USER) as process:
            process.umask(0o022)
            for content in contents[::order]:
                final = write_object(process, folder, content, how)
                fd = process.open(final)
                assert process.pread(fd, len(content) + 1, 0) == content
                process.close(fd)
                with pytest.raises(PermissionError):
                    process.open(final, os.O_WRONLY)

    at_once(lambda: write(one, 1), lambda: write(two, -1))
    found = [path for path in host.rglob("*") if path.is_file()]
    assert len(found) == len(contents)
    for path in found:
        info = path.stat()
        assert (info.st_mode & 0o7777, info.st_uid, info.st_nlink) == (0o444, USER, 1)
        assert hashlib.sha1(path.read_bytes()).hexdigest() == path.parent.name + path.name


def test_lock_files_have_one_winner(place: Place) -> None:
    """``ref.lock`` by O_EXCL: what is counted under it is counted right."""
    one, two, host, folder = place
    (host / "ref").write_text("0")

    def count(guest: Guest) -> None:
        with guest.process() as process:
            done, limit = 0, time.monotonic() + 120
            while done < TURNS:
                assert time.monotonic() < limit, "the lock file is always there"
                try:
                    new = process.open(
                        f"{folder}/ref.lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644
                    )
                except FileExistsError:
                    continue
                fd = process.open(f"{folder}/ref")
                value = int(process.read(fd, 100))
                process.close(fd)
                process.write(new, b"%d" % (value + 1))
                process.close(new)
                process.rename(f"{folder}/ref.lock", f"{folder}/ref")
                done += 1

    at_once(lambda: count(one), lambda: count(two))
    assert (host / "ref").read_text() == str(2 * TURNS)
    assert os.listdir(host) == ["ref"]
