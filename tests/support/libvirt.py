"""A domain of libvirt's in a Debian of pid1.py's, made of an example of contrib/libvirt."""

import contextlib
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from ninepd_guests.boot import KERNEL_ARGUMENTS
from ninepd_guests.channel import Channel
from ninepd_guests.image import initramfs
from ninepd_guests.kernels import SERIES, kernel
from ninepd_guests.machine import BOOT_LIMIT, Running
from ninepd_guests.tools import agent, busybox, qemu_in
from tests.support.pid1 import CHECKOUT, Systemd

EXAMPLES: Final = CHECKOUT / "contrib/libvirt"
NAME: Final = "my guest-2"
"""Nothing that systemd takes as it is."""
QEMU_PLACE: Final = "/qemu"
"""Where the machine sees Debian's newest QEMU."""
_EMULATOR: Final = "/usr/local/bin/qemu"
_FOLDER: Final = "/var/lib/libvirt/images"
_AGENT: Final = "/var/lib/libvirt/qemu/agent.sock"


class Domain:
    """Defined, and not yet started."""

    def __init__(self, machine: Systemd, example: str) -> None:
        """The example with a kernel, the agent's line and QEMU's place; and emulated."""
        self._machine = machine
        linux = kernel(SERIES[-1])
        files = {"kernel": linux.image, "initrd": initramfs(agent(), busybox(), linux.modules)}
        for kind, path in files.items():
            shutil.copy(path, machine.path(f"{_FOLDER}/{kind}"))
        program = qemu_in(QEMU_PLACE, "qemu-system-x86_64")
        variables = [f"{key}={value}" for key, value in program.env.items()]
        emulator = machine.path(_EMULATOR)
        emulator.write_text(
            f'#!/bin/sh\nexec env {shlex.join([*variables, *program.command])} "$@"'
        )
        emulator.chmod(0o755)

        domain = ElementTree.parse(EXAMPLES / example).getroot()
        domain.set("type", "qemu")
        name, system, devices = (domain.find(tag) for tag in ("name", "os", "devices"))
        assert name is not None
        assert system is not None
        assert devices is not None
        name.text = NAME
        for kind in files:
            ElementTree.SubElement(system, kind).text = f"{_FOLDER}/{kind}"
        ElementTree.SubElement(system, "cmdline").text = KERNEL_ARGUMENTS
        ElementTree.SubElement(devices, "emulator").text = _EMULATOR
        channel = ElementTree.SubElement(devices, "channel", type="unix")
        ElementTree.SubElement(channel, "source", mode="bind", path=_AGENT)
        ElementTree.SubElement(channel, "target", type="virtio", name="agent")
        machine.path("/root/domain.xml").write_text(ElementTree.tostring(domain, "unicode"))
        self.virsh("define", "/root/domain.xml")

    def virsh(self, command: str, *arguments: str) -> str:
        return self._machine.run("virsh", "--connect=qemu:///system", command, *arguments)

    @contextlib.contextmanager
    def started(self) -> "Iterator[Line]":
        """While the guest is up, a line to it."""
        self.virsh("start", NAME)
        line = Line(self._machine.path(_AGENT), self.log)
        try:
            line.channel.wait_boot(1, BOOT_LIMIT)
            yield line
        finally:
            line.channel.close()
            self.virsh("destroy", NAME)

    def log(self) -> str:
        return self._machine.path(f"/var/log/libvirt/qemu/{NAME}.log").read_text()


class Line:
    """To the agent of the guest."""

    def __init__(self, path: Path, evidence: Callable[[], str]) -> None:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(path))
        self.channel = Channel(end, evidence)

    def run(self, command: str) -> str:
        job = self.channel.start("run", command.encode())
        result = Running(self.channel, job, command).wait()
        assert result.status == 0, result.text
        return result.text
