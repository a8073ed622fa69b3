"""Guest memory in which the computer has found an uncorrectable error.

The kernel tells whoever touches it by SIGBUS, as for a file that was cut, but with another code.
"""

import ctypes
import os
import signal
import struct
import threading
from pathlib import Path

import pytest

from ninepd.errors import RingBroken
from ninepd.p9.messages import Tgetattr, encode
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client
from tests.support.driver import Segment
from tests.support.vring_rig import Rig, message, started_rig

BUS_MCEERR_AR, MADV_HWPOISON = 4, 100
RT_TGSIGQUEUEINFO = {"x86_64": 297, "aarch64": 240}
PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)

rig = pytest.fixture(started_rig)


def address_of(memory: object) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))  # type: ignore[arg-type]


def mapping_of(rig: Rig) -> int:
    """Where the device has the guest's memory, beside the driver's own mapping of it."""
    inode = os.fstat(rig.driver.fd).st_ino
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    starts = {int(line[0].split("-")[0], 16) for line in lines if int(line[4]) == inode}
    (found,) = starts - {address_of(rig.driver.ram)}
    return found


def report_error_at(address: int) -> None:
    """To this thread, as the kernel does (sigaction(2), asm-generic/siginfo.h)."""
    number = RT_TGSIGQUEUEINFO.get(os.uname().machine)
    if number is None:
        pytest.skip("no number of rt_tgsigqueueinfo(2) for this machine")
    info = struct.pack("=iiiiQ", signal.SIGBUS, 0, BUS_MCEERR_AR, 0, address).ljust(128, b"\0")
    thread = threading.get_native_id()
    assert _libc.syscall(number, os.getpid(), thread, signal.SIGBUS, info) == 0


@pytest.mark.threat("t_ram_poison")
@pytest.mark.parametrize("what", ["buffer", "ring"])
def test_the_ring_stops_and_says_why(rig: Rig, what: str) -> None:
    """The page is given up, and the process lives."""
    d = rig.driver
    at = d.gpa(d.size - PAGE)
    d.write(at, message(b"value"))
    d.submit_segments([Segment(at, 12, False), Segment(d.allocate(100), 100, True)])
    [(head, *_)] = rig.take()
    assert rig.ring.gather(head, 7, 5) == b"value"
    report_error_at(mapping_of(rig) + (d.size - PAGE if what == "buffer" else d.avail))
    with pytest.raises(OSError, match="Bad address"):
        rig.ring.gather(head, 7, 5)
    rig.ring.wake()
    for _ in range(2):
        with pytest.raises(RingBroken, match="uncorrectable error of this computer's memory"):
            rig.take()
    assert d.read(at, 12) == message(b"value"), "the driver's mapping is no matter of ours"


def poison(client: Client, offset: int) -> None:
    """For good: the kernel uses that page no more. The client must not touch it, either."""
    if os.environ.get("NINEPD_POISON") != "1":
        pytest.skip("takes a page of this computer out of use until it boots: NINEPD_POISON=1")
    page = ctypes.c_void_p(address_of(client.driver.ram) + offset)
    if _libc.madvise(page, ctypes.c_size_t(PAGE), MADV_HWPOISON):
        why = os.strerror(ctypes.get_errno())
        pytest.skip(f"MADV_HWPOISON: {why} (it needs CAP_SYS_ADMIN and CONFIG_MEMORY_FAILURE)")


@pytest.mark.threat("t_ram_poison")
def test_an_error_stops_one_device(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Its daemon and another export's go on, and one line says what has happened."""
    sockets = [tmp_path / "bad.sock", tmp_path / "good.sock"]
    tables = []
    for sock in sockets:
        (tmp_path / sock.stem).mkdir()
        tables.append(
            f'[[export]]\nexport = "{tmp_path / sock.stem}"\ntag = "{sock.stem}"\n'
            f'socket-path = "{sock}"\n'
        )
    config = tmp_path / "ninepd.toml"
    config.write_text("".join(tables))
    daemon = start_daemon(config=str(config))
    with Client(str(sockets[1])) as good:
        good.attach()
        with Client(str(sockets[0])) as bad:
            bad.attach()
            bad.driver.submit([encode(1, Tgetattr(ROOT, 0))], [4096])
            poison(bad, bad.driver.heap)
            bad.driver.force_kick()
            assert not bad.driver.called(0.5), "it was answered"
            good.getattr(ROOT)
        with Client(str(sockets[0])) as again:
            again.attach()
            again.getattr(ROOT)
        good.getattr(ROOT)
    assert daemon.stop() == 0
    (line,) = daemon.log.splitlines()
    assert "uncorrectable error of this computer's memory" in line
