"""Booted guests: one of each kind for all the tests that only mount and unmount in it."""

from collections.abc import Iterator

import pytest

from tests.support.guest import Place, Station

FRONT_ENDS = ("uml", "qemu-7.2", "qemu-6.12")


@pytest.fixture(scope="session", params=FRONT_ENDS)
def front(request: pytest.FixtureRequest) -> str:
    """What carries the guest. Choose others by an indirect parametrize."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def station(front: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    station = Station(front, tmp_path_factory.mktemp("guest"))
    yield station
    station.close()


@pytest.fixture
def place(station: Station) -> Iterator[Place]:
    """A directory on a mount with the default options, for this test alone."""
    with station.mounted() as place:
        yield place
