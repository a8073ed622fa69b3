"""What the documents say is what the program does."""

import configparser
import json
import re
import shlex
from pathlib import Path

import click
import pytest

from bench.mount_options import TABLES
from ninepd import __version__
from ninepd.cli import cli, serve

ROOT = Path(__file__).parent.parent
MANUAL = (ROOT / "contrib/man/ninepd.1").read_text().replace("\\-", "-")
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "bench/README.md", *ROOT.glob("docs/*.md")])
OPTIONS = {
    option for parameter in serve.params for option in parameter.opts if option.startswith("--")
}


@pytest.mark.parametrize("option", sorted(OPTIONS - {"--help"}))
def test_the_manual_explains_every_option(option: str) -> None:
    assert re.search(rf"^\.(BI|B|BR) .*{option}\b", MANUAL, re.MULTILINE)


def test_the_manual_names_no_other_option() -> None:
    known = {
        option
        for command in [cli, *cli.commands.values()]
        for parameter in command.params
        for option in parameter.opts
    }
    known |= {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", MANUAL)) <= known


def test_the_manual_and_the_package_agree_on_the_version() -> None:
    assert f"ninepd {__version__}" in MANUAL.splitlines()[0]


def test_defaults_in_the_manual() -> None:
    for parameter in serve.params:
        default = parameter.default
        is_value = isinstance(parameter, click.Option) and not parameter.is_flag
        if is_value and isinstance(default, int):
            assert str(default) in MANUAL


@pytest.mark.parametrize("command", ["ninepd serve", "ninepd qemu-args"])
def test_commands_in_the_readme_are_accepted(command: str) -> None:
    """Every line of the README that runs the command has options that exist."""
    lines = re.findall(rf"{command}((?: +--?[a-z-]+| +[^\s`)]+)*)", README)
    assert lines
    name = command.split()[1]
    known = {option for parameter in cli.commands[name].params for option in parameter.opts}
    for line in lines:
        words = {word for word in shlex.split(line) if word.startswith("--")}
        assert words <= known | {"--help"}


def anchors(page: Path) -> set[str]:
    """Of the headings, as the usual renderers of Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_measured_tables_are_those_that_the_bench_prints() -> None:
    text = (ROOT / "docs/linux-client.md").read_text()
    for table in TABLES:
        head = "| " + " | ".join(["", *(f"`{name}`" for name in table.mounts)]) + " |"
        assert f"{table.title}:\n\n{head}\n" in text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "contrib/systemd").rglob("*.service")), ids=lambda path: path.stem
)
def test_the_unit_starts_what_exists(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(path)
    program, command, *words = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, command) == ("ninepd", "serve")
    assert {word for word in words if word.startswith("--")} <= OPTIONS
    assert unit["Service"]["Type"] == "notify"


def test_back_end_description() -> None:
    """The file by which management software finds back ends (QEMU's vhost-user.json)."""
    found = json.loads((ROOT / "contrib/vhost-user/50-ninepd.json").read_text())
    assert found["type"] == "9p"
    assert Path(found["binary"]).is_absolute()
    assert Path(found["binary"]).name == "vhost-user-9p"
