"""Options that say which ids of guests are which of the host."""

import subprocess
import sys
from pathlib import Path

import pytest

from ninepd.errors import UsageError
from ninepd.idranges import RANGES_MAX, IdRange, parse_ranges, parse_squash

HIGHEST = 4294967294


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["0:100000:65536"],
        ["0:1000:1", "1:100000:65535", "1000000:1:999"],
        ["1:0:1", "0:1:1"],
        [f"0:0:{HIGHEST + 1}"],
        [f"{HIGHEST}:0:1", f"0:{HIGHEST}:1"],
        ["007:08:1"],
        [f"{at}:{at}:1" for at in range(RANGES_MAX)],
    ],
)
def test_good_ranges(texts: list[str]) -> None:
    assert parse_ranges("map-uid", texts) == tuple(
        [IdRange(*map(int, text.split(":"))) for text in texts]
    )


@pytest.mark.parametrize(
    "text",
    ["", "0", "0:1", "0:1:", ":1:1", "0:1:1:1", "0:-1:1", "+0:1:1", "0x0:1:1", " 0:1:1", "0:1:1\n",
     "0:1_0:1", "a:b:c", "\u0660:1:1", "0:1:99999999999", "map:0:1:1", "0,1,1"],
)  # fmt: skip
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--map-gid: .* is not GUEST:HOST:COUNT, three whole"):
        parse_ranges("map-gid", [text])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["0:1:0"], "0:1:0: a range has at least one id"),
        ([f"{HIGHEST + 1}:0:1"], f"the last id of the guest is {HIGHEST + 1}"),
        ([f"0:{HIGHEST + 1}:1"], f"the last id of the host is {HIGHEST + 1}"),
        ([f"0:1:{HIGHEST + 1}"], f"the last id of the host is {HIGHEST + 1}"),
        (["9999999999:0:1"], f"but {HIGHEST} is the highest that there is"),
        (["0:100:10", "9:200:1"], "0:100:10 and 9:200:1 overlap: an id of the guest can be in one"),
        (["9:200:1", "0:100:10"], "0:100:10 and 9:200:1 overlap"),
        (["0:100:10", "10:109:1"], "overlap: an id of the host can be in one"),
        (["0:0:1", "0:0:1"], "overlap"),
        (["1:1:1"] * (RANGES_MAX + 1), "341 ranges are more than 340"),
    ],
)
def test_bad_ranges(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=r"^--map-uid: ") as caught:
        parse_ranges("map-uid", texts)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "ids"),
    [("0", (0, 0)), ("1000", (1000, 1000)), ("1000:0", (1000, 0)), (f"1:{HIGHEST}", (1, HIGHEST))],
)
def test_good_squash(text: str, ids: tuple[int, int]) -> None:
    assert parse_squash(text) == ids


@pytest.mark.parametrize(
    "text", ["", ":", "1:", ":1", "-1", "1:2:3", "root", "1 ", "4294967295", "0:4294967295"]
)
def test_bad_squash(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--squash-to: "):
        parse_squash(text)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--map-uid", "1:2"], "--map-uid: '1:2' is not GUEST:HOST:COUNT, three whole numbers"),
        (["--map-gid", "0:0:9", "--map-gid", "1:9:1"], "--map-gid: 0:0:9 and 1:9:1 overlap: "),
        (["--squash-to", "nobody"], "--squash-to: 'nobody' is not UID or UID:GID, whole numbers"),
        (
            ["--squash-to", "1", "--security-model", "mapped-file"],
            "--squash-to: with mapped-file all files are the daemon's own on the host",
        ),
    ],
)
def test_on_the_command_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    command = [sys.executable, "-m", "ninepd", "serve", "--export", str(tmp_path), "--tag", "t"]
    result = subprocess.run(
        [*command, "--socket-path", str(tmp_path / "s"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"ninepd: {line}")
    assert result.stderr.count("\n") == 1


def test_squash_where_a_mapped_model_is_chosen(
    tmp_path: Path, export: Path, other_user: tuple[str, ...]
) -> None:
    command = [*other_user, sys.executable, "-m", "ninepd", "serve", "--export", str(export)]
    result = subprocess.run(
        [*command, "--tag", "t", "--socket-path", str(tmp_path / "s"), "--squash-to", "4321"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("ninepd: --squash-to: with mapped-xattr all files")
