"""What a guest relies on, as plain data: to go on in another process that has the same descriptors.

``dump`` is taken while no request is out. ``load`` makes the same of it, given a tree on the same
root: fids, open files, handles and where they were found, values of extended attributes, locks and
the cookies of directories. Descriptors are named by their numbers, so the other process has to have
the descriptor table, as after fork(2) or execve(2), or when it was handed all of them.
"""

from dataclasses import dataclass, field

from ninepd.export.handles import Handle, HandleTable, Hint, Opened
from ninepd.export.tree import Tree
from ninepd.export.volumes import Survey
from ninepd.ops.fid import Fid, XattrValue, XattrWriter
from ninepd.ops.guest import Guest
from ninepd.ops.ranges import Owner, Range
from ninepd.p9.messages import LockType
from ninepd.p9.session import Dialect
from ninepd.syscalls import Stat

NONE = -1
"""No descriptor, or no index."""


@dataclass(frozen=True, slots=True)
class VolumeState:
    """A volume and the descriptor of its mount."""

    mnt_id: int
    dev: int
    kind: str
    mount_fd: int


@dataclass(frozen=True, slots=True)
class HandleState:
    """An inode; ``directory`` and ``name`` say where it was found."""

    fd: int
    volume: int
    ino: int
    generation: int
    kind: int
    file_handle: bytes
    known: bool
    directory: int
    name: bytes
    followed: bool


@dataclass(frozen=True, slots=True)
class FileState:
    """An open file or directory; of a directory also how far it was read."""

    fd: int
    handle: int
    flags: int
    read_offset: int
    read_position: int


@dataclass(frozen=True, slots=True)
class FidState:
    """A fid, by ``file`` if it is open, or one of the two kinds of extended attributes."""

    number: int
    uid: int
    attached: bool
    handle: int
    directory: int
    name: bytes
    file: int
    value: bytes | None = None
    writer: tuple[bytes, int, int, bytes] | None = None


@dataclass(frozen=True, slots=True)
class LockState:
    """Ranges: start, end, type, proc_id, client_id, number of the fid."""

    file: int
    ranges: list[tuple[int, int, int, int, bytes, int]]


@dataclass(frozen=True, slots=True)
class GuestState:
    """All of it. Indices are those of the lists here."""

    dialect: bytes
    msize: int
    root: int
    """The descriptor to make the tree of."""
    devices: dict[int, int]
    volumes: list[VolumeState] = field(default_factory=list)
    handles: list[HandleState] = field(default_factory=list)
    """The root is the first, and each is behind the directory that it was found in."""
    files: list[FileState] = field(default_factory=list)
    fids: list[FidState] = field(default_factory=list)
    locks: list[LockState] = field(default_factory=list)
    cookies: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """By handle: the first number, and the positions that have one."""


def dump(guest: Guest) -> GuestState:
    """The state of a guest none of whose requests is out."""
    return _Dump(guest).state


class _Dump:
    def __init__(self, guest: Guest) -> None:
        tree, session = guest.tree, guest.session
        self.state = GuestState(
            session.dialect.value, session.msize, tree.root.fd, tree.qids.dump()
        )
        self._volumes: dict[tuple[int, int], int] = {}
        self._handles: dict[Handle, int] = {}
        self._files: dict[Opened, int] = {}
        numbers: dict[Fid, int] = {}
        self._handle(tree.root)
        for number, fid in session.fids.items():
            numbers[fid] = number
            self.state.fids.append(self._fid(number, fid))
        for file, ranges in guest.locks.dump():
            plain = [
                (held.start, held.end, int(held.type), *held.owner, numbers[held.fid])
                for held in ranges
            ]
            self.state.locks.append(LockState(self._file(file), plain))

    def _volume(self, handle: Handle) -> int:
        volume = handle.volume
        key = (volume.mount.mnt_id, volume.dev)
        index = self._volumes.setdefault(key, len(self._volumes))
        if index == len(self.state.volumes):
            self.state.volumes.append(VolumeState(*key, volume.kind, volume.mount.fd))
        return index

    def _handle(self, handle: Handle) -> int:
        # A loop, because the chain of directories may be long.
        chain: list[Handle] = []
        above: Handle | None = handle
        while above is not None and above not in self._handles:
            chain.append(above)
            above = above.directory
        for new in reversed(chain):
            self._add_handle(new)
        return self._handles[handle]

    def _add_handle(self, handle: Handle) -> None:
        directory, name = self._hint(handle.hint)
        volume = handle.volume
        self._handles[handle] = len(self._handles)
        self.state.handles.append(
            HandleState(
                fd=handle.peek,
                volume=self._volume(handle),
                ino=handle.ino,
                generation=handle.generation,
                kind=handle.kind,
                file_handle=handle.file_handle,
                known=volume.handles.get(handle.ino) is handle,
                directory=directory,
                name=name,
                followed=handle.followed,
            )
        )

    def _hint(self, hint: Hint | None) -> tuple[int, bytes]:
        return (NONE, b"") if hint is None else (self._handles[hint[0]], hint[1])

    def _file(self, file: Opened) -> int:
        index = self._files.setdefault(file, len(self._files))
        if index == len(self.state.files):
            handle = self._handle(file.handle)
            self.state.files.append(
                FileState(file.peek, handle, file.flags, file.read_offset, file.read_position)
            )
            if file.cookies is not None:
                self.state.cookies[handle] = file.cookies.dump()
        return index

    def _fid(self, number: int, fid: Fid) -> FidState:
        if fid.own_hint is not None:
            self._handle(fid.own_hint[0])
        handle = self._handle(fid.handle)
        opened = fid.opened
        writer = None
        if isinstance(opened, XattrWriter):
            writer = (opened.name, opened.size, opened.flags, bytes(opened.data))
        return FidState(
            number,
            fid.uid,
            fid.attached,
            handle,
            *self._hint(fid.own_hint),
            file=self._file(opened) if isinstance(opened, Opened) else NONE,
            value=opened.data if isinstance(opened, XattrValue) else None,
            writer=writer,
        )


def load(guest: Guest, state: GuestState) -> None:
    """A fresh guest becomes what was dumped. Its tree is fresh, too, and made of ``state.root``."""
    tree = guest.tree
    tree.qids.load(state.devices)
    guest.session.dialect = Dialect(state.dialect)
    guest.session.msize = state.msize
    handles = _load_handles(tree, state)
    files = [_load_file(tree, handles[file.handle], file) for file in state.files]
    for index, (base, positions) in state.cookies.items():
        handles[index].begin_listing(guest.limits.cookies_max).load(base, positions)
    for fid in state.fids:
        _load_fid(guest, handles, files, fid)
    for lock in state.locks:
        ranges = [
            Range(start, end, LockType(kind), Owner(proc_id, client), guest.session.get(number))
            for start, end, kind, proc_id, client, number in lock.ranges
        ]
        guest.locks.load(files[lock.file], ranges)
    for handle in handles:  # the reference that it was made with
        tree.handles.release(handle)


def _load_handles(tree: Tree, state: GuestState) -> list[Handle]:
    """With one reference to each."""
    table = tree.handles
    surveys = [Survey(volume.kind, volume.mount_fd) for volume in state.volumes]
    _load_root_mount(tree, state.volumes[state.handles[0].volume].mount_fd)
    handles = [table.share(tree.root)]
    for old in state.handles[1:]:
        volume = state.volumes[old.volume]
        stat = Stat(volume.dev, old.ino, volume.mnt_id, old.generation, old.kind, 1, 0, False)
        handle = table.revive(old.fd, stat, old.file_handle, old.known, surveys[old.volume])
        if old.directory != NONE:
            handle.set_hint(table.share(handles[old.directory]), old.name)
            handle.followed = old.followed
        handles.append(handle)
    return handles


def _load_root_mount(tree: Tree, fd: int) -> None:
    """The old descriptor takes the place of the one that the new tree has opened."""
    mount = tree.root.volume.mount
    mount.fd, surplus = fd, mount.fd
    if surplus >= 0:
        tree.host.close(surplus)


def _load_file(tree: Tree, handle: Handle, state: FileState) -> Opened:
    file = Opened(handle, state.fd, state.flags, tree.reopen)
    file.read_offset, file.read_position = state.read_offset, state.read_position
    return file


def _load_fid(guest: Guest, handles: list[Handle], files: list[Opened], state: FidState) -> None:
    table: HandleTable = guest.tree.handles
    own_hint = None
    if state.directory != NONE:
        own_hint = table.share(handles[state.directory]), state.name
    fid = guest.add(state.number, table.share(handles[state.handle]), state.uid, own_hint)
    fid.attached = state.attached
    if state.file != NONE:
        fid.opened = files[state.file]
    elif state.value is not None:
        fid.opened = XattrValue(state.value)
    elif state.writer is not None:
        name, size, flags, data = state.writer
        fid.opened = XattrWriter(name, size, flags, bytearray(data))
    if state.value is not None or state.writer is not None:
        guest.xattr_fids += 1
