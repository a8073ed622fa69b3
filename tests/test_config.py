"""Configuration: whatever cannot work is refused with one sentence that names the option."""

import socket
from pathlib import Path

import pytest

from ninepd.config import Config, Export
from ninepd.errors import UsageError


@pytest.mark.parametrize("length", [1, 31, 254])
def test_tag_in_config_space(export: Path, length: int) -> None:
    made = Export(str(export), "t" * length, "/run/x")
    assert made.config_space == length.to_bytes(2, "little") + b"t" * length


def test_tag_is_counted_in_bytes(export: Path) -> None:
    assert Export(str(export), "ü" * 127, "/run/x").config_space[:2] == b"\xfe\0"
    with pytest.raises(UsageError, match="--tag"):
        Export(str(export), "ü" * 128, "/run/x")


@pytest.mark.parametrize("tag", ["", "t" * 255, "a\0b"])
def test_bad_tag(export: Path, tag: str) -> None:
    with pytest.raises(UsageError, match="--tag"):
        Export(str(export), tag, "/run/x")


@pytest.mark.parametrize("length", [107, 108])
def test_length_of_the_socket_path(export: Path, length: int) -> None:
    path = "/" + "x" * (length - 1)
    if length <= 107:
        assert Export(str(export), "t", path).socket_path == path
    else:
        with pytest.raises(UsageError, match="--socket-path: 108 bytes"):
            Export(str(export), "t", path)


def test_export_that_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match=r"--export: .* is not a directory"):
        Export(str(file), "t", "/run/x")
    with pytest.raises(UsageError, match=r"--export: .* does not exist"):
        Export(str(tmp_path / "missing"), "t", "/run/x")
    with pytest.raises(UsageError, match="--export: "):
        Export(str(file / "below"), "t", "/run/x")


@pytest.mark.parametrize(
    ("group", "gid"), [(None, None), ("root", 0), ("0", 0), ("4294967294", (1 << 32) - 2)]
)
def test_group_of_the_socket(export: Path, group: str | None, gid: int | None) -> None:
    assert Export(str(export), "t", "/run/x", socket_group=group).socket_gid == gid


@pytest.mark.parametrize("group", ["", "no such", "-1", "4294967295", "\u0660", "a\0b", "\udcff"])
def test_group_that_is_none(export: Path, group: str) -> None:
    with pytest.raises(UsageError, match="--socket-group: "):
        Export(str(export), "t", "/run/x", socket_group=group)


@pytest.mark.parametrize(
    ("mode", "number"), [(None, 0o600), ("0", 0), ("7", 7), ("660", 0o660), ("000777", 0o777)]
)
def test_mode_of_the_socket(export: Path, mode: str | None, number: int) -> None:
    assert Export(str(export), "t", "/run/x", socket_mode=mode).socket_permissions == number


@pytest.mark.parametrize("mode", ["", "8", "0o660", "1777", "rw", "-1", " 660", "6 60", "\u0660"])
def test_mode_that_is_none(export: Path, mode: str) -> None:
    with pytest.raises(UsageError, match=r"--socket-mode: .* no octal number from 0 to 0777"):
        Export(str(export), "t", "/run/x", socket_mode=mode)


@pytest.mark.parametrize("option", ["socket_group", "socket_mode"])
def test_descriptor_keeps_its_group_and_mode(export: Path, option: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: .*--fd"):
        Export(str(export), "t", fd=theirs.fileno(), **{option: "0"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("log_level", "loud"), ("log_format", "xml")])
def test_bad_choice_for_the_daemon(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: '{value}' is unknown"):
        Config((), **{option: value})  # type: ignore[arg-type]
