"""Configuration: whatever cannot work is refused with one sentence that names the option."""

import os
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ninepd.config import Config, Export, load
from ninepd.errors import UsageError

GOOD = '[[export]]\nexport = "{export}"\ntag = "one"\nsocket-path = "{export}.sock"\n'


@pytest.fixture
def good(export: Path) -> str:
    return GOOD.format(export=export)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def test_minimal_file(tmp_path: Path, export: Path, good: str) -> None:
    (loaded,) = load(write(tmp_path, good))
    assert loaded == Export(str(export), "one", f"{export}.sock")


THROTTLE = {
    **{
        f"throttle-{unit}-{direction}{part}": str(value)
        for unit in ("bps", "iops")
        for direction, values in (("total", (0, 0, 1)), ("read", (5, 5, 1)), ("write", (7, 70, 3)))
        for part, value in zip(("", "-max", "-max-length"), values, strict=True)
    },
    "throttle-iops-size": "4096",
}


def test_every_option_can_stand_in_the_file(tmp_path: Path, export: Path, good: str) -> None:
    """By the same name as on the command line, with dashes."""
    more = {
        "socket-group": '"0"',
        "socket-mode": '"0660"',
        "allow-uid": "[0, 4321]",
        "security-model": '"mapped-xattr"',
        "map-uid": '["0:100000:65536", "70000:1:1"]',
        "map-gid": '["0:100000:65536"]',
        "fmode": '"0640"',
        "dmode": '"0750"',
        "readonly": "true",
        "writeout": '"immediate"',
        "multidevs": '"forbid"',
        "reclaim": '"handles"',
        "sandbox": '"landlock"',
        "host-mounts": '"ignore"',
        "allow-kernel-filesystems": "true",
        "trusted-xattrs": "false",
        "allow-unsafe-export": "true",
        "msize-max": "8192",
        "fids-max": "1000",
        "poll-us": "0",
        **THROTTLE,
    }
    text = good + "".join(f"{key} = {value}\n" for key, value in more.items())
    (loaded,) = load(write(tmp_path, text))
    named = {"export", "tag", "socket-path", "fd", "squash-to", *more}
    assert named == {field.name.replace("_", "-") for field in fields(Export)}
    assert (loaded.security_model, loaded.readonly) == ("mapped-xattr", True)
    assert (loaded.msize_max, loaded.fids_max, loaded.poll_us) == (8192, 1000, 0)
    assert (loaded.socket_gid, loaded.socket_permissions) == (0, 0o660)
    assert loaded.allow_uid == (0, 4321)
    assert (loaded.fmode, loaded.dmode) == ("0640", "0750")
    assert loaded.id_ranges[0].ranges == ((0, 100000, 65536), (70000, 1, 1))
    assert loaded.id_ranges[1].ranges == ((0, 100000, 65536),)
    assert (loaded.multidevs, loaded.reclaim) == ("forbid", "handles")
    assert (loaded.sandbox, loaded.host_mounts) == ("landlock", "ignore")
    assert loaded.writeout == "immediate"
    assert loaded.rate("iops", "write") == (7, 70, 3)
    assert loaded.throttle_iops_size == 4096
    assert loaded.allow_kernel_filesystems
    assert not loaded.trusted_xattrs
    text = f'{good}security-model = "passthrough"\ntrusted-xattrs = true\n'
    assert load(write(tmp_path, text))[0].trusted_xattrs
    text = f'{good}security-model = "none"\nsquash-to = "1000:100"\n'
    users, groups = load(write(tmp_path, text))[0].id_ranges
    assert (users.squash, groups.squash) == (1000, 100)
    assert loaded.allow_unsafe_export


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("colour = 1", "colour"),
        ("readonly = 1", "readonly must be true or false"),
        ('readonly = "true"', "readonly must be true or false"),
        ('msize-max = "8192"', "msize-max must be a whole number"),
        ("msize-max = true", "msize-max must be a whole number"),
        ("msize-max = 8192.5", "msize-max must be a whole number"),
        ("msize-max = 4095", "line 5 (export 1): --msize-max: 4095 is below 4096"),
        ("msize-max = -1", "--msize-max"),
        ("fids-max = 15", "line 5 (export 1): --fids-max: 15 is below 16"),
        ("fids-max = 1e6", "fids-max must be a whole number"),
        ("poll-us = -1", "--poll-us"),
        ("poll-us = 10001", "--poll-us"),
        ("security-model = 5", "security-model must be a string"),
        ("allow-uid = 5", "allow-uid must be a list of whole numbers"),
        ("allow-uid = []", "allow-uid must be a list of whole numbers, and not empty"),
        ("allow-uid = [0, true]", "allow-uid must be a list of whole numbers"),
        ('allow-uid = ["root"]', "allow-uid must be a list of whole numbers"),
        ("allow-uid = [-1]", "line 5 (export 1): --allow-uid: -1 is not between 0 and 4294967294"),
        ("allow-uid = [0, 4294967295]", "--allow-uid: 4294967295"),
        ('map-uid = "0:1:1"', "map-uid must be a list of strings"),
        ("map-uid = [0]", "map-uid must be a list of strings"),
        ("map-gid = []", "map-gid must be a list of strings, and not empty"),
        ('map-gid = ["0:1"]', "line 5 (export 1): --map-gid: '0:1' is not GUEST:HOST:COUNT"),
        ("squash-to = 1000", "squash-to must be a string"),
        ('squash-to = "me"', "line 5 (export 1): --squash-to: 'me' is not UID"),
        ("socket-mode = 660", "socket-mode must be a string"),
        ("socket-mode = 0o660", "socket-mode must be a string"),
        ('socket-mode = "0888"', "line 5 (export 1): --socket-mode: '0888' is no octal number"),
        ("socket-group = 5", "socket-group must be a string"),
        ('socket-group = "no such"', "line 5 (export 1): --socket-group: this host has no group"),
        ("fd = 5", "one of --socket-path and --fd"),
        ('fd = "5"', "fd must be a whole number"),
        ("throttle-bps-total = 1.5", "throttle-bps-total must be a whole number"),
        ("throttle-bps-total = 1\nthrottle-bps-read = 1", "line 6 (export 1): --throttle-bps-read"),
        ("tag = [", "not valid TOML"),
        ('tag = "again"', "not valid TOML"),
    ],
)
def test_bad_line(tmp_path: Path, good: str, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^--|^give") as caught:
        load(write(tmp_path, good + line + "\n"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[export]\n", "[[export]]"),
        ("export = 5\n", "[[export]]"),
        ("export = [1]\n", "[[export]]"),
        ("tag = 'x'\n", "config.toml: 'tag' is unknown"),
        ("[[exports]]\n", "'exports' is unknown"),
        ("[[export]]\ntag = 'x'\nsocket-path = '/x'\n", "no export"),
        ("[[export]]\nexport = '/'\nsocket-path = '/x'\n", "no tag"),
        ("[[export]]\nexport = '/'\ntag = 'x'\n", "--socket-path"),
        ("\ufeff[[export]]\nnonsense", "TOML"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("poll-us = 'x'\n", 11, "poll-us must be a whole number"),
        ("  'poll-us'  = -1\n", 11, "--poll-us: -1"),
        ("# poll-us = 1\nreadonly = 5\n", 12, "readonly must be true or false"),
        ("socket_path = 5\n", 11, "given twice"),
        ("colour = 1\n", 11, "--colour: this option is unknown"),
        ("fd = 5\n", 7, "one of --socket-path and --fd"),
    ],
)
def test_place_of_what_is_wrong(
    tmp_path: Path, good: str, export: Path, text: str, place: int, words: str
) -> None:
    """File, table and line; the table's if the fault is none of one line."""
    second = f'\n# another\n [[export]]\ntag = "two"\nexport = "{export}"\nsocket-path = "/s"\n'
    path = write(tmp_path, good + second + text)
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value).startswith(f"--config: {path}, line {place} (export 2): ")
    assert words in str(caught.value)


@pytest.mark.parametrize(("line", "place"), [("tag", 6), ("socket-path", 7)])
def test_place_of_what_two_exports_share(
    tmp_path: Path, good: str, export: Path, line: str, place: int
) -> None:
    values = {"tag": "two", "socket-path": "/two"}
    values[line] = {"tag": "one", "socket-path": f"{export}.sock"}[line]
    text = "".join(f'{key} = "{value}"\n' for key, value in values.items())
    with pytest.raises(UsageError, match=rf"line {place} \(export 2\): --{line}: .* two exports"):
        load(write(tmp_path, f'{good}[[export]]\n{text}export = "{export}"\n'))


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="TOML"):
        load(str(path))


def test_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config: .*No such file"):
        load(str(tmp_path / "missing.toml"))
    with pytest.raises(UsageError, match=r"--config: .*directory"):
        load(str(tmp_path))


def test_no_export_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no \\[\\[export\\]\\]"):
        Config(load(write(tmp_path, "")))


@pytest.mark.parametrize("same", ["tag", "socket_path"])
def test_exports_that_get_in_each_others_way(export: Path, same: str) -> None:
    values: dict[str, Any] = {"export": str(export)}
    first = Export(**values, tag="a", socket_path="/run/a")
    other = {"tag": "b", "socket_path": "/run/b", same: getattr(first, same)}
    with pytest.raises(UsageError, match="used by two exports"):
        Config((first, Export(**values, **other)))


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


def test_descriptor(export: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        assert Export(str(export), "t", fd=sock.fileno()).fd == sock.fileno()
    with socket.socket(socket.AF_INET) as sock, pytest.raises(UsageError, match="no unix socket"):
        Export(str(export), "t", fd=sock.fileno())
    with (tmp_path / "f").open("w") as file, pytest.raises(UsageError, match="no unix socket"):
        Export(str(export), "t", fd=file.fileno())
    unused = os.dup(0)
    os.close(unused)
    for fd in (unused, -1, 1 << 40):
        with pytest.raises(UsageError, match="--fd"):
            Export(str(export), "t", fd=fd)


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
