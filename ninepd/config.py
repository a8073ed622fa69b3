"""What the user chose, checked once. Whatever cannot work is a UsageError that names the option."""

import grp
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import Any, Final, get_args

from ninepd.activation import Activated, choose_activated, is_usable
from ninepd.errors import UsageError
from ninepd.idranges import NO_SQUASH, IdRanges, parse_ranges, parse_squash
from ninepd.logs import Format, Level
from ninepd.p9.limits import MAX_FIDS, MIN_FIDS, MIN_MSIZE
from ninepd.syscalls import NO_ID
from ninepd.throttle import Rates

TAG_MAX: Final = 254
"""QEMU's config space has at most 256 bytes, two of them for the tag's length."""
SUN_PATH_MAX: Final = 107
"""unix(7): sun_path without its final NUL."""
DEFAULT_SOCKET_MODE: Final = "0600"
DEFAULT_FMODE: Final = "0600"
DEFAULT_DMODE: Final = "0700"
DEFAULT_MSIZE_MAX: Final = 1 << 20
DEFAULT_POLL_US: Final = 100
_MODE: Final = re.compile(r"0*[0-7]{1,3}", re.ASCII)
AUTO: Final = "auto"
MAPPED: Final = ("mapped-xattr", "mapped-file")
MODELS: Final = (AUTO, "passthrough", *MAPPED, "none")
"""Values of --security-model; those of MAPPED keep apart what the host and the guest see."""


class Multidevs(StrEnum):
    """What to do with other devices mounted below the export (QEMU's option ``multidevs``)."""

    REMAP = "remap"
    FORBID = "forbid"
    WARN = "warn"


class Sandbox(StrEnum):
    """What the process of an export is shut in with (sandbox.py)."""

    AUTO = "auto"
    """The strongest that changes nothing for guests."""
    NAMESPACE = "namespace"
    LANDLOCK = "landlock"
    NONE = "none"


class HostMounts(StrEnum):
    """What becomes of mounts that the host makes below the export while it is served."""

    FOLLOW = "follow"
    IGNORE = "ignore"


class Reclaim(StrEnum):
    """How a file is found again whose descriptor was reclaimed because they run short."""

    AUTO = "auto"
    """By file handle where that can be done, else by name."""
    NAMES = "names"
    HANDLES = "handles"


class Writeout(StrEnum):
    """When the host is to write to the disk what guests write (QEMU's option ``writeout``)."""

    IMMEDIATE = "immediate"


@dataclass(frozen=True)
class Export(Rates):
    """One directory, offered under one tag on one vhost-user socket."""

    export: str
    tag: str
    socket_path: str | None = None
    fd: int | None = None
    socket_group: str | None = None
    socket_mode: str | None = None
    allow_uid: tuple[int, ...] = ()
    """Users whose front ends are served; none: all are."""
    security_model: str = AUTO
    map_uid: tuple[str, ...] = ()
    map_gid: tuple[str, ...] = ()
    squash_to: str | None = None
    fmode: str | None = None
    dmode: str | None = None
    readonly: bool = False
    writeout: str | None = None
    multidevs: str = Multidevs.REMAP.value
    reclaim: str = Reclaim.AUTO.value
    sandbox: str = Sandbox.AUTO.value
    host_mounts: str = HostMounts.FOLLOW.value
    allow_kernel_filesystems: bool = False
    trusted_xattrs: bool = False
    allow_unsafe_export: bool = False
    msize_max: int = DEFAULT_MSIZE_MAX
    fids_max: int = MAX_FIDS
    poll_us: int = DEFAULT_POLL_US

    def __post_init__(self) -> None:
        self._check_directory()
        check_tag(self.tag)
        self._check_socket()
        for uid in self.allow_uid:
            if not 0 <= uid < NO_ID:
                raise UsageError(f"--allow-uid: {uid} is not between 0 and {NO_ID - 1}")
        self._check_modes()
        _ = self.id_ranges  # UsageError
        if self.writeout is not None:
            _check_choice("writeout", self.writeout, Writeout)
        _check_choice("multidevs", self.multidevs, Multidevs)
        _check_choice("reclaim", self.reclaim, Reclaim)
        _check_choice("sandbox", self.sandbox, Sandbox)
        _check_choice("host-mounts", self.host_mounts, HostMounts)
        self.check_rates()
        if self.msize_max < MIN_MSIZE:
            raise UsageError(f"--msize-max: {self.msize_max} is below {MIN_MSIZE}, the least")
        if self.fids_max < MIN_FIDS:
            raise UsageError(f"--fids-max: {self.fids_max} is below {MIN_FIDS}, the least")
        if not 0 <= self.poll_us <= 10_000:
            raise UsageError(f"--poll-us: {self.poll_us} is not between 0 and 10000")

    @property
    def config_space(self) -> bytes:
        """What the guest's driver reads: length and bytes of the tag."""
        tag = os.fsencode(self.tag)
        return len(tag).to_bytes(2, "little") + tag

    @property
    def socket_gid(self) -> int | None:
        """The group of the listening socket; None leaves it to the kernel. Or UsageError."""
        return None if self.socket_group is None else _gid_of(self.socket_group)

    @property
    def socket_permissions(self) -> int:
        """The mode of the listening socket; or UsageError."""
        mode = DEFAULT_SOCKET_MODE if self.socket_mode is None else self.socket_mode
        return _permissions("socket-mode", mode)

    @property
    def file_permissions(self) -> tuple[int, int]:
        """Modes on the host of files and of directories, in mapped models; or UsageError."""
        fmode = DEFAULT_FMODE if self.fmode is None else self.fmode
        dmode = DEFAULT_DMODE if self.dmode is None else self.dmode
        return _permissions("fmode", fmode), _permissions("dmode", dmode)

    @property
    def maps_ids(self) -> bool:
        """Are the guest's users and groups not those of the host?"""
        return bool(self.map_uid or self.map_gid or self.squash_to is not None)

    @property
    def id_ranges(self) -> tuple[IdRanges, IdRanges]:
        """Which users and which groups they are; or UsageError."""
        uid = gid = NO_SQUASH
        if self.squash_to is not None:
            uid, gid = parse_squash(self.squash_to)
        users, groups = parse_ranges("map-uid", self.map_uid), parse_ranges("map-gid", self.map_gid)
        return IdRanges(users, uid), IdRanges(groups, gid)

    def _check_directory(self) -> None:
        try:
            mode = os.stat(self.export).st_mode
        except FileNotFoundError:
            raise UsageError(f"--export: {self.export} does not exist") from None
        except OSError as error:
            raise UsageError(f"--export: {self.export}: {error.strerror}") from None
        if not stat.S_ISDIR(mode):
            raise UsageError(f"--export: {self.export} is not a directory")
        if not os.access(self.export, os.R_OK | os.X_OK, effective_ids=True):
            raise UsageError(
                f"--export: {self.export} cannot be read by this user; change its mode, "
                "or run ninepd as a user who may"
            )

    def _check_modes(self) -> None:
        model = self.security_model
        if model not in MODELS:
            raise UsageError(
                f"--security-model: {model!r} is unknown; use one of {', '.join(MODELS)}"
            )
        _ = self.file_permissions  # UsageError
        if model != AUTO:
            self.check_model(model)

    def check_model(self, model: str) -> None:
        """UsageError if an option does not go with the security model that was chosen."""
        for option, mode in (("fmode", self.fmode), ("dmode", self.dmode)):
            if mode is not None and model not in MAPPED:
                raise UsageError(
                    f"--{option}: with {model} the guest's modes are the host's; "
                    f"it goes with {' and '.join(MAPPED)}"
                )
        if self.squash_to is not None and model in MAPPED:
            raise UsageError(
                f"--squash-to: with {model} all files are the daemon's own on the host; it goes "
                "with passthrough and none"
            )
        if self.trusted_xattrs and model != "passthrough":
            raise UsageError(
                f"--trusted-xattrs: with {model} guests have no such attributes; "
                "it goes with passthrough"
            )

    def _check_socket(self) -> None:
        if (self.socket_path is None) == (self.fd is None):
            raise UsageError("give one of --socket-path and --fd, or have systemd give a socket")
        if self.socket_path is not None:
            check_socket_path(self.socket_path)
            _ = self.socket_gid, self.socket_permissions  # UsageError
        elif self.fd is not None:
            _check_descriptor(self.fd)
            for name in ("socket_group", "socket_mode"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"--{_option(name)}: a socket given by --fd or systemd stays as it is; "
                        "set it where that is made"
                    )


def _permissions(option: str, mode: str) -> int:
    if not _MODE.fullmatch(mode):
        raise UsageError(f"--{option}: {mode!r} is no octal number from 0 to 0777")
    return int(mode, 8)


def check_tag(tag: str) -> None:
    """A guest must be able to mount by it, and it must fit into config space."""
    size = len(os.fsencode(tag))
    if not size:
        raise UsageError("--tag: the tag is empty; guests mount the export by it")
    if size > TAG_MAX:
        raise UsageError(f"--tag: {size} bytes are too long, config space holds {TAG_MAX}")
    if "\0" in tag:
        raise UsageError("--tag: a tag cannot contain a NUL byte")


def check_socket_path(path: str) -> None:
    """It must name a socket in the file system: an abstract one has no owner and no mode."""
    size = len(os.fsencode(path))
    if not size or "\0" in path:
        raise UsageError("--socket-path: this is no path; name a file that is to be the socket")
    if size > SUN_PATH_MAX:
        raise UsageError(
            f"--socket-path: {size} bytes are too long for a socket, {SUN_PATH_MAX} are allowed"
        )


def _gid_of(group: str) -> int:
    """A name goes before a number, as in chown(1)."""
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        if group.isascii() and group.isdigit() and int(group) < NO_ID:
            return int(group)
    raise UsageError(f"--socket-group: this host has no group {group!r}")


def _check_descriptor(fd: int) -> None:
    try:
        usable = is_usable(fd)
    except (OSError, OverflowError):
        raise UsageError(f"--fd: descriptor {fd} is not open") from None
    if not usable:
        raise UsageError(f"--fd: descriptor {fd} is no unix socket that listens or is connected")


def _check_choice(option: str, value: str, choices: type[StrEnum]) -> None:
    if value not in set(choices):
        raise UsageError(f"--{option}: {value!r} is unknown; use one of {', '.join(choices)}")


@dataclass(frozen=True)
class Config:
    """Everything that ``ninepd serve`` needs."""

    exports: tuple[Export, ...]
    once: bool = False
    log_level: str = Level.WARNING.value
    log_format: str = Format.TEXT.value

    def __post_init__(self) -> None:
        _check_choice("log-level", self.log_level, Level)
        _check_choice("log-format", self.log_format, Format)
        if not self.exports:
            raise UsageError("--config: there is no [[export]] in it")
        for at, export in enumerate(self.exports):
            check_distinct(export, self.exports[:at])


def check_distinct(export: Export, others: Iterable[Export]) -> None:
    """UsageError if one of the others has its tag or its socket."""
    for name in ("tag", "socket_path", "fd"):
        value = getattr(export, name)
        if value is not None and value in [getattr(other, name) for other in others]:
            raise UsageError(f"--{_option(name)}: {value!r} is used by two exports")


def _option(field: str) -> str:
    return field.replace("_", "-")


_TYPES: Final[dict[Any, str]] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    tuple[int, ...]: "a list of whole numbers, and not empty",
    tuple[str, ...]: "a list of strings, and not empty",
}


def make_export(values: Mapping[str, Any], activated: Sequence[Activated], alone: bool) -> Export:
    """An export of these options; one that names no socket gets its own of systemd's, if any."""
    if values.get("socket_path") is None and values.get("fd") is None:
        values = {**values, "fd": choose_activated(activated, values["tag"], alone)}
    return Export(**values)


def _values_from(table: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name: field for field in fields(Export)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"--{key}: this option is unknown")
        if name in values:
            raise UsageError(f"--{key}: it is given twice")
        default = known[name].default
        expected: Any = str if default is MISSING or default is None else type(default)
        if name == "fd":
            expected = int
        if expected is tuple:
            expected = known[name].type
            fits = _is_list_of(get_args(expected)[0], value)
            value = tuple(value) if fits else value
        else:
            fits = type(value) is expected
        if not fits:
            raise UsageError(f"--{key}: {key} must be {_TYPES[expected]}")
        values[name] = value
    for field in known.values():
        if field.default is MISSING and field.name not in values:
            raise UsageError(f"there is no {_option(field.name)}")
    return values


def _is_list_of(kind: type, value: object) -> bool:
    # An empty one would say that nobody is meant, and mean everybody.
    return isinstance(value, list) and value != [] and {type(item) for item in value} == {kind}


def load(path: str, activated: Sequence[Activated] = ()) -> tuple[Export, ...]:
    """The exports of a TOML file: tables ``[[export]]`` with the long options as keys."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        document = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"--config: {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} is not valid TOML: {error}") from None
    tables = document.pop("export", [])
    if document:
        key = next(iter(document))
        raise UsageError(f"--config: {path}: {key!r} is unknown, only [[export]] is")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"--config: {path}: write each export as a table [[export]]")
    exports: list[Export] = []
    for number, table in enumerate(tables, 1):
        try:
            export = make_export(_values_from(table), activated, alone=len(tables) == 1)
            check_distinct(export, exports)
        except UsageError as error:
            place = _place(text, number, str(error))
            raise UsageError(f"--config: {path}, {place}: {error}") from None
        exports.append(export)
    return tuple(exports)


def _place(text: str, number: int, message: str) -> str:
    """The line of an export that a message is about: the option's that it begins with, if any.

    Found by a look at how lines begin, since tomllib tells no lines; text in three quotes could
    mislead it, which is no reason for a parser.
    """
    option = re.match(r"--([\w-]+):", message)
    key = re.escape(option[1]) if option else r"(?!)"
    found, tables = 0, 0
    for at, line in enumerate(text.split("\n"), 1):
        if re.match(r"\s*\[\[\s*[\"\']?export[\"\']?\s*\]\]", line):
            tables += 1
            if tables == number:
                found = at
        elif tables == number and re.match(rf"\s*[\"\']?{key}[\"\']?\s*=", line):
            found = at
    return f"line {found} (export {number})" if found else f"export {number}"
