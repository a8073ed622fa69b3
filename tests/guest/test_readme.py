"""The first share of the README, word by word but for the guest, which here is User-Mode Linux."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from ninepd_guests.boot import Share, boot_uml
from tests.conftest import OTHER_USER
from tests.support.waiting import eventually

README = (Path(__file__).parents[2] / "README.md").read_text()


def lines_of(title: str) -> list[str]:
    """What is to be typed in a section."""
    _, _, rest = README.partition(f"\n## {title}\n")
    section, _, _ = rest.partition("\n## ")
    return re.findall(r"^    (\S.*)$", section, re.MULTILINE)


def test_first_share(other_user: tuple[str, ...], tmp_path: Path) -> None:
    make, serve, qemu, mount, *_ = lines_of("A first share")
    home = tmp_path / "home"
    home.mkdir()
    command = shlex.join([*other_user, sys.executable, "-m", "ninepd"])
    # As that user; who need not be able to start Python from a shell of his own.
    shell = f'ninepd() {{ {command} "$@"; }}; id() {{ {shlex.join(other_user)} id "$@"; }};'
    env = os.environ | {"HOME": str(home)}
    subprocess.run(["bash", "-ec", make], check=True, env=env)
    for folder in (home, home / "project"):
        os.chown(folder, OTHER_USER, OTHER_USER)
    (arguments,) = re.findall(r"\$\((ninepd.*?)\) ", qemu)
    printed = subprocess.check_output(["bash", "-ec", shell + arguments], text=True, env=env)
    assert f"path={home}/project.sock" in printed
    daemon = subprocess.Popen(
        ["bash", "-ec", f"{shell}{serve} wait"], env=env, start_new_session=True
    )
    try:
        socket = home / "project.sock"
        eventually(socket.exists, "ninepd listens", 60)
        (home / "project/host").write_text("of the host\n")
        with boot_uml([Share("project", str(socket))]) as guest:
            guest.run(f"{mount} && cat /mnt/host && echo x > /mnt/guest && umount /mnt")
            (line,) = lines_of("In fstab")
            guest.run(f"echo '{line}' > /etc/fstab && mount -a")
            assert guest.run("stat -c '%u %n' /mnt/guest").text == "0 /mnt/guest\n"
            guest.run("umount /mnt")
        assert (home / "project/guest").read_text() == "x\n"
        assert (home / "project/guest").stat().st_uid == OTHER_USER
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait()
