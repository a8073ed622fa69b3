"""What there is to fuzz, and where its inputs are."""

from enum import Enum, auto
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
HERE: Final = ROOT / "fuzz"
BUILD: Final = ROOT / "build/fuzz"
CRASHES: Final = BUILD / "crashes"


class Kind(Enum):
    """What drives a harness."""

    C = auto()
    """libFuzzer."""
    PYTHON = auto()
    """libFuzzer, by atheris."""
    LIVE = auto()
    """``soak.py``, by what the daemon answers."""


class Harness(NamedTuple):
    name: str
    kind: Kind
    corpus_name: str
    max_len: int
    share: int
    """Of the time, beside those of the others."""

    @property
    def corpus(self) -> Path:
        """Inputs that are kept in the tree; each is replayed by the tests."""
        return HERE / "corpus" / self.corpus_name

    @property
    def found(self) -> Path:
        """Inputs that runs on this machine found worth keeping."""
        return BUILD / "corpus" / self.name


HARNESSES: Final = {
    harness.name: harness
    for harness in (
        Harness("ring", Kind.C, "ring", 1024, 3),
        Harness("memory", Kind.C, "memory", 512, 1),
        Harness("listing", Kind.C, "listing", 1024, 1),
        Harness("codecs", Kind.PYTHON, "codecs", 1024, 1),
        Harness("frontend", Kind.PYTHON, "frontend", 2048, 1),
        Harness("engine", Kind.PYTHON, "traffic", 16384, 2),
        Harness("live", Kind.LIVE, "traffic", 16384, 2),
    )
}
