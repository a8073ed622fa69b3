"""A TOML file of exports: each option by its long name, as a key.

A table ``[[export]]`` has those of one export, ``[defaults]`` those of all exports that do not set
them, and what stands above is the daemon's. Whatever is wrong is said with file, line, table and
key. Lines are found by a look at how they begin, since tomllib tells none; text in three quotes
could mislead that, which is no reason for a parser.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Final, get_args

from ninepd.activation import Activated
from ninepd.config import Config, Export, make_export
from ninepd.errors import UsageError

_EXPORT: Final = {field.name: field for field in fields(Export)}
_DAEMON: Final = {
    field.name: field for field in fields(Config) if field.name not in {"exports", "placed"}
}
_DEFAULTS: Final = "defaults"
_TOP: Final = ""
_HEADER: Final = re.compile(r"\s*\[\[?\s*[\"\']?([\w-]+)[\"\']?\s*\]")
_KEY: Final = re.compile(r"\s*[\"\']?([\w-]+)[\"\']?\s*=")
_TYPES: Final[dict[Any, str]] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    tuple[int, ...]: "a list of whole numbers, and not empty",
    tuple[str, ...]: "a list of strings, and not empty",
}


def load(path: str, activated: Sequence[Activated] = ()) -> Config:
    """What a file says; UsageError for the first thing that is wrong with it."""
    try:
        file = ConfigFile(path, activated)
        if file.problems:
            raise UsageError(file.problems[0])
    except UsageError as error:
        raise UsageError(f"--config: {error}") from None
    return Config(tuple(file.exports.values()), **file.settings, placed=file.placed)


class ConfigFile:
    """A file that was read."""

    def __init__(self, path: str, activated: Sequence[Activated] | None) -> None:
        """UsageError if it cannot be read, or is no TOML. ``activated``: as make_export has it."""
        self._path = path
        self._activated = activated
        self.problems: list[str] = []
        """All that is wrong, each with its place."""
        text, document = _read(path)
        self._lines = _lines(text)
        defaults = self._table(document, _DEFAULTS)
        tables = self._tables(document)
        self.settings = self._values(_TOP, document, _DAEMON)
        """Of the daemon."""
        self._check_settings()
        self.exports: dict[int, Export] = {}
        """Those in which nothing is wrong, by their numbers from 1 on."""
        before = len(self.problems)
        common = self._values(_DEFAULTS, defaults, _EXPORT)
        sound = len(self.problems) == before
        for number, table in enumerate(tables, 1):
            self._add_export(number, common, table, sound, alone=len(tables) == 1)
        if not tables and not self.problems:
            self._blame(_TOP, UsageError("there is no [[export]] in it"))

    def placed(self, number: int, error: UsageError) -> UsageError:
        """The same error of an export, with its place."""
        return UsageError(f"--config: {self._place(_name(number), error)}")

    def blame(self, number: int, error: UsageError) -> None:
        """Something else is wrong with an export."""
        self._blame(_name(number), error)

    def _place(self, table: str, error: UsageError) -> str:
        """An error with its place: the option's that it begins with, or the table's."""
        option = re.match(r"--([\w-]+):", str(error))
        keys = [option[1], option[1].replace("-", "_")] if option else []
        label = table
        line = self._line(table, keys)
        if line is None and table not in {_TOP, _DEFAULTS}:
            line = self._line(_DEFAULTS, keys)
            if line is not None:
                label = f"{_DEFAULTS}, for {table}"
        if line is None:
            line = self._lines.get((table, ""))
        if line is None:
            where = f", {label}" if label else ""
        else:
            where = f", line {line}" + (f" ({label})" if label else "")
        return f"{self._path}{where}: {error}"

    def _line(self, table: str, keys: Iterable[str]) -> int | None:
        return next((self._lines[table, key] for key in keys if (table, key) in self._lines), None)

    def _blame(self, table: str, error: UsageError) -> None:
        self.problems.append(self._place(table, error))

    # Parts of it

    def _table(self, document: dict[str, Any], name: str) -> dict[str, Any]:
        table = document.pop(name, {})
        if isinstance(table, dict):
            return table
        self._blame(name, UsageError(f"write it as a table [{name}]"))
        return {}

    def _tables(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        tables = document.pop("export", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._blame(_name(1), UsageError("write each export as a table [[export]]"))
            return []
        return tables

    def _values(
        self, table: str, content: Mapping[str, Any], known: Mapping[str, Field[Any]]
    ) -> dict[str, Any]:
        """Of the options in a table, those in which nothing is wrong by themselves."""
        values: dict[str, Any] = {}
        for key, value in content.items():
            name = key.replace("-", "_")
            try:
                if name not in known:
                    raise UsageError(f"--{key}: {_why_unknown(name, value)}")
                if name in values:
                    raise UsageError(f"--{key}: it is given twice")
                values[name] = _value(known[name], key, value)
            except UsageError as error:
                # A table that nobody knows stands where it begins.
                self._blame(key if (key, "") in self._lines and not table else table, error)
        return values

    def _check_settings(self) -> None:
        try:
            Config((), **self.settings)
        except UsageError as error:
            self._blame(_TOP, error)

    def _add_export(
        self,
        number: int,
        common: Mapping[str, Any],
        table: Mapping[str, Any],
        sound: bool,
        alone: bool,
    ) -> None:
        """``sound``: can what this export has in common with others be relied on?"""
        name, before = _name(number), len(self.problems)
        values = {**common, **self._values(name, table, _EXPORT)}
        if not sound or len(self.problems) > before:
            return
        try:
            for field in _EXPORT.values():
                if field.default is MISSING and field.name not in values:
                    raise UsageError(f"there is no {field.name.replace('_', '-')}")
            export = make_export(values, self._activated, alone)
            _check_distinct(export, self.exports.values())
        except UsageError as error:
            self._blame(name, error)
        else:
            self.exports[number] = export


def _name(number: int) -> str:
    """Of the table of an export."""
    return f"export {number}"


def _read(path: str) -> tuple[str, dict[str, Any]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        return text, tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def _lines(text: str) -> dict[tuple[str, str], int]:
    """Where tables begin, and where keys are in them."""
    found: dict[tuple[str, str], int] = {}
    table, exports = _TOP, 0
    for at, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            table = header[1]
            if table == "export":
                exports += 1
                table = _name(exports)
            found[table, ""] = at
        elif key := _KEY.match(line):
            found[table, key[1]] = at
    return found


def _why_unknown(name: str, value: object) -> str:
    if name in _EXPORT:
        return "this is an option of exports; write it into [defaults] or an [[export]]"
    if name in _DAEMON:
        return "this is an option of the daemon; write it above the first table"
    if isinstance(value, dict | list):
        return "this table is unknown; there are [defaults] and [[export]]"
    return "this option is unknown"


def _value(field: Field[Any], key: str, value: Any) -> Any:
    """As the option has it; or UsageError for one of another type."""
    default = field.default
    expected: Any = str if default is MISSING or default is None else type(default)
    if field.name == "fd":
        expected = int
    if expected is tuple:
        expected = field.type
        if _is_list_of(get_args(expected)[0], value):
            return tuple(value)
    elif type(value) is expected:
        return value
    raise UsageError(f"--{key}: {key} must be {_TYPES[expected]}")


def _is_list_of(kind: type, value: object) -> bool:
    # An empty one would say that nobody is meant, and mean everybody.
    return isinstance(value, list) and value != [] and {type(item) for item in value} == {kind}


def _check_distinct(export: Export, others: Iterable[Export]) -> None:
    """UsageError if one of the others has its tag or its socket."""
    for name in ("tag", "socket_path", "fd"):
        value = getattr(export, name)
        if value is not None and value in [getattr(other, name) for other in others]:
            raise UsageError(f"--{name.replace('_', '-')}: {value!r} is used by two exports")
