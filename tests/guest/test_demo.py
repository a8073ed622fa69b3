"""``ninepd demo``, as its user starts it."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

PICTURE = Path(__file__).parents[2] / "docs/demo.svg"


def demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ninepd", "demo", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("options", [["--uml"], []], ids=["uml", "qemu"])
def test_tour(options: list[str]) -> None:
    result = demo(*options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("All of it held.")
    assert result.stdout.count("   ok: ") >= 7, result.stdout
    assert result.stderr == ""
    assert actions(result.stdout.splitlines()) == actions(lines_of_the_picture())


def actions(lines: list[str]) -> list[str]:
    """What is done and found; what a listing says of times and sizes is another each time."""
    return [line for line in lines if line.split()[:1] in (["guest#"], ["host#"], ["ok:"])]


def lines_of_the_picture() -> list[str]:
    """``python contrib/demo_picture.py`` draws it anew."""
    texts = ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
    return [text.text or "" for text in texts]


def test_command(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("host")
    result = demo("--uml", str(tmp_path), "--", "sh", "-c", "pwd; cat 'a file'; echo x > y; exit 7")
    assert result.returncode == 7, result.stderr
    assert result.stdout.replace("\r\n", "\n") == "/mnt\nhost"
    assert (tmp_path / "y").read_text() == "x\n"


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    result = demo("--uml", str(tmp_path / "absent"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "is not a directory" in result.stderr
