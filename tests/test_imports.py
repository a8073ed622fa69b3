"""Imports point down, and the codecs do no I/O (invariant 7 of the architecture).

Tests import what they share from tests/support, and nothing from one another.
"""

import ast
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parent
PACKAGE: Final = TESTS.parent / "ninepd"
LAYERS: Final = (
    {"__main__"},
    {"cli"},
    {"doctor"},
    {"qemu"},
    {"checking", "supervisor"},
    {"children"},
    {"control"},
    {"daemon"},
    {"offer"},
    {"following"},
    {"inspection"},
    {"configfile", "connection", "exposure", "listener", "reload", "sandbox", "systemd"},
    {"device", "frontend", "remover"},
    {"throttled"},
    {"pipeline"},
    {"turns"},
    {"answers", "framing", "jobs"},
    {"payload"},
    {"ops"},
    {"export"},
    {"config"},
    {"limits", "endpoint"},
    {"vhostuser", "p9", "listing", "owners", "ids"},
    {"logs"},
    {"journal", "jsonlog"},
    {"foreign", "idranges", "walls"},
    {"activation", "presence", "process", "throttle"},
    {"vring", "syscalls", "capabilities", "mounts"},
    {"stats"},
    {"errors", "statelock", "tuples", "workers", "_libvring", "ninepd"},
)
"""From top to bottom. Parts of one layer know nothing of each other."""
RANK: Final = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SANS_IO: Final = {"os", "socket", "asyncio", "cffi", "select", "threading", "time", "logging"}
MODULES: Final = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in {"_vring_build.py"}
)


def part(path: Path) -> str:
    """The layer's member that a module belongs to: a module of the top, or a package."""
    relative = path.relative_to(PACKAGE)
    return (
        "ninepd"
        if relative.name == "__init__.py" and len(relative.parts) == 1
        else (relative.parts[0] if len(relative.parts) > 1 else relative.stem)
    )


def imports(path: Path) -> set[str]:
    """Full names of the modules that one imports, wherever in it."""
    package = ["ninepd", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            # ``from ninepd import syscalls`` imports a module, ``from ninepd.x import y`` a name.
            found |= (
                {f"{origin}.{alias.name}" for alias in node.names}
                if origin == "ninepd"
                else {origin}
            )
    return found


def parts_imported(path: Path) -> set[str]:
    """Parts of ninepd that a module imports, its own left out."""
    own = {name.split(".")[1] for name in imports(path) if name.startswith("ninepd.")}
    return {name for name in own if not name.startswith("__")} - {part(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    rank = RANK[part(path)]
    assert {name for name in parts_imported(path) if RANK[name] <= rank} == set()


@pytest.mark.parametrize("package", ["vhostuser", "p9"])
def test_codecs_do_no_io(package: str) -> None:
    used = {
        (path.name, name)
        for path in (PACKAGE / package).glob("*.py")
        for name in imports(path)
        if name.split(".")[0] in SANS_IO
    }
    assert used == set()


SEAM: Final = {
    "host.py",
    "idmapped.py",
    "local.py",
    "mapped.py",
    "mapped_file.py",
    "mapped_xattr.py",
    "metadata.py",
    "readonly.py",
}
"""The classes that make system calls on the export, for all others."""
PURE: Final = {"fsencode", "fsdecode", "major", "minor", "stat_result"}
CALLERS: Final = sorted(
    path
    for package in ("export", "ops")
    for path in (PACKAGE / package).glob("*.py")
    if path.name not in SEAM
)


def host_calls(tree: ast.AST) -> set[str]:
    """What a module uses of the modules that make system calls, other than constants and types."""
    used = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(
                value=ast.Name(id="os" | "fcntl" | "owners" | "syscalls" as module), attr=name
            ):
                used.add(f"{module}.{name}")
            case ast.ImportFrom(module="os" | "fcntl" | "ninepd.syscalls" as module, names=names):
                used |= {f"{module}.{alias.name}" for alias in names}
            case ast.Call(func=ast.Name(id="open")):
                used.add("builtins.open")
    last = {whole: whole.rpartition(".")[2] for whole in used}
    return {whole for whole, name in last.items() if not name[0].isupper() and name not in PURE}


@pytest.mark.parametrize("path", CALLERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_system_calls_on_the_export_are_the_hosts(path: Path) -> None:
    assert host_calls(ast.parse(path.read_text())) == set()


@pytest.mark.parametrize(
    "line", ["os.stat(fd)", "open(path)", "fcntl.fcntl(fd, 1)", "from ninepd.syscalls import walk"]
)
def test_a_system_call_is_recognised(line: str) -> None:
    assert host_calls(ast.parse(line))


def test_magic_links_are_composed_in_one_place() -> None:
    composing = {path.name for path in MODULES if "/proc/self/fd/" in _strings(path)}
    assert composing == {"syscalls.py"}


def _strings(path: Path) -> str:
    """All strings of a module that are not its documentation."""
    found = []
    documents = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documents.add(node.value)
        elif isinstance(node, ast.Constant) and node not in documents:
            found.append(str(node.value))
    return "\n".join(found)


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path in MODULES} <= set(RANK)


def test_only_the_demo_knows_of_guests() -> None:
    """They are a distribution of their own, which a daemon does without."""
    users = {
        part(path)
        for path in MODULES
        if any(name.split(".")[0] == "ninepd_guests" for name in imports(path))
    }
    assert users == {"cli"}
    program = "import ninepd.cli, sys; print([n for n in sys.modules if 'guests' in n])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def imported_tests(tree: ast.AST) -> set[str]:
    """Modules of tests, or tests of theirs, that a module imports."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names):
                found |= {f"{module or ''}.{alias.name}" for alias in names}
    return {name for name in found if any(part.startswith("test_") for part in name.split("."))}


def test_no_module_of_tests_is_imported() -> None:
    """What several of them use is in tests/support."""
    users = {
        (str(path.relative_to(TESTS.parent)), name)
        for folder in ("bench", "fuzz", "guests", "tests")
        for path in (TESTS.parent / folder).rglob("*.py")
        for name in imported_tests(ast.parse(path.read_text()))
    }
    assert users == set()


@pytest.mark.parametrize(
    "line",
    [
        "import tests.ops.test_locks",
        "from tests import test_storage",
        "from tests.guest import test_life",
        "from . import test_storage",
        "from .test_storage import Fuse",
    ],
)
def test_an_import_of_tests_is_recognised(line: str) -> None:
    assert imported_tests(ast.parse(line))


@pytest.mark.parametrize(
    "name", ["ninepd.pipeline", "ninepd.ops.walking", "ninepd.p9.codecs", "ninepd.syscalls"]
)
def test_what_every_request_passes_through_is_compiled(name: str) -> None:
    """So that what is tested is what users run."""
    assert str(import_module(name).__file__).endswith(tuple(EXTENSION_SUFFIXES))


def test_the_same_sources_run_uncompiled(tmp_path: Path) -> None:
    """For a debugger, say."""

    def compiled(_: str, names: list[str]) -> list[str]:
        return [n for n in names if n.endswith(".so") and not n.startswith("_libvring.")]

    shutil.copytree(PACKAGE, tmp_path / "ninepd", ignore=compiled)
    program = "import ninepd.daemon, ninepd.pipeline as p; print(p.__file__)"
    output = subprocess.check_output(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        text=True,
    )
    assert output.strip() == str(tmp_path / "ninepd/pipeline.py")
