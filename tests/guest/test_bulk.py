"""Many files, and large ones, with every cache mode and size of message."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from ninepd_guests.abi import AT_FDCWD
from tests.support.guest import Place, Station

CACHES = ("none", "mmap", "loose")
MSIZES = (8192, 131096, 512000)
DIRECTORIES = 50
FILES = 100  # in each
LARGE = 64 << 20
LIMIT = 300  # seconds; emulation on a busy machine is slow

Tree = dict[str, bytes]


def on_host(top: Path) -> Tree:
    """Path and content of every file, as the host finds them."""
    tree = {}
    for folder, _, names in os.walk(top):
        for name in names:
            path = Path(folder, name)
            tree[str(path.relative_to(top))] = path.read_bytes()
    return tree


def create(place: Place) -> Tree:
    place.guest.run(
        f"""
        cd {place.path}; umask 027; n=0; d=0
        while [ $d -lt {DIRECTORIES} ]; do
            mkdir dir$d; f=0
            while [ $f -lt {FILES} ]; do
                echo content $n > dir$d/file$f; f=$((f + 1)); n=$((n + 1))
            done
            d=$((d + 1))
        done
        """,
        timeout=LIMIT,
    )
    return {
        f"dir{d}/file{f}": f"content {d * FILES + f}\n".encode()
        for d in range(DIRECTORIES)
        for f in range(FILES)
    }


def list_in_guest(place: Place) -> dict[str, tuple[str, str, str]]:
    """Mode, owner and size of every file, as the guest lists and stats them."""
    found, folder = {}, ""
    text = place.guest.run(f"cd {place.path} && ls -lnR *", timeout=LIMIT).text
    for line in text.splitlines():
        if line.endswith(":"):
            folder = line[:-1]
        elif line.startswith("-"):
            mode, _, owner, _, size, *_, name = line.split()
            found[f"{folder}/{name}"] = mode, owner, size
    return found


def rename(place: Place) -> None:
    """Each file and each directory: fileN to wasN, dirN to oldN."""
    with place.guest.process() as process:
        process.chdir(place.path)
        names = [
            (f"dir{d}/file{f}", f"dir{d}/was{f}") for d in range(DIRECTORIES) for f in range(FILES)
        ]
        names += [(f"dir{d}", f"old{d}") for d in range(DIRECTORIES)]
        # All are on their way before the first answer is awaited.
        waiting = [
            process.submit(
                "renameat2", AT_FDCWD, f"{a}\0".encode(), AT_FDCWD, f"{b}\0".encode(), 0, path=a
            )
            for a, b in names
        ]
        for answer in waiting:
            answer.result(LIMIT)


@pytest.mark.parametrize(
    ("front", "cache"),
    [*(("uml", cache) for cache in CACHES), ("qemu-7.2", "none"), ("qemu-6.12", "loose")],
    indirect=["front"],
)
def test_five_thousand_files(station: Station, cache: str) -> None:
    with station.mounted(cache) as place:
        tree = create(place)
        assert len(tree) == 5000
        assert on_host(place.host) == tree
        listed = {name: ("-rw-r-----", "0", str(len(data))) for name, data in tree.items()}
        assert list_in_guest(place) == listed

        rename(place)
        renamed = {
            re.sub(r"dir(\d+)/file", r"old\1/was", name): data for name, data in tree.items()
        }
        assert on_host(place.host) == renamed
        with place.guest.process() as process:
            found = {
                f"{folder}/{name}"
                for folder in process.listdir(place.path)
                for name in process.listdir(f"{place.path}/{folder}")
            }
        assert found == set(renamed)

        place.guest.run(f"rm -r {place.path}/old*", timeout=LIMIT)
        assert list(place.host.iterdir()) == []
        assert place.guest.run(f"ls -A {place.path}").text == ""


@pytest.mark.parametrize("msize", MSIZES)
@pytest.mark.parametrize("front", ["uml", "qemu-7.2"], indirect=True)
def test_one_directory_of_five_thousand(station: Station, msize: int) -> None:
    with station.mounted(msize=msize) as place:
        names = {f"{number:04}-{'x' * (number % 240)}" for number in range(5000)}
        for name in names:
            (place.host / name).touch()
        with place.guest.process() as process:
            found = process.listdir(place.path)
        assert len(found) == 5000
        assert set(found) == names


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("large") / "file"
    path.write_bytes(os.urandom(LARGE))
    return path, sha256(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize(
    ("front", "cache", "msize"),
    [
        *(("uml", cache, msize) for cache in CACHES for msize in MSIZES),
        ("qemu-7.2", "none", 512000),
        ("qemu-7.2", "mmap", 131096),
        ("qemu-6.12", "none", 131096),
        ("qemu-6.12", "mmap", 8192),
        ("qemu-6.12", "loose", 512000),
    ],
    indirect=["front"],
)
def test_64_mib_both_ways(
    station: Station, cache: str, msize: int, large: tuple[Path, str]
) -> None:
    source, wanted = large
    with station.mounted(cache, msize) as place:
        options = place.guest.run("grep ' /mnt 9p ' /proc/mounts").text
        assert f"msize={msize}" in options or msize == 131096, options
        shutil.copyfile(source, place.host / "in")
        seen = place.guest.run(
            f"cp {place.path}/in /tmp/copy && sha256sum < /tmp/copy", timeout=LIMIT
        )
        assert seen.text.split()[0] == wanted, "what the guest reads is not what the host wrote"
        place.guest.run(f"cp /tmp/copy {place.path}/out && sync && rm /tmp/copy", timeout=LIMIT)
        assert sha256(place.host / "out") == wanted, "the host does not read what the guest wrote"
