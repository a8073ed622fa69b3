"""Debian packages without installing them: a private apt whose state is in our cache folder.

The host's packages, lists and users do not matter, and nothing needs root. The mirror and its
settings (a proxy, say) are the host's own; only the suites are ours.
"""

import os
import platform
import re
import subprocess
import time

from .cache import cache_dir, locked, say
from .errors import GuestError
from .progress import fetching

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = {
    "bookworm": ("bookworm", "bookworm-updates"),
    "trixie": ("trixie", "trixie-updates", "trixie-backports"),
}
SUITE = re.compile(r"[a-z]+(-updates)?")  # of a host: not the security archive
FRESH = 3600.0  # seconds that package lists are believed


def command(
    arguments: list[str],
    *,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 900,
) -> str:
    """Standard output of a host command; a failure carries its last words."""
    try:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise GuestError(f"the program {arguments[0]} is missing: install it") from error
    except subprocess.TimeoutExpired as error:
        raise GuestError(f"{' '.join(arguments)} did not end within {timeout:.0f} s") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-2000:]
        raise GuestError(f"{' '.join(arguments)} failed ({done.returncode}):\n{words}")
    return done.stdout


def mirror() -> str:
    """The Debian mirror that this host uses."""
    chosen = os.environ.get("NINEPD_DEBIAN_MIRROR")
    if chosen:
        return chosen
    fields = "$(CREATED_BY)|$(COMPONENT)|$(RELEASE)|$(ORIGIN)|$(REPO_URI)"
    found = []
    for line in command(["apt-get", "indextargets", "--format", fields]).splitlines():
        kind, component, release, origin, uri = line.split("|")
        # Before the first "apt-get update" of this host the origin is not known.
        known = origin == "Debian"
        plausible = known or origin in ("", "$(ORIGIN)")
        if (kind, component) == ("Packages", "main") and plausible and SUITE.fullmatch(release):
            found.append((known, uri))
    if not found:
        raise GuestError(
            "this host's apt has no Debian mirror: set NINEPD_DEBIAN_MIRROR to the URI of one"
        )
    return max(found, key=lambda candidate: candidate[0])[1]


class Archive:
    """One Debian release with its updates and backports, for guests of one architecture."""

    def __init__(self, release: str = "trixie", architecture: str = "amd64") -> None:
        if platform.machine() != "x86_64":
            raise GuestError("guests are for x86_64 hosts only: run this on one")
        if not os.path.exists(KEYRING):
            raise GuestError(f"{KEYRING} is missing: install the package debian-archive-keyring")
        self.suites = SUITES[release]
        self.architecture = architecture
        name = f"apt-{release}" + ("" if architecture == "amd64" else f"-{architecture}")
        self.root = os.path.join(cache_dir(), name)
        self.lock = name
        self.config = os.path.join(self.root, "apt.conf")
        with locked(self.lock):
            self._prepare()

    def _prepare(self) -> None:
        lists = os.path.join(self.root, "lists")
        for folder in (f"{lists}/partial", f"{self.root}/archives/partial", f"{self.root}/none"):
            os.makedirs(folder, exist_ok=True)
        # Nothing is installed: every dependency down to libc is fetched, and the result does not
        # depend on the host.
        self._write("status", "")
        uri = mirror()
        sources = [f"deb [signed-by={KEYRING}] {uri} {suite} main\n" for suite in self.suites]
        self._write("sources.list", "".join(sources))
        host = [
            line
            for line in command(["apt-config", "dump"]).splitlines()
            if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")
        ]
        paths = {
            "Dir::State": self.root, "Dir::State::lists": lists,
            "Dir::State::status": f"{self.root}/status", "Dir::Cache": self.root,
            "Dir::Etc": f"{self.root}/none", "Dir::Etc::parts": f"{self.root}/none",
            "Dir::Etc::preferencesparts": f"{self.root}/none",
            "Dir::Etc::sourceparts": f"{self.root}/none",
            "Dir::Etc::sourcelist": f"{self.root}/sources.list",
            # apt drops from root to a user who could not write here, and locks the host's dpkg.
            "APT::Sandbox::User": "root", "Debug::NoLocking": "true",
            "APT::Architecture": self.architecture, "APT::Install-Recommends": "false",
            "Acquire::Check-Valid-Until": "false", "Acquire::Retries": "3",
        }  # fmt: skip
        ours = [f'{name} "{value}";' for name, value in paths.items()]
        ours.append(f'APT::Architectures {{ "{self.architecture}"; }};')
        self._write("apt.conf", "\n".join([*host, *ours, ""]))
        stamp = os.path.join(self.root, "updated")
        if not os.path.exists(stamp) or time.time() - os.stat(stamp).st_mtime > FRESH:
            self._run("apt-get", "update", "-q", "--error-on=any")
            self._write("updated", "")

    def _write(self, name: str, text: str) -> None:
        path = os.path.join(self.root, name)
        with open(f"{path}.new", "w") as file:
            file.write(text)
        os.replace(f"{path}.new", path)  # another process may be reading the old one

    def _run(self, *arguments: str, cwd: str | None = None) -> str:
        return command(list(arguments), cwd=cwd, env={"APT_CONFIG": self.config})

    def search(self, pattern: str) -> list[str]:
        """Names that match the regular expression, oldest version in the name first."""
        lines = self._run("apt-cache", "search", "--names-only", pattern).splitlines()
        return sorted((line.split(" ")[0] for line in lines), key=natural)

    def series(self, wanted: str, pattern: str) -> list[str]:
        """Names of the kernel series ``wanted``, or, if Debian has dropped it, of the next newer.

        ``pattern`` matches a whole name; its first group is the series, behind a plain prefix.
        Oldest version first.
        """
        found: dict[str, list[str]] = {}
        for name in self.search(f"^{pattern.split('(')[0]}"):
            if match := re.fullmatch(pattern, name):
                found.setdefault(match[1], []).append(name)
        newer = sorted((s for s in found if natural(s) >= natural(wanted)), key=natural)
        if not newer:
            raise GuestError(f"Debian {self.suites[-1]} has no kernel {wanted} or newer any more")
        if newer[0] != wanted:
            say(f"Debian has dropped kernel {wanted}: {newer[0]} takes its place")
        return found[newer[0]]

    def depends(self, package: str) -> list[str]:
        lines = self._run("apt-cache", "depends", "--important", package).splitlines()
        return [line.split("Depends: ")[1] for line in lines if "Depends: " in line]

    def download(self, packages: list[str], folder: str) -> list[str]:
        """These packages alone, as .deb files in the folder."""
        os.makedirs(folder, exist_ok=True)
        return self._fetch(folder, "download", *packages)

    def download_closure(self, package: str, folder: str) -> list[str]:
        """The package with all that it depends on."""
        os.makedirs(os.path.join(folder, "partial"), exist_ok=True)
        archives = f"Dir::Cache::archives={folder}"
        return self._fetch(folder, "install", "-y", "--download-only", "-o", archives, package)

    def _fetch(self, folder: str, *arguments: str) -> list[str]:
        apt = ["apt-get", "-q", "-t", self.suites[-1], *arguments]
        with locked(self.lock):
            planned = self._run(*apt, "--print-uris", cwd=folder)
            # 'URI' NAME SIZE HASH
            sizes = re.findall(r"^'\S+' \S+ (\d+)", planned, re.MULTILINE)
            with fetching(folder, sum(map(int, sizes))):
                self._run(*apt, cwd=folder)
        return _debs(folder)


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key by which 6.12 comes after 6.9."""
    return [(int(number or -1), word) for number, word in re.findall(r"(\d+)|(\D+)", text)]


def _debs(folder: str) -> list[str]:
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if n.endswith(".deb")]


def unpack(debs: list[str], folder: str) -> None:
    """The packages' files, owned by whoever runs this; no maintainer script runs."""
    os.makedirs(folder, exist_ok=True)
    for deb in debs:
        command(["dpkg-deb", "--extract", deb, folder])
