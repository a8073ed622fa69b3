"""Requests that wait for others, and read only when descriptors have come and gone."""

from pathlib import Path
from typing import Any

import pytest

from ninepd.p9.messages import (
    Rlerror,
    Rread,
    Tclunk,
    Tfsync,
    Tlopen,
    Tread,
    Trename,
    Twalk,
    decode,
    encode,
)
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client

LIMIT = 448
ROUNDS = 60
OTHERS = 150
GATE, LATE, FIRST, HELD = 100, 200, 1000, 2000
PAIRS = 8
O_RDWR = 2


class Batch:
    """Requests that become available with one kick."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heads: list[int] = []

    def add(self, message: Any, data: bytes = b"") -> int:
        """Returns where its reply will stand."""
        request = encode(len(self.heads) + 1, message)
        if data:
            request = (len(request) + len(data)).to_bytes(4, "little") + request[4:]
        pieces = [piece for piece in (request, data) if piece]
        self.heads.append(self.client.driver.submit(pieces, [4096]))
        return len(self.heads) - 1

    def run(self) -> list[bytes]:
        driver = self.client.driver
        driver.kick()
        used = dict(driver.wait_used(30, len(self.heads)))
        return [driver.reply(head, used[head]) for head in self.heads]


@pytest.mark.usefixtures("as_root")
def test_a_read_that_waited_for_its_open_reads_that_file(
    start_daemon: StartDaemon, export: Path
) -> None:
    """Its descriptor is not reclaimed, nor its number used again, before it is done."""
    files = [b"f%04d" % number for number in range(1000)]
    for name in files:
        (export / name.decode()).write_bytes(name * 100)
    for gate in range(PAIRS):
        (export / f"gate{gate}").touch()
    daemon = start_daemon("--reclaim", "handles", launcher=("prlimit", f"--nofile={LIMIT}"))
    reads = 0
    with Client(daemon.socket, num=1024, memory=32 << 20) as client:
        client.attach()
        for pair in range(PAIRS):
            client.open(ROOT, GATE + pair, b"gate%d" % pair, flags=O_RDWR)
        for fid in range(OTHERS):
            client.open(ROOT, HELD + fid, files[-1 - fid])
        for number in range(ROUNDS):
            names = [files[(number * PAIRS + pair) % 1000] for pair in range(PAIRS)]
            for pair, name in enumerate(names):
                client.walk(ROOT, LATE + pair, name)
            batch = Batch(client)
            mine = {}
            for pair, name in enumerate(names):
                batch.add(Tfsync(GATE + pair, 0))
                batch.add(Trename(GATE + pair, LATE + pair, b"x"))  # holds LATE until GATE is done
                batch.add(Tlopen(LATE + pair, 0))
                mine[batch.add(Tread(LATE + pair, 0, 500))] = name
            for other in range(OTHERS):
                fid = FIRST + other
                batch.add(Tclunk(fid))
                batch.add(Twalk(ROOT, fid, (files[(number * OTHERS + other) % 1000],)))
                batch.add(Tlopen(fid, 0))
                if other % 5 == 0:
                    client.driver.kick()
            replies = batch.run()
            for read, name in mine.items():
                _, reply = decode(replies[read])
                if isinstance(reply, Rread):
                    assert replies[read][11:] == name * 100, number
                    reads += 1
                else:
                    assert isinstance(reply, Rlerror)
            for pair in range(PAIRS):
                client.clunk(LATE + pair)
    assert reads > ROUNDS * PAIRS // 2
