"""The data of the virtqueue's requests, and the guest memory it lies in, whole or truncated."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ninepd.errors import RingBroken
from ninepd.vring import GuestMemory
from tests.support.driver import INDIRECT, NEXT, WRITE, Driver, Region, Segment, encode_desc
from tests.support.vring_rig import (
    MIB,
    TWRITE,
    UA,
    Device,
    Rig,
    echo,
    hole,
    message,
    open_fds,
    started_rig,
)

rig = pytest.fixture(started_rig)


# ---- bulk data ----


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as f:
        yield f.fileno()


def pattern(n: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n)


@pytest.mark.parametrize("align", [1, 4096])
def test_zero_copy_read_and_write(rig: Rig, file: int, align: int) -> None:
    """As net/9p/trans_virtio.c lays them out: a header buffer, then pages, here one in two."""
    data = pattern(125 * 4096)
    pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    request = message(bytes(16), TWRITE)
    head = rig.driver.submit([request, *pages], [4096], indirect=True, align=align)
    assert rig.take() == [(head, 23 + len(data), 4096, 23, 0)]
    assert rig.ring.writev(head, 23, file, len(data), 100) == len(data)
    assert os.pread(file, len(data) + 1, 100) == data
    rig.answer(head, bytes(11))
    rig.driver.wait_used()
    rig.driver.reply(head)

    head = rig.driver.submit([message(bytes(16))], [11] + [4096] * 125, indirect=True, align=align)
    assert rig.take() == [(head, 23, 11 + len(data), 23, 0)]
    assert rig.ring.readv(head, 11, file, 1 << 32, 100) == len(data)
    rig.ring.scatter(head, 0, b"rread-head!")
    rig.push((head, 0, 0, 11 + len(data)))
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"rread-head!" + data


def test_partial_moves(rig: Rig, file: int) -> None:
    os.write(file, b"0123456789")
    head = rig.driver.submit([message(b"abcdef")], [4, 4, 4], align=16)
    rig.take()
    ring = rig.ring
    assert ring.readv(head, 3, file, 6, 2) == 6  # inside
    assert ring.readv(head, 11, file, 6, 9) == 1  # to the end of both
    assert ring.readv(head, 12, file, 6, 0) == 0  # beyond the stream
    assert ring.readv(head, 1 << 63, file, 6, 0) == 0
    assert ring.readv(head, 0, file, 0, 0) == 0
    assert ring.readv(head, 0, file, 6, 10) == 0  # end of file
    os.lseek(file, 8, os.SEEK_SET)
    assert ring.readv(head, 0, file, 2, -1) == 2  # the file's own position
    assert ring.writev(head, 9, file, 100, 0) == 4
    assert os.pread(file, 20, 0) == b"cdef456789"
    rig.push((head, 0, 0, 12))
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"89\x00234567\x00\x009"


def test_moves_report_errors(rig: Rig, file: int) -> None:
    head = rig.driver.submit([message()])
    rig.take()
    for wrong_head in (head ^ 1, 1 << 31):
        with pytest.raises(OSError, match="Invalid argument"):
            rig.ring.readv(wrong_head, 0, file, 1, 0)
        with pytest.raises(OSError, match="Invalid argument"):
            rig.ring.scatter(wrong_head, 0, b"x")
        with pytest.raises(OSError, match="Invalid argument"):
            rig.ring.gather(wrong_head, 0, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.ring.readv(head, 0, -1, 10, 0)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        rig.ring.readv(head, 0, reader, 10, 0)
    with pytest.raises(BlockingIOError):
        rig.ring.readv(head, 0, reader, 10, -1, os.RWF_NOWAIT)
    assert rig.ring.writev(head, 0, writer, 10, -1) == 7
    assert rig.ring.readv(head, 0, reader, 10, -1) == 7
    os.close(reader)
    os.close(writer)


def test_a_signal_interrupts_a_blocked_move(rig: Rig) -> None:
    head = rig.driver.submit([message()])
    rig.take()
    reader, writer = os.pipe()
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(InterruptedError):
            rig.ring.readv(head, 0, reader, 10, -1)
    finally:
        signal.signal(signal.SIGALRM, old)
        os.close(reader)
        os.close(writer)


def test_more_segments_than_one_system_call_takes(file: int) -> None:
    """A ring of 4096 allows chains beyond IOV_MAX; single bytes, two apart."""
    with closing(Rig(Driver(num=4096, size=16 * MIB))) as rig:
        data = pattern(3000)
        os.write(file, data)
        out = [bytes([b]) for b in message(b"") + data[:1000]]
        head = rig.driver.submit(out, [1] * 3000)
        assert rig.take() == [(head, 1007, 3000, 1007, 0)]
        assert rig.ring.readv(head, 5, file, 3000, 5) == 2995
        assert rig.ring.writev(head, 7, file, 1000, 0) == 1000
        assert rig.ring.gather(head, 7, 1000) == data[:1000]
        rig.push((head, 0, 0, 3000))
        assert rig.driver.guards_intact(head)
        assert rig.driver.reply(head)[5:] == data[5:]


def test_scatter_and_gather(rig: Rig) -> None:
    head = rig.driver.submit([message(b"attribute value")], [3, 5, 7], align=16)
    rig.take()
    ring = rig.ring
    assert ring.gather(head, 7, 15) == b"attribute value"
    assert ring.gather(head, 17, 5) == b"value"
    with pytest.raises(OSError, match="Message too long"):
        ring.gather(head, 7, 16)
    with pytest.raises(OSError, match="Message too long"):
        ring.gather(head, 1 << 60, 1)
    with pytest.raises(OSError, match="Message too long"):
        ring.scatter(head, 1, bytes(15))
    ring.scatter(head, 0, bytearray(b"abcd"))
    ring.scatter(head, 4, memoryview(b"efghijklmno"))
    ring.scatter(head, 15, b"")
    rig.push((head, 0, 0, 15))
    assert rig.driver.guards_intact(head)
    assert rig.driver.reply(head) == b"abcdefghijklmno"


def test_workers_use_their_slots_beside_the_device_thread(rig: Rig, file: int) -> None:
    d, ring = rig.driver, rig.ring
    data = pattern(60_000)
    os.write(file, data)
    heads = [d.submit([message()], [11] + [1000] * 60, indirect=True) for _ in range(8)]
    rig.take()

    def work(head: int) -> None:
        for skip in range(0, 60_000, 997):
            assert ring.readv(head, 11 + skip, file, 997, skip) == min(997, 60_000 - skip)

    threads = [threading.Thread(target=work, args=(head,)) for head in heads]
    for thread in threads:
        thread.start()
    for _ in range(500):
        head = d.submit([message()])
        assert [r[0] for r in rig.take()] == [head]
        rig.push((head, 0, 0, 0))
        d.reply(head)
    for thread in threads:
        thread.join()
    rig.push(*((head, 0, 0, 60_011) for head in heads))
    for head in heads:
        assert d.guards_intact(head)
        assert d.reply(head)[11:] == data


# ---- guest memory ----

QUARTERS = [  # the first three are adjacent to the guest alone
    Region(0x1_0000_0000, 2 * MIB, UA, 0),
    Region(0x1_0020_0000, 2 * MIB, UA + (1 << 40), 4 * MIB),
    Region(0x1_0040_0000, 2 * MIB, UA + (2 << 40), 2 * MIB),
    Region(0xFFFF_FF00_0000_0000, 2 * MIB, UA + (3 << 40), 6 * MIB),
]


# What straddles two regions that touch is sound, and is served.
@pytest.mark.threat("t_desc_oob")
def test_buffers_and_tables_cross_regions_above_4_gib(file: int) -> None:
    with closing(Rig(Driver(regions=QUARTERS))) as rig:
        d = rig.driver
        data = pattern(65536)
        os.write(file, data)
        message_at, edge, high = QUARTERS[1].gpa - 5, QUARTERS[2].gpa, QUARTERS[3].gpa + 100
        d.write(message_at, message(b"edge"))
        entries = [
            encode_desc(message_at, 11, NEXT, 1),
            encode_desc(edge - 30_000, 60_000, WRITE | NEXT, 2),
            encode_desc(high, 5536, WRITE, 0),
        ]
        d.write(edge - 24, b"".join(entries))  # an entry straddles the edge
        d.write_desc(0, edge - 24, 48, INDIRECT, 0)
        d.publish(0)
        assert rig.take() == [(0, 11, 65536, 11, 0)]
        assert rig.header(0, 11) == message(b"edge")
        # The data goes over the table, which was copied.
        assert rig.ring.readv(0, 0, file, 65536, 0) == 65536
        assert d.read(edge - 30_000, 60_000) + d.read(high, 5536) == data


def test_509_regions() -> None:
    page = 4096
    scattered = list(range(509))
    random.Random(9).shuffle(scattered)
    # The ring needs contiguous pages: the first region is big, the others hold a page each.
    first = Region(1 << 40, 64 * page, UA, 0)
    regions = [first] + [
        Region((i + 200) << 33, page, UA + ((i + 1) << 33), (64 + i) * page)
        for i in scattered[:508]
    ]
    with closing(Rig(Driver(size=(64 + 509) * page, regions=regions))) as rig:
        with pytest.raises(OSError, match="No space left"):
            rig.memory.add(1 << 50, page, 1 << 50, 0, rig.driver.fd)
        d = rig.driver
        d.write(regions[1].gpa, message())
        for region in regions[1:]:
            assert hole(rig, (regions[1].gpa, 7, False), (region.gpa + 8, page - 8, True)) == (
                7,
                page - 8,
                7,
                0,
            )
            assert hole(rig, (regions[1].gpa, 7, False), (region.gpa + page, 1, True))[3] == 14
            rig.push(*((head, 0, 0, 0) for head in list(d._chains)))
            for head in list(d._chains):
                d.free(head)
        for region in regions[1:]:
            rig.memory.remove(region.gpa, region.size, region.user_addr)
        assert hole(rig, (regions[5].gpa, 7, False))[3] == errno.EFAULT


def test_regions_are_refused_or_found() -> None:
    with closing(Driver(size=MIB)) as d, closing(GuestMemory()) as memory:
        memory.add(MIB, MIB, UA, 0, d.fd)
        for gpa, ua in [
            (MIB, 0),
            (0x17_F000, 0),
            (0x80001, 0),
            (1 << 40, UA - MIB + 1),
            (1 << 40, UA + MIB - 1),
        ]:
            with pytest.raises(FileExistsError):
                memory.add(gpa, MIB, ua, 0, d.fd)
        top = 1 << 64
        for gpa, size, ua, offset in [
            (1 << 40, 0, 0, 0),
            (top - 4096, 8192, 0, 0),
            (1 << 40, 8192, top - 4096, 0),
            (1 << 40, 4096, 0, top - 4096),
            (1 << 40, 1 << 63, 0, 0),
        ]:
            with pytest.raises(OSError, match="Invalid argument"):
                memory.add(gpa, size, ua, offset, d.fd)
        for size, offset in [(MIB + 1, 0), (MIB, 1), (1, MIB)]:
            with pytest.raises(OSError, match="No such device or address"):
                memory.add(1 << 40, size, 0, offset, d.fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            memory.add(1 << 40, MIB, 0, 0, -1)
        for gpa, size, ua in [(0, MIB, UA), (MIB + 1, MIB, UA), (MIB, MIB - 1, UA), (MIB, MIB, 0)]:
            with pytest.raises(FileNotFoundError):
                memory.remove(gpa, size, ua)
        memory.add(2 * MIB, 4096, UA + MIB, 100, d.fd)  # adjacent; any offset will do
        memory.remove(MIB, MIB, UA)
        memory.add(MIB, MIB, UA, 0, d.fd)
        memory.close()
        memory.add(MIB, MIB, UA, 0, d.fd)


def test_unaligned_offsets_read_the_right_bytes() -> None:
    regions = [Region(0, 4 * MIB, UA, 0), Region(1 << 32, 8096, UA * 2, 4 * MIB + 777)]
    with closing(Rig(Driver(regions=regions))) as rig:
        at = (1 << 32) + 8096 - 20
        rig.driver.write(at, message(b"seven hundred"))
        rig.driver.submit_segments([Segment(at, 20, writable=False)])
        [(head, *_)] = rig.take()
        assert rig.header(head, 20) == message(b"seven hundred")


def test_hugetlb_regions() -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as e:
        pytest.skip(f"no hugetlb memfd: {e}")
    os.ftruncate(fd, 4 * MIB)
    with closing(GuestMemory()) as memory:
        try:
            memory.add(0, MIB, UA, 3 * MIB, fd)
        except OSError as e:
            pytest.skip(f"no huge pages: {e}")
        finally:
            os.close(fd)
        memory.remove(0, MIB, UA)


# ---- truncated guest memory ----


@pytest.mark.threat("t_ram_truncate")
def test_truncated_ring_memory(rig: Rig) -> None:
    device = Device(rig)
    echo(rig)
    os.ftruncate(rig.driver.fd, 0)
    rig.driver.force_kick()
    device.join(5)
    assert "vanished" in str(device.error)


@pytest.mark.threat("t_ram_truncate")
@pytest.mark.parametrize("victim", ["header", "table", "scatter", "gather", "readv", "push"])
def test_truncated_buffers(rig: Rig, file: int, victim: str) -> None:
    """Our own loads and stores hit the hole: the ring breaks, the process lives."""
    d = rig.driver
    at = d.gpa(d.size - 4096)
    here = d.allocate(4096, 16)
    out = at if victim in ("header", "gather") else here
    d.write(out, message(b"value"))
    if victim == "table":
        d.write_desc(0, at, 16, INDIRECT, 0)
        d.publish(0)
    else:
        d.submit_segments([Segment(out, 12, False), Segment(at, 100, True)])
    if victim not in ("header", "table"):
        [(head, *_)] = rig.take()
    os.ftruncate(d.fd, d.size - 4096)
    if victim == "scatter":
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.scatter(head, 0, b"reply")
    elif victim == "gather":
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.gather(head, 7, 5)
    elif victim == "readv":  # here the kernel touches it, and says so
        os.write(file, b"data")
        with pytest.raises(OSError, match="Bad address"):
            rig.ring.readv(head, 0, file, 4, 0)
        return
    elif victim == "push":
        rig.push((head, 0, 50, 50))
    rig.ring.wake()
    for _ in range(2):
        with pytest.raises(RingBroken, match="vanished"):
            rig.take()


def test_a_bus_error_elsewhere_still_kills() -> None:
    """Only guest memory is patched; another mapping's SIGBUS keeps its meaning."""
    script = """
import mmap, os
from ninepd.vring import GuestMemory
fd = os.memfd_create("guest")
os.ftruncate(fd, 8192)
GuestMemory().add(0, 8192, 0, 0, fd)
other = mmap.mmap(fd, 8192)
os.ftruncate(fd, 0)
other[0]
"""
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:handle_sigbus=0")
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert result.returncode == -signal.SIGBUS


# ---- resources ----


def test_no_descriptor_or_mapping_is_left_behind() -> None:
    def once() -> None:
        with closing(Rig()) as rig:
            head = rig.driver.submit([message()])
            rig.take()
            rig.answer(head, b"x")
            with contextlib.suppress(OSError):
                rig.memory.add(0, MIB, 0, 1 << 40, rig.driver.fd)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:guest")

    once()
    before = open_fds(), mappings()
    for _ in range(20):
        once()
    assert (open_fds(), mappings()) == before
