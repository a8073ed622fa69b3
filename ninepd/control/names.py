"""What an export is called in the control tree."""

import os
from urllib.parse import quote


def name_of(tag: str) -> str:
    """ASCII, with no slash, and neither of the two names that mean something else."""
    name = quote(os.fsencode(tag), safe="")
    return name.replace(".", "%2E") if name in {".", ".."} else name
