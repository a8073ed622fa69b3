"""The manual pages, from their sources and the options of the program: ``build.py [FOLDER]``.

What ``--help`` says of an option is said here by the same words, and followed by what a source adds
to it. In a source, which is roff otherwise (man(7)), stand:

    @OPTIONS COMMAND [OPTION...]    all options of a command, or these, up to @END
    @KEYS TABLE                     keys of a table of the configuration file, up to @END
    @MORE OPTION                    what follows goes on about this one
    @VERSION@                       the version
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Final

import click

from ninepd import __version__, cli
from ninepd.config import Config, Export

SOURCES: Final = Path(__file__).parent / "source"
_KEYS: Final[dict[str, Any]] = {"daemon": Config, "export": Export}
_OF_CODE: Final = {"exports", "placed"}
"""Fields that are no keys."""


def main() -> None:
    """Write all pages."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES.parent
    for source in sorted(SOURCES.iterdir()):
        (folder / source.name).write_text(page(source.read_text()))


def page(source: str) -> str:
    """A page from its source."""
    result: list[str] = []
    lines = iter(source.replace("@VERSION@", __version__).splitlines())
    for line in lines:
        match line.split():
            case ["@OPTIONS", command, *names]:
                result += _options(_command(command), names, _more(lines))
            case ["@KEYS", table]:
                result += _keys(table, _more(lines))
            case _:
                result.append(line)
    return "\n".join(result) + "\n"


def _more(lines: Iterator[str]) -> dict[str, list[str]]:
    """What the source adds, by option."""
    found: dict[str, list[str]] = {}
    at: list[str] = []
    for line in lines:
        if line == "@END":
            return found
        if line.startswith("@MORE "):
            at = found.setdefault(line.split()[1], [])
        else:
            at.append(line)
    raise ValueError("there is no @END")


def _command(name: str) -> click.Command:
    return cli.cli if name == "ninepd" else cli.cli.commands[name]


def _options(command: click.Command, names: list[str], more: dict[str, list[str]]) -> Iterator[str]:
    options = {
        option.opts[-1]: option
        for option in command.params
        if isinstance(option, click.Option) and option.help
    }
    if unknown := {*names, *more} - options.keys():
        raise ValueError(f"there is no option {', '.join(sorted(unknown))}")
    for name in names or options:
        option = options[name]
        yield ".TP"
        yield f".B {_escaped(', '.join(option.opts))}" + _argument(option)
        yield _sentence(option)
        yield from more.get(name, [])


def _argument(option: click.Option) -> str:
    return "" if option.is_flag else f" {_italic(option)}"


def _italic(option: click.Option) -> str:
    words = _escaped(option.metavar or "").replace("|", r"\fR|\fI")
    return rf"\fI{words}\fR"


def _sentence(option: click.Option) -> str:
    text = _escaped(str(option.help))
    shown = option.show_default and not option.is_flag
    return f"{text} Default: {_escaped(str(option.default))}." if shown else text


def _keys(table: str, more: dict[str, list[str]]) -> Iterator[str]:
    keys = {field.name: field for field in fields(_KEYS[table]) if field.name not in _OF_CODE}
    if unknown := {*more} - keys.keys():
        raise ValueError(f"there is no key {', '.join(sorted(unknown))}")
    for option in cli.serve.params:
        name = str(option.name)
        if isinstance(option, click.Option) and name in keys:
            yield ".TP"
            yield rf".B {_escaped(name.replace('_', '-'))} \fR= {_value(keys[name], option)}"
            yield _sentence(option)
            yield from more.get(name, [])


def _value(field: Field[Any], option: click.Option) -> str:
    """As TOML has it."""
    default = field.default
    if default is False:
        return "true"
    words = _italic(option)
    if field.type == tuple[int, ...]:
        return f"[{words}, ...]"
    if field.type == tuple[str, ...]:
        return rf"[\(dq{words}\(dq, ...]"
    return words if option.type is click.INT else rf"\(dq{words}\(dq"


def _escaped(text: str) -> str:
    """Plain text as roff: a dash is a minus sign, no line begins with a control character."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace('"', r"\(dq")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
