"""The command line: options in, a Config out. The only printing and exiting."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Final, NoReturn, TypeVar

import click

from ninepd import __version__, checking, config, configfile, doctor, qemu, supervisor
from ninepd.activation import Activated, refuse_unused, take_activated
from ninepd.control.client import Client, ControlError
from ninepd.control.names import name_of
from ninepd.control.pairs import Pairs
from ninepd.errors import UsageError
from ninepd.limits import Limits
from ninepd.logs import Format, Level, start_logging
from ninepd.process import open_standard_descriptors, write_error

USAGE_ERROR: Final = 2
CANNOT_SERVE: Final = 1
CAPABILITIES: Final = {"type": "9p", "features": []}
"""QEMU's docs/interop/vhost-user.json, VhostUserBackendCapabilities."""

HELP: Final = {"help_option_names": ["-h", "--help"]}
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any] | click.Command)
NO_GUESTS: Final = (
    "the demo needs ninepd-guests: install it from a checkout with pip install ./guests"
)

NO_RICH: Final = "top needs rich: install it with pip install 'ninepd[top]'"


def _fail(message: str) -> NoReturn:
    write_error(f"ninepd: {message}")
    sys.exit(USAGE_ERROR)


def _run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; whatever the user got wrong is one line and exit status 2."""
    open_standard_descriptors()
    try:
        result = command.main(arguments, name, standalone_mode=False)
    except click.UsageError as error:
        _fail(error.format_message())
    except click.exceptions.Abort:
        sys.exit(130)
    except UsageError as error:
        _fail(str(error))
    sys.exit(result if isinstance(result, int) else 0)


def main() -> NoReturn:
    """Entry point of ``ninepd``."""
    _run(cli, "ninepd")


def vhost_user_9p() -> NoReturn:
    """Entry point of ``vhost-user-9p``: the same daemon under QEMU's backend-program conventions.

    Those name --socket-path, --fd and --print-capabilities; the rest are options of ``serve``.
    """
    name = "vhost-user-9p"
    if "--print-capabilities" in sys.argv[1:]:  # whatever else stands there
        _run(cli, name, ["--print-capabilities"])
    command = copy(serve)
    command.params = list(serve.params)
    command.context_settings = {**serve.context_settings, **HELP}
    _run(_asking_options(name)(command), name)


def _print_capabilities(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(json.dumps(CAPABILITIES))
        context.exit()


def _asking_options(name: str) -> Callable[[_Decorated], _Decorated]:
    """Those of a program, which then does nothing else."""

    def decorate(command: _Decorated) -> _Decorated:
        capabilities = click.option(
            "--print-capabilities",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_capabilities,
            help="Print what this back end is, as JSON, and exit.",
        )
        return click.version_option(__version__, prog_name=name)(capabilities(command))

    return decorate


@click.group(context_settings=HELP)
@_asking_options("ninepd")
def cli() -> None:
    """Serve host directories to virtual machines as 9P2000.L over vhost-user."""


def _limit_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            f"--{name}-max",
            type=int,
            metavar=metavar,
            default=getattr(Limits, f"{name}_max"),
            show_default=True,
            help=text,
        )
        for name, metavar, text in (
            ("msize", "BYTES", "Largest 9P message to agree on."),
            ("fids", "N", "Files that a guest may refer to at once, at about 370 bytes each."),
            ("xattrs", "N", "Extended attributes that it may have open, at up to 64 KiB each."),
            ("locks", "N", "Ranges of bytes that it may lock."),
            ("cookies", "N", "Positions to remember of each directory that is being listed."),
            ("workers", "N", "Threads for what waits for storage, half for one file system."),
        )
    ]


def _throttle_options() -> list[Callable[..., Any]]:
    options = []
    for unit, what in (("bps", "bytes"), ("iops", "operations")):
        for direction, verb in (("total", "read and write"), ("read", "read"), ("write", "write")):
            name = f"--throttle-{unit}-{direction}"
            for suffix, metavar, default, text in (
                ("", "N", 0, f"Let guests {verb} files by N {what} a second at most; 0: any."),
                ("-max", "N", 0, "The same in a burst."),
                ("-max-length", "SECONDS", 1, "How long such a burst may be."),
            ):
                option = click.option(
                    name + suffix,
                    type=int,
                    metavar=metavar,
                    default=default,
                    show_default=True,
                    help=text,
                )
                options.append(option)
    option = click.option(
        "--throttle-iops-size",
        type=int,
        metavar="BYTES",
        default=0,
        show_default=True,
        help="Count a larger operation as several; 0: as one.",
    )
    return [*options, option]


def _export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--socket-path", metavar="PATH", help="Listen on this unix socket."),
        click.option(
            "--fd", type=int, metavar="N", help="Use this open socket, listening or connected."
        ),
        click.option(
            "--socket-group",
            metavar="GROUP",
            help="Give the listening socket to this group, a name or a number.",
        ),
        click.option(
            "--socket-mode",
            metavar="OCTAL",
            help=f"Mode of the listening socket, {config.DEFAULT_SOCKET_MODE} by default.",
        ),
        click.option(
            "--allow-uid",
            type=int,
            multiple=True,
            metavar="UID",
            help="Serve front ends of this user only; may be repeated.",
        ),
        click.option("--export", metavar="DIR", help="The directory to serve."),
        click.option("--tag", metavar="TAG", help="The name that the guest mounts it by."),
        click.option(
            "--security-model",
            metavar="|".join(config.MODELS),
            default=config.AUTO,
            show_default=True,
            help="passthrough: owners and modes are real (needs root). mapped-xattr: they are kept "
            "in extended attributes, for the guest alone, as QEMU does it. mapped-file: the same "
            "in files. none: as far as this user may. auto: the first of these that can be done.",
        ),
        click.option(
            "--map-uid",
            multiple=True,
            metavar="GUEST:HOST:COUNT",
            help="COUNT users from number GUEST on in the guest are those from HOST on here, and "
            "no others are known there; may be repeated.",
        ),
        click.option(
            "--map-gid",
            multiple=True,
            metavar="GUEST:HOST:COUNT",
            help="The same of groups.",
        ),
        click.option(
            "--squash-to",
            metavar="UID[:GID]",
            help="What users of the guest without such a number create belongs to UID here.",
        ),
        click.option(
            "--fmode",
            metavar="MODE",
            help="With mapped models, the mode on the host of files that the guest creates, in "
            f"octal digits, {config.DEFAULT_FMODE} by default.",
        ),
        click.option(
            "--dmode",
            metavar="MODE",
            help=f"The same of directories, {config.DEFAULT_DMODE} by default.",
        ),
        click.option("--readonly", is_flag=True, help="Let the guest change nothing."),
        click.option(
            "--writeout",
            metavar="|".join(config.Writeout),
            help="immediate: the disk begins with what guests write at once, so that few dirty "
            "pages gather in the host's cache; by default the host's kernel chooses when.",
        ),
        click.option(
            "--multidevs",
            metavar="|".join(config.Multidevs),
            default="remap",
            show_default=True,
            help="Other devices mounted below DIR: remap inode numbers so that they stay unique, "
            "warn that they may not be, or forbid to enter.",
        ),
        click.option(
            "--reclaim",
            metavar="|".join(config.Reclaim),
            default="auto",
            show_default=True,
            help="When descriptors run short, find files again by handles (needs "
            "CAP_DAC_READ_SEARCH), by their names if they still are the same files, or auto: by "
            "handles where that can be done, else by names.",
        ),
        click.option(
            "--sandbox",
            metavar="|".join(config.Sandbox),
            default="auto",
            show_default=True,
            help="Shut the daemon in. namespace: DIR is all that it can reach (as root, or by a "
            "user namespace). landlock: DIR is all that it can read or write. none: neither. "
            "auto: the strongest that changes nothing for guests.",
        ),
        click.option(
            "--host-mounts",
            metavar="|".join(config.HostMounts),
            default="follow",
            show_default=True,
            help="What the host mounts below DIR later: follow shows it to guests, ignore does not "
            "(with namespace).",
        ),
        click.option(
            "--allow-kernel-filesystems",
            is_flag=True,
            help="Serve procfs, sysfs and the like below DIR, too: through them a guest can change "
            "the host, and this daemon.",
        ),
        click.option(
            "--trusted-xattrs",
            is_flag=True,
            help="Let guests set extended attributes trusted.* and all of security.*, too; the "
            "daemon keeps CAP_SYS_ADMIN for that.",
        ),
        click.option(
            "--allow-unsafe-export",
            is_flag=True,
            help="As root, serve a DIR that other users can reach: by a setuid program or a device "
            "node that a guest makes there they become root.",
        ),
        *_limit_options(),
        click.option(
            "--poll-us",
            type=int,
            metavar="N",
            default=config.DEFAULT_POLL_US,
            show_default=True,
            help="Wait at most N microseconds actively for the next request, then sleep.",
        ),
        *_throttle_options(),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _configuration(
    context: click.Context,
    path: str | None,
    single: dict[str, Any],
    daemon: dict[str, Any],
    activated: Sequence[Activated],
) -> config.Config:
    """One export by its options; or a file, and options of the daemon go before what that says."""
    if path is not None:
        _refuse_beside_file(_given(context, single))
        return replace(configfile.load(path, activated), **_given(context, daemon))
    return config.Config((_single_export(single, activated),), **daemon)


def _given(context: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Those that are no defaults."""
    default = click.core.ParameterSource.DEFAULT
    return {
        name: value
        for name, value in values.items()
        if context.get_parameter_source(name) is not default
    }


def _refuse_beside_file(given: Iterable[str]) -> None:
    for name in given:
        option = name.replace("_", "-")
        raise UsageError(f"--config: give --{option} in the file, or no --config")


def _single_export(single: dict[str, Any], activated: Sequence[Activated] | None) -> config.Export:
    for option in ("export", "tag"):
        if single[option] is None:
            raise UsageError(f"--{option} is missing")
    return config.make_export(single, activated, alone=True)


@cli.command(context_settings={"auto_envvar_prefix": "NINEPD"})
@_export_options
@click.option(
    "--config",
    "config_path",
    envvar="NINEPD_CONFIG",
    metavar="FILE",
    help="Serve the exports of a TOML file.",
)
@click.option("--once", is_flag=True, help="Exit when the first front end has left.")
@click.option(
    "--log-level",
    metavar="|".join(Level),
    default=Level.WARNING.value,
    show_default=True,
    help="error and warning: what needs attention. info: what is served where, and who comes and "
    "goes, too. debug: every message, too.",
)
@click.option("-v", "--verbose", is_flag=True, help="Short for --log-level info.")
@click.option("--trace", is_flag=True, help="Short for --log-level debug.")
@click.option(
    "--log-format",
    metavar="|".join(Format),
    default=Format.TEXT.value,
    show_default=True,
    help="text: lines on standard error. json: an object on each. journal: systemd's journal, with "
    "priorities and fields.",
)
@click.option(
    "--control-path",
    metavar="PATH",
    help="Show what is going on in a tree of files, over 9P2000 on this unix socket (ninepd stats, "
    "ninepd fids, ninepd ctl).",
)
@click.option(
    "--metrics-listen",
    metavar="ADDR:PORT|unix:PATH",
    help="Offer metrics for Prometheus by HTTP at this address, which must be loopback.",
)
@click.pass_context
def serve(
    context: click.Context,
    /,
    config_path: str | None,
    once: bool,
    log_level: str,
    verbose: bool,
    trace: bool,
    log_format: str,
    control_path: str | None,
    metrics_listen: str | None,
    **single: Any,
) -> None:
    """Serve a directory to the guests that connect, one at a time."""
    daemon = {
        "once": once,
        "log_level": log_level,
        "log_format": log_format,
        "control_path": control_path,
        "metrics_listen": metrics_listen,
    }

    def read(activated: Sequence[Activated]) -> config.Config:
        chosen = _configuration(context, config_path, single, daemon, activated)
        if verbose or trace:
            chosen = replace(chosen, log_level=(Level.DEBUG if trace else Level.INFO).value)
        return chosen

    activated = take_activated()
    chosen = read(activated)
    refuse_unused(activated, [export.fd for export in chosen.exports])
    status = supervisor.serve(chosen, read if config_path is not None else None)
    # A worker that hangs on dead storage must not keep the process (Python would join it).
    logging.shutdown()
    os._exit(status)


@cli.command("check-config")
@click.argument("file", metavar="FILE")
def check_config(file: str) -> int:
    """Say what would be served by a TOML file, or all that is wrong with it.

    As the user who will serve it. Nothing is served, and sockets are not looked at.
    """
    start_logging(Level.WARNING, Format.TEXT)
    served, problems = checking.check(file)
    for problem in problems:
        write_error(f"ninepd: {problem}")
    if problems:
        return USAGE_ERROR
    click.echo(f"{file}: OK, {len(served)} export{'s' if len(served) > 1 else ''}")
    for line in served:
        click.echo(f"  {line}")
    return 0


@cli.command("doctor", context_settings={"auto_envvar_prefix": "NINEPD"})
@_export_options
@click.option(
    "--config",
    "config_path",
    envvar="NINEPD_CONFIG",
    metavar="FILE",
    help="Look at the exports of a TOML file.",
)
@click.option(
    "--qemu",
    "qemu_program",
    metavar="PROGRAM",
    help="The QEMU to be used; else that of this processor in PATH.",
)
@click.option(
    "--qemu-user",
    metavar="USER",
    help="The user whom QEMU runs as; else that of libvirt, if there is one.",
)
@click.pass_context
def diagnose(
    context: click.Context,
    /,
    config_path: str | None,
    qemu_program: str | None,
    qemu_user: str | None,
    **single: Any,
) -> int:
    """Try what serving takes, on this host and as this user.

    Each line is a finding, what follows from it, and what helps. With the options of an export, or
    a file, that is looked at, too. Nothing is served. The exit status is 1 if something forbids it.
    """
    start_logging(Level.ERROR, Format.TEXT)
    given = _given(context, single)
    exports: tuple[config.Export, ...] = ()
    problems: list[str] = []
    if config_path is not None:
        _refuse_beside_file(given)
        file = configfile.ConfigFile(config_path, activated=None)
        exports, problems = tuple(file.exports.values()), file.problems
    elif given:
        try:
            exports = (_single_export(single, None),)
        except UsageError as error:
            problems = [str(error)]
    status = 0
    for finding in doctor.examine(exports, problems, qemu_program, qemu_user):
        click.echo(str(finding))
        if finding.level is doctor.Level.ERROR:
            status = CANNOT_SERVE
    return status


def _control_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--control-path",
        metavar="PATH",
        envvar="NINEPD_CONTROL_PATH",
        required=True,
        help="The socket that the daemon was given by the same option.",
    )(command)


@cli.command
@click.argument("tag", required=False)
@_control_option
def stats(tag: str | None, control_path: str) -> None:
    """Show what the exports of a running daemon have counted, or that of TAG."""
    with Client(control_path) as client:
        for name in client.names("exports") if tag is None else [name_of(tag)]:
            if tag is None:
                click.echo(f"export {name}")
            click.echo(client.read("exports", name, "stats"), nl=tag is None)


@cli.command
@click.argument("tag")
@_control_option
def fids(tag: str, control_path: str) -> None:
    """List what the guest of an export holds."""
    with Client(control_path) as client:
        click.echo(client.read("exports", name_of(tag), "fids"), nl=False)


@cli.command
@click.argument("tag")
@_control_option
@click.option(
    "--type", "types", multiple=True, metavar="TYPE", help="Such requests only: Twalk. Repeatable."
)
@click.option(
    "--fid", "fids", type=int, multiple=True, metavar="N", help="On this fid only. Repeatable."
)
@click.option("--path", metavar="PATH", help="On this file, or below this directory, only.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after so many lines.")
def trace(
    tag: str,
    control_path: str,
    types: tuple[str, ...],
    fids: tuple[int, ...],
    path: str | None,
    count: int | None,
) -> None:
    """Follow the requests of the guest of an export: a line for each, when it is answered."""
    pairs = Pairs(types, fids, path)
    with Client(control_path) as client:
        lines = client.follow("exports", name_of(tag), "trace")
        for line in islice(chain.from_iterable(map(pairs.lines, lines)), count):
            click.echo(line)


@cli.command
@_control_option
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="From one look to the next.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after so many looks.")
def top(control_path: str, interval: float, count: int | None) -> None:
    """Show live what the exports of a running daemon do."""
    # Nothing that serves needs what draws this.
    try:
        from ninepd.control.top import show
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        raise UsageError(NO_RICH) from None
    show(control_path, interval, count)


@cli.command
@click.argument("word", metavar="COMMAND")
@_control_option
def ctl(word: str, control_path: str) -> None:
    """Have a running daemon do something: reload."""
    with Client(control_path) as client:
        try:
            client.write(word.encode(), "ctl")
        except ControlError:
            raise ControlError(client.read("ctl").decode().strip()) from None
        click.echo(client.read("ctl"), nl=False)


@cli.command("qemu-args", context_settings={"auto_envvar_prefix": "NINEPD"})
@click.option("--socket-path", metavar="PATH", help="The socket that ninepd listens on.")
@click.option("--tag", metavar="TAG", help="The tag that ninepd was given.")
@click.option(
    "--config",
    "config_path",
    envvar="NINEPD_CONFIG",
    metavar="FILE",
    help="For the exports of a TOML file.",
)
@click.option(
    "--memory", metavar="SIZE", default="1G", show_default=True, help="Size of the guest's memory."
)
@click.option(
    "--machine",
    metavar="TYPE",
    default="q35",
    show_default=True,
    help="QEMU machine type: q35, pc, virt or microvm.",
)
def qemu_args(
    socket_path: str | None, tag: str | None, config_path: str | None, memory: str, machine: str
) -> None:
    """Print the QEMU arguments that put a guest in front of ninepd.

    QEMU must be 10.2 or newer. Start ninepd first.
    """
    if config_path is not None:
        pairs = []
        for export in configfile.load(config_path).exports:
            if export.socket_path is None:
                raise UsageError(f"--config: export {export.tag!r} has --fd, and QEMU needs a path")
            pairs.append((export.socket_path, export.tag))
    else:
        if socket_path is None or tag is None:
            raise UsageError("give --socket-path and --tag, or --config")
        pairs = [(socket_path, tag)]
    click.echo(shlex.join(qemu.arguments(pairs, memory, machine)))


@cli.command(
    context_settings={"auto_envvar_prefix": "NINEPD", "ignore_unknown_options": True},
)
@click.argument("directory", required=False, metavar="[DIR]")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--uml", is_flag=True, help="Boot User-Mode Linux instead of QEMU.")
def demo(directory: str | None, command: tuple[str, ...], uml: bool) -> int:
    """Boot a throw-away guest with DIR on /mnt, for a shell or for COMMAND.

    Without DIR, show in a guest what ninepd is for.
    """
    # Guests are not needed to serve: their code is a distribution of its own, loaded only here.
    try:
        import ninepd_guests.demo as show
    except ModuleNotFoundError as error:
        if error.name != "ninepd_guests":
            raise
        raise UsageError(NO_GUESTS) from None
    if directory is None:
        return show.tour(uml)
    if not os.path.isdir(directory):
        raise UsageError(f"DIR: {directory} is not a directory")
    return show.visit(directory, command, uml)
