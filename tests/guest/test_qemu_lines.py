"""The QEMU files and arguments that we give out boot as they are."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd_guests.boot import boot_qemu
from ninepd_guests.kernels import SERIES, kernel
from ninepd_guests.machine import Guest
from ninepd_guests.tools import busybox, qemu, qemu_aarch64, qemu_command
from tests.conftest import StartDaemon
from tests.support.small_image import small_image

FOLDER = Path(__file__).parents[2] / "qemu-configs"
AARCH64 = FOLDER / "virt-aarch64.cfg"
CONFIGS = sorted({*FOLDER.glob("*.cfg")} - {AARCH64})
NOTHING = "/dev/null"
"""A -readconfig file with no word about machine, memory and shares, all of which come from us."""

MICROVM = "tsc_early_khz=2000000"
"""Without a clock to measure the TSC by, a kernel on a busy host may wait for it for ever."""


def boot(machine: str, readconfig: str, *arguments: str) -> Guest:
    append = MICROVM if machine == "microvm" else ""
    return boot_qemu(readconfig=readconfig, machine=machine, extra_args=arguments, append=append)


def read_and_write(guest: Guest, tag: str, export: Path) -> None:
    (export / "hello").write_text(f"hello {tag}")
    guest.mount(tag, f"/{tag}", msize=512000)
    assert guest.run(f"cat /{tag}/hello").text == f"hello {tag}"
    if tag != "tools":
        guest.run(f"echo back > /{tag}/back")
        assert (export / "back").read_text() == "back\n"


def test_there_are_files_for_the_usual_machines() -> None:
    assert {"q35.cfg", "pc.cfg", "microvm.cfg"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_readconfig(
    config: Path, tmp_path: Path, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = config.read_text()
    machine = "microvm" if 'type = "microvm"' in text else "q35"
    exports = {"ninepd.sock": "share"}
    if "tools.sock" in text:
        exports["tools.sock"] = "tools"
    for socket, tag in exports.items():
        (tmp_path / tag).mkdir()
        options = ["--readonly"] if tag == "tools" else []
        start_daemon(*options, socket=str(tmp_path / socket), export=str(tmp_path / tag), tag=tag)
    if machine == "microvm":  # boot_qemu gives it too, so the boot alone would not miss it
        assert 'property = "force-legacy"' in text
    # The files name the sockets relative to where QEMU starts.
    monkeypatch.chdir(tmp_path)
    with boot(machine, str(config)) as guest:
        for tag in exports.values():
            read_and_write(guest, tag, tmp_path / tag)


def qemu_args(*options: str) -> list[str]:
    printed = subprocess.run(
        [sys.executable, "-m", "ninepd", "qemu-args", *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return shlex.split(printed.stdout)


@pytest.mark.parametrize("machine", ["q35", "pc", "microvm"])
def test_printed_arguments(
    machine: str, tmp_path: Path, start_daemon: StartDaemon, export: Path
) -> None:
    # A comma is what QEMU's option syntax needs escaped, a space what a shell does.
    daemon = start_daemon(socket=str(tmp_path / "a, b.sock"), tag="share")
    options = ["--socket-path", daemon.socket, "--tag", "share", "--memory", "512M"]
    arguments = qemu_args(*options, "--machine", machine)
    if machine == "microvm":
        assert "virtio-mmio.force-legacy=false" in arguments
    with boot(machine, NOTHING, *arguments) as guest:
        read_and_write(guest, "share", export)


AARCH64_INIT = """#!/bin/sh
mount -t proc proc /proc
for module in /modules/*; do insmod $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 share /mnt
{ cat /mnt/hello; uname -m; } > /mnt/back
umount /mnt
poweroff -f
"""


@pytest.mark.parametrize("printed", [False, True], ids=["readconfig", "printed"])
def test_aarch64(printed: bool, tmp_path: Path, start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon(socket=str(tmp_path / "ninepd.sock"), tag="share")
    (export / "hello").write_text("hello\n")
    linux = kernel(SERIES[-1], "arm64")
    (tmp_path / "initrd").write_bytes(small_image(AARCH64_INIT, busybox("arm64"), linux.modules))
    options = ["--socket-path", daemon.socket, "--tag", "share", "--machine", "virt"]
    device = qemu_args(*options) if printed else ["-readconfig", str(AARCH64)]
    program = qemu_aarch64()
    result = subprocess.run(
        [*program.command, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
         "-accel", "tcg", "-cpu", "max,pauth-impdef=on", *device,
         "-kernel", linux.image, "-initrd", "initrd", "-append", "console=ttyAMA0 quiet panic=-1",
         "-serial", "stdio"],
        cwd=tmp_path,
        env=os.environ | program.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )  # fmt: skip
    assert (export / "back").read_text() == "hello\naarch64\n", result.stdout


def test_printed_arguments_for_a_configuration(tmp_path: Path, start_daemon: StartDaemon) -> None:
    tables = []
    for tag in ("first", "the-second-one"):
        (tmp_path / tag).mkdir()
        socket = str(tmp_path / f"{tag}.sock")
        start_daemon(socket=socket, export=str(tmp_path / tag), tag=tag)
        tables.append(
            f'[[export]]\nexport = "{tmp_path / tag}"\ntag = "{tag}"\nsocket-path = "{socket}"\n'
        )
    config = tmp_path / "ninepd.toml"
    config.write_text("\n".join(tables))
    arguments = qemu_args("--config", str(config))
    with boot("q35", NOTHING, *arguments) as guest:
        for tag in ("first", "the-second-one"):
            read_and_write(guest, tag, tmp_path / tag)


def test_doctor_finds_this_qemu_good(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(qemu_command())} "$@"\n')
    program.chmod(0o755)
    printed = subprocess.run(
        [sys.executable, "-m", "ninepd", "doctor", "--qemu", str(program)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | qemu().env,
    )
    (line,) = [line for line in printed.stdout.splitlines() if str(program) in line]
    assert line.startswith("ok ")
    assert "vhost-user-test-device-pci" in line
