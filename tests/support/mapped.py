"""What QEMU's mapped security models keep of a file, read and written as its server does."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ninepd.p9.messages import Tlcreate, Tmkdir, Tmknod, Tsymlink
from tests.support.client import Client

SIZES = {"uid": 4, "gid": 4, "mode": 4, "rdev": 8}
META = ".virtfs_metadata"
META_ROOT = ".virtfs_metadata_root"

Kept = dict[str, int]


def kept_in_xattrs(path: Path, _root: Path) -> Kept:
    found = {}
    for name, size in SIZES.items():
        try:
            value = os.getxattr(path, f"user.virtfs.{name}")
        except OSError:
            continue
        assert len(value) == size
        found[name] = int.from_bytes(value, "little")
    return found


def keep_in_xattrs(path: Path, _root: Path, **fields: int) -> None:
    for name, value in fields.items():
        os.setxattr(path, f"user.virtfs.{name}", value.to_bytes(SIZES[name], "little"))


def meta_of(path: Path, root: Path) -> Path:
    return root / META_ROOT if path == root else path.parent / META / path.name


def kept_in_files(path: Path, root: Path) -> Kept:
    try:
        text = meta_of(path, root).read_text()
    except FileNotFoundError:
        return {}
    found = {}
    for line in text.splitlines():
        name, value = line.split("=")
        found[name.removeprefix("virtfs.")] = int(value) & 0xFFFFFFFF
    return found


def keep_in_files(path: Path, root: Path, **fields: int) -> None:
    meta = meta_of(path, root)
    if path != root:
        meta.parent.mkdir(mode=0o700, exist_ok=True)
    lines = kept_in_files(path, root) | fields
    meta.write_text("".join([f"virtfs.{name}={lines[name]}\n" for name in SIZES if name in lines]))
    owner = root.stat().st_uid  # the daemon's user
    for made in {meta, meta.parent} - {root}:
        os.chown(made, owner, owner)


KEPT = {"mapped-xattr": kept_in_xattrs, "mapped-file": kept_in_files}
KEEP: dict[str, Callable[..., None]] = {
    "mapped-xattr": keep_in_xattrs,
    "mapped-file": keep_in_files,
}

KINDS = {
    "file": stat.S_IFREG,
    "node": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
}
DEVICE = {"char": (0x123, 0x45678), "block": (8, 1)}
TARGET = b"../some/where \xff"


def make(
    client: Client, fid: int, kind: str, name: bytes, mode: int, gid: int, flags: int = 0x8042
) -> Any:
    """Make something of a kind in a directory fid; its qid."""
    if kind == "file":
        client.walk(fid, 998)
        try:
            return client.rpc(Tlcreate(998, name, flags, mode, gid)).qid
        finally:
            client.clunk(998)
    if kind == "directory":
        return client.rpc(Tmkdir(fid, name, mode, gid)).qid
    if kind == "symlink":
        return client.rpc(Tsymlink(fid, name, TARGET, gid)).qid
    device = DEVICE.get(kind, (0, 0))
    return client.rpc(Tmknod(fid, name, KINDS[kind] | mode, *device, gid)).qid
