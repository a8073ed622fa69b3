"""Root file systems: Debian as it is installed, of the release that this host has."""

import hashlib
import platform

from .cache import artefact
from .errors import GuestError
from .packages import KEYRING, SUITES, command, mirror


def debian_root(packages: tuple[str, ...]) -> str:
    """A folder with these packages, and what they depend on, installed by dpkg. Needs root."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    if release not in SUITES:
        raise GuestError(f"root file systems can be made of Debian {' and '.join(SUITES)} only")
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()
    sources = [f"deb [signed-by={KEYRING}] {mirror()} {suite} main" for suite in SUITES[release]]

    def make(result: str, _: str) -> None:
        command(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}",
                 "--aptopt=APT::Install-Recommends false", release, result, *sources])  # fmt: skip

    return artefact(f"root-{release}-{digest[:16]}", f"installing Debian {release}", make)
