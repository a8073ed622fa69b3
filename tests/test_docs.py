"""What the documents say is what the program does."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from bench.mount_options import TABLES
from ninepd.cli import cli, serve
from ninepd.config import Config, Export

ROOT = Path(__file__).parent.parent
PAGES_OF_MANUAL = sorted((ROOT / "contrib/man").glob("*.[0-9]"))
MANUAL = (ROOT / "contrib/man/ninepd.1").read_text().replace("\\-", "-")
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "bench/README.md", *ROOT.glob("docs/*.md")])
COMMAND = re.compile(rf"ninepd ({'|'.join(cli.commands)})((?: +--?[a-z-]+| +[^\s`)]+)*)")
OPTIONS = {
    option for parameter in serve.params for option in parameter.opts if option.startswith("--")
}


def test_manual_pages_are_those_of_the_options(tmp_path: Path) -> None:
    """``python contrib/man/build.py`` makes them anew."""
    script = str(ROOT / "contrib/man/build.py")
    subprocess.run([sys.executable, script, str(tmp_path)], check=True)
    assert {page.name for page in PAGES_OF_MANUAL} == set(os.listdir(tmp_path))
    for page in PAGES_OF_MANUAL:
        assert page.read_text() == (tmp_path / page.name).read_text(), page.name


@pytest.mark.parametrize("page", PAGES_OF_MANUAL, ids=lambda page: page.name)
def test_manual_page_is_well_formed(page: Path) -> None:
    if not shutil.which("groff"):
        pytest.skip("needs groff")
    command = ["groff", "-man", "-Tutf8", "-ww", "-z", str(page)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.parametrize("option", sorted(OPTIONS - {"--help"}))
def test_the_manual_explains_every_option(option: str) -> None:
    assert re.search(rf"^\.B (-\w, )?{option}\b", MANUAL, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES_OF_MANUAL, ids=lambda page: page.name)
def test_the_manual_names_no_other_option(page: Path) -> None:
    known = {
        option
        for command in [cli, *cli.commands.values()]
        for parameter in command.params
        for option in parameter.opts
    }
    known |= {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", page.read_text().replace("\\-", "-"))) <= known


def test_the_manual_has_every_key_of_the_configuration_file() -> None:
    text = (ROOT / "contrib/man/ninepd.toml.5").read_text().replace("\\-", "-")
    keys = {field.name for field in (*fields(Export), *fields(Config))} - {"exports", "placed"}
    assert set(re.findall(r"^\.B ([a-z-]+) \\fR= ", text, re.MULTILINE)) == {
        key.replace("_", "-") for key in keys
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page: Path) -> None:
    """Every line that runs one has options that exist."""
    for command, rest in COMMAND.findall(page.read_text()):
        known = {option for parameter in cli.commands[command].params for option in parameter.opts}
        words = {word for word in rest.split() if word.startswith("--")}
        assert words <= known | {"--help"}, command


def test_commands_are_found() -> None:
    found = {command for command, _ in COMMAND.findall(README)}
    assert found >= {"serve", "qemu-args", "doctor"}


def test_symptoms_are_what_ninepd_says() -> None:
    sources = [path.read_text() for path in (ROOT / "ninepd").rglob("*.py")]
    said = re.sub(r'"\s+f?"', "", "".join(sources))  # strings of several lines
    quoted = re.findall(r"ninepd: `([^`]+)`", README)
    assert quoted
    for message in quoted:
        for part in re.split(r" ?\.\.\. ?| N ", message):
            assert part in said, message


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
