"""What a front end may send as a descriptor; no file that it chooses makes the loop wait."""

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from ninepd import foreign
from ninepd.errors import Refused
from ninepd.vhostuser.messages import (
    LOG_AREA,
    MESSAGE_HEADER,
    REGION,
    UINT64,
    VERSION,
    Header,
    LogArea,
    MemoryRegion,
    Request,
)
from tests.support.client import Client, Daemon
from tests.support.storage import Fuse


@contextmanager
def descriptor(kind: str, folder: Path) -> Iterator[int]:
    with ExitStack() as stack:
        match kind:
            case "eventfd":
                fd = os.eventfd(0)
            case "memfd":
                fd = os.memfd_create("guest")
            case "pipe":
                fd, other = os.pipe()
                stack.callback(os.close, other)
            case "unix":
                one, two = socket.socketpair()
                stack.enter_context(two)
                fd = one.detach()
            case "tcp":
                fd = socket.socket().detach()
            case "shm":
                file, name = tempfile.mkstemp(dir="/dev/shm")
                stack.callback(os.unlink, name)
                fd = file
            case "file":
                fd = os.open(folder, os.O_RDWR | os.O_TMPFILE)
            case "impostor":
                fd = os.open(folder / "anon_inode:[eventfd]", os.O_RDWR | os.O_CREAT)
            case "folder":
                fd = os.open(folder, os.O_RDONLY)
            case _:
                fd = os.open(kind, os.O_RDONLY)
        stack.callback(os.close, fd)
        yield fd


SIGNALS = ("eventfd", "unix")
MEMORY = ("memfd", "shm", "file", "impostor")
OTHERS = ("pipe", "tcp", "folder", "/dev/zero", "/proc/self/maps", "/sys/kernel/notes")


def mount_is_told(folder: Path) -> bool:
    fd = os.open(folder, os.O_PATH)
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
    finally:
        os.close(fd)
    number = about[about.index("mnt_id:") + 1]
    return any(
        line.split()[0] == number for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )


@pytest.mark.parametrize("kind", [*SIGNALS, *MEMORY, *OTHERS])
def test_kinds(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind in {"file", "impostor"} and not mount_is_told(tmp_path):
        if os.geteuid():
            pytest.skip("this is a chroot: the kernel does not tell of the mount that all is on")
        request.getfixturevalue("mount_ext4")(tmp_path / "disk")
        tmp_path /= "disk"

    def allows(check: object) -> bool:
        assert callable(check)
        try:
            check(fd)
        except Refused:
            return False
        return True

    with descriptor(kind, tmp_path) as fd:
        assert allows(foreign.check_signal) == (kind in SIGNALS)
        assert allows(foreign.check_channel) == (kind == "unix")
        assert allows(foreign.check_memory) == (kind in MEMORY)


def test_a_name_cannot_make_lines_of_the_log(tmp_path: Path) -> None:
    with (tmp_path / "two\nlines").open("w") as file, pytest.raises(Refused) as refusal:
        foreign.check_signal(file.fileno())
    assert "\n" not in str(refusal.value)


def test_a_number_is_held() -> None:
    own = os.eventfd(0, os.EFD_NONBLOCK)
    held = foreign.Held(own)
    assert held.number == -1
    event = os.eventfd(0, os.EFD_NONBLOCK)
    held.replace(event)
    number = held.number
    os.eventfd_write(number, 3)
    assert os.eventfd_read(event) == 3
    assert not os.get_inheritable(number)
    held.replace(None)
    assert held.number == -1
    os.eventfd_write(number, 3)  # it is open, and ours
    assert os.eventfd_read(own) == 3
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)
    held.replace(event)
    assert held.number == number
    held.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.eventfd_write(number, 1)
    os.close(event)
    os.close(own)


# A live daemon.


@pytest.fixture
def fuse(tmp_path: Path, as_root: None) -> Iterator[Fuse]:
    with closing(
        Fuse(tmp_path / "fuse", {"/": {"ino": 1, "text": None}, "/f": {"ino": 2, "text": "text"}},
             tmp_path)
    ) as it:  # fmt: skip
        yield it


@pytest.fixture
def dead(fuse: Fuse, client: Client) -> Iterator[Fuse]:
    """It answers again before the daemon is asked to end."""
    yield fuse
    fuse.release()


@pytest.mark.parametrize("held", ["frozen", "flush"])
def test_a_file_of_a_dead_file_system_delays_nothing(held: str, dead: Fuse, client: Client) -> None:
    """Every message is answered: the front end's socket has a limit of ten seconds."""
    front = client.front_end
    fd = os.open(dead.target / "f", os.O_RDWR)
    if held == "frozen":
        dead.freeze()
    else:
        dead.hold("flush", "/f")
    region = MemoryRegion(1 << 40, 4096, 1 << 40, 0)
    for request, payload in (
        (Request.SET_VRING_KICK, UINT64.pack(0)),
        (Request.SET_VRING_CALL, UINT64.pack(0)),
        (Request.SET_VRING_ERR, UINT64.pack(0)),
        (Request.ADD_MEM_REG, REGION.pack(region)),
        (Request.SET_LOG_FD, b""),
        (Request.SET_BACKEND_REQ_FD, b""),
    ):
        assert front.ack(request, payload, [fd]) == 1, request.name
    area = LOG_AREA.pack(LogArea(4096, 0))
    assert front.request(Request.SET_LOG_BASE, area, [fd]) == bytes(16)
    front.send(Request.GET_FEATURES, fds=[fd] * 100)
    front.receive(Request.GET_FEATURES)
    assert front.ack(9999, b"", [fd]) == 1
    front.get(Request.GET_FEATURES)
    client.walk(0, 1)
    dead.release()
    os.close(fd)


def test_what_hangs_at_its_close_holds_up_no_other(
    dead: Fuse, client: Client, daemon: Daemon
) -> None:
    """A second front end is still told that it is refused: its socket is closed aside, too."""
    fd = os.open(dead.target / "f", os.O_RDWR)
    dead.hold("flush", "/f")
    client.front_end.send(Request.GET_FEATURES, fds=[fd])
    client.front_end.receive(Request.GET_FEATURES)
    dead.wait_held("flush", "/f")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second:
        second.settimeout(20)
        second.connect(daemon.socket)
        assert second.recv(1) == b""
    dead.release()
    os.close(fd)


def test_a_socket_that_lingers_delays_nothing(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    with peer:
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        front = client.front_end
        wire = MESSAGE_HEADER.pack(Header(Request.GET_FEATURES, VERSION, 0))
        front.send_bytes(wire[:1], [sock.fileno()])
        sock.close()  # so that the last one is the daemon's
        front.send_bytes(wire[1:])
        front.receive(Request.GET_FEATURES)
        front.get(Request.GET_FEATURES)
        client.walk(0, 1)
