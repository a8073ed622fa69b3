"""What the user chose, checked once. Whatever cannot work is a UsageError that names the option."""

import grp
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ninepd.activation import Activated, choose_activated
from ninepd.endpoint import Endpoint, parse_endpoint
from ninepd.errors import UsageError
from ninepd.idranges import NO_SQUASH, IdRanges, parse_ranges, parse_squash
from ninepd.limits import Limits
from ninepd.logs import Format, Level
from ninepd.syscalls import NO_ID
from ninepd.throttle import Rates

TAG_MAX: Final = 254
"""QEMU's config space has at most 256 bytes, two of them for the tag's length."""
SUN_PATH_MAX: Final = 107
"""unix(7): sun_path without its final NUL."""
DEFAULT_SOCKET_MODE: Final = "0600"
DEFAULT_FMODE: Final = "0600"
DEFAULT_DMODE: Final = "0700"
DEFAULT_POLL_US: Final = 100
_MODE: Final = re.compile(r"0*[0-7]{1,3}", re.ASCII)
AUTO: Final = "auto"
MAPPED: Final = ("mapped-xattr", "mapped-file")
MODELS: Final = (AUTO, "passthrough", *MAPPED, "none")
"""Values of --security-model; those of MAPPED keep apart what the host and the guest see."""
_ONE_SOCKET: Final = "give one of --socket-path and --fd, or have systemd give a socket"


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
class Export(Rates, Limits):
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
        self.check_limits()
        if not 0 <= self.poll_us <= 10_000:
            raise UsageError(f"--poll-us: {self.poll_us} is not between 0 and 10000")

    def same_socket(self, other: "Export") -> bool:
        """Do front ends of both connect at the same place?"""
        return (self.socket_path, self.fd) == (other.socket_path, other.fd)

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
        if self.socket_path is not None and self.fd is not None:
            raise UsageError(_ONE_SOCKET)
        if self.socket_path is not None:
            check_socket_path(self.socket_path)
            _ = self.socket_gid, self.socket_permissions  # UsageError
        elif self.fd is not None:
            if self.fd < 0:
                raise UsageError(f"--fd: {self.fd} is no descriptor")
            for name in ("socket_group", "socket_mode"):
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise UsageError(
                        f"--{option}: a socket given by --fd or systemd stays as it is; set it "
                        "where that is made"
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


def check_socket_path(path: str, option: str = "socket-path") -> None:
    """It must name a socket in the file system: an abstract one has no owner and no mode."""
    size = len(os.fsencode(path))
    if not size or "\0" in path:
        raise UsageError(f"--{option}: this is no path; name a file that is to be the socket")
    if size > SUN_PATH_MAX:
        raise UsageError(
            f"--{option}: {size} bytes are too long for a socket, {SUN_PATH_MAX} are allowed"
        )


def _gid_of(group: str) -> int:
    """A name goes before a number, as in chown(1)."""
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        if group.isascii() and group.isdigit() and int(group) < NO_ID:
            return int(group)
    raise UsageError(f"--socket-group: this host has no group {group!r}")


def _check_choice(option: str, value: str, choices: type[StrEnum]) -> None:
    if value not in set(choices):
        raise UsageError(f"--{option}: {value!r} is unknown; use one of {', '.join(choices)}")


def _as_it_is(_number: int, error: UsageError) -> UsageError:
    return error


@dataclass(frozen=True)
class Config:
    """Everything that ``ninepd serve`` needs."""

    exports: tuple[Export, ...]
    once: bool = False
    log_level: str = Level.WARNING.value
    log_format: str = Format.TEXT.value
    control_path: str | None = None
    metrics_listen: str | None = None
    placed: Callable[[int, UsageError], UsageError] = _as_it_is
    """What turns out to be wrong with an export, by its number from 1 on: says where it is."""

    def __post_init__(self) -> None:
        _check_choice("log-level", self.log_level, Level)
        _check_choice("log-format", self.log_format, Format)
        if self.control_path is not None:
            check_socket_path(self.control_path, "control-path")
        endpoint = self.metrics_endpoint
        if endpoint is not None and endpoint.path is not None:
            check_socket_path(endpoint.path, "metrics-listen")

    @property
    def metrics_endpoint(self) -> Endpoint | None:
        """Where metrics are offered; or UsageError."""
        if self.metrics_listen is None:
            return None
        return parse_endpoint("metrics-listen", self.metrics_listen)

    @property
    def watched(self) -> bool:
        """Shall somebody be able to look at what the daemon does?"""
        return self.control_path is not None or self.metrics_listen is not None


def make_export(
    values: Mapping[str, Any], activated: Sequence[Activated] | None, alone: bool
) -> Export:
    """An export of these options; one that names no socket gets its own of systemd's.

    ``activated`` is None if it is too early to say what there will be.
    """
    named = any(values.get(name) is not None for name in ("socket_path", "fd"))
    if not named and activated is not None:
        fd = choose_activated(activated, values["tag"], alone)
        if fd is None:
            raise UsageError(_ONE_SOCKET)
        values = {**values, "fd": fd}
    return Export(**values)
