"""One thing that was found out, what follows from it, and what helps."""

from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Nothing is wrong; to know it helps."""
    WARNING = "warning"
    """It serves, but something will not be as good as it could be."""
    ERROR = "error"
    """It cannot serve like this."""


class Finding(NamedTuple):
    """A line of the report."""

    level: Level
    what: str
    consequence: str
    cure: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<7}  {self.what}: {self.consequence}"
        return f"{line}; {self.cure}" if self.cure else line
