"""A guest at nearly native speed: user-mode Linux, beside its hostfs and virtiofsd."""

import contextlib
import os
import shutil
from typing import Final

from ninepd_guests.boot import Share, boot_uml
from ninepd_guests.errors import GuestError
from ninepd_guests.machine import Guest

from . import guests
from .figures import (
    Sample,
    Samples,
    Section,
    Target,
    microseconds,
    middle,
    per_second,
    ratio,
    table,
)
from .guests import Side, mount_9p, mount_other, socket_path
from .ring import PING_PONG, bare
from .setting import Setting, export, guest_tree, virtiofsd

NONE, ASLEEP, SPREAD = "none", "none, asleep", "none, all CPUs"
MMAP, LOOSE = "mmap", "loose"
HOSTFS, NEVER, AUTO = "hostfs", "virtiofsd never", "virtiofsd auto"
_VIRTIO_FS: Final = 26
_HOST: Final = "/host"  # the host's root in the guest, for its programs


def measure(setting: Setting) -> list[Sample]:
    plan = setting.plan
    if not plan.uml_rounds:
        return []
    tree = guest_tree(os.path.join(setting.memory, "guest"), plan.files, plan.guest_mib)
    samples: list[Sample] = []
    with contextlib.ExitStack() as stack:
        awake, asleep = socket_path(setting, "awake"), socket_path(setting, "asleep")
        spread = socket_path(setting, "spread")
        servers = [
            stack.enter_context(export(tree, awake, tag="awake")).pid,
            stack.enter_context(export(tree, asleep, "--poll-us", "0", tag="asleep")).pid,
        ]
        stack.enter_context(export(tree, spread, tag="spread"))
        sides = [
            Side(NONE, mount_9p("awake", "none")),
            Side(ASLEEP, mount_9p("asleep", "none")),
            Side(SPREAD, mount_9p("spread", "none")),
            Side(MMAP, mount_9p("awake", "mmap")),
            Side(LOOSE, mount_9p("awake", "loose")),
            Side(HOSTFS, mount_other("hostfs", "none", tree)),
        ]
        extra: list[str] = []
        if virtio_fs := _virtiofs(setting, stack, tree):
            extra, more, processes = virtio_fs
            sides += more
            servers += processes
        shares = [Share("awake", awake), Share("asleep", asleep), Share("spread", spread)]
        with boot_uml(shares, memory="768M", extra_args=extra) as guest:
            for process in (guest.pid, *servers):
                keep_on_one_cpu(process)
            works = host_programs(setting, guest)
            for turn in range(plan.uml_rounds):
                trip = bare(PING_PONG, tree, 1, plan.ms)
                samples.append({"who": "host", "what": PING_PONG, "round": turn, **trip})
                samples += guests.take_turns(setting, guest, sides, turn, works)
    return samples


def keep_on_one_cpu(pid: int) -> None:
    """A system call in user-mode Linux is a switch between two of its processes, and a request one
    between guest and server: across CPUs that takes ten times as long, and varies as much.
    """
    cpu = min(os.sched_getaffinity(0))
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), {cpu})


def _virtiofs(
    setting: Setting, stack: contextlib.ExitStack, tree: str
) -> tuple[list[str], list[Side], list[int]] | None:
    """Devices, sides and servers, if the kernel can; a first boot tells."""
    with boot_uml() as guest:
        known = "virtiofs" in guest.run("cat /proc/filesystems").text
    if not known:
        setting.skip("virtiofsd in UML: the UML kernel lacks CONFIG_VIRTIO_FS")
        return None
    devices, sides, servers = [], [], []
    try:
        for number, (side, cache) in enumerate(((NEVER, "never"), (AUTO, "auto"))):
            path = socket_path(setting, f"virtiofs-{cache}")
            servers.append(stack.enter_context(virtiofsd(tree, path, cache, cache)))
            devices.append(f"virtio_uml.device={path}:{_VIRTIO_FS}:{10 + number}")
            sides.append(Side(side, mount_other("virtiofs", cache)))
    except GuestError as error:
        setting.skip(f"virtiofsd in UML: {error}")
        return None
    return devices, sides, servers


def host_programs(setting: Setting, guest: Guest) -> list[str]:
    """Workloads that run the host's own programs, in a view of the host's root."""
    inside = f"{_HOST}/mnt"
    if not os.path.isdir("/mnt"):
        return []
    guest.run(f"mkdir -p {_HOST} && mount -t hostfs none {_HOST} -o /")
    works = []
    bind = f"mount --bind {guests.PLACE} {inside} && trap 'umount {inside}' EXIT && chroot {_HOST}"
    if shutil.which("git"):
        works.append(f"git-status={bind} git -C /mnt/repository status --porcelain")
    # By its path: busybox would take `sh` for itself.
    if setting.plan.build and shutil.which("gcc"):
        works.append(f"c-build={bind} /bin/sh -c 'cd /mnt/build && gcc -O1 -pipe -c *.c'")
    return works


def report(all_samples: list[Sample]) -> list[Section]:
    samples = Samples(all_samples)
    trips = samples.where(what=PING_PONG)
    works = Samples(sample for sample in samples.all if sample["what"] != PING_PONG)
    trip = trips.median(microseconds)
    section = Section("User-Mode Linux, 9P cache modes, hostfs and virtiofsd")
    section.text.append(
        f"9P with msize {guests.MSIZE}; *{ASLEEP}*: the daemon does not spin (`--poll-us 0`). "
        f"Guest and servers are kept on one CPU, but not the server of *{SPREAD}*. An "
        "eventfd ping-pong between two CPUs of the host took "
        f"{trips.spread(microseconds)} µs in the same rounds."
    )
    guests.describe(section, works, "uml.svg")
    ratios = guests.compare(
        section,
        works,
        [(NONE, HOSTFS), (LOOSE, HOSTFS), (NONE, NEVER), (LOOSE, AUTO)],
    )
    rows = []
    for who, limit in ((NONE, 0.85), (ASLEEP, 1.6), (SPREAD, None)):
        for what in ("pread-4k", "pwrite-4k"):
            found = works.where(who=who, what=what)
            against = ratio(found, trips, microseconds)
            rows.append([f"{what}, {who}", found.spread(microseconds), against])
            if what == "pread-4k" and limit is not None:
                name = f"UML, {who}: 4 KiB pread x ping-pong"
                section.targets.append(Target.at_most(name, limit, middle(against)))
    section.text += ["Round trips.", table(["", "µs", "x ping-pong"], rows)]
    for what, limit in (("stat", 3800), ("create-write", 2300), ("open-read-close", 2500)):
        # The wanted rates are those of a host whose ping-pong takes 48 us.
        scaled = limit * 48 / trip if trip else float(limit)
        rate = works.where(who=NONE, what=what).median(per_second)
        section.targets.append(
            Target.at_least(f"UML, none: {what}/s, scaled to ping-pong", round(scaled), rate)
        )
    for pair in ((NONE, NEVER), (LOOSE, AUTO)):
        found_ratios = ratios.get(pair, [])
        section.targets.append(guests.mean_target(f"UML: {' / '.join(pair)}", 1, found_ratios))
    return [section]
