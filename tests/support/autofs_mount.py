"""An automounter for one directory, as systemd's is.

``python tests/support/autofs_mount.py DIRECTORY``: whoever enters the directory first waits until a
tmpfs is mounted there, with a file ``inside``. Says ``ready`` when it watches, and ``asked`` when
somebody waits; then it mounts after a line on its standard input. It must have a process group of
its own, which the kernel lets through.
"""

import ctypes
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

PACKET_SIZE: Final = 304
TOKEN: Final = slice(8, 12)
"""Of struct autofs_v5_packet (linux/auto_fs.h)."""
IOC_READY: Final = 0x9360


def main() -> None:
    target = Path(sys.argv[1])
    requests, kernel_end = os.pipe()
    options = f"fd={kernel_end},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"test", bytes(target), b"autofs", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    os.close(kernel_end)
    root = os.open(target, os.O_RDONLY)
    print("ready", flush=True)  # noqa: T201
    while packet := os.read(requests, PACKET_SIZE):
        print("asked", flush=True)  # noqa: T201
        sys.stdin.readline()
        subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
        (target / "inside").write_text("text")
        fcntl.ioctl(root, IOC_READY, int.from_bytes(packet[TOKEN], sys.byteorder))


if __name__ == "__main__":
    main()
