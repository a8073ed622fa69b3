"""Which capabilities this process has (capabilities(7))."""

from functools import cache
from typing import Final

CAP_DAC_READ_SEARCH: Final = 2
_NEEDED: Final = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
}


def privileged() -> bool:
    """May this process create files as any user (capabilities(7))?"""
    return has_capabilities(*_NEEDED.values())


@cache
def has_capabilities(*bits: int) -> bool:
    """Does this process have all of them in effect?"""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
                return all(effective >> bit & 1 for bit in bits)
    return False
