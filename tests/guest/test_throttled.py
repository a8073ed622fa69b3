"""Linux behind a limit: its processes wait, and can be killed."""

import signal
from pathlib import Path

from ninepd_guests.boot import Share
from tests.conftest import StartDaemon
from tests.support.guest import TAG, boot

SIGKILLED = 128 + signal.SIGKILL


def test_process_that_waits_can_be_killed(start_daemon: StartDaemon, export: Path) -> None:
    """Linux takes its request back by a Tflush, and goes on with the mount."""
    (export / "f").write_bytes(b"x" * 8192)
    daemon = start_daemon("--throttle-bps-read", "1")
    with boot("uml", [Share(TAG, daemon.socket)]) as guest:
        guest.mount(TAG)
        guest.run("dd if=/mnt/f of=/dev/null bs=4096 count=1")
        waiting = guest.start("exec dd if=/mnt/f of=/dev/null bs=4096 count=1")
        assert "f" in guest.run("ls -l /mnt && echo text > /mnt/g").text
        assert (export / "g").read_text() == "text\n"
        assert not waiting.done
        waiting.kill()
        assert waiting.wait().status == SIGKILLED
        guest.umount()
