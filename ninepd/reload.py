"""The configuration file is read again: what becomes of which export.

A guest keeps what it uses until it disconnects: QEMU cannot go on without its back end, and to a
guest an export with other options is another file system.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from ninepd.activation import Activated
from ninepd.config import Config, Export

Read = Callable[[Sequence[Activated]], Config]
"""Reads the file, for exports with these sockets of systemd's, by their tags; or UsageError."""


@dataclass
class Plan:
    """What has to be done."""

    removed: list[str] = field(default_factory=list)
    """Tags of exports that the file does not have any more."""
    changed: list[tuple[int, Export]] = field(default_factory=list)
    """Exports with other options, and their numbers in the file."""
    added: list[tuple[int, Export]] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    """Options of the daemon that are others now."""


def compare(before: Config, served: Mapping[str, Export], wanted: Config) -> Plan:
    """``served``: the exports that there are, by their tags."""
    plan = Plan()
    tags = {export.tag for export in wanted.exports}
    plan.removed = [tag for tag in served if tag not in tags]
    for number, export in enumerate(wanted.exports, 1):
        if export.tag not in served:
            plan.added.append((number, export))
        elif export != served[export.tag]:
            plan.changed.append((number, export))
    for option in fields(Config):
        name = option.name
        if name not in {"exports", "placed"} and getattr(before, name) != getattr(wanted, name):
            plan.settings.append(name.replace("_", "-"))
    return plan


def sockets(exports: Iterable[Export]) -> list[Activated]:
    """Those that were handed over, for exports that have no other."""
    return [Activated(export.tag, export.fd) for export in exports if export.fd is not None]
