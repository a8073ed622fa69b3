"""The QEMU side: the exact arguments that put a guest in front of ninepd."""

import os
import re
from collections.abc import Sequence
from typing import Final

from ninepd.config import check_socket_path, check_tag
from ninepd.errors import UsageError

OLDEST: Final = (10, 2)
"""The version in which users may create the generic device."""
DEVICE: Final = "vhost-user-test-device"
"""Its name on virtio-mmio; on PCI it ends in -pci."""
QUEUE_SIZE: Final = 128
"""Descriptors in the ring: what the Linux driver uses for one request (trans_virtio.c)."""
_BUS_SUFFIX: Final = {"q35": "-pci", "pc": "-pci", "virt": "-pci", "microvm": ""}
_VERSIONED: Final = {"pc-q35-": "q35", "pc-i440fx-": "pc", "virt-": "virt"}
"""Machine types of a QEMU version, such as pc-q35-10.2, and what they are."""
_MEMORY: Final = re.compile(r"\d+(\.\d+)?[BKMGTPE]?", re.ASCII | re.IGNORECASE)


def _escape(value: str) -> str:
    return value.replace(",", ",,")


def memory_arguments(memory: str, machine: str) -> list[str]:
    """Guest memory that ninepd can map: without share=on it would read zeros.

    UsageError for a size that QEMU would not understand.
    """
    if not _MEMORY.fullmatch(memory):
        raise UsageError(f"--memory: {memory!r} is no size; write 4G, or 4096 for MiB")
    if memory[-1].isdigit():
        memory += "M"  # as -m reads it; for memory-backend-memfd these would be bytes
    return [
        "-machine",
        f"{machine},memory-backend=mem",
        "-m",
        memory,
        "-object",
        f"memory-backend-memfd,id=mem,size={memory},share=on",
    ]


def device_arguments(socket_path: str, tag: str, index: int = 0, machine: str = "q35") -> list[str]:
    """One export as a device. Needs QEMU 10.2, where the generic device can be created by users.

    UsageError for a tag, a path or a machine that cannot be.
    """
    check_tag(tag)
    check_socket_path(socket_path)
    bus_suffix = _BUS_SUFFIX[_machine_type(machine)]
    device = DEVICE + bus_suffix
    chardev = f"socket,id=ninepd{index},path={_escape(socket_path)}"
    device += f",chardev=ninepd{index},virtio-id=9,num_vqs=1,vq_size={QUEUE_SIZE}"
    device += f",config_size={2 + len(os.fsencode(tag))}"
    arguments = ["-chardev", chardev, "-device", device]
    if not bus_suffix and index == 0:
        # Else the guest sees a legacy device, without VERSION_1 (hw/virtio/virtio-mmio.c).
        arguments += ["-global", "virtio-mmio.force-legacy=false"]
    return arguments


def arguments(
    exports: Sequence[tuple[str, str]], memory: str = "1G", machine: str = "q35"
) -> list[str]:
    """All of it, for (socket path, tag) pairs. UsageError for a machine that is not known."""
    result = memory_arguments(memory, machine)
    for index, (socket_path, tag) in enumerate(exports):
        result += device_arguments(socket_path, tag, index, machine)
    return result


def _machine_type(machine: str) -> str:
    name = machine.split(",", 1)[0]
    for prefix, kind in _VERSIONED.items():
        if name.startswith(prefix):
            return kind
    if name not in _BUS_SUFFIX:
        raise UsageError(f"--machine: {name!r} is unknown; use one of {', '.join(_BUS_SUFFIX)}")
    return name
