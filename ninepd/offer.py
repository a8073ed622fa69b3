"""An export that can be served: whatever could be wrong with it is found out before it is."""

import logging
import os
from typing import Final

from ninepd import foreign, sandbox, systemd
from ninepd.capabilities import CAP_DAC_READ_SEARCH, has_capabilities, needed
from ninepd.config import MAPPED, Export, HostMounts, Multidevs, Reclaim, Sandbox
from ninepd.errors import UsageError
from ninepd.export.descriptors import budget_of
from ninepd.export.models import choose_model, make_host
from ninepd.export.tree import Tree
from ninepd.exposure import refuse_unsafe
from ninepd.listener import Listener

log = logging.getLogger(__name__)

_CLOSED: Final = -1


class Candidate:
    """An export of which all but its socket was looked at."""

    def __init__(self, export: Export, file_limit: int) -> None:
        """Hold its directory; or UsageError."""
        self.export = export
        self._budget = budget_of(file_limit)
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self._directory = os.open(export.export, flags)
        except OSError as error:
            raise UsageError(f"--export: {export.export}: {error.strerror}") from None
        try:
            self.model = choose_model(export, self._directory)
            self._host = make_host(export, self.model, self._directory)
            self.open_tree().close()
            refuse_unsafe(export, self.model, self._directory)
            self.sandbox = self._choose_sandbox()
        except BaseException:
            self.close_directory()
            raise

    def __str__(self) -> str:
        export = self.export
        readonly = ", read-only" if export.readonly else ""
        return (
            f"{export.export} as {export.tag} at {self._where}"
            f" ({self.model}, reclaim {export.reclaim}{readonly}, sandbox {self.sandbox.mode})"
        )

    @property
    def _where(self) -> str:
        """Where front ends connect, as far as that is known."""
        export = self.export
        if export.socket_path is not None:
            return export.socket_path
        return "a socket of systemd's" if export.fd is None else f"descriptor {export.fd}"

    def open_tree(self) -> Tree:
        """The directory that was found at the start, whatever has happened to its name."""
        export = self.export
        reclaim = Reclaim(export.reclaim)
        insists = reclaim is Reclaim.HANDLES
        if insists and not has_capabilities(CAP_DAC_READ_SEARCH):
            raise UsageError(
                "--reclaim: handles needs CAP_DAC_READ_SEARCH; run as root, or use names"
            )
        try:
            tree = Tree(
                os.dup(self._directory),
                self._host,
                budget=self._budget,
                reclaim=reclaim,
                multidevs=Multidevs(export.multidevs),
                kernel_filesystems=export.allow_kernel_filesystems,
            )
        except OSError as error:
            raise UsageError(f"--export: {export.export}: {error.strerror}") from None
        if insists and not tree.root.volume.by_handle:
            tree.close()
            raise UsageError(
                f"--reclaim: the file system of {export.export} cannot open files by handle; "
                "use names"
            )
        return tree

    def _choose_sandbox(self) -> sandbox.Choice:
        export = self.export
        choice = sandbox.choose(Sandbox(export.sandbox), self._rooms)
        if export.host_mounts == HostMounts.IGNORE and choice.mode is not Sandbox.NAMESPACE:
            raise UsageError(
                f"--host-mounts: sandbox {choice.mode} leaves the host's mounts; ignore goes with "
                "namespace"
            )
        # Landlock does not keep those that override permissions from modes and owners.
        weak = choice.mode is Sandbox.NONE or (
            choice.mode is Sandbox.LANDLOCK and self.capabilities
        )
        for lack in choice.lacks:
            level = logging.WARNING if weak else logging.INFO
            log.log(level, "%s: sandbox %s, %s", export.tag, choice.mode, lack)
        return choice

    @property
    def by_handle(self) -> bool:
        """May files be opened by handle?"""
        return self.export.reclaim != Reclaim.NAMES and has_capabilities(CAP_DAC_READ_SEARCH)

    @property
    def capabilities(self) -> frozenset[int]:
        """What serving it takes, once it is shut in."""
        return needed(
            as_others=self.model not in MAPPED,
            by_handle=self.by_handle,
            trusted_xattrs=self.export.trusted_xattrs,
        )

    @property
    def _rooms(self) -> sandbox.Rooms:
        return sandbox.Rooms(
            self._directory,
            self.export.readonly,
            self.export.host_mounts == HostMounts.FOLLOW,
            self.by_handle,
            self.capabilities,
        )

    def close_directory(self) -> None:
        """Nobody looks at it any more, or another process does."""
        directory, self._directory = self._directory, _CLOSED
        if directory != _CLOSED:
            os.close(directory)


class Offer(Candidate):
    """An export that can be served, with its socket."""

    def __init__(self, export: Export, file_limit: int, before: "Offer | None" = None) -> None:
        """Hold its directory, and listen; or UsageError.

        ``before``: what takes its place has the same socket; that one has none any more then.
        """
        self.listener: Listener
        super().__init__(export, file_limit)
        try:
            if before is not None and before.export.same_socket(export):
                self.listener = before.listener
                self.listener.let_in(export)
            else:
                self.listener = Listener(export)
        except BaseException:
            self.close_directory()
            raise

    @property
    def _where(self) -> str:
        return str(self.listener)

    def shut_in(self) -> None:
        """This process will serve the export, and do nothing else any more.

        Before it has a loop, which could keep ways around what follows.
        """
        systemd.connect()
        foreign.remember_mounts()
        rooms = self._rooms
        if self.sandbox.mode is not Sandbox.NONE:
            self.listener.entrust_name(self.export.tag)
        sandbox.enter(self.sandbox, rooms)
        sandbox.finish(self.sandbox, rooms)

    def close(self) -> None:
        """Another process serves it: let its descriptors go."""
        self.listener.close()
        self.close_directory()

    def withdraw(self) -> None:
        """It is served no more: nobody shall connect."""
        self.listener.remove()
        self.close_directory()
