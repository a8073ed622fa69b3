"""What lies in contrib says the same as what it repeats."""

import re
import tomllib
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from ninepd import __version__
from ninepd.qemu import device_arguments

CONTRIB: Final = Path(__file__).parents[1] / "contrib"
VALUES: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline/*"


def service(path: Path) -> list[str]:
    """The lines of the section, without remarks."""
    section = path.read_text().partition("[Service]\n")[2].partition("[Install]\n")[0]
    return [line for line in section.splitlines() if line and not line.startswith("#")]


def test_the_service_of_domains_is_hardened_as_the_other_one() -> None:
    expected = service(CONTRIB / "systemd/ninepd@.service")
    found = service(CONTRIB / "libvirt/ninepd-domain@.service")
    assert [line.replace("/run/ninepd/domains/", "/etc/ninepd/") for line in found] == expected


def test_debians_version_is_that_of_the_package() -> None:
    changelog = (CONTRIB / "debian/changelog").read_text()
    assert changelog.startswith(f"ninepd ({__version__}) ")


def arguments(domain: ElementTree.Element) -> list[str]:
    """Of QEMU, without the place on the bus, which libvirt leaves to the user."""
    values = [element.attrib["value"] for element in domain.findall(VALUES)]
    return [re.sub(r",bus=pcie\.0,addr=0x1[89]$", "", value) for value in values]


def test_example_of_one_export() -> None:
    domain = ElementTree.parse(CONTRIB / "libvirt/one-export.xml").getroot()
    assert arguments(domain) == device_arguments("/run/ninepd/share.sock", "share")


def test_example_of_its_own_exports() -> None:
    domain = ElementTree.parse(CONTRIB / "libvirt/own-exports.xml").getroot()
    text = domain.findtext("metadata/{urn:ninepd:exports}exports")
    assert text is not None
    expected = []
    for index, export in enumerate(tomllib.loads(text)["export"]):
        expected += device_arguments(export["socket-path"], export["tag"], index)
    assert arguments(domain) == expected
