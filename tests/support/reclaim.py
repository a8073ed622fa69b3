"""A daemon that has fewer descriptors than its guest has files.

A module of tests that wants the fixture names it: ``start = reclaim.start``.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon

LIMIT = 256
PRLIMIT = ("prlimit", f"--nofile={LIMIT}")
FILES = 2000
BY_NAME = ("--reclaim", "names")
O_RDWR = 2

Start = Callable[..., tuple[Daemon, Client]]


@pytest.fixture
def start(start_daemon: StartDaemon) -> Iterator[Start]:
    """A daemon that may have 256 descriptors, and a client attached to it."""
    clients = []

    def run(*arguments: str, **keywords: str) -> tuple[Daemon, Client]:
        daemon = start_daemon(*arguments, launcher=PRLIMIT, **keywords)
        client = Client(daemon.socket)
        clients.append(client)
        client.attach()
        return daemon, client

    yield run
    for client in clients:
        client.close()


def make_files(export: Path, count: int = FILES) -> list[bytes]:
    """``count`` files in ten directories; each holds its own path."""
    names = []
    for number in range(count):
        directory = export / f"d{number % 10}"
        directory.mkdir(exist_ok=True)
        path = directory / f"f{number}"
        path.write_text(str(path.relative_to(export)))
        names.append(os.fsencode(path.relative_to(export)))
    return names


def walk_all(client: Client, names: list[bytes], first: int = 1) -> None:
    for fid, name in enumerate(names, first):
        client.walk(ROOT, fid, *name.split(b"/"))
