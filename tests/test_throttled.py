"""A live daemon that lets its guests read and write only so fast."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    NOTAG,
    LockType,
    Rclunk,
    Rflush,
    Rlerror,
    Rversion,
    Rwrite,
    Tclunk,
    Tflush,
    Tfsync,
    Tlock,
    Tmkdir,
    Topen,
    Tread,
    Tstatfs,
    Tversion,
    Twrite,
    decode,
    encode,
)
from tests.conftest import Mount, StartDaemon
from tests.support import storage
from tests.support.client import ROOT, Client, Daemon, send
from tests.support.driver import Driver
from tests.support.frontend import FakeFrontEnd
from tests.support.legacy import attach as attach_old
from tests.support.waiting import promptly

fuses = storage.fuses
start_fuse = storage.start_fuse
fuse = storage.fuse

FILE = bytes(range(256)) * 256
FOREVER = ("--throttle-bps-total", "1")
"""After 1000 bytes the next request waits for a quarter of an hour."""
LONGER = 4_000, 16_000, 64_000
"""Bytes that 10000 a second take longer and longer to pay off: for tests that want to be there
before, on a computer that may be busy with something else."""
O_APPEND = 0x400
OUT = 2001


@pytest.fixture
def file(export: Path) -> Path:
    path = export / "f"
    path.write_bytes(FILE)
    return path


@pytest.fixture
def daemon(start_daemon: StartDaemon, file: Path) -> Daemon:
    return start_daemon(*FOREVER)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """Fid 1 is the file; what may be moved for now has been."""
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=os.O_RDWR)
        assert client.read(1, 0, 1000) == FILE[:1000]
        yield client


def wait(client: Client, message: Any = Tread(1, 1000, 1000), data: bytes = b"") -> int:  # noqa: B008
    """A request that is still waiting when the ones behind it are answered."""
    return send(client, message, data, tag=OUT)


def replies(client: Client, count: int) -> list[tuple[int, Any]]:
    """(head, message) of so many, in the order of the used ring; None for one without reply."""
    found: list[tuple[int, Any]] = []
    for head, length in client.driver.wait_used(20, count):
        reply = client.driver.reply(head, length)
        found.append((head, decode(reply)[1] if reply else None))
    return found


# What waits, and what does not


def test_only_file_data_waits(client: Client, export: Path) -> None:
    """All else is answered meanwhile, on the same fid as well."""
    os.setxattr(export / "f", "user.x", b"value")
    wait(client)
    wait(client, Twrite(1, 0, 4), b"text")
    client.getattr(1)
    client.rpc(Tfsync(1, 0))
    client.rpc(Tlock(1, LockType.WRLCK, 0, 0, 0, 7, b"guest"))
    client.rpc(Tstatfs(1))
    assert client.names(ROOT) == {b"f"}
    assert client.get_xattr(1, b"user.x") == b"value"
    client.set_xattr(1, b"user.y", b"another")
    client.rpc(Tmkdir(ROOT, b"d", 0o755, 0))
    client.create(ROOT, 2, b"g")
    client.clunk(2)
    assert client.error(Tread(99, 0, 10)) == "ENOENT"
    assert client.driver.take_used() == []


@pytest.mark.parametrize("limited", ["read", "write"])
def test_one_direction_leaves_the_other(
    start_daemon: StartDaemon, file: Path, limited: str
) -> None:
    """A request waits behind those that go its way, and only behind those."""
    daemon = start_daemon(f"--throttle-bps-{limited}", "1")
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f", flags=os.O_RDWR)
        client.read(1, 0, 1000)
        client.write(1, 0, FILE[:1000])
        slow = [(Tread(1, 0, 5), b""), (Twrite(1, 0, 5), b"other")][limited == "write"]
        send(client, *slow, tag=OUT)
        send(client, *slow, tag=OUT + 1)
        for _ in range(10):
            if limited == "write":
                assert client.read(1, 0, 1000) == FILE[:1000]
            else:
                client.write(1, 0, FILE[:1000])
        assert client.driver.take_used() == []


def test_listings_of_old_clients_do_not_wait(start_daemon: StartDaemon, file: Path) -> None:
    """They are Treads, too."""
    daemon = start_daemon(*FOREVER)
    with Client(daemon.socket) as client:
        attach_old(client, b"9P2000.u")
        client.walk(ROOT, 1, b"f")
        client.rpc(Topen(1, 0))
        client.walk(ROOT, 2)
        client.rpc(Topen(2, 0))
        client.read(1, 0, 1000)
        head = wait(client)
        assert b"f" in client.read(2, 0, 4000)
        flush = send(client, Tflush(OUT), tag=1)
        assert replies(client, 2) == [(head, None), (flush, Rflush())]


def test_file_that_is_on_a_server(start_daemon: StartDaemon, fuse: storage.Fuse) -> None:
    """What goes to a worker in any case waits before it does."""
    daemon = start_daemon(*FOREVER)
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"m", b"quick")
        assert client.read(1, 0, 1000) == b"quick text"
        head = wait(client)
        client.getattr(1)
        flush = send(client, Tflush(OUT), tag=1)
        assert replies(client, 2) == [(head, None), (flush, Rflush())]


def test_more_than_a_message_holds_is_not_counted(start_daemon: StartDaemon, file: Path) -> None:
    """However much is asked for: nobody has to pay for what cannot come."""
    daemon = start_daemon("--throttle-bps-read", "1", "--throttle-bps-read-max", "10000")
    with Client(daemon.socket) as client:
        client.attach(msize=8192)
        client.open(ROOT, 1, b"f")
        for _ in range(2):
            _, data = client.rpc_with_data(Tread(1, 0, 0xFFFFFFFF), room=60000)
            assert data == FILE[: 8192 - 11]
        wait(client)
        client.getattr(1)
        assert client.driver.take_used() == []


def test_other_exports_do_not_wait(start_daemon: StartDaemon, file: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{file.parent}"\ntag = "{tag}"\n'
            f'socket-path = "{tmp_path}/{tag}"\nthrottle-bps-read = {rate}\n'
            for tag, rate in (("slow", 1), ("quick", 0))
        )
    )
    start_daemon(config=str(config))
    with Client(f"{tmp_path}/slow") as slow, Client(f"{tmp_path}/quick") as quick:
        for client in (slow, quick):
            client.attach()
            client.open(ROOT, 1, b"f")
            client.read(1, 0, 1000)
        wait(slow)
        for _ in range(100):
            assert quick.read(1, 0, 60000) == FILE[:60000]
        slow.getattr(1)


def test_ring_that_is_lost_over_one_whose_time_has_come(
    start_daemon: StartDaemon, export: Path, mount: Mount, mount_ext4: Mount
) -> None:
    """It stalls, on storage that is frozen; the next one does not wait for it."""
    (mount_ext4(export / "frozen") / "f").touch()
    (mount(export / "tmpfs", "-t", "tmpfs", "none") / "f").touch()
    daemon = start_daemon("--throttle-bps-write", "1000")
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"frozen", b"f", flags=os.O_RDWR)
        client.open(ROOT, 2, b"tmpfs", b"f", flags=os.O_RDWR)
        with storage.frozen(export / "frozen"):
            client.write(2, 0, bytes(300))
            stalls = send(client, Twrite(1, 0, 4), b"text", tag=OUT)
            goes_on = send(client, Twrite(2, 0, 6), b"second", tag=OUT + 1)
            assert replies(client, 1) == [(goes_on, Rwrite(6))]
            time.sleep(0.1)
            client.write(2, 0, b"")  # another might begin now: not on the thread that comes back
        assert replies(client, 1) == [(stalls, Rwrite(4))]
        client.write(2, 6, b" third")
    assert (export / "frozen" / "f").read_text() == "text"
    assert (export / "tmpfs" / "f").read_bytes()[:12] == b"second third"


# Taken back


def test_flush_takes_it_back(client: Client, file: Path) -> None:
    """It gets no reply and does nothing; its tag and its place in the ring are free."""
    for _ in range(300):
        head = wait(client, Twrite(1, 0, 4), b"text")
        flush = send(client, Tflush(OUT), tag=1)
        assert replies(client, 2) == [(head, None), (flush, Rflush())]
    assert file.read_bytes() == FILE
    client.clunk(1)


def test_flush_takes_back_no_other(client: Client) -> None:
    heads = [send(client, Tread(1, 0, 10), tag=OUT + number) for number in range(3)]
    flush = send(client, Tflush(OUT + 1), tag=1)
    assert replies(client, 2) == [(heads[1], None), (flush, Rflush())]
    flush = send(client, Tflush(7), tag=1)
    assert replies(client, 1) == [(flush, Rflush())]


def test_new_session_takes_all_back(client: Client, file: Path) -> None:
    first = wait(client)
    second = send(client, Twrite(1, 0, 4), b"text", tag=3)
    version = send(client, Tversion(8192, b"9P2000.L"), tag=NOTAG)
    came = replies(client, 3)
    assert came[:2] == [(first, None), (second, None)]
    assert came[2][0] == version
    assert isinstance(came[2][1], Rversion)
    client.attach()
    client.open(ROOT, 1, b"f")
    assert file.read_bytes() == FILE


def test_fid_that_goes_meanwhile(start_daemon: StartDaemon, file: Path) -> None:
    """The request comes when its time has come, and then there is none."""
    daemon = start_daemon("--throttle-bps-read", "10000")
    with Client(daemon.socket) as client:
        client.attach()
        for nbytes in LONGER:
            client.open(ROOT, 1, b"f")
            client.read(1, 0, nbytes)
            read = wait(client)
            clunk = send(client, Tclunk(1), tag=3)
            first, second = replies(client, 2)
            if first[0] == clunk:
                break
        assert first == (clunk, Rclunk())
        assert second == (read, Rlerror(errno.ENOENT))


# Rings that rest, guests that come and go


def test_pause_does_not_wait_and_loses_nothing(start_daemon: StartDaemon, file: Path) -> None:
    daemon = start_daemon("--throttle-bps-read", "10000")
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        for nbytes in LONGER:
            assert client.read(1, 0, nbytes) == FILE[:nbytes]
            head = wait(client)
            base = client.front_end.stop()
            before = client.driver.take_used()
            client.start(base)
            ((came, length),) = before or client.driver.wait_used(20)
            assert came == head
            assert client.driver.reply(head, length)[11:] == FILE[1000:2000]
            if not before:
                break
        assert not before


def test_pauses_are_quick(client: Client) -> None:
    """Each would take a second, if it waited for requests that are out."""
    wait(client)
    with promptly(8):
        for _ in range(16):
            client.start(client.front_end.stop())
    client.getattr(1)
    assert client.driver.take_used() == []


@pytest.mark.parametrize("how", ["reset", "another front end"])
def test_coming_again_does_not_help(daemon: Daemon, client: Client, file: Path, how: str) -> None:
    """What waits is dropped, undone; the next guest waits on."""
    wait(client, Twrite(1, 0, 4), b"text")
    client.getattr(1)
    if how == "reset":
        client.reboot()
    else:
        client.front_end.close()
        client.front_end = FakeFrontEnd(daemon.socket)
        client.front_end.connect()
        client.driver.close()
        client.driver = Driver()
        client.start()
    client.attach()
    client.open(ROOT, 1, b"f", flags=os.O_RDWR)
    wait(client)
    client.getattr(1)
    assert client.driver.take_used() == []
    assert file.read_bytes() == FILE
    daemon.stop()
    assert daemon.log.count("1 requests were dropped") == 2


def test_end_does_not_wait(daemon: Daemon, client: Client, file: Path) -> None:
    wait(client, Twrite(1, 0, 4), b"text")
    client.getattr(1)
    assert daemon.stop() == 0
    assert "1 requests were dropped" in daemon.log
    assert client.driver.take_used() == []
    assert file.read_bytes() == FILE


# In the long run


def test_rate_and_order(start_daemon: StartDaemon, export: Path) -> None:
    """However many a guest has under way, they come one after the other, and not too fast."""
    size, count, rate = 8192, 64, 500_000
    data = os.urandom(size * count)
    (export / "f").write_bytes(data)
    daemon = start_daemon("--throttle-bps-read", str(rate))
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        requests = range(count)
        started = time.monotonic()
        heads = [client.submit(encode_read(number, size), room=11 + size) for number in requests]
        used = client.driver.wait_used(60, count)
        seconds = time.monotonic() - started
        assert [head for head, _ in used] == heads
        read = b"".join(client.driver.reply(head, length)[11:] for head, length in used)
        assert read == data
    assert seconds >= (size * (count - 1) - rate / 10 - size) / rate


def encode_read(number: int, size: int) -> bytes:
    return encode(number, Tread(1, number * size, size))


def test_appending_writes_keep_their_order(start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon("--throttle-iops-write", "50")
    with Client(daemon.socket) as client:
        client.attach()
        client.create(ROOT, 1, b"f", flags=0x8042 | O_APPEND)
        for number in range(40):
            send(client, Twrite(1, 0, 2), b"%02d" % number, tag=OUT + number)
        assert [reply for _, reply in replies(client, 40)] == [Rwrite(2)] * 40
    assert (export / "f").read_bytes() == b"".join(b"%02d" % number for number in range(40))


def test_nobody_wakes_up_for_nothing(start_daemon: StartDaemon, file: Path) -> None:
    """Neither when nothing waits, nor after what waited was taken back."""
    daemon = start_daemon("--throttle-iops-read", "5")
    with Client(daemon.socket) as client:
        client.attach()
        client.open(ROOT, 1, b"f")
        for _ in range(2):
            client.read(1, 0, 10)
        wait(client)
        send(client, Tflush(OUT), tag=1)
        assert replies(client, 2)[1][1] == Rflush()
        time.sleep(0.5)  # the alarm that was set goes off, once
        slept, ran = switches(daemon.pid), seconds_on_cpu(daemon.pid)
        time.sleep(0.5)
        assert switches(daemon.pid) - slept <= 2
        assert seconds_on_cpu(daemon.pid) - ran < 0.1


def switches(pid: int) -> int:
    """How often its threads have gone to sleep."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return found


def seconds_on_cpu(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)  # its CPU-time clock (clock_getcpuclockid(3))
