#!/usr/bin/python3 -I
"""libvirt's hook for domains of QEMU that bring their 9P exports along, in their <metadata>.

What stands there is a configuration file of ninepd's, TOML as it is:

    <ninepd:exports xmlns:ninepd="urn:ninepd:exports">
    [[export]]
    ...
    </ninepd:exports>

Before the domain starts it goes to FOLDER, and ninepd-domain@NAME.service serves it; when the
domain has ended both are gone. Put this into /etc/libvirt/hooks/qemu.d/ and restart libvirt's
daemon, which looks for hooks only then (https://libvirt.org/hooks.html). It speaks to systemd
alone, for libvirt waits for it.
"""

import os
import subprocess
import sys
from xml.etree import ElementTree

FOLDER = "/run/ninepd/domains"
NAME = "{urn:ninepd:exports}exports"


def start(domain: str, description: str) -> int:
    # libvirt has written this, out of what it has parsed itself.
    exports = ElementTree.fromstring(description).find(f"metadata/{NAME}")  # noqa: S314
    if exports is None:
        return 0
    unit, path = _places(domain)
    os.makedirs(FOLDER, 0o700, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(exports.text or "")
    # What is wrong with it libvirt shows to whoever starts the domain.
    status = subprocess.run(["ninepd", "check-config", path], stdout=subprocess.DEVNULL).returncode
    if status == 0:
        status = subprocess.run(["systemctl", "restart", unit]).returncode
    if status:
        stop(domain)
    return status


def stop(domain: str) -> int:
    unit, path = _places(domain)
    if not os.path.exists(path):
        return 0
    status = subprocess.run(["systemctl", "stop", unit]).returncode
    # A unit that has failed would be listed for ever.
    subprocess.run(["systemctl", "reset-failed", unit], stderr=subprocess.DEVNULL)
    os.unlink(path)
    return status


def _places(domain: str) -> tuple[str, str]:
    """Its unit, and the file that this serves."""
    instance = subprocess.check_output(["systemd-escape", domain], text=True).strip()
    return f"ninepd-domain@{instance}.service", f"{FOLDER}/{instance}.toml"


def main() -> int:
    domain, *event = sys.argv[1:4]
    match event:
        case ["prepare", "begin"]:
            return start(domain, sys.stdin.read())
        case ["release", "end"]:
            return stop(domain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
