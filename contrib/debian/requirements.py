"""Where the Python packages come from that ninepd needs: from Debian, where its are new enough.

Prints those that are not, for pip. The others become ${ninepd:Depends}.
"""

import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement

SUBSTVARS = Path("debian/ninepd.substvars")
NAMES = {"cffi": "python3-cffi-backend"}  # what programs built by cffi need, and not all of it

with Path("pyproject.toml").open("rb") as file:
    wanted = [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]
debian = {
    found.metadata["Name"].lower().replace("_", "-"): found.version
    for found in distributions(path=["/usr/lib/python3/dist-packages"])
}
depends = []
for requirement in wanted:
    version = debian.get(requirement.name)
    if version is None or version not in requirement.specifier:
        sys.stdout.write(f"{requirement}\n")
        continue
    package = NAMES.get(requirement.name, f"python3-{requirement.name}")
    (least,) = requirement.specifier
    depends.append(f"{package} (>= {least.version})")
with SUBSTVARS.open("a") as file:
    file.write(f"ninepd:Depends={', '.join(depends)}\n")
