"""The configuration file: whatever is wrong in it is said with its line, table and key."""

from dataclasses import fields
from pathlib import Path

import pytest

from ninepd.config import Config, Export
from ninepd.configfile import ConfigFile, load
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
    (loaded,) = load(write(tmp_path, good)).exports
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
        "xattrs-max": "100",
        "locks-max": "10",
        "cookies-max": "10000",
        "workers-max": "8",
        "poll-us": "0",
        **THROTTLE,
    }
    text = good + "".join(f"{key} = {value}\n" for key, value in more.items())
    (loaded,) = load(write(tmp_path, text)).exports
    named = {"export", "tag", "socket-path", "fd", "squash-to", *more}
    assert named == {field.name.replace("_", "-") for field in fields(Export)}
    assert (loaded.security_model, loaded.readonly) == ("mapped-xattr", True)
    assert (loaded.msize_max, loaded.fids_max, loaded.xattrs_max) == (8192, 1000, 100)
    assert (loaded.locks_max, loaded.cookies_max, loaded.workers_max) == (10, 10_000, 8)
    assert loaded.poll_us == 0
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
    assert load(write(tmp_path, text)).exports[0].trusted_xattrs
    text = f'{good}security-model = "none"\nsquash-to = "1000:100"\n'
    users, groups = load(write(tmp_path, text)).exports[0].id_ranges
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
        ("msize-max = 4095", "line 5 (export 1): --msize-max: 4095 is not between 4096"),
        ("msize-max = -1", "--msize-max"),
        ("fids-max = 15", "line 5 (export 1): --fids-max: 15 is not between 16"),
        ("fids-max = 1e6", "fids-max must be a whole number"),
        ("fids-max = 4294967296", "--fids-max: 4294967296 is not between 16 and 4294967295"),
        ("workers-max = 1025", "line 5 (export 1): --workers-max: 1025 is not between 2 and 1024"),
        ('locks-max = "10"', "locks-max must be a whole number"),
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
        ("", "config.toml: there is no [[export]] in it"),
        ("tag = 'x'\n", "line 1: --tag: this is an option of exports; write it into [defaults]"),
        ("[[exports]]\n", "line 1 (exports): --exports: this table is unknown"),
        ("[default]\n", "line 1 (default): --default: this table is unknown"),
        ("[[defaults]]\n", "line 1 (defaults): write it as a table [defaults]"),
        ("\ncolour = 1\n", "line 2: --colour: this option is unknown"),
        ("\nonce = 1\n", "line 2: --once: once must be true or false"),
        ("log-level = 'loud'\n", "line 1: --log-level: 'loud' is unknown"),
        ("log_format = 'xml'\n", "line 1: --log-format: 'xml' is unknown"),
        ("[[export]]\nonce = true\n", "line 2 (export 1): --once: this is an option of the daemon"),
        ("config = 'x'\n", "line 1: --config: this option is unknown"),
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


def test_keys_of_the_daemon(tmp_path: Path, good: str) -> None:
    """By the same names as its options, above the tables."""
    config = load(write(tmp_path, good))
    assert (config.once, config.log_level, config.log_format) == (False, "warning", "text")
    above = 'once = true\nlog-level = "error"\nlog-format = "json"\n'
    config = load(write(tmp_path, above + good))
    assert (config.once, config.log_level, config.log_format) == (True, "error", "json")
    above += 'control-path = "/c"\nmetrics-listen = "[::1]:9564"\n'
    config = load(write(tmp_path, above + good))
    assert (config.control_path, config.metrics_listen) == ("/c", "[::1]:9564")
    named = {line.split(" ")[0].replace("-", "_") for line in above.splitlines()}
    assert named | {"exports", "placed"} == {field.name for field in fields(Config)}


# Defaults


def with_defaults(good: str, defaults: str, more: str = "") -> str:
    """A file whose [defaults] begin on its second line, and its export behind them."""
    return f"once = true\n[defaults]\n{defaults}\n{good}{more}"


def test_defaults_are_for_exports_that_do_not_set_them(
    tmp_path: Path, good: str, export: Path
) -> None:
    second = '[[export]]\ntag = "two"\nsocket-path = "/s"\nmsize-max = 9999\nreadonly = false\n'
    defaults = f'export = "{export}"\nmsize_max = 8192\nreadonly = true\nallow-uid = [0, 7]'
    config = load(write(tmp_path, with_defaults(good, defaults, second)))
    one, two = config.exports
    assert (one.msize_max, one.readonly, one.allow_uid) == (8192, True, (0, 7))
    assert (two.msize_max, two.readonly, two.allow_uid) == (9999, False, (0, 7))
    assert two.export == str(export)


@pytest.mark.parametrize(
    ("defaults", "more", "place"),
    [
        ("colour = 1", "", "line 3 (defaults): --colour: this option is unknown"),
        ("readonly = 1", "readonly = true", "line 3 (defaults): --readonly: readonly must be"),
        (
            "log-level = 'info'",
            "",
            "line 3 (defaults): --log-level: this is an option of the daemon",
        ),
        ("msize-max = 1", "", "line 3 (defaults, for export 1): --msize-max: 1 is not between"),
        ("fmode = '0640'", "security-model = 'none'", "line 3 (defaults, for export 1): --fmode"),
        ("security-model = 'none'", "fmode = '0640'", "line 8 (export 1): --fmode: with none"),
        ("socket_mode = 'x'", "", "line 3 (defaults, for export 1): --socket-mode: 'x' is no"),
    ],
)
def test_place_of_what_is_wrong_with_defaults(
    tmp_path: Path, good: str, defaults: str, more: str, place: str
) -> None:
    path = write(tmp_path, with_defaults(good, defaults, more))
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value).startswith(f"--config: {path}, {place}")


def test_defaults_that_an_export_sets_anew_are_not_looked_at(tmp_path: Path, good: str) -> None:
    load(write(tmp_path, with_defaults(good, "msize-max = 1", "msize-max = 8192\n")))


# All that is wrong


def test_all_problems_are_found(tmp_path: Path, good: str) -> None:
    text = (
        f"colour = 1\n[defaults]\nfmode = '0640'\n{good}poll-us = 'x'\nfids-max = 'x'\n"
        "[[export]]\nexport = '/nowhere'\ntag = 't'\nsocket-path = '/s'\n"
        "[[export]]\nexport = '/'\n"
    )
    path = write(tmp_path, text)
    assert ConfigFile(path, ()).problems == [
        f"{path}, line 1: --colour: this option is unknown",
        f"{path}, line 8 (export 1): --poll-us: poll-us must be a whole number",
        f"{path}, line 9 (export 1): --fids-max: fids-max must be a whole number",
        f"{path}, line 11 (export 2): --export: /nowhere does not exist",
        f"{path}, line 14 (export 3): there is no tag",
    ]


def test_what_is_wrong_with_defaults_is_not_said_of_each_export(tmp_path: Path, good: str) -> None:
    (problem,) = ConfigFile(write(tmp_path, with_defaults(good, "tag = 1")), ()).problems
    assert "(defaults)" in problem
