"""Coming and going: mounts, reboots, crashes, new front ends, and the end of the daemon."""

import signal
import time
from pathlib import Path

import pytest

from ninepd_guests.boot import Share
from ninepd_guests.errors import GuestError
from tests.conftest import StartDaemon
from tests.support.guest import TAG, Station, boot, check
from tests.support.waiting import eventually

UML_AND_QEMU = ("uml", "qemu-7.2")


def test_mount_again_and_again(station: Station) -> None:
    with station.mounted():
        pass
    before = station.daemon.descriptors()
    for cache in ("none", "mmap", "loose", "none"):
        for msize in (8192, 32768, 131096, 512000):
            with station.mounted(cache, msize) as place:
                place.guest.run(f"cd {place.path} && mkdir -p a/b && echo x > a/b/c && cat a/b/c")
                assert (place.host / "a" / "b" / "c").read_text() == "x\n"
    assert station.daemon.descriptors() == before


def test_a_killed_process_leaves_nothing_open(station: Station) -> None:
    with station.mounted() as place:
        mounted = station.daemon.descriptors()
        with place.guest.process() as process:
            for number in range(50):
                process.open(f"{place.path}/{number}", 0o102)
            assert station.daemon.descriptors() >= mounted + 50
        eventually(
            lambda: station.daemon.descriptors() <= mounted,
            "the descriptors of a killed process are closed",
        )


@pytest.mark.parametrize("front", UML_AND_QEMU, indirect=True)
@pytest.mark.parametrize("daemons", [1, 2])
def test_two_exports_in_one_guest(
    front: str, daemons: int, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    work, tools = tmp_path / "work", tmp_path / "tools"
    for path in (work, tools):
        path.mkdir()
        (path / "file").write_text(path.name)
    sockets = [str(tmp_path / "w"), str(tmp_path / "t")]
    if daemons == 2:
        start_daemon(socket=sockets[0], export=str(work), tag="work")
        start_daemon("--readonly", socket=sockets[1], export=str(tools), tag="tools")
    else:
        config = tmp_path / "ninepd.toml"
        config.write_text(
            f"""
            [[export]]
            export = "{work}"
            tag = "work"
            socket-path = "{sockets[0]}"

            [[export]]
            export = "{tools}"
            tag = "tools"
            socket-path = "{sockets[1]}"
            readonly = true
            """
        )
        start_daemon(config=str(config))
    with boot(front, [Share("work", sockets[0]), Share("tools", sockets[1])]) as guest:
        guest.mount("work", "/data")
        guest.mount("tools", "/tools")
        assert guest.run("cat /data/file /tools/file").text == "worktools"
        guest.run("cp /tools/file /data/copy && echo changed > /data/file")
        refusals = (
            "touch /tools/new",
            "echo x > /tools/file",
            "mkdir /tools/dir",
            "rm /tools/file",
            "mv /tools/file /tools/other",
            "ln -s x /tools/link",
            "ln /tools/file /tools/hard",
            "chmod 600 /tools/file",
            "touch -d @0 /tools/file",
        )
        for refusal in refusals:
            result = guest.run(refusal, check=False)
            assert result.status != 0, refusal
            assert "Read-only file system" in result.text, f"{refusal}: {result.text}"
        guest.umount("/data")
        assert guest.run("cat /tools/file").text == "tools"
        guest.mount("work", "/data")
    assert sorted(path.name for path in tools.iterdir()) == ["file"]
    assert (tools / "file").read_text() == "tools"
    assert (work / "copy").read_text() == "tools"
    assert (work / "file").read_text() == "changed\n"


@pytest.mark.parametrize(
    ("front", "hard"), [("uml", False), ("qemu-7.2", False), ("qemu-7.2", True)], indirect=["front"]
)
def test_the_guest_reboots(front: str, hard: bool, start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon()
    with boot(front, [Share(TAG, daemon.socket)]) as guest:
        guest.mount(TAG)
        check(guest, export, "before")
        resting = daemon.descriptors()
        busy = guest.start("exec 5> /mnt/held; while :; do cat /mnt/before > /mnt/busy; done")
        eventually(lambda: (export / "busy").exists(), "the guest is at work", 20)
        guest.reboot(hard=hard)
        with pytest.raises(GuestError):
            busy.wait()
        guest.mount(TAG)
        check(guest, export, "after")
        assert daemon.descriptors() <= resting, "files of before the reboot are still open"


@pytest.mark.parametrize("front", UML_AND_QEMU, indirect=True)
def test_one_front_end_after_another(front: str, start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon()
    resting = daemon.descriptors()
    for number, end in enumerate(("off", "crash", "off")):
        guest = boot(front, [Share(TAG, daemon.socket)])
        try:
            guest.mount(TAG)
            check(guest, export, f"file{number}")
            assert guest.run("ls /mnt | wc -l").text.strip() == str(number + 1)
            if end == "off":
                guest.close()
        finally:
            guest.kill()
        eventually(lambda: daemon.descriptors() <= resting, "all of the front end is let go")


def test_from_one_kind_of_front_end_to_the_other(start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon()
    for number, front in enumerate(("uml", "qemu-7.2", "uml")):
        with boot(front, [Share(TAG, daemon.socket)]) as guest:
            guest.mount(TAG, msize=512000)
            check(guest, export, f"file{number}")


@pytest.mark.parametrize("front", UML_AND_QEMU, indirect=True)
def test_sigterm_while_the_guest_works(front: str, start_daemon: StartDaemon, export: Path) -> None:
    daemon = start_daemon()
    guest = boot(front, [Share(TAG, daemon.socket)])
    try:
        guest.mount(TAG, msize=512000)
        for name in ("one", "two"):
            guest.start(
                f"while :; do dd if=/dev/zero of=/mnt/{name} bs=1M count=8; sync; "
                f"cat /mnt/{name} > /dev/null; ls /mnt; done > /dev/null 2>&1"
            )
        eventually(lambda: (export / "two").exists(), "the guest is at work", 20)
        time.sleep(0.5)
        start = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.wait(10)
        took = time.monotonic() - start
        assert daemon.stop() == 0, daemon.log
        assert took < 2, f"{took:.1f} s"
        assert not Path(daemon.socket).exists()
    finally:
        guest.kill()


def test_the_dirty_rate_is_measured_below_a_mounted_guest(
    start_daemon: StartDaemon, export: Path
) -> None:
    """QEMU switches the dirty log on and off, and aborts when it is refused.

    The rate itself is 0 under TCG, whatever the guest writes.
    """
    daemon = start_daemon()
    (export / "data").write_bytes(bytes(16 << 20))
    with boot("qemu-7.2", [Share(TAG, daemon.socket)]) as guest:
        guest.mount(TAG, msize=512000)
        for turn in range(2):
            read = "dd if=/mnt/data of=/dev/null bs=16M"
            reading = guest.start(f"while {read}; do touch /mnt/busy{turn}; done 2> /dev/null")
            busy = export / f"busy{turn}"
            eventually(busy.exists, "it reads", 30)
            guest.qmp("calc-dirty-rate", calc_time=1, mode="dirty-bitmap")
            eventually(
                lambda: guest.qmp("query-dirty-rate")["status"] == "measured",
                "QEMU measures the rate",
                60,
            )
            busy.unlink()
            eventually(busy.exists, "it goes on", 30)
            reading.kill()
            reading.wait()
            check(guest, export, f"after{turn}")
    assert "refused" not in daemon.log
