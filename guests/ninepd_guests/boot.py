"""Command lines that boot a guest: QEMU with Debian's kernels, and user-mode Linux."""

import os
import re
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from ninepd.qemu import device_arguments, memory_arguments

from . import kernels
from .channel import Channel
from .errors import GuestError
from .host import HostProgram
from .image import initramfs
from .machine import BOOT_LIMIT, Guest
from .qmp import Qmp
from .tools import agent, busybox, qemu
from .uml import uml_kernel

VIRTIO_9P = 9
# A terminal of user-mode Linux that was ever throttled, at nearly 4096 bytes, stays deaf.
UML_WINDOW = 2048
# After these QEMU stays, with a guest that runs no more: accel/kvm/kvm-all.c, kvm_cpu_exec.
KVM_LAST_WORDS = (b"KVM internal error", b"error: kvm run failed")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check random.trust_cpu=on "
    "agent=/dev/vport*p1"
)


@dataclass(frozen=True)
class Share:
    """A ninepd socket that listens already."""

    tag: str
    socket: str


@dataclass(frozen=True)
class Virtfs:
    """A folder behind QEMU's built-in 9p server, to compare with."""

    tag: str
    path: str
    security_model: str = "passthrough"


def _virtfs_arguments(shares: Sequence[Virtfs], suffix: str) -> list[str]:
    arguments = []
    for number, share in enumerate(shares):
        fsdev = (
            f"local,id=virtfs{number},path={_escape(share.path)},"
            f"security_model={share.security_model},multidevs=remap"
        )
        device = f"virtio-9p{suffix or '-device'},fsdev=virtfs{number},mount_tag={share.tag}"
        arguments += ["-fsdev", fsdev, "-device", device]
    return arguments


def _clock(machine: str, accel: str) -> list[str]:
    """A microvm's only reference clock is the PIT, too coarse on a busy host: the guest, left
    without ticks, hangs. TCG's time stamp counter is the host's, so its rate can be told.
    """
    if not machine.startswith("microvm") or not accel.startswith("tcg"):
        return []
    with open("/proc/cpuinfo") as info:
        rate = re.search(r"^cpu MHz\s*: ([\d.]+)", info.read(), re.MULTILINE)
    return [f"tsc_early_khz={float(rate[1]) * 1000:.0f}"] if rate else []


def _escape(value: str) -> str:
    return value.replace(",", ",,")


def boot_qemu(
    shares: Sequence[Share] = (),
    *,
    kernel: str = kernels.SERIES[-1],
    machine: str = "q35",
    memory: str = "512M",
    accel: str = "tcg",
    virtfs: Sequence[Virtfs] = (),
    readconfig: str | None = None,
    extra_args: Sequence[str] = (),
    append: str = "",
    timeout: float = BOOT_LIMIT,
) -> Guest:
    """A guest that has come up. ``readconfig`` stands for the machine, memory and shares."""
    program = qemu()
    linux = kernels.kernel(kernel)
    suffix = "" if machine.startswith("microvm") else "-pci"
    arguments = [
        *program.command, "-nodefaults", "-no-user-config", "-display", "none", "-smp", "1",
        "-accel", accel, "-cpu", "max", "-action", "reboot=shutdown",
    ]  # fmt: skip
    if readconfig is not None:
        arguments += ["-readconfig", readconfig]
    else:
        arguments += [
            *memory_arguments(memory, machine),
            "-global", "virtio-mmio.force-legacy=false",
            *(word for number, share in enumerate(shares)
              for word in device_arguments(share.socket, share.tag, number, machine)),
        ]  # fmt: skip
    arguments += [
        *_virtfs_arguments(virtfs, suffix),
        "-kernel", linux.image, "-initrd", initramfs(agent(), busybox(), linux.modules),
        "-append", " ".join([KERNEL_ARGUMENTS, *_clock(machine, accel), append]),
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-device", f"virtio-serial{suffix or '-device'},max_ports=2",
        "-device", "virtserialport,chardev=agent,nr=1",
    ]  # fmt: skip
    line, line_end = socket.socketpair()
    monitor, monitor_end = socket.socketpair()
    with line_end, monitor_end:
        fds = (line_end.fileno(), monitor_end.fileno())
        arguments += [
            "-chardev", f"socket,id=agent,fd={fds[0]}",
            "-chardev", f"socket,id=monitor,fd={fds[1]}", "-qmp", "chardev:monitor",
            *extra_args,
        ]  # fmt: skip
        host = HostProgram(arguments, env=program.env, pass_fds=fds, last_words=KVM_LAST_WORDS)
    return _up(Guest(host, Channel(line, host.evidence), qmp=Qmp(monitor)), timeout)


def boot_uml(
    shares: Sequence[Share] = (),
    *,
    memory: str = "256M",
    lines: Sequence[int] = (),
    extra_args: Sequence[str] = (),
    timeout: float = BOOT_LIMIT,
) -> Guest:
    """A guest that has come up. ``lines``: descriptors that are its serial lines from ttyS1 on."""
    linux = uml_kernel()
    image = initramfs(agent(), busybox())
    for share in shares:
        if ":" in share.socket:
            raise GuestError(
                f"user-mode Linux cannot take a colon in {share.socket}: use another path"
            )
    folder = tempfile.TemporaryDirectory(prefix="ninepd-uml-")
    line, line_end = socket.socketpair()
    with line_end:
        arguments = [
            linux, f"mem={memory}", f"initrd={image}", "seccomp=on", "quiet",
            f"uml_dir={folder.name}/", "con=null", "con0=null,fd:1", "ssl=null",
            f"ssl0=fd:{line_end.fileno()}", "agent=/dev/ttyS0",
            *(f"ssl{number}=fd:{fd}" for number, fd in enumerate(lines, 1)),
            *(f"virtio_uml.device={share.socket}:{VIRTIO_9P}:{number}"
              for number, share in enumerate(shares)),
            *extra_args,
        ]  # fmt: skip
        # The guest's memory is a file there, which must be in memory and may be mapped executable.
        env = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}  # noqa: S108
        host = HostProgram(arguments, env=env, pass_fds=(line_end.fileno(), *lines))
    return _up(Guest(host, Channel(line, host.evidence, window=UML_WINDOW), folder=folder), timeout)


def _up(guest: Guest, timeout: float) -> Guest:
    try:
        guest.wait_up(timeout)
    except BaseException:
        guest.kill()
        raise
    return guest
