"""Every threat in threats.toml has a test that names it, and no test names another."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import THREATS as TABLE

TESTS = Path(__file__).parent
MARK = "pytest.mark.threat"


def named_in(source: str) -> set[str]:
    """The threats that tests of a module name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == MARK:
                    found |= {ast.literal_eval(argument) for argument in mark.args}
    return found


@cache
def named() -> frozenset[str]:
    return frozenset().union(*(named_in(path.read_text()) for path in TESTS.rglob("test_*.py")))


def test_every_threat_has_a_test() -> None:
    assert named() == set(TABLE["threats"])


def test_what_is_absent_is_not_there() -> None:
    assert not set(TABLE["absent"]) & (named() | set(TABLE["threats"]))


def test_known_vulnerabilities_come_down_to_threats() -> None:
    for vulnerability, threats in TABLE["known"].items():
        assert threats, vulnerability
        assert set(threats) <= set(TABLE["threats"]), vulnerability
    assert not set(TABLE["known"]) & set(TABLE["elsewhere"])


def test_names_in_code_that_is_no_test_do_not_count() -> None:
    marked = '@pytest.mark.threat("t_a", "t_b")\ndef {}() -> None: ...\n'
    assert named_in(marked.format("test_it")) == {"t_a", "t_b"}
    assert named_in(marked.format("helper")) == set()
    assert named_in('# @pytest.mark.threat("t_c")\n') == set()


@pytest.mark.parametrize("part", ["threats", "absent", "elsewhere"])
def test_everything_has_its_words(part: str) -> None:
    assert all(words.strip() for words in TABLE[part].values())
