"""QEMU without hardware help (TCG): ninepd, QEMU's built-in 9p server and virtiofsd."""

import contextlib
import os
from typing import Final

from ninepd_guests.boot import Share, Virtfs, boot_qemu
from ninepd_guests.errors import GuestError
from ninepd_guests.machine import Guest

from . import guests
from .figures import Sample, Samples, Section
from .guests import Side, mount_9p, mount_other, socket_path
from .setting import Setting, export, guest_tree, virtiofs_modules, virtiofsd

KERNEL: Final = "7.2"
NONE, ASLEEP, LOOSE = "ninepd none", "ninepd none, asleep", "ninepd loose"
PEER_NONE, PEER_LOOSE = "virtfs none", "virtfs loose"
NEVER, AUTO = "virtiofsd never", "virtiofsd auto"
PAIRS: Final = ((NONE, PEER_NONE), (LOOSE, PEER_LOOSE))
"""Like cache modes: those that are compared."""
VIRTIOFS_PAIRS: Final = ((NONE, NEVER), (LOOSE, AUTO))


def measure(setting: Setting) -> list[Sample]:
    plan = setting.plan
    if not plan.qemu_rounds:
        return []
    tree = guest_tree(os.path.join(setting.memory, "guest"), plan.files, plan.guest_mib)
    samples: list[Sample] = []
    for turn in range(plan.qemu_rounds):
        # A boot for each round: how a guest's memory lies is a part of the noise.
        with contextlib.ExitStack() as stack:
            samples += _boot(setting, stack, tree, turn)
    return samples


def _boot(setting: Setting, stack: contextlib.ExitStack, tree: str, turn: int) -> list[Sample]:
    path, asleep = socket_path(setting, "ninepd"), socket_path(setting, "asleep")
    stack.enter_context(export(tree, path))
    stack.enter_context(export(tree, asleep, "--poll-us", "0", tag="asleep"))
    sides = [
        Side(NONE, mount_9p("bench", "none")),
        Side(ASLEEP, mount_9p("asleep", "none")),
        Side(PEER_NONE, mount_9p("peer", "none")),
        Side(LOOSE, mount_9p("bench", "loose")),
        Side(PEER_LOOSE, mount_9p("peer", "loose")),
    ]
    modules, devices, more = _virtiofs(setting, stack, tree)
    guest = stack.enter_context(
        boot_qemu([Share("bench", path), Share("asleep", asleep)], kernel=KERNEL,
                  virtfs=[Virtfs("peer", tree)], extra_args=devices)
    )  # fmt: skip
    if more and _load(setting, guest, modules, tree):
        sides += more
    return guests.take_turns(setting, guest, sides, turn)


def _virtiofs(
    setting: Setting, stack: contextlib.ExitStack, tree: str
) -> tuple[list[str], list[str], list[Side]]:
    devices, sides = [], []
    try:
        modules = virtiofs_modules(KERNEL)
        for side, cache in ((NEVER, "never"), (AUTO, "auto")):
            path = socket_path(setting, f"virtiofs-{cache}")
            stack.enter_context(virtiofsd(tree, path, cache, cache))
            devices += ["-chardev", f"socket,id={cache},path={path}"]
            devices += ["-device", f"vhost-user-fs-pci,chardev={cache},tag={cache}"]
            sides.append(Side(side, mount_other("virtiofs", cache)))
    except GuestError as error:
        setting.skip(f"virtiofsd in QEMU: {error}")
        return [], [], []
    return modules, devices, sides


def _load(setting: Setting, guest: Guest, modules: list[str], tree: str) -> bool:
    """Bring the modules into the guest by the share."""
    for module in modules:
        name = f"module-{os.path.basename(module)}"
        with open(module, "rb") as source, open(os.path.join(tree, name), "wb") as copy:
            copy.write(source.read())
    names = " ".join(f"/mnt/module-{os.path.basename(module)}" for module in modules)
    guest.mount("bench", "/mnt")
    loaded = guest.run(f"for m in {names}; do insmod $m || exit 1; done", check=False)
    guest.umount("/mnt")
    if loaded.status:
        setting.skip(f"virtiofsd in QEMU: its modules do not load: {loaded.text.strip()}")
    return not loaded.status


def report(all_samples: list[Sample]) -> list[Section]:
    samples = Samples(all_samples)
    section = Section(f"QEMU TCG, Linux {KERNEL}")
    section.text.append(
        f"9P with msize {guests.MSIZE}; all sides in one guest, taking turns; "
        "*asleep*: the daemon does not spin (`--poll-us 0`)."
    )
    guests.describe(section, samples, "qemu.svg")
    ratios = guests.compare(section, samples, [*PAIRS, (ASLEEP, PEER_NONE), *VIRTIOFS_PAIRS])
    for pair in PAIRS:
        name = f"QEMU: {' / '.join(pair)}"
        section.targets.append(guests.least_target(name, 1, ratios.get(pair, [])))
        section.targets.append(guests.mean_target(name, 1.25, ratios.get(pair, [])))
    for pair in VIRTIOFS_PAIRS:
        name = f"QEMU: {' / '.join(pair)}"
        section.targets.append(guests.mean_target(name, 1, ratios.get(pair, [])))
    return [section]
