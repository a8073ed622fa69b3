"""docs/limits.md names every bound of the code with its value, and the option that chooses it."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from ninepd.cli import serve
from ninepd.limits import CHOICES, Limits

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ninepd"
PAGE = (ROOT / "docs/limits.md").read_text()
BOUND = re.compile(r"(MAX|MIN)_\w+|\w+_MAX|BURST")
NO_BOUNDS_OF_GUESTS = {
    "ninepd.config.TAG_MAX",
    "ninepd.config.SUN_PATH_MAX",
    "ninepd.idranges.ID_MAX",
    "ninepd.idranges.RANGES_MAX",
    "ninepd.mounts.NAMES_MAX",  # beyond it there are more system calls, that is all
    "ninepd.vhostuser.state.MAX_QUEUE_SIZE",  # other names of what stands in vring.py
    "ninepd.vhostuser.state.MAX_MEM_SLOTS",
}
OF_PYTHON_TOO = {"NP_REGIONS_MAX", "NP_RING_MAX"}
NO_BOUNDS_IN_C = {"ND_HANDLE_MAX"}


class Row(NamedTuple):
    what: str
    bound: str
    chosen_by: str
    beyond: str
    code: str


ROWS = [
    Row(*(cell.strip() for cell in line.strip("|").split("|")))
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| what", "| ---"))
]
NAMED = {row.code.strip("`"): row for row in ROWS if row.code}


def in_python() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = set(re.findall(r"^([A-Z]\w+)(?:: [\w\[\]]+)? = ", path.read_text(), re.MULTILINE))
        found |= {f"{module}.{name}" for name in names if BOUND.fullmatch(name)}
    return found


def in_c() -> dict[str, int]:
    """Constants that are one number, or one that is shifted."""
    found = {}
    for path in PACKAGE.glob("_*.c"):
        for name, value, shift in re.findall(
            r"\b(N[DP]_\w+_MAX) = (\d+)(?: << (\d+))?[,} ]", path.read_text()
        ):
            found[f"{path.name}: {name}"] = int(value) << int(shift or 0)
    return found


def value_of(name: str) -> int:
    if name in in_c():
        return in_c()[name]
    module, _, constant = name.rpartition(".")
    value = getattr(import_module(module), constant)
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize("name", NAMED)
def test_values_are_those_of_the_code(name: str) -> None:
    assert re.search(rf"\b{value_of(name)}\b", NAMED[name].bound)


def test_every_bound_has_its_row() -> None:
    assert in_python() - NO_BOUNDS_OF_GUESTS <= set(NAMED)
    assert {
        name for name in in_c() if name.partition(": ")[2] not in OF_PYTHON_TOO | NO_BOUNDS_IN_C
    } <= set(NAMED)


def test_exceptions_still_exist() -> None:
    assert in_python() >= NO_BOUNDS_OF_GUESTS
    assert {name.partition(": ")[2] for name in in_c()} >= OF_PYTHON_TOO | NO_BOUNDS_IN_C


def test_options_have_these_defaults_and_choices() -> None:
    options = {option: parameter for parameter in serve.params for option in parameter.opts}
    found = {}
    for row in ROWS:
        if chosen := re.fullmatch(r"`(--[a-z-]+)`, (\d+) to (\d+)", row.chosen_by):
            option, least, most = chosen.groups()
            found[option.removeprefix("--").replace("-", "_")] = (int(least), int(most))
            assert row.bound == str(options[option].default)
    assert found == CHOICES
    assert {field.name for field in fields(Limits)} == set(CHOICES)


def test_nothing_is_without_an_answer() -> None:
    assert ROWS
    assert all(row.what and row.bound and row.beyond for row in ROWS)
