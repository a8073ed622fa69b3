"""What the mount options of Linux's 9P client gain and cost: the tables of docs/linux-client.md.

All mounts of a table take turns in one guest, several rounds of them; figures are the rates of a
mount against those of the table's first one in the same round.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Final

from ninepd_guests.boot import Share, boot_qemu, boot_uml
from ninepd_guests.cache import say
from ninepd_guests.errors import GuestError
from ninepd_guests.kernels import SERIES
from ninepd_guests.machine import Guest

from . import guests
from .figures import Sample, Samples, Spread, ratio, table
from .guests import MSIZE, UNPACK, WORKLOADS, Side, mount_9p, socket_path
from .setting import PLANS, Setting, export, guest_tree, setting
from .uml import host_programs, keep_on_one_cpu

TAG: Final = "options"
UML: Final = "uml"
DEFAULT_MSIZE: Final = 131_096
"""Linux's own."""
_STEADY: Final = 0.25
"""A figure whose quartiles are farther away than this part of it is given with them."""


@dataclass(frozen=True)
class Mount:
    cache: str
    options: str = ""
    msize: int = MSIZE

    def side(self, name: str) -> Side:
        return Side(name, mount_9p(TAG, self.cache, self.msize, self.options))


@dataclass(frozen=True)
class Table:
    """Mounts by their names in it; the first is what the others are compared with."""

    title: str
    mounts: dict[str, Mount]
    works: tuple[str, ...]
    programs: bool = False
    """Also with the host's git and C compiler, where the guest has them."""
    needs: str = ""
    """An option without which the table says nothing; old kernels ignore what they don't know."""


TABLES: Final = (
    Table(
        f"Cache modes and `noxattr`, with msize={MSIZE}",
        {
            "cache=none": Mount("none"),
            "cache=none,noxattr": Mount("none", "noxattr"),
            "cache=readahead": Mount("readahead"),
            "cache=mmap": Mount("mmap"),
            "cache=mmap,noxattr": Mount("mmap", "noxattr"),
            "cache=loose": Mount("loose"),
            "cache=loose,noxattr": Mount("loose", "noxattr"),
        },
        (*WORKLOADS, "missing", UNPACK),
        programs=True,
    ),
    Table(
        "`msize`, with cache=mmap",
        {
            f"msize={DEFAULT_MSIZE}": Mount("mmap", msize=DEFAULT_MSIZE),
            "msize=8192": Mount("mmap", msize=8192),
            f"msize={MSIZE}": Mount("mmap"),
        },
        ("read", "write", "readdir", "pread-4k", UNPACK),
    ),
    Table(
        "`negtimeout`, with cache=loose (whose own is 24 hours)",
        {
            "negtimeout=0": Mount("loose", "negtimeout=0"),
            "negtimeout=1000": Mount("loose", "negtimeout=1000"),
            "the default": Mount("loose"),
        },
        ("missing", "stat", "files"),
        programs=True,
        needs="negtimeout",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mount_options", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, default="quick", help="how much to do")
    parser.add_argument("--guest", choices=(UML, *SERIES), default=UML, help="or QEMU (TCG)")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: the plan's")
    chosen = parser.parse_args()
    plan = PLANS[chosen.plan]
    rounds = chosen.rounds or (plan.uml_rounds if chosen.guest == UML else plan.qemu_rounds)
    plan = replace(plan, rounds=rounds)
    with setting(plan) as place, booted(place, chosen.guest) as guest:
        kernel = guest.run("uname -r").text.strip()
        lines = [f"Linux {kernel} in {'User-Mode Linux' if chosen.guest == UML else 'QEMU'}"]
        lines.append(f"{rounds} rounds; above 1 is faster than the first column.")
        programs = host_programs(place, guest) if chosen.guest == UML else []
        for wanted in TABLES:
            if not understood(guest, wanted):
                place.skip(f"this kernel does not know {wanted.needs}")
                continue
            say(f"bench: {wanted.title}")
            samples = Samples(measure(place, guest, wanted, programs if wanted.programs else []))
            lines += ["", f"{wanted.title}:", "", render(samples, list(wanted.mounts))]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


@contextlib.contextmanager
def booted(place: Setting, kind: str) -> Iterator[Guest]:
    """A guest and a daemon; in User-Mode Linux both on one CPU, as in uml.py."""
    plan = place.plan
    tree = guest_tree(os.path.join(place.memory, "guest"), plan.files, plan.guest_mib)
    path = socket_path(place, TAG)
    shares = [Share(TAG, path)]
    with export(tree, path, tag=TAG) as server:
        if kind != UML:
            with boot_qemu(shares, kernel=kind, memory="1G") as guest:
                yield guest
            return
        with boot_uml(shares, memory="768M") as guest:
            for process in (guest.pid, server.pid):
                keep_on_one_cpu(process)
            yield guest


def understood(guest: Guest, wanted: Table) -> bool:
    first, *_ = wanted.mounts.values()
    first.side("").mount(guest)
    seen = guest.run(f"grep ' {guests.PLACE} ' /proc/mounts").text
    guest.umount(guests.PLACE)
    return wanted.needs in seen


def measure(place: Setting, guest: Guest, wanted: Table, programs: Sequence[str]) -> list[Sample]:
    sides = [mount.side(name) for name, mount in wanted.mounts.items()]
    samples: list[Sample] = []
    for turn in range(place.plan.rounds):
        samples += guests.take_turns(place, guest, sides, turn, programs, wanted.works)
    return samples


def render(samples: Samples, names: Sequence[str]) -> str:
    first, *others = names
    rows = []
    for what in samples.names("what"):
        base = samples.where(who=first, what=what)
        found = [ratio(samples.where(who=name, what=what), base) for name in others]
        rows.append([what, "1", *map(cell, found)])
    return table(["", *(f"`{name}`" for name in names)], rows)


def cell(found: Spread | None) -> str | None:
    """Two digits: more would be noise."""
    if found is None:
        return None
    low, median, high = (f"{float(f'{value:.2g}'):g}" for value in astuple(found))
    wide = max(found.high - found.median, found.median - found.low) / found.median
    return f"{median} ({low} to {high})" if wide > _STEADY else median


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuestError as error:
        sys.exit(f"bench: {error}")
