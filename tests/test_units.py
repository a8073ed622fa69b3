"""The units of contrib/systemd under a real systemd."""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ninepd.p9.messages import Tmkdir, Tmknod, Tsetattr, Twrite
from tests.support.client import ROOT, Client, send
from tests.support.pid1 import Systemd, missing
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    if why := missing():
        pytest.skip(why)
    systemd = Systemd(tmp_path_factory.mktemp("systemd"))
    systemd.path("/srv/guests").mkdir(mode=0o700)
    yield systemd
    systemd.stop()


def configure(systemd: Systemd, name: str, *tags: str) -> Path:
    """Exports without sockets; returns the folder of the last."""
    text = ""
    for tag in tags:
        folder = f"/srv/guests/{tag}"
        text += f'[[export]]\nexport = "{folder}"\ntag = "{tag}"\n'
        systemd.path(folder).mkdir()
        systemd.path(f"{folder}/{tag}").touch()
    systemd.path(f"/etc/ninepd/{name}.toml").write_text(text)
    return systemd.path(folder)


def names(systemd: Systemd, socket: str) -> set[bytes]:
    with Client(str(systemd.path(socket))) as client:
        client.attach()
        return client.names(ROOT)


def test_first_connection_starts_it(systemd: Systemd) -> None:
    configure(systemd, "first", "first")
    systemd.control("start", "ninepd@first.socket")
    assert systemd.show("ninepd@first.service", "ActiveState") == "inactive"
    path = systemd.path("/run/ninepd/first.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with Client(str(path)) as client:
        client.attach()
        assert client.names(ROOT) == {b"first"}
        status = systemd.show("ninepd@first.service", "StatusText")
        assert status.startswith(
            "Serving /srv/guests/first as first at /run/ninepd/first.sock (pass"
        )
        assert status.endswith("sandbox namespace): 1 front end connected")
    systemd.control("stop", "ninepd@first.socket", "ninepd@first.service")
    assert systemd.show("ninepd@first.service", "Result") == "success"
    assert not path.exists()


def make_program(client: Client) -> None:
    """folder/program, of another user's and setuid; fid 2."""
    client.rpc(Tmkdir(ROOT, b"folder", 0o755, 0))
    client.walk(ROOT, 1, b"folder")
    client.create(1, 2, b"program")
    assert client.write(2, 0, b"data") == 4
    client.rpc(Tsetattr(2, 0x06, 0, 1234, 1235, 0, 0, 0, 0, 0))
    client.rpc(Tsetattr(2, 0x01, 0o6755, 0, 0, 0, 0, 0, 0, 0))


def test_what_the_hardening_leaves_to_guests(systemd: Systemd) -> None:
    """Owners, device nodes of all kinds, set-ID bits: they are those of the host."""
    folder = configure(systemd, "guest", "guest")
    systemd.control("start", "ninepd@guest.socket")
    with Client(str(systemd.path("/run/ninepd/guest.sock"))) as client:
        client.attach()
        for name, kind in ((b"block", stat.S_IFBLK), (b"char", stat.S_IFCHR)):
            client.rpc(Tmknod(ROOT, name, kind | 0o600, 250, 7, 0))
        make_program(client)
    for node in ("block", "char"):
        assert (folder / node).stat().st_rdev == os.makedev(250, 7)
    program = (folder / "folder/program").stat()
    assert (program.st_uid, program.st_gid, program.st_mode & 0o7777) == (1234, 1235, 0o6755)


def test_stop_under_load(systemd: Systemd) -> None:
    """What was answered is there, and the service has ended well."""
    folder = configure(systemd, "load", "load")
    systemd.control("start", "ninepd@load.socket")
    answered = 0
    with Client(str(systemd.path("/run/ninepd/load.sock"))) as client:
        client.attach()
        client.create(ROOT, 1, b"file")

        def write_on() -> None:
            nonlocal answered
            with contextlib.suppress(TimeoutError):
                while True:
                    write = Twrite(1, answered * 8, 8)
                    client.finish(send(client, write, b"%8d" % answered), timeout=1)
                    answered += 1

        writer = threading.Thread(target=write_on)
        writer.start()
        eventually(lambda: answered > 100, "its writes")
        systemd.control("stop", "ninepd@load.service")
        writer.join()
    written = (folder / "file").read_bytes()
    assert written.startswith(b"".join(b"%8d" % number for number in range(answered)))
    assert systemd.show("ninepd@load.service", "Result") == "success"
    assert systemd.show("ninepd@load.service", "ExecMainStatus") == "0"
    # The socket listens still: the next one starts it again.
    assert names(systemd, "/run/ninepd/load.sock") == {b"load", b"file"}


def restarted(systemd: Systemd, unit: str) -> bool:
    return (systemd.show(unit, "NRestarts"), systemd.show(unit, "SubState")) == ("1", "running")


def test_crash(systemd: Systemd) -> None:
    configure(systemd, "crash", "crash")
    systemd.control("start", "ninepd@crash.socket", "ninepd@crash.service")
    assert names(systemd, "/run/ninepd/crash.sock") == {b"crash"}
    systemd.control("kill", "--signal=KILL", "ninepd@crash.service")
    eventually(lambda: restarted(systemd, "ninepd@crash.service"), "restarted", 20)
    assert names(systemd, "/run/ninepd/crash.sock") == {b"crash"}


def test_daemon_that_hangs(systemd: Systemd) -> None:
    configure(systemd, "hang", "hang")
    dropin = systemd.path("/etc/systemd/system/ninepd@hang.service.d")
    dropin.mkdir()
    (dropin / "soon.conf").write_text("[Service]\nWatchdogSec=1\nTimeoutStopSec=1\n")
    systemd.control("start", "ninepd@hang.socket", "ninepd@hang.service")
    systemd.control("kill", "--signal=STOP", "ninepd@hang.service")
    eventually(lambda: restarted(systemd, "ninepd@hang.service"), "restarted", 20)
    assert names(systemd, "/run/ninepd/hang.sock") == {b"hang"}


def test_configuration_that_cannot_work_is_not_tried_again(systemd: Systemd) -> None:
    systemd.path("/etc/ninepd/bad.toml").write_text('[[export]]\nexport = "/nowhere"\n')
    with pytest.raises(AssertionError):
        systemd.control("start", "ninepd@bad.service")
    assert systemd.show("ninepd@bad.service", "ExecMainStatus") == "2"
    assert systemd.show("ninepd@bad.service", "NRestarts") == "0"
    assert systemd.show("ninepd@bad.service", "ActiveState") == "failed"


def test_socket_of_its_own(systemd: Systemd) -> None:
    """Made, and removed, within the hardening; and what the host mounts later appears."""
    folder = configure(systemd, "own", "own")
    config = systemd.path("/etc/ninepd/own.toml")
    config.write_text(config.read_text() + 'socket-path = "/run/ninepd/own.sock"\n')
    (folder / "later").mkdir()
    systemd.control("start", "ninepd@own.service")
    systemd.run("mount", "-t", "tmpfs", "none", "/srv/guests/own/later")
    (folder / "later/file").touch()
    with Client(str(systemd.path("/run/ninepd/own.sock"))) as client:
        client.attach()
        client.walk(ROOT, 1, b"later")
        assert client.names(1) == {b"file"}
    systemd.control("stop", "ninepd@own.service")
    assert not systemd.path("/run/ninepd/own.sock").exists()


def test_reload(systemd: Systemd) -> None:
    """An export more, by a socket of its own; the others notice nothing."""
    configure(systemd, "again", "again")
    config = systemd.path("/etc/ninepd/again.toml")
    systemd.control("start", "ninepd@again.socket")
    with Client(str(systemd.path("/run/ninepd/again.sock"))) as client:
        client.attach()
        before = config.read_text()
        configure(systemd, "again", "more")
        more = config.read_text() + 'socket-path = "/run/ninepd/more.sock"\n'
        config.write_text(before + more)
        systemd.control("reload", "ninepd@again.service")
        eventually(systemd.path("/run/ninepd/more.sock").exists, "the other socket")
        assert names(systemd, "/run/ninepd/more.sock") == {b"more"}
        assert client.names(ROOT) == {b"again"}
        config.write_text(before)
        systemd.control("reload", "ninepd@again.service")
        eventually(lambda: not systemd.path("/run/ninepd/more.sock").exists(), "it goes")
        assert client.names(ROOT) == {b"again"}
    eventually(
        lambda: systemd.show("ninepd@again.service", "ActiveState") == "active", "it has reloaded"
    )
    systemd.control("stop", "ninepd@again.socket", "ninepd@again.service")
    assert systemd.show("ninepd@again.service", "Result") == "success"


def test_several_exports(systemd: Systemd) -> None:
    """As the comment in ninepd@.socket has it."""
    configure(systemd, "pair", "left", "right")
    for tag in ("right", "left"):
        systemd.path(f"/etc/systemd/system/pair-{tag}.socket").write_text(
            f"[Socket]\nListenStream=/run/ninepd/pair-{tag}.sock\n"
            f"Service=ninepd@pair.service\nFileDescriptorName={tag}\n"
        )
    systemd.control("start", "pair-left.socket", "pair-right.socket")
    for tag in ("left", "right"):
        assert names(systemd, f"/run/ninepd/pair-{tag}.sock") == {tag.encode()}
    with Client(str(systemd.path("/run/ninepd/pair-left.sock"))):
        eventually(
            lambda: (
                systemd.show("ninepd@pair.service", "StatusText")
                == "Serving 2 exports: 1 front end connected"
            ),
            "the status",
        )


def test_without_privileges(systemd: Systemd) -> None:
    """Guests have owners, device nodes and set-ID bits all the same; the host's user is one."""
    folder = systemd.path("/var/lib/ninepd/share")
    folder.mkdir(parents=True)
    uid, gid = (int(systemd.run("id", option, "ninepd")) for option in ("-u", "-g"))
    for path in (folder.parent, folder):
        os.chown(path, uid, gid)
    systemd.path("/etc/ninepd/mapped.toml").write_text(
        '[[export]]\nexport = "/var/lib/ninepd/share"\ntag = "share"\n'
    )
    systemd.control("start", "ninepd-mapped@mapped.socket")
    group = systemd.run("stat", "--format=%G", "/run/ninepd/mapped.sock").strip()
    assert group == "ninepd-guests"
    with Client(str(systemd.path("/run/ninepd/mapped.sock"))) as client:
        client.attach()
        client.rpc(Tmknod(ROOT, b"block", stat.S_IFBLK | 0o600, 250, 7, 0))
        make_program(client)
        seen = client.getattr(2)
        status = systemd.show("ninepd-mapped@mapped.service", "StatusText")
    assert (seen.uid, seen.gid, seen.mode & 0o7777) == (1234, 1235, 0o6755)
    found = (folder / "folder/program").stat()
    assert (found.st_uid, found.st_mode & 0o7777) == (uid, 0o600)
    assert "(mapped-" in status
    assert "sandbox landlock)" in status


_MANAGER = """
[Service]
Type=notify
ExecStart=/usr/lib/systemd/systemd --user
User=daemon
Delegate=yes
RuntimeDirectory=user/1
Environment=HOME=/home/me XDG_RUNTIME_DIR=/run/user/1 SYSTEMD_UNIT_PATH=/etc/systemd/user
"""
"""Of the user 1, as logind starts them."""


@pytest.mark.parametrize("sandbox", ["landlock", "namespace"])
def test_of_a_user(systemd: Systemd, sandbox: str) -> None:
    """Whose files belong to the guest's root."""
    folder = systemd.path(f"/home/me/{sandbox}")
    folder.mkdir(parents=True)
    os.chown(folder, 1, 1)
    config = systemd.path(f"/home/me/.config/ninepd/{sandbox}.toml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(
        f'[[export]]\nexport = "/home/me/{sandbox}"\ntag = "project"\nsandbox = "{sandbox}"\n'
        'map-uid = ["0:1:1"]\nmap-gid = ["0:1:1"]\n'
    )
    systemd.path("/etc/systemd/system/manager.service").write_text(_MANAGER)
    systemd.control("start", "manager.service")
    user = ("setpriv", "--reuid=1", "--regid=1", "--clear-groups", "env")
    control = (*user, "XDG_RUNTIME_DIR=/run/user/1", "systemctl", "--user")
    systemd.run(*control, "start", f"ninepd@{sandbox}.socket")
    path = systemd.path(f"/run/user/1/ninepd/{sandbox}.sock")
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (1, 0o600)
    with Client(str(path)) as client:
        client.attach()
        assert client.getattr(ROOT).uid == 0
        make_program(client)
        status = systemd.run(*control, "show", "--property=StatusText", f"ninepd@{sandbox}.service")
    assert f"sandbox {sandbox})" in status
    assert (folder / "folder/program").stat().st_uid == 1


UNITS = ("ninepd@a.service", "ninepd@a.socket", "ninepd-mapped@a.service", "ninepd-mapped@a.socket")


def test_nothing_is_to_be_said_of_the_units(systemd: Systemd) -> None:
    verify = "systemd-analyze verify --man=no"
    assert systemd.run("sh", "-c", f"{verify} {' '.join(UNITS)} 2>&1") == ""
    settings = "HOME=/root XDG_RUNTIME_DIR=/run SYSTEMD_UNIT_PATH=/etc/systemd/user"
    found = systemd.run("sh", "-c", f"{settings} {verify} --user {' '.join(UNITS[:2])} 2>&1")
    assert found == ""


@pytest.mark.parametrize(("unit", "most"), [("ninepd-mapped@", 10), ("ninepd@", 30)])
def test_exposure(systemd: Systemd, unit: str, most: int) -> None:
    """Tenths, as ``systemd-analyze security`` counts them, which differs a little by version."""
    path = f"/etc/systemd/system/{unit}.service"
    systemd.run("systemd-analyze", "security", "--offline=yes", f"--threshold={most}", path)
