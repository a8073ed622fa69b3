"""``ninepd doctor``: what stands in the way of serving, found out by trying, with what helps."""

from collections.abc import Iterable, Iterator

from ninepd.config import Export
from ninepd.doctor import exports as of_exports
from ninepd.doctor import frontends, host
from ninepd.doctor.finding import Finding, Level
from ninepd.process import raise_file_limit

__all__ = ["Finding", "Level", "examine"]


def examine(
    exports: tuple[Export, ...],
    problems: Iterable[str],
    qemu: str | None,
    qemu_user: str | None,
) -> Iterator[Finding]:
    """Of this host, of QEMU on it, and of each export, as this user; or UsageError.

    ``problems`` are those of a configuration file. Nothing is served, and daemons that run are not
    disturbed.
    """
    file_limit = raise_file_limit()
    yield from host.findings(file_limit)
    yield from frontends.findings(exports, qemu, qemu_user)
    for export in exports:
        yield from of_exports.findings(export, file_limit)
    for problem in problems:
        yield Finding(Level.ERROR, "configuration", problem)
