"""Debian's kernels: the image and the few modules that a guest with 9p needs, ready to load."""

import glob
import lzma
import os
import re
import shutil
from dataclasses import dataclass

from .cache import artefact
from .errors import GuestError
from .packages import Archive, unpack

SERIES = ("6.12", "7.2")  # what the tests boot; others can be asked for
RELEASE = {"6.1": "bookworm"}
MODULES = ("virtio_pci", "virtio_mmio", "virtio_console", "9pnet_virtio", "9p", "overlay")


@dataclass(frozen=True)
class Kernel:
    image: str
    modules: tuple[str, ...]
    """Paths of .ko files, each after those that it needs."""


def kernel(series: str, architecture: str = "amd64") -> Kernel:
    """The newest Debian kernel of a series such as "7.2", or of the next one that is there."""
    if not re.fullmatch(r"\d+\.\d+", series):
        raise GuestError(f"{series} is no kernel series: give one such as {SERIES[-1]}")
    name = series if architecture == "amd64" else f"{series}-{architecture}"
    path = artefact(
        f"kernel-{name}",
        f"fetching Debian's kernel {name}",
        lambda result, folder: _make(series, architecture, result, folder),
    )
    return Kernel(os.path.join(path, "vmlinuz"), tuple(sorted(glob.glob(f"{path}/modules/*"))))


def _make(series: str, architecture: str, result: str, folder: str) -> None:
    archive = Archive(RELEASE.get(series, "trixie"), architecture)
    pattern = rf"linux-image-(\d+\.\d+)\.[0-9.]+(?:[+-]\w+)?-{architecture}"
    names = archive.series(series, pattern)
    # Newer kernels are split in a binary and a modules package.
    parts = [d for d in archive.depends(names[-1]) if re.match("linux-(binary|modules)-", d)]
    tree = os.path.join(folder, "tree")
    unpack(archive.download([names[-1], *parts], os.path.join(folder, "debs")), tree)
    images = glob.glob(f"{tree}/boot/vmlinuz-*") + glob.glob(f"{tree}/usr/lib/modules/*/vmlinuz")
    os.makedirs(f"{result}/modules")
    shutil.copyfile(images[0], f"{result}/vmlinuz")
    for number, (name, code) in enumerate(_in_order(tree).items()):
        with open(f"{result}/modules/{number:02}-{name}.ko", "wb") as file:
            file.write(code)


def _in_order(tree: str) -> dict[str, bytes]:
    """Modules by name, dependencies first. One that is not there is built into the kernel."""
    files = {
        os.path.basename(path).split(".ko")[0].replace("-", "_"): path
        for path in glob.glob(f"{tree}/**/*.ko*", recursive=True)
    }
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:
            return
        with open(files[name], "rb") as file:
            code = file.read()
        if files[name].endswith(".xz"):
            code = lzma.decompress(code)
        # The packages carry no modules.dep: that is made at installation. The modules know.
        needs = re.search(rb"\0depends=([^\0]*)\0", code)
        for need in needs[1].decode().split(",") if needs else ():
            load(need.replace("-", "_"))
        loaded[name] = code

    for name in MODULES:
        load(name)
    if "9p" not in loaded:
        raise GuestError("this kernel's packages hold no 9p module: choose another series")
    return loaded
